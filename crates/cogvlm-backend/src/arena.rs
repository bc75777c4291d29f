//! The memory of one device, as much as its plan gives it and no more.

use std::sync::{Arc, Mutex, PoisonError};

use cogvlm_core::Device;

use crate::error::BackendError;

/// What an arena holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUse {
    /// Bytes it may hold.
    pub capacity: u64,
    /// Bytes it holds now.
    pub in_use: u64,
    /// The most it has held.
    pub peak: u64,
}

/// Keeps count of a device's memory and refuses what exceeds its capacity. Clones count together.
#[derive(Debug, Clone)]
pub struct Arena {
    device: Device,
    counters: Arc<Mutex<MemoryUse>>,
}

/// Bytes taken from an arena; given back on drop.
#[derive(Debug)]
pub struct Lease {
    bytes: u64,
    counters: Arc<Mutex<MemoryUse>>,
}

impl Arena {
    /// An empty arena of `capacity` bytes for `device`.
    pub fn new(device: Device, capacity: u64) -> Self {
        Self { device, counters: Arc::new(Mutex::new(MemoryUse { capacity, in_use: 0, peak: 0 })) }
    }

    /// Takes `bytes` for `what`.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] where the arena has less left; nothing is taken then.
    pub fn lease(&self, what: &str, bytes: u64) -> Result<Lease, BackendError> {
        let mut counters = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
        let MemoryUse { capacity, in_use, .. } = *counters;
        if bytes > capacity - in_use {
            let (device, what) = (self.device, what.to_owned());
            return Err(BackendError::OutOfMemory { device, what, requested: bytes, in_use, capacity });
        }
        counters.in_use += bytes;
        counters.peak = counters.peak.max(counters.in_use);
        Ok(Lease { bytes, counters: Arc::clone(&self.counters) })
    }

    /// The device whose memory it is.
    pub fn device(&self) -> Device {
        self.device
    }

    /// What it holds now, held at most, and may hold.
    pub fn memory(&self) -> MemoryUse {
        *self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.counters.lock().unwrap_or_else(PoisonError::into_inner).in_use -= self.bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arena_refuses_what_exceeds_it_and_takes_back_what_is_dropped() {
        let arena = Arena::new(Device::Gpu(1), 100);
        let first = arena.lease("weights", 60).unwrap();
        let error = arena.lease("KV cache", 41).unwrap_err();
        assert_eq!(error.to_string(), "KV cache needs 41 B on device 1, whose arena has 40 B of 100 B left");
        let second = arena.lease("KV cache", 40).unwrap();
        drop(first);
        assert_eq!(arena.memory(), MemoryUse { capacity: 100, in_use: 40, peak: 100 });
        drop(second);
        assert_eq!(arena.memory().in_use, 0);
    }
}
