use cogvlm_core::DType;

use super::{dot, round_to};
use crate::{PatchGeometry, PatchWeights};

/// [`Backend::patch_embed`](crate::Backend::patch_embed): pixels `[num_images, channels, size, size]`.
pub fn patch_embed(
    pixels: &[f32], weights: PatchWeights<'_, Vec<f32>>, geometry: PatchGeometry, dtype: DType,
) -> Vec<f32> {
    let PatchGeometry { num_images, num_channels, image_size, patch_size } = geometry;
    let patches_per_side = image_size / patch_size;
    let width = weights.bias.len();
    let mut out = Vec::new();
    for image in 0..num_images {
        let image = &pixels[image * num_channels * image_size * image_size..];
        let mut tokens = weights.class.clone();
        for patch in 0..patches_per_side * patches_per_side {
            let (top, left) = (patch / patches_per_side * patch_size, patch % patches_per_side * patch_size);
            let mut window = Vec::with_capacity(num_channels * patch_size * patch_size);
            for channel in 0..num_channels {
                for y in top..top + patch_size {
                    window.extend_from_slice(&image[(channel * image_size + y) * image_size + left..][..patch_size]);
                }
            }
            let filters = weights.projection.chunks_exact(window.len());
            tokens.extend(filters.zip(weights.bias).map(|(w, &b)| round_to(dtype, dot(w, &window) + f64::from(b))));
        }
        let sums = tokens.iter().zip(weights.position);
        out.extend(sums.map(|(&token, &position)| round_to(dtype, f64::from(token) + f64::from(position))));
    }
    debug_assert_eq!(out.len(), num_images * (patches_per_side * patches_per_side + 1) * width);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_are_cut_row_by_row_after_the_class_token() {
        // One channel, 4 x 4 pixels counting up, patches of 2 x 2; the filter sums a patch, or takes its upper right.
        let pixels: Vec<f32> = (0..16u8).map(f32::from).collect();
        let projection = vec![1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0];
        let (bias, class) = (vec![100.0, 0.0], vec![-1.0, -2.0]);
        let position: Vec<f32> = (0..10u16).map(|index| 1000.0 * f32::from(index / 2)).collect();
        let weights = PatchWeights { projection: &projection, bias: &bias, class: &class, position: &position };
        let geometry = PatchGeometry { num_images: 1, num_channels: 1, image_size: 4, patch_size: 2 };
        let out = patch_embed(&pixels, weights, geometry, DType::F32);
        assert_eq!(out, [-1.0, -2.0, 1110.0, 1001.0, 2118.0, 2003.0, 3142.0, 3009.0, 4150.0, 4011.0]);
    }
}
