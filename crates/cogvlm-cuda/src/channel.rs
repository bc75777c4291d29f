//! Rows between GPUs of two processes, from memory to memory by NCCL.
//!
//! Each ordered pair of ranks has a communicator of its own, so that pairs never wait for each other. The sender passes
//! parcels on by a stream of the channel: its operations go on, and the outbox keeps the rows until they have left. The
//! receiver has them written straight into the buffer that they are for, by its compute stream, which has nothing else to
//! do before they are there. Whoever tells of rows does so after they were sent, so that what a GPU waits for is always on
//! another one's stream already.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cogvlm_backend::shape::unsupported;
use cogvlm_backend::{BackendError, DeviceChannel, RowsLayout};
use cogvlm_cluster::Watch;
use cogvlm_cluster::nccl::{Communicator, Nccl, NcclError, Transfer, UniqueId};
use cudarc::driver::sys::{self as cu, CUdeviceptr, CUstream};

use crate::backend::CudaBackend;
use crate::device::{Event, Gpu};
use crate::driver;
use crate::memory::Allocation;
use crate::outbox::CudaParcel;

/// How long both ends may take to find each other.
const PATIENCE: Duration = Duration::from_secs(60);
/// What is sent first, to see that it arrives and to have NCCL make its connections.
const PROBE_BYTES: usize = 64 << 10;
const PROBE: u8 = 0xa5;

/// Which end of a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelEnd {
    /// The one that sends.
    Sender,
    /// The one that receives.
    Receiver,
}

impl ChannelEnd {
    /// Its rank in the communicator of the two.
    const fn rank(self) -> usize {
        match self {
            Self::Sender => 0,
            Self::Receiver => 1,
        }
    }
}

/// One end of a channel of NCCL.
pub struct NcclChannel {
    line: Arc<Line>,
}

/// What a channel shares with the parcels that are received from it.
struct Line {
    /// Ended first: nothing is on the stream then.
    communicator: Communicator,
    /// Where the sender sends.
    stream: Stream,
    end: ChannelEnd,
    /// Some rows were not received, so that others would arrive in their place.
    is_out_of_step: AtomicBool,
    gpu: Arc<Gpu>,
}

/// Rows that the other end sends.
pub struct ComingRows {
    line: Arc<Line>,
    layout: RowsLayout,
    /// Whether nothing is left to receive.
    is_received: bool,
}

/// What both ends need to know, made by the sender.
struct Invitation {
    id: UniqueId,
    /// The sender's GPU.
    uuid: [u8; 16],
}

impl Invitation {
    fn read(bytes: &[u8]) -> Option<Self> {
        let (id, uuid) = bytes.split_last_chunk()?;
        Some(Self { id: UniqueId::from_bytes(id)?, uuid: *uuid })
    }
}

impl NcclChannel {
    /// What the receiver needs to know of the sender `cuda`, for one channel.
    ///
    /// # Errors
    /// Where NCCL or the driver fails.
    pub fn invite(cuda: &CudaBackend, nccl: &Nccl) -> Result<Vec<u8>, BackendError> {
        let gpu = &cuda.gpu;
        gpu.bind()?;
        let id = nccl.unique_id().map_err(|error| failed(gpu, &error))?;
        let uuid = driver::uuid(gpu.info.ordinal).map_err(|reason| gpu.error(reason))?;
        Ok([id.as_bytes(), &uuid].concat())
    }

    /// Whether `cuda` can be the receiver.
    ///
    /// # Errors
    /// Where it is the same GPU as the sender, which NCCL refuses.
    pub fn accept(cuda: &CudaBackend, invitation: &[u8]) -> Result<(), BackendError> {
        let gpu = &cuda.gpu;
        let Invitation { uuid, .. } = read(gpu, invitation)?;
        if driver::uuid(gpu.info.ordinal).map_err(|reason| gpu.error(reason))? == uuid {
            let reason = "both ranks are on one GPU, where NCCL joins none: give each process a GPU of its own";
            return Err(gpu.error(reason));
        }
        Ok(())
    }

    /// This end of a channel, once both ends have called this and bytes have crossed. It is aborted when `watch` learns of
    /// a failure.
    ///
    /// # Errors
    /// Where NCCL fails, the other end does not come, or a process of the run fails.
    pub fn open(
        cuda: &CudaBackend, nccl: &Arc<Nccl>, end: ChannelEnd, invitation: &[u8], watch: &Arc<Watch>,
    ) -> Result<Self, BackendError> {
        let gpu = &cuda.gpu;
        let Invitation { id, .. } = read(gpu, invitation)?;
        // What was freed before is not counted as NCCL's.
        gpu.synchronize()?;
        let (free, _) = gpu.memory_info()?;
        let communicator = Communicator::init(nccl, id, end.rank(), 2, watch, PATIENCE);
        let communicator = communicator.map_err(|error| failed(gpu, &error))?;
        let (stream, is_out_of_step) = (Stream::new(gpu)?, AtomicBool::new(false));
        let line = Line { communicator, stream, end, is_out_of_step, gpu: Arc::clone(gpu) };
        line.probe()?;
        let (left, _) = gpu.memory_info()?;
        let (device, bytes) = (gpu.device, free.saturating_sub(left));
        tracing::info!(%device, ?end, bytes, "opened a channel; NCCL took this much of the GPU");
        Ok(Self { line: Arc::new(line) })
    }
}

impl DeviceChannel<CudaBackend> for NcclChannel {
    fn send(&self, parcel: CudaParcel) -> Result<RowsLayout, BackendError> {
        const OP: &str = "send";
        let (line, parcel) = (&self.line, parcel.into_packed(OP)?);
        if line.end != ChannelEnd::Sender || !Arc::ptr_eq(parcel.gpu(), &line.gpu) {
            return Err(unsupported(OP, "the channel does not lead away from this GPU"));
        }
        parcel.pass_on(line.stream.handle, |address, num_bytes| {
            // SAFETY: the outbox holds these bytes of this GPU until the stream is past this.
            unsafe { line.transfer(address, num_bytes, line.stream.handle) }
        })
    }

    fn receive(&self, layout: RowsLayout) -> Result<CudaParcel, BackendError> {
        if self.line.end != ChannelEnd::Receiver {
            return Err(unsupported("receive", "the channel leads away from this GPU"));
        }
        let is_received = layout.num_bytes() == 0;
        Ok(CudaParcel::Coming(ComingRows { line: Arc::clone(&self.line), layout, is_received }))
    }

    fn check(&self) -> Result<(), BackendError> {
        self.line.check()
    }

    fn close(&self) {
        self.line.communicator.close();
    }
}

impl ComingRows {
    pub(crate) fn layout(&self) -> RowsLayout {
        self.layout
    }

    /// Has the rows written to `to`, where there is room for them, in the order of the compute stream of `cuda`.
    pub(crate) fn receive(mut self, cuda: &CudaBackend, to: CUdeviceptr) -> Result<(), BackendError> {
        let line = Arc::clone(&self.line);
        if !Arc::ptr_eq(&cuda.gpu, &line.gpu) {
            return Err(unsupported("receive", "the channel does not lead to this GPU"));
        }
        line.check()?;
        // SAFETY: the buffer has room for these bytes, and belongs to this GPU; whoever reads or writes it does so on the
        // same stream.
        unsafe { line.transfer(to, self.layout.num_bytes(), line.gpu.stream) }?;
        self.is_received = true;
        Ok(())
    }
}

impl Drop for ComingRows {
    fn drop(&mut self) {
        if !self.is_received {
            self.line.is_out_of_step.store(true, Ordering::Release);
        }
    }
}

impl Line {
    fn check(&self) -> Result<(), BackendError> {
        if self.is_out_of_step.load(Ordering::Acquire) {
            return Err(self
                .gpu
                .error("rows of another process were not received when they came: load the model again"));
        }
        self.communicator.check().map_err(|error| failed(&self.gpu, &error))
    }

    /// Sends or receives, by the end that this is.
    ///
    /// # Safety
    /// `num_bytes` from `address` on are memory of this GPU that nobody else reads or writes until `stream`, one of this
    /// GPU's, is past this.
    unsafe fn transfer(&self, address: CUdeviceptr, num_bytes: usize, stream: CUstream) -> Result<(), BackendError> {
        self.gpu.bind()?;
        let transfer = match self.end {
            ChannelEnd::Sender => Transfer::Send { address, num_bytes, peer: ChannelEnd::Receiver.rank() },
            ChannelEnd::Receiver => Transfer::Recv { address, num_bytes, peer: ChannelEnd::Sender.rank() },
        };
        // SAFETY: as the caller says.
        let enqueued = unsafe { self.communicator.exchange(&[transfer], stream.addr() as u64) };
        enqueued.map_err(|error| failed(&self.gpu, &error))
    }

    /// Sends known bytes and looks whether they arrive. NCCL connects the two GPUs here, so that later transfers are
    /// enqueued without waiting for the other end.
    fn probe(&self) -> Result<(), BackendError> {
        let buffer = Allocation::new(&self.gpu, "a first transfer", PROBE_BYTES)?;
        // Memory is freed once nothing is under way to it.
        self.send_probe(&buffer).inspect_err(|_| self.communicator.close())
    }

    fn send_probe(&self, buffer: &Allocation) -> Result<(), BackendError> {
        let (gpu, stream) = (&self.gpu, self.stream.handle);
        let filling = if self.end == ChannelEnd::Sender { PROBE } else { 0 };
        gpu.bind()?;
        // SAFETY: the allocation has this length, the stream is this GPU's.
        gpu.check(unsafe { cu::cuMemsetD8Async(buffer.address, filling, PROBE_BYTES, stream) })?;
        // SAFETY: as above; nobody else knows the allocation.
        unsafe { self.transfer(buffer.address, PROBE_BYTES, stream) }?;
        let arrived = Event::new(gpu, false)?;
        arrived.record(stream)?;
        let start = Instant::now();
        while !arrived.has_come()? {
            self.check()?;
            if start.elapsed() > PATIENCE {
                return Err(gpu.error(format!("a first transfer did not end within {} s", PATIENCE.as_secs())));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        // One that was aborted has ended too.
        self.check()?;
        let mut bytes = vec![0; PROBE_BYTES];
        gpu.download(buffer.address, &mut bytes)?;
        if bytes.iter().all(|byte| *byte == PROBE) {
            Ok(())
        } else {
            Err(gpu.error("other bytes arrived than were sent in a first transfer"))
        }
    }
}

/// A stream of a channel.
struct Stream {
    handle: CUstream,
    gpu: Arc<Gpu>,
}

// SAFETY: streams may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above, several at a time.
unsafe impl Sync for Stream {}

impl Stream {
    fn new(gpu: &Arc<Gpu>) -> Result<Self, BackendError> {
        gpu.bind()?;
        let mut handle = std::ptr::null_mut();
        let flags = cu::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current; destroyed on drop.
        gpu.check(unsafe { cu::cuStreamCreate(&raw mut handle, flags) })?;
        Ok(Self { handle, gpu: Arc::clone(gpu) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: the stream is this one's own; what is on it still ends before it is gone.
            let _ = unsafe { cu::cuStreamDestroy_v2(self.handle) };
        }
    }
}

fn read(gpu: &Gpu, invitation: &[u8]) -> Result<Invitation, BackendError> {
    Invitation::read(invitation)
        .ok_or_else(|| gpu.error(format!("an invitation to a channel of {} bytes", invitation.len())))
}

/// An error of NCCL as one of the device, with what to do where that is known.
fn failed(gpu: &Gpu, error: &NcclError) -> BackendError {
    match error.hint() {
        Some(hint) => gpu.error(format!("{error}; {hint}")),
        None => gpu.error(error.to_string()),
    }
}
