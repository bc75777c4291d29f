//! Memory of a device: one allocation of planned size, handed out in pieces.

use std::sync::{Arc, Mutex, PoisonError};

use cogvlm_backend::shape::unsupported;
use cogvlm_backend::{Arena, BackendError, Lease, MemoryUse};
use cudarc::driver::sys::{self as cu, CUdeviceptr};

use crate::device::Gpu;

/// Every piece starts at a multiple of this: what TMA and vector loads ask for, and what a plan rounds staging to.
pub(crate) const ALIGNMENT: usize = 256;

/// Bytes beyond the arena's capacity, for the rounding of small pieces. Part of the plan's reserve.
const ROUNDING_BYTES: u64 = 4 << 20;

/// An allocation of the driver, outside of the arena.
pub(crate) struct Allocation {
    gpu: Arc<Gpu>,
    pub(crate) address: CUdeviceptr,
}

impl Allocation {
    /// `bytes` of the device's memory for `what`.
    pub(crate) fn new(gpu: &Arc<Gpu>, what: &str, bytes: usize) -> Result<Self, BackendError> {
        gpu.bind()?;
        let mut address = 0;
        // SAFETY: the pointer is to a local variable; freed on drop.
        let result = unsafe { cu::cuMemAlloc_v2(&raw mut address, bytes.max(1)) };
        crate::driver::check(result).map_err(|reason| {
            let free = gpu.memory_info().map_or(0, |(free, _)| free);
            let text = cogvlm_core::memory::format_bytes;
            gpu.error(format!("{} for {what}, of which {} are free: {reason}", text(bytes as u64), text(free)))
        })?;
        Ok(Self { gpu: Arc::clone(gpu), address })
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: allocated by `new`. Freeing waits for what still uses it.
            let _ = unsafe { cu::cuMemFree_v2(self.address) };
        }
    }
}

/// The arena of a device: its count, and the allocation that it counts.
pub(crate) struct DeviceArena {
    pub(crate) gpu: Arc<Gpu>,
    counters: Arena,
    pool: Arc<Pool>,
}

struct Pool {
    allocation: Allocation,
    /// Free spans as offset and length, by offset, no two of them adjoining.
    free: Mutex<Vec<(usize, usize)>>,
}

/// A piece of an arena; goes back on drop. What the stream still does with it is done before whatever is given to the
/// stream for its next owner.
pub(crate) struct Memory {
    pub(crate) address: CUdeviceptr,
    offset: usize,
    length: usize,
    pool: Arc<Pool>,
    _lease: Arc<Lease>,
}

impl DeviceArena {
    pub(crate) fn new(gpu: &Arc<Gpu>, capacity: u64) -> Result<Self, BackendError> {
        let length = (capacity + ROUNDING_BYTES).next_multiple_of(ALIGNMENT as u64) as usize;
        let allocation = Allocation::new(gpu, "the arena", length)?;
        let pool = Pool { allocation, free: Mutex::new(vec![(0, length)]) };
        Ok(Self { gpu: Arc::clone(gpu), counters: Arena::new(gpu.device, capacity), pool: Arc::new(pool) })
    }

    pub(crate) fn memory(&self) -> MemoryUse {
        self.counters.memory()
    }

    /// `bytes` for `what`, as they happen to be.
    pub(crate) fn take(&self, what: &str, bytes: usize) -> Result<Memory, BackendError> {
        let lease = self.counters.lease(what, bytes as u64)?;
        self.place(what, bytes, &Arc::new(lease))
    }

    /// `count` pieces of `bytes` each for `what`, counted as one.
    pub(crate) fn take_slots(&self, what: &str, count: usize, bytes: usize) -> Result<Vec<Memory>, BackendError> {
        let total = count.checked_mul(bytes).and_then(|total| u64::try_from(total).ok());
        let total = total.ok_or_else(|| unsupported("staging", format!("{count} slots of {bytes} bytes")))?;
        let lease = Arc::new(self.counters.lease(what, total)?);
        (0..count).map(|_| self.place(what, bytes, &lease)).collect()
    }

    /// Finds room for `bytes` that `lease` covers.
    fn place(&self, what: &str, bytes: usize, lease: &Arc<Lease>) -> Result<Memory, BackendError> {
        let length = bytes.max(1).next_multiple_of(ALIGNMENT);
        let mut free = self.pool.free.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(index) = free.iter().position(|(_, available)| *available >= length) else {
            let MemoryUse { capacity, in_use, .. } = self.counters.memory();
            let (device, what, in_use) = (self.gpu.device, what.to_owned(), in_use - bytes as u64);
            return Err(BackendError::OutOfMemory { device, what, requested: bytes as u64, in_use, capacity });
        };
        let offset = free[index].0;
        free[index] = (offset + length, free[index].1 - length);
        if free[index].1 == 0 {
            free.remove(index);
        }
        drop(free);
        let address = self.pool.allocation.address + offset as CUdeviceptr;
        Ok(Memory { address, offset, length, pool: Arc::clone(&self.pool), _lease: Arc::clone(lease) })
    }
}

impl Memory {
    /// The device that it is memory of.
    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.pool.allocation.gpu
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let mut free = self.pool.free.lock().unwrap_or_else(PoisonError::into_inner);
        let index = free.partition_point(|(offset, _)| *offset < self.offset);
        free.insert(index, (self.offset, self.length));
        for index in [index, index.saturating_sub(1)] {
            if let (Some(&(offset, length)), Some(&(next, next_length))) = (free.get(index), free.get(index + 1))
                && offset + length == next
            {
                free[index].1 = length + next_length;
                free.remove(index + 1);
            }
        }
    }
}
