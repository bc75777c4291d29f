// A tile of queries against all their keys by tensor cores, scores never leaving the registers: Dao et al. 2022,
// arXiv:2205.14135; Dao 2023, arXiv:2307.08691. `attention` and `image_attention` share it; where keys and values lie
// is theirs to say. `mma.sync`, `ldmatrix` and `cp.async`: sm_80 on.
//
// A thread block has two groups of ROW_WARPS warps. Both hold the same queries, 32 rows a warp; of the tiles of 32 keys
// the first group takes the even ones, the second the odd ones, each through two stages of its own, so that one group
// multiplies while the other exponentiates. At the end each gives the other its sums of half of the rows. 32 rows a
// warp, because a warp reads each key and value from shared memory once for all its rows: with 16, Hopper's shared
// memory would be slower than its tensor cores. That takes nearly all registers: one thread block an SM.
//
// Rounding: scores, maxima and sums in f32, the probabilities to bf16 before the second product; one at the store.
#pragma once
#include "attention.cuh"
#include "mma.cuh"

constexpr u32 TILE_KEYS = 32;
// Sums are scaled down only when a score, base 2, exceeds the one that they are relative to by more than this. So a
// probability is 2^8 at most, which costs neither f32 nor bf16 a digit.
constexpr float LAZY_STEP = 8.0f;

// HELD_STEPS of the HEAD_DIM / 16 steps of the first product find their queries in registers, the others in shared
// memory.
template <u32 HEAD_DIM_, u32 ROW_WARPS_, u32 HELD_STEPS_> struct FlashShape {
    static constexpr u32 HEAD_DIM = HEAD_DIM_, ROW_WARPS = ROW_WARPS_, HELD_STEPS = HELD_STEPS_;
    static constexpr u32 STEPS = HEAD_DIM / 16;
    // 16 bytes each.
    static constexpr u32 CHUNKS = HEAD_DIM / 8;
    static constexpr u32 ROW_BYTES = HEAD_DIM * 2;
    static constexpr u32 GROUP_THREADS = ROW_WARPS * 32, THREADS = 2 * GROUP_THREADS;
    static constexpr u32 QUERY_ROWS = ROW_WARPS * 32;
    static constexpr u32 QUERY_BYTES = QUERY_ROWS * ROW_BYTES;
    // Keys or values of one tile.
    static constexpr u32 TILE_BYTES = TILE_KEYS * ROW_BYTES;
    // Queries, then [group][stage][keys, values]; later what the groups give each other.
    static constexpr u32 SHARED_BYTES = QUERY_BYTES + 2 * 2 * 2 * TILE_BYTES;
    static constexpr u32 GIVEN_BYTES = THREADS * (2 * STEPS + 1) * 16;
    static constexpr bool WHOLE_LINES = CHUNKS % 8 == 0;
    static_assert(HEAD_DIM % 16 == 0 && (WHOLE_LINES || CHUNKS % 4 == 2), "`place` has no rule for this width");
    static_assert(TILE_BYTES % 256 == 0 && QUERY_BYTES % 256 == 0, "tiles start at whole swizzles");
    static_assert(HELD_STEPS > 0 && HELD_STEPS <= STEPS, "some queries are held");
    static_assert(GIVEN_BYTES <= SHARED_BYTES && SHARED_BYTES + 256 <= 99 * 1024, "sm_86 gives a thread block 99 KiB");

    // Where a chunk of a row lies, in bytes: so that 8 rows of one column of chunks are in 8 different sixteenths of
    // the 128 bytes of all banks, which is what `ldmatrix` reads at a time. Rows of whole 128 bytes would all start in
    // the same place; those of 14 chunks start at 0, 6, 4, 2 and again, which leaves the odd places to rows 4 to 7.
    static __device__ __forceinline__ u32 place(u32 row, u32 chunk) {
        return row * ROW_BYTES + ((chunk ^ (WHOLE_LINES ? row % 8 : row / 4 % 2)) << 4);
    }
    // The place of chunk 2 step + c of a row, from that of its chunk c < 2.
    static __device__ __forceinline__ u32 advance(u32 at, u32 step) {
        return WHOLE_LINES ? at ^ (step << 5) : at + (step << 5);
    }
};

// Rows of queries that a thread block takes: `num_rows` > 0 of them, at most QUERY_ROWS.
struct QueryTile {
    // Of the first row, in this head.
    const bf16* query;
    bf16* out;
    // Elements from row to row.
    u32 query_stride, out_stride;
    u32 num_rows;
    // Keys that the first row sees; in causal attention each row sees one more than the one before it.
    u32 num_visible;
};

// Where the keys of a tile are, in numbers that their owner understands: of both halves of 16 keys.
struct Halves {
    u32 first, second;
};

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Word j of lane i of every four lanes becomes word i of lane j.
__device__ __forceinline__ void transpose_words(u32 (&words)[4]) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 distance = 1; distance <= 2; distance *= 2) {
        const bool upper = lane & distance;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            if (i & distance) continue;
            const u32 given = upper ? words[i] : words[i + distance];
            const u32 taken = __shfl_xor_sync(0xffffffffu, given, distance);
            if (upper)
                words[i] = taken;
            else
                words[i + distance] = taken;
        }
    }
}

// Begins to copy keys and values `first_key ..` to `at`, by the threads of a group; zeros for those from `num_keys` on.
template <class Shape, class Keys>
__device__ __forceinline__ void load_tile(const Keys& keys, Halves halves, u32 at, u32 first_key, u32 num_keys,
                                          u32 thread) {
    constexpr u32 COPIES = TILE_KEYS * Shape::CHUNKS;
    constexpr u32 ROWS = Shape::GROUP_THREADS / Shape::CHUNKS;
    // Whether the group copies so many whole rows at a time that they are in one half.
    constexpr bool WHOLE_ROWS = Shape::GROUP_THREADS % Shape::CHUNKS == 0 && 16 % ROWS == 0;
#pragma unroll
    for (u32 i = 0; i < (COPIES + Shape::GROUP_THREADS - 1) / Shape::GROUP_THREADS; ++i) {
        const u32 copy = i * Shape::GROUP_THREADS + thread;
        if (COPIES % Shape::GROUP_THREADS != 0 && copy >= COPIES) break;
        const u32 row = WHOLE_ROWS ? i * ROWS + thread / Shape::CHUNKS : copy / Shape::CHUNKS;
        const u32 chunk = WHOLE_ROWS ? thread % Shape::CHUNKS : copy % Shape::CHUNKS;
        const u32 half = (WHOLE_ROWS ? i * ROWS : row) < 16 ? halves.first : halves.second;
        const bf16* key = keys.half(half) + row % 16 * keys.stride + chunk * 8;
        const u32 to = at + Shape::place(row, chunk);
        copy_async(to, key, first_key + row < num_keys);
        copy_async(to + Shape::TILE_BYTES, key + keys.value_offset, first_key + row < num_keys);
    }
}

// What a lane knows of its rows: [half of the warp's rows][row lane / 4 or lane / 4 + 8].
template <class Shape> struct RowState {
    float sums[2][2 * Shape::STEPS][4];
    // Of the scaled scores, base 2: what `sums` and `totals` are relative to.
    float best[2][2];
    // Of this lane's columns, until the end.
    float totals[2][2];
};

// Scores become probabilities relative to `state.best`, which grows first where it has to.
template <class Shape>
__device__ __forceinline__ void exponentiate(RowState<Shape>& state, float (&scores)[2][4][4], float scale) {
    float best[2][2];
    bool exceeds = false;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
#pragma unroll
        for (u32 row = 0; row < 2; ++row) {
            float x = fmaxf(scores[half][0][2 * row], scores[half][0][2 * row + 1]);
#pragma unroll
            for (u32 n = 1; n < 4; ++n) x = fmaxf(x, fmaxf(scores[half][n][2 * row], scores[half][n][2 * row + 1]));
            best[half][row] = x * scale;
            exceeds |= best[half][row] > state.best[half][row] + LAZY_STEP;
        }
    }
    if (__any_sync(0xffffffffu, exceeds)) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
#pragma unroll
            for (u32 row = 0; row < 2; ++row) {
                float x = best[half][row];
                x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
                x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
                const float old = state.best[half][row];
                const float now = fmaxf(old, x);
                // A row that has seen no key yet has nothing to scale.
                const float factor = old == minus_infinity() ? 0.0f : exp2_fast(old - now);
                state.best[half][row] = now;
                state.totals[half][row] *= factor;
#pragma unroll
                for (u32 n = 0; n < 2 * Shape::STEPS; ++n) {
                    state.sums[half][n][2 * row] *= factor;
                    state.sums[half][n][2 * row + 1] *= factor;
                }
            }
        }
    }
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
#pragma unroll
        for (u32 row = 0; row < 2; ++row) {
            const float known = state.best[half][row];
            const float base = known == minus_infinity() ? 0.0f : known;
            float total = 0.0f;
#pragma unroll
            for (u32 n = 0; n < 4; ++n) {
#pragma unroll
                for (u32 i = 2 * row; i < 2 * row + 2; ++i) {
                    scores[half][n][i] = exp2_fast(fmaf(scores[half][n][i], scale, -base));
                    total += scores[half][n][i];
                }
            }
            state.totals[half][row] += total;
        }
    }
}

// Leaves the half GIVEN of the warp's rows to the other group.
template <class Shape, u32 GIVEN> __device__ __forceinline__ void give(const RowState<Shape>& state, float4* to) {
#pragma unroll
    for (u32 n = 0; n < 2 * Shape::STEPS; ++n) {
        const float(&sums)[4] = state.sums[GIVEN][n];
        to[n * Shape::GROUP_THREADS] = make_float4(sums[0], sums[1], sums[2], sums[3]);
    }
    to[2 * Shape::STEPS * Shape::GROUP_THREADS] =
        make_float4(state.best[GIVEN][0], state.best[GIVEN][1], state.totals[GIVEN][0], state.totals[GIVEN][1]);
}

// What a lane has of its two rows in the end: row lane / 4 of 16 (elements 0, 1 of `sums`) and row lane / 4 + 8.
template <class Shape> struct Result {
    float sums[2 * Shape::STEPS][4];
    float best[2], totals[2];
};

// The half TAKEN with what the other group has of it.
template <class Shape, u32 TAKEN>
__device__ __forceinline__ void take(const RowState<Shape>& state, const float4* from, Result<Shape>& result) {
    const float4 other = from[2 * Shape::STEPS * Shape::GROUP_THREADS];
    const float other_best[2] = {other.x, other.y}, other_totals[2] = {other.z, other.w};
    float own_factor[2], other_factor[2];
#pragma unroll
    for (u32 row = 0; row < 2; ++row) {
        // A number: the first group has the first key, which every row sees.
        result.best[row] = fmaxf(state.best[TAKEN][row], other_best[row]);
        own_factor[row] = exp2_fast(state.best[TAKEN][row] - result.best[row]);
        other_factor[row] = exp2_fast(other_best[row] - result.best[row]);
        result.totals[row] = state.totals[TAKEN][row] * own_factor[row] + other_totals[row] * other_factor[row];
    }
#pragma unroll
    for (u32 n = 0; n < 2 * Shape::STEPS; ++n) {
        const float4 others = from[n * Shape::GROUP_THREADS];
        const float(&own)[4] = state.sums[TAKEN][n];
        result.sums[n][0] = own[0] * own_factor[0] + others.x * other_factor[0];
        result.sums[n][1] = own[1] * own_factor[0] + others.y * other_factor[0];
        result.sums[n][2] = own[2] * own_factor[1] + others.z * other_factor[1];
        result.sums[n][3] = own[3] * own_factor[1] + others.w * other_factor[1];
    }
}

// Divides and stores; `row` of the tile is the lane's first one.
template <class Shape>
__device__ __forceinline__ void store(const Result<Shape>& result, const QueryTile& tile, u32 row) {
    const u32 lane = threadIdx.x % 32;
    const float factor[2] = {1.0f / result.totals[0], 1.0f / result.totals[1]};
    constexpr u32 FOURS = 2 * Shape::STEPS / 4;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        const bool there = row + half * 8 < tile.num_rows;
        bf16* out = tile.out + u64(row + half * 8) * tile.out_stride;
        const auto pair = [&](u32 n) {
            return pack_bf16(result.sums[n][2 * half] * factor[half], result.sums[n][2 * half + 1] * factor[half]);
        };
#pragma unroll
        for (u32 four = 0; four < FOURS; ++four) {
            // Four lanes have 4 x 8 columns of a row, two adjoining ones of each 8: each takes 8 adjoining ones.
            u32 words[4] = {pair(four * 4), pair(four * 4 + 1), pair(four * 4 + 2), pair(four * 4 + 3)};
            transpose_words(words);
            if (there)
                *reinterpret_cast<uint4*>(out + (four * 4 + lane % 4) * 8) =
                    make_uint4(words[0], words[1], words[2], words[3]);
        }
#pragma unroll
        for (u32 n = FOURS * 4; n < 2 * Shape::STEPS; ++n)
            if (there) *reinterpret_cast<u32*>(out + n * 8 + lane % 4 * 2) = pair(n);
    }
}

// A tile whose keys several thread blocks share: `parts` f32 [num_parts, 2 STEPS + 1, THREADS, 4] for what each of them
// has, `counter` zero before and after.
struct Sharing {
    float4* parts;
    u32* counter;
    u32 part, num_parts;
};

// Leaves `result` to the thread block that ends last, and gives that one the results of all, put together in order.
// All threads must call it; false for all but the last block.
template <class Shape> __device__ __forceinline__ bool combine(Result<Shape>& result, const Sharing& sharing) {
    __shared__ u32 finished;
    constexpr u32 STRIDE = (2 * Shape::STEPS + 1) * Shape::THREADS, SOFTMAX = 2 * Shape::STEPS * Shape::THREADS;
    float4* own = sharing.parts + sharing.part * STRIDE + threadIdx.x;
#pragma unroll
    for (u32 n = 0; n < 2 * Shape::STEPS; ++n)
        own[n * Shape::THREADS] =
            make_float4(result.sums[n][0], result.sums[n][1], result.sums[n][2], result.sums[n][3]);
    own[SOFTMAX] = make_float4(result.best[0], result.best[1], result.totals[0], result.totals[1]);
    __threadfence();  // what this thread stored is seen before its block is counted
    __syncthreads();  // all threads have stored
    if (threadIdx.x == 0) finished = atomicInc(sharing.counter, sharing.num_parts - 1);
    __syncthreads();  // the count is there
    if (finished != sharing.num_parts - 1) return false;
    __threadfence();  // what the others stored before they were counted is read after it
    const float4* parts = sharing.parts + threadIdx.x;
#pragma unroll
    for (u32 row = 0; row < 2; ++row) {
        result.best[row] = minus_infinity();
        result.totals[row] = 0.0f;
    }
#pragma unroll
    for (u32 n = 0; n < 2 * Shape::STEPS; ++n) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) result.sums[n][i] = 0.0f;
    }
    for (u32 part = 0; part < sharing.num_parts; ++part) {
        const float4 softmax = __ldcg(&parts[part * STRIDE + SOFTMAX]);
        result.best[0] = fmaxf(result.best[0], softmax.x);
        result.best[1] = fmaxf(result.best[1], softmax.y);
    }
    for (u32 part = 0; part < sharing.num_parts; ++part) {
        const float4 softmax = __ldcg(&parts[part * STRIDE + SOFTMAX]);
        const float factor[2] = {exp2_fast(softmax.x - result.best[0]), exp2_fast(softmax.y - result.best[1])};
        result.totals[0] += softmax.z * factor[0];
        result.totals[1] += softmax.w * factor[1];
#pragma unroll
        for (u32 n = 0; n < 2 * Shape::STEPS; ++n) {
            const float4 sums = __ldcg(&parts[part * STRIDE + n * Shape::THREADS]);
            result.sums[n][0] += sums.x * factor[0];
            result.sums[n][1] += sums.y * factor[0];
            result.sums[n][2] += sums.z * factor[1];
            result.sums[n][3] += sums.w * factor[1];
        }
    }
    return true;
}

// Attention of one tile by the whole thread block; `scale` is that of the scores times log2 e. All addresses are
// multiples of 16 bytes, and so are all strides. Only attention without a causal mask is shared.
//
// Keys: `halves(first_key)`, also for tiles beyond the last, and `half` for the first row of one of them; `stride`,
// `value_offset` in elements, from a key to the next one of its half, and to its value.
template <class Shape, bool CAUSAL, class Keys>
__device__ __forceinline__ void attend_tile(const QueryTile& tile, const Keys& keys, float scale,
                                            const Sharing& sharing) {
    extern __shared__ __align__(256) u8 shared[];
    const u32 queries = shared_address(shared);
    const u32 lane = threadIdx.x % 32;
    // The same for all lanes, and the compiler should know.
    const u32 warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    const u32 group = warp / Shape::ROW_WARPS;
    const u32 thread = threadIdx.x - group * Shape::GROUP_THREADS;
    const u32 first_row = warp % Shape::ROW_WARPS * 32;
    const u32 stages = queries + Shape::QUERY_BYTES + group * 4 * Shape::TILE_BYTES;
    u32 num_keys = CAUSAL ? tile.num_visible + tile.num_rows - 1 : tile.num_visible;
    // This block's keys, and the first ones of its group: all of them, or every `num_parts`th part.
    u32 own_key = group * TILE_KEYS;
    if (!CAUSAL && sharing.num_parts > 1) {
        const u32 num_pairs = (num_keys + 2 * TILE_KEYS - 1) / (2 * TILE_KEYS);
        own_key += sharing.part * num_pairs / sharing.num_parts * 2 * TILE_KEYS;
        num_keys = min(num_keys, (sharing.part + 1) * num_pairs / sharing.num_parts * 2 * TILE_KEYS);
    }
    const auto tiles_from = [&](u32 key) {
        return key < num_keys ? (num_keys - key + 2 * TILE_KEYS - 1) / (2 * TILE_KEYS) : 0;
    };
    // The first group has as many as the other, or one more. Both take part in all of its rounds: barriers of one group
    // alone are 2 to 9 % faster on an H100, but compute-sanitizer's racecheck does not see what they order.
    const u32 num_tiles = tiles_from(own_key), num_rounds = tiles_from(own_key - group * TILE_KEYS);

    for (u32 copy = threadIdx.x; copy < Shape::QUERY_ROWS * Shape::CHUNKS; copy += Shape::THREADS) {
        const u32 row = copy / Shape::CHUNKS, chunk = copy % Shape::CHUNKS;
        const bool there = row < tile.num_rows;
        const bf16* query = tile.query + u64(there ? row : 0) * tile.query_stride + chunk * 8;
        copy_async(queries + Shape::place(row, chunk), query, there);
    }
    if (num_tiles > 0)
        load_tile<Shape>(keys, keys.halves(own_key), stages, own_key, num_keys, thread);
    // Looked up one tile ahead.
    Halves next = keys.halves(own_key + 2 * TILE_KEYS);

    RowState<Shape> state;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
#pragma unroll
        for (u32 row = 0; row < 2; ++row) {
            state.best[half][row] = minus_infinity();
            state.totals[half][row] = 0.0f;
        }
#pragma unroll
        for (u32 n = 0; n < 2 * Shape::STEPS; ++n) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) state.sums[half][n][i] = 0.0f;
        }
    }
    wait_for_copies();
    __syncthreads();  // queries and first tiles are there, whoever copied them

    // Of each lane, the place of the row that it gives to `ldmatrix`: queries and values by 16 rows of two chunks, keys
    // by two times 8 rows of two chunks.
    const u32 query_place = queries + Shape::place(first_row + lane % 16, lane / 16);
    const u32 key_place = Shape::place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    const u32 value_place = Shape::TILE_BYTES + Shape::place(lane % 16, lane / 16);
    u32 held[Shape::HELD_STEPS][2][4];
#pragma unroll
    for (u32 step = 0; step < Shape::HELD_STEPS; ++step) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half)
            load_matrices(held[step][half], Shape::advance(query_place, step) + half * 16 * Shape::ROW_BYTES);
    }

    for (u32 index = 0; index < num_rounds; ++index) {
        const u32 first_key = own_key + 2 * index * TILE_KEYS;
        const u32 stage = stages + index % 2 * 2 * Shape::TILE_BYTES;
        if (index > 0) {
            wait_for_copies();
            __syncthreads();  // the tiles are there, whoever copied them, and everyone is done with those before them
        }
        if (index >= num_tiles) continue;
        if (index + 1 < num_tiles) {
            const u32 other = stages + (index + 1) % 2 * 2 * Shape::TILE_BYTES;
            load_tile<Shape>(keys, next, other, first_key + 2 * TILE_KEYS, num_keys, thread);
            next = keys.halves(first_key + 4 * TILE_KEYS);
        }
        // Row r sees keys below num_visible + r.
        const u32 warp_visible = tile.num_visible + first_row;
        if (first_row >= tile.num_rows || (CAUSAL && first_key >= warp_visible + 31)) continue;

        float scores[2][4][4];
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
#pragma unroll
            for (u32 n = 0; n < 4; ++n) {
#pragma unroll
                for (u32 i = 0; i < 4; ++i) scores[half][n][i] = 0.0f;
            }
        }
#pragma unroll
        for (u32 step = 0; step < Shape::STEPS; ++step) {
            u32 query[2][4];
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                if (step < Shape::HELD_STEPS) {
#pragma unroll
                    for (u32 i = 0; i < 4; ++i) query[half][i] = held[step % Shape::HELD_STEPS][half][i];
                } else {
                    load_matrices(query[half], Shape::advance(query_place, step) + half * 16 * Shape::ROW_BYTES);
                }
            }
#pragma unroll
            for (u32 pair = 0; pair < 2; ++pair) {
                u32 key[4];
                load_matrices(key, Shape::advance(stage + key_place, step) + pair * 16 * Shape::ROW_BYTES);
#pragma unroll
                for (u32 half = 0; half < 2; ++half) {
                    multiply(scores[half][2 * pair], query[half], key[0], key[1]);
                    multiply(scores[half][2 * pair + 1], query[half], key[2], key[3]);
                }
            }
        }
        if (first_key + TILE_KEYS > (CAUSAL ? warp_visible : num_keys)) {
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
#pragma unroll
                for (u32 n = 0; n < 4; ++n) {
#pragma unroll
                    for (u32 i = 0; i < 4; ++i) {
                        const u32 visible = CAUSAL ? warp_visible + half * 16 + lane / 4 + i / 2 * 8 : num_keys;
                        if (first_key + n * 8 + lane % 4 * 2 + i % 2 >= visible) scores[half][n][i] = minus_infinity();
                    }
                }
            }
        }
        exponentiate<Shape>(state, scores, scale);
#pragma unroll
        for (u32 pair = 0; pair < 2; ++pair) {
            u32 probability[2][4];
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
                    const float(&x)[4] = scores[half][2 * pair + i / 2];
                    probability[half][i] = pack_bf16(x[i % 2 * 2], x[i % 2 * 2 + 1]);
                }
            }
#pragma unroll
            for (u32 step = 0; step < Shape::STEPS; ++step) {
                u32 value[4];
                load_transposed(value, Shape::advance(stage + value_place, step) + pair * 16 * Shape::ROW_BYTES);
#pragma unroll
                for (u32 half = 0; half < 2; ++half) {
                    multiply(state.sums[half][2 * step], probability[half], value[0], value[1]);
                    multiply(state.sums[half][2 * step + 1], probability[half], value[2], value[3]);
                }
            }
        }
    }

#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
#pragma unroll
        for (u32 row = 0; row < 2; ++row) {
            float& total = state.totals[half][row];
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
        }
    }
    __syncthreads();  // both groups are done with queries, keys and values: their memory serves the exchange
    constexpr u32 GIVEN = (2 * Shape::STEPS + 1) * Shape::GROUP_THREADS;
    float4* exchange = reinterpret_cast<float4*>(shared);
    if (group == 0)
        give<Shape, 1>(state, exchange + thread);
    else
        give<Shape, 0>(state, exchange + GIVEN + thread);
    __syncthreads();  // what was given is there
    Result<Shape> result;
    if (group == 0)
        take<Shape, 0>(state, exchange + GIVEN + thread, result);
    else
        take<Shape, 1>(state, exchange + thread, result);
    if (!CAUSAL && sharing.num_parts > 1 && !combine(result, sharing)) return;
    store(result, tile, first_row + group * 16 + lane / 4);
}
