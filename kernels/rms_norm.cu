// y[t, i] = weight[i] * x[row(t), i] / sqrt(mean_j x[row(t), j]^2 + eps)     Zhang & Sennrich 2019, arXiv:1910.07467
// x, y     T [.., width] row-major, T float or bf16; weight [width] of any type, rounded to T; any width
// rows     row(t) = rows[t] where `rows` is given (u32), else t; y may be x only without `rows`
// rounding sums in f32, one rounding, at the store
// launch   grid = rows of y, block = THREADS     wrapper cogvlm-cuda ops::rms_norm     oracle oracle::rms_norm
#include "include/common.cuh"

constexpr u32 THREADS = 256;

template <class T>
__device__ void rms_norm(const T* x, const void* weight, u32 weight_type, const u32* rows, T* y, u32 width, float eps) {
    allow_next();
    wait_for_previous();
    const u64 row = rows ? rows[blockIdx.x] : blockIdx.x;
    const T* in = x + row * width;
    T* out = y + u64(blockIdx.x) * width;
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < width; i += THREADS) {
        const float v = to_float(in[i]);
        squares += v * v;
    }
    const float scale = 1.0f / sqrtf(block_sum<THREADS>(squares) / float(width) + eps);
    for (u32 i = threadIdx.x; i < width; i += THREADS)
        out[i] = from_float<T>(rounded<T>(load_element(weight, weight_type, i)) * (to_float(in[i]) * scale));
}

// Eight elements a thread, kept in registers between the two passes. Needs width = THREADS * 8 * CHUNKS exactly, bf16.
template <u32 CHUNKS>
__device__ void rms_norm_wide(const bf16* x, const bf16* weight, const u32* rows, bf16* y, float eps) {
    constexpr u32 WIDTH = THREADS * 8 * CHUNKS;
    allow_next();
    uint4 w[CHUNKS];
#pragma unroll
    for (u32 c = 0; c < CHUNKS; ++c) w[c] = reinterpret_cast<const uint4*>(weight)[c * THREADS + threadIdx.x];
    wait_for_previous();
    const u64 row = rows ? rows[blockIdx.x] : blockIdx.x;
    uint4 v[CHUNKS];
    float squares = 0.0f;
#pragma unroll
    for (u32 c = 0; c < CHUNKS; ++c) {
        v[c] = reinterpret_cast<const uint4*>(x + row * WIDTH)[c * THREADS + threadIdx.x];
        const u32 pairs[4] = {v[c].x, v[c].y, v[c].z, v[c].w};
#pragma unroll
        for (u32 p = 0; p < 4; ++p)
            squares += low_bf16(pairs[p]) * low_bf16(pairs[p]) + high_bf16(pairs[p]) * high_bf16(pairs[p]);
    }
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
        reinterpret_cast<uint4*>(y + u64(blockIdx.x) * WIDTH)[c * THREADS + threadIdx.x] =
            make_uint4(result[0], result[1], result[2], result[3]);
    }
}

extern "C" __global__ __launch_bounds__(THREADS) void rms_norm_f32(
    const float* x, const void* weight, u32 weight_type, const u32* rows, float* y, u32 width, float eps) {
    rms_norm(x, weight, weight_type, rows, y, width, eps);
}
extern "C" __global__ __launch_bounds__(THREADS) void rms_norm_bf16(
    const bf16* x, const void* weight, u32 weight_type, const u32* rows, bf16* y, u32 width, float eps) {
    rms_norm(x, weight, weight_type, rows, y, width, eps);
}
extern "C" __global__ __launch_bounds__(THREADS) void rms_norm_bf16_4096(
    const bf16* x, const bf16* weight, const u32* rows, bf16* y, float eps) {
    rms_norm_wide<2>(x, weight, rows, y, eps);
}
