//! What one step computes: rows of one or more sequences, and where their keys and values live.

use std::ops::Range;

use cogvlm_core::tokens::ExpertRange;
use cogvlm_core::workspace::BLOCK_LEN;

/// Rows of one sequence in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
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
#[derive(Debug, Clone, PartialEq, Eq, Default)]
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
}
