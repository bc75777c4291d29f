//! Weights streamed through staging slots by a thread of their own.

use std::ops::Range;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use cogvlm_backend::{Arena, BackendError, HostReadError, StagedSource};
use cogvlm_core::{DType, Device};

use crate::memory::Memory;
use crate::shape::{expect, unsupported};
use crate::weight::{CpuWeight, host_bytes};

/// Every tensor of a slot starts at a multiple of this.
const TENSOR_ALIGNMENT: usize = 256;

/// Staging slots.
pub struct CpuRing {
    slots: Vec<Slot>,
    slot_bytes: usize,
}

struct Slot {
    memory: SlotMemory,
    tensors: Vec<Placed>,
}

/// Who has the memory of a slot.
enum SlotMemory {
    /// The ring, and the weights staged last.
    Here(Arc<Memory>),
    /// The copier, which sends it back.
    Copying(Receiver<Copied>),
    /// Nobody: the copier died with it.
    Lost,
}

/// A tensor of a slot.
#[derive(Clone)]
struct Placed {
    dtype: DType,
    shape: Vec<usize>,
    span: Range<usize>,
}

struct Copied {
    memory: Memory,
    result: Result<(), HostReadError>,
}

struct Job {
    memory: Memory,
    copies: Vec<(StagedSource<CpuWeight>, Range<usize>)>,
    reply: Sender<Copied>,
}

impl CpuRing {
    pub(crate) fn new(arena: &Arena, num_slots: usize, slot_bytes: usize) -> Result<Self, BackendError> {
        const WHAT: &str = "staging slots";
        let num_bytes = num_slots.checked_mul(slot_bytes).and_then(|bytes| u64::try_from(bytes).ok());
        let num_bytes =
            num_bytes.ok_or_else(|| unsupported("staging", format!("{num_slots} slots of {slot_bytes} bytes")))?;
        let lease = Arc::new(arena.lease(WHAT, num_bytes)?);
        let slot = |_| {
            let memory = Memory::under(Arc::clone(&lease), arena, WHAT, slot_bytes)?;
            Ok(Slot { memory: SlotMemory::Here(Arc::new(memory)), tensors: Vec::new() })
        };
        Ok(Self { slots: (0..num_slots).map(slot).collect::<Result<_, BackendError>>()?, slot_bytes })
    }

    /// Hands slot `index` to `copier`.
    pub(crate) fn stage(
        &mut self, copier: &Copier, index: usize, sources: Vec<StagedSource<CpuWeight>>,
    ) -> Result<(), BackendError> {
        let slot_bytes = self.slot_bytes;
        let tensors = place(&sources, slot_bytes)?;
        let slot = self.slot("stage", index)?;
        // A failure of the copy before this one is of no interest any more.
        let _ = slot.settle(copier.device);
        let memory = match std::mem::replace(&mut slot.memory, SlotMemory::Lost) {
            SlotMemory::Here(memory) => Arc::try_unwrap(memory).map_err(|memory| {
                slot.memory = SlotMemory::Here(memory);
                unsupported("stage", format!("weights of slot {index} are still held; drop them first"))
            })?,
            SlotMemory::Copying(_) | SlotMemory::Lost => return Err(copier_died(copier.device)),
        };
        let (reply, receiver) = mpsc::channel();
        let copies = sources.into_iter().zip(tensors.iter().map(|tensor| tensor.span.clone())).collect();
        slot.tensors = tensors;
        slot.memory = SlotMemory::Copying(receiver);
        copier.send(Job { memory, copies, reply })
    }

    /// Waits for slot `index`, and gives its weights.
    pub(crate) fn staged(&mut self, device: Device, index: usize) -> Result<Vec<CpuWeight>, BackendError> {
        let slot = self.slot("staged", index)?;
        slot.settle(device)?;
        let SlotMemory::Here(memory) = &slot.memory else { return Err(copier_died(device)) };
        let weight =
            |tensor: &Placed| CpuWeight::in_slot(memory, tensor.dtype, tensor.shape.clone(), tensor.span.clone());
        Ok(slot.tensors.iter().map(weight).collect())
    }

    fn slot(&mut self, op: &'static str, index: usize) -> Result<&mut Slot, BackendError> {
        let num_slots = self.slots.len();
        self.slots.get_mut(index).ok_or_else(|| unsupported(op, format!("slot {index} of a ring of {num_slots}")))
    }
}

impl Slot {
    /// Waits until nobody copies into it.
    fn settle(&mut self, device: Device) -> Result<(), BackendError> {
        let SlotMemory::Copying(receiver) = &self.memory else { return Ok(()) };
        let Ok(copied) = receiver.recv() else {
            self.memory = SlotMemory::Lost;
            return Err(copier_died(device));
        };
        self.memory = SlotMemory::Here(Arc::new(copied.memory));
        if copied.result.is_err() {
            self.tensors.clear();
        }
        copied.result.map_err(BackendError::from)
    }
}

/// Where each tensor goes.
fn place(sources: &[StagedSource<CpuWeight>], slot_bytes: usize) -> Result<Vec<Placed>, BackendError> {
    let mut end = 0usize;
    let mut place = |source: &StagedSource<CpuWeight>| {
        let (dtype, shape, num_bytes) = match source {
            StagedSource::Host(host) => (host.dtype(), host.shape().to_vec(), host_bytes("stage", &**host)?),
            StagedSource::Peer(weight) => (weight.dtype(), weight.shape().to_vec(), weight.bytes().len()),
        };
        let start = end.next_multiple_of(TENSOR_ALIGNMENT);
        let fits = start <= slot_bytes && num_bytes <= slot_bytes - start;
        expect("stage", "sources", &shape, fits, || format!("tensors that fit into a slot of {slot_bytes} bytes"))?;
        end = start + num_bytes;
        Ok(Placed { dtype, shape, span: start..end })
    };
    sources.iter().map(&mut place).collect()
}

fn copier_died(device: Device) -> BackendError {
    BackendError::Device { device, reason: "the thread that streams weights ended early".to_owned() }
}

/// The thread that copies; started by the first job, ended on drop.
pub(crate) struct Copier {
    device: Device,
    thread: Mutex<Option<(Sender<Job>, JoinHandle<()>)>>,
}

impl Copier {
    pub(crate) fn new(device: Device) -> Self {
        Self { device, thread: Mutex::new(None) }
    }

    fn send(&self, job: Job) -> Result<(), BackendError> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_none() {
            let (sender, jobs) = mpsc::channel();
            let builder = thread::Builder::new().name(format!("copier-{}", self.device));
            let handle = builder.spawn(move || copy_all(&jobs)).map_err(|error| {
                let reason = format!("cannot start the thread that streams weights: {error}");
                BackendError::Device { device: self.device, reason }
            })?;
            *thread = Some((sender, handle));
        }
        match thread.as_ref().map(|(sender, _)| sender.send(job)) {
            Some(Ok(())) => Ok(()),
            _ => Err(copier_died(self.device)),
        }
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((sender, handle)) = thread {
            drop(sender);
            // It cannot be told apart here whether it panicked; those who wait for it learn of it.
            let _ = handle.join();
        }
    }
}

fn copy_all(jobs: &Receiver<Job>) {
    for Job { mut memory, copies, reply } in jobs {
        let bytes = memory.slice_mut::<u8>();
        let mut copy = |(source, span): (StagedSource<CpuWeight>, Range<usize>)| match source {
            StagedSource::Host(host) => host.read_into(&mut bytes[span]),
            StagedSource::Peer(weight) => {
                bytes[span].copy_from_slice(weight.bytes());
                Ok(())
            }
        };
        let result = copies.into_iter().try_for_each(&mut copy);
        // The ring may be gone: then nobody waits.
        let _ = reply.send(Copied { memory, result });
    }
}
