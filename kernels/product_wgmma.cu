// architectures: 90a
// Products (include/product.cuh) of many rows on Hopper: prefill and the vision tower.
// x, weights, bias bf16; depth, width and rows of out multiples of 8, for QKV heads of 128; sums in f32, k ascending in
// steps of 64
//
// Tiles of 128 rows by WIDTH columns. One warp group copies: TMA brings 64 elements of depth of a tile's rows and weights
// into a ring of stages in shared memory, in the 128-byte swizzle that wgmma reads. Two warp groups multiply, 64 rows
// each, with their sums in registers. Blocks are persistent, one per multiprocessor, so that the copies of a next tile run
// while a tile is finished.
//
// What bounds such a kernel is the way from the L2 cache to the multiprocessors, so two blocks make a cluster: they take
// two tiles of the same columns, each copies half of their weights, and what it copies arrives in both. An odd tile of
// rows is left over; the cluster then takes two neighbouring columns of it, and shares nothing. Left-over tiles (the text
// around an image: few rows, all the weights of an expert) are spread evenly among the others, which hides their weights'
// way from memory.
//
// The rows of a tile are 16 groups of up to 8 rows, each from anywhere (row_group): one copy of 128 rows where they
// follow each other, else 16 copies of 8, so that the few text tokens around an image share a tile.
// WIDTH is chosen by the wrapper so that the tiles fill whole waves of the GPU (ops::product_wgmma).
// Paired sums: the tile's first WIDTH / 2 weight rows are firsts, the others their seconds; for QKV, WIDTH covers whole
// heads in their natural order, and a pair is 64 columns apart.
//
// launch   grid = 2 * min(units, multiprocessors / 2), clusters of 2 (each takes one of `num_units` at a time), block = 384,
//          shared = num_stages * (stage_bytes + 16) + 1024: the ring, its barriers, and what aligns it
// wrapper  cogvlm-cuda ops::product_wgmma     oracle  oracle::{linear, linear_residual, gate_up, qkv_rope_append}
// spills allowed: product_wgmma_bias_gelu_240 90a 16 outside of its loop
#include "include/maps.cuh"
#include "include/product.cuh"
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#include "include/wgmma.cuh"
#endif

constexpr u32 THREADS = 384;
constexpr u32 TILE_ROWS = 128;
constexpr u32 STEP = 64;
constexpr u32 ROW_BYTES = STEP * 2;  // one row of a tile: the width of the swizzle

__host__ __device__ constexpr u32 stage_bytes(u32 width) { return (TILE_ROWS + width) * ROW_BYTES; }
// As many stages as fit beside the barriers.
__host__ __device__ constexpr u32 num_stages(u32 width) { return (227 * 1024 - 2048) / stage_bytes(width); }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrives at the barrier of block `rank` of the cluster. No wider release is needed: what it says is that products have
// read a stage, and they write no memory. (With .release.cluster every step of depth pays for a fence of all memory.)
__device__ __forceinline__ void barrier_arrive(u32 barrier, u32 rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(barrier), "r"(rank) : "memory");
}
// Waits for the end of the phase whose parity is `parity`.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra done;\n"
        "bra again;\n"
        "done:\n}\n" ::"r"(barrier), "r"(parity) : "memory");
}
// Copies the box at column `k`, row `row`.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, u32 barrier, u32 k, u32 row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(k), "r"(row) : "memory");
}
// Copies the box to the same place in both blocks of the cluster; each one's barrier counts the bytes.
__device__ __forceinline__ void copy_box_to_both(u32 to, const TensorMap& map, u32 barrier, u32 k, u32 row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to), "l"(&map), "r"(barrier), "r"(k), "r"(row), "h"(u16(3)) : "memory");
}
__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// All threads of both blocks.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// What wgmma is told of an operand: rows of 128 bytes in the 128-byte swizzle, 8 rows every 1024 bytes.
__device__ __forceinline__ u64 operand(u32 address) {
    return u64((address & 0x3ffff) >> 4) | (u64(1) << 16) | (u64(1024 >> 4) << 32) | (u64(1) << 62);
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <u32 LEFT> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Two tiles for the two blocks of a cluster, and this block's one of them.
struct Unit {
    u32 expert, first_group, column;
    bool shares_weights;
};
__device__ __forceinline__ u32 num_units(const Product& a, u32 num_columns) {
    const u32 vision = a.num_vision_tiles, language = a.num_tiles_m - vision;
    return (vision / 2 + language / 2) * num_columns + (vision % 2 + language % 2) * ((num_columns + 1) / 2);
}
__device__ __forceinline__ Unit unit_at(const Product& a, u32 num_columns, u32 units, u32 unit, u32 rank) {
    const u32 vision = a.num_vision_tiles, language = a.num_tiles_m - vision;
    const u32 odd = vision % 2 + language % 2, pairs = vision / 2 + language / 2;
    const u32 left_over = odd * ((num_columns + 1) / 2);
    // Evenly spread: before unit u stand floor(u * left_over / units) of them.
    const u32 before = unit * left_over / units;
    u32 tile, column, expert;
    bool shares = (unit + 1) * left_over / units == before;
    if (shares) {
        const u32 index = unit - before, pair = index % pairs;
        column = index / pairs;
        expert = pair < vision / 2 ? 1 : 0;
        tile = 2 * (expert ? pair : pair - vision / 2) + rank;
    } else {
        column = before / odd * 2 + rank;
        // Where both experts have an odd tile they take turns.
        expert = odd == 2 ? before % 2 : vision % 2;
        tile = (expert ? vision : language) - 1;
    }
    return {expert, tile * (TILE_ROWS / GROUP_ROWS), column, shares};
}

// Columns of the result that a tile covers.
template <u32 FINISH, u32 WIDTH> __host__ __device__ constexpr u32 tile_columns() {
    return FINISH == GATE_UP ? WIDTH / 2 : WIDTH;
}

template <u32 FINISH, u32 WIDTH>
__device__ void copy_tiles(
    const Product& a, const Maps& maps, u32 stages, u32 full, u32 empty, u32 num_columns, u32 units, u32 rank) {
    constexpr u32 STAGES = num_stages(WIDTH);
    constexpr u32 HALF_BYTES = WIDTH / 2 * ROW_BYTES;
    const u32 lane = threadIdx.x % 32;
    u32 stage = 0, parity = 0;
    for (u32 u = blockIdx.x / 2; u < units; u += gridDim.x / 2) {
        const Unit unit = unit_at(a, num_columns, units, u, rank);
        // Lane i knows group i.
        RowGroup group = {0, 0};
        if (lane < TILE_ROWS / GROUP_ROWS) group = row_group(a, unit.expert, unit.first_group + lane);
        const u32 first = __shfl_sync(0xffffffffu, group.first, 0);
        const bool follows = group.count == 0 || group.first == first + lane * GROUP_ROWS;
        const bool in_one = __all_sync(0xffffffffu, lane >= TILE_ROWS / GROUP_ROWS || follows);
        const u32 num_groups = __popc(__ballot_sync(0xffffffffu, group.count > 0));
        const u32 x_bytes = in_one ? TILE_ROWS * ROW_BYTES : num_groups * GROUP_ROWS * ROW_BYTES;
        const u32 column = unit.column * tile_columns<FINISH, WIDTH>();
        // The two halves of the weights: gates and ups, or one below the other.
        const TensorMap& upper = maps.weight[unit.expert];
        const TensorMap& lower = FINISH == GATE_UP ? maps.second[unit.expert] : maps.weight[unit.expert];
        const u32 lower_row = FINISH == GATE_UP ? column : column + WIDTH / 2;
        for (u32 k = 0; k < a.depth; k += STEP) {
            const u32 to = stages + stage * stage_bytes(WIDTH), barrier = full + 8 * stage;
            barrier_wait(empty + 8 * stage, parity ^ 1);
            if (lane == 0) {
                barrier_expect(barrier, x_bytes + 2 * HALF_BYTES);
                const u32 weights = to + TILE_ROWS * ROW_BYTES;
                if (unit.shares_weights) {
                    copy_box_to_both(weights + rank * HALF_BYTES, rank ? lower : upper, barrier, k,
                                     rank ? lower_row : column);
                } else {
                    copy_box(weights, upper, barrier, k, column);
                    copy_box(weights + HALF_BYTES, lower, barrier, k, lower_row);
                }
                if (in_one) copy_box(to, maps.x, barrier, k, first);
            }
            __syncwarp();  // bytes are expected before any arrive
            if (!in_one && group.count > 0)
                copy_box(to + lane * GROUP_ROWS * ROW_BYTES, maps.x_groups, barrier, k, group.first);
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
    }
}

// Four registers of four lanes of a quad, transposed: lane t gets register t of all four lanes, in lane order.
__device__ __forceinline__ void transpose_quad(u32 (&r)[4], u32 t) {
    const bool odd = t & 1, upper = t & 2;
    u32 send = odd ? r[0] : r[1], got = __shfl_xor_sync(0xffffffffu, send, 1);
    if (odd) r[0] = got; else r[1] = got;
    send = odd ? r[2] : r[3];
    got = __shfl_xor_sync(0xffffffffu, send, 1);
    if (odd) r[2] = got; else r[3] = got;
    send = upper ? r[0] : r[2];
    got = __shfl_xor_sync(0xffffffffu, send, 2);
    if (upper) r[0] = got; else r[2] = got;
    send = upper ? r[1] : r[3];
    got = __shfl_xor_sync(0xffffffffu, send, 2);
    if (upper) r[1] = got; else r[3] = got;
}

__device__ __forceinline__ u32 add_rounded(u32 residual, u32 product) {
    return pack_bf16(low_bf16(residual) + low_bf16(product), high_bf16(residual) + high_bf16(product));
}

// Columns 8 j + 2 t and the next of sums d[4 j + 2 * half], finished and packed.
template <u32 FINISH>
__device__ __forceinline__ u32 finish_pair(const Product& a, float first, float second, u32 column) {
    if (FINISH == RESIDUAL) return pack_bf16(first, second);
    u32 bias = 0;
    if (a.bias && column < a.width) bias = *reinterpret_cast<const u32*>(static_cast<const bf16*>(a.bias) + column);
    if (FINISH == BIAS) return pack_bf16(first + low_bf16(bias), second + high_bf16(bias));
    const u32 rounded_sum = pack_bf16(first + low_bf16(bias), second + high_bf16(bias));
    return pack_bf16(gelu<bf16>(low_bf16(rounded_sum)), gelu<bf16>(high_bf16(rounded_sum)));
}

// Stores one row's part of a tile: 8-column pieces `piece(j)` for j < PIECES, packed two to a register per lane of the quad.
template <u32 FINISH, u32 PIECES, class Piece>
__device__ __forceinline__ void store_row(const Product& a, bool is_row, u32 row, u32 column, u32 t, Piece piece) {
    bf16* out = static_cast<bf16*>(a.out) + u64(row) * a.out_width;
    // Four pieces at a time: each lane of a quad stores 16 bytes.
#pragma unroll
    for (u32 j = 0; j < PIECES / 4 * 4; j += 4) {
        u32 r[4] = {piece(j), piece(j + 1), piece(j + 2), piece(j + 3)};
        transpose_quad(r, t);
        const u32 n = column + 8 * (j + t);
        if (!is_row || n >= a.width) continue;
        uint4* to = reinterpret_cast<uint4*>(out + n);
        if (FINISH == RESIDUAL) {
            const uint4 before = *to;
            r[0] = add_rounded(before.x, r[0]), r[1] = add_rounded(before.y, r[1]);
            r[2] = add_rounded(before.z, r[2]), r[3] = add_rounded(before.w, r[3]);
        }
        *to = make_uint4(r[0], r[1], r[2], r[3]);
        asm volatile("" ::: "memory");  // one after the other: there are no registers to load ahead into
    }
#pragma unroll
    for (u32 j = PIECES / 4 * 4; j < PIECES; ++j) {
        u32 r = piece(j);
        const u32 n = column + 8 * j + 2 * t;
        if (!is_row || n >= a.width) continue;
        u32* to = reinterpret_cast<u32*>(out + n);
        *to = FINISH == RESIDUAL ? add_rounded(*to, r) : r;
    }
}

// Stores one row's part of a tile as it is: the four lanes of a quad have 32 bytes of each piece of 8 columns.
template <u32 PIECES, class Sums>
__device__ __forceinline__ void store_sums(const Product& a, bool is_row, u32 row, u32 column, u32 t, Sums sums) {
    if (!is_row) return;
    float* out = static_cast<float*>(a.out) + u64(row) * a.out_width;
#pragma unroll
    for (u32 j = 0; j < PIECES; ++j) {
        const u32 n = column + 8 * j + 2 * t;
        if (n < a.width) *reinterpret_cast<float2*>(out + n) = sums(j);
    }
}

// Stores one row of a tile of WIDTH / 128 heads of 128.
template <u32 WIDTH, class Sums>
__device__ __forceinline__ void store_heads(const Product& a, bool is_row, u32 row, u32 column, u32 t, Sums sum) {
    const float* angles = a.rope + u64(is_row ? a.positions[row] : 0) * 128;
#pragma unroll
    for (u32 head = 0; head < WIDTH / 128; ++head) {
        bool rotates = false;
        bf16* to = nullptr;
        const bool stores = is_row && column + head * 128 < a.out_width + 2 * a.num_kv_heads * 128;
        if (stores) to = head_address<bf16>(a, row, column / 128 + head, rotates);
#pragma unroll
        for (u32 j = 0; j < 8; j += 4) {
            u32 firsts[4], seconds[4];
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const u32 at = 16 * head + j + i, angle = 8 * (j + i) + 2 * t;
                float2 low = make_float2(sum(at, 0), sum(at + 8, 0)), high = make_float2(sum(at, 1), sum(at + 8, 1));
                if (rotates) {
                    const float2 cosine = *reinterpret_cast<const float2*>(angles + angle);
                    const float2 sine = *reinterpret_cast<const float2*>(angles + 64 + angle);
                    low = rotated<bf16>(low.x, low.y, cosine.x, sine.x, a.published != 0);
                    high = rotated<bf16>(high.x, high.y, cosine.y, sine.y, a.published != 0);
                }
                firsts[i] = pack_bf16(low.x, high.x);
                seconds[i] = pack_bf16(low.y, high.y);
            }
            transpose_quad(firsts, t);
            transpose_quad(seconds, t);
            if (!stores) continue;
            reinterpret_cast<uint4*>(to + 8 * (j + t))[0] = make_uint4(firsts[0], firsts[1], firsts[2], firsts[3]);
            reinterpret_cast<uint4*>(to + 64 + 8 * (j + t))[0] = make_uint4(seconds[0], seconds[1], seconds[2], seconds[3]);
        }
    }
}

template <u32 FINISH, u32 WIDTH>
__device__ void multiply_tiles(
    const Product& a, u32 stages, u32 full, u32 empty, u32 num_columns, u32 units, u32 rank) {
    constexpr u32 STAGES = num_stages(WIDTH);
    const u32 group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const u32 g = lane / 4, t = lane % 4;
    const u32 steps = (a.depth + STEP - 1) / STEP;
    u32 stage = 0, parity = 0;
    for (u32 u = blockIdx.x / 2; u < units; u += gridDim.x / 2) {
        float d[WIDTH / 2];
        u32 previous = 0;
        for (u32 step = 0; step < steps; ++step) {
            barrier_wait(full + 8 * stage, parity);
            const u32 rows = stages + stage * stage_bytes(WIDTH) + group * 64 * ROW_BYTES;
            const u32 weights = stages + stage * stage_bytes(WIDTH) + TILE_ROWS * ROW_BYTES;
            const u64 x = operand(rows), w = operand(weights);
            wgmma_fence();
#pragma unroll
            for (u32 k = 0; k < STEP / 16; ++k)
                // 16 elements on are 32 bytes on, which an address counts in sixteenths.
                wgmma(d, x + 2 * k, w + 2 * k, step > 0 || k > 0 ? 1 : 0);
            wgmma_commit();
            if (step > 0) {
                wgmma_wait<1>();  // the products of the step before have read their stage
                // Both blocks copy into it.
                if (lane < 2) barrier_arrive(empty + 8 * previous, lane);
            }
            previous = stage;
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
        wgmma_wait<0>();
        if (lane < 2) barrier_arrive(empty + 8 * previous, lane);

        const Unit place = unit_at(a, num_columns, units, u, rank);
        const u32 column = place.column * tile_columns<FINISH, WIDTH>();
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            // Each group of rows lies in one half of the 16 rows of a warp.
            const RowGroup rows = row_group(a, place.expert, place.first_group + group * 8 + warp * 2 + half);
            const bool is_row = g < rows.count;
            const u32 row = rows.first + g;
            if (FINISH == QKV) {
                store_heads<WIDTH>(a, is_row, row, column, t, [&](u32 j, u32 i) { return d[4 * j + 2 * half + i]; });
            } else if (FINISH == GATE_UP) {
                store_row<FINISH, WIDTH / 16>(a, is_row, row, column, t, [&](u32 j) {
                    const u32 at = 4 * j + 2 * half, other = at + WIDTH / 4;
                    return pack_bf16(gated<bf16>(d[at], d[other]), gated<bf16>(d[at + 1], d[other + 1]));
                });
            } else if (FINISH == PARTIAL) {
                store_sums<WIDTH / 8>(a, is_row, row, column, t, [&](u32 j) {
                    return make_float2(d[4 * j + 2 * half], d[4 * j + 2 * half + 1]);
                });
            } else {
                store_row<FINISH, WIDTH / 8>(a, is_row, row, column, t, [&](u32 j) {
                    const u32 at = 4 * j + 2 * half;
                    return finish_pair<FINISH>(a, d[at], d[at + 1], column + 8 * j + 2 * t);
                });
            }
        }
    }
}

template <u32 FINISH, u32 WIDTH> __device__ void product(const Product& a, const Maps& maps) {
    constexpr u32 STAGES = num_stages(WIDTH);
    extern __shared__ u8 shared[];
    // The swizzle repeats every 1024 bytes of the address.
    const u32 stages = (shared_address(shared) + 1023) / 1024 * 1024;
    const u32 full = stages + STAGES * stage_bytes(WIDTH), empty = full + 8 * STAGES;
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < STAGES; ++i) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, 16);  // every multiplying warp of both blocks is done with a stage
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        prefetch_map(maps.x);
        prefetch_map(maps.weight[0]);
        prefetch_map(maps.weight[1]);
    }
    cluster_sync();  // barriers exist in both blocks
    allow_next();
    wait_for_previous();
    constexpr u32 COLUMNS = tile_columns<FINISH, WIDTH>();
    const u32 columns = FINISH == QKV ? 2 * a.width : a.width;
    const u32 num_columns = (columns + COLUMNS - 1) / COLUMNS, units = num_units(a, num_columns), rank = cluster_rank();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x < 32) copy_tiles<FINISH, WIDTH>(a, maps, stages, full, empty, num_columns, units, rank);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        multiply_tiles<FINISH, WIDTH>(a, stages, full, empty, num_columns, units, rank);
    }
    __syncwarp();
    cluster_sync();  // neither block leaves while the other still writes or arrives here
}
#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define BODY(FINISH, WIDTH) product<FINISH, WIDTH>(a, maps);
#define CLUSTER __cluster_dims__(2, 1, 1)
#else
#define BODY(FINISH, WIDTH)
#define CLUSTER
#endif
#define PRODUCT(NAME, FINISH, WIDTH)                                                                 \
    extern "C" __global__ __launch_bounds__(THREADS, 1) CLUSTER                                         \
        void product_wgmma_##NAME##_##WIDTH(                                                         \
        const __grid_constant__ Product a, const __grid_constant__ Maps maps) {                      \
        BODY(FINISH, WIDTH)                                                                          \
    }
#define PRODUCTS(NAME, FINISH) \
    PRODUCT(NAME, FINISH, 144) \
    PRODUCT(NAME, FINISH, 176) \
    PRODUCT(NAME, FINISH, 208) \
    PRODUCT(NAME, FINISH, 240) \
    PRODUCT(NAME, FINISH, 256)
PRODUCTS(bias, BIAS)
// Not 256: the activation's own registers would not fit beside the sums.
PRODUCT(bias_gelu, BIAS_GELU, 144)
PRODUCT(bias_gelu, BIAS_GELU, 176)
PRODUCT(bias_gelu, BIAS_GELU, 208)
PRODUCT(bias_gelu, BIAS_GELU, 240)
PRODUCTS(residual, RESIDUAL)
PRODUCTS(partial, PARTIAL)
PRODUCTS(gate_up, GATE_UP)
PRODUCT(qkv, QKV, 128)
PRODUCT(qkv, QKV, 256)
