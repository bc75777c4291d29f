//! `residual += layer_norm(branch)`

use cogvlm_backend::BackendError;

use super::layer_norm::normalise;
use crate::backend::CpuBackend;
use crate::buffer::CpuBuffer;
use crate::element::Element;
use crate::shape::{expect_buffer, expect_weight};
use crate::simd::vectorised;
use crate::tiles;
use crate::weight::CpuWeight;

/// Rows that one thread takes at a time.
const ROWS: usize = 16;

pub(crate) fn layer_norm_residual<T: Element>(
    cpu: &CpuBackend, branch: &CpuBuffer, weight: &CpuWeight, bias: &CpuWeight, eps: f32, rows: usize,
    residual: &mut CpuBuffer,
) -> Result<(), BackendError> {
    const OP: &str = "layer_norm_residual";
    let width = branch.columns();
    expect_buffer(OP, "branch", branch, rows, width)?;
    expect_buffer(OP, "residual", residual, rows, width)?;
    expect_weight(OP, "weight", weight, &[width])?;
    expect_weight(OP, "bias", bias, &[width])?;
    if width == 0 {
        return Ok(());
    }
    let [weight, bias] = &[weight, bias].map(CpuWeight::to_f32);
    let branch = branch.view::<T>(OP, "branch")?;
    let residual = residual.view_mut::<T>(OP, "residual")?;
    tiles::for_each(&cpu.threads, residual, width, &tiles::row_blocks(0..rows, ROWS, 1), width, |mut tile| {
        for row in tile.rows() {
            let (branch, residual) = (&branch[row * width..][..width], tile.row(row));
            vectorised!(cpu.isa, {
                normalise(branch, weight, bias, eps, residual, |residual, normed| {
                    *residual = T::of(residual.get() + T::round(normed));
                });
            });
        }
    });
    Ok(())
}
