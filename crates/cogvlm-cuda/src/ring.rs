//! Weights streamed through staging slots, on the copy stream, by a thread of the ring.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};

use cogvlm_backend::shape::{expect, unsupported};
use cogvlm_backend::{BackendError, StagedSource};
use cogvlm_core::DType;
use cudarc::driver::sys::CUdeviceptr;

use crate::backend::CudaBackend;
use crate::device::{Event, Gpu};
use crate::host_copy::{Loader, Queue, num_elements};
use crate::memory::{ALIGNMENT, Memory};
use crate::ops::load::{convert_in_place, device_dtype};
use crate::weight::CudaWeight;

/// Staging slots.
pub struct CudaRing {
    gpu: Arc<Gpu>,
    loader: Arc<Loader>,
    slots: Vec<Slot>,
    slot_bytes: usize,
    /// Begun by the first job.
    copier: Option<(Sender<Job>, JoinHandle<()>)>,
}

struct Slot {
    /// Also held by the weights that were staged last.
    memory: Arc<Memory>,
    tensors: Vec<Placed>,
    state: State,
    /// Comes when the operations are done that used what the slot held before.
    free: Arc<Event>,
    /// Comes when the copies are done.
    copied: Arc<Event>,
    /// What is copied from other devices, kept until it is copied.
    peers: Vec<CudaWeight>,
}

/// How far a slot is.
enum State {
    /// The copier is at it, and says when it has given all copies to the stream.
    Copying(Receiver<Result<(), BackendError>>),
    /// All copies are with the copy stream; the compute stream knows nothing of them.
    Copied,
    /// For the compute stream it is there.
    There,
}

/// A tensor of a slot.
#[derive(Clone)]
struct Placed {
    /// As it comes.
    stored: DType,
    shape: Vec<usize>,
    count: usize,
    offset: usize,
}

struct Job {
    /// The ring keeps the memory that these addresses are of until the job is answered.
    copies: Vec<(StagedSource<CudaWeight>, Placed, CUdeviceptr)>,
    free: Arc<Event>,
    copied: Arc<Event>,
    reply: Sender<Result<(), BackendError>>,
}

impl CudaRing {
    pub(crate) fn new(cuda: &CudaBackend, num_slots: usize, slot_bytes: usize) -> Result<Self, BackendError> {
        let memories = cuda.arena.take_slots("staging slots", num_slots, slot_bytes)?;
        let slot = |memory| {
            let [free, copied] = [Event::new(&cuda.gpu, false)?, Event::new(&cuda.gpu, false)?].map(Arc::new);
            let (memory, tensors, peers) = (Arc::new(memory), Vec::new(), Vec::new());
            Ok(Slot { memory, tensors, state: State::There, free, copied, peers })
        };
        let slots = memories.into_iter().map(slot).collect::<Result<_, BackendError>>()?;
        let (gpu, loader) = (Arc::clone(&cuda.gpu), Arc::clone(&cuda.loader));
        Ok(Self { gpu, loader, slots, slot_bytes, copier: None })
    }

    /// Hands slot `index` to the copier.
    pub(crate) fn stage(
        &mut self, cuda: &CudaBackend, index: usize, sources: Vec<StagedSource<CudaWeight>>,
    ) -> Result<(), BackendError> {
        let tensors = place(&sources, self.slot_bytes)?;
        let copier = self.copier()?;
        let slot = self.slot("stage", index)?;
        // A failure of the copy before this one is of no interest any more.
        drop(slot.settle());
        if Arc::strong_count(&slot.memory) > 1 {
            return Err(unsupported("stage", format!("weights of slot {index} are still held; drop them first")));
        }
        if !slot.peers.is_empty() {
            // Their devices may give their memory to others as soon as nobody holds them.
            slot.copied.wait()?;
            slot.peers.clear();
        }
        // All operations on what the slot holds are with the compute stream: nobody holds it any more.
        slot.free.record(cuda.gpu.stream)?;
        slot.peers.extend(sources.iter().filter_map(|source| match source {
            StagedSource::Peer(weight) => Some(weight.clone()),
            StagedSource::Host(_) => None,
        }));
        let base = slot.memory.address;
        let copies = sources.into_iter().zip(&tensors);
        let copies = copies.map(|(source, tensor)| (source, tensor.clone(), base + tensor.offset as CUdeviceptr));
        let (reply, receiver) = mpsc::channel();
        let (free, copied) = (Arc::clone(&slot.free), Arc::clone(&slot.copied));
        let job = Job { copies: copies.collect(), free, copied, reply };
        slot.tensors = tensors;
        slot.state = State::Copying(receiver);
        // Where the copier has died, so has its end of the reply: whoever waits for the slot learns of it.
        drop(copier.send(job));
        Ok(())
    }

    /// The weights of slot `index`, for operations that are called from now on.
    pub(crate) fn staged(&mut self, cuda: &CudaBackend, index: usize) -> Result<Vec<CudaWeight>, BackendError> {
        let slot = self.slot("staged", index)?;
        slot.settle().unwrap_or_else(|| Err(copier_died(&cuda.gpu)))?;
        let base = slot.memory.address;
        if matches!(slot.state, State::Copied) {
            slot.copied.hold(cuda.gpu.stream)?;
            for Placed { stored, count, offset, .. } in &slot.tensors {
                if device_dtype(cuda.activations, *stored) != *stored {
                    // SAFETY: that many elements were copied there, and the compute stream waits for them.
                    unsafe { convert_in_place(cuda, *stored, base + *offset as CUdeviceptr, *count) }?;
                }
            }
            slot.state = State::There;
        }
        let weight = |tensor: &Placed| {
            let dtype = device_dtype(cuda.activations, tensor.stored);
            CudaWeight::staged(dtype, tensor.shape.clone(), base + tensor.offset as CUdeviceptr, &slot.memory)
        };
        Ok(slot.tensors.iter().map(weight).collect())
    }

    fn slot(&mut self, op: &'static str, index: usize) -> Result<&mut Slot, BackendError> {
        let num_slots = self.slots.len();
        self.slots.get_mut(index).ok_or_else(|| unsupported(op, format!("slot {index} of a ring of {num_slots}")))
    }

    /// Where jobs are sent to.
    fn copier(&mut self) -> Result<Sender<Job>, BackendError> {
        if let Some((jobs, _)) = &self.copier {
            return Ok(jobs.clone());
        }
        let (sender, jobs) = mpsc::channel();
        let (gpu, loader) = (Arc::clone(&self.gpu), Arc::clone(&self.loader));
        let builder = thread::Builder::new().name(format!("copier-{}", gpu.device));
        let thread = builder.spawn(move || copy_all(&gpu, &loader, &jobs));
        let thread =
            thread.map_err(|error| self.gpu.error(format!("cannot start the thread that streams weights: {error}")))?;
        self.copier = Some((sender.clone(), thread));
        Ok(sender)
    }
}

impl Drop for CudaRing {
    fn drop(&mut self) {
        if let Some((jobs, thread)) = self.copier.take() {
            drop(jobs);
            // Whether it panicked is told to those who wait for a slot.
            drop(thread.join());
            // The slots and what they are copied from go to others next.
            drop(Event::new(&self.gpu, false).and_then(|event| {
                event.record(self.gpu.copy_stream)?;
                event.wait()
            }));
        }
    }
}

impl Slot {
    /// Waits until the copier is done with it, and gives what came of it; `None` where the copier died.
    fn settle(&mut self) -> Option<Result<(), BackendError>> {
        let State::Copying(receiver) = &self.state else { return Some(Ok(())) };
        let outcome = receiver.recv().ok();
        self.state = State::Copied;
        if !matches!(outcome, Some(Ok(()))) {
            self.tensors.clear();
        }
        outcome
    }
}

/// Where each tensor goes.
fn place(sources: &[StagedSource<CudaWeight>], slot_bytes: usize) -> Result<Vec<Placed>, BackendError> {
    let mut end = 0_usize;
    let mut place = |source: &StagedSource<CudaWeight>| {
        let (stored, shape, count) = match source {
            StagedSource::Host(host) => (host.dtype(), host.shape().to_vec(), num_elements("stage", host)?),
            StagedSource::Peer(weight) if weight.loaded().is_some() => {
                (weight.dtype(), weight.shape().to_vec(), weight.shape().iter().product())
            }
            StagedSource::Peer(_) => {
                return Err(unsupported("stage", "a peer's weight has to be loaded onto it, not attached or staged"));
            }
        };
        let num_bytes = count * stored.size_bytes();
        let offset = end.next_multiple_of(ALIGNMENT);
        let fits = offset <= slot_bytes && num_bytes <= slot_bytes - offset;
        expect("stage", "sources", &shape, fits, || format!("tensors that fit into a slot of {slot_bytes} bytes"))?;
        end = offset + num_bytes;
        Ok(Placed { stored, shape, count, offset })
    };
    sources.iter().map(&mut place).collect()
}

fn copier_died(gpu: &Gpu) -> BackendError {
    gpu.error("the thread that streams weights ended early")
}

/// The copier: gives the copies of each job to the copy stream.
fn copy_all(gpu: &Gpu, loader: &Loader, jobs: &Receiver<Job>) {
    for Job { copies, free, copied, reply } in jobs {
        let mut result = free.hold(gpu.copy_stream);
        for (source, tensor, to) in &copies {
            result = result.and_then(|()| copy(gpu, loader, source, tensor, *to));
        }
        // Also after a failure: what was begun is waited for before its sources go.
        let recorded = copied.record(gpu.copy_stream);
        // The ring may be gone: then nobody waits.
        drop(reply.send(result.and(recorded)));
    }
}

fn copy(
    gpu: &Gpu, loader: &Loader, source: &StagedSource<CudaWeight>, tensor: &Placed, to: CUdeviceptr,
) -> Result<(), BackendError> {
    let num_bytes = tensor.count * tensor.stored.size_bytes();
    match source {
        // SAFETY: the tensor was given that many bytes of a slot, which the ring keeps until this stream is past the
        // copy; nobody else uses them until then.
        StagedSource::Host(host) => unsafe { loader.copy(host, 0..num_bytes, to, Queue::Copy) },
        StagedSource::Peer(weight) => {
            let Some((memory, loaded)) = weight.loaded() else { return Ok(()) };
            loaded.hold(gpu.copy_stream)?;
            // SAFETY: the weight has that many bytes, and the slot keeps it until it is copied; else as above.
            unsafe { gpu.copy_from_peer(memory.gpu(), memory.address, to, num_bytes, gpu.copy_stream) }
        }
    }
}
