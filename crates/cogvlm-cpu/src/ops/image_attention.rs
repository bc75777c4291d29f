//! Full softmax attention inside each image.

use cogvlm_backend::{BackendError, HeadGeometry};

use crate::attend::{Attend, QUERY_ROWS};
use crate::backend::CpuBackend;
use crate::buffer::CpuBuffer;
use crate::element::Element;
use crate::shape::expect_images;
use crate::{scratch, tiles};

pub(crate) fn image_attention<T: Element>(
    cpu: &CpuBackend, qkv: &CpuBuffer, num_images: usize, num_tokens: usize, heads: HeadGeometry, out: &mut CpuBuffer,
) -> Result<(), BackendError> {
    const OP: &str = "image_attention";
    let HeadGeometry { num_heads, head_dim, .. } = heads;
    expect_images(OP, qkv.shape(), num_images.saturating_mul(num_tokens), heads, out.shape())?;
    let width = num_heads * head_dim;
    let qkv = qkv.view::<T>(OP, "qkv")?;
    let out = out.view_mut::<T>(OP, "out")?;
    let images = (0..num_images).map(|image| image * num_tokens..(image + 1) * num_tokens);
    let row_blocks: Vec<_> = images.flat_map(|rows| tiles::row_blocks(rows, QUERY_ROWS, 12)).collect();
    tiles::for_each(&cpu.threads, out, width, &row_blocks, head_dim, |mut tile| {
        let (rows, columns) = (tile.rows(), tile.columns());
        let first_token = rows.start / num_tokens * num_tokens;
        let part =
            |token: usize, part: usize| &qkv[((first_token + token) * 3 + part) * width + columns.start..][..head_dim];
        let attend = Attend {
            queries: &qkv[rows.start * 3 * width + columns.start..],
            query_stride: 3 * width,
            num_queries: rows.len(),
            head_dim,
            first_visible: num_tokens,
            num_keys: num_tokens,
            key: |token| part(token, 1),
            value: |token| part(token, 2),
        };
        scratch::with(|scratch| {
            attend.run(cpu.isa, scratch, |query, result| {
                let out = tile.row(rows.start + query);
                out.iter_mut().zip(result).for_each(|(to, from)| *to = T::of(*from));
            });
        });
    });
    Ok(())
}
