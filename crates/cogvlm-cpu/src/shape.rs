//! Refusals of arguments that do not fit together.

use cogvlm_backend::BackendError;
pub(crate) use cogvlm_backend::shape::{
    buffer_bytes, expect, expect_fit, expect_heads, expect_images, expect_patches, expect_ranges, expect_span,
    expect_values, unsupported,
};
use cogvlm_backend::shape::{expect_rows, expect_shape};

use crate::buffer::CpuBuffer;
use crate::weight::CpuWeight;

/// Refuses a buffer that has fewer than `rows` rows or other than `columns` columns.
pub(crate) fn expect_buffer(
    op: &'static str, argument: &'static str, buffer: &CpuBuffer, rows: usize, columns: usize,
) -> Result<(), BackendError> {
    expect_rows(op, argument, buffer.shape(), [rows, columns])
}

/// Refuses a weight of another shape than `shape`.
pub(crate) fn expect_weight(
    op: &'static str, argument: &'static str, weight: &CpuWeight, shape: &[usize],
) -> Result<(), BackendError> {
    expect_shape(op, argument, weight.shape(), shape)
}
