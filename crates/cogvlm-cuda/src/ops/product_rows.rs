//! Products of a few rows at the rate of memory: kernels/product_rows.cu.

use cogvlm_backend::BackendError;
use cogvlm_backend::shape::unsupported;

use crate::backend::CudaBackend;
use crate::device::{Launch, arg};
use crate::driver::num_blocks_of;
use crate::product::{Finish, Product};

/// The most rows that the kernels take.
pub(crate) const MAX_ROWS: usize = 16;
/// As in the kernels: warps, elements of depth that one takes at a time, rounds that it has under way at most.
const WARPS: u32 = 8;
const ROUND: u32 = 64;
const MAX_STAGES: u32 = 4;
const BLOCKS_PER_MULTIPROCESSOR: u32 = 2;

/// What a block computes at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tile {
    weight_rows: u32,
    rows: u32,
}

impl Tile {
    /// That of the kernels for `num_rows` rows.
    fn new(finish: Finish, num_rows: usize) -> Self {
        let rows = if num_rows > 8 { 16 } else { 8 };
        let is_wide = matches!(finish, Finish::GateUp | Finish::Qkv | Finish::Logits);
        Self { weight_rows: if is_wide && rows == 16 { 32 } else { 16 }, rows }
    }

    /// Bytes of shared memory of a block that has `stages` rounds under way.
    fn shared_bytes(self, stages: u32) -> u32 {
        let round = (self.weight_rows + self.rows) * ROUND * 2;
        let sums = self.weight_rows * self.rows * 4;
        WARPS * (stages * round + sums)
    }

    /// How many stages where a multiprocessor has `all_bytes` of shared memory: as many as let
    /// `BLOCKS_PER_MULTIPROCESSOR` blocks stay, and one at least.
    fn stages(self, all_bytes: u32) -> u32 {
        let fits = |stages: &u32| num_blocks_of(self.shared_bytes(*stages), all_bytes) >= BLOCKS_PER_MULTIPROCESSOR;
        (1..=MAX_STAGES).rev().find(fits).unwrap_or(1)
    }
}

pub(crate) fn run(cuda: &CudaBackend, product: &Product) -> Result<(), BackendError> {
    let arguments = product.tiled(1);
    macro_rules! kernel {
        ($name:literal) => {
            if product.num_rows > 8 {
                concat!("product_rows_", $name, "_16")
            } else {
                concat!("product_rows_", $name, "_8")
            }
        };
    }
    let kernel = match product.finish {
        Finish::Bias | Finish::BiasGelu => kernel!("bias"),
        Finish::Residual => kernel!("residual"),
        Finish::GateUp => kernel!("gate_up"),
        Finish::Qkv => kernel!("qkv"),
        Finish::Logits => kernel!("logits"),
        Finish::Partial => kernel!("partial"),
    };
    let tile = Tile::new(product.finish, product.num_rows);
    let stages = tile.stages(cuda.shared_bytes);
    let shared = tile.shared_bytes(stages);
    let tiles = arguments.width.div_ceil(tile.weight_rows / if product.finish.is_paired() { 2 } else { 1 });
    let num_blocks = num_blocks_of(shared, cuda.shared_bytes).clamp(1, BLOCKS_PER_MULTIPROCESSOR);
    let at_once = num_blocks * cuda.gpu.info.num_multiprocessors;
    let launch = Launch { shared, overlap: product.is_stable, ..Launch::blocks(tiles.min(at_once), WARPS * 32) };
    let mut arguments = vec![arg(&arguments), arg(&stages)];
    if product.finish == Finish::Partial {
        let push = product.push.as_ref().ok_or_else(|| unsupported("linear_partial", "sums that nobody is told"))?;
        arguments.push(arg(push));
    }
    // SAFETY: the kernel takes one `Product`, of at most `MAX_ROWS` rows in one range and a depth that is a multiple of
    // 8, as `Product::run` sees to; addresses, rows and widths in it were checked when it was made. It has the shared
    // memory of as many stages as it is told. A partial one takes a `Push` beside it, whose inboxes have `MAX_ROWS` rows
    // or as many as the sums.
    unsafe { cuda.gpu.launch("product_rows", kernel, launch, &mut arguments) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_gpu_has_room_for_a_stage_and_the_large_ones_for_two_blocks() {
        // Kilobytes of a multiprocessor (CUDA C++ programming guide, "Technical specifications per compute capability"):
        // 9.0 and 10.0, 8.0, 8.6 and 8.9 and 12.0.
        let stages = |kilobytes: u32| {
            [(Finish::Qkv, 1), (Finish::Residual, 16), (Finish::Qkv, 16)].map(|(finish, rows)| {
                let tile = Tile::new(finish, rows);
                let stages = tile.stages(kilobytes << 10);
                (stages, num_blocks_of(tile.shared_bytes(stages), kilobytes << 10))
            })
        };
        assert_eq!(stages(228), [(4, 2), (3, 2), (2, 2)]);
        assert_eq!(stages(164), [(3, 2), (2, 2), (1, 2)]);
        assert_eq!(stages(100), [(1, 3), (1, 2), (1, 1)]);
    }
}
