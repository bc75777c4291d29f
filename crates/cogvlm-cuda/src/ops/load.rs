//! Weights onto the device: copied and rounded, or made where they will lie.

use std::sync::PoisonError;

use cogvlm_backend::{BackendError, ElementRule, HostWeight};
use cogvlm_core::DType;
use cudarc::driver::sys::CUdeviceptr;

use super::attention::counters;
use super::rows::scratch;
use crate::backend::CudaBackend;
use crate::device::{Event, Gpu, Launch, arg};
use crate::host_copy::{Queue, num_elements};
use crate::weight::CudaWeight;

/// As in kernels/load.cu.
const THREADS: u32 = 256;
/// Blocks of a grid for each multiprocessor.
const BLOCKS_PER_MULTIPROCESSOR: u32 = 16;

/// The type that weights of type `stored` have on a device.
pub(crate) fn device_dtype(activations: DType, stored: DType) -> DType {
    if activations == DType::Bf16 { DType::Bf16 } else { stored }
}

/// Copies `weight` to memory of its own, in the order of the compute stream.
pub(crate) fn load(cuda: &CudaBackend, weight: &HostWeight) -> Result<CudaWeight, BackendError> {
    let count = num_elements("load", weight)?;
    let dtype = device_dtype(cuda.activations, weight.dtype());
    let memory = cuda.arena.take(weight.name(), count * dtype.size_bytes())?;
    // SAFETY: the memory was just taken, with room for `count` elements of `dtype`.
    unsafe { fill(cuda, weight, count, dtype, memory.address) }?;
    let loaded = Event::new(&cuda.gpu, false)?;
    loaded.record(cuda.gpu.stream)?;
    Ok(CudaWeight::resident(dtype, weight.shape().to_vec(), memory, loaded))
}

/// Writes the elements of `weight` as `dtype` to `to`.
///
/// # Safety
/// `to` has room for `count` elements of `dtype`, the elements of `weight`.
unsafe fn fill(
    cuda: &CudaBackend, weight: &HostWeight, count: usize, dtype: DType, to: CUdeviceptr,
) -> Result<(), BackendError> {
    let stored = weight.dtype();
    if let (Some(rule), DType::Bf16, DType::Bf16) = (weight.rule(), stored, dtype) {
        // SAFETY: as the caller says.
        unsafe { make(&cuda.gpu, rule, weight.shape(), count, to) }?;
    } else if stored == DType::F32 && dtype == DType::Bf16 {
        // Several threads load; scratch memory is for one.
        let _alone = cuda.converting.lock().unwrap_or_else(PoisonError::into_inner);
        let (scratch, scratch_bytes) = scratch(cuda);
        let piece_len = scratch_bytes / 4;
        for first in (0..count).step_by(piece_len) {
            let piece = piece_len.min(count - first);
            // SAFETY: scratch memory holds `piece_len` f32; the stream is past its last use before the copy begins.
            unsafe { cuda.loader.copy(weight, first * 4..(first + piece) * 4, scratch, Queue::Compute) }?;
            // SAFETY: `piece` f32 lie in scratch memory, and the destination has room from `first` on.
            unsafe { convert(&cuda.gpu, "convert_f32", scratch, to + 2 * first as CUdeviceptr, piece) }?;
        }
    } else {
        // SAFETY: types of equal size, so the destination has room for the elements as they are stored.
        unsafe { cuda.loader.copy(weight, 0..count * stored.size_bytes(), to, Queue::Compute) }?;
        if stored != dtype {
            // SAFETY: `count` f16 were just copied there, and are rounded in place.
            unsafe { convert(&cuda.gpu, "convert_f16", to, to, count) }?;
        } else {
            return Ok(());
        }
    }
    // Kernels that are launched with overlap read weights before they wait. Between them and the kernels above comes an
    // operation that waits by itself. What it writes is zero anyway: another thread may be converting in the rest of the
    // scratch memory.
    // SAFETY: there is more than one counter.
    unsafe { cuda.gpu.zero(counters(cuda).0, 4) }
}

/// Rounds the `count` elements of type `stored` at `address` to bf16, to the same address, in the order of the compute
/// stream. f32 elements go through scratch memory, and leave the second half of their bytes as it happens to be.
///
/// # Safety
/// `address` holds `count` elements of `stored`.
pub(crate) unsafe fn convert_in_place(
    cuda: &CudaBackend, stored: DType, address: CUdeviceptr, count: usize,
) -> Result<(), BackendError> {
    match stored {
        DType::Bf16 => Ok(()),
        // SAFETY: as the caller says; this kernel may work in place.
        DType::F16 => unsafe { convert(&cuda.gpu, "convert_f16", address, address, count) },
        DType::F32 => {
            let (scratch, scratch_bytes) = scratch(cuda);
            let piece_len = scratch_bytes / 2;
            for first in (0..count).step_by(piece_len) {
                let (piece, offset) = (piece_len.min(count - first), first as CUdeviceptr);
                // SAFETY: `piece` f32 from `first` on are as they came: what was written before ends at twice `first`
                // bytes. Scratch memory holds `piece_len` bf16.
                unsafe { convert(&cuda.gpu, "convert_f32", address + 4 * offset, scratch, piece) }?;
                // SAFETY: as above; these bytes were read, by this piece or one before it.
                unsafe { cuda.gpu.copy(scratch, address + 2 * offset, 2 * piece) }?;
            }
            Ok(())
        }
    }
}

/// # Safety
/// `from` holds `count` elements of the kernel's type, `to` has room for as many bf16.
unsafe fn convert(
    gpu: &Gpu, kernel: &'static str, from: CUdeviceptr, to: CUdeviceptr, count: usize,
) -> Result<(), BackendError> {
    let elements = count as u64;
    // SAFETY: arguments are those of `convert_f16` and `convert_f32`; the caller vouches for the memory.
    unsafe { gpu.launch("load", kernel, grid(gpu, count), &mut [arg(&from), arg(&to), arg(&elements)]) }
}

/// Makes the elements of a tensor of `shape` at `to`.
///
/// # Safety
/// `to` has room for `count` bf16, as many as `shape` has.
unsafe fn make(
    gpu: &Gpu, rule: ElementRule, shape: &[usize], count: usize, to: CUdeviceptr,
) -> Result<(), BackendError> {
    let ElementRule { key, base, amplitude, mixes_rows } = rule;
    let launch = grid(gpu, count);
    if mixes_rows {
        let rows = shape.first().map_or(1, |rows| *rows as u32);
        let columns = (count / rows.max(1) as usize) as u32;
        let mut arguments = [arg(&to), arg(&rows), arg(&columns), arg(&key), arg(&base), arg(&amplitude)];
        // SAFETY: arguments are those of `make_mixture`, which writes `rows * columns` elements: `count`.
        return unsafe { gpu.launch("load", "make_mixture", launch, &mut arguments) };
    }
    let elements = count as u64;
    let mut arguments = [arg(&to), arg(&elements), arg(&key), arg(&base), arg(&amplitude)];
    // SAFETY: arguments are those of `make_uniform`, which writes `count` elements.
    unsafe { gpu.launch("load", "make_uniform", launch, &mut arguments) }
}

/// A grid for `count` elements, none where there are none.
fn grid(gpu: &Gpu, count: usize) -> Launch {
    let most = gpu.info.num_multiprocessors * BLOCKS_PER_MULTIPROCESSOR;
    let blocks = count.div_ceil(THREADS as usize).min(most as usize) as u32;
    // No overlap: neighbours may read and write the same memory.
    Launch { overlap: false, ..Launch::blocks(blocks, THREADS) }
}
