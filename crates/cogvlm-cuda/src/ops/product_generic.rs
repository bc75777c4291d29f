//! Products of any shape and type: kernels/product_generic.cu.

use cogvlm_backend::BackendError;
use cogvlm_core::DType;

use crate::backend::CudaBackend;
use crate::device::{Launch, arg};
use crate::product::{Finish, Product};

/// As in the kernel.
const THREADS: u32 = 256;
const TILE: u32 = 64;

pub(crate) fn run(cuda: &CudaBackend, product: &Product) -> Result<(), BackendError> {
    let arguments = product.tiled(8);
    let is_f32 = cuda.activations == DType::F32;
    let kernel = match (product.finish, is_f32) {
        (Finish::Bias, true) => "product_generic_f32_bias",
        (Finish::BiasGelu, true) => "product_generic_f32_bias_gelu",
        (Finish::Residual, true) => "product_generic_f32_residual",
        (Finish::GateUp, true) => "product_generic_f32_gate_up",
        (Finish::Qkv, true) => "product_generic_f32_qkv",
        (Finish::Logits, true) => "product_generic_f32_logits",
        (Finish::Partial, true) => "product_generic_f32_partial",
        (Finish::Bias, false) => "product_generic_bf16_bias",
        (Finish::BiasGelu, false) => "product_generic_bf16_bias_gelu",
        (Finish::Residual, false) => "product_generic_bf16_residual",
        (Finish::GateUp, false) => "product_generic_bf16_gate_up",
        (Finish::Qkv, false) => "product_generic_bf16_qkv",
        (Finish::Logits, false) => "product_generic_bf16_logits",
        (Finish::Partial, false) => "product_generic_bf16_partial",
    };
    let grid = [arguments.width.div_ceil(TILE), arguments.num_tiles_m, 1];
    let launch = Launch { grid, block: THREADS, shared: 0, overlap: product.is_stable };
    // SAFETY: the kernel takes one `Product`; addresses, rows and widths in it were checked when it was made.
    unsafe { cuda.gpu.launch("product_generic", kernel, launch, &mut [arg(&arguments)]) }
}
