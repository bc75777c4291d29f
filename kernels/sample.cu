// tokens[t] = the token that request t chooses from logits[t]: repetition penalty, temperature, top-k, top-p, draw
// logits   f32 [rows, vocab_size] row-major, not changed; what is not a number counts as minus infinity
// requests, seen   as RowRequest says; `seen` may name a token twice, and tokens beyond the vocabulary
// space    per row, `space_bytes` apart: u64 [vocab_size], then f32 [vocab_size]
// rounding scores as the oracle's, bit for bit: penalty in f32, distance to the best score in f32, its quotient by the
//          temperature and the exponential in f64. A mass is that exponential in units of 1 / `unit`, rounded to an
//          integer: sums have no order and no error. `unit` is a power of two, vocab_size * unit at most 2^62
// launch   grid = rows, block = THREADS     wrapper cogvlm-cuda ops::sample     oracle sampling::sample
//          sample_echo: one thread writes what it finds in each field of two requests, for a test
#include "include/common.cuh"

constexpr u32 THREADS = 1024;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 ALL_LANES = 0xffffffffu;

// How one row is chosen from; as ops::sample writes it, eight words.
struct RowRequest {
    u64 uniform;  // the draw, in [0, 2^64)
    float temperature;
    float top_p;
    float penalty;
    u32 top_k;
    u32 first_seen, num_seen;  // its part of `seen`; none where nothing is penalised
};

// The distance of a score from the best one as the bits of a positive float: the larger, the less probable. At this one
// and beyond are tokens without a chance.
constexpr u32 HOPELESS = 0x7f800000u;

__device__ __forceinline__ u64 greater(u64 a, u64 b) { return a > b ? a : b; }

// Orders scores, and on ties the lowest token first. Never 0. Zeros of both signs are equal.
__device__ __forceinline__ u64 rank_of(float score, u32 token) {
    u32 bits = __float_as_uint(score);
    if (bits == 0x80000000u) bits = 0;
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return u64(bits) << 32 | u32(~token);
}
__device__ __forceinline__ u32 token_of(u64 rank) { return ~u32(rank); }

// The greatest `v` of the block, given to every thread; all threads must call it, once.
__device__ __forceinline__ u64 block_max(u64 v) {
    __shared__ u64 partial[WARPS];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v = greater(v, __shfl_xor_sync(ALL_LANES, v, offset));
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();  // partial[] is complete before anyone reads it
    v = partial[threadIdx.x % 32];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v = greater(v, __shfl_xor_sync(ALL_LANES, v, offset));
    return v;
}

__device__ __forceinline__ u64 warp_total(u64 v) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(ALL_LANES, v, offset);
    return v;
}

// Sum of `v` over the lanes up to this one.
__device__ __forceinline__ u64 sum_up_to(u64 v) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 offset = 1; offset < 32; offset *= 2) {
        const u64 below = __shfl_up_sync(ALL_LANES, v, offset);
        if (lane >= offset) v += below;
    }
    return v;
}

// Sum of `v` over the block, given to every thread; all threads must call it.
__device__ __forceinline__ u64 block_total(u64 v) {
    __shared__ u64 partial[WARPS];
    v = warp_total(v);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();  // partial[] is complete before anyone reads it
    v = warp_total(partial[threadIdx.x % 32]);
    __syncthreads();  // everyone has read partial[] before a next call overwrites it
    return v;
}

// Loads of one thread that are under way together.
constexpr u32 BATCH = 8;

// Rank of the best of the scores that this thread looks at; 0 where there are none. A comparison with what is not a
// number is false, so that it loses against minus infinity and everything else.
__device__ __forceinline__ u64 thread_best(const float* scores, u32 vocab_size) {
    if (threadIdx.x >= vocab_size) return 0;
    float best = minus_infinity();
    u32 token = threadIdx.x;
    for (u32 first = threadIdx.x; first < vocab_size; first += BATCH * THREADS) {
        float batch[BATCH];
#pragma unroll
        for (u32 j = 0; j < BATCH; ++j)
            batch[j] = first + j * THREADS < vocab_size ? scores[first + j * THREADS] : minus_infinity();
#pragma unroll
        for (u32 j = 0; j < BATCH; ++j)
            if (batch[j] > best) best = batch[j], token = first + j * THREADS;
    }
    return rank_of(best, token);
}

// As above, four scores at a time: for rows that begin at multiples of 16 bytes and have a multiple of four scores.
__device__ __forceinline__ u64 thread_best_of_fours(const float4* scores, u32 num_fours) {
    if (threadIdx.x >= num_fours) return 0;
    float best = minus_infinity();
    u32 token = 4 * threadIdx.x;
    for (u32 first = threadIdx.x; first < num_fours; first += BATCH * THREADS) {
        float4 batch[BATCH];
#pragma unroll
        for (u32 j = 0; j < BATCH; ++j) {
            const u32 i = first + j * THREADS;
            batch[j] = make_float4(minus_infinity(), minus_infinity(), minus_infinity(), minus_infinity());
            if (i < num_fours) batch[j] = scores[i];
        }
#pragma unroll
        for (u32 j = 0; j < BATCH; ++j) {
            const u32 i = 4 * (first + j * THREADS);
            if (batch[j].x > best) best = batch[j].x, token = i;
            if (batch[j].y > best) best = batch[j].y, token = i + 1;
            if (batch[j].z > best) best = batch[j].z, token = i + 2;
            if (batch[j].w > best) best = batch[j].w, token = i + 3;
        }
    }
    return rank_of(best, token);
}

// The best token of every row, the lowest on ties.
extern "C" __global__ __launch_bounds__(THREADS) void sample_greedy(const float* logits, u32 vocab_size, u32* tokens) {
    allow_next();
    wait_for_previous();
    const float* scores = logits + u64(blockIdx.x) * vocab_size;
    const u64 best = block_max(
        vocab_size % 4 == 0 ? thread_best_of_fours(reinterpret_cast<const float4*>(scores), vocab_size / 4)
                            : thread_best(scores, vocab_size));
    if (threadIdx.x == 0) tokens[blockIdx.x] = token_of(best);
}

// A row of logits with what was seen penalised, in memory of the row's own. Naming a token twice changes nothing: the
// new score comes from the logit.
__device__ __forceinline__ void penalise(
    const float* logits, u32 vocab_size, const u32* seen, const RowRequest& request, float* scores) {
    for (u32 i = threadIdx.x; i < vocab_size; i += THREADS) scores[i] = logits[i];
    __syncthreads();  // every score is there before some are replaced
    for (u32 i = threadIdx.x; i < request.num_seen; i += THREADS) {
        const u32 token = seen[request.first_seen + i];
        if (token >= vocab_size) continue;
        const float logit = logits[token];
        const float score = logit == logit ? logit : minus_infinity();
        scores[token] = score > 0.0f ? score / request.penalty : score * request.penalty;
    }
    __syncthreads();  // all are replaced before anyone reads them
}

// Distance of `score` from the best one. An infinite temperature makes all that have a chance equal.
__device__ __forceinline__ u32 distance_of(float score, float best, bool all_equal) {
    const u32 bits = __float_as_uint(score - best) & 0x7fffffffu;
    if (bits >= HOPELESS) return HOPELESS;
    return all_equal ? 0 : bits;
}

__device__ __forceinline__ u64 mass_of(u32 distance, double temperature, double unit) {
    return __double2ull_rn(exp(-double(__uint_as_float(distance)) / temperature) * unit);
}

// The largest K for which the tokens at distances below K measure less than `target`, and what they measure. The
// tokens together measure at least `target`, and that is not 0. All threads must call it.
//
// Three bits of K at a time, the highest first: among the tokens that have the bits chosen so far, those of each of the
// eight continuations are measured, and the one in which the target is reached is the next.
template <class Distance, class Measure>
__device__ __forceinline__ u32 crossing(u32 num, u64 target, Distance distance, Measure measure, u64& below) {
    __shared__ u64 partial[WARPS][8];
    __shared__ u64 chosen_below;
    __shared__ u32 chosen;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 prefix = 0;
    below = 0;
    for (int shift = 30; shift >= 0; shift -= 3) {
        u64 sums[8] = {};
        for (u32 i = threadIdx.x; i < num; i += THREADS) {
            const u32 d = distance(i);
            if (d >> shift >> 3 != prefix >> shift >> 3) continue;
            const u64 m = measure(i);
#pragma unroll
            for (u32 digit = 0; digit < 8; ++digit) sums[digit] += (d >> shift) % 8 == digit ? m : 0;
        }
        // Halves of the sums change hands until every four lanes share one: lanes 4 d to 4 d + 3 that of digit d.
#pragma unroll
        for (u32 half = 4; half > 0; half /= 2) {
            const bool upper = lane & (4 * half);
#pragma unroll
            for (u32 j = 0; j < half; ++j) {
                const u64 given = upper ? sums[j] : sums[j + half];
                const u64 kept = upper ? sums[j + half] : sums[j];
                sums[j] = kept + __shfl_xor_sync(ALL_LANES, given, 4 * half);
            }
        }
        u64 sum = sums[0];
        sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        if (lane % 4 == 0) partial[warp][lane / 4] = sum;
        __syncthreads();  // partial[] is complete before the first warp adds it up
        if (warp == 0) {
            sum = 0;
            for (u32 w = lane % 4; w < WARPS; w += 4) sum += partial[w][lane / 4];
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            u32 digit = 0;
            for (u32 next = 0; next < 7; ++next) {
                const u64 measured = __shfl_sync(ALL_LANES, sum, 4 * next);
                if (digit == next && below + measured < target) below += measured, digit = next + 1;
            }
            if (lane == 0) chosen = digit, chosen_below = below;
        }
        __syncthreads();  // the digit is chosen before anyone goes on, and partial[] is read before it is overwritten
        prefix |= chosen << shift;
        below = chosen_below;
    }
    return prefix;
}

// The token at which the masses kept, summed up in the order of the tokens, exceed `uniform` of their total. Kept are
// the tokens nearer than `last`, and the first `num_last` of those at `last`, each of mass `last_mass`. Every warp has
// a run of tokens. All threads must call it; one of them writes the token.
template <class Distance>
__device__ __forceinline__ void draw(
    u32 vocab_size, Distance distance, const u64* masses, u32 last, u64 num_last, u64 last_mass, u64 uniform,
    u32* chosen) {
    __shared__ u64 run_masses[WARPS];
    __shared__ u64 run_ties[WARPS];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 run = (vocab_size + THREADS - 1) / THREADS * 32;
    const u32 begin = min(warp * run, vocab_size), end = min(begin + run, vocab_size);
    u64 mass = 0, ties = 0;
    for (u32 i = begin + lane; i < end; i += 32) {
        const u32 d = distance(i);
        if (d < last) mass += masses[i];
        ties += d == last;
    }
    mass = warp_total(mass);
    ties = warp_total(ties);
    if (lane == 0) run_masses[warp] = mass, run_ties[warp] = ties;
    __syncthreads();  // all runs are summed up before anyone looks for the one
    // Lane by lane the runs, in every warp alike.
    ties = run_ties[lane];
    const u64 ties_before = sum_up_to(ties) - ties;
    const u64 ties_kept = ties_before < num_last ? min(ties, num_last - ties_before) : 0;
    mass = run_masses[lane] + ties_kept * last_mass;
    const u64 reached = sum_up_to(mass);
    const u64 total = __shfl_sync(ALL_LANES, reached, 31);
    const u64 wanted = __umul64hi(uniform, total);  // below the total, as `uniform` is below 2^64
    const u32 winner = __ffs(__ballot_sync(ALL_LANES, reached > wanted)) - 1;
    if (warp != winner) return;
    u64 sum = __shfl_sync(ALL_LANES, reached - mass, winner);
    u64 num_ties = __shfl_sync(ALL_LANES, ties_before, winner);
    for (u32 first = begin; first < end; first += 32) {
        const u32 i = first + lane;
        const u32 d = i < end ? distance(i) : HOPELESS;
        const u32 tied = __ballot_sync(ALL_LANES, i < end && d == last);
        const u64 ties_here = num_ties + __popc(tied & ((1u << lane) - 1));
        const bool kept = i < end && (d < last || (d == last && ties_here < num_last));
        const u64 up_to = sum + sum_up_to(kept ? masses[i] : 0);
        const u32 beyond = __ballot_sync(ALL_LANES, up_to > wanted);
        if (beyond != 0) {
            if (lane == 0) *chosen = first + __ffs(beyond) - 1;
            return;
        }
        sum = __shfl_sync(ALL_LANES, up_to, 31);
        num_ties += __popc(tied);
    }
}

// One token for every row, as its request asks.
extern "C" __global__ __launch_bounds__(THREADS) void sample_rows(
    const float* logits, u32 vocab_size, const RowRequest* requests, const u32* seen, u8* space, u64 space_bytes,
    double unit, u32* tokens) {
    allow_next();
    wait_for_previous();
    const RowRequest request = requests[blockIdx.x];
    const float* row = logits + u64(blockIdx.x) * vocab_size;
    u64* masses = reinterpret_cast<u64*>(space + blockIdx.x * space_bytes);
    u32* chosen = tokens + blockIdx.x;
    const float* scores = row;
    if (request.num_seen > 0) {
        float* penalised = reinterpret_cast<float*>(masses + vocab_size);
        penalise(row, vocab_size, seen, request, penalised);
        scores = penalised;
    }
    const u32 favourite = token_of(block_max(thread_best(scores, vocab_size)));
    const float best = scores[favourite];
    const bool all_equal = __float_as_uint(request.temperature) == HOPELESS;
    // Greedy; or no score can be compared with the best; or only the best is wanted. The same for all threads.
    const bool is_finite = (__float_as_uint(best) & 0x7fffffffu) < HOPELESS;
    if (!(request.temperature > 0.0f) || !is_finite || (request.top_p <= 0.0f && !all_equal)) {
        if (threadIdx.x == 0) *chosen = favourite;
        return;
    }
    const double temperature = request.temperature;
    const auto distance = [=](u32 i) { return distance_of(scores[i], best, all_equal); };

    // Distances up to this one are among the k best; ties with the k-th are.
    u32 limit = HOPELESS - 1;
    if (request.top_k > 0 && request.top_k < vocab_size) {
        u64 num_possible = 0;
        for (u32 i = threadIdx.x; i < vocab_size; i += THREADS) num_possible += distance(i) < HOPELESS;
        if (request.top_k < block_total(num_possible)) {
            u64 below;
            limit = crossing(vocab_size, request.top_k, distance, [](u32) { return u64(1); }, below);
        }
    }
    u64 mass = 0;
    for (u32 i = threadIdx.x; i < vocab_size; i += THREADS) {
        const u32 d = distance(i);
        const u64 own = d <= limit ? mass_of(d, temperature, unit) : 0;
        masses[i] = own;
        mass += own;
    }
    mass = block_total(mass);  // with it, all masses are there for everyone

    // Tokens before which the mass has not reached top_p: all nearer than `last`, and some of those at it.
    u32 last = ~0u;
    u64 num_last = 0, last_mass = 0;
    if (request.top_p < 1.0f) {
        // At least 1: the first token is always kept.
        const u64 target = max(u64(ceil(double(fmaxf(request.top_p, 0.0f)) * double(mass))), u64(1));
        u64 below;
        last = crossing(vocab_size, target, distance, [=](u32 i) { return masses[i]; }, below);
        last_mass = mass_of(last, temperature, unit);
        num_last = (target - below + last_mass - 1) / last_mass;
    }
    draw(vocab_size, distance, masses, last, num_last, last_mass, request.uniform, chosen);
}

struct TwoRequests {
    RowRequest request[2];
};

extern "C" __global__ void sample_echo(const __grid_constant__ TwoRequests requests, u64* fields) {
    auto put = [&](u64 field) { *fields++ = field; };
    for (u32 i = 0; i < 2; ++i) {
        const RowRequest& request = requests.request[i];
        put(request.uniform);
        put(__float_as_uint(request.temperature));
        put(__float_as_uint(request.top_p));
        put(__float_as_uint(request.penalty));
        put(request.top_k);
        put(request.first_seen);
        put(request.num_seen);
    }
}
