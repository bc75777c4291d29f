//! The device's copy of a batch.

use cogvlm_backend::{BackendError, Batch};
use cogvlm_core::workspace::StepLimits;

/// A [`Batch`], checked, and the slot in the KV cache of each of its rows.
pub struct CpuTables {
    limits: StepLimits,
    batch: Batch,
    slots: Vec<usize>,
}

impl CpuTables {
    pub(crate) fn new(limits: &StepLimits) -> Self {
        Self { limits: *limits, batch: Batch::default(), slots: Vec::new() }
    }

    pub(crate) fn batch(&self) -> &Batch {
        &self.batch
    }

    /// Slot of each row, no two the same.
    pub(crate) fn slots(&self) -> &[usize] {
        &self.slots
    }

    /// Takes `batch` over if it is sound.
    pub(crate) fn set(&mut self, batch: &Batch) -> Result<(), BackendError> {
        self.slots = batch.checked_slots(&self.limits)?;
        self.batch = batch.clone();
        Ok(())
    }
}
