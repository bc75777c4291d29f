//! Pixels of any type to 8-bit RGB, by Pillow's rules.

use image::DynamicImage;

use super::Rgb8Image;
use super::error::{DecodeError, Format};

/// # Errors
/// Float samples, whose range is unknown.
pub(super) fn to_rgb8(image: DynamicImage, format: Format) -> Result<Rgb8Image, DecodeError> {
    let (width, height) = (image.width() as usize, image.height() as usize);
    let pixels = match image {
        DynamicImage::ImageRgb8(image) => image.into_raw(),
        DynamicImage::ImageRgba8(image) => colour::<4, _>(&image, |sample| sample),
        DynamicImage::ImageLuma8(image) => grey::<1, _>(&image, |sample| sample),
        DynamicImage::ImageLumaA8(image) => grey::<2, _>(&image, |sample| sample),
        DynamicImage::ImageRgb16(image) => colour::<3, _>(&image, high_byte),
        DynamicImage::ImageRgba16(image) => colour::<4, _>(&image, high_byte),
        DynamicImage::ImageLuma16(image) => grey::<1, _>(&image, high_byte),
        DynamicImage::ImageLumaA16(image) => grey::<2, _>(&image, high_byte),
        other => {
            let feature = format!("samples of type {:?}", other.color());
            return Err(DecodeError::Unsupported { format, feature });
        }
    };
    Ok(Rgb8Image::new(width, height, pixels).expect("the decoder gave every pixel of a picture that is not empty"))
}

/// Pillow cuts; rounding would differ by one level for half of all values.
fn high_byte(sample: u16) -> u8 {
    (sample >> 8) as u8
}

/// Drops what comes after the third of `CHANNELS` samples.
fn colour<const CHANNELS: usize, T: Copy>(samples: &[T], to_u8: impl Fn(T) -> u8) -> Vec<u8> {
    let (pixels, _) = samples.as_chunks::<CHANNELS>();
    pixels.iter().flat_map(|pixel| [to_u8(pixel[0]), to_u8(pixel[1]), to_u8(pixel[2])]).collect()
}

/// Repeats the first of `CHANNELS` samples three times.
fn grey<const CHANNELS: usize, T: Copy>(samples: &[T], to_u8: impl Fn(T) -> u8) -> Vec<u8> {
    let (pixels, _) = samples.as_chunks::<CHANNELS>();
    pixels.iter().flat_map(|pixel| [to_u8(pixel[0]); 3]).collect()
}
