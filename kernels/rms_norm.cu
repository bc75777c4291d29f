// y[t, i] = weight[i] * x[row(t), i] / sqrt(mean_j x[row(t), j]^2 + eps)     Zhang & Sennrich 2019, arXiv:1910.07467
// x, y     T [.., width] row-major, T float or bf16; weight [width] of any type, rounded to T; any width
// rows     row(t) = rows[t] where `rows` is given (u32), else t; y may be x only without `rows`
// rounding sums in f32, one rounding, at the store
// launch   grid = rows of y, block = 256         wrapper cogvlm-cuda ops::rms_norm     oracle oracle::rms_norm
#include "include/norm.cuh"

template <class T>
__device__ void rms_norm(const T* x, const void* weight, u32 weight_type, const u32* rows, T* y, u32 width, float eps) {
    allow_next();
    wait_for_previous();
    const u64 row = rows ? rows[blockIdx.x] : blockIdx.x;
    const T* in = x + row * width;
    T* out = y + u64(blockIdx.x) * width;
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < width; i += NORM_THREADS) {
        const float v = to_float(in[i]);
        squares += v * v;
    }
    const float scale = 1.0f / sqrtf(block_sum<NORM_THREADS>(squares) / float(width) + eps);
    for (u32 i = threadIdx.x; i < width; i += NORM_THREADS)
        out[i] = from_float<T>(rounded<T>(load_element(weight, weight_type, i)) * (to_float(in[i]) * scale));
}

extern "C" __global__ __launch_bounds__(NORM_THREADS) void rms_norm_f32(
    const float* x, const void* weight, u32 weight_type, const u32* rows, float* y, u32 width, float eps) {
    rms_norm(x, weight, weight_type, rows, y, width, eps);
}
extern "C" __global__ __launch_bounds__(NORM_THREADS) void rms_norm_bf16(
    const bf16* x, const void* weight, u32 weight_type, const u32* rows, bf16* y, u32 width, float eps) {
    rms_norm(x, weight, weight_type, rows, y, width, eps);
}

// Widths that are a multiple of 8, weights of bf16. The first two chunks of a thread stay in registers: all, up to 4096.
extern "C" __global__ __launch_bounds__(NORM_THREADS) void rms_norm_bf16_chunks(
    const uint4* x, const uint4* weight, const u32* rows, uint4* y, u32 width, float eps) {
    constexpr u32 KEPT = 2;
    const u32 chunks = width / 8;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    allow_next();
    uint4 w[KEPT], v[KEPT];
#pragma unroll
    for (u32 i = 0; i < KEPT; ++i) {
        const u32 c = threadIdx.x + i * NORM_THREADS;
        w[i] = c < chunks ? weight[c] : zero;
    }
    wait_for_previous();
    const uint4* in = x + u64(rows ? rows[blockIdx.x] : blockIdx.x) * chunks;
    uint4* out = y + u64(blockIdx.x) * chunks;
    float squares[1] = {0.0f};
#pragma unroll
    for (u32 i = 0; i < KEPT; ++i) {
        const u32 c = threadIdx.x + i * NORM_THREADS;
        v[i] = c < chunks ? in[c] : zero;
        squares[0] = add_squares(v[i], squares[0]);
    }
    for (u32 c = threadIdx.x + KEPT * NORM_THREADS; c < chunks; c += NORM_THREADS)
        squares[0] = add_squares(in[c], squares[0]);
    block_sums(squares);
    const float scale = norm_scale(squares[0], width, eps);
#pragma unroll
    for (u32 i = 0; i < KEPT; ++i) {
        const u32 c = threadIdx.x + i * NORM_THREADS;
        if (c < chunks) out[c] = normalised(v[i], w[i], scale);
    }
    for (u32 c = threadIdx.x + KEPT * NORM_THREADS; c < chunks; c += NORM_THREADS)
        out[c] = normalised(in[c], weight[c], scale);
}
