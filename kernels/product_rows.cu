// Products (include/product.cuh) of 1 to 16 rows, all of one expert: decode. They run at the rate at which weights come
// from memory: every weight is read once, straight into registers, and used for all rows by the matrix units.
// x, weights bf16, depth a multiple of 8; sums in f32, in an order that depends on depth and WARPS alone
//
// One m16n8k16 product has 16 rows of the weight as its A and 8 rows of x as its B. Which k a slot of the product has
// does not matter as long as A and B agree, so thread t of a quad takes 16 consecutive elements of its weight row with two
// 16-byte loads, and the same 16 of its row of x. A quad covers 64 elements, a warp 16 weight rows of them; the warps
// of a block share the depth, and their sums are added up in order at the end. Paired sums: the upper 8 of the 16
// weight rows are firsts, the lower 8 their seconds.
//
// launch   grid = ceil(weight rows / (16 * TILES)), block = 32 * WARPS       wrapper  cogvlm-cuda ops::product_rows
// oracle   oracle::{expert_linear, linear, gate_up, qkv_rope_append}
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

// WARPS share the depth; each block has TILES * 16 weight rows; rows of x come in ROW_TILES of 8; AHEAD blocks of 64
// elements are under way.
template <u32 FINISH, u32 WARPS, u32 TILES, u32 ROW_TILES, u32 AHEAD>
__device__ void product(const Product& a) {
    constexpr bool PAIRED = is_paired(FINISH);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 expert = a.ranges[0].expert, first_row = a.ranges[0].first, num_rows = a.ranges[0].end - first_row;
    allow_next();

    // Addresses of this thread's elements in its two weight rows of each tile; rows beyond repeat the last one.
    const bf16* weights[TILES][2];
#pragma unroll
    for (u32 i = 0; i < TILES; ++i) {
        const u32 tile = blockIdx.x * TILES + i;
        if (PAIRED) {
            const u32 p = min(tile * 8 + g, a.width - 1);
            weights[i][0] = static_cast<const bf16*>(a.weight[expert]) + u64(first_weight_row<FINISH>(a, p)) * a.depth;
            weights[i][1] = static_cast<const bf16*>(second_weight<FINISH>(a, expert)) +
                            u64(second_weight_row<FINISH>(a, p)) * a.depth;
        } else {
            const bf16* weight = static_cast<const bf16*>(a.weight[expert]);
            weights[i][0] = weight + u64(min(tile * 16 + g, a.width - 1)) * a.depth;
            weights[i][1] = weight + u64(min(tile * 16 + 8 + g, a.width - 1)) * a.depth;
        }
    }
    const uint4 zero = make_uint4(0, 0, 0, 0);
    auto weights_at = [&](const bf16* row, u32 k) -> Elements {
        return {k < a.depth ? load_weights(row + k) : zero, k + 8 < a.depth ? load_weights(row + k + 8) : zero};
    };
    const u32 stride = WARPS * 64;
    u32 k = warp * 64 + t * 16;
    Elements w[AHEAD][TILES][2];
#pragma unroll
    for (u32 s = 0; s < AHEAD; ++s)
#pragma unroll
        for (u32 i = 0; i < TILES; ++i)
#pragma unroll
            for (u32 r = 0; r < 2; ++r) w[s][i][r] = weights_at(weights[i][r], k + s * stride);

    wait_for_previous();
    const bf16* x[ROW_TILES];
    bool has_row[ROW_TILES];
#pragma unroll
    for (u32 r = 0; r < ROW_TILES; ++r) {
        has_row[r] = r * 8 + g < num_rows;
        x[r] = static_cast<const bf16*>(a.x) + u64(first_row + r * 8 + g) * a.depth;
    }
    auto x_at = [&](u32 r, u32 k) -> Elements {
        const bool in = has_row[r];
        return {in && k < a.depth ? *reinterpret_cast<const uint4*>(x[r] + k) : zero,
                in && k + 8 < a.depth ? *reinterpret_cast<const uint4*>(x[r] + k + 8) : zero};
    };
    Elements next[ROW_TILES];
#pragma unroll
    for (u32 r = 0; r < ROW_TILES; ++r) next[r] = x_at(r, k);

    float sums[TILES][ROW_TILES][4] = {};
    // Every warp of a block runs as often, so that the loop's end does not depend on the thread.
    const u32 num_blocks = (a.depth + 63) / 64, num_rounds = (num_blocks + WARPS - 1) / WARPS;
    for (u32 round = 0; round < num_rounds; round += AHEAD) {
#pragma unroll
        for (u32 s = 0; s < AHEAD; ++s) {
            Elements xs[ROW_TILES];
#pragma unroll
            for (u32 r = 0; r < ROW_TILES; ++r) {
                xs[r] = next[r];
                next[r] = x_at(r, k + stride);
            }
#pragma unroll
            for (u32 i = 0; i < TILES; ++i) {
                const Elements upper = w[s][i][0], lower = w[s][i][1];
#pragma unroll
                for (u32 r = 0; r < ROW_TILES; ++r) {
                    multiply(sums[i][r], upper.low.x, lower.low.x, upper.low.y, lower.low.y, xs[r].low.x, xs[r].low.y);
                    multiply(sums[i][r], upper.low.z, lower.low.z, upper.low.w, lower.low.w, xs[r].low.z, xs[r].low.w);
                    multiply(sums[i][r], upper.high.x, lower.high.x, upper.high.y, lower.high.y, xs[r].high.x, xs[r].high.y);
                    multiply(sums[i][r], upper.high.z, lower.high.z, upper.high.w, lower.high.w, xs[r].high.z, xs[r].high.w);
                }
#pragma unroll
                for (u32 r = 0; r < 2; ++r) w[s][i][r] = weights_at(weights[i][r], k + AHEAD * stride);
            }
            k += stride;
        }
    }

    // sums[i][r]: weight row g (0, 1) and 8 + g (2, 3), rows 2t and 2t + 1 of x.
    __shared__ float partial[WARPS][TILES * ROW_TILES * 4][32];
#pragma unroll
    for (u32 i = 0; i < TILES; ++i)
#pragma unroll
        for (u32 r = 0; r < ROW_TILES; ++r)
#pragma unroll
            for (u32 c = 0; c < 4; ++c) partial[warp][(i * ROW_TILES + r) * 4 + c][lane] = sums[i][r][c];
    __syncthreads();  // partial[] is complete
    auto total = [&](u32 tile, u32 weight_row, u32 row) {
        const u32 entry = (tile * ROW_TILES + row / 8) * 4 + weight_row / 8 * 2 + row % 2;
        const u32 from = weight_row % 8 * 4 + row % 8 / 2;
        float sum = 0.0f;
#pragma unroll
        for (u32 v = 0; v < WARPS; ++v) sum += partial[v][entry][from];
        return sum;
    };
    constexpr u32 PER_TILE = PAIRED ? 8 : 16;
    for (u32 i = threadIdx.x; i < num_rows * TILES * PER_TILE; i += WARPS * 32) {
        const u32 row = i / (TILES * PER_TILE), tile = i / PER_TILE % TILES, within = i % PER_TILE;
        const u32 n = (blockIdx.x * TILES + tile) * PER_TILE + within;
        if (n >= a.width) continue;
        const float first = total(tile, within, row);
        const float second = PAIRED ? total(tile, 8 + within, row) : 0.0f;
        store_one<bf16, FINISH>(a, first_row + row, n, first, second);
    }
}

// Blocks per multiprocessor are bounded so that the loads under way stay in registers.
#define PRODUCT(NAME, FINISH, WARPS, TILES, ROW_TILES, AHEAD)                                  \
    extern "C" __global__ __launch_bounds__(WARPS * 32) void product_rows_##NAME(              \
        const __grid_constant__ Product a) {                                                   \
        product<FINISH, WARPS, TILES, ROW_TILES, AHEAD>(a);                                    \
    }
// NAME_WxT: warps and tiles; the last number is the most rows of x.
#define PRODUCTS(NAME, FINISH)                        \
    PRODUCT(NAME##_8x1_8, FINISH, 8, 1, 1, 4)         \
    PRODUCT(NAME##_16x1_8, FINISH, 16, 1, 1, 4)       \
    PRODUCT(NAME##_8x2_8, FINISH, 8, 2, 1, 2)         \
    PRODUCT(NAME##_16x2_8, FINISH, 16, 2, 1, 2)       \
    PRODUCT(NAME##_8x2_16, FINISH, 8, 2, 2, 2)        \
    PRODUCT(NAME##_16x2_16, FINISH, 16, 2, 2, 1)
PRODUCTS(bias, BIAS)
PRODUCTS(residual, RESIDUAL)
PRODUCTS(gate_up, GATE_UP)
PRODUCTS(qkv, QKV)
PRODUCTS(logits, LOGITS)
