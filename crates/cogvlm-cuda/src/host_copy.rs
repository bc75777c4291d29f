//! Small copies from the host that nobody waits for.

use std::sync::{Arc, Mutex, PoisonError};

use cogvlm_backend::BackendError;
use cudarc::driver::sys::{self as cu, CUdeviceptr};

use crate::device::{Event, Gpu};

/// Bytes of one pinned slot.
const SLOT_BYTES: usize = 1 << 20;
/// Slots; a copy waits where all of them are under way.
const NUM_SLOTS: usize = 4;

/// Pinned host memory.
pub(crate) struct Pinned {
    gpu: Arc<Gpu>,
    pub(crate) address: *mut u8,
    pub(crate) length: usize,
}

// SAFETY: plain memory; who has it decides who writes to it.
unsafe impl Send for Pinned {}

impl Pinned {
    pub(crate) fn new(gpu: &Arc<Gpu>, length: usize) -> Result<Self, BackendError> {
        gpu.bind()?;
        let mut address = std::ptr::null_mut();
        // SAFETY: the pointer is to a local variable; freed on drop. 1 is CU_MEMHOSTALLOC_PORTABLE.
        let result = unsafe { cu::cuMemHostAlloc(&raw mut address, length, 1) };
        crate::driver::check(result)
            .map_err(|reason| gpu.error(format!("{length} bytes of pinned host memory: {reason}")))?;
        Ok(Self { gpu: Arc::clone(gpu), address: address.cast(), length })
    }

    pub(crate) fn slice_mut(&mut self) -> &mut [u8] {
        // SAFETY: allocated by `new` with this length, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.length) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: allocated by `new`; owners wait for copies from it before they drop it.
            let _ = unsafe { cu::cuMemFreeHost(self.address.cast()) };
        }
    }
}

/// Copies bytes to the device through pinned slots, in the order of the compute stream.
pub(crate) struct Uploader {
    gpu: Arc<Gpu>,
    slots: Mutex<Slots>,
}

struct Slots {
    slots: Vec<(Pinned, Event)>,
    next: usize,
}

impl Uploader {
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<Self, BackendError> {
        let slot = || Ok((Pinned::new(gpu, SLOT_BYTES)?, Event::new(gpu, false)?));
        let slots = (0..NUM_SLOTS).map(|_| slot()).collect::<Result<_, BackendError>>()?;
        Ok(Self { gpu: Arc::clone(gpu), slots: Mutex::new(Slots { slots, next: 0 }) })
    }

    /// Copies `bytes` to `to`, which has room for them. They may be changed as soon as this returns.
    pub(crate) fn upload(&self, to: CUdeviceptr, bytes: &[u8]) -> Result<(), BackendError> {
        self.gpu.bind()?;
        let mut guard = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let Slots { slots, next } = &mut *guard;
        for (index, piece) in bytes.chunks(SLOT_BYTES).enumerate() {
            let (pinned, free) = &mut slots[*next];
            *next = (*next + 1) % NUM_SLOTS;
            free.wait()?;
            pinned.slice_mut()[..piece.len()].copy_from_slice(piece);
            let to = to + (index * SLOT_BYTES) as CUdeviceptr;
            // SAFETY: the caller vouches for the destination; the slot is not written before its event has come.
            let result = unsafe {
                cu::cuMemcpyHtoDAsync_v2(to, pinned.address.cast_const().cast(), piece.len(), self.gpu.stream)
            };
            self.gpu.check(result)?;
            free.record(self.gpu.stream)?;
        }
        Ok(())
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        // The slots are freed next: nothing may still be copied from them.
        drop(self.gpu.synchronize());
    }
}
