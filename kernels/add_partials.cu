// Devices that compute one layer together (members) add up their parts of a product, each to its copy of the residual:
//   residual[r, i] = T(residual[r, i] + T(sum_m sums_m[r, i])), m in the order of the members: the same bits everywhere
//   y[r, i] = weight[i] * residual[r, i] / sqrt(mean_j residual[r, j]^2 + eps), where `weight` is given (rms_norm.cu)
// sums_m   f32 [.., width] row-major in the memory of member m, which all members read; a slot of two
// residual, y  T [.., width], T float or bf16; weight [width] of any type, rounded to T; any width
// rounding sums in f32; as written above; the norm once, at the store
//
// How members meet. Every block has an epoch on each member, a number that its own launches count up, and a flag in the
// memory of every member for every other member. A block tells the others its new epoch (release: all that came before
// it on its stream is there, the sums among it) and waits until their flags have reached it (acquire). All members
// launch the same grids in the same order, so epochs agree; they lie in memory, so a launch can be recorded and run
// again. Nobody but the blocks of one number wait for each other, and they wait for kernels that come before, never
// after.
// Why two slots suffice: slot s is written again by a product after the next meeting of this member. There it has heard
// of the next epoch of every other member, whose stream was then past its reading of s.
// Whoever waits for longer than `patience_ns` says for whom (`failure`, host memory) and waits for nobody again.
//
// launch   grid = min(rows, some), the same on all members, block = THREADS     wrapper cogvlm-cuda ops::add_partials
// oracle   the order written above, in cogvlm-cuda's tests; oracle::rms_norm
// add_partials_echo: one thread writes what it finds in each field of what members are told, for tests
#include "include/common.cuh"

constexpr u32 THREADS = 256;
constexpr u32 MAX_MEMBERS = 8;

// Field by field as `Meeting` in cogvlm-cuda/src/ops/add_partials.rs.
struct Meeting {
    const float* sums[MAX_MEMBERS];  // of every member
    u32* flags[MAX_MEMBERS];         // of every member: [blocks][MAX_MEMBERS], by whom they are written
    u32* epochs;                     // [blocks], of this member
    u32* broken;                     // not 0 once somebody did not come
    u32* failure;                    // on the host: 1 + who that was
    u64 patience_ns;
    u32 member;
    u32 num_members;
    u32 rows;
    u32 width;
};

__device__ __forceinline__ void store_release(u32* p, u32 v) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ u32 load_acquire(const u32* p) {
    u32 v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
// Past every cache that does not see what other devices write.
__device__ __forceinline__ float load_sum(const float* p) {
    float v;
    asm volatile("ld.relaxed.sys.global.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ float4 load_sums(const float* p) {
    float4 v;
    asm volatile("ld.relaxed.sys.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ u64 now_ns() {
    u64 ns;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
    return ns;
}

// The sums of all members are there once all threads of the block are past this.
__device__ __forceinline__ void meet(const Meeting& a) {
    const u32 peer = threadIdx.x;
    if (peer < a.num_members && peer != a.member) {
        const u32 epoch = a.epochs[blockIdx.x] + 1, block = blockIdx.x * MAX_MEMBERS;
        store_release(a.flags[peer] + block + a.member, epoch);
        const u32* flag = a.flags[a.member] + block + peer;
        u64 begin = 0;
        for (u32 polls = 1; int(load_acquire(flag) - epoch) < 0; ++polls) {
            if (polls % 128 != 0) continue;
            const u64 now = now_ns();
            if (begin == 0) begin = now;
            const bool is_broken = load_acquire(a.broken) != 0;
            if (!is_broken && now - begin < a.patience_ns) continue;
            if (!is_broken) {
                store_release(a.failure, peer + 1);
                store_release(a.broken, 1);
            }
            break;
        }
    }
    __syncthreads();  // every flag was seen, and the epoch read
    if (threadIdx.x == 0) a.epochs[blockIdx.x] += 1;
}

template <class T>
__device__ void add(const Meeting& a, T* residual, const void* weight, u32 weight_type, T* y, float eps) {
    allow_next();
    wait_for_previous();
    for (u32 row = blockIdx.x; row < a.rows; row += gridDim.x) {
        if (row == blockIdx.x) meet(a);
        const u64 first = u64(row) * a.width;
        float squares = 0.0f;
        for (u32 i = threadIdx.x; i < a.width; i += THREADS) {
            float sum = load_sum(a.sums[0] + first + i);
            for (u32 m = 1; m < a.num_members; ++m) sum += load_sum(a.sums[m] + first + i);
            const float v = rounded<T>(to_float(residual[first + i]) + rounded<T>(sum));
            residual[first + i] = from_float<T>(v);
            squares += v * v;
        }
        if (!weight) continue;
        const float scale = 1.0f / sqrtf(block_sum<THREADS>(squares) / float(a.width) + eps);
        for (u32 i = threadIdx.x; i < a.width; i += THREADS)
            y[first + i] = from_float<T>(
                rounded<T>(load_element(weight, weight_type, i)) * (to_float(residual[first + i]) * scale));
    }
}

// Eight elements a thread and chunk, of MEMBERS members at most. Needs width = THREADS * 8 * CHUNKS exactly, bf16.
template <u32 CHUNKS, u32 MEMBERS>
__device__ void add_wide(const Meeting& a, bf16* residual, const bf16* weight, bf16* y, float eps) {
    constexpr u32 WIDTH = THREADS * 8 * CHUNKS;
    allow_next();
    uint4 w[CHUNKS];
#pragma unroll
    for (u32 c = 0; c < CHUNKS; ++c)
        w[c] = weight ? reinterpret_cast<const uint4*>(weight)[c * THREADS + threadIdx.x] : make_uint4(0, 0, 0, 0);
    wait_for_previous();
    for (u32 row = blockIdx.x; row < a.rows; row += gridDim.x) {
        const u64 first = u64(row) * WIDTH;
        uint4* out = reinterpret_cast<uint4*>(residual + first);
        uint4 v[CHUNKS];
#pragma unroll
        for (u32 c = 0; c < CHUNKS; ++c) v[c] = out[c * THREADS + threadIdx.x];
        if (row == blockIdx.x) meet(a);
        // All loads are under way before the first is used: the way to another device is long.
        float4 parts[CHUNKS][MEMBERS][2];
#pragma unroll
        for (u32 c = 0; c < CHUNKS; ++c)
#pragma unroll
            for (u32 m = 0; m < MEMBERS; ++m) {
                const u64 at = first + (c * THREADS + threadIdx.x) * 8;
                const bool is_there = m < a.num_members;
                const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                parts[c][m][0] = is_there ? load_sums(a.sums[m] + at) : zero;
                parts[c][m][1] = is_there ? load_sums(a.sums[m] + at + 4) : zero;
            }
        float squares = 0.0f;
#pragma unroll
        for (u32 c = 0; c < CHUNKS; ++c) {
            const float4 low = parts[c][0][0], high = parts[c][0][1];
            float sums[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (u32 m = 1; m < MEMBERS; ++m) {
                const float4 low = parts[c][m][0], high = parts[c][m][1];
                sums[0] += low.x, sums[1] += low.y, sums[2] += low.z, sums[3] += low.w;
                sums[4] += high.x, sums[5] += high.y, sums[6] += high.z, sums[7] += high.w;
            }
            u32 pairs[4] = {v[c].x, v[c].y, v[c].z, v[c].w};
#pragma unroll
            for (u32 p = 0; p < 4; ++p) {
                const u32 sum = pack_bf16(sums[2 * p], sums[2 * p + 1]);
                pairs[p] = pack_bf16(low_bf16(pairs[p]) + low_bf16(sum), high_bf16(pairs[p]) + high_bf16(sum));
                squares += low_bf16(pairs[p]) * low_bf16(pairs[p]) + high_bf16(pairs[p]) * high_bf16(pairs[p]);
            }
            v[c] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
            out[c * THREADS + threadIdx.x] = v[c];
        }
        if (!weight) continue;
        const float scale = 1.0f / sqrtf(block_sum<THREADS>(squares) / float(WIDTH) + eps);
#pragma unroll
        for (u32 c = 0; c < CHUNKS; ++c) {
            const u32 pairs[4] = {v[c].x, v[c].y, v[c].z, v[c].w};
            const u32 weights[4] = {w[c].x, w[c].y, w[c].z, w[c].w};
            u32 result[4];
#pragma unroll
            for (u32 p = 0; p < 4; ++p)
                result[p] = pack_bf16(low_bf16(weights[p]) * (low_bf16(pairs[p]) * scale),
                                      high_bf16(weights[p]) * (high_bf16(pairs[p]) * scale));
            reinterpret_cast<uint4*>(y + first)[c * THREADS + threadIdx.x] =
                make_uint4(result[0], result[1], result[2], result[3]);
        }
    }
}

extern "C" __global__ __launch_bounds__(THREADS) void add_partials_f32(
    const __grid_constant__ Meeting a, float* residual, const void* weight, u32 weight_type, float* y, float eps) {
    add(a, residual, weight, weight_type, y, eps);
}
extern "C" __global__ __launch_bounds__(THREADS) void add_partials_bf16(
    const __grid_constant__ Meeting a, bf16* residual, const void* weight, u32 weight_type, bf16* y, float eps) {
    add(a, residual, weight, weight_type, y, eps);
}
extern "C" __global__ __launch_bounds__(THREADS) void add_partials_bf16_4096_x2(
    const __grid_constant__ Meeting a, bf16* residual, const bf16* weight, bf16* y, float eps) {
    add_wide<2, 2>(a, residual, weight, y, eps);
}
extern "C" __global__ __launch_bounds__(THREADS) void add_partials_bf16_4096_x8(
    const __grid_constant__ Meeting a, bf16* residual, const bf16* weight, bf16* y, float eps) {
    add_wide<2, 8>(a, residual, weight, y, eps);
}

extern "C" __global__ void add_partials_echo(const __grid_constant__ Meeting a, u64* fields) {
    auto put = [&](u64 field) { *fields++ = field; };
    auto put_address = [&](const void* field) { put(reinterpret_cast<u64>(field)); };
    for (u32 m = 0; m < MAX_MEMBERS; ++m) put_address(a.sums[m]);
    for (u32 m = 0; m < MAX_MEMBERS; ++m) put_address(a.flags[m]);
    put_address(a.epochs);
    put_address(a.broken);
    put_address(a.failure);
    put(a.patience_ns);
    put(a.member);
    put(a.num_members);
    put(a.rows);
    put(a.width);
}
