// Devices that compute one layer together (members) add up their parts of a product, each to its copy of the residual:
//   residual[r, i] = T(residual[r, i] + T(sum_m sums_m[r, i])), m in the order of the members: the same bits everywhere
//   y[r, i] = weight[i] * residual[r, i] / sqrt(mean_j residual[r, j]^2 + eps), where `weight` is given (rms_norm.cu)
// sums_m   f32 [.., width] row-major in the memory of member m, which all members read; a slot of two
// inbox_m  sums of member m in one's own memory, [rows][width] of words with numbers (include/exchange.cuh)
// residual, y  T [.., width], T float or bf16; weight [width] of any type, rounded to T; any width
// rounding sums in f32; as written above; the norm once, at the store
//
// Many rows are read where they lie (`add_partials_*`): every block has an epoch on each member, a number that its own
// launches count up, and a flag in the memory of every member for every other member. A block tells the others its new
// epoch (release: all that came before it on its stream is there, the sums among it) and waits until their flags have
// reached it (acquire). All members launch the same grids in the same order, so epochs agree; they lie in memory, so a
// launch can be recorded and run again. Nobody but the blocks of one number wait for each other, and they wait for
// kernels that come before, never after.
// Why two slots suffice: slot s is written again by a product after the next meeting of this member. There it has heard
// of the next epoch of every other member, whose stream was then past its reading of s.
//
// Few rows were sent by the products that computed them (`add_pushed_*`): nothing but their arrival is waited for.
//
// Whoever waits for longer than `patience_ns` says for whom (`failure`, host memory) and waits for nobody again.
//
// launch   add_partials_*: grid = min(rows, some), the same on all members, block = THREADS; add_pushed_*: grid = rows,
//          block = THREADS, or PUSHED_THREADS for a width of 4096          wrapper cogvlm-cuda ops::add_partials
// oracle   the order written above, in cogvlm-cuda's tests; oracle::rms_norm
// add_partials_echo: one thread writes what it finds in each field of what members are told, for tests
#include "include/exchange.cuh"

constexpr u32 THREADS = 256;
constexpr u32 PUSHED_THREADS = 512;

// Field by field as `Meeting` in cogvlm-cuda/src/ops/add_partials.rs.
struct Meeting {
    const float* sums[MAX_MEMBERS];    // of every member
    const u64* inboxes[MAX_MEMBERS];   // in this member's memory, of every other member
    u32* flags[MAX_MEMBERS];           // of every member: [blocks][MAX_MEMBERS], by whom they are written
    u32* epochs;                       // [blocks], of this member
    const u32* exchange;               // number of this exchange
    u32* next_exchange;                // where that of the next one goes
    u32* broken;                       // not 0 once somebody did not come
    u32* failure;                      // on the host: 1 + who that was
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
__device__ __forceinline__ u64 load_told(const u64* p) {
    u64 v;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
// Each of the two words is there as a whole or not at all.
__device__ __forceinline__ ulonglong2 load_two_told(const u64* p) {
    ulonglong2 v;
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ u64 now_ns() {
    u64 ns;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
    return ns;
}

// Counts how often somebody was asked for, and looks at the clock now and then.
struct Patience {
    u64 begin = 0;
    u32 polls = 0;

    // Whether `peer` is waited for no longer.
    __device__ __forceinline__ bool is_over(const Meeting& a, u32 peer) {
        if (++polls % 128 != 0) return false;
        const u64 now = now_ns();
        if (begin == 0) begin = now;
        const bool is_broken = load_acquire(a.broken) != 0;
        if (!is_broken && now - begin < a.patience_ns) return false;
        if (!is_broken) {
            store_release(a.failure, peer + 1);
            store_release(a.broken, 1);
        }
        return true;
    }
};

// The sums of all members are there once all threads of the block are past this.
__device__ __forceinline__ void meet(const Meeting& a) {
    const u32 peer = threadIdx.x;
    if (peer < a.num_members && peer != a.member) {
        const u32 epoch = a.epochs[blockIdx.x] + 1, block = blockIdx.x * MAX_MEMBERS;
        store_release(a.flags[peer] + block + a.member, epoch);
        const u32* flag = a.flags[a.member] + block + peer;
        Patience patience;
        while (int(load_acquire(flag) - epoch) < 0 && !patience.is_over(a, peer)) {}
    }
    __syncthreads();  // every flag was seen, and the epoch read
    if (threadIdx.x == 0) a.epochs[blockIdx.x] += 1;
}

// Lets the other slot have the number after `number`; 0 is what memory begins with. Nobody reads that slot's number now.
__device__ __forceinline__ void count_exchange(const Meeting& a, u32 number) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *a.next_exchange = number + 1 == 0 ? 1 : number + 1;
}
// The same where nobody needs the number.
__device__ __forceinline__ void count_exchange(const Meeting& a) {
    if (blockIdx.x == 0 && threadIdx.x == 0) count_exchange(a, load_word(a.exchange));
}

// `sum` of all members onto `residual`.
template <class T> __device__ __forceinline__ float added(T residual, float sum) {
    return rounded<T>(to_float(residual) + rounded<T>(sum));
}

// Two sums onto the residuals in `v`; gives their squares.
__device__ __forceinline__ float add_two(u32& v, float2 sums) {
    const u32 sum = pack_bf16(sums.x, sums.y);
    v = pack_bf16(low_bf16(v) + low_bf16(sum), high_bf16(v) + high_bf16(sum));
    return low_bf16(v) * low_bf16(v) + high_bf16(v) * high_bf16(v);
}

// Two elements of the norm.
__device__ __forceinline__ u32 normed_two(u32 v, u32 w, float scale) {
    return pack_bf16(low_bf16(w) * (low_bf16(v) * scale), high_bf16(w) * (high_bf16(v) * scale));
}

// Eight sums onto the residuals in `v`; gives their squares.
__device__ __forceinline__ float add_eight(uint4& v, const float (&sums)[8]) {
    return add_two(v.x, make_float2(sums[0], sums[1])) + add_two(v.y, make_float2(sums[2], sums[3])) +
           add_two(v.z, make_float2(sums[4], sums[5])) + add_two(v.w, make_float2(sums[6], sums[7]));
}

// Eight elements of the norm.
__device__ __forceinline__ uint4 normed_eight(uint4 v, uint4 w, float scale) {
    return make_uint4(normed_two(v.x, w.x, scale), normed_two(v.y, w.y, scale), normed_two(v.z, w.z, scale),
                      normed_two(v.w, w.w, scale));
}

__device__ __forceinline__ float inverse_root_mean(float squares, u32 width, float eps) {
    return 1.0f / sqrtf(squares / float(width) + eps);
}

// One row, `sum_at(i)` of all members.
template <class T, class SumAt>
__device__ __forceinline__ void add_row(const Meeting& a, T* residual, const void* weight, u32 weight_type, T* y,
                                        float eps, SumAt sum_at) {
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < a.width; i += THREADS) {
        const float v = added<T>(residual[i], sum_at(i));
        residual[i] = from_float<T>(v);
        squares += v * v;
    }
    if (!weight) return;
    const float scale = inverse_root_mean(block_sum<THREADS>(squares), a.width, eps);
    for (u32 i = threadIdx.x; i < a.width; i += THREADS)
        y[i] = from_float<T>(rounded<T>(load_element(weight, weight_type, i)) * (to_float(residual[i]) * scale));
}

template <class T>
__device__ void add(const Meeting& a, T* residual, const void* weight, u32 weight_type, T* y, float eps) {
    allow_next();
    wait_for_previous();
    count_exchange(a);
    for (u32 row = blockIdx.x; row < a.rows; row += gridDim.x) {
        if (row == blockIdx.x) meet(a);
        const u64 first = u64(row) * a.width;
        add_row<T>(a, residual + first, weight, weight_type, y + first, eps, [&](u32 i) {
            float sum = load_sum(a.sums[0] + first + i);
            for (u32 m = 1; m < a.num_members; ++m) sum += load_sum(a.sums[m] + first + i);
            return sum;
        });
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
    count_exchange(a);
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
            squares += add_eight(v[c], sums);
            out[c * THREADS + threadIdx.x] = v[c];
        }
        if (!weight) continue;
        const float scale = inverse_root_mean(block_sum<THREADS>(squares), WIDTH, eps);
#pragma unroll
        for (u32 c = 0; c < CHUNKS; ++c)
            reinterpret_cast<uint4*>(y + first)[c * THREADS + threadIdx.x] = normed_eight(v[c], w[c], scale);
    }
}

// What member `m` told of the element at `at`.
__device__ __forceinline__ float told(const Meeting& a, u32 m, u64 at, u32 number) {
    Patience patience;
    u64 word = load_told(a.inboxes[m] + at);
    while (u32(word >> 32) != number && !patience.is_over(a, m)) word = load_told(a.inboxes[m] + at);
    return __uint_as_float(u32(word));
}

template <class T>
__device__ void add_pushed(const Meeting& a, T* residual, const void* weight, u32 weight_type, T* y, float eps) {
    allow_next();
    wait_for_previous();
    if (blockIdx.x >= a.rows) return;
    const u32 number = load_word(a.exchange);
    count_exchange(a, number);
    const u64 first = u64(blockIdx.x) * a.width;
    auto part = [&](u32 m, u32 i) {
        return m == a.member ? load_sum(a.sums[m] + first + i) : told(a, m, first + i, number);
    };
    add_row<T>(a, residual + first, weight, weight_type, y + first, eps, [&](u32 i) {
        float sum = part(0, i);
        for (u32 m = 1; m < a.num_members; ++m) sum += part(m, i);
        return sum;
    });
}

// Four pairs of elements a thread, so far apart that what the threads of a warp read and write lies side by side. Needs
// width = PUSHED_THREADS * 8 exactly, bf16.
__device__ void add_pushed_wide(const Meeting& a, bf16* residual, const bf16* weight, bf16* y, float eps) {
    constexpr u32 PAIRS = 4, WIDTH = PUSHED_THREADS * 2 * PAIRS;
    allow_next();
    auto pair = [](u32 p) { return p * PUSHED_THREADS + threadIdx.x; };
    u32 w[PAIRS];
#pragma unroll
    for (u32 p = 0; p < PAIRS; ++p) w[p] = weight ? reinterpret_cast<const u32*>(weight)[pair(p)] : 0;
    const u64 first = u64(blockIdx.x) * WIDTH;
    // Half a layer of weights has passed since it was written.
    if (blockIdx.x < a.rows && threadIdx.x < WIDTH / 64) prefetch(residual + first + threadIdx.x * 64);
    wait_for_previous();
    if (blockIdx.x >= a.rows) return;
    const u32 number = load_word(a.exchange);
    // What is on this device is under way before the others are waited for.
    u32* out = reinterpret_cast<u32*>(residual + first);
    u32 v[PAIRS];
    float2 own[PAIRS], sums[PAIRS];
#pragma unroll
    for (u32 p = 0; p < PAIRS; ++p) {
        v[p] = out[pair(p)];
        own[p] = *reinterpret_cast<const float2*>(a.sums[a.member] + first + 2 * pair(p));
    }
    for (u32 m = 0; m < a.num_members; ++m) {
        float2 part[PAIRS];
        if (m == a.member) {
#pragma unroll
            for (u32 p = 0; p < PAIRS; ++p) part[p] = own[p];
        } else {
            Patience patience;
            bool is_there;
            do {
                is_there = true;
#pragma unroll
                for (u32 p = 0; p < PAIRS; ++p) {
                    const ulonglong2 words = load_two_told(a.inboxes[m] + first + 2 * pair(p));
                    is_there &= u32(words.x >> 32) == number && u32(words.y >> 32) == number;
                    part[p] = make_float2(__uint_as_float(u32(words.x)), __uint_as_float(u32(words.y)));
                }
            } while (!is_there && !patience.is_over(a, m));
        }
#pragma unroll
        for (u32 p = 0; p < PAIRS; ++p)
            sums[p] = m == 0 ? part[p] : make_float2(sums[p].x + part[p].x, sums[p].y + part[p].y);
    }
    count_exchange(a, number);
    float squares = 0.0f;
#pragma unroll
    for (u32 p = 0; p < PAIRS; ++p) {
        squares += add_two(v[p], sums[p]);
        out[pair(p)] = v[p];
    }
    if (!weight) return;
    const float scale = inverse_root_mean(block_sum<PUSHED_THREADS>(squares), WIDTH, eps);
#pragma unroll
    for (u32 p = 0; p < PAIRS; ++p) reinterpret_cast<u32*>(y + first)[pair(p)] = normed_two(v[p], w[p], scale);
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
extern "C" __global__ __launch_bounds__(THREADS) void add_pushed_bf16(
    const __grid_constant__ Meeting a, bf16* residual, const void* weight, u32 weight_type, bf16* y, float eps) {
    add_pushed(a, residual, weight, weight_type, y, eps);
}
extern "C" __global__ __launch_bounds__(PUSHED_THREADS) void add_pushed_bf16_4096(
    const __grid_constant__ Meeting a, bf16* residual, const bf16* weight, bf16* y, float eps) {
    add_pushed_wide(a, residual, weight, y, eps);
}

extern "C" __global__ void add_partials_echo(const __grid_constant__ Meeting a, const __grid_constant__ Push push,
                                             u64* fields) {
    auto put = [&](u64 field) { *fields++ = field; };
    auto put_address = [&](const void* field) { put(reinterpret_cast<u64>(field)); };
    for (u32 m = 0; m < MAX_MEMBERS; ++m) put_address(a.sums[m]);
    for (u32 m = 0; m < MAX_MEMBERS; ++m) put_address(a.inboxes[m]);
    for (u32 m = 0; m < MAX_MEMBERS; ++m) put_address(a.flags[m]);
    put_address(a.epochs);
    put_address(a.exchange);
    put_address(a.next_exchange);
    put_address(a.broken);
    put_address(a.failure);
    put(a.patience_ns);
    put(a.member);
    put(a.num_members);
    put(a.rows);
    put(a.width);
    for (u32 other = 0; other < MAX_MEMBERS - 1; ++other) put_address(push.inboxes[other]);
    put_address(push.exchange);
    put(push.num_others);
}
