//! Files of six formats to pixels, as Pillow's `convert("RGB")` gives them.

use std::io::Cursor;
use std::path::Path;

use image::codecs::{bmp, png, tiff, webp};
use image::{DynamicImage, ImageDecoder, ImageFormat, Limits};

use super::error::{DecodeError, Format, ImageError};
use super::{Rgb8Image, convert, gif, jpeg};
use crate::bounded_file::{self, ReadError};

/// What a picture may cost before it is refused. Small files can ask for a lot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeLimits {
    /// Longest file that is read.
    pub max_file_bytes: u64,
    /// Longest side in pixels.
    pub max_side_px: u32,
    /// Most memory that the decoded pixels may take, in all the forms in which they exist at once.
    pub max_alloc_bytes: u64,
}

impl Default for DecodeLimits {
    /// 256 MiB of file, 16,384 pixels a side, 512 MiB of pixels.
    fn default() -> Self {
        Self { max_file_bytes: 256 << 20, max_side_px: 16_384, max_alloc_bytes: 512 << 20 }
    }
}

/// The picture in a file, within [`DecodeLimits::default`]. See [`decode_image`].
///
/// # Errors
/// A file that cannot be read or decoded.
pub fn load_image(path: &Path) -> Result<Rgb8Image, ImageError> {
    load_image_within(path, &DecodeLimits::default())
}

/// As [`load_image`], within `limits`.
///
/// # Errors
/// As [`load_image`].
pub fn load_image_within(path: &Path, limits: &DecodeLimits) -> Result<Rgb8Image, ImageError> {
    let file = || path.to_owned();
    let bytes = bounded_file::read(path, limits.max_file_bytes).map_err(|error| match error {
        ReadError::Io(source) => ImageError::Read { file: file(), source },
        ReadError::TooLong => ImageError::TooLong { file: file(), limit_bytes: limits.max_file_bytes },
    })?;
    decode_image_within(&bytes, limits).map_err(|problem| ImageError::Decode { file: file(), problem })
}

/// The picture in `bytes`, within [`DecodeLimits::default`]: PNG, JPEG, WebP, GIF, BMP or TIFF, told by its content; of
/// several pictures the first.
///
/// The pixels are those of Pillow's `convert("RGB")`: alpha is dropped and not blended, grey is replicated, palettes are
/// looked up, 16-bit samples lose their low byte, the orientation in EXIF is ignored. JPEG decoders differ from one
/// another by up to four levels of 255, CMYK TIFF and 16-bit BMP by one. One thing is done otherwise: 16-bit grey keeps its high byte like everything else,
/// where Pillow cuts all values above 255 off, which leaves a nearly white picture.
///
/// # Errors
/// Anything that is not a whole picture: a file that was cut short is never half grey. (A JPEG whose end marker was put
/// back after the cut cannot be told from a whole one.) Float samples, and palettes and grey with alpha in TIFF, are
/// refused.
pub fn decode_image(bytes: &[u8]) -> Result<Rgb8Image, DecodeError> {
    decode_image_within(bytes, &DecodeLimits::default())
}

/// As [`decode_image`], within `limits`.
///
/// # Errors
/// As [`decode_image`].
pub fn decode_image_within(bytes: &[u8], limits: &DecodeLimits) -> Result<Rgb8Image, DecodeError> {
    let data = Cursor::new(bytes);
    match image::guess_format(bytes) {
        Ok(ImageFormat::Png) => decode(png::PngDecoder::with_limits(data, limits.of_library()), Format::Png, limits),
        Ok(ImageFormat::Jpeg) => jpeg::decode(bytes, limits),
        Ok(ImageFormat::WebP) => decode(webp::WebPDecoder::new(data), Format::WebP, limits),
        Ok(ImageFormat::Gif) => gif::decode(bytes, limits),
        Ok(ImageFormat::Bmp) => decode(bmp::BmpDecoder::new(data), Format::Bmp, limits),
        Ok(ImageFormat::Tiff) => decode(tiff::TiffDecoder::new(data), Format::Tiff, limits),
        _ => Err(DecodeError::UnknownFormat),
    }
}

impl DecodeLimits {
    /// # Errors
    /// A picture of `width` x `height` whose decoding takes `needed_bytes` exceeds these limits, or is empty.
    pub(super) fn check(&self, width: u32, height: u32, needed_bytes: u64) -> Result<(), DecodeError> {
        if width == 0 || height == 0 {
            return Err(DecodeError::Empty { width, height });
        }
        if width.max(height) > self.max_side_px {
            return Err(DecodeError::TooLarge { width, height, limit_px: self.max_side_px });
        }
        if needed_bytes > self.max_alloc_bytes {
            let limit_bytes = self.max_alloc_bytes;
            return Err(DecodeError::TooMuchMemory { width, height, needed_bytes, limit_bytes });
        }
        Ok(())
    }

    /// For what the library allocates besides the pixels.
    fn of_library(&self) -> Limits {
        let mut limits = Limits::default();
        limits.max_alloc = Some(self.max_alloc_bytes);
        limits
    }
}

fn decode<D: ImageDecoder>(
    opened: image::ImageResult<D>, format: Format, limits: &DecodeLimits,
) -> Result<Rgb8Image, DecodeError> {
    let problem = |error| match error {
        image::ImageError::Unsupported(error) => DecodeError::Unsupported { format, feature: error.to_string() },
        image::ImageError::Limits(_) => DecodeError::TooMuchBesides { format, limit_bytes: limits.max_alloc_bytes },
        error => DecodeError::Damaged { format, source: error.into() },
    };
    let mut decoder = opened.map_err(problem)?;
    let (width, height) = decoder.dimensions();
    let rgb_bytes = u64::from(width) * u64::from(height) * 3;
    limits.check(width, height, decoder.total_bytes().saturating_add(rgb_bytes))?;
    decoder.set_limits(limits.of_library()).map_err(problem)?;
    let image = DynamicImage::from_decoder(decoder).map_err(problem)?;
    convert::to_rgb8(image, format)
}
