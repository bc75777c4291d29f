// One query after another, for any type and width of heads: what `attention` and `image_attention` share where tensor
// cores have no shape for them.
#pragma once
#include "common.cuh"

// The widest head of the plain kernels.
constexpr u32 MAX_HEAD_DIM = 256;

// out[d] = sum_k softmax_k(scale * query . key(k)) * value(k)[d] by one warp, all of whose lanes must call it, k below
// `num_keys` > 0 and d below `head_dim` <= 32 PER_LANE. Lane l keeps the columns l, l + 32, .. in registers. Keys come
// four at a time, in order, under a running maximum (Milakov & Gimelshein 2018, arXiv:1805.02867); all in f32.
template <class T, u32 PER_LANE, class Rows>
__device__ __forceinline__ void attend_row_wide(const T* query, T* out, const Rows& rows, u32 num_keys, u32 head_dim,
                                                float scale) {
    constexpr u32 KEYS = 4;
    const u32 lane = threadIdx.x % 32;
    // Columns that are not there are the last one, which adds nothing to the scores and is not stored.
    u32 columns[PER_LANE];
    float q[PER_LANE], sums[PER_LANE];
#pragma unroll
    for (u32 i = 0; i < PER_LANE; ++i) {
        columns[i] = min(i * 32 + lane, head_dim - 1);
        q[i] = i * 32 + lane < head_dim ? to_float(query[columns[i]]) : 0.0f;
        sums[i] = 0.0f;
    }
    float best = minus_infinity(), total = 0.0f;
    for (u32 first = 0; first < num_keys; first += KEYS) {
        float scores[KEYS];
        float new_best = best;
#pragma unroll
        for (u32 k = 0; k < KEYS; ++k) {
            scores[k] = 0.0f;
            if (first + k < num_keys) {
                const T* key = rows.key(first + k);
#pragma unroll
                for (u32 i = 0; i < PER_LANE; ++i) scores[k] += q[i] * to_float(key[columns[i]]);
            }
            scores[k] = warp_sum(scores[k]) * scale;
            if (first + k < num_keys) new_best = fmaxf(new_best, scores[k]);
        }
        const float factor = expf(best - new_best);
        best = new_best;
        total *= factor;
#pragma unroll
        for (u32 i = 0; i < PER_LANE; ++i) sums[i] *= factor;
#pragma unroll
        for (u32 k = 0; k < KEYS; ++k) {
            if (first + k < num_keys) {
                const float weight = expf(scores[k] - best);
                const T* value = rows.value(first + k);
                total += weight;
#pragma unroll
                for (u32 i = 0; i < PER_LANE; ++i) sums[i] += weight * to_float(value[columns[i]]);
            }
        }
    }
#pragma unroll
    for (u32 i = 0; i < PER_LANE; ++i)
        if (i * 32 + lane < head_dim) out[i * 32 + lane] = from_float<T>(sums[i] / total);
}

// The same for heads up to MAX_HEAD_DIM.
template <class T, class Rows>
__device__ __forceinline__ void attend_row(const T* query, T* out, const Rows& rows, u32 num_keys, u32 head_dim,
                                           float scale) {
    if (head_dim <= 128)
        attend_row_wide<T, 4>(query, out, rows, num_keys, head_dim, scale);
    else
        attend_row_wide<T, MAX_HEAD_DIM / 32>(query, out, rows, num_keys, head_dim, scale);
}
