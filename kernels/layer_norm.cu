// n[t, i] = weight[i] * (x[t, i] - mean_t) / sqrt(mean_j (x[t, j] - mean_t)^2 + eps) + bias[i], mean_t = mean_j x[t, j]
//                                                                            Ba, Kiros, Hinton 2016, arXiv:1607.06450
// residual y[t, i] = y[t, i] + n[t, i]
// gelu     y[t, i] = gelu(n[t, i]), gelu(v) = v/2 (1 + erf(v / sqrt 2)); y is x
// x, y     T [rows, width] row-major, T float or bf16; weight, bias [width] of any type, rounded to T; any width
// rounding mean, then squared deviations, in f32; n is rounded, then y
// launch   any width: grid = rows, block = THREADS; 1792: grid = ceil(rows / 2), block = 64, a warp a row;
//          4096: grid = rows, block = 128
// wrapper  cogvlm-cuda ops::layer_norm     oracle oracle::layer_norm_residual, oracle::layer_norm_gelu
#include "include/common.cuh"

constexpr u32 THREADS = 256;

// What becomes of the norm.
enum Fused { RESIDUAL, GELU };

// 1 + erf(z) is erfc(-z), which loses no digits where little is left.
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * erfcf(-0.70710678118654752f * x); }

template <class T, Fused FUSED>
__device__ void layer_norm(
    const T* x, const void* weight, u32 weight_type, const void* bias, u32 bias_type, T* y, u32 width, float eps) {
    allow_next();
    wait_for_previous();
    const T* in = x + u64(blockIdx.x) * width;
    T* out = y + u64(blockIdx.x) * width;
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < width; i += THREADS) sum += to_float(in[i]);
    const float mean = block_sum<THREADS>(sum) / float(width);
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < width; i += THREADS) {
        const float difference = to_float(in[i]) - mean;
        squares += difference * difference;
    }
    const float scale = 1.0f / sqrtf(block_sum<THREADS>(squares) / float(width) + eps);
    for (u32 i = threadIdx.x; i < width; i += THREADS) {
        const float w = rounded<T>(load_element(weight, weight_type, i));
        const float b = rounded<T>(load_element(bias, bias_type, i));
        const float normed = rounded<T>((to_float(in[i]) - mean) * scale * w + b);
        out[i] = from_float<T>(FUSED == GELU ? gelu(normed) : to_float(out[i]) + normed);
    }
}

// Sum over the WARPS warps that share a row, given to each of their threads.
template <u32 WARPS> __device__ __forceinline__ float row_sum(float v) {
    if constexpr (WARPS == 1)
        return warp_sum(v);
    else
        return block_sum<WARPS * 32>(v);
}

// A row in the registers of WARPS warps, read once. Needs width = WARPS * 256 * CHUNKS exactly, bf16. With one warp a
// row, a block may hold several rows.
template <Fused FUSED, u32 WARPS, u32 CHUNKS>
__device__ void layer_norm_wide(
    const bf16* x, const bf16* weight, const bf16* bias, bf16* y, u32 rows, float eps) {
    constexpr u32 STRIDE = WARPS * 32;
    constexpr u32 WIDTH = STRIDE * 8 * CHUNKS;
    const u32 rows_per_block = blockDim.x / STRIDE;
    const u32 lane = threadIdx.x % STRIDE;
    const u64 row = u64(blockIdx.x) * rows_per_block + threadIdx.x / STRIDE;
    allow_next();
    uint4 w[CHUNKS], b[CHUNKS];
#pragma unroll
    for (u32 c = 0; c < CHUNKS; ++c) {
        w[c] = reinterpret_cast<const uint4*>(weight)[c * STRIDE + lane];
        b[c] = reinterpret_cast<const uint4*>(bias)[c * STRIDE + lane];
    }
    wait_for_previous();
    // Only with a warp a row are there rows too many: no barrier follows then.
    if (row >= rows) return;
    const uint4* in = reinterpret_cast<const uint4*>(x + row * WIDTH);
    uint4* out = reinterpret_cast<uint4*>(y + row * WIDTH);
    uint4 v[CHUNKS], before[CHUNKS];
#pragma unroll
    for (u32 c = 0; c < CHUNKS; ++c) v[c] = in[c * STRIDE + lane];
    if (FUSED == RESIDUAL) {
#pragma unroll
        for (u32 c = 0; c < CHUNKS; ++c) before[c] = out[c * STRIDE + lane];
    }
    float sum = 0.0f;
#pragma unroll
    for (u32 c = 0; c < CHUNKS; ++c) {
        const u32 pairs[4] = {v[c].x, v[c].y, v[c].z, v[c].w};
#pragma unroll
        for (u32 p = 0; p < 4; ++p) sum += low_bf16(pairs[p]) + high_bf16(pairs[p]);
    }
    const float mean = row_sum<WARPS>(sum) / float(WIDTH);
    float squares = 0.0f;
#pragma unroll
    for (u32 c = 0; c < CHUNKS; ++c) {
        const u32 pairs[4] = {v[c].x, v[c].y, v[c].z, v[c].w};
#pragma unroll
        for (u32 p = 0; p < 4; ++p) {
            const float low = low_bf16(pairs[p]) - mean, high = high_bf16(pairs[p]) - mean;
            squares += low * low + high * high;
        }
    }
    const float scale = 1.0f / sqrtf(row_sum<WARPS>(squares) / float(WIDTH) + eps);
#pragma unroll
    for (u32 c = 0; c < CHUNKS; ++c) {
        const u32 pairs[4] = {v[c].x, v[c].y, v[c].z, v[c].w};
        const u32 weights[4] = {w[c].x, w[c].y, w[c].z, w[c].w};
        const u32 biases[4] = {b[c].x, b[c].y, b[c].z, b[c].w};
        const u32 olds[4] = {before[c].x, before[c].y, before[c].z, before[c].w};
        u32 result[4];
#pragma unroll
        for (u32 p = 0; p < 4; ++p) {
            const u32 normed = pack_bf16(
                (low_bf16(pairs[p]) - mean) * scale * low_bf16(weights[p]) + low_bf16(biases[p]),
                (high_bf16(pairs[p]) - mean) * scale * high_bf16(weights[p]) + high_bf16(biases[p]));
            if (FUSED == GELU)
                result[p] = pack_bf16(gelu(low_bf16(normed)), gelu(high_bf16(normed)));
            else
                result[p] = pack_bf16(
                    low_bf16(olds[p]) + low_bf16(normed), high_bf16(olds[p]) + high_bf16(normed));
        }
        out[c * STRIDE + lane] = make_uint4(result[0], result[1], result[2], result[3]);
    }
}

extern "C" __global__ __launch_bounds__(THREADS) void layer_norm_residual_f32(
    const float* x, const void* weight, u32 weight_type, const void* bias, u32 bias_type, float* y, u32 width,
    float eps) {
    layer_norm<float, RESIDUAL>(x, weight, weight_type, bias, bias_type, y, width, eps);
}
extern "C" __global__ __launch_bounds__(THREADS) void layer_norm_residual_bf16(
    const bf16* x, const void* weight, u32 weight_type, const void* bias, u32 bias_type, bf16* y, u32 width,
    float eps) {
    layer_norm<bf16, RESIDUAL>(x, weight, weight_type, bias, bias_type, y, width, eps);
}
extern "C" __global__ __launch_bounds__(THREADS) void layer_norm_gelu_f32(
    const float* x, const void* weight, u32 weight_type, const void* bias, u32 bias_type, float* y, u32 width,
    float eps) {
    layer_norm<float, GELU>(x, weight, weight_type, bias, bias_type, y, width, eps);
}
extern "C" __global__ __launch_bounds__(THREADS) void layer_norm_gelu_bf16(
    const bf16* x, const void* weight, u32 weight_type, const void* bias, u32 bias_type, bf16* y, u32 width,
    float eps) {
    layer_norm<bf16, GELU>(x, weight, weight_type, bias, bias_type, y, width, eps);
}
extern "C" __global__ __launch_bounds__(64) void layer_norm_residual_bf16_1792(
    const bf16* x, const bf16* weight, const bf16* bias, bf16* y, u32 rows, float eps) {
    layer_norm_wide<RESIDUAL, 1, 7>(x, weight, bias, y, rows, eps);
}
extern "C" __global__ __launch_bounds__(128) void layer_norm_gelu_bf16_4096(
    const bf16* x, const bf16* weight, const bf16* bias, bf16* y, u32 rows, float eps) {
    layer_norm_wide<GELU, 4, 4>(x, weight, bias, y, rows, eps);
}
