// y[image, 0] = class + position[0];   y[image, 1 + p] = W patch_p + bias + position[1 + p]
//                                                        Dosovitskiy et al. 2020, arXiv:2010.11929; docs/model.md
// pixels   T [num_images, num_channels, image_size, image_size], T float or bf16; patches row by row, each read as
//          [num_channels, patch_size, patch_size];   y  T [num_images * (patches + 1), width]
// W        [width, num_channels * patch_size^2], bias, class [width], position [patches + 1, width]: any type, rounded
//          to T
// rounding products summed in f32 with the bias, rounded; the sum with the position rounded
// launch   patch_embed_{f32,bf16}: any shape, grid = (ceil(tokens / TILE), ceil(width / TILE)), block = 256
//          patch_embed_bf16_mma: bf16 throughout, image_size and patch_size even, at least one patch, u32 offsets;
//          grid = (ceil(num_images * patches / TILE), ceil(width / TILE)), block = 128, shared = 2 bytes per element of
//          a patch
//          patch_embed_echo: one thread writes what it finds in each field of `Weights` and `Images`, for a test
// wrapper  cogvlm-cuda ops::patch_embed     oracle oracle::patch_embed
#include "include/mma.cuh"

// Rows and columns of y per block.
constexpr u32 TILE = 64;

struct Weights {
    const void* projection;
    const void* bias;
    const void* class_token;
    const void* position;
    u32 projection_type, bias_type, class_type, position_type;
};

struct Images {
    u32 num_images, num_channels, image_size, patch_size;
};

// Elements of a row that are loaded at a time.
constexpr u32 PLAIN_DEPTH = 16;

template <class T>
__device__ void patch_embed_plain(const T* pixels, const Weights& weights, const Images& images, T* y, u32 width) {
    // One row of each per element of the depth; one float more than needed, so that columns lie in different banks.
    __shared__ float patch_tile[PLAIN_DEPTH][TILE + 1];
    __shared__ float weight_tile[PLAIN_DEPTH][TILE + 1];
    allow_next();
    wait_for_previous();
    const u32 patch_size = images.patch_size, size = images.image_size;
    const u32 side = size / patch_size;
    const u64 num_tokens = u64(side) * side + 1;
    const u64 num_rows = images.num_images * num_tokens;
    const u32 depth = images.num_channels * patch_size * patch_size;
    const u64 first_row = u64(blockIdx.x) * TILE;
    const u32 first_column = blockIdx.y * TILE;
    const u32 x = threadIdx.x % 16, row = threadIdx.x / 16;

    float sums[4][4] = {};
    for (u32 begin = 0; begin < depth; begin += PLAIN_DEPTH) {
        const u32 element = begin + x;
        const u32 line = element / patch_size;
        const u64 offset = (u64(line / patch_size) * size + line % patch_size) * size + element % patch_size;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u64 t = first_row + row + 16 * i;
            const u64 token = t % num_tokens;
            float pixel = 0.0f;
            if (t < num_rows && token > 0 && element < depth) {
                const u64 patch = token - 1;
                const u64 image = t / num_tokens * images.num_channels * size * size;
                pixel = to_float(pixels[image + (patch / side * size + patch % side) * patch_size + offset]);
            }
            patch_tile[x][row + 16 * i] = pixel;
            const u32 column = first_column + row + 16 * i;
            float weight = 0.0f;
            if (column < width && element < depth)
                weight = rounded<T>(
                    load_element(weights.projection, weights.projection_type, u64(column) * depth + element));
            weight_tile[x][row + 16 * i] = weight;
        }
        __syncthreads();  // both tiles are complete before anyone reads them
#pragma unroll
        for (u32 k = 0; k < PLAIN_DEPTH; ++k) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
#pragma unroll
                for (u32 j = 0; j < 4; ++j)
                    sums[i][j] = fmaf(patch_tile[k][row + 16 * i], weight_tile[k][x + 16 * j], sums[i][j]);
            }
        }
        __syncthreads();  // everyone has read the tiles before they are overwritten
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const u64 t = first_row + row + 16 * i;
        if (t >= num_rows) continue;
        const u64 token = t % num_tokens;
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            const u32 column = first_column + x + 16 * j;
            if (column >= width) continue;
            const float embedding =
                token == 0 ? load_element(weights.class_token, weights.class_type, column)
                           : sums[i][j] + rounded<T>(load_element(weights.bias, weights.bias_type, column));
            const float position = load_element(weights.position, weights.position_type, token * width + column);
            y[t * width + column] = from_float<T>(rounded<T>(embedding) + rounded<T>(position));
        }
    }
}

extern "C" __global__ __launch_bounds__(256) void patch_embed_f32(
    const float* pixels, const __grid_constant__ Weights weights, const __grid_constant__ Images images, float* y,
    u32 width) {
    patch_embed_plain(pixels, weights, images, y, width);
}
extern "C" __global__ __launch_bounds__(256) void patch_embed_bf16(
    const bf16* pixels, const __grid_constant__ Weights weights, const __grid_constant__ Images images, bf16* y,
    u32 width) {
    patch_embed_plain(pixels, weights, images, y, width);
}

// Pairs of elements of a row that are loaded at a time, and the words that a row of them takes in shared memory: 80
// bytes, so that the eight rows of a matrix lie in different banks.
constexpr u32 PAIRS = 16;
constexpr u32 PITCH = PAIRS + 4;

extern "C" __global__ __launch_bounds__(128) void patch_embed_bf16_mma(
    const bf16* pixels, const bf16* projection, const bf16* bias, const bf16* class_token, const bf16* position,
    const __grid_constant__ Images images, bf16* y, u32 width) {
    // Where in an image the pairs of elements of its first patch lie.
    extern __shared__ u32 offsets[];
    __shared__ __align__(16) u32 patch_tile[2][TILE * PITCH];
    __shared__ __align__(16) u32 weight_tile[2][TILE * PITCH];
    allow_next();
    const u32 patch_size = images.patch_size, size = images.image_size;
    const u32 side = size / patch_size, num_patches = side * side;
    const u32 num_rows = images.num_images * num_patches;
    const u32 num_pairs = images.num_channels * patch_size * patch_size / 2;
    const u32 first_row = blockIdx.x * TILE, first_column = blockIdx.y * TILE;
    for (u32 i = threadIdx.x; i < num_pairs; i += 128) {
        const u32 line = 2 * i / patch_size;
        offsets[i] = (line / patch_size * size + line % patch_size) * size + 2 * i % patch_size;
    }
    __syncthreads();  // offsets[] is complete before anyone reads it
    wait_for_previous();

    if (blockIdx.x == 0) {
        for (u32 i = threadIdx.x; i < images.num_images * TILE; i += 128) {
            const u32 column = first_column + i % TILE;
            if (column < width)
                y[u64(i / TILE) * (num_patches + 1) * width + column] =
                    to_bf16(to_float(class_token[column]) + to_float(position[column]));
        }
    }

    // This thread loads pair `pair` of every step, of rows `row + 8 i` of both tiles. Rows beyond the last are the last
    // once more; nothing is stored for them.
    const u32 pair = threadIdx.x % PAIRS, row = threadIdx.x / PAIRS;
    u32 patch_begin[8], weight_begin[8];
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
        const u32 t = min(first_row + row + 8 * i, num_rows - 1);
        const u32 patch = t % num_patches;
        patch_begin[i] = t / num_patches * (images.num_channels * size * size) +
                         (patch / side * size + patch % side) * patch_size;
        weight_begin[i] = min(first_column + row + 8 * i, width - 1) * num_pairs;
    }
    const u32* weight_pairs = reinterpret_cast<const u32*>(projection);
    u32 next_patch[8], next_weight[8];
    // Beyond the depth both are zero: what else lies there may be infinite.
    auto fetch = [&](u32 step) {
        const u32 k = step * PAIRS + pair;
        const bool there = k < num_pairs;
        const u32 offset = there ? offsets[k] : 0;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            next_patch[i] = there ? *reinterpret_cast<const u32*>(pixels + patch_begin[i] + offset) : 0;
            next_weight[i] = there ? weight_pairs[weight_begin[i] + k] : 0;
        }
    };
    auto put = [&](u32 buffer) {
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            patch_tile[buffer][(row + 8 * i) * PITCH + pair] = next_patch[i];
            weight_tile[buffer][(row + 8 * i) * PITCH + pair] = next_weight[i];
        }
    };

    // Four warps, each 32 rows by 32 columns of the tile.
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
    float sums[2][4][4] = {};
    const u32 num_steps = (num_pairs + PAIRS - 1) / PAIRS;
    fetch(0);
    put(0);
    __syncthreads();  // the first tiles are complete before anyone reads them
    for (u32 step = 0; step < num_steps; ++step) {
        if (step + 1 < num_steps) fetch(step + 1);
#pragma unroll
        for (u32 half = 0; half < PAIRS / 8; ++half) {
            u32 a[2][4], b[2][4];
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                const u32 a_row = warp_row + 16 * i + lane % 16;
                load_matrices(a[i], shared_address(&patch_tile[step % 2][a_row * PITCH + 8 * half + lane / 16 * 4]));
                const u32 b_row = warp_column + 16 * i + lane % 8 + lane / 16 * 8;
                load_matrices(b[i], shared_address(&weight_tile[step % 2][b_row * PITCH + 8 * half + lane / 8 % 2 * 4]));
            }
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
#pragma unroll
                for (u32 j = 0; j < 4; ++j)
                    multiply(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
            }
        }
        if (step + 1 < num_steps) put((step + 1) % 2);
        __syncthreads();  // the next tiles are complete, and everyone has read these before they are overwritten
    }

#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 t = first_row + warp_row + 16 * i + 8 * half + lane / 4;
            if (t >= num_rows) continue;
            const u32 token = t % num_patches + 1;
            bf16* out = y + (u64(t / num_patches) * (num_patches + 1) + token) * width;
            const bf16* here = position + u64(token) * width;
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                const u32 column = first_column + warp_column + 8 * j + lane % 4 * 2;
                float v[2];
#pragma unroll
                for (u32 e = 0; e < 2; ++e) {
                    const u32 c = min(column + e, width - 1);
                    v[e] = rounded<bf16>(sums[i][j][2 * half + e] + to_float(bias[c])) + to_float(here[c]);
                }
                // Columns are even: with an even width pairs are aligned, and there are both or none.
                if (width % 2 == 0) {
                    if (column < width) *reinterpret_cast<u32*>(out + column) = pack_bf16(v[0], v[1]);
                } else {
                    if (column < width) out[column] = to_bf16(v[0]);
                    if (column + 1 < width) out[column + 1] = to_bf16(v[1]);
                }
            }
        }
    }
}

extern "C" __global__ void patch_embed_echo(
    const __grid_constant__ Weights weights, const __grid_constant__ Images images, u64* fields) {
    auto put = [&](u64 field) { *fields++ = field; };
    auto put_address = [&](const void* field) { put(reinterpret_cast<u64>(field)); };
    put_address(weights.projection);
    put_address(weights.bias);
    put_address(weights.class_token);
    put_address(weights.position);
    put(weights.projection_type);
    put(weights.bias_type);
    put(weights.class_type);
    put(weights.position_type);
    put(images.num_images);
    put(images.num_channels);
    put(images.image_size);
    put(images.patch_size);
}
