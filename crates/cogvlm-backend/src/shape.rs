//! Refusals of arguments that do not fit together, in the same words for every backend.

use std::ops::Range;

use cogvlm_core::DType;
use cogvlm_core::tokens::ExpertRange;

use crate::{BackendError, HeadGeometry, PatchGeometry, PatchWeights};

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

/// Bytes of a buffer of activations for `what`.
///
/// # Errors
/// [`BackendError::Unsupported`] for f16, and where the bytes exceed an address.
pub fn buffer_bytes(what: &str, dtype: DType, [rows, columns]: [usize; 2]) -> Result<usize, BackendError> {
    if dtype == DType::F16 {
        return Err(unsupported("alloc", format!("{what} cannot be f16: activations are f32 or bf16")));
    }
    let num_bytes = rows.checked_mul(columns).and_then(|count| count.checked_mul(dtype.size_bytes()));
    num_bytes.ok_or_else(|| unsupported("alloc", format!("{what} of [{rows}, {columns}] is too large")))
}

/// Refuses `num_values` that are not whole rows of a buffer of shape `buffer`, or more than it has from `first_row` on.
///
/// # Errors
/// [`BackendError::Shape`]
pub fn expect_values(
    op: &'static str, num_values: usize, [rows, columns]: [usize; 2], first_row: usize,
) -> Result<(), BackendError> {
    let room = rows.saturating_sub(first_row);
    let fits = num_values <= room * columns && (num_values == 0 || num_values.is_multiple_of(columns.max(1)));
    expect(op, "values", &[num_values], fits, || {
        format!("whole rows of {columns}, at most {room} of them from row {first_row}")
    })
}

/// Refuses rows that a buffer of `num_rows` does not have.
///
/// # Errors
/// [`BackendError::Shape`]
pub fn expect_span(op: &'static str, rows: &Range<usize>, num_rows: usize) -> Result<(), BackendError> {
    let fits = rows.start <= rows.end && rows.end <= num_rows;
    expect(op, "rows", &[rows.start, rows.end], fits, || format!("a range within {num_rows} rows"))
}

/// Refuses rows of `dtype` and `shape` that do not fit into a buffer of `buffer_dtype` and shape `buffer` from
/// `first_row` on.
///
/// # Errors
/// [`BackendError::Unsupported`] for another type, [`BackendError::Shape`]
pub fn expect_fit(
    op: &'static str, (dtype, shape): (DType, [usize; 2]), (buffer_dtype, buffer): (DType, [usize; 2]),
    first_row: usize,
) -> Result<(), BackendError> {
    if dtype != buffer_dtype {
        return Err(unsupported(op, format!("rows of {dtype} cannot go into a buffer of {buffer_dtype}")));
    }
    let [rows, columns] = buffer;
    let fits = shape[1] == columns && first_row <= rows && shape[0] <= rows - first_row;
    expect(op, "rows", &shape, fits, || {
        format!("at most [{}, {columns}] from row {first_row}", rows.saturating_sub(first_row))
    })
}

/// Refuses arguments of a patch embedding that do not fit `geometry`: shapes of pixels and result, and of projection,
/// bias, class token and position embedding. Gives the tokens of an image.
///
/// # Errors
/// [`BackendError::Shape`]
pub fn expect_patches(
    op: &'static str, geometry: PatchGeometry, pixels: [usize; 2], weights: &PatchWeights<'_, &[usize]>,
    out: [usize; 2],
) -> Result<usize, BackendError> {
    let PatchGeometry { num_images, num_channels, image_size, patch_size } = geometry;
    let fits = patch_size > 0 && image_size.is_multiple_of(patch_size);
    expect(op, "geometry", &[image_size, patch_size], fits, || "images of whole patches".to_owned())?;
    let (width, side) = (out[1], image_size / patch_size);
    let pixels_per_image = image_size.saturating_mul(image_size).saturating_mul(num_channels);
    expect_rows(op, "pixels", pixels, [num_images, pixels_per_image])?;
    let num_tokens = side.saturating_mul(side).saturating_add(1);
    expect_rows(op, "out", out, [num_images.saturating_mul(num_tokens), width])?;
    expect_shape(op, "projection", weights.projection, &[width, num_channels, patch_size, patch_size])?;
    expect_shape(op, "bias", weights.bias, &[width])?;
    expect_shape(op, "class", weights.class, &[1, width])?;
    expect_shape(op, "position", weights.position, &[num_tokens, width])?;
    Ok(num_tokens)
}

/// Refuses arguments of an image attention that do not fit together.
///
/// # Errors
/// [`BackendError::Shape`]
pub fn expect_images(
    op: &'static str, qkv: [usize; 2], num_rows: usize, heads: HeadGeometry, out: [usize; 2],
) -> Result<(), BackendError> {
    let HeadGeometry { num_heads, num_kv_heads, head_dim } = heads;
    expect_heads(op, heads)?;
    expect(op, "heads", &[num_heads, num_kv_heads], num_heads == num_kv_heads, || {
        "as many key as query heads".to_owned()
    })?;
    let width = num_heads.saturating_mul(head_dim);
    expect_rows(op, "qkv", qkv, [num_rows, width.saturating_mul(3)])?;
    expect_rows(op, "out", out, [num_rows, width])
}
