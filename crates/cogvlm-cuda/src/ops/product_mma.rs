//! Products of many rows on any GPU from sm_80 on: kernels/product_mma.cu.

use cogvlm_backend::BackendError;

use crate::backend::CudaBackend;
use crate::device::{Launch, arg};
use crate::product::{Finish, Product};

/// As in the kernel.
const THREADS: u32 = 256;
const TILE: u32 = 128;
/// Three stages of two tiles of 128 x 64 elements.
const SHARED_BYTES: u32 = 3 * 2 * 128 * 64 * 2;

pub(crate) fn run(cuda: &CudaBackend, product: &Product) -> Result<(), BackendError> {
    let arguments = product.tiled(16);
    let kernel = match product.finish {
        Finish::Bias => "product_mma_bias",
        Finish::BiasGelu => "product_mma_bias_gelu",
        Finish::Residual => "product_mma_residual",
        Finish::GateUp => "product_mma_gate_up",
        Finish::Qkv => "product_mma_qkv",
        Finish::Logits => "product_mma_logits",
        Finish::Partial => "product_mma_partial",
    };
    let weight_rows = if product.finish.is_paired() { 2 * arguments.width } else { arguments.width };
    let grid = [arguments.num_tiles_m, weight_rows.div_ceil(TILE), 1];
    let launch = Launch { grid, block: THREADS, shared: SHARED_BYTES, overlap: product.is_stable };
    // SAFETY: the kernel takes one `Product` of bf16 whose depth is a multiple of 8, as `Product::run` sees to; addresses,
    // rows and widths in it were checked when it was made.
    unsafe { cuda.gpu.launch("product_mma", kernel, launch, &mut [arg(&arguments)]) }
}
