// RMS norm of rows of bf16 whose width is a multiple of 8, in one order of summation, so that a norm of its own and one in
// front of a product give the same bits: thread t of 256 adds up the squares of chunks t, t + 256, .. of 8 elements, the
// block adds up its threads (block_sums).
#pragma once
#include "common.cuh"

constexpr u32 NORM_THREADS = 256;

__device__ __forceinline__ float add_squares(uint4 chunk, float sum) {
    const u32 pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (u32 p = 0; p < 4; ++p) {
        sum = __fmaf_rn(low_bf16(pairs[p]), low_bf16(pairs[p]), sum);
        sum = __fmaf_rn(high_bf16(pairs[p]), high_bf16(pairs[p]), sum);
    }
    return sum;
}

// Sums of each of `v` over the block of NORM_THREADS threads, given to every thread.
template <u32 COUNT> __device__ __forceinline__ void block_sums(float (&v)[COUNT]) {
    __shared__ float partial[COUNT][NORM_THREADS / 32];
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) {
        v[i] = warp_sum(v[i]);
        if (threadIdx.x % 32 == 0) partial[i][threadIdx.x / 32] = v[i];
    }
    __syncthreads();  // partial[] is complete before anyone reads it
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) {
        v[i] = 0.0f;
#pragma unroll
        for (u32 warp = 0; warp < NORM_THREADS / 32; ++warp) v[i] += partial[i][warp];
    }
    __syncthreads();  // everyone has read partial[] before a next call overwrites it
}

// What a row is multiplied by, from the sum of its squares.
__device__ __forceinline__ float norm_scale(float squares, u32 width, float eps) {
    return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(squares, float(width)), eps)));
}

__device__ __forceinline__ uint4 normalised(uint4 chunk, uint4 weights, float scale) {
    const u32 x[4] = {chunk.x, chunk.y, chunk.z, chunk.w}, w[4] = {weights.x, weights.y, weights.z, weights.w};
    u32 y[4];
#pragma unroll
    for (u32 p = 0; p < 4; ++p)
        y[p] = pack_bf16(__fmul_rn(low_bf16(w[p]), __fmul_rn(low_bf16(x[p]), scale)),
                         __fmul_rn(high_bf16(w[p]), __fmul_rn(high_bf16(x[p]), scale)));
    return make_uint4(y[0], y[1], y[2], y[3]);
}
