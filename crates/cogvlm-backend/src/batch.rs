//! What one step computes: rows of one or more sequences, and where their keys and values live.

use std::ops::Range;

use cogvlm_core::tokens::ExpertRange;
use cogvlm_core::workspace::{BLOCK_LEN, StepLimits};
use serde::{Deserialize, Serialize};

use crate::BackendError;
use crate::shape::{expect, unsupported};

/// Rows of one sequence in a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SequenceRows {
    /// Its rows in the batch.
    pub rows: Range<usize>,
    /// Keys that its last row sees: the tokens cached before this step and its rows in this one.
    pub context_len: usize,
    /// Blocks of the paged KV cache that hold its tokens, in order.
    pub blocks: Vec<u32>,
}

impl SequenceRows {
    /// Slot in the KV cache of the token at `token_index` (from 0 in its sequence; not its position id, which patches
    /// share). `None` past the last block.
    pub fn slot(&self, token_index: usize) -> Option<usize> {
        let block = *self.blocks.get(token_index / BLOCK_LEN)?;
        Some(block as usize * BLOCK_LEN + token_index % BLOCK_LEN)
    }

    /// Token index of the first row.
    pub fn first_token(&self) -> usize {
        self.context_len - self.rows.len()
    }
}

/// One step: the rows of all its sequences, one after the other.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Batch {
    /// Token id of each row.
    pub input_ids: Vec<u32>,
    /// Position id of each row.
    pub position_ids: Vec<u32>,
    /// Expert of each row, as runs that cover all rows in order.
    pub expert_ranges: Vec<ExpertRange>,
    /// The sequences; their rows cover the batch in order.
    pub sequences: Vec<SequenceRows>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: Vec<usize>,
}

impl Batch {
    /// Number of rows.
    pub fn num_rows(&self) -> usize {
        self.input_ids.len()
    }

    /// Slot in the KV cache of each row. `None` for a row whose sequence has no block for it.
    pub fn slots(&self) -> impl Iterator<Item = Option<usize>> + '_ {
        self.sequences.iter().flat_map(|sequence| {
            (0..sequence.rows.len()).map(move |index| sequence.slot(sequence.first_token() + index))
        })
    }

    /// Checks the batch against `limits` and itself; gives the slot of each row, no two the same.
    ///
    /// # Errors
    /// As [`Backend::set_batch`](crate::Backend::set_batch) says; also where two rows have the same slot.
    pub fn checked_slots(&self, limits: &StepLimits) -> Result<Vec<usize>, BackendError> {
        const OP: &str = "set_batch";
        let rows = self.num_rows();
        expect(OP, "input_ids", &[rows], rows <= limits.max_tokens, || format!("at most {} rows", limits.max_tokens))?;
        let positions = self.position_ids.len();
        expect(OP, "position_ids", &[positions], positions == rows, || format!("one for each of {rows} rows"))?;
        let sequences = self.sequences.len();
        expect(OP, "sequences", &[sequences], sequences <= limits.max_sequences, || {
            format!("at most {} of them", limits.max_sequences)
        })?;
        let mut covered = 0;
        for sequence in &self.sequences {
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
        let ascending = self.logit_rows.is_sorted_by(|a, b| a < b);
        let fits = ascending && self.logit_rows.last().is_none_or(|&row| row < rows);
        expect(OP, "logit_rows", &self.logit_rows, fits, || format!("ascending rows below {rows}"))?;
        let slots: Vec<usize> = self.slots().flatten().collect();
        let mut sorted = slots.clone();
        sorted.sort_unstable();
        if slots.len() != rows || sorted.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(unsupported(OP, "two rows have the same slot of the KV cache"));
        }
        Ok(slots)
    }
}
