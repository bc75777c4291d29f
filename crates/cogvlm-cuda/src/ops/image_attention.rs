//! Full softmax attention inside each image.

use cogvlm_backend::shape::expect_images;
use cogvlm_backend::{BackendError, HeadGeometry};
use cogvlm_core::DType;

use super::attention::{PLAIN_WARPS, counters, expect_plain_head, scales};
use super::rows;
use crate::backend::{CudaBackend, KernelPath};
use crate::buffer::CudaBuffer;
use crate::device::{Launch, arg};

/// As `ImageShape` in kernels/image_attention.cu: threads, rows of queries, keys that a thread block takes at a time.
const THREADS: u32 = 256;
const QUERY_ROWS: usize = 128;
const PAIR_KEYS: usize = 64;

pub(crate) fn image_attention(
    cuda: &CudaBackend, qkv: &CudaBuffer, num_images: usize, num_tokens: usize, heads: HeadGeometry,
    out: &mut CudaBuffer,
) -> Result<(), BackendError> {
    const OP: &str = "image_attention";
    let HeadGeometry { num_heads, head_dim, .. } = heads;
    let num_rows = num_images.saturating_mul(num_tokens);
    expect_images(OP, qkv.shape(), num_rows, heads, out.shape())?;
    let width = num_heads * head_dim;
    qkv.expect_dtype(OP, "qkv", cuda.activations)?;
    out.expect_dtype(OP, "out", cuda.activations)?;
    if num_rows == 0 || width == 0 {
        return Ok(());
    }
    let (input, output) = (qkv.address(), out.address());
    let (tokens, head_count, columns) = (num_tokens as u32, num_heads as u32, head_dim as u32);
    let (scale, scale_log2) = scales(head_dim);
    let fast = match head_dim {
        64 => Some("image_attention_bf16_64"),
        112 => Some("image_attention_bf16_112"),
        128 => Some("image_attention_bf16_128"),
        _ => None,
    };
    if let Some(kernel) = fast
        && cuda.activations == DType::Bf16
        && cuda.path >= KernelPath::Portable
    {
        let (parts, room) = rows::scratch(cuda);
        let (counters, num_counters) = counters(cuda);
        let num_tiles = num_tokens.div_ceil(QUERY_ROWS) * num_heads * num_images;
        let num_multiprocessors = cuda.gpu.info.num_multiprocessors as usize;
        let part_bytes = (head_dim / 8 + 1) * THREADS as usize * 16;
        let (num_whole, num_parts) =
            sharing(num_tiles, num_tokens, num_multiprocessors.min(num_counters), room / part_bytes);
        let grid = (num_whole + (num_tiles - num_whole) * num_parts) as u32;
        let (whole, sharers) = (num_whole as u32, num_parts as u32);
        // As FlashShape in kernels/include/flash.cuh: queries, and eight tiles of 32 keys or values.
        let shared = ((QUERY_ROWS + 8 * 32) * head_dim * 2) as u32;
        let mut arguments = [
            arg(&input),
            arg(&output),
            arg(&parts),
            arg(&counters),
            arg(&tokens),
            arg(&head_count),
            arg(&whole),
            arg(&sharers),
            arg(&scale_log2),
        ];
        let launch = Launch { shared, ..Launch::blocks(grid, THREADS) };
        // SAFETY: arguments, threads and shared memory are those of `image_attention_bf16_*` of this head width. It
        // reads and writes rows that were checked above, 16 bytes at a time: buffers start at multiples of 256 bytes,
        // and heads are a multiple of 16 bytes wide. `sharing` saw to it that what it leaves in scratch memory fits.
        return unsafe { cuda.gpu.launch("image_attention", kernel, launch, &mut arguments) };
    }
    expect_plain_head(OP, head_dim)?;
    let kernel = if cuda.activations == DType::F32 { "image_attention_f32" } else { "image_attention_bf16" };
    let grid = [(num_tokens * num_heads).div_ceil(PLAIN_WARPS as usize) as u32, num_images as u32, 1];
    let launch = Launch { grid, ..Launch::blocks(0, 32 * PLAIN_WARPS) };
    let mut arguments = [arg(&input), arg(&output), arg(&tokens), arg(&head_count), arg(&columns), arg(&scale)];
    // SAFETY: arguments and threads are those of `image_attention_f32` and `image_attention_bf16`; they read and write
    // rows that were checked above. Heads fit MAX_HEAD_DIM.
    unsafe { cuda.gpu.launch("image_attention", kernel, launch, &mut arguments) }
}

/// How many of `num_tiles` tiles of queries are whole, and among how many thread blocks the keys of each other one are
/// shared. Thread blocks take a multiprocessor each; those that would be alone in a last round share it.
fn sharing(num_tiles: usize, num_tokens: usize, num_multiprocessors: usize, most_parts: usize) -> (usize, usize) {
    let num_shared = num_tiles % num_multiprocessors;
    if num_shared == 0 {
        return (num_tiles, 1);
    }
    // Fewer than two pairs of tiles of keys are not worth putting together.
    let worthwhile = num_tokens.div_ceil(PAIR_KEYS) / 2;
    let num_parts = (num_multiprocessors / num_shared).min(worthwhile).min(most_parts / num_shared);
    if num_parts < 2 { (num_tiles, 1) } else { (num_tiles - num_shared, num_parts) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_round_is_shared() {
        assert_eq!(sharing(160, 1226, 132, 1000), (132, 4), "an image of 16 heads: one round and a quarter");
        assert_eq!(sharing(264, 1226, 132, 1000), (264, 1), "whole rounds");
        assert_eq!(sharing(160, 1226, 132, 60), (132, 2), "no more than fit");
        assert_eq!(sharing(160, 1226, 132, 50), (160, 1), "none fit");
        assert_eq!(sharing(3, 257, 132, 1000), (0, 2), "few keys are shared by few");
        assert_eq!(sharing(2, 65, 132, 1000), (2, 1), "and fewer by none");
        assert_eq!(sharing(3, 1226, 2, 1000), (2, 2), "a round and a half");
    }
}
