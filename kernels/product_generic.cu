// Products (include/product.cuh) of any shape and type, plainly: for f32, for odd shapes, and to compare with.
// x T, weights of any type, rounded to T where they are used; sums in f32 by fused multiply-add, k ascending
// launch   grid = (ceil(width / 64), tiles of rows), block = 256; a tile has 8 groups of up to 8 rows
// wrapper  cogvlm-cuda ops::product_generic     oracle  oracle::{expert_linear, linear, linear_residual, gate_up,
//          qkv_rope_append, logits}
// product_echo, maps_echo: one thread writes what it finds in each field of what products are told, for tests
#include "include/maps.cuh"
#include "include/product.cuh"

constexpr u32 THREADS = 256;
constexpr u32 TILE = 64;  // rows and columns
constexpr u32 STEP = 16;  // elements of depth at a time

template <class T, u32 FINISH> __device__ void product(const Product& a) {
    constexpr bool PAIRED = is_paired(FINISH);
    __shared__ float xs[STEP][TILE + 4];
    __shared__ float firsts[STEP][TILE + 4];
    __shared__ float seconds[PAIRED ? STEP : 1][TILE + 4];
    __shared__ u32 rows[TILE];
    constexpr u32 NONE = 0xffffffffu;
    allow_next();
    wait_for_previous();
    const u32 expert = blockIdx.y < a.num_vision_tiles ? 1 : 0;
    const u32 tile = expert ? blockIdx.y : blockIdx.y - a.num_vision_tiles;
    if (threadIdx.x < TILE) {
        const RowGroup group = row_group(a, expert, tile * (TILE / GROUP_ROWS) + threadIdx.x / GROUP_ROWS);
        const u32 within = threadIdx.x % GROUP_ROWS;
        rows[threadIdx.x] = within < group.count ? group.first + within : NONE;
    }
    __syncthreads();  // rows[] is complete
    const u32 first_column = blockIdx.x * TILE;
    const u32 ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    float sums[4][4] = {}, second_sums[4][4] = {};
    for (u32 k0 = 0; k0 < a.depth; k0 += STEP) {
        for (u32 i = threadIdx.x; i < TILE * STEP; i += THREADS) {
            const u32 line = i / STEP, k = i % STEP, n = first_column + line;
            const bool in_depth = k0 + k < a.depth;
            const u32 row = rows[line];
            xs[k][line] = in_depth && row != NONE
                              ? to_float(static_cast<const T*>(a.x)[u64(row) * a.depth + k0 + k]) : 0.0f;
            const bool in_width = in_depth && n < a.width;
            firsts[k][line] = in_width ? rounded<T>(load_element(a.weight[expert], a.weight_type,
                                             u64(first_weight_row<FINISH>(a, n)) * a.depth + k0 + k)) : 0.0f;
            if (PAIRED)
                seconds[k][line] = in_width ? rounded<T>(load_element(second_weight<FINISH>(a, expert), a.weight_type,
                                                  u64(second_weight_row<FINISH>(a, n)) * a.depth + k0 + k)) : 0.0f;
        }
        __syncthreads();  // the tiles are complete
#pragma unroll
        for (u32 k = 0; k < STEP; ++k) {
            float x[4];
#pragma unroll
            for (u32 i = 0; i < 4; ++i) x[i] = xs[k][ty * 4 + i];
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                const float w = firsts[k][tx * 4 + j];
#pragma unroll
                for (u32 i = 0; i < 4; ++i) sums[i][j] = fmaf(x[i], w, sums[i][j]);
                if (PAIRED) {
                    const float w2 = seconds[k][tx * 4 + j];
#pragma unroll
                    for (u32 i = 0; i < 4; ++i) second_sums[i][j] = fmaf(x[i], w2, second_sums[i][j]);
                }
            }
        }
        __syncthreads();  // everyone is done with the tiles before the next ones are written
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const u32 row = rows[ty * 4 + i];
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            const u32 n = first_column + tx * 4 + j;
            if (row != NONE && n < a.width) store_one<T, FINISH>(a, row, n, sums[i][j], second_sums[i][j]);
        }
    }
}

#define PRODUCT(NAME, T, FINISH)                                                                                \
    extern "C" __global__ __launch_bounds__(THREADS) void product_generic_##NAME(const __grid_constant__ Product a) { \
        product<T, FINISH>(a);                                                                                  \
    }
PRODUCT(f32_bias, float, BIAS)
PRODUCT(f32_bias_gelu, float, BIAS_GELU)
PRODUCT(f32_residual, float, RESIDUAL)
PRODUCT(f32_gate_up, float, GATE_UP)
PRODUCT(f32_qkv, float, QKV)
PRODUCT(f32_logits, float, LOGITS)
PRODUCT(f32_partial, float, PARTIAL)
PRODUCT(bf16_bias, bf16, BIAS)
PRODUCT(bf16_bias_gelu, bf16, BIAS_GELU)
PRODUCT(bf16_residual, bf16, RESIDUAL)
PRODUCT(bf16_gate_up, bf16, GATE_UP)
PRODUCT(bf16_qkv, bf16, QKV)
PRODUCT(bf16_logits, bf16, LOGITS)
PRODUCT(bf16_partial, bf16, PARTIAL)

extern "C" __global__ void product_echo(const __grid_constant__ Product a, u64* fields) {
    auto put = [&](u64 field) { *fields++ = field; };
    auto put_address = [&](const void* field) { put(reinterpret_cast<u64>(field)); };
    put_address(a.x);
    put_address(a.weight[0]), put_address(a.weight[1]);
    put_address(a.second[0]), put_address(a.second[1]);
    put_address(a.out);
    put_address(a.bias);
    put_address(a.kv);
    put_address(a.rope);
    put_address(a.positions);
    put_address(a.slots);
    put(a.weight_type);
    put(a.bias_type);
    put(a.depth);
    put(a.width);
    put(a.out_width);
    put(a.num_heads);
    put(a.num_kv_heads);
    put(a.head_dim);
    put(a.published);
    put(a.num_ranges);
    put(a.num_vision_tiles);
    put(a.num_tiles_m);
    for (u32 i = 0; i < MAX_RANGES; ++i) put(a.ranges[i].first), put(a.ranges[i].end), put(a.ranges[i].expert);
}

extern "C" __global__ void maps_echo(const __grid_constant__ Maps maps, u64* fields) {
    auto put = [&](const TensorMap& map) {
        for (u32 i = 0; i < 16; ++i) *fields++ = map.opaque[i];
    };
    put(maps.x);
    put(maps.x_groups);
    put(maps.weight[0]), put(maps.weight[1]);
    put(maps.second[0]), put(maps.second[1]);
}
