//! Pictures: file to 8-bit RGB, and 8-bit RGB to what the vision tower reads.

mod convert;
mod decode;
mod error;
mod gif;
mod jpeg;
mod preprocess;
mod resize;

pub use decode::{DecodeLimits, decode_image, decode_image_within, load_image, load_image_within};
pub use error::{DecodeError, Format, ImageError};
pub use preprocess::preprocess;

/// A picture: rows from the top, three bytes (red, green, blue) a pixel, at least one pixel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rgb8Image {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

impl Rgb8Image {
    /// `pixels`: `[height, width, 3]`. `None` if that is not their number, or if there are none.
    pub fn new(width: usize, height: usize, pixels: Vec<u8>) -> Option<Self> {
        let expected = width.checked_mul(height)?.checked_mul(3)?;
        (expected > 0 && pixels.len() == expected).then_some(Self { width, height, pixels })
    }

    /// In pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// In pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// `[height, width, 3]`.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }
}
