// out[r, h] = sum_k softmax_k(query[r, h] . key[k, h'] / sqrt(head_dim)) value[k, h'],   Vaswani et al. 2017,
// h' = h / (num_heads / num_kv_heads), over the keys of the row's sequence up to its own     arXiv:1706.03762
// query, out T [rows, num_heads * head_dim] row-major, T float or bf16; out is not query
// kv         T [num_blocks, 2, num_kv_heads, BLOCK_LEN, head_dim], keys before values, paged; read up to the context
// sequences  u32 [sequences, 4]: first row, rows, context (the keys that the last row sees), unused
// blocks     u32 [sequences, blocks_per_sequence]: the blocks of each sequence, in order
// rounding   scores, softmax and sums in f32, one rounding at the store; attention_prefill_* round the probabilities to
//            bf16 before the second product
// launch     attention_f32, attention_bf16 (any even head_dim up to MAX_HEAD_DIM): a warp for each row and head,
//            grid = (ceil(most rows of a sequence * num_heads / PLAIN_WARPS), sequences), block = 32 PLAIN_WARPS
//            attention_prefill_bf16_128, sequences of two rows and more: grid = (num_heads, ceil(most rows / 128),
//            sequences), block = PrefillShape::THREADS, shared = PrefillShape::SHARED_BYTES, one block an SM
//            attention_decode_bf16_128_xH, sequences of one row: grid = (splits, num_heads / H, sequences),
//            block = 32 DECODE_WARPS, shared = DECODE_WARPS * DECODE_SLOTS * SLOT_BYTES, at most MAX_SPLITS splits;
//            H query heads share a key/value head
// wrapper    cogvlm-cuda ops::attention     oracle oracle::attention
//
// The plain kernels take sequences of any length; the two others skip those that are not theirs.
//
// Prefill: tiles of 128 queries, those that see most keys first. 1260 rows of 32 heads are 320 tiles of 1 to 10 times
// 128 keys, 13.3 such steps for each of 132 SMs; one tile an SM at a time, the longest first, ends after 14. Two
// smaller blocks an SM would share it in a longest tile that takes twice as long.
//
// Decode: all a key/value head has to offer is read once for every H of its query heads. A thread block takes one split:
// an equal share of the blocks of the present context. Each warp copies what it needs to a ring of its own in shared
// memory and waits for nobody else: registers would hold as much, but then nothing is under way while they are used, and
// the cache through which they are loaded is small where shared memory was given to the products. The last thread block
// of a head to end puts the splits together, in their order.
// spills allowed: attention_prefill_bf16_128 90a 16 three values, where sums and queries have all other registers
#include "include/flash.cuh"

constexpr u32 BLOCK_LEN = 16;
constexpr u32 PLAIN_WARPS = 4;
constexpr u32 DECODE_WARPS = 4;
constexpr u32 DECODE_SLOTS = 3;
constexpr u32 MAX_SPLITS = 32;
constexpr u32 HEAD_DIM = 128;
constexpr u32 SLOT_BYTES = BLOCK_LEN * HEAD_DIM * 2;  // keys or values of a block

template <class T> struct PagedRows {
    // Keys of the head in block 0.
    const T* kv;
    const u32* blocks;
    u64 block_stride, value_offset;
    u32 head_dim;
    __device__ __forceinline__ const T* key(u32 token) const {
        return kv + blocks[token / BLOCK_LEN] * block_stride + token % BLOCK_LEN * head_dim;
    }
    __device__ __forceinline__ const T* value(u32 token) const { return key(token) + value_offset; }
};

template <class T>
__device__ __forceinline__ void attention_plain(const T* query, const T* kv, const uint4* sequences, const u32* blocks,
                                                T* out, u32 blocks_per_sequence, u32 num_heads, u32 num_kv_heads,
                                                u32 head_dim, float scale) {
    allow_next();
    wait_for_previous();
    const uint4 sequence = sequences[blockIdx.y];
    const u32 item = blockIdx.x * PLAIN_WARPS + threadIdx.x / 32;
    const u32 row = item / num_heads, head = item % num_heads;
    if (row >= sequence.y) return;
    const u32 kv_head = head / (num_heads / num_kv_heads);
    const u64 value_offset = u64(num_kv_heads) * BLOCK_LEN * head_dim;
    const PagedRows<T> rows = {kv + u64(kv_head) * BLOCK_LEN * head_dim, blocks + u64(blockIdx.y) * blocks_per_sequence,
                               2 * value_offset, value_offset, head_dim};
    const u64 at = (u64(sequence.x + row) * num_heads + head) * head_dim;
    attend_row(query + at, out + at, rows, sequence.z - sequence.y + row + 1, head_dim, scale);
}

extern "C" __global__ __launch_bounds__(32 * PLAIN_WARPS) void attention_f32(
    const float* query, const float* kv, const uint4* sequences, const u32* blocks, float* out,
    u32 blocks_per_sequence, u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale) {
    attention_plain(query, kv, sequences, blocks, out, blocks_per_sequence, num_heads, num_kv_heads, head_dim, scale);
}
extern "C" __global__ __launch_bounds__(32 * PLAIN_WARPS) void attention_bf16(
    const bf16* query, const bf16* kv, const uint4* sequences, const u32* blocks, bf16* out, u32 blocks_per_sequence,
    u32 num_heads, u32 num_kv_heads, u32 head_dim, float scale) {
    attention_plain(query, kv, sequences, blocks, out, blocks_per_sequence, num_heads, num_kv_heads, head_dim, scale);
}

using PrefillShape = FlashShape<HEAD_DIM, 4, 4>;

// A half of a tile of keys is a block.
struct PagedKeys {
    static_assert(TILE_KEYS == 2 * BLOCK_LEN, "a half of a tile is a block");
    static constexpr u32 stride = HEAD_DIM;
    const bf16* kv;
    const u32* blocks;
    u32 value_offset;
    u32 last_block;
    __device__ __forceinline__ Halves halves(u32 first_key) const {
        const u32 block = first_key / BLOCK_LEN;
        return {blocks[min(block, last_block)], blocks[min(block + 1, last_block)]};
    }
    __device__ __forceinline__ const bf16* half(u32 block) const { return kv + block * (2 * u64(value_offset)); }
};

extern "C" __global__ __launch_bounds__(PrefillShape::THREADS, 1) void attention_prefill_bf16_128(
    const bf16* query, const bf16* kv, const uint4* sequences, const u32* blocks, bf16* out, u32 blocks_per_sequence,
    u32 num_heads, u32 num_kv_heads, float scale_log2) {
    allow_next();
    wait_for_previous();
    const uint4 sequence = sequences[blockIdx.z];
    const u32 num_rows = sequence.y, context_len = sequence.z;
    const u32 num_tiles = (num_rows + PrefillShape::QUERY_ROWS - 1) / PrefillShape::QUERY_ROWS;
    if (num_rows < 2 || blockIdx.y >= num_tiles) return;
    const u32 row = (num_tiles - 1 - blockIdx.y) * PrefillShape::QUERY_ROWS;
    const u32 head = blockIdx.x, kv_head = head / (num_heads / num_kv_heads);
    const u32 stride = num_heads * HEAD_DIM;
    const u64 at = u64(sequence.x + row) * stride + head * HEAD_DIM;
    const QueryTile tile = {query + at, out + at, stride, stride, min(PrefillShape::QUERY_ROWS, num_rows - row),
                            context_len - num_rows + row + 1};
    const PagedKeys keys = {kv + u64(kv_head) * BLOCK_LEN * HEAD_DIM, blocks + u64(blockIdx.z) * blocks_per_sequence,
                            num_kv_heads * BLOCK_LEN * HEAD_DIM, (context_len - 1) / BLOCK_LEN};
    attend_tile<PrefillShape, true>(tile, keys, scale_log2, Sharing{nullptr, nullptr, 0, 1});
}

__device__ __forceinline__ uint4 load_shared(u32 from) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(from)
                 : "memory");
    return x;
}

__device__ __forceinline__ float dot(uint4 a, uint4 b, float sum) {
    const u32 left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        sum = fmaf(low_bf16(left[i]), low_bf16(right[i]), sum);
        sum = fmaf(high_bf16(left[i]), high_bf16(right[i]), sum);
    }
    return sum;
}

// `partials` f32 [sequences, num_heads, splits, HEAD_DIM] and `softmaxes` f32 [sequences, num_heads, splits, 2] (the
// maximum of the scaled scores, base 2, and the sum of the exponentials relative to it) are for the splits of one
// launch; `counters` u32 [sequences, num_heads / HEADS], zero before and after.
template <u32 HEADS>
__device__ __forceinline__ void attention_decode(const bf16* query, const bf16* kv, const uint4* sequences,
                                                 const u32* blocks, bf16* out, float* partials, float2* softmaxes,
                                                 u32* counters, u32 blocks_per_sequence, u32 num_heads,
                                                 u32 num_kv_heads, float scale_log2) {
    __shared__ float warp_sums[DECODE_WARPS][HEADS][HEAD_DIM];
    __shared__ float2 warp_softmax[DECODE_WARPS][HEADS];
    __shared__ u32 finished;
    extern __shared__ __align__(256) u8 shared[];
    allow_next();
    // Tables were there before the step began.
    const uint4 sequence = sequences[blockIdx.z];
    const u32 context_len = sequence.z;
    const u32 num_blocks = (context_len + BLOCK_LEN - 1) / BLOCK_LEN;
    const u32 split = blockIdx.x, num_splits = min(gridDim.x, num_blocks);
    if (sequence.y != 1 || split >= num_splits) return;
    const u32 begin = split * num_blocks / num_splits, end = (split + 1) * num_blocks / num_splits;
    const u32 first_head = blockIdx.y * HEADS, kv_head = first_head / (num_heads / num_kv_heads);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32* table = blocks + u64(blockIdx.z) * blocks_per_sequence;
    const u64 value_offset = u64(num_kv_heads) * BLOCK_LEN * HEAD_DIM;
    const bf16* head_kv = kv + u64(kv_head) * BLOCK_LEN * HEAD_DIM;
    const u64 row = (u64(sequence.x) * num_heads + first_head) * HEAD_DIM;

    // The blocks of a warp are begin + warp, begin + warp + DECODE_WARPS, ..; it copies of each the keys, then the
    // values, to the next slot of its ring. Chunk c of a row is at c ^ 4 (row % 2), so that two keys of four chunks each
    // lie in different banks.
    const u32 num_own = begin + warp < end ? (end - begin - warp + DECODE_WARPS - 1) / DECODE_WARPS : 0;
    auto first_key = [&](u32 i) { return (begin + warp + i * DECODE_WARPS) * BLOCK_LEN; };
    const u32 ring = shared_address(shared) + warp * DECODE_SLOTS * SLOT_BYTES;
    auto place = [&](u32 key, u32 chunk) { return key * (HEAD_DIM * 2) + (chunk ^ key % 2 * 4) * 16; };
    u32 ids = 0;  // of 32 of its blocks, one a lane
    auto take_ids = [&](u32 first) {
        const u32 own = begin + warp + (first + lane) * DECODE_WARPS;
        ids = own < end ? table[own] : 0;
    };
    auto keys_of = [&](u32 i) { return head_kv + __shfl_sync(0xffffffffu, ids, i % 32) * (2 * value_offset); };
    u32 next = 0, next_slot = 0;  // an even number is the keys of half as many blocks, the one after it the values
    auto copy_next = [&]() {
        const u32 i = next / 2;
        if (i < num_own) {
            if (next > 0 && next % 64 == 0) take_ids(i);
            const u32 num_keys = min(BLOCK_LEN, context_len - first_key(i));
            const bf16* from = keys_of(i) + next % 2 * value_offset + lane * 8;
            const u32 to = ring + next_slot * SLOT_BYTES + place(lane / 16, lane % 16);
#pragma unroll
            for (u32 j = 0; j < BLOCK_LEN / 2; ++j)
                copy_async(to + j * (HEAD_DIM * 4), from + j * (HEAD_DIM * 2), 2 * j + lane / 16 < num_keys);
        }
        commit_copies();
        ++next;
        next_slot = next_slot + 1 == DECODE_SLOTS ? 0 : next_slot + 1;
    };
    take_ids(0);
    if (num_own > 0) {
        const bf16* keys = keys_of(0) + lane * 64;
        prefetch(keys);
        prefetch(keys + value_offset);
    }
    wait_for_previous();

    // Four lanes share a key: lane l has the chunks of 8 columns l % 4, l % 4 + 4, .. of the keys l / 4 and l / 4 + 8
    // of a block. Of the values it has chunk l % 16 of every second one.
    uint4 q[HEADS][4];
    float best[HEADS], total[HEADS], sums[HEADS][8];
#pragma unroll
    for (u32 h = 0; h < HEADS; ++h) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i)
            q[h][i] = *reinterpret_cast<const uint4*>(query + row + h * HEAD_DIM + (i * 4 + lane % 4) * 8);
        best[h] = minus_infinity();
        total[h] = 0.0f;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) sums[h][i] = 0.0f;
    }
#pragma unroll
    for (u32 i = 0; i < DECODE_SLOTS; ++i) copy_next();
    u32 slot = 0;
    // Where the oldest of what was copied lies, once all lanes' copies of it are there.
    auto wait_for_next = [&]() {
        wait_for_copies_but<DECODE_SLOTS - 1>();
        __syncwarp();
        const u32 at = ring + slot * SLOT_BYTES;
        slot = slot + 1 == DECODE_SLOTS ? 0 : slot + 1;
        return at;
    };
    for (u32 i = 0; i < num_own; ++i) {
        const u32 num_keys = min(BLOCK_LEN, context_len - first_key(i));
        const u32 keys = wait_for_next();
        uint4 k[2][4];
#pragma unroll
        for (u32 half = 0; half < 2; ++half)
#pragma unroll
            for (u32 c = 0; c < 4; ++c) k[half][c] = load_shared(keys + place(half * 8 + lane / 4, c * 4 + lane % 4));
        __syncwarp();  // all lanes have read the slot
        copy_next();
        float weights[HEADS][2];
#pragma unroll
        for (u32 h = 0; h < HEADS; ++h) {
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                float score = 0.0f;
#pragma unroll
                for (u32 c = 0; c < 4; ++c) score = dot(q[h][c], k[half][c], score);
                score += __shfl_xor_sync(0xffffffffu, score, 1);
                score += __shfl_xor_sync(0xffffffffu, score, 2);
                weights[h][half] = half * 8 + lane / 4 < num_keys ? score : minus_infinity();
            }
            // Every block has a key, so that the maximum is a number.
            const float now = fmaxf(best[h], warp_max(fmaxf(weights[h][0], weights[h][1])) * scale_log2);
            const float factor = exp2_fast(best[h] - now);
            best[h] = now;
#pragma unroll
            for (u32 half = 0; half < 2; ++half)
                weights[h][half] = exp2_fast(fmaf(weights[h][half], scale_log2, -now));
            total[h] = total[h] * factor + (weights[h][0] + weights[h][1]);
#pragma unroll
            for (u32 c = 0; c < 8; ++c) sums[h][c] *= factor;
        }
        const u32 values = wait_for_next();
        uint4 v[8];
#pragma unroll
        for (u32 j = 0; j < 8; ++j) v[j] = load_shared(values + place(2 * j + lane / 16, lane % 16));
        __syncwarp();  // all lanes have read the slot
        copy_next();
#pragma unroll
        for (u32 h = 0; h < HEADS; ++h)
#pragma unroll
            for (u32 j = 0; j < 8; ++j) {
                // The weight of key 2 j + lane / 16 is with the four lanes of that key.
                const float weight = __shfl_sync(0xffffffffu, weights[h][j / 4], (j % 4 * 2 + lane / 16) * 4);
                const u32 pairs[4] = {v[j].x, v[j].y, v[j].z, v[j].w};
#pragma unroll
                for (u32 c = 0; c < 4; ++c) {
                    sums[h][2 * c] = fmaf(weight, low_bf16(pairs[c]), sums[h][2 * c]);
                    sums[h][2 * c + 1] = fmaf(weight, high_bf16(pairs[c]), sums[h][2 * c + 1]);
                }
            }
    }
#pragma unroll
    for (u32 h = 0; h < HEADS; ++h) {
#pragma unroll
        for (u32 distance = 4; distance <= 16; distance *= 2)
            total[h] += __shfl_xor_sync(0xffffffffu, total[h], distance);
#pragma unroll
        for (u32 c = 0; c < 8; ++c) sums[h][c] += __shfl_xor_sync(0xffffffffu, sums[h][c], 16);
        if (lane < 16) {
            float4* to = reinterpret_cast<float4*>(&warp_sums[warp][h][lane * 8]);
            to[0] = make_float4(sums[h][0], sums[h][1], sums[h][2], sums[h][3]);
            to[1] = make_float4(sums[h][4], sums[h][5], sums[h][6], sums[h][7]);
        }
        if (lane == 0) warp_softmax[warp][h] = make_float2(best[h], total[h]);
    }
    __syncthreads();  // the sums of all warps are there

    // From here on a thread has one column.
    const u32 column = threadIdx.x;
    const u64 first_entry = (u64(blockIdx.z) * num_heads + first_head) * gridDim.x;
#pragma unroll
    for (u32 h = 0; h < HEADS; ++h) {
        float block_best = minus_infinity(), block_total = 0.0f, sum = 0.0f;
        // The first warp had a block, so that the maximum is a number.
#pragma unroll
        for (u32 w = 0; w < DECODE_WARPS; ++w) block_best = fmaxf(block_best, warp_softmax[w][h].x);
#pragma unroll
        for (u32 w = 0; w < DECODE_WARPS; ++w) {
            const float factor = exp2_fast(warp_softmax[w][h].x - block_best);
            block_total += warp_softmax[w][h].y * factor;
            sum += warp_sums[w][h][column] * factor;
        }
        const u64 entry = first_entry + h * gridDim.x + split;
        if (num_splits == 1) {
            out[row + h * HEAD_DIM + column] = to_bf16(sum / block_total);
        } else {
            partials[entry * HEAD_DIM + column] = sum;
            if (column == 0) softmaxes[entry] = make_float2(block_best, block_total);
        }
    }
    if (num_splits == 1) return;
    __threadfence();  // what this thread stored is seen before its block is counted
    __syncthreads();  // all threads have stored
    if (threadIdx.x == 0)
        finished = atomicInc(&counters[blockIdx.z * gridDim.y + blockIdx.y], num_splits - 1);
    __syncthreads();  // the count is there
    if (finished != num_splits - 1) return;
    __threadfence();  // what the others stored before they were counted is read after it
    for (u32 h = 0; h < HEADS; ++h) {
        const u64 entry = first_entry + h * gridDim.x;
        // Lane l has the softmax of split l; all that there is to read is under way before the first is used.
        const float2 softmax =
            lane < num_splits ? __ldcg(&softmaxes[entry + lane]) : make_float2(minus_infinity(), 0.0f);
        float parts[MAX_SPLITS];
#pragma unroll
        for (u32 s = 0; s < MAX_SPLITS; ++s)
            parts[s] = s < num_splits ? __ldcg(&partials[(entry + s) * HEAD_DIM + column]) : 0.0f;
        const float factor = exp2_fast(softmax.x - warp_max(softmax.x));
        float head_total = 0.0f, sum = 0.0f;
#pragma unroll
        for (u32 s = 0; s < MAX_SPLITS; ++s) {
            const float of_split = __shfl_sync(0xffffffffu, factor, s);
            head_total += __shfl_sync(0xffffffffu, softmax.y, s) * of_split;
            sum += parts[s] * of_split;
        }
        out[row + h * HEAD_DIM + column] = to_bf16(sum / head_total);
    }
}

static_assert(32 * DECODE_WARPS == HEAD_DIM, "a thread for each column of the result");

extern "C" __global__ __launch_bounds__(32 * DECODE_WARPS, 4) void attention_decode_bf16_128_x1(
    const bf16* query, const bf16* kv, const uint4* sequences, const u32* blocks, bf16* out, float* partials,
    float2* softmaxes, u32* counters, u32 blocks_per_sequence, u32 num_heads, u32 num_kv_heads, float scale_log2) {
    attention_decode<1>(query, kv, sequences, blocks, out, partials, softmaxes, counters, blocks_per_sequence,
                        num_heads, num_kv_heads, scale_log2);
}
extern "C" __global__ __launch_bounds__(32 * DECODE_WARPS, 2) void attention_decode_bf16_128_x2(
    const bf16* query, const bf16* kv, const uint4* sequences, const u32* blocks, bf16* out, float* partials,
    float2* softmaxes, u32* counters, u32 blocks_per_sequence, u32 num_heads, u32 num_kv_heads, float scale_log2) {
    attention_decode<2>(query, kv, sequences, blocks, out, partials, softmaxes, counters, blocks_per_sequence,
                        num_heads, num_kv_heads, scale_log2);
}
