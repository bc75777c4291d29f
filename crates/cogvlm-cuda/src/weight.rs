//! Weights in the memory of a device.

use std::sync::Arc;

use cogvlm_backend::shape::unsupported;
use cogvlm_backend::{BackendError, HostWeight};
use cogvlm_core::DType;
use cudarc::driver::sys::CUdeviceptr;

use crate::device::Event;
use crate::memory::Memory;

/// A weight on the device, or one that rests on the host and is only looked up there.
#[derive(Clone)]
pub struct CudaWeight {
    inner: Arc<Inner>,
}

struct Inner {
    dtype: DType,
    shape: Vec<usize>,
    place: Place,
}

enum Place {
    /// In a piece of the arena of its own.
    Resident {
        memory: Memory,
        /// Comes when it is loaded.
        loaded: Event,
    },
    /// In a staging slot, which is filled again later.
    Staged {
        address: CUdeviceptr,
        /// Who holds this holds the slot.
        _slot: Arc<Memory>,
    },
    /// On the host.
    Attached(HostWeight),
}

impl CudaWeight {
    /// A weight that `memory` holds once `loaded` has come.
    pub(crate) fn resident(dtype: DType, shape: Vec<usize>, memory: Memory, loaded: Event) -> Self {
        Self::new(dtype, shape, Place::Resident { memory, loaded })
    }

    pub(crate) fn staged(dtype: DType, shape: Vec<usize>, address: CUdeviceptr, slot: &Arc<Memory>) -> Self {
        Self::new(dtype, shape, Place::Staged { address, _slot: Arc::clone(slot) })
    }

    pub(crate) fn attached(host: &HostWeight) -> Self {
        Self::new(host.dtype(), host.shape().to_vec(), Place::Attached(HostWeight::clone(host)))
    }

    fn new(dtype: DType, shape: Vec<usize>, place: Place) -> Self {
        Self { inner: Arc::new(Inner { dtype, shape, place }) }
    }

    pub(crate) fn dtype(&self) -> DType {
        self.inner.dtype
    }

    pub(crate) fn shape(&self) -> &[usize] {
        &self.inner.shape
    }

    /// Its address on the device; an error where it rests on the host.
    pub(crate) fn address(&self, op: &'static str, argument: &'static str) -> Result<CUdeviceptr, BackendError> {
        match &self.inner.place {
            Place::Resident { memory, .. } => Ok(memory.address),
            Place::Staged { address, .. } => Ok(*address),
            Place::Attached(host) => Err(unsupported(
                op,
                format!("`{argument}` ({}) rests in host memory, where a GPU only looks up rows", host.name()),
            )),
        }
    }

    /// Whether it never changes while the backend runs, so that a kernel may read it before the kernel before it ended.
    pub(crate) fn is_stable(&self) -> bool {
        matches!(self.inner.place, Place::Resident { .. })
    }

    /// Its memory, and the event that comes when it is loaded; `None` where it rests elsewhere.
    pub(crate) fn loaded(&self) -> Option<(&Memory, &Event)> {
        match &self.inner.place {
            Place::Resident { memory, loaded } => Some((memory, loaded)),
            _ => None,
        }
    }

    /// Where it rests, if on the host.
    pub(crate) fn host(&self) -> Option<&HostWeight> {
        match &self.inner.place {
            Place::Attached(host) => Some(host),
            _ => None,
        }
    }
}
