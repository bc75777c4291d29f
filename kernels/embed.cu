// y[t, i] = table[ids[t], i]
// table    any element type [vocab_size, width];   y  T [.., width], T float or bf16;   any width
// ids      by value: MOST_IDS of them, of which the grid uses the first; or, where `sampled` is given, from there, where
//          the kernel before may just have put them; none is beyond the table
// rounding one, at the store, to the nearest
// launch   grid = number of ids, block = THREADS     wrapper cogvlm-cuda ops::embed     oracle oracle::round_to
#include "include/common.cuh"

constexpr u32 THREADS = 256;
constexpr u32 MOST_IDS = 512;

struct TokenIds {
    u32 id[MOST_IDS];
};

// After `wait_for_previous`.
__device__ __forceinline__ u32 token_id(const TokenIds& ids, const u32* sampled) {
    return sampled ? sampled[blockIdx.x] : ids.id[blockIdx.x];
}

template <class T>
__device__ void embed(const void* table, u32 type, const TokenIds& ids, const u32* sampled, T* y, u32 width) {
    allow_next();
    wait_for_previous();
    const u64 from = u64(token_id(ids, sampled)) * width;
    T* out = y + u64(blockIdx.x) * width;
    for (u32 i = threadIdx.x; i < width; i += THREADS) out[i] = from_float<T>(load_element(table, type, from + i));
}

extern "C" __global__ __launch_bounds__(THREADS) void embed_f32(
    const void* table, u32 type, const __grid_constant__ TokenIds ids, const u32* sampled, float* y, u32 width) {
    embed(table, type, ids, sampled, y, width);
}
extern "C" __global__ __launch_bounds__(THREADS) void embed_bf16(
    const void* table, u32 type, const __grid_constant__ TokenIds ids, const u32* sampled, bf16* y, u32 width) {
    embed(table, type, ids, sampled, y, width);
}

// Both bf16, rows of `chunks` times eight elements.
extern "C" __global__ __launch_bounds__(THREADS) void embed_bf16_wide(
    const uint4* table, const __grid_constant__ TokenIds ids, const u32* sampled, uint4* y, u32 chunks) {
    allow_next();
    wait_for_previous();
    const uint4* from = table + u64(token_id(ids, sampled)) * chunks;
    for (u32 i = threadIdx.x; i < chunks; i += THREADS) y[u64(blockIdx.x) * chunks + i] = from[i];
}
