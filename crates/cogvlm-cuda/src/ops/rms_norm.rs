//! `out = weight * x / sqrt(mean(x²) + eps)`

use cogvlm_backend::BackendError;
use cogvlm_backend::shape::{expect_rows, expect_shape};
use cogvlm_core::DType;
use cudarc::driver::sys::CUdeviceptr;

use crate::backend::CudaBackend;
use crate::buffer::{CudaBuffer, dtype_code};
use crate::device::{Launch, arg};
use crate::tables::CudaTables;
use crate::weight::CudaWeight;

/// As in kernels/rms_norm.cu.
const THREADS: u32 = 256;

pub(crate) fn rms_norm(
    cuda: &CudaBackend, x: &CudaBuffer, weight: &CudaWeight, eps: f32, rows: usize, out: &mut CudaBuffer,
) -> Result<(), BackendError> {
    expect_rows("rms_norm", "x", x.shape(), [rows, x.columns()])?;
    run(cuda, "rms_norm", x, weight, eps, 0, rows, out)
}

pub(crate) fn rms_norm_logit_rows(
    cuda: &CudaBackend, x: &CudaBuffer, weight: &CudaWeight, eps: f32, tables: &CudaTables, out: &mut CudaBuffer,
) -> Result<(), BackendError> {
    const OP: &str = "rms_norm_logit_rows";
    let wanted = &tables.batch.logit_rows;
    expect_rows(OP, "x", x.shape(), [wanted.last().map_or(0, |row| row + 1), x.columns()])?;
    run(cuda, OP, x, weight, eps, tables.logit_rows(), wanted.len(), out)
}

/// `row_indices` is the address of the rows to take, or 0 for all.
#[expect(clippy::too_many_arguments, reason = "one launch")]
fn run(
    cuda: &CudaBackend, op: &'static str, x: &CudaBuffer, weight: &CudaWeight, eps: f32, row_indices: CUdeviceptr,
    rows: usize, out: &mut CudaBuffer,
) -> Result<(), BackendError> {
    let width = x.columns();
    expect_rows(op, "out", out.shape(), [rows, width])?;
    expect_shape(op, "weight", weight.shape(), &[width])?;
    x.expect_dtype(op, "x", cuda.activations)?;
    out.expect_dtype(op, "out", cuda.activations)?;
    let launch = Launch { overlap: weight.is_stable(), ..Launch::blocks(rows as u32, THREADS) };
    let (input, output, weight_address) = (x.address(), out.address(), weight.address(op, "weight")?);
    let (weight_type, columns) = (dtype_code(weight.dtype()), width as u32);
    if cuda.activations == DType::Bf16 && weight.dtype() == DType::Bf16 && width == 4096 {
        let mut arguments = [arg(&input), arg(&weight_address), arg(&row_indices), arg(&output), arg(&eps)];
        // SAFETY: arguments and THREADS are those of `rms_norm_bf16_4096`; rows and width were checked above.
        return unsafe { cuda.gpu.launch("rms_norm", "rms_norm_bf16_4096", launch, &mut arguments) };
    }
    let kernel = if cuda.activations == DType::F32 { "rms_norm_f32" } else { "rms_norm_bf16" };
    let mut arguments = [
        arg(&input),
        arg(&weight_address),
        arg(&weight_type),
        arg(&row_indices),
        arg(&output),
        arg(&columns),
        arg(&eps),
    ];
    // SAFETY: arguments and THREADS are those of `rms_norm_f32` and `rms_norm_bf16`; they read rows of x that were
    // checked above, `width` weights, and write `rows` rows of out.
    unsafe { cuda.gpu.launch("rms_norm", kernel, launch, &mut arguments) }
}
