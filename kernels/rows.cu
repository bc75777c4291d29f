// y[i] = x[i]
// x        any element type [count];   y  T [count], T float or bf16;   they do not overlap
// rounding one, at the store, to the nearest
// launch   grid = ceil(count / (THREADS * EACH)), block = THREADS
// wrapper  cogvlm-cuda ops::rows (`write`, `copy_weight_rows`)     oracle oracle::round_to
#include "include/common.cuh"

constexpr u32 THREADS = 256;
constexpr u32 EACH = 4;

template <class T> __device__ void convert(const void* x, u32 type, T* y, u64 count) {
    allow_next();
    wait_for_previous();
    const u64 first = u64(blockIdx.x) * (THREADS * EACH) + threadIdx.x;
#pragma unroll
    for (u32 step = 0; step < EACH; ++step) {
        const u64 i = first + step * THREADS;
        if (i < count) y[i] = from_float<T>(load_element(x, type, i));
    }
}

extern "C" __global__ __launch_bounds__(THREADS) void rows_to_f32(const void* x, u32 type, float* y, u64 count) {
    convert(x, type, y, count);
}
extern "C" __global__ __launch_bounds__(THREADS) void rows_to_bf16(const void* x, u32 type, bf16* y, u64 count) {
    convert(x, type, y, count);
}
