//! Batches as an engine makes them, and the tables for them.

use cogvlm_core::Expert;
use cogvlm_core::tokens::{ExpertRange, expert_ranges};
use cogvlm_core::workspace::{BLOCK_LEN, StepLimits};

use super::data::Random;
use crate::{Backend, Batch, SequenceRows};

/// Who processes the rows of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Routing {
    Language,
    Vision,
    /// Every row another expert than its neighbours.
    Alternating,
    /// As with an image: BOS, its tokens but EOI, the text.
    Image,
}

impl Routing {
    pub(crate) const ALL: [Self; 4] = [Self::Language, Self::Vision, Self::Alternating, Self::Image];

    pub(crate) fn ranges(self, num_rows: usize) -> Vec<ExpertRange> {
        let expert = |row: usize| {
            let is_vision = match self {
                Self::Language => false,
                Self::Vision => true,
                Self::Alternating => row % 2 == 1,
                Self::Image => row > 0 && row < num_rows - num_rows / 3,
            };
            if is_vision { Expert::Vision } else { Expert::Language }
        };
        expert_ranges(&(0..num_rows).map(expert).collect::<Vec<_>>())
    }
}

/// Blocks that no sequence of a batch owns.
const SPARE_BLOCKS: usize = 2;

/// A batch of sequences, each given as its rows and its context with them; their blocks lie anywhere in the cache.
/// Gives the number of blocks of the cache too. Position ids are below `num_positions`.
pub(crate) fn batch(
    random: &mut Random, sequences: &[(usize, usize)], routing: Routing, num_positions: usize,
) -> (Batch, usize) {
    let num_blocks =
        sequences.iter().map(|(_, context_len)| context_len.div_ceil(BLOCK_LEN)).sum::<usize>() + SPARE_BLOCKS;
    let mut free = random.permutation(num_blocks);
    let mut batch = Batch::default();
    for &(num_rows, context_len) in sequences {
        let first_row = batch.input_ids.len();
        let rows = first_row..first_row + num_rows;
        let blocks = free.split_off(free.len() - context_len.div_ceil(BLOCK_LEN));
        batch.input_ids.extend(rows.clone().map(|row| row as u32));
        // Neither counting up nor unique: patches share a position.
        batch.position_ids.extend(rows.clone().map(|_| random.below(num_positions) as u32));
        batch.logit_rows.push(rows.end - 1);
        batch.sequences.push(SequenceRows { rows, context_len, blocks });
    }
    batch.expert_ranges = routing.ranges(batch.num_rows());
    (batch, num_blocks)
}

/// Limits that fit `batch` exactly.
pub(crate) fn limits(batch: &Batch) -> StepLimits {
    StepLimits {
        max_tokens: batch.num_rows().max(1),
        max_sequences: batch.sequences.len().max(1),
        max_images: 1,
        parcels: 0,
        context_len: batch.sequences.iter().map(|sequence| sequence.context_len).max().unwrap_or(1),
    }
}

/// Tables that describe `batch`.
#[track_caller]
pub(crate) fn tables<B: Backend>(backend: &B, batch: &Batch) -> B::Tables {
    let mut tables = backend.tables(&limits(batch)).unwrap_or_else(|error| panic!("tables: {error}"));
    backend.set_batch(&mut tables, batch).unwrap_or_else(|error| panic!("set_batch: {error}"));
    tables
}
