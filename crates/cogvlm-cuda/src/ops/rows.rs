//! Rows in and out of buffers: from and to the host, another buffer, a weight.

use std::ops::Range;

use cogvlm_backend::BackendError;
use cogvlm_backend::shape::{expect, expect_fit, expect_span, expect_values};
use cogvlm_core::DType;
use cudarc::driver::sys::CUdeviceptr;

use crate::backend::{CudaBackend, SCRATCH_BYTES};
use crate::buffer::{CudaBuffer, dtype_code};
use crate::device::{Launch, arg};
use crate::weight::CudaWeight;

/// Bytes at the beginning of the scratch memory that belong to the counters of the attention: they are zero between
/// operations.
const COUNTER_BYTES: usize = 64 << 10;

/// As in kernels/rows.cu: `THREADS` and `EACH`.
const THREADS: u32 = 256;
const EACH: u64 = 4;

/// The part of the scratch memory that any operation may overwrite, and its length.
pub(super) fn scratch(cuda: &CudaBackend) -> (CUdeviceptr, usize) {
    (cuda.scratch.address + COUNTER_BYTES as CUdeviceptr, SCRATCH_BYTES - COUNTER_BYTES)
}

pub(crate) fn write(
    cuda: &CudaBackend, values: &[f32], buffer: &mut CudaBuffer, first_row: usize,
) -> Result<(), BackendError> {
    expect_values("write", values.len(), buffer.shape(), first_row)?;
    if values.is_empty() {
        return Ok(());
    }
    let to = buffer.row(first_row);
    if buffer.dtype == DType::F32 {
        return cuda.uploader.upload(to, bytemuck::cast_slice(values));
    }
    // The next piece is copied to the scratch memory when this one has been converted: all of it is on one stream.
    let (area, length) = scratch(cuda);
    let piece_len = length / size_of::<f32>();
    for (index, piece) in values.chunks(piece_len).enumerate() {
        cuda.uploader.upload(area, bytemuck::cast_slice(piece))?;
        let to = to + (index * piece_len * buffer.dtype.size_bytes()) as CUdeviceptr;
        // SAFETY: the piece was just copied to the scratch memory, and the rows have room for all of `values`.
        unsafe { convert(cuda, area, DType::F32, to, buffer.dtype, piece.len(), true) }?;
    }
    Ok(())
}

pub(crate) fn read(cuda: &CudaBackend, buffer: &CudaBuffer, rows: Range<usize>) -> Result<Vec<f32>, BackendError> {
    expect_span("read", &rows, buffer.rows())?;
    let (from, len) = (buffer.row(rows.start), rows.len() * buffer.columns());
    if buffer.dtype == DType::F32 {
        let mut values = vec![0.0_f32; len];
        cuda.gpu.download(from, bytemuck::cast_slice_mut(&mut values))?;
        return Ok(values);
    }
    let mut bits = vec![0_u16; len];
    cuda.gpu.download(from, bytemuck::cast_slice_mut(&mut bits))?;
    Ok(bits.into_iter().map(|bits| half::bf16::from_bits(bits).to_f32()).collect())
}

pub(crate) fn copy_rows(
    cuda: &CudaBackend, source: &CudaBuffer, rows: Range<usize>, destination: &mut CudaBuffer, first_row: usize,
) -> Result<(), BackendError> {
    const OP: &str = "copy_rows";
    expect_span(OP, &rows, source.rows())?;
    let given = (source.dtype, [rows.len(), source.columns()]);
    expect_fit(OP, given, (destination.dtype, destination.shape()), first_row)?;
    let bytes = rows.len() * source.row_bytes();
    // SAFETY: both ranges were checked against their buffers, which are different ones: one is borrowed mutably.
    unsafe { cuda.gpu.copy(source.row(rows.start), destination.row(first_row), bytes) }
}

pub(crate) fn copy_weight_rows(
    cuda: &CudaBackend, weight: &CudaWeight, destination: &mut CudaBuffer, first_row: usize,
) -> Result<(), BackendError> {
    const OP: &str = "copy_weight_rows";
    let (rows, width) = (destination.rows(), destination.columns());
    let room = rows.saturating_sub(first_row);
    let len: usize = weight.shape().iter().product();
    let fits = first_row <= rows && weight.shape().last() == Some(&width) && len <= room * width;
    expect(OP, "weight", weight.shape(), fits, || format!("[.., {width}] in at most {room} rows"))?;
    destination.expect_dtype(OP, "destination", cuda.activations)?;
    let (from, to) = (weight.address(OP, "weight")?, destination.row(first_row));
    // SAFETY: the weight has `len` elements, and the destination room for them from that row on.
    unsafe { convert(cuda, from, weight.dtype(), to, destination.dtype, len, weight.is_stable()) }
}

/// Copies `len` elements, rounded.
///
/// # Safety
/// Memory of this device holds `len` elements of `from_dtype` at `from`, and has room for as many of `to_dtype`, which
/// is f32 or bf16, at `to`; they do not overlap. With `overlap`, what is at `from` was put there by the compute stream,
/// or is a weight that never changes.
unsafe fn convert(
    cuda: &CudaBackend, from: CUdeviceptr, from_dtype: DType, to: CUdeviceptr, to_dtype: DType, len: usize,
    overlap: bool,
) -> Result<(), BackendError> {
    let kernel = if to_dtype == DType::F32 { "rows_to_f32" } else { "rows_to_bf16" };
    let (code, count) = (dtype_code(from_dtype), len as u64);
    let launch = Launch { overlap, ..Launch::blocks(count.div_ceil(u64::from(THREADS) * EACH) as u32, THREADS) };
    let mut arguments = [arg(&from), arg(&code), arg(&to), arg(&count)];
    // SAFETY: arguments and THREADS are those of `rows_to_f32` and `rows_to_bf16`; the caller vouches for the ranges.
    unsafe { cuda.gpu.launch("rows", kernel, launch, &mut arguments) }
}
