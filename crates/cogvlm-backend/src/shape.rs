//! Refusals of arguments that do not fit together, in the same words for every backend.

use cogvlm_core::tokens::ExpertRange;

use crate::{BackendError, HeadGeometry};

/// Refuses `argument` of shape `found` unless it `fits`.
///
/// # Errors
/// [`BackendError::Shape`] where it does not.
pub fn expect(
    op: &'static str, argument: &'static str, found: &[usize], fits: bool, expected: impl FnOnce() -> String,
) -> Result<(), BackendError> {
    if fits {
        return Ok(());
    }
    Err(BackendError::Shape { op, argument, found: found.to_vec(), expected: expected() })
}

/// Refuses a buffer of shape `[rows, columns]` that has fewer rows or other columns than `at_least`.
///
/// # Errors
/// [`BackendError::Shape`]
pub fn expect_rows(
    op: &'static str, argument: &'static str, found: [usize; 2], at_least: [usize; 2],
) -> Result<(), BackendError> {
    let [rows, columns] = at_least;
    let fits = found[0] >= rows && found[1] == columns;
    expect(op, argument, &found, fits, || format!("[at least {rows}, {columns}]"))
}

/// Refuses a weight of another shape than `expected`.
///
/// # Errors
/// [`BackendError::Shape`]
pub fn expect_shape(
    op: &'static str, argument: &'static str, found: &[usize], expected: &[usize],
) -> Result<(), BackendError> {
    expect(op, argument, found, found == expected, || format!("{expected:?}"))
}

/// Refuses ranges that are not ascending, or reach beyond `rows`.
///
/// # Errors
/// [`BackendError::Shape`]
pub fn expect_ranges(op: &'static str, ranges: &[ExpertRange], rows: usize) -> Result<(), BackendError> {
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
///
/// # Errors
/// [`BackendError::Shape`]
pub fn expect_heads(op: &'static str, heads: HeadGeometry) -> Result<(), BackendError> {
    let HeadGeometry { num_heads, num_kv_heads, head_dim } = heads;
    let fits = num_kv_heads > 0 && num_heads.is_multiple_of(num_kv_heads) && head_dim > 0 && head_dim.is_multiple_of(2);
    expect(op, "heads", &[num_heads, num_kv_heads, head_dim], fits, || {
        "query heads that are a multiple of the key/value heads, of even width".to_owned()
    })
}

/// A [`BackendError::Unsupported`].
pub fn unsupported(op: &'static str, reason: impl Into<String>) -> BackendError {
    BackendError::Unsupported { op, reason: reason.into() }
}
