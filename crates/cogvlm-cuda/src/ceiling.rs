//! What a GPU can do at most, measured: the numbers that speeds are held against.

use std::sync::Arc;

use cogvlm_backend::{Activation, Backend, BackendError};
use cogvlm_core::{DType, Device};
use cudarc::driver::sys as cu;

use crate::backend::CudaBackend;
use crate::bench::{random_buffer, random_weight};
use crate::cublas::CublasLt;
use crate::device::{Event, Gpu};
use crate::host_copy::Pinned;

/// Repetitions of which the median counts.
const REPEATS: usize = 9;
/// Bytes of one device copy: many times the cache.
const COPY_BYTES: usize = 1 << 30;
/// Bytes of one copy from the host.
const LINK_BYTES: usize = 256 << 20;
/// Side of the square product.
const GEMM_SIDE: usize = 8192;

/// Ceilings of one GPU.
#[derive(Debug, Clone, PartialEq)]
pub struct Ceilings {
    /// Bytes read and written each second by a copy within the device.
    pub copy_bytes_per_s: f64,
    /// bf16 operations each second of a product of two matrices of 8192 x 8192.
    pub gemm_flops_per_s: f64,
    /// Whose product it was: cuBLASLt's where that is installed, else ours.
    pub gemm_by: &'static str,
    /// Bytes each second from pinned host memory.
    pub link_bytes_per_s: f64,
}

/// Measures GPU `ordinal`. Takes about 2 GiB of its memory for a second.
///
/// # Errors
/// Where the device cannot be opened or has too little memory left.
pub fn measure(ordinal: u32) -> Result<Ceilings, BackendError> {
    let capacity = 2 * COPY_BYTES as u64;
    let cuda = CudaBackend::new(Device::Gpu(ordinal), ordinal, capacity, DType::Bf16)?;
    let gpu = &cuda.gpu;
    let copy_bytes_per_s = {
        let buffer = || cuda.alloc("measuring", DType::Bf16, [COPY_BYTES / 2 / 4096, 4096]);
        let [from, to] = [buffer()?, buffer()?];
        let seconds = median_seconds(gpu, || {
            // SAFETY: both buffers have this length.
            unsafe { gpu.copy(from.address(), to.address(), COPY_BYTES) }
        })?;
        2.0 * COPY_BYTES as f64 / seconds
    };
    let link_bytes_per_s = {
        let to = cuda.alloc("measuring", DType::Bf16, [LINK_BYTES / 2 / 4096, 4096])?;
        let mut host = Pinned::new(gpu, LINK_BYTES)?;
        host.slice_mut().fill(1);
        let seconds = median_seconds(gpu, || {
            gpu.bind()?;
            // SAFETY: both sides have this length and live past the wait of the measurement.
            gpu.check(unsafe {
                cu::cuMemcpyHtoDAsync_v2(to.address(), host.address.cast_const().cast(), LINK_BYTES, gpu.stream)
            })
        })?;
        LINK_BYTES as f64 / seconds
    };
    let (gemm_flops_per_s, gemm_by) = gemm(&cuda)?;
    Ok(Ceilings { copy_bytes_per_s, gemm_flops_per_s, gemm_by, link_bytes_per_s })
}

fn gemm(cuda: &CudaBackend) -> Result<(f64, &'static str), BackendError> {
    let flops = 2.0 * (GEMM_SIDE as f64).powi(3);
    let x = random_buffer(cuda, GEMM_SIDE, GEMM_SIDE)?;
    let weight = random_weight(cuda, &[GEMM_SIDE, GEMM_SIDE])?;
    let mut out = cuda.alloc("measuring", DType::Bf16, [GEMM_SIDE, GEMM_SIDE])?;
    let gpu = &cuda.gpu;
    if let Some(library) = CublasLt::open(gpu)
        && let Some(plan) = library.plan(GEMM_SIDE, GEMM_SIDE, GEMM_SIDE)
    {
        let weight = weight.address("bench", "weight")?;
        let seconds = median_seconds(gpu, || {
            // SAFETY: the three matrices have the plan's sizes.
            unsafe { plan.run(x.address(), weight, out.address(), gpu.stream) }
        })?;
        return Ok((flops / seconds, "cuBLASLt"));
    }
    let seconds = median_seconds(gpu, || cuda.linear(&x, &weight, None, Activation::Identity, GEMM_SIDE, &mut out))?;
    Ok((flops / seconds, "cogvlm-shard"))
}

/// Median seconds of `run` on the device, after one run that is not counted.
pub(crate) fn median_seconds(
    gpu: &Arc<Gpu>, mut run: impl FnMut() -> Result<(), BackendError>,
) -> Result<f64, BackendError> {
    let (from, to) = (Event::new(gpu, true)?, Event::new(gpu, true)?);
    let mut times = Vec::new();
    for _ in 0..=REPEATS {
        from.record(gpu.stream)?;
        run()?;
        to.record(gpu.stream)?;
        to.wait()?;
        times.push(f64::from(from.milliseconds_to(&to)?) / 1e3);
    }
    times.remove(0);
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
