//! Class token and patches of images, each plus its position embedding.

use cogvlm_backend::{BackendError, PatchGeometry, PatchWeights};

use crate::backend::CpuBackend;
use crate::buffer::CpuBuffer;
use crate::element::Element;
use crate::matmul::{Input, Product};
use crate::shape::expect_patches;
use crate::weight::CpuWeight;

pub(crate) fn patch_embed<T: Element>(
    cpu: &CpuBackend, pixels: &CpuBuffer, weights: PatchWeights<'_, CpuWeight>, geometry: PatchGeometry,
    out: &mut CpuBuffer,
) -> Result<(), BackendError> {
    const OP: &str = "patch_embed";
    let PatchGeometry { num_images, num_channels, image_size, patch_size } = geometry;
    let PatchWeights { projection, bias, class, position } = weights;
    let shapes = PatchWeights {
        projection: &projection.shape(),
        bias: &bias.shape(),
        class: &class.shape(),
        position: &position.shape(),
    };
    let num_tokens = expect_patches(OP, geometry, pixels.shape(), &shapes, out.shape())?;
    let (width, side) = (out.columns(), image_size / patch_size);

    let pixels = pixels.view::<T>(OP, "pixels")?;
    // Row of the product: the patch of that token, channel by channel; zeros for the class token, which has none.
    let patch = |row: usize, first: usize, elements: &mut [T]| {
        let (image, token) = (row / num_tokens, row % num_tokens);
        if token == 0 {
            return elements.fill(T::of(0.0));
        }
        let (top, left) = ((token - 1) / side * patch_size, (token - 1) % side * patch_size);
        for (element, index) in elements.iter_mut().zip(first..) {
            let (line, x) = (index / patch_size, index % patch_size);
            let (channel, y) = (line / patch_size, line % patch_size);
            *element = pixels[((image * num_channels + channel) * image_size + top + y) * image_size + left + x];
        }
    };
    let depth = num_channels * patch_size * patch_size;
    let rows = 0..num_images * num_tokens;
    let product = Product { input: Input::Made(&patch), rows, depth, weights: [weights.projection] };
    let [bias, class, position] = [weights.bias, weights.class, weights.position].map(CpuWeight::to_f32);
    let out = out.view_mut::<T>(OP, "out")?;
    product.finish_rows(cpu.isa, &cpu.threads, out, width, |row, columns, [sums], out| {
        let token = row % num_tokens;
        let position = &position[token * width..][columns.clone()];
        for (index, out) in out.iter_mut().enumerate() {
            let column = columns.start + index;
            let embedding = if token == 0 { class[column] } else { sums[index] + bias[column] };
            *out = T::of(T::round(embedding) + T::round(position[index]));
        }
    });
    Ok(())
}
