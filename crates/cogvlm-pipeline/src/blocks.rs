//! Blocks of the paged KV cache. One numbering serves all layers and stages.

use std::sync::{Arc, Mutex, PoisonError};

use cogvlm_core::workspace::BLOCK_LEN;

/// The free blocks of the KV cache.
#[derive(Debug, Clone)]
pub struct BlockPool {
    free: Arc<Mutex<Vec<u32>>>,
    num_blocks: usize,
}

/// Blocks of one sequence, in the order of its tokens; free again on drop.
#[derive(Debug)]
pub struct BlockLease {
    blocks: Vec<u32>,
    pool: BlockPool,
}

impl BlockPool {
    /// A pool of `num_blocks` blocks, all free.
    pub fn new(num_blocks: usize) -> Self {
        // Popped from the end: the lowest numbers go out first.
        let free = (0..num_blocks as u32).rev().collect();
        Self { free: Arc::new(Mutex::new(free)), num_blocks }
    }

    /// Blocks in all.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// Blocks that nobody holds.
    pub fn num_free(&self) -> usize {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// An empty lease, to be grown.
    pub fn empty_lease(&self) -> BlockLease {
        BlockLease { blocks: Vec::new(), pool: self.clone() }
    }
}

impl BlockLease {
    /// Makes room for `num_tokens` tokens. `false`, and nothing changes, where the pool has too few blocks.
    #[must_use]
    pub fn grow_to(&mut self, num_tokens: usize) -> bool {
        let missing = num_tokens.div_ceil(BLOCK_LEN).saturating_sub(self.blocks.len());
        let mut free = self.pool.free.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(left) = free.len().checked_sub(missing) else { return false };
        self.blocks.extend(free.drain(left..).rev());
        true
    }

    /// The blocks.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }
}

impl Drop for BlockLease {
    fn drop(&mut self) {
        let mut free = self.pool.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.extend(self.blocks.drain(..).rev());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_take_what_they_need_and_give_it_back() {
        let pool = BlockPool::new(4);
        let mut first = pool.empty_lease();
        assert!(first.grow_to(17));
        assert_eq!(first.blocks(), [0, 1]);
        let mut second = pool.empty_lease();
        assert!(!second.grow_to(3 * BLOCK_LEN), "two blocks are left, three were asked for");
        assert!(second.blocks().is_empty());
        assert!(second.grow_to(BLOCK_LEN));
        assert!(first.grow_to(20), "it has room for these already");
        assert_eq!((first.blocks().len(), pool.num_free()), (2, 1));
        drop((first, second));
        assert_eq!(pool.num_free(), 4);
    }
}
