//! What a GPU can do at most, measured: the numbers that speeds are held against.

use std::sync::Arc;
use std::time::Instant;

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
/// Elements of the row that hops are measured with: the hidden state of a token, 8 KiB.
const HOP_ELEMENTS: usize = 4096;
/// Hops of which the fastest counts.
const HOPS: usize = 33;
/// Room for the rows that hop.
const OUTBOX_BYTES: usize = 64 << 10;
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
    /// Bytes each second to pinned host memory.
    pub to_host_bytes_per_s: f64,
    /// Seconds that a row of 8 KiB takes to the host or from it, with waiting for it.
    pub host_hop_s: f64,
}

/// What there is between two GPUs.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerCeilings {
    /// Whether one reads the other's memory; otherwise copies pass through the host.
    pub peer_access: bool,
    /// Bytes each second of a copy of 256 MiB.
    pub bytes_per_s: f64,
    /// Seconds that a row of 8 KiB takes, with waiting for it.
    pub hop_s: f64,
}

/// Measures GPU `ordinal`. Takes about 2 GiB of its memory for a second or two.
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
        rate(gpu, "a copy within it", 2.0 * COPY_BYTES as f64, seconds)?
    };
    let (link_bytes_per_s, to_host_bytes_per_s) = {
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
        let link = rate(gpu, "a copy from the host", LINK_BYTES as f64, seconds)?;
        let seconds = median_seconds(gpu, || {
            gpu.bind()?;
            // SAFETY: as above, the other way.
            gpu.check(unsafe { cu::cuMemcpyDtoHAsync_v2(host.address.cast(), to.address(), LINK_BYTES, gpu.stream) })
        })?;
        (link, rate(gpu, "a copy to the host", LINK_BYTES as f64, seconds)?)
    };
    let host_hop_s = {
        let outbox = cuda.outbox(OUTBOX_BYTES)?;
        let mut row = cuda.alloc("measuring", DType::Bf16, [1, HOP_ELEMENTS])?;
        let values = vec![0.0; HOP_ELEMENTS];
        let there_and_back = least_waited(|| {
            drop(cuda.send(&outbox, &row, 0..1)?.into_host_rows()?);
            cuda.write(&values, &mut row, 0)?;
            gpu.synchronize()
        })?;
        there_and_back / 2.0
    };
    let (gemm_flops_per_s, gemm_by) = gemm(&cuda)?;
    Ok(Ceilings { copy_bytes_per_s, gemm_flops_per_s, gemm_by, link_bytes_per_s, to_host_bytes_per_s, host_hop_s })
}

/// Measures the way from GPU `from` to another one, `to`, as rows and streamed weights take it. Takes about 300 MiB of
/// each for a tenth of a second.
///
/// # Errors
/// Where one of them cannot be opened or has too little memory left.
pub fn measure_pair(from: u32, to: u32) -> Result<PeerCeilings, BackendError> {
    let capacity = (LINK_BYTES + OUTBOX_BYTES) as u64 + (1 << 20);
    let open = |ordinal| CudaBackend::new(Device::Gpu(ordinal), ordinal, capacity, DType::Bf16);
    let (sender, receiver) = (open(from)?, open(to)?);
    let gpu = &receiver.gpu;
    let peer_access = gpu.reaches(&sender.gpu);
    let bytes_per_s = {
        let buffer = |cuda: &CudaBackend| cuda.alloc("measuring", DType::Bf16, [LINK_BYTES / 2 / 4096, 4096]);
        let (source, target) = (buffer(&sender)?, buffer(&receiver)?);
        // The source is zeroed by its own device's stream.
        sender.gpu.synchronize()?;
        let mut copy = || {
            // SAFETY: both buffers have this length and live past the wait of the measurement.
            unsafe { gpu.copy_from_peer(&sender.gpu, source.address(), target.address(), LINK_BYTES, gpu.stream) }
        };
        // The better of two: the first copies after peer access was opened may be slow.
        let seconds = median_seconds(gpu, &mut copy)?.min(median_seconds(gpu, &mut copy)?);
        rate(gpu, "a copy from the other GPU", LINK_BYTES as f64, seconds)?
    };
    let row = |cuda: &CudaBackend| cuda.alloc("measuring", DType::Bf16, [1, HOP_ELEMENTS]);
    let (source, mut target) = (row(&sender)?, row(&receiver)?);
    let outbox = sender.outbox(OUTBOX_BYTES)?;
    let hop_s = least_waited(|| {
        let parcel = sender.send(&outbox, &source, 0..1)?;
        receiver.receive(parcel, &mut target, 0)?;
        gpu.synchronize()
    })?;
    Ok(PeerCeilings { peer_access, bytes_per_s, hop_s })
}

/// `amount` per second, where the device's clock has run.
fn rate(gpu: &Gpu, what: &str, amount: f64, seconds: f64) -> Result<f64, BackendError> {
    let rate = amount / seconds;
    if seconds > 0.0 && rate.is_finite() && rate > 0.0 {
        Ok(rate)
    } else {
        Err(gpu.error(format!("{what} took {seconds} s by its own clock")))
    }
}

/// Least seconds of `run` on the host, which waits for it to end, after one run that is not counted. The least, since a host
/// that has much else to do, such as pages to write, may keep whoever waits for milliseconds.
fn least_waited(mut run: impl FnMut() -> Result<(), BackendError>) -> Result<f64, BackendError> {
    let mut least = f64::INFINITY;
    run()?;
    for _ in 0..HOPS {
        let start = Instant::now();
        run()?;
        least = least.min(start.elapsed().as_secs_f64());
    }
    Ok(least)
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
        return Ok((rate(gpu, "a product by cuBLASLt", flops, seconds)?, "cuBLASLt"));
    }
    let seconds = median_seconds(gpu, || cuda.linear(&x, &weight, None, Activation::Identity, GEMM_SIDE, &mut out))?;
    Ok((rate(gpu, "a product", flops, seconds)?, "cogvlm-shard"))
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
