//! Tokens that the device chose: where the next step reads them, and on their way to the host.

use std::sync::{Arc, Mutex, PoisonError};

use cogvlm_backend::BackendError;
use cudarc::driver::sys::{self as cu, CUdeviceptr};

use crate::device::{Event, Gpu};
use crate::host_copy::Pinned;
use crate::memory::Allocation;

/// Tokens of the rows of one call. Clones share them.
#[derive(Clone)]
pub struct SampledTokens {
    /// `None` for no tokens at all.
    slot: Option<Arc<Slot>>,
    count: usize,
    /// Every token is below.
    pub(crate) vocab_size: usize,
}

/// Memory for the tokens of a call.
struct Slot {
    on_device: Allocation,
    on_host: Pinned,
    /// Comes when they are on the host.
    arrived: Event,
}

/// All slots of a device. Those that nobody holds any more are taken again.
pub(crate) struct TokenSlots {
    gpu: Arc<Gpu>,
    slots: Mutex<Vec<Arc<Slot>>>,
}

/// Tokens that a slot has room for at least.
const LEAST_TOKENS: usize = 64;

impl TokenSlots {
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Self {
        Self { gpu: Arc::clone(gpu), slots: Mutex::default() }
    }

    /// A slot for `count` tokens below `vocab_size`; a new one where all are held or too small, which after the first
    /// steps of a kind does not happen.
    pub(crate) fn take(&self, count: usize, vocab_size: usize) -> Result<SampledTokens, BackendError> {
        if count == 0 {
            return Ok(SampledTokens { slot: None, count, vocab_size });
        }
        let bytes = count.max(LEAST_TOKENS).next_power_of_two() * size_of::<u32>();
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let is_free = |slot: &&Arc<Slot>| Arc::strong_count(slot) == 1 && slot.on_host.length >= bytes;
        let slot = match slots.iter().find(is_free) {
            Some(slot) => Arc::clone(slot),
            None => {
                let slot = Arc::new(Slot {
                    on_device: Allocation::new(&self.gpu, "sampled tokens", bytes)?,
                    on_host: Pinned::new(&self.gpu, bytes)?,
                    arrived: Event::new(&self.gpu, false)?,
                });
                slots.push(Arc::clone(&slot));
                slot
            }
        };
        Ok(SampledTokens { slot: Some(slot), count, vocab_size })
    }

    /// Sends what the compute stream puts into the slot of `tokens` on its way to the host.
    pub(crate) fn bring(&self, tokens: &SampledTokens) -> Result<(), BackendError> {
        let Some(slot) = &tokens.slot else { return Ok(()) };
        self.gpu.bind()?;
        let (from, to) = (slot.on_device.address, slot.on_host.address.cast());
        let bytes = tokens.count * size_of::<u32>();
        // SAFETY: both have room for the tokens, and live until the stream is past the copy (`drop`). Whoever had the
        // slot before has read its tokens, or never will.
        self.gpu.check(unsafe { cu::cuMemcpyDtoHAsync_v2(to, from, bytes, self.gpu.stream) })?;
        slot.arrived.record(self.gpu.stream)
    }
}

impl Drop for TokenSlots {
    fn drop(&mut self) {
        // The slots are freed next, or when their last holder lets go: nothing may be copied to them any more.
        drop(self.gpu.synchronize());
    }
}

impl SampledTokens {
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// Address of the tokens on the device, u32; 0 where there are none.
    pub(crate) fn address(&self) -> CUdeviceptr {
        self.slot.as_ref().map_or(0, |slot| slot.on_device.address)
    }

    /// The tokens, once they are on the host.
    pub(crate) fn wait(&self) -> Result<Vec<u32>, BackendError> {
        let Some(slot) = &self.slot else { return Ok(Vec::new()) };
        slot.arrived.wait()?;
        // SAFETY: pinned memory of that length at least, aligned as the driver aligns it; the copy has ended, and no
        // other is begun while this holds the slot.
        let tokens = unsafe { std::slice::from_raw_parts(slot.on_host.address.cast::<u32>(), self.count) };
        Ok(tokens.to_vec())
    }
}
