//! A weight as rows of a buffer.

use cogvlm_backend::BackendError;

use crate::backend::CpuBackend;
use crate::buffer::CpuBuffer;
use crate::element::Element;
use crate::shape::expect;
use crate::weight::CpuWeight;

pub(crate) fn copy_weight_rows<T: Element>(
    _: &CpuBackend, weight: &CpuWeight, destination: &mut CpuBuffer, first_row: usize,
) -> Result<(), BackendError> {
    const OP: &str = "copy_weight_rows";
    let (rows, width) = (destination.rows(), destination.columns());
    let space = rows.saturating_sub(first_row) * width;
    let fits = first_row <= rows && weight.shape().last() == Some(&width) && weight.len() <= space;
    expect(OP, "weight", weight.shape(), fits, || {
        format!("[.., {width}] in at most {} rows", rows.saturating_sub(first_row))
    })?;
    if width == 0 {
        return Ok(());
    }
    let destination = &mut destination.view_mut::<T>(OP, "destination")?[first_row * width..][..weight.len()];
    destination.chunks_exact_mut(width).enumerate().for_each(|(index, row)| weight.round_row(index, row));
    Ok(())
}
