//! The device's copy of a batch.

use std::sync::Arc;

use cogvlm_backend::{BackendError, Batch};
use cogvlm_core::workspace::{BLOCK_LEN, StepLimits};
use cudarc::driver::sys::CUdeviceptr;

use crate::device::Gpu;
use crate::host_copy::Uploader;
use crate::memory::Allocation;

/// A [`Batch`], checked, and its arrays on the device at addresses that never change.
pub struct CudaTables {
    pub(crate) limits: StepLimits,
    pub(crate) batch: Batch,
    /// Largest block id of the batch, plus one.
    pub(crate) num_blocks_used: usize,
    /// Largest block id that a row of the batch is written to, plus one.
    pub(crate) num_slot_blocks: usize,
    /// Largest position id of the batch, plus one.
    pub(crate) num_positions_used: usize,
    allocation: Allocation,
    layout: Layout,
}

/// Word offsets of the arrays, all of u32.
#[derive(Debug, Clone, Copy)]
struct Layout {
    positions: usize,
    slots: usize,
    logit_rows: usize,
    /// Per sequence: first row, number of rows, context length, unused.
    sequences: usize,
    /// Per sequence: `blocks_per_sequence` block ids.
    blocks: usize,
    blocks_per_sequence: usize,
    num_words: usize,
}

impl Layout {
    fn new(limits: &StepLimits) -> Self {
        let aligned = |words: usize| words.next_multiple_of(64);
        let rows = aligned(limits.max_tokens);
        let blocks_per_sequence = limits.context_len.div_ceil(BLOCK_LEN);
        let positions = 0;
        let slots = positions + rows;
        let logit_rows = slots + rows;
        let sequences = logit_rows + rows;
        let blocks = sequences + aligned(4 * limits.max_sequences);
        let num_words = blocks + aligned(limits.max_sequences * blocks_per_sequence);
        Self { positions, slots, logit_rows, sequences, blocks, blocks_per_sequence, num_words }
    }
}

impl CudaTables {
    pub(crate) fn new(gpu: &Arc<Gpu>, limits: &StepLimits) -> Result<Self, BackendError> {
        let layout = Layout::new(limits);
        let allocation = Allocation::new(gpu, "tables", layout.num_words * 4)?;
        let batch = Batch::default();
        Ok(Self {
            limits: *limits,
            batch,
            num_blocks_used: 0,
            num_slot_blocks: 0,
            num_positions_used: 0,
            allocation,
            layout,
        })
    }

    /// Takes `batch` over if it is sound.
    pub(crate) fn set(&mut self, uploader: &Uploader, batch: &Batch) -> Result<(), BackendError> {
        let slots = batch.checked_slots(&self.limits)?;
        let layout = self.layout;
        let rows = batch.num_rows();
        // Nothing is copied past the last sequence's blocks.
        let used = layout.blocks + batch.sequences.len() * layout.blocks_per_sequence;
        let mut words = vec![0_u32; used];
        words[layout.positions..][..rows].copy_from_slice(&batch.position_ids);
        words[layout.slots..][..rows].iter_mut().zip(&slots).for_each(|(word, slot)| *word = *slot as u32);
        words[layout.logit_rows..][..batch.logit_rows.len()]
            .iter_mut()
            .zip(&batch.logit_rows)
            .for_each(|(word, row)| *word = *row as u32);
        for (index, sequence) in batch.sequences.iter().enumerate() {
            let entry = [sequence.rows.start as u32, sequence.rows.len() as u32, sequence.context_len as u32, 0];
            words[layout.sequences + 4 * index..][..4].copy_from_slice(&entry);
            let used = sequence.context_len.div_ceil(BLOCK_LEN);
            words[layout.blocks + index * layout.blocks_per_sequence..][..used]
                .copy_from_slice(&sequence.blocks[..used]);
        }
        uploader.upload(self.allocation.address, bytemuck::cast_slice(&words))?;
        let used_blocks = batch.sequences.iter().flat_map(|sequence| {
            sequence.blocks[..sequence.context_len.div_ceil(BLOCK_LEN)].iter().map(|block| *block as usize + 1)
        });
        self.num_blocks_used = used_blocks.max().unwrap_or(0);
        self.num_slot_blocks = slots.iter().max().map_or(0, |slot| slot / BLOCK_LEN + 1);
        self.num_positions_used = batch.position_ids.iter().map(|id| *id as usize + 1).max().unwrap_or(0);
        self.batch = batch.clone();
        Ok(())
    }

    fn array(&self, offset: usize) -> CUdeviceptr {
        self.allocation.address + (offset * 4) as CUdeviceptr
    }

    /// Position id of each row, u32.
    pub(crate) fn positions(&self) -> CUdeviceptr {
        self.array(self.layout.positions)
    }

    /// Slot in the KV cache of each row, u32.
    pub(crate) fn slots(&self) -> CUdeviceptr {
        self.array(self.layout.slots)
    }

    /// Rows whose logits are wanted, u32.
    pub(crate) fn logit_rows(&self) -> CUdeviceptr {
        self.array(self.layout.logit_rows)
    }

    /// Per sequence four u32: first row, number of rows, context length, unused.
    pub(crate) fn sequences(&self) -> CUdeviceptr {
        self.array(self.layout.sequences)
    }

    /// Block ids, u32 `[sequences, blocks_per_sequence]`.
    pub(crate) fn blocks(&self) -> CUdeviceptr {
        self.array(self.layout.blocks)
    }

    pub(crate) fn blocks_per_sequence(&self) -> usize {
        self.layout.blocks_per_sequence
    }
}
