//! The device's copy of a batch.

use cogvlm_backend::{BackendError, Batch};
use cogvlm_core::workspace::{BLOCK_LEN, StepLimits};

use crate::shape::{expect, unsupported};

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
        const OP: &str = "set_batch";
        let rows = batch.num_rows();
        let limits = &self.limits;
        expect(OP, "input_ids", &[rows], rows <= limits.max_tokens, || format!("at most {} rows", limits.max_tokens))?;
        let positions = batch.position_ids.len();
        expect(OP, "position_ids", &[positions], positions == rows, || format!("one for each of {rows} rows"))?;
        let sequences = batch.sequences.len();
        expect(OP, "sequences", &[sequences], sequences <= limits.max_sequences, || {
            format!("at most {} of them", limits.max_sequences)
        })?;
        let mut covered = 0;
        for sequence in &batch.sequences {
            let range = &sequence.rows;
            let fits = range.start == covered && range.end >= range.start && range.end <= rows;
            expect(OP, "sequences", &[range.start, range.end], fits, || {
                format!("rows from {covered} on, within {rows}")
            })?;
            covered = range.end;
            let blocks = sequence.blocks.len();
            let fits = range.len() <= sequence.context_len && sequence.context_len <= blocks * BLOCK_LEN;
            expect(OP, "context_len", &[sequence.context_len], fits, || {
                format!("at least its {} rows, at most the tokens of its {blocks} blocks", range.len())
            })?;
            let fits = sequence.context_len <= limits.context_len;
            expect(OP, "context_len", &[sequence.context_len], fits, || format!("at most {}", limits.context_len))?;
        }
        expect(OP, "sequences", &[covered], covered == rows, || format!("rows up to {rows}"))?;
        let ascending = batch.logit_rows.is_sorted_by(|a, b| a < b);
        let fits = ascending && batch.logit_rows.last().is_none_or(|&row| row < rows);
        expect(OP, "logit_rows", &batch.logit_rows, fits, || format!("ascending rows below {rows}"))?;
        let slots: Vec<usize> = batch.slots().flatten().collect();
        let mut sorted = slots.clone();
        sorted.sort_unstable();
        if slots.len() != rows || sorted.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(unsupported(OP, "two rows have the same slot of the KV cache"));
        }
        self.batch = batch.clone();
        self.slots = slots;
        Ok(())
    }
}
