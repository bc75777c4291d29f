//! `out = weight * x / sqrt(mean(x²) + eps)`

use cogvlm_backend::BackendError;

use crate::backend::CpuBackend;
use crate::buffer::CpuBuffer;
use crate::element::Element;
use crate::shape::{expect_buffer, expect_weight};
use crate::simd::{math, vectorised};
use crate::tiles;
use crate::weight::CpuWeight;

/// Rows that one thread takes at a time.
const ROWS: usize = 16;

pub(crate) fn rms_norm<T: Element>(
    cpu: &CpuBackend, x: &CpuBuffer, weight: &CpuWeight, eps: f32, rows: usize, out: &mut CpuBuffer,
) -> Result<(), BackendError> {
    norm_rows::<T>("rms_norm", cpu, x, weight, eps, rows, |row| row, out)
}

/// `out[i] = norm(x[source(i)])` for the first `rows` rows of `out`; sources lie within `x`.
#[expect(clippy::too_many_arguments, reason = "the operation's own arguments, and which rows")]
pub(super) fn norm_rows<T: Element>(
    op: &'static str, cpu: &CpuBackend, x: &CpuBuffer, weight: &CpuWeight, eps: f32, rows: usize,
    source: impl Fn(usize) -> usize + Sync, out: &mut CpuBuffer,
) -> Result<(), BackendError> {
    let width = x.columns();
    expect_buffer(op, "x", x, rows, width)?;
    expect_buffer(op, "out", out, rows, width)?;
    expect_weight(op, "weight", weight, &[width])?;
    if width == 0 {
        return Ok(());
    }
    let (x, weight) = (x.view::<T>(op, "x")?, &weight.to_f32());
    let out = out.view_mut::<T>(op, "out")?;
    tiles::for_each(&cpu.threads, out, width, &tiles::row_blocks(0..rows, ROWS, 1), width, |mut tile| {
        for row in tile.rows() {
            let x = &x[source(row) * width..][..width];
            let out = tile.row(row);
            vectorised!(cpu.isa, {
                let mean_square = math::sum(x, |value| value.get() * value.get()) / width as f32;
                let scale = 1.0 / (mean_square + eps).sqrt();
                for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
                    *out = T::of(weight * (x.get() * scale));
                }
            });
        }
    });
    Ok(())
}
