//! GIF, first frame. Not through the `image` crate, which leaves the screen around a smaller frame black.

use ::gif::{ColorOutput, DecodeOptions, MemoryLimit};

use super::Rgb8Image;
use super::decode::DecodeLimits;
use super::error::{DecodeError, Format};

/// # Errors
/// As [`decode_image`](super::decode_image).
pub(super) fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<Rgb8Image, DecodeError> {
    let mut options = DecodeOptions::new();
    options.set_color_output(ColorOutput::Indexed);
    options.set_memory_limit(MemoryLimit::Unlimited); // The limits are checked below, before anything is allocated.
    let mut decoder = options.read_info(bytes).map_err(damaged)?;
    let (screen_width, screen_height) = (usize::from(decoder.width()), usize::from(decoder.height()));
    let frame = decoder.next_frame_info().map_err(damaged)?.ok_or_else(|| damaged("it has no picture"))?;
    let [left, top, frame_width, frame_height] = [frame.left, frame.top, frame.width, frame.height].map(usize::from);
    let transparent = frame.transparent;
    // A frame that goes beyond the screen widens it.
    let (width, height) = (screen_width.max(left + frame_width), screen_height.max(top + frame_height));
    limits.check(width as u32, height as u32, 4 * width as u64 * height as u64)?;
    if frame_width == 0 || frame_height == 0 {
        return Err(damaged("its first frame has no pixels"));
    }

    let mut indices = vec![0; decoder.buffer_size()];
    decoder.read_into_buffer(&mut indices).map_err(damaged)?;
    let (palette, _) = decoder.palette().map_err(damaged)?.as_chunks::<3>();
    let colour =
        |index: u8| palette.get(usize::from(index)).copied().ok_or_else(|| damaged("a colour outside its palette"));
    // What the frame leaves free has the transparent colour, as if the frame went there.
    let is_covered = (frame_width, frame_height) == (width, height);
    let background = if is_covered { [0; 3] } else { colour(transparent.unwrap_or(0))? };
    let mut pixels = background.repeat(width * height);
    for (line, row) in indices.chunks_exact(frame_width).enumerate() {
        let start = (top + line) * width + left;
        let (line, _) = pixels[3 * start..3 * (start + frame_width)].as_chunks_mut::<3>();
        for (pixel, &index) in line.iter_mut().zip(row) {
            *pixel = colour(index)?;
        }
    }
    Ok(Rgb8Image { width, height, pixels })
}

fn damaged(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> DecodeError {
    DecodeError::Damaged { format: Format::Gif, source: source.into() }
}
