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
    free: Mutex<Spans>,
}

/// Spans that nobody has, as offset and length, by offset, no two of them adjoining.
pub(crate) struct Spans(Vec<(usize, usize)>);

impl Spans {
    /// One span of `length`.
    pub(crate) fn of(length: usize) -> Self {
        Self(vec![(0, length)])
    }

    /// Takes `length` from the first span that has it; gives its offset.
    pub(crate) fn take(&mut self, length: usize) -> Option<usize> {
        let index = self.0.iter().position(|(_, available)| *available >= length)?;
        let (offset, available) = self.0[index];
        if available == length {
            self.0.remove(index);
        } else {
            self.0[index] = (offset + length, available - length);
        }
        Some(offset)
    }

    /// Takes back what `take` gave.
    pub(crate) fn give_back(&mut self, offset: usize, length: usize) {
        let index = self.0.partition_point(|(free, _)| *free < offset);
        self.0.insert(index, (offset, length));
        // With what follows first, so that `index` stays right.
        for index in [index, index.wrapping_sub(1)] {
            if let (Some(&(offset, length)), Some(&(next, next_length))) =
                (self.0.get(index), self.0.get(index.wrapping_add(1)))
                && offset + length == next
            {
                self.0[index].1 = length + next_length;
                self.0.remove(index + 1);
            }
        }
    }
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
        let pool = Pool { allocation, free: Mutex::new(Spans::of(length)) };
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
        let Some(offset) = free.take(length) else {
            let MemoryUse { capacity, in_use, .. } = self.counters.memory();
            let (device, what, in_use) = (self.gpu.device, what.to_owned(), in_use - bytes as u64);
            return Err(BackendError::OutOfMemory { device, what, requested: bytes as u64, in_use, capacity });
        };
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
        free.give_back(self.offset, self.length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_join_again_in_any_order() {
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let mut spans = Spans(vec![(0, 100)]);
            let taken = [30, 20, 40].map(|length| (spans.take(length).expect("there is room"), length));
            assert_eq!(taken, [(0, 30), (30, 20), (50, 40)]);
            assert_eq!(spans.take(11), None);
            for index in order {
                spans.give_back(taken[index].0, taken[index].1);
            }
            assert_eq!(spans.0, [(0, 100)], "{order:?}");
        }
    }

    #[test]
    fn no_two_owners_share_a_byte() {
        let mut spans = Spans(vec![(0, 4096)]);
        let mut state = 1_u64;
        let mut owned: Vec<(usize, usize)> = Vec::new();
        for _ in 0..5000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (choice, length) = ((state >> 33) as usize, (state >> 40) as usize % 200 + 1);
            if choice % 3 > 0 {
                if let Some(offset) = spans.take(length) {
                    let apart = |&(other, other_length): &(usize, usize)| {
                        offset + length <= other || other + other_length <= offset
                    };
                    assert!(offset + length <= 4096 && owned.iter().all(apart), "{offset} {length} {owned:?}");
                    owned.push((offset, length));
                }
            } else if !owned.is_empty() {
                let (offset, length) = owned.swap_remove(choice % owned.len());
                spans.give_back(offset, length);
            }
            let free: usize = spans.0.iter().map(|(_, length)| length).sum();
            let held: usize = owned.iter().map(|(_, length)| length).sum();
            assert_eq!(free + held, 4096);
            assert!(spans.0.windows(2).all(|pair| pair[0].0 + pair[0].1 < pair[1].0), "{:?}", spans.0);
        }
    }
}
