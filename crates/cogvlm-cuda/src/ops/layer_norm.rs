//! `residual += layer_norm(branch)` and `x = gelu(layer_norm(x))`

use cogvlm_backend::BackendError;
use cogvlm_backend::shape::{expect_rows, expect_shape};
use cogvlm_core::DType;
use cudarc::driver::sys::CUdeviceptr;

use crate::backend::CudaBackend;
use crate::buffer::{CudaBuffer, dtype_code};
use crate::device::{Launch, arg};
use crate::weight::CudaWeight;

/// As in kernels/layer_norm.cu.
const THREADS: u32 = 256;

pub(crate) fn layer_norm_residual(
    cuda: &CudaBackend, branch: &CudaBuffer, weight: &CudaWeight, bias: &CudaWeight, eps: f32, rows: usize,
    residual: &mut CudaBuffer,
) -> Result<(), BackendError> {
    const OP: &str = "layer_norm_residual";
    let width = branch.columns();
    expect_rows(OP, "branch", branch.shape(), [rows, width])?;
    expect_rows(OP, "residual", residual.shape(), [rows, width])?;
    expect_shape(OP, "weight", weight.shape(), &[width])?;
    expect_shape(OP, "bias", bias.shape(), &[width])?;
    branch.expect_dtype(OP, "branch", cuda.activations)?;
    residual.expect_dtype(OP, "residual", cuda.activations)?;
    // Two rows a block.
    let wide = (1792, "layer_norm_residual_bf16_1792", Launch::blocks(rows.div_ceil(2) as u32, 64));
    let plain = ["layer_norm_residual_f32", "layer_norm_residual_bf16"];
    // SAFETY: both buffers have `rows` rows of `width`, the weights `width` elements.
    unsafe { run(cuda, OP, wide, plain, branch.address(), [weight, bias], residual.address(), [rows, width], eps) }
}

pub(crate) fn layer_norm_gelu(
    cuda: &CudaBackend, x: &mut CudaBuffer, weight: &CudaWeight, bias: &CudaWeight, eps: f32, rows: usize,
) -> Result<(), BackendError> {
    const OP: &str = "layer_norm_gelu";
    let width = x.columns();
    expect_rows(OP, "x", x.shape(), [rows, width])?;
    expect_shape(OP, "weight", weight.shape(), &[width])?;
    expect_shape(OP, "bias", bias.shape(), &[width])?;
    x.expect_dtype(OP, "x", cuda.activations)?;
    let wide = (4096, "layer_norm_gelu_bf16_4096", Launch::blocks(rows as u32, 128));
    let plain = ["layer_norm_gelu_f32", "layer_norm_gelu_bf16"];
    // SAFETY: the buffer has `rows` rows of `width`, the weights `width` elements.
    unsafe { run(cuda, OP, wide, plain, x.address(), [weight, bias], x.address(), [rows, width], eps) }
}

/// `wide` is the kernel for one width in bf16 and its launch; `plain` are those for any width, in f32 and bf16.
///
/// # Safety
/// At `x` and at `y` are `rows` rows of `width` activations; weight and bias have `width` elements. The kernels take
/// the arguments that are passed to them here.
#[expect(clippy::too_many_arguments, reason = "one launch")]
unsafe fn run(
    cuda: &CudaBackend, op: &'static str, wide: (usize, &'static str, Launch), plain: [&'static str; 2],
    x: CUdeviceptr, [weight, bias]: [&CudaWeight; 2], y: CUdeviceptr, [rows, width]: [usize; 2], eps: f32,
) -> Result<(), BackendError> {
    let (weight_address, bias_address) = (weight.address(op, "weight")?, bias.address(op, "bias")?);
    if width == 0 {
        return Ok(());
    }
    let overlap = weight.is_stable() && bias.is_stable();
    let (num_rows, columns) = (rows as u32, width as u32);
    let all_bf16 = [cuda.activations, weight.dtype(), bias.dtype()] == [DType::Bf16; 3];
    if all_bf16 && width == wide.0 {
        let (_, kernel, launch) = wide;
        let mut arguments = [arg(&x), arg(&weight_address), arg(&bias_address), arg(&y), arg(&num_rows), arg(&eps)];
        // SAFETY: arguments and block are those of the kernels of one width, which this is; the caller vouches for the
        // ranges, whose rows begin at multiples of 16 bytes.
        return unsafe { cuda.gpu.launch("layer_norm", kernel, Launch { overlap, ..launch }, &mut arguments) };
    }
    let kernel = if cuda.activations == DType::F32 { plain[0] } else { plain[1] };
    let (weight_type, bias_type) = (dtype_code(weight.dtype()), dtype_code(bias.dtype()));
    let mut arguments = [
        arg(&x),
        arg(&weight_address),
        arg(&weight_type),
        arg(&bias_address),
        arg(&bias_type),
        arg(&y),
        arg(&columns),
        arg(&eps),
    ];
    let launch = Launch { overlap, ..Launch::blocks(num_rows, THREADS) };
    // SAFETY: arguments and THREADS are those of the kernels for any width; the caller vouches for the ranges.
    unsafe { cuda.gpu.launch("layer_norm", kernel, launch, &mut arguments) }
}
