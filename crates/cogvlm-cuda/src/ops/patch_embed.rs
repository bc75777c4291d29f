//! Class token and patches of images, each plus its position embedding.

use cogvlm_backend::shape::{expect_patches, unsupported};
use cogvlm_backend::{BackendError, PatchGeometry, PatchWeights};
use cogvlm_core::DType;
use cudarc::driver::sys::CUdeviceptr;

use crate::backend::{CudaBackend, KernelPath};
use crate::buffer::{CudaBuffer, dtype_code};
use crate::device::{Launch, arg};
use crate::weight::CudaWeight;

/// As in kernels/patch_embed.cu.
const TILE: usize = 64;
/// Elements of a patch that the offsets of `patch_embed_bf16_mma` are made for: 2 bytes each, beside 20 KiB of tiles.
const MOST_MMA_DEPTH: usize = 12 << 10;

/// `Weights` of kernels/patch_embed.cu, passed by value.
#[repr(C)]
struct KernelWeights {
    /// Projection, bias, class token, position.
    addresses: [CUdeviceptr; 4],
    types: [u32; 4],
}

pub(crate) fn patch_embed(
    cuda: &CudaBackend, pixels: &CudaBuffer, weights: PatchWeights<'_, CudaWeight>, geometry: PatchGeometry,
    out: &mut CudaBuffer,
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
    let (width, num_patches, num_rows) = (out.columns(), num_tokens - 1, num_images.saturating_mul(num_tokens));
    let pixels_per_image = pixels.columns();
    pixels.expect_dtype(OP, "pixels", cuda.activations)?;
    out.expect_dtype(OP, "out", cuda.activations)?;
    let depth = num_channels.saturating_mul(patch_size).saturating_mul(patch_size);
    if [depth, num_images, image_size, width].iter().any(|&size| size > i32::MAX as usize) {
        return Err(unsupported(OP, "images, patches or rows of more than 2^31 elements"));
    }

    let all = [
        (weights.projection, "projection"),
        (weights.bias, "bias"),
        (weights.class, "class"),
        (weights.position, "position"),
    ];
    let mut addresses = [0; 4];
    for (address, (weight, name)) in addresses.iter_mut().zip(all) {
        *address = weight.address(OP, name)?;
    }
    let overlap = all.iter().all(|(weight, _)| weight.is_stable());
    let images = [num_images, num_channels, image_size, patch_size].map(|size| size as u32);
    let (input, output, columns) = (pixels.address(), out.address(), width as u32);
    let grid = |rows: usize| [rows.div_ceil(TILE) as u32, width.div_ceil(TILE) as u32, 1];

    let all_bf16 = cuda.activations == DType::Bf16 && all.iter().all(|(weight, _)| weight.dtype() == DType::Bf16);
    // Elements in pairs, and offsets in u32.
    let are_pairs = patch_size.is_multiple_of(2) && image_size.is_multiple_of(2) && depth <= MOST_MMA_DEPTH;
    let [pixels_len, projection_len] = [num_images.saturating_mul(pixels_per_image), width.saturating_mul(depth)];
    let is_small = pixels_len.max(projection_len).max(num_rows) <= i32::MAX as usize;
    if all_bf16 && are_pairs && is_small && num_patches > 0 && depth > 0 && cuda.path > KernelPath::Generic {
        let launch = Launch { grid: grid(num_images * num_patches), block: 128, shared: 2 * depth as u32, overlap };
        let [projection, bias, class, position] = addresses;
        let mut arguments = [
            arg(&input),
            arg(&projection),
            arg(&bias),
            arg(&class),
            arg(&position),
            arg(&images),
            arg(&output),
            arg(&columns),
        ];
        // SAFETY: arguments, block and shared memory are those of `patch_embed_bf16_mma`; all shapes were checked
        // above, and pairs begin at multiples of 4 bytes, since patches and images have even sides.
        return unsafe { cuda.gpu.launch("patch_embed", "patch_embed_bf16_mma", launch, &mut arguments) };
    }
    let kernel_weights = KernelWeights { addresses, types: all.map(|(weight, _)| dtype_code(weight.dtype())) };
    let launch = Launch { grid: grid(num_rows), overlap, ..Launch::blocks(0, 256) };
    let kernel = if cuda.activations == DType::F32 { "patch_embed_f32" } else { "patch_embed_bf16" };
    let mut arguments = [arg(&input), arg(&kernel_weights), arg(&images), arg(&output), arg(&columns)];
    // SAFETY: arguments and block are those of `patch_embed_f32` and `patch_embed_bf16`; all shapes were checked above.
    unsafe { cuda.gpu.launch("patch_embed", kernel, launch, &mut arguments) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::echo::{Numbers, echo};

    #[test]
    #[ignore = "needs a GPU"]
    fn kernels_find_every_field() {
        let mut numbers = Numbers::default();
        let addresses = [(); 4].map(|()| numbers.wide());
        let weights = KernelWeights { addresses, types: [(); 4].map(|()| numbers.narrow()) };
        let images = [(); 4].map(|()| numbers.narrow());
        let given = numbers.given();
        // SAFETY: `patch_embed_echo` takes `Weights` and `Images`, and writes a number for each of their fields.
        let found = unsafe { echo("patch_embed", "patch_embed_echo", &[arg(&weights), arg(&images)], given.len()) };
        assert_eq!(found, given);
    }
}
