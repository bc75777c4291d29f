//! From a picture to the input of the vision tower.

use super::Rgb8Image;
use super::resize::resize_bicubic;

/// Mean of each channel. Source: CLIP, whose numbers the published model code uses.
const MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// Standard deviation of each channel.
#[expect(clippy::excessive_precision, reason = "digits as published")]
const STD: [f32; 3] = [0.268_629_54, 0.261_302_58, 0.275_777_11];

/// `image`, squeezed to `size` x `size` pixels and normalised: `[3, size, size]`, channels red, green, blue.
///
/// The ratio of the sides is not kept and nothing is cropped. Source: the `transform` of the published demo code
/// (torchvision `Resize` bicubic on a Pillow picture, `ToTensor`, `Normalize`), bit for bit.
pub fn preprocess(image: &Rgb8Image, size: usize) -> Vec<f32> {
    if size == 0 {
        return Vec::new();
    }
    let resized = resize_bicubic(image, size, size);
    let (pixels, _) = resized.pixels().as_chunks::<3>();
    let mut planes = Vec::with_capacity(3 * pixels.len());
    for channel in 0..3 {
        // 256 divisions do for all pixels; the order of the operations is the reference's.
        let normalised: [f32; 256] = std::array::from_fn(|level| (level as f32 / 255.0 - MEAN[channel]) / STD[channel]);
        planes.extend(pixels.iter().map(|pixel| normalised[usize::from(pixel[channel])]));
    }
    planes
}
