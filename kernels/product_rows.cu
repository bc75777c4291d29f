// Products (include/product.cuh) of 1 to 16 rows, all of one expert: decode. They run at the rate at which weights come
// from memory: every weight is read once, straight into registers, and used for all rows by the matrix units.
// x, weights bf16, depth a multiple of 8; sums in f32, in an order that depends on depth alone
//
// One m16n8k16 product has 16 rows of the weight as its A and 8 rows of x as its B. Which k a slot of the product has
// does not matter as long as A and B agree, so thread t of a quad takes 16 consecutive elements of its weight row with two
// 16-byte loads, and the same 16 of its row of x. A quad covers 64 elements, a warp 16 weight rows of them; the warps
// of a block share the depth, and their sums are added up in order at the end. Paired sums: the upper 8 of the 16
// weight rows are firsts, the lower 8 their seconds.
//
// Two blocks stay on each multiprocessor and take tile after tile; the loads run AHEAD rounds ahead, into the next
// tile while one is finished. As blocks end, those of the next kernel start in their places and load their first
// weights while this one ends (`wait_for_previous`).
//
// A device's part of a product is also told to those that compute the layer with it, sum by sum (include/exchange.cuh).
//
// launch   grid = min(tiles, 2 * multiprocessors), block = 256       wrapper  cogvlm-cuda ops::product_rows
// oracle   oracle::{expert_linear, linear, gate_up, qkv_rope_append}
// spills allowed: product_rows_qkv_16 120 8 one value, on a GPU that it is not tuned for
#include "include/exchange.cuh"
#include "include/product.cuh"

__device__ __forceinline__ uint4 load_weights(const bf16* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Sixteen consecutive elements of one row.
struct Elements {
    uint4 low, high;
};

// WARPS share the depth; rows of x come in ROW_TILES of 8; AHEAD rounds of 64 elements a warp are under way.
template <u32 FINISH, u32 WARPS, u32 ROW_TILES, u32 AHEAD, class Others>
__device__ void product(const Product& a, const Others& others) {
    constexpr bool PAIRED = is_paired(FINISH);
    constexpr u32 STRIDE = WARPS * 64;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 expert = a.ranges[0].expert, first_row = a.ranges[0].first, num_rows = a.ranges[0].end - first_row;
    constexpr u32 PER_TILE = PAIRED ? 8 : 16;
    const u32 num_tiles = (a.width + PER_TILE - 1) / PER_TILE;
    // Rounds of a tile, so many that a tile ends where the ring of loads does.
    const u32 rounds = (a.depth + STRIDE * AHEAD - 1) / (STRIDE * AHEAD) * AHEAD;
    const u32 first_k = warp * 64 + t * 16;
    allow_next();

    // This thread's two weight rows of a tile; rows beyond repeat the last one.
    const bf16* upper;
    const bf16* lower;
    auto take_rows = [&](u32 tile) {
        if (PAIRED) {
            const u32 p = min(tile * 8 + g, a.width - 1);
            upper = static_cast<const bf16*>(a.weight[expert]) + u64(first_weight_row<FINISH>(a, p)) * a.depth;
            lower = static_cast<const bf16*>(second_weight<FINISH>(a, expert)) +
                    u64(second_weight_row<FINISH>(a, p)) * a.depth;
        } else {
            const bf16* weight = static_cast<const bf16*>(a.weight[expert]);
            upper = weight + u64(min(tile * 16 + g, a.width - 1)) * a.depth;
            lower = weight + u64(min(tile * 16 + 8 + g, a.width - 1)) * a.depth;
        }
    };
    const uint4 zero = make_uint4(0, 0, 0, 0);
    auto weights_at = [&](const bf16* row, u32 k, bool is_there) -> Elements {
        return {is_there && k < a.depth ? load_weights(row + k) : zero,
                is_there && k + 8 < a.depth ? load_weights(row + k + 8) : zero};
    };
    // What is loaded next: a round of a tile.
    u32 next_tile = blockIdx.x, next_round = 0;
    take_rows(next_tile);
    Elements w[AHEAD][2];
    auto load_next = [&](u32 s) {
        const u32 k = first_k + next_round * STRIDE;
        const bool is_there = next_tile < num_tiles;
        w[s][0] = weights_at(upper, k, is_there);
        w[s][1] = weights_at(lower, k, is_there);
        if (++next_round == rounds) {
            next_round = 0;
            next_tile += gridDim.x;
            if (next_tile < num_tiles) take_rows(next_tile);
        }
    };
#pragma unroll
    for (u32 s = 0; s < AHEAD; ++s) load_next(s);

    wait_for_previous();
    const u32 exchange = others.number();
    const bf16* x[ROW_TILES];
    bool has_row[ROW_TILES];
#pragma unroll
    for (u32 r = 0; r < ROW_TILES; ++r) {
        has_row[r] = r * 8 + g < num_rows;
        x[r] = static_cast<const bf16*>(a.x) + u64(first_row + (has_row[r] ? r * 8 + g : 0)) * a.depth;
    }
    auto x_at = [&](u32 r, u32 k) -> Elements {
        return {has_row[r] && k < a.depth ? *reinterpret_cast<const uint4*>(x[r] + k) : zero,
                has_row[r] && k + 8 < a.depth ? *reinterpret_cast<const uint4*>(x[r] + k + 8) : zero};
    };
    Elements next_x[ROW_TILES];
#pragma unroll
    for (u32 r = 0; r < ROW_TILES; ++r) next_x[r] = x_at(r, first_k);

    // Two sets in turn, so that a warp may begin the next tile while others still add up this one.
    __shared__ float partial[2][WARPS][ROW_TILES * 4][32];
    u32 set = 0;
    for (u32 tile = blockIdx.x; tile < num_tiles; tile += gridDim.x, set ^= 1) {
        float sums[ROW_TILES][4] = {};
        for (u32 round = 0; round < rounds; round += AHEAD) {
#pragma unroll
            for (u32 s = 0; s < AHEAD; ++s) {
                Elements xs[ROW_TILES];
                // x is the same for every tile: after the last round comes the first.
                const u32 next_k = round + s + 1 == rounds ? first_k : first_k + (round + s + 1) * STRIDE;
#pragma unroll
                for (u32 r = 0; r < ROW_TILES; ++r) {
                    xs[r] = next_x[r];
                    next_x[r] = x_at(r, next_k);
                }
                const Elements up = w[s][0], low = w[s][1];
#pragma unroll
                for (u32 r = 0; r < ROW_TILES; ++r) {
                    multiply(sums[r], up.low.x, low.low.x, up.low.y, low.low.y, xs[r].low.x, xs[r].low.y);
                    multiply(sums[r], up.low.z, low.low.z, up.low.w, low.low.w, xs[r].low.z, xs[r].low.w);
                    multiply(sums[r], up.high.x, low.high.x, up.high.y, low.high.y, xs[r].high.x, xs[r].high.y);
                    multiply(sums[r], up.high.z, low.high.z, up.high.w, low.high.w, xs[r].high.z, xs[r].high.w);
                }
                load_next(s);
            }
        }
        // sums[r]: weight row g (0, 1) and 8 + g (2, 3), rows 2t and 2t + 1 of x.
#pragma unroll
        for (u32 r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (u32 c = 0; c < 4; ++c) partial[set][warp][r * 4 + c][lane] = sums[r][c];
        __syncthreads();  // this set is complete; the other one was read before the last of these
        auto total = [&](u32 weight_row, u32 row) {
            const u32 entry = row / 8 * 4 + weight_row / 8 * 2 + row % 2, from = weight_row % 8 * 4 + row % 8 / 2;
            float sum = 0.0f;
#pragma unroll
            for (u32 v = 0; v < WARPS; ++v) sum += partial[set][v][entry][from];
            return sum;
        };
        for (u32 i = threadIdx.x; i < num_rows * PER_TILE; i += WARPS * 32) {
            const u32 row = i / PER_TILE, within = i % PER_TILE, n = tile * PER_TILE + within;
            if (n >= a.width) continue;
            const float first = total(within, row), second = PAIRED ? total(8 + within, row) : 0.0f;
            store_one<bf16, FINISH>(a, first_row + row, n, first, second);
            others.tell(u64(first_row + row) * a.out_width + n, first, exchange);
        }
    }
}

// Two blocks fill a multiprocessor.
#define PRODUCT(NAME, FINISH, WARPS, ROW_TILES, AHEAD)                                                          \
    extern "C" __global__ __launch_bounds__(WARPS * 32, 2) void product_rows_##NAME(                            \
        const __grid_constant__ Product a) {                                                                    \
        product<FINISH, WARPS, ROW_TILES, AHEAD>(a, NoPush());                                                  \
    }
// The number is the most rows of x.
#define PRODUCTS(NAME, FINISH)                 \
    PRODUCT(NAME##_8, FINISH, 8, 1, 4)         \
    PRODUCT(NAME##_16, FINISH, 8, 2, 4)
PRODUCTS(bias, BIAS)
PRODUCTS(residual, RESIDUAL)
PRODUCTS(gate_up, GATE_UP)
// The rotation takes registers from the loads.
PRODUCT(qkv_8, QKV, 8, 1, 4)
PRODUCT(qkv_16, QKV, 8, 2, 2)
PRODUCTS(logits, LOGITS)

// A member's part of a product, told to the others.
extern "C" __global__ __launch_bounds__(256, 2) void product_rows_partial_8(
    const __grid_constant__ Product a, const __grid_constant__ Push others) {
    product<PARTIAL, 8, 1, 4>(a, others);
}
extern "C" __global__ __launch_bounds__(256, 2) void product_rows_partial_16(
    const __grid_constant__ Product a, const __grid_constant__ Push others) {
    product<PARTIAL, 8, 2, 4>(a, others);
}
