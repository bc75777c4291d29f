// Products (include/product.cuh) of 1 to 16 rows, all of one expert: decode. They run at the rate at which weights come
// from memory: every weight is read once and used for all rows by the matrix units.
// x, weights bf16, depth a multiple of 8; sums in f32, in an order that depends on depth alone
//
// The warps of a block share the depth, 64 elements each and round, and their sums are added up in order at the end of a
// tile. A warp copies what it needs of a round, weights and x, into a slot of a ring of its own: it waits for nobody but
// its copies, and always has the next rounds on their way, across the ends of tiles. (Loads into registers would do the
// same if the compiler let them: it gives all of them one scoreboard, and whoever waits for one waits for all.) Of a
// round, a row of 128 bytes has its 16-byte chunks exchanged by the low bits of its number, so that ldmatrix meets no
// bank twice. Paired sums: of 16 weight rows the first 8 are firsts, the others their seconds.
//
// Two blocks stay on each multiprocessor, if it has the memory, and take tile after tile. What does not fill a tile for
// each of them is shared among all, so that none has more than one row more than another: else the last ones would run
// alone, at a part of the rate. As blocks end, those of the next kernel start in their places and copy their first
// weights while this one ends (`wait_for_previous`), one round after the other: more at a time would fill the queues of
// the memory, and what stands between two products, a norm or a sum over devices, would wait behind them.
//
// Up to 8 rows: tiles of 16 weight rows. Up to 16 rows, x is as much to copy as a tile of 16, so wide products have
// tiles of 32; those of the model's width have too few rows for that.
//
// A device's part of a product is also told to those that compute the layer with it, sum by sum (include/exchange.cuh).
//
// launch   grid = min(tiles, blocks that fit), block = 256, shared = `stages` slots of all warps, and their sums
// wrapper  cogvlm-cuda ops::product_rows
// oracle   oracle::{expert_linear, linear, gate_up, qkv_rope_append}
#include "include/exchange.cuh"
#include "include/mma.cuh"
#include "include/product.cuh"

constexpr u32 WARPS = 8;
constexpr u32 ROUND = 64;  // elements of depth that a warp takes at a time
constexpr u32 ROW_BYTES = ROUND * 2;

// Weights, as often as they are used: once. Lines of 128 bytes come in pairs, of two warps.
__device__ __forceinline__ void copy_weights(u32 to, const bf16* from, bool is_there) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_there ? 16u : 0u)
                 : "memory");
}

// The oldest of `stages` groups is there; 4 at most.
__device__ __forceinline__ void wait_for_oldest(u32 stages) {
    if (stages == 4) wait_for_copies_but<3>();
    if (stages == 3) wait_for_copies_but<2>();
    if (stages == 2) wait_for_copies_but<1>();
    if (stages == 1) wait_for_copies_but<0>();
}

// One round after the other where this runs while the kernel in front does.
__device__ __forceinline__ void pace_copies() {
#if __CUDA_ARCH__ >= 900
    wait_for_copies();
#endif
}

// Tiles of 16 WEIGHT_TILES weight rows by 8 ROW_TILES rows of x; STAGES, or any number up to 4 if that is 0.
template <u32 FINISH, u32 WEIGHT_TILES, u32 ROW_TILES, u32 STAGES, class Others>
__device__ __forceinline__ void product_staged(const Product& a, u32 num_stages, const Others& others) {
    const u32 stages = STAGES != 0 ? STAGES : num_stages;
    constexpr u32 UNROLLED = STAGES != 0 ? STAGES : 1;
    constexpr bool PAIRED = is_paired(FINISH);
    constexpr u32 STRIDE = WARPS * ROUND;
    constexpr u32 PER_TILE = (PAIRED ? 8 : 16) * WEIGHT_TILES;
    constexpr u32 WEIGHT_BYTES = WEIGHT_TILES * 16 * ROW_BYTES, SLOT_BYTES = WEIGHT_BYTES + ROW_TILES * 8 * ROW_BYTES;
    extern __shared__ __align__(128) u8 shared[];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 expert = a.ranges[0].expert, first_row = a.ranges[0].first, num_rows = a.ranges[0].end - first_row;
    const u32 rounds = (a.depth + STRIDE - 1) / STRIDE;
    allow_next();

    // Whole tiles, as many of them for every block; the rest in equal shares, of a tile at most.
    const u32 wave = gridDim.x * PER_TILE, whole = a.width / wave * wave, rest = a.width - whole;
    const u32 share = whole + u64(blockIdx.x) * rest / gridDim.x;
    const u32 share_end = whole + u64(blockIdx.x + 1) * rest / gridDim.x;
    const u32 first_tile = whole != 0 ? blockIdx.x * PER_TILE : share;
    auto is_tile = [&](u32 tile) { return tile < whole || tile < share_end; };
    auto end_of = [&](u32 tile) { return tile < whole ? whole : share_end; };
    auto after = [&](u32 tile) { return tile >= whole ? share_end : tile + wave < whole ? tile + wave : share; };

    // What is copied next: a round of a tile. Eight lanes copy a row; this one copies chunk `chunk` of every fourth.
    const u32 chunk = lane % 8, first_copied = lane / 8;
    const u32 ring = shared_address(shared) + warp * stages * SLOT_BYTES;
    u32 next_tile = first_tile, next_round = 0, rows_there = 0;
    const bf16* rows[WEIGHT_TILES][4];
    auto take_rows = [&]() {
        rows_there = 0;
#pragma unroll
        for (u32 m = 0; m < WEIGHT_TILES; ++m)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const u32 row = first_copied + 4 * i;
                const u32 n = next_tile + (PAIRED ? m * 8 + row % 8 : m * 16 + row), clamped = min(n, a.width - 1);
                const bool is_second = PAIRED && i >= 2;
                const void* weight = is_second ? second_weight<FINISH>(a, expert) : a.weight[expert];
                const u32 weight_row =
                    is_second ? second_weight_row<FINISH>(a, clamped) : first_weight_row<FINISH>(a, clamped);
                rows[m][i] = static_cast<const bf16*>(weight) + u64(weight_row) * a.depth;
                rows_there |= u32(n < end_of(next_tile)) << (m * 4 + i);
            }
    };
    auto depth_of = [&](u32 round) { return round * STRIDE + warp * ROUND + chunk * 8; };
    auto place = [&](u32 row) { return row * ROW_BYTES + (chunk ^ row % 8) * 16; };
    // Rows that are not there leave their places as they are: what they give is stored nowhere. Depth that is not there
    // is zero.
    auto copy_next_weights = [&](u32 slot) {
        if (!is_tile(next_tile)) return;
        const u32 k = depth_of(next_round), to = ring + slot * SLOT_BYTES;
        const bool is_there = k < a.depth;
#pragma unroll
        for (u32 m = 0; m < WEIGHT_TILES; ++m)
#pragma unroll
            for (u32 i = 0; i < 4; ++i)
                if (rows_there >> (m * 4 + i) & 1)
                    copy_weights(to + place(m * 16 + first_copied + 4 * i), rows[m][i] + (is_there ? k : 0), is_there);
    };
    auto copy_x = [&](u32 slot, u32 round) {
        const u32 k = depth_of(round), to = ring + slot * SLOT_BYTES + WEIGHT_BYTES;
        const bool is_there = k < a.depth;
        const bf16* x = static_cast<const bf16*>(a.x) + u64(first_row + first_copied) * a.depth + (is_there ? k : 0);
#pragma unroll
        for (u32 i = 0; i < 2 * ROW_TILES; ++i)
            if (first_copied + 4 * i < num_rows)
                copy_async(to + place(first_copied + 4 * i), x + u64(4 * i) * a.depth, is_there);
    };
    auto advance = [&]() {
        if (++next_round < rounds) return;
        next_round = 0;
        next_tile = after(next_tile);
        if (is_tile(next_tile)) take_rows();
    };
    take_rows();
#pragma unroll UNROLLED
    for (u32 slot = 0; slot < stages; ++slot) {
        pace_copies();
        copy_next_weights(slot);
        commit_copies();
        advance();
    }

    wait_for_previous();
    const u32 exchange = others.number();
#pragma unroll UNROLLED
    for (u32 slot = 0, round = 0; slot < stages; ++slot) {
        copy_x(slot, round);
        commit_copies();
        round = round + 1 == rounds ? 0 : round + 1;
    }

    // What this lane says where it is when matrices are loaded: of weights 16 rows of two chunks, of x 8 rows of four.
    const u32 weight_place = lane % 16 * ROW_BYTES, x_place = WEIGHT_BYTES + lane % 8 * ROW_BYTES, flip = lane % 8;
    float (*partial)[WEIGHT_TILES * ROW_TILES * 4][32] =
        reinterpret_cast<float (*)[WEIGHT_TILES * ROW_TILES * 4][32]>(shared + WARPS * stages * SLOT_BYTES);
    u32 slot = 0;
    for (u32 tile = first_tile; is_tile(tile); tile = after(tile)) {
        float sums[WEIGHT_TILES][ROW_TILES][4] = {};
        for (u32 round = 0; round < rounds; ++round) {
            wait_for_oldest(stages);
            __syncwarp();  // what the other lanes copied is there, too
            const u32 at = ring + slot * SLOT_BYTES;
            u32 w[WEIGHT_TILES][4][4], x[ROW_TILES][2][4];
#pragma unroll
            for (u32 m = 0; m < WEIGHT_TILES; ++m)
#pragma unroll
                for (u32 k = 0; k < 4; ++k)
                    load_matrices(w[m][k], at + m * 16 * ROW_BYTES + weight_place + ((2 * k + lane / 16) ^ flip) * 16);
#pragma unroll
            for (u32 r = 0; r < ROW_TILES; ++r)
#pragma unroll
                for (u32 half = 0; half < 2; ++half)
                    load_matrices(x[r][half], at + r * 8 * ROW_BYTES + x_place + ((4 * half + lane / 8) ^ flip) * 16);
            __syncwarp();  // all lanes have read the slot
            copy_next_weights(slot);
            if (is_tile(next_tile)) copy_x(slot, next_round);
            commit_copies();
            advance();
            slot = slot + 1 == stages ? 0 : slot + 1;
#pragma unroll
            for (u32 k = 0; k < 4; ++k)
#pragma unroll
                for (u32 m = 0; m < WEIGHT_TILES; ++m)
#pragma unroll
                    for (u32 r = 0; r < ROW_TILES; ++r)
                        multiply(sums[m][r], w[m][k], x[r][k / 2][k % 2 * 2], x[r][k / 2][k % 2 * 2 + 1]);
        }
#pragma unroll
        for (u32 m = 0; m < WEIGHT_TILES; ++m)
#pragma unroll
            for (u32 r = 0; r < ROW_TILES; ++r)
#pragma unroll
                for (u32 c = 0; c < 4; ++c) partial[warp][(m * ROW_TILES + r) * 4 + c][lane] = sums[m][r][c];
        __syncthreads();  // the sums of all warps are there
        // Lane l has of 16 weight rows l / 4 (c = 0, 1) and l / 4 + 8 (2, 3), and of 8 rows 2 (l % 4) and the next.
        auto total = [&](u32 weight_row, u32 row) {
            const u32 c = weight_row % 16 / 8 * 2 + row % 2, from = weight_row % 8 * 4 + row % 8 / 2;
            const u32 entry = (weight_row / 16 * ROW_TILES + row / 8) * 4 + c;
            float sum = 0.0f;
#pragma unroll
            for (u32 v = 0; v < WARPS; ++v) sum += partial[v][entry][from];
            return sum;
        };
        for (u32 i = threadIdx.x; i < num_rows * PER_TILE; i += WARPS * 32) {
            const u32 row = i / PER_TILE, within = i % PER_TILE, n = tile + within;
            if (n >= end_of(tile)) continue;
            const u32 weight_row = PAIRED ? within / 8 * 16 + within % 8 : within;
            const float first = total(weight_row, row), second = PAIRED ? total(weight_row + 8, row) : 0.0f;
            store_one<bf16, FINISH>(a, first_row + row, n, first, second);
            others.tell(u64(first_row + row) * a.out_width + n, first, exchange);
        }
        __syncthreads();  // they were read
    }
    wait_for_copies();  // of rounds that nobody takes, where a block has fewer than stages
}

// With the stages that Hopper's shared memory has room for it is 1 to 2 % faster when the compiler knows them.
template <u32 FINISH, u32 WEIGHT_TILES, u32 ROW_TILES, class Others>
__device__ __forceinline__ void product(const Product& a, u32 stages, const Others& others) {
    constexpr u32 MOST = WEIGHT_TILES == 2 ? 2 : ROW_TILES == 2 ? 3 : 4;
    if (stages == MOST)
        product_staged<FINISH, WEIGHT_TILES, ROW_TILES, MOST>(a, stages, others);
    else
        product_staged<FINISH, WEIGHT_TILES, ROW_TILES, 0>(a, stages, others);
}

#define PRODUCT(NAME, FINISH, WEIGHT_TILES, ROW_TILES)                                                            \
    extern "C" __global__ __launch_bounds__(WARPS * 32, 2) void product_rows_##NAME(                              \
        const __grid_constant__ Product a, u32 stages) {                                                          \
        product<FINISH, WEIGHT_TILES, ROW_TILES>(a, stages, NoPush());                                            \
    }
// The number is the most rows of x.
PRODUCT(bias_8, BIAS, 1, 1)
PRODUCT(bias_16, BIAS, 1, 2)
PRODUCT(residual_8, RESIDUAL, 1, 1)
PRODUCT(residual_16, RESIDUAL, 1, 2)
PRODUCT(gate_up_8, GATE_UP, 1, 1)
PRODUCT(gate_up_16, GATE_UP, 2, 2)
PRODUCT(qkv_8, QKV, 1, 1)
PRODUCT(qkv_16, QKV, 2, 2)
PRODUCT(logits_8, LOGITS, 1, 1)
PRODUCT(logits_16, LOGITS, 2, 2)

// A member's part of a product, told to the others.
extern "C" __global__ __launch_bounds__(WARPS * 32, 2) void product_rows_partial_8(
    const __grid_constant__ Product a, u32 stages, const __grid_constant__ Push others) {
    product<PARTIAL, 1, 1>(a, stages, others);
}
extern "C" __global__ __launch_bounds__(WARPS * 32, 2) void product_rows_partial_16(
    const __grid_constant__ Product a, u32 stages, const __grid_constant__ Push others) {
    product<PARTIAL, 1, 2>(a, stages, others);
}
