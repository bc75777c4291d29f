// Products with weights of two experts: what all of their kernels are told, which rows a tile has, and what is done
// with the sums. x [.., depth], a weight [width, depth], both row-major: sum[row, n] = Σ_k x[row, k] weight[n, k].
//
// Some operations pair sums: pair p of GATE_UP has the sums of gate[p] and up[p], pair p of QKV those of the two rows of
// the weight that RoPE rotates into each other. Kernels lay their tiles out so that one thread has both.
#pragma once
#include "common.cuh"

// What is done with the sums. Each is stored where the comment says, rounded where the trait's documentation says.
enum Finish : u32 {
    BIAS = 0,       // out[row, n] = sum (+ bias[n])
    BIAS_GELU = 1,  // out[row, n] = gelu(sum (+ bias[n]))
    RESIDUAL = 2,   // out[row, n] += sum
    GATE_UP = 3,    // out[row, p] = silu(first) * second
    QKV = 4,        // rotated q to out, rotated k and v to the paged cache
    LOGITS = 5,     // f32 out[row, n] = sum, rounded to the activation type
    PARTIAL = 6,    // f32 out[row, n] = sum: a part of a sum over several devices
};

__host__ __device__ constexpr bool is_paired(u32 finish) { return finish == GATE_UP || finish == QKV; }

constexpr u32 MAX_RANGES = 64;
constexpr u32 GROUP_ROWS = 8;  // tiles take rows in groups of this many; a group never crosses a range

// Rows [first, end) belong to expert 0 (language) or 1 (vision).
struct RowRange {
    u32 first, end, expert;
};

// Field by field as `ProductArguments` in cogvlm-cuda/src/product.rs.
struct Product {
    const void* x;
    const void* weight[2];  // per expert: gate or the only one
    const void* second[2];  // per expert: up
    void* out;
    const void* bias;  // [width] or null
    void* kv;          // QKV: [blocks][key, value][num_kv_heads][16][head_dim]
    const float* rope; // QKV: [positions][cosines, sines]
    const u32* positions;
    const u32* slots;
    u32 weight_type;
    u32 bias_type;
    u32 depth;
    u32 width;      // sums in a row: of pairs, where they are paired
    u32 out_width;  // elements in a row of out
    u32 num_heads;
    u32 num_kv_heads;
    u32 head_dim;
    u32 published;  // QKV: round the products of a rotation
    u32 num_ranges;
    u32 num_vision_tiles;  // tiles of vision rows come first
    u32 num_tiles_m;
    RowRange ranges[MAX_RANGES];
};

// Eight or fewer consecutive rows.
struct RowGroup {
    u32 first, count;
};

// Group `index` of an expert's rows; without rows past the last one.
__device__ __forceinline__ RowGroup row_group(const Product& a, u32 expert, u32 index) {
    for (u32 i = 0; i < a.num_ranges; ++i) {
        if (a.ranges[i].expert != expert) continue;
        const u32 rows = a.ranges[i].end - a.ranges[i].first;
        const u32 groups = (rows + GROUP_ROWS - 1) / GROUP_ROWS;
        if (index < groups) {
            const u32 start = index * GROUP_ROWS;
            return {a.ranges[i].first + start, min(GROUP_ROWS, rows - start)};
        }
        index -= groups;
    }
    return {0, 0};
}

// Rows of the weight that pair `p` has, and which weight the second one is of.
template <u32 FINISH> __device__ __forceinline__ u32 first_weight_row(const Product& a, u32 p) {
    if (FINISH != QKV) return p;
    const u32 half = a.head_dim / 2;
    return p / half * a.head_dim + p % half;
}
template <u32 FINISH> __device__ __forceinline__ u32 second_weight_row(const Product& a, u32 p) {
    return FINISH == QKV ? first_weight_row<QKV>(a, p) + a.head_dim / 2 : p;
}
template <u32 FINISH> __device__ __forceinline__ const void* second_weight(const Product& a, u32 expert) {
    return FINISH == QKV ? a.weight[expert] : a.second[expert];
}

// x/2 (1 + erf(x / sqrt 2)): exact to a few units for T = float. For bf16, 1 - erf is 2 to a polynomial that was fitted
// on [0, 5]: within 2e-5, relatively, a hundredth of what rounding to bf16 leaves, with one special function instead of
// erff's many instructions.
template <class T> __device__ __forceinline__ float gelu(float x);
template <> __device__ __forceinline__ float gelu<float>(float x) {
    return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
}
template <> __device__ __forceinline__ float gelu<bf16>(float x) {
    const float z = fminf(fabsf(x), 7.0f);
    float p = 1.574098872e-06f;
    p = fmaf(p, z, -5.586871339e-05f);
    p = fmaf(p, z, 8.811639149e-04f);
    p = fmaf(p, z, -8.297532797e-03f);
    p = fmaf(p, z, 5.350140970e-02f);
    p = fmaf(p, z, 4.589368701e-01f);
    p = fmaf(p, z, 1.151075699e+00f);
    float tail;  // 1 - erf(z / sqrt 2)
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(tail) : "f"(-p * z));
    if (fabsf(x) > 7.0f) tail = 0.0f;  // below 3e-12
    return 0.5f * x * (x < 0.0f ? tail : 2.0f - tail);
}

// x / (1 + e^-x); exact to a few units for T = float, near enough to round to the same bf16 nearly always otherwise.
template <class T> __device__ __forceinline__ float silu(float x);
template <> __device__ __forceinline__ float silu<float>(float x) { return x / (1.0f + expf(-x)); }
template <> __device__ __forceinline__ float silu<bf16>(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

// A sum that is not paired, in place of out's element `before`.
template <class T, u32 FINISH> __device__ __forceinline__ float finished(float sum, float bias, float before) {
    if (FINISH == BIAS) return rounded<T>(sum + bias);
    if (FINISH == BIAS_GELU) return rounded<T>(gelu<T>(rounded<T>(sum + bias)));
    if (FINISH == RESIDUAL) return rounded<T>(before + rounded<T>(sum));
    return rounded<T>(sum);
}

template <class T> __device__ __forceinline__ float gated(float gate, float up) {
    return rounded<T>(rounded<T>(silu<T>(rounded<T>(gate))) * rounded<T>(up));
}

// A pair of RoPE's: first and second element, rotated and rounded.
template <class T>
__device__ __forceinline__ float2 rotated(float first, float second, float cosine, float sine, bool published) {
    first = rounded<T>(first);
    second = rounded<T>(second);
    // Not contracted: the difference of two products is what the other backends compute.
    float a = __fmul_rn(first, cosine), b = __fmul_rn(second, sine);
    float c = __fmul_rn(first, sine), d = __fmul_rn(second, cosine);
    if (published) a = rounded<T>(a), b = rounded<T>(b), c = rounded<T>(c), d = rounded<T>(d);
    return make_float2(rounded<T>(__fsub_rn(a, b)), rounded<T>(__fadd_rn(c, d)));
}

// Where head `head` of a row's [q | k | v] goes; `rotates` is false for values.
template <class T>
__device__ __forceinline__ T* head_address(const Product& a, u32 row, u32 head, bool& rotates) {
    constexpr u32 BLOCK_LEN = 16;
    rotates = head < a.num_heads + a.num_kv_heads;
    if (head < a.num_heads) return static_cast<T*>(a.out) + u64(row) * a.out_width + head * a.head_dim;
    const u32 slot = a.slots[row];
    // Keys of all heads, then values of all heads.
    const u64 block = u64(slot / BLOCK_LEN) * 2 * a.num_kv_heads + (head - a.num_heads);
    return static_cast<T*>(a.kv) + (block * BLOCK_LEN + slot % BLOCK_LEN) * a.head_dim;
}

// Stores one sum, or one pair of sums.
template <class T, u32 FINISH>
__device__ __forceinline__ void store_one(const Product& a, u32 row, u32 n, float first, float second) {
    if (FINISH == QKV) {
        const u32 half = a.head_dim / 2, head = n / half, j = n % half;
        bool rotates;
        T* to = head_address<T>(a, row, head, rotates);
        float2 pair = make_float2(rounded<T>(first), rounded<T>(second));
        if (rotates) {
            const float* angles = a.rope + u64(a.positions[row]) * a.head_dim;
            pair = rotated<T>(first, second, angles[j], angles[half + j], a.published != 0);
        }
        to[j] = from_float<T>(pair.x);
        to[half + j] = from_float<T>(pair.y);
        return;
    }
    const u64 at = u64(row) * a.out_width + n;
    if (FINISH == LOGITS) {
        static_cast<float*>(a.out)[at] = rounded<T>(first);
        return;
    }
    if (FINISH == PARTIAL) {
        static_cast<float*>(a.out)[at] = first;
        return;
    }
    T* out = static_cast<T*>(a.out) + at;
    if (FINISH == GATE_UP) {
        *out = from_float<T>(gated<T>(first, second));
        return;
    }
    const float bias = (FINISH == BIAS || FINISH == BIAS_GELU) && a.bias ? load_element(a.bias, a.bias_type, n) : 0.0f;
    const float before = FINISH == RESIDUAL ? to_float(*out) : 0.0f;
    *out = from_float<T>(finished<T, FINISH>(first, bias, before));
}
