// Products (include/product.cuh) of many rows with mma.sync and cp.async: sm_80 and every GPU after it.
// x, weights bf16, depth a multiple of 8; sums in f32, k ascending in steps of 64
//
// Tiles of 128 rows by 128 weight rows, 8 warps of 64 x 32 each. 64 elements of depth of a tile come into one of three
// stages of shared memory (96 KB together: what sm_86 and sm_89 have), 16 bytes at a time, each 128-byte row with its
// 16-byte chunks exchanged by the low bits of the row's number, so that ldmatrix meets no bank twice.
// Paired sums: of the 32 weight rows of a warp the first 16 are firsts, the others their seconds.
//
// launch   grid = (tiles of rows, ceil(weight rows / 128)), block = 256, shared = STAGES * 2 * TILE_BYTES; a tile has 16
//          groups of up to 8 rows       wrapper  cogvlm-cuda ops::product_mma
// oracle   oracle::{expert_linear, linear, linear_residual, gate_up, qkv_rope_append}
#include "include/mma.cuh"
#include "include/product.cuh"

constexpr u32 THREADS = 256;
constexpr u32 TILE = 128;
constexpr u32 STEP = 64;
constexpr u32 STAGES = 3;
constexpr u32 TILE_BYTES = TILE * STEP * 2;
constexpr u32 NONE = 0xffffffffu;

// Where chunk `chunk` (16 bytes) of row `row` of a tile lies.
__device__ __forceinline__ u32 chunk_offset(u32 row, u32 chunk) { return row * (STEP * 2) + ((chunk ^ (row & 7)) << 4); }

template <u32 FINISH> __device__ void product(const Product& a) {
    constexpr bool PAIRED = is_paired(FINISH);
    extern __shared__ __align__(128) u8 shared[];
    __shared__ u32 rows[TILE];
    const u32 tiles = shared_address(shared);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 expert = blockIdx.x < a.num_vision_tiles ? 1 : 0;
    const u32 tile = expert ? blockIdx.x : blockIdx.x - a.num_vision_tiles;
    const u32 first_line = blockIdx.y * TILE;
    allow_next();
    if (threadIdx.x < TILE) {
        const RowGroup group = row_group(a, expert, tile * (TILE / GROUP_ROWS) + threadIdx.x / GROUP_ROWS);
        const u32 within = threadIdx.x % GROUP_ROWS;
        rows[threadIdx.x] = within < group.count ? group.first + within : NONE;
    }
    __syncthreads();  // rows[] is complete
    wait_for_previous();

    // This thread copies chunk `threadIdx.x % 8` of rows threadIdx.x / 8 + 32 i of both tiles.
    const u32 chunk = threadIdx.x % 8, line = threadIdx.x / 8;
    const bf16* x_from[4];
    const bf16* weight_from[4];
    bool has_x[4], has_weight[4];
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const u32 row = rows[line + 32 * i];
        has_x[i] = row != NONE;
        x_from[i] = static_cast<const bf16*>(a.x) + u64(has_x[i] ? row : 0) * a.depth + chunk * 8;
        const u32 at = line + 32 * i;
        if (PAIRED) {
            const bool is_second = at % 32 >= 16;
            const u32 p = first_line / 2 + at / 32 * 16 + at % 16;
            has_weight[i] = p < a.width;
            const u32 known = has_weight[i] ? p : 0;
            const void* weight = is_second ? second_weight<FINISH>(a, expert) : a.weight[expert];
            const u32 weight_row = is_second ? second_weight_row<FINISH>(a, known) : first_weight_row<FINISH>(a, known);
            weight_from[i] = static_cast<const bf16*>(weight) + u64(weight_row) * a.depth + chunk * 8;
        } else {
            has_weight[i] = first_line + at < a.width;
            weight_from[i] = static_cast<const bf16*>(a.weight[expert]) +
                             u64(has_weight[i] ? first_line + at : 0) * a.depth + chunk * 8;
        }
    }
    auto copy_step = [&](u32 step) {
        const u32 to = tiles + step % STAGES * 2 * TILE_BYTES;
        const bool in_depth = step * STEP + chunk * 8 < a.depth;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 offset = chunk_offset(line + 32 * i, chunk);
            // What is not there is not read, wherever its address lies.
            copy_async(to + offset, x_from[i] + step * STEP, has_x[i] && in_depth);
            copy_async(to + TILE_BYTES + offset, weight_from[i] + step * STEP, has_weight[i] && in_depth);
        }
        commit_copies();
    };

    const u32 steps = (a.depth + STEP - 1) / STEP;
    for (u32 s = 0; s < STAGES - 1; ++s) {
        if (s < steps) copy_step(s); else commit_copies();
    }
    const u32 warp_row = warp / 4 * 64, warp_line = warp % 4 * 32;
    float sums[4][4][4] = {};
    for (u32 step = 0; step < steps; ++step) {
        wait_for_copies_but<STAGES - 2>();
        __syncthreads();  // this step's tiles are there for everyone, and nobody reads the stage that is filled next
        if (step + STAGES - 1 < steps) copy_step(step + STAGES - 1); else commit_copies();
        const u32 x_tile = tiles + step % STAGES * 2 * TILE_BYTES, weight_tile = x_tile + TILE_BYTES;
#pragma unroll
        for (u32 k = 0; k < STEP / 16; ++k) {
            u32 x[4][4], w[2][4];
#pragma unroll
            for (u32 i = 0; i < 4; ++i)
                load_matrices(x[i], x_tile + chunk_offset(warp_row + 16 * i + lane % 16, 2 * k + lane / 16));
#pragma unroll
            for (u32 j = 0; j < 2; ++j)
                load_matrices(w[j], weight_tile + chunk_offset(warp_line + 16 * j + lane % 8 + lane / 16 * 8,
                                                               2 * k + lane / 8 % 2));
#pragma unroll
            for (u32 i = 0; i < 4; ++i)
#pragma unroll
                for (u32 j = 0; j < 4; ++j) multiply(sums[i][j], x[i], w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]);
        }
    }

    const u32 g = lane / 4, t = lane % 4;
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 row = rows[warp_row + 16 * i + 8 * half + g];
            if (row == NONE) continue;
#pragma unroll
            for (u32 j = 0; j < (PAIRED ? 2 : 4); ++j)
#pragma unroll
                for (u32 c = 0; c < 2; ++c) {
                    const u32 at = 2 * half + c, column = 8 * j + 2 * t + c;
                    const u32 n = PAIRED ? first_line / 2 + warp_line / 2 + column : first_line + warp_line + column;
                    const float second = PAIRED ? sums[i][j + (PAIRED ? 2 : 0)][at] : 0.0f;
                    if (n < a.width) store_one<bf16, FINISH>(a, row, n, sums[i][j][at], second);
                }
        }
}

#define PRODUCT(NAME, FINISH)                                                                                     \
    extern "C" __global__ __launch_bounds__(THREADS) void product_mma_##NAME(const __grid_constant__ Product a) { \
        product<FINISH>(a);                                                                                       \
    }
PRODUCT(bias, BIAS)
PRODUCT(bias_gelu, BIAS_GELU)
PRODUCT(residual, RESIDUAL)
PRODUCT(gate_up, GATE_UP)
PRODUCT(qkv, QKV)
PRODUCT(logits, LOGITS)
PRODUCT(partial, PARTIAL)
