//! Refusals of arguments that do not fit together.

use cogvlm_backend::{BackendError, HeadGeometry};
use cogvlm_core::tokens::ExpertRange;

use crate::buffer::CpuBuffer;
use crate::weight::CpuWeight;

/// Refuses `argument` of shape `found` unless it `fits`.
pub(crate) fn expect(
    op: &'static str, argument: &'static str, found: &[usize], fits: bool, expected: impl FnOnce() -> String,
) -> Result<(), BackendError> {
    if fits {
        return Ok(());
    }
    Err(BackendError::Shape { op, argument, found: found.to_vec(), expected: expected() })
}

/// Refuses a buffer that has fewer than `rows` rows or other than `columns` columns.
pub(crate) fn expect_buffer(
    op: &'static str, argument: &'static str, buffer: &CpuBuffer, rows: usize, columns: usize,
) -> Result<(), BackendError> {
    let fits = buffer.rows() >= rows && buffer.columns() == columns;
    expect(op, argument, &buffer.shape(), fits, || format!("[at least {rows}, {columns}]"))
}

/// Refuses a weight of another shape than `shape`.
pub(crate) fn expect_weight(
    op: &'static str, argument: &'static str, weight: &CpuWeight, shape: &[usize],
) -> Result<(), BackendError> {
    expect(op, argument, weight.shape(), weight.shape() == shape, || format!("{shape:?}"))
}

/// Refuses ranges that are not ascending, or reach beyond `rows`.
pub(crate) fn expect_ranges(op: &'static str, ranges: &[ExpertRange], rows: usize) -> Result<(), BackendError> {
    let mut end = 0;
    for range in ranges {
        let fits = end <= range.rows.start && range.rows.start <= range.rows.end && range.rows.end <= rows;
        expect(op, "ranges", &[range.rows.start, range.rows.end], fits, || {
            format!("ascending rows within {end}..{rows}")
        })?;
        end = range.rows.end;
    }
    Ok(())
}

/// Refuses head counts that do not divide, and odd or empty heads.
pub(crate) fn expect_heads(op: &'static str, heads: HeadGeometry) -> Result<(), BackendError> {
    let HeadGeometry { num_heads, num_kv_heads, head_dim } = heads;
    let fits = num_kv_heads > 0 && num_heads.is_multiple_of(num_kv_heads) && head_dim > 0 && head_dim.is_multiple_of(2);
    expect(op, "heads", &[num_heads, num_kv_heads, head_dim], fits, || {
        "query heads that are a multiple of the key/value heads, of even width".to_owned()
    })
}

/// An [`BackendError::Unsupported`].
pub(crate) fn unsupported(op: &'static str, reason: impl Into<String>) -> BackendError {
    BackendError::Unsupported { op, reason: reason.into() }
}
