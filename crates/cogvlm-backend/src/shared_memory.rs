//! Host memory that several devices of a process use as one buffer.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytemuck::{Pod, Zeroable};

use crate::arena::{Arena, Lease};
use crate::error::BackendError;

/// What the memory consists of, so that a driver can lock it page by page.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// Zeroed bytes in whole pages of their own, taken from an arena for as long as anybody holds them. Clones share them.
///
/// Operations of the host hold the bytes while they use them, and so come one after the other. A GPU that reads and
/// writes the memory at its address asks nobody: that no operation uses what another device is still writing is seen to
/// by whoever gives both their steps.
#[derive(Clone)]
pub struct SharedMemory(Arc<Inner>);

struct Inner {
    pages: RwLock<Pages>,
    address: usize,
    num_bytes: usize,
    _lease: Lease,
}

/// The bytes, held.
pub struct Pages {
    pages: Box<[Page]>,
    num_bytes: usize,
}

impl SharedMemory {
    /// Takes `num_bytes` from `arena` for `what`.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] where the arena, [`BackendError::Device`] where the system has too little left.
    pub fn take(arena: &Arena, what: &str, num_bytes: usize) -> Result<Self, BackendError> {
        let lease = arena.lease(what, num_bytes as u64)?;
        let num_pages = num_bytes.div_ceil(size_of::<Page>());
        let mut pages: Box<[Page]> = bytemuck::allocation::try_zeroed_slice_box(num_pages).map_err(|()| {
            let reason = format!("the system has no {num_bytes} bytes left for {what}; lower the device's budget");
            BackendError::Device { device: arena.device(), reason }
        })?;
        let address = pages.as_mut_ptr().expose_provenance();
        let pages = RwLock::new(Pages { pages, num_bytes });
        Ok(Self(Arc::new(Inner { pages, address, num_bytes, _lease: lease })))
    }

    /// Address of the first byte, at which they lie as long as anybody holds this.
    pub fn address(&self) -> usize {
        self.0.address
    }

    /// Bytes of the whole pages that they lie in.
    pub fn num_page_bytes(&self) -> usize {
        self.0.num_bytes.next_multiple_of(size_of::<Page>())
    }

    /// Holds the bytes for reading.
    pub fn read(&self) -> RwLockReadGuard<'_, Pages> {
        self.0.pages.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds the bytes for writing.
    pub fn write(&self) -> RwLockWriteGuard<'_, Pages> {
        self.0.pages.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pages {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.pages)[..self.num_bytes]
    }

    /// The bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.pages)[..self.num_bytes]
    }
}

#[cfg(test)]
mod tests {
    use cogvlm_core::Device;

    use super::*;

    #[test]
    fn clones_are_the_same_pages_and_give_them_back_together() {
        let arena = Arena::new(Device::Cpu, 10_000);
        let memory = SharedMemory::take(&arena, "KV cache", 5000).unwrap();
        let other = memory.clone();
        memory.write().bytes_mut()[4999] = 7;
        assert_eq!((other.read().bytes().len(), other.read().bytes()[4999]), (5000, 7));
        assert_eq!((memory.address() % 4096, memory.num_page_bytes()), (0, 8192));
        assert_eq!(memory.address(), other.read().bytes().as_ptr().addr());
        drop(memory);
        assert_eq!(arena.memory().in_use, 5000);
        assert!(SharedMemory::take(&arena, "KV cache", 5001).is_err());
        drop(other);
        assert_eq!(arena.memory().in_use, 0);
    }
}
