// Weights as they come onto the device: rounded to bf16, or made by the rule of a synthetic tensor.
//   convert_f16, convert_f32   y[i] = bf16(x[i])
//   make_uniform               y[i] = bf16(base + amplitude * u(key, i))
//   make_mixture               y[r, c] = bf16(base + amplitude * sum_k WEIGHTS[k] * u(key, s_k(r) * columns + c)),
//                              s_k(r) = (r * MUL[k] + ADD[k]) mod rows, summed from k = 0 on
// u(key, i) is the top 24 bits of SplitMix64's output for the state key + i * STEP, as a number in [-1, 1).
// x        any address that its type allows; convert_f16 may have y = x, convert_f32 may not
// y        bf16 [count], [rows, columns]
// rounding each product and each sum of the rules by itself (no fused multiply-add), then once to bf16
// launch   any grid, block = THREADS; without overlap, since what follows may read weights before it waits
// wrapper  cogvlm-cuda ops::load     oracle oracle::made_element; conversions: half::bf16::from_f32
#include "include/common.cuh"

constexpr u32 THREADS = 256;

__device__ __forceinline__ float uniform(u64 key, u64 i) {
    u64 z = key + i * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    // Exact: the integer has 24 bits, the factor is 2^-23.
    return __fmul_rn(float(int(u32(z >> 40)) - (1 << 23)), 1.1920928955078125e-7f);
}

__device__ __forceinline__ u64 first_index() { return u64(blockIdx.x) * THREADS + threadIdx.x; }
__device__ __forceinline__ u64 stride() { return u64(gridDim.x) * THREADS; }

// x and y may be the same: an element is read before it is written, by the thread that writes it.
extern "C" __global__ __launch_bounds__(THREADS) void convert_f16(const u16* x, bf16* y, u64 count) {
    for (u64 i = first_index(); i < count; i += stride()) y[i] = to_bf16(f16_to_float(x[i]));
}

extern "C" __global__ __launch_bounds__(THREADS) void convert_f32(const float* x, bf16* y, u64 count) {
    for (u64 i = first_index(); i < count; i += stride()) y[i] = to_bf16(x[i]);
}

extern "C" __global__ __launch_bounds__(THREADS) void make_uniform(
    bf16* y, u64 count, u64 key, float base, float amplitude) {
    for (u64 i = first_index(); i < count; i += stride())
        y[i] = to_bf16(__fadd_rn(base, __fmul_rn(amplitude, uniform(key, i))));
}

extern "C" __global__ __launch_bounds__(THREADS) void make_mixture(
    bf16* y, u32 rows, u32 columns, u64 key, float base, float amplitude) {
    constexpr u64 MUL[4] = {1000003, 1000033, 1000037, 1000039};
    constexpr u64 ADD[4] = {12345, 24690, 37035, 49380};
    constexpr float WEIGHTS[4] = {1.0f, 0.89f, 0.78f, 0.67f};
    const u64 count = u64(rows) * columns;
    for (u64 i = first_index(); i < count; i += stride()) {
        const u64 row = i / columns, column = i % columns;
        float sum = 0.0f;
#pragma unroll
        for (u32 k = 0; k < 4; ++k) {
            const u64 source = (row * MUL[k] + ADD[k]) % rows;
            const float term = __fmul_rn(WEIGHTS[k], uniform(key, source * columns + column));
            sum = k == 0 ? term : __fadd_rn(sum, term);
        }
        y[i] = to_bf16(__fadd_rn(base, __fmul_rn(amplitude, sum)));
    }
}
