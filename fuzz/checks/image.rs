//! Pictures: within the limits, and as many pixels as their size says.

use cogvlm_input::image::{DecodeLimits, decode_image_within, preprocess};

/// Panics where the code under test is wrong.
pub(crate) fn check(bytes: &[u8]) {
    let limits = DecodeLimits { max_file_bytes: 1 << 20, max_side_px: 512, max_alloc_bytes: 4 << 20 };
    let Ok(image) = decode_image_within(bytes, &limits) else { return };
    assert!(image.width().max(image.height()) <= limits.max_side_px as usize);
    let pixels = preprocess(&image, 14);
    assert_eq!(pixels.len(), 3 * 14 * 14);
    assert!(pixels.iter().all(|value| value.is_finite()));
}
