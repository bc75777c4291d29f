//! Weights streamed through staging slots on the copy stream.

use cogvlm_backend::shape::unsupported;
use cogvlm_backend::{BackendError, StagedSource};

use crate::backend::CudaBackend;
use crate::weight::CudaWeight;

/// Staging slots.
pub struct CudaRing {
    _unwritten: (),
}

impl CudaRing {
    pub(crate) fn new(_cuda: &CudaBackend, _num_slots: usize, _slot_bytes: usize) -> Result<Self, BackendError> {
        Err(unsupported("staging", "unwritten"))
    }

    pub(crate) fn stage(
        &mut self, _cuda: &CudaBackend, _slot: usize, _sources: Vec<StagedSource<CudaWeight>>,
    ) -> Result<(), BackendError> {
        Err(unsupported("stage", "unwritten"))
    }

    pub(crate) fn staged(&mut self, _cuda: &CudaBackend, _slot: usize) -> Result<Vec<CudaWeight>, BackendError> {
        Err(unsupported("staged", "unwritten"))
    }
}
