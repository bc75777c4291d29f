//! `x = gelu(layer_norm(x))`

use cogvlm_backend::BackendError;

use super::layer_norm::normalise;
use crate::backend::CpuBackend;
use crate::buffer::CpuBuffer;
use crate::element::Element;
use crate::shape::{expect_buffer, expect_weight};
use crate::simd::{math, vectorised};
use crate::tiles;
use crate::weight::CpuWeight;

/// Rows that one thread takes at a time.
const ROWS: usize = 16;

pub(crate) fn layer_norm_gelu<T: Element>(
    cpu: &CpuBackend, x: &mut CpuBuffer, weight: &CpuWeight, bias: &CpuWeight, eps: f32, rows: usize,
) -> Result<(), BackendError> {
    const OP: &str = "layer_norm_gelu";
    let width = x.columns();
    expect_buffer(OP, "x", x, rows, width)?;
    expect_weight(OP, "weight", weight, &[width])?;
    expect_weight(OP, "bias", bias, &[width])?;
    if width == 0 {
        return Ok(());
    }
    let [weight, bias] = &[weight, bias].map(CpuWeight::to_f32);
    let x = x.view_mut::<T>(OP, "x")?;
    tiles::for_each(&cpu.threads, x, width, &tiles::row_blocks(0..rows, ROWS, 1), width, |mut tile| {
        let mut before = vec![T::of(0.0); width];
        for row in tile.rows() {
            let x = tile.row(row);
            before.copy_from_slice(x);
            vectorised!(cpu.isa, {
                normalise(&before, weight, bias, eps, x, |x, normed| *x = T::of(math::gelu(T::round(normed))));
            });
        }
    });
    Ok(())
}
