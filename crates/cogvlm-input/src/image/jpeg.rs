//! JPEG, whole or not at all.

use zune_jpeg::JpegDecoder;
use zune_jpeg::errors::DecodeErrors;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::Rgb8Image;
use super::decode::DecodeLimits;
use super::error::{DecodeError, Format};

/// # Errors
/// As [`decode_image`](super::decode_image).
pub(super) fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<Rgb8Image, DecodeError> {
    // Strict mode refuses most broken data, but not data that end in the last row of blocks.
    let num_scans = count_scans(bytes).ok_or_else(|| damaged("it has no end marker"))?;
    let options = DecoderOptions::default()
        .set_strict_mode(true)
        .set_max_width(usize::from(u16::MAX))
        .set_max_height(usize::from(u16::MAX))
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(problem)?;
    let info = decoder.info().expect("the headers are decoded");
    // With several scans, as in a progressive file, 16-bit coefficients of all components wait for the last one.
    let coefficient_bytes = if num_scans > 1 { 2 * u64::from(info.components) } else { 0 };
    let num_pixels = u64::from(info.width) * u64::from(info.height);
    limits.check(info.width.into(), info.height.into(), num_pixels * (3 + coefficient_bytes))?;
    let pixels = decoder.decode().map_err(problem)?;
    let image = Rgb8Image::new(info.width.into(), info.height.into(), pixels);
    image.ok_or_else(|| damaged("it has another number of pixels than it says"))
}

/// Number of scans up to the end marker; `None` if the file ends before it. Whether the scans hold what they should is
/// for the decoder to say.
fn count_scans(file: &[u8]) -> Option<usize> {
    const START_OF_SCAN: u8 = 0xDA;
    const END_OF_IMAGE: u8 = 0xD9;
    let mut num_scans = 0;
    let mut rest = file;
    loop {
        // Inside a scan, 0xFF is a stuffed byte (00) or a restart marker (D0 to D7) if it is no marker of a segment.
        // FF is padding before a marker, and the start marker (D8) is no segment either.
        let is_marker = |pair: &[u8]| pair[0] == 0xFF && !matches!(pair[1], 0x00 | 0x01 | 0xD0..=0xD8 | 0xFF);
        let at = rest.windows(2).position(is_marker)?;
        match rest[at + 1] {
            END_OF_IMAGE => return Some(num_scans),
            START_OF_SCAN => num_scans += 1,
            _ => {}
        }
        let segment = &rest[at + 2..];
        let length = segment.first_chunk().map(|&length| u16::from_be_bytes(length))?;
        rest = segment.get(usize::from(length)..)?;
    }
}

fn problem(error: DecodeErrors) -> DecodeError {
    match error {
        DecodeErrors::Unsupported(scheme) => {
            DecodeError::Unsupported { format: Format::Jpeg, feature: format!("{scheme:?}") }
        }
        error => damaged(error),
    }
}

fn damaged(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> DecodeError {
    DecodeError::Damaged { format: Format::Jpeg, source: source.into() }
}
