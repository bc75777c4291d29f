// out[t, h] = sum_k softmax_k(q[t, h] . k[k, h] / sqrt(head_dim)) v[k, h]     Vaswani et al. 2017, arXiv:1706.03762
// over all tokens k of the image of t
// qkv      T [num_images * num_tokens, 3 * width] row-major, rows [q | k | v], width = num_heads * head_dim, T float or
//          bf16;  out T [num_images * num_tokens, width], not in qkv
// rounding scores, softmax and sums in f32, one rounding at the store; image_attention_bf16_D round the probabilities
//          to bf16 before the second product
// launch   image_attention_f32, image_attention_bf16 (any even head_dim up to MAX_HEAD_DIM): a warp for each token and
//          head, grid = (ceil(num_tokens * num_heads / PLAIN_WARPS), num_images), block = 32 PLAIN_WARPS
//          image_attention_bf16_D, head_dim D of 64, 112 or 128, of ImageShape<D>: tiles = ceil(num_tokens /
//          QUERY_ROWS) * num_heads * num_images, grid = num_whole + (tiles - num_whole) * num_parts, block = THREADS,
//          shared = SHARED_BYTES; `parts` f32 [tiles - num_whole, num_parts, D / 8 + 1, THREADS, 4], `counters` u32
//          [tiles - num_whole], zero before and after; num_parts is 1 at least and num_tokens / 64 at most
// wrapper  cogvlm-cuda ops::image_attention     oracle oracle::image_attention
//
// A tile of queries takes an SM. 16 heads of 1226 tokens have 160 tiles of 128: 132 SMs would need two rounds for what
// is 1.21 of one. So as many tiles as fill whole rounds are whole, and the keys of each of the other 28 are shared by
// 4 thread blocks: 1.25 rounds. The last one of a tile to end puts the parts together, in their order. (Tiles of 160
// are 128, one round; but ten warps are three for two of an SM's four schedulers, and leave each 168 registers.)
// spills allowed: image_attention_bf16_112 80 24 three values, where sums, queries and keys have all other registers
// spills allowed: image_attention_bf16_112 86 24 three values, where sums, queries and keys have all other registers
// spills allowed: image_attention_bf16_112 89 24 three values, where sums, queries and keys have all other registers
#include "include/flash.cuh"

constexpr u32 PLAIN_WARPS = 4;

template <class T> struct ImageRows {
    // Key of the head in the first token.
    const T* first;
    u32 width;
    __device__ __forceinline__ const T* key(u32 token) const { return first + u64(token) * 3 * width; }
    __device__ __forceinline__ const T* value(u32 token) const { return key(token) + width; }
};

template <class T>
__device__ __forceinline__ void image_attention_plain(const T* qkv, T* out, u32 num_tokens, u32 num_heads, u32 head_dim,
                                                      float scale) {
    allow_next();
    wait_for_previous();
    const u32 item = blockIdx.x * PLAIN_WARPS + threadIdx.x / 32;
    const u32 token = item / num_heads, head = item % num_heads;
    if (token >= num_tokens) return;
    const u32 width = num_heads * head_dim;
    const u64 first_row = u64(blockIdx.y) * num_tokens;
    const T* image = qkv + first_row * 3 * width + head * head_dim;
    const ImageRows<T> rows = {image + width, width};
    attend_row(image + u64(token) * 3 * width, out + (first_row + token) * width + head * head_dim, rows, num_tokens,
               head_dim, scale);
}

extern "C" __global__ __launch_bounds__(32 * PLAIN_WARPS) void image_attention_f32(
    const float* qkv, float* out, u32 num_tokens, u32 num_heads, u32 head_dim, float scale) {
    image_attention_plain(qkv, out, num_tokens, num_heads, head_dim, scale);
}
extern "C" __global__ __launch_bounds__(32 * PLAIN_WARPS) void image_attention_bf16(
    const bf16* qkv, bf16* out, u32 num_tokens, u32 num_heads, u32 head_dim, float scale) {
    image_attention_plain(qkv, out, num_tokens, num_heads, head_dim, scale);
}

template <u32 HEAD_DIM> using ImageShape = FlashShape<HEAD_DIM, 4, HEAD_DIM == 128 ? 4 : HEAD_DIM / 16>;

struct ImageKeys {
    const bf16* first;
    u32 stride;
    u32 value_offset;
    __device__ __forceinline__ Halves halves(u32 first_key) const { return {first_key, first_key + 16}; }
    __device__ __forceinline__ const bf16* half(u32 first_key) const { return first + u64(first_key) * stride; }
};

template <u32 HEAD_DIM>
__device__ __forceinline__ void image_attention_tile(const bf16* qkv, bf16* out, float4* parts, u32* counters,
                                                     u32 num_tokens, u32 num_heads, u32 num_whole, u32 num_parts,
                                                     float scale_log2) {
    using Shape = ImageShape<HEAD_DIM>;
    allow_next();
    wait_for_previous();
    const bool is_whole = blockIdx.x < num_whole;
    const u32 beyond = blockIdx.x - num_whole, shared_tile = beyond / num_parts;
    const u32 index = is_whole ? blockIdx.x : num_whole + shared_tile;
    const u32 tiles = (num_tokens + Shape::QUERY_ROWS - 1) / Shape::QUERY_ROWS;
    const u32 token = index % tiles * Shape::QUERY_ROWS, head = index / tiles % num_heads;
    const u32 width = num_heads * HEAD_DIM;
    const u64 first_row = u64(index / tiles / num_heads) * num_tokens;
    const bf16* image = qkv + first_row * 3 * width + head * HEAD_DIM;
    const QueryTile tile = {image + u64(token) * 3 * width, out + (first_row + token) * width + head * HEAD_DIM,
                            3 * width, width, min(Shape::QUERY_ROWS, num_tokens - token), num_tokens};
    const Sharing sharing = {parts + u64(shared_tile) * num_parts * (2 * Shape::STEPS + 1) * Shape::THREADS,
                             counters + shared_tile, beyond % num_parts, is_whole ? 1 : num_parts};
    attend_tile<Shape, false>(tile, ImageKeys{image + width, 3 * width, width}, scale_log2, sharing);
}

extern "C" __global__ __launch_bounds__(ImageShape<64>::THREADS, 1) void image_attention_bf16_64(
    const bf16* qkv, bf16* out, float4* parts, u32* counters, u32 num_tokens, u32 num_heads, u32 num_whole,
    u32 num_parts, float scale_log2) {
    image_attention_tile<64>(qkv, out, parts, counters, num_tokens, num_heads, num_whole, num_parts, scale_log2);
}
extern "C" __global__ __launch_bounds__(ImageShape<112>::THREADS, 1) void image_attention_bf16_112(
    const bf16* qkv, bf16* out, float4* parts, u32* counters, u32 num_tokens, u32 num_heads, u32 num_whole,
    u32 num_parts, float scale_log2) {
    image_attention_tile<112>(qkv, out, parts, counters, num_tokens, num_heads, num_whole, num_parts, scale_log2);
}
extern "C" __global__ __launch_bounds__(ImageShape<128>::THREADS, 1) void image_attention_bf16_128(
    const bf16* qkv, bf16* out, float4* parts, u32* counters, u32 num_tokens, u32 num_heads, u32 num_whole,
    u32 num_parts, float scale_log2) {
    image_attention_tile<128>(qkv, out, parts, counters, num_tokens, num_heads, num_whole, num_parts, scale_log2);
}
