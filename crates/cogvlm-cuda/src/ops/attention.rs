//! Causal softmax attention over the paged cache.

use cogvlm_backend::shape::{expect_heads, expect_rows, unsupported};
use cogvlm_backend::{BackendError, HeadGeometry};
use cogvlm_core::DType;
use cogvlm_core::workspace::BLOCK_LEN;
use cudarc::driver::sys::CUdeviceptr;

use super::rows;
use crate::backend::{CudaBackend, KernelPath};
use crate::buffer::CudaBuffer;
use crate::device::{Launch, arg};
use crate::driver::num_blocks_of;
use crate::tables::CudaTables;

/// As in kernels/include/attention.cuh: the widest head of the plain kernels.
pub(super) const MAX_HEAD_DIM: usize = 256;
/// Warps of a thread block of the plain kernels, as in kernels/attention.cu and kernels/image_attention.cu.
pub(super) const PLAIN_WARPS: u32 = 4;
/// As `PrefillShape` in kernels/attention.cu: threads, rows of queries, bytes of shared memory.
const PREFILL_THREADS: u32 = 256;
const PREFILL_ROWS: usize = 128;
const PREFILL_SHARED: u32 = (128 + 8 * 32) * 256;
/// As in kernels/attention.cu: 32 `DECODE_WARPS`, the bytes of their rings, and the most splits.
const DECODE_THREADS: u32 = 128;
const DECODE_SHARED: u32 = 4 * 3 * 4096;
const MAX_SPLITS: usize = 32;
/// Shared memory of each query of a group that the kernel has beside the rings, with some to spare.
const DECODE_SUMS: u32 = 2304;
/// Head width of the fast kernels.
const HEAD_DIM: usize = 128;

/// Address and number of the counters at the beginning of the scratch memory: u32, zero between operations.
pub(super) fn counters(cuda: &CudaBackend) -> (CUdeviceptr, usize) {
    let first = cuda.scratch.address;
    (first, (rows::scratch(cuda).0 - first) as usize / 4)
}

/// What scores are multiplied with: by the plain kernels, and by those that work in powers of two.
pub(super) fn scales(head_dim: usize) -> (f32, f32) {
    let scale = 1.0 / (head_dim as f64).sqrt();
    (scale as f32, (scale * std::f64::consts::LOG2_E) as f32)
}

/// Refuses heads that are too wide for the plain kernels.
pub(super) fn expect_plain_head(op: &'static str, head_dim: usize) -> Result<(), BackendError> {
    if head_dim <= MAX_HEAD_DIM {
        return Ok(());
    }
    Err(unsupported(op, format!("heads of width {head_dim}: this backend has kernels for up to {MAX_HEAD_DIM}")))
}

pub(crate) fn attention(
    cuda: &CudaBackend, query: &CudaBuffer, kv: &CudaBuffer, heads: HeadGeometry, tables: &CudaTables,
    out: &mut CudaBuffer,
) -> Result<(), BackendError> {
    const OP: &str = "attention";
    let HeadGeometry { num_heads, num_kv_heads, head_dim } = heads;
    let (num_rows, width) = (tables.batch.num_rows(), num_heads.saturating_mul(head_dim));
    expect_heads(OP, heads)?;
    expect_rows(OP, "query", query.shape(), [num_rows, width])?;
    expect_rows(OP, "out", out.shape(), [num_rows, width])?;
    let kv_columns = head_dim.saturating_mul(2 * BLOCK_LEN).saturating_mul(num_kv_heads);
    expect_rows(OP, "kv", kv.shape(), [tables.num_blocks_used, kv_columns])?;
    query.expect_dtype(OP, "query", cuda.activations)?;
    kv.expect_dtype(OP, "kv", cuda.activations)?;
    out.expect_dtype(OP, "out", cuda.activations)?;
    if num_rows == 0 || width == 0 {
        return Ok(());
    }
    let attention = Attention { cuda, query: query.address(), kv: kv.address(), heads, tables, out: out.address() };
    if cuda.activations != DType::Bf16 || cuda.path < KernelPath::Portable || head_dim != HEAD_DIM {
        expect_plain_head(OP, head_dim)?;
        return attention.plain();
    }
    let most_rows = attention.most_rows();
    if most_rows > 1 {
        attention.prefill(most_rows)?;
    }
    if tables.batch.sequences.iter().any(|sequence| sequence.rows.len() == 1) { attention.decode() } else { Ok(()) }
}

/// One call whose shapes and types were checked: `query` and `out` have the batch's rows of `num_heads * head_dim`
/// elements, `kv` all blocks that the tables name.
struct Attention<'a> {
    cuda: &'a CudaBackend,
    query: CUdeviceptr,
    kv: CUdeviceptr,
    heads: HeadGeometry,
    tables: &'a CudaTables,
    out: CUdeviceptr,
}

impl Attention<'_> {
    fn most_rows(&self) -> usize {
        self.tables.batch.sequences.iter().map(|sequence| sequence.rows.len()).max().unwrap_or(0)
    }

    fn num_sequences(&self) -> usize {
        self.tables.batch.sequences.len()
    }

    fn plain(&self) -> Result<(), BackendError> {
        let kernel = if self.cuda.activations == DType::F32 { "attention_f32" } else { "attention_bf16" };
        let items = self.most_rows() * self.heads.num_heads;
        let grid = [items.div_ceil(PLAIN_WARPS as usize) as u32, self.num_sequences() as u32, 1];
        let launch = Launch { grid, ..Launch::blocks(0, 32 * PLAIN_WARPS) };
        let (sequences, blocks) = (self.tables.sequences(), self.tables.blocks());
        let blocks_per_sequence = self.tables.blocks_per_sequence() as u32;
        let [num_heads, num_kv_heads, head_dim] = self.geometry();
        let (scale, _) = scales(self.heads.head_dim);
        let mut arguments = [
            arg(&self.query),
            arg(&self.kv),
            arg(&sequences),
            arg(&blocks),
            arg(&self.out),
            arg(&blocks_per_sequence),
            arg(&num_heads),
            arg(&num_kv_heads),
            arg(&head_dim),
            arg(&scale),
        ];
        // SAFETY: arguments and threads are those of `attention_f32` and `attention_bf16`; they read rows and blocks
        // that the tables name, which the buffers have, and write rows of out. Heads fit MAX_HEAD_DIM.
        unsafe { self.cuda.gpu.launch("attention", kernel, launch, &mut arguments) }
    }

    /// Sequences of two rows and more.
    fn prefill(&self, most_rows: usize) -> Result<(), BackendError> {
        let grid = [self.heads.num_heads as u32, most_rows.div_ceil(PREFILL_ROWS) as u32, self.num_sequences() as u32];
        let launch = Launch { grid, shared: PREFILL_SHARED, ..Launch::blocks(0, PREFILL_THREADS) };
        let (sequences, blocks) = (self.tables.sequences(), self.tables.blocks());
        let blocks_per_sequence = self.tables.blocks_per_sequence() as u32;
        let [num_heads, num_kv_heads, _] = self.geometry();
        let (_, scale_log2) = scales(HEAD_DIM);
        let mut arguments = [
            arg(&self.query),
            arg(&self.kv),
            arg(&sequences),
            arg(&blocks),
            arg(&self.out),
            arg(&blocks_per_sequence),
            arg(&num_heads),
            arg(&num_kv_heads),
            arg(&scale_log2),
        ];
        // SAFETY: arguments, threads and shared memory are those of `attention_prefill_bf16_128`; it reads rows and
        // blocks that the tables name, which the buffers have, 16 bytes at a time: buffers start at multiples of 256
        // bytes, and heads are 256 bytes wide.
        unsafe { self.cuda.gpu.launch("attention", "attention_prefill_bf16_128", launch, &mut arguments) }
    }

    /// Sequences of one row. The launch depends on their number, not on their contexts.
    fn decode(&self) -> Result<(), BackendError> {
        let HeadGeometry { num_heads, num_kv_heads, .. } = self.heads;
        let group = if (num_heads / num_kv_heads).is_multiple_of(2) { 2 } else { 1 };
        // As many as the kernels' registers allow, and the shared memory.
        let (kernel, most_blocks) =
            if group == 2 { ("attention_decode_bf16_128_x2", 2) } else { ("attention_decode_bf16_128_x1", 4) };
        let shared = DECODE_SHARED + group as u32 * DECODE_SUMS;
        let num_blocks = num_blocks_of(shared, self.cuda.shared_bytes).clamp(1, most_blocks);
        let (area, room) = rows::scratch(self.cuda);
        let num_queries = self.num_sequences() * num_heads;
        let at_once = (num_blocks * self.cuda.gpu.info.num_multiprocessors) as usize;
        let (counters, num_counters) = counters(self.cuda);
        let num_splits = if num_queries / group <= num_counters {
            num_splits(num_queries, group, at_once, self.tables.blocks_per_sequence(), room)
        } else {
            1
        };
        let grid = [num_splits as u32, (num_heads / group) as u32, self.num_sequences() as u32];
        let launch = Launch { grid, shared: DECODE_SHARED, ..Launch::blocks(0, DECODE_THREADS) };
        let softmaxes = area + (num_queries * num_splits * HEAD_DIM * 4) as CUdeviceptr;
        let (sequences, blocks) = (self.tables.sequences(), self.tables.blocks());
        let blocks_per_sequence = self.tables.blocks_per_sequence() as u32;
        let [num_heads, num_kv_heads, _] = self.geometry();
        let (_, scale_log2) = scales(HEAD_DIM);
        let mut arguments = [
            arg(&self.query),
            arg(&self.kv),
            arg(&sequences),
            arg(&blocks),
            arg(&self.out),
            arg(&area),
            arg(&softmaxes),
            arg(&counters),
            arg(&blocks_per_sequence),
            arg(&num_heads),
            arg(&num_kv_heads),
            arg(&scale_log2),
        ];
        // SAFETY: arguments, threads and shared memory are those of `attention_decode_bf16_128_x1` and `_x2`; they read
        // rows and blocks that the tables name, which the buffers have. `num_splits` saw to it that partial results and
        // counters fit, and that there are no more splits than the kernels put together; with one there are none.
        unsafe { self.cuda.gpu.launch("attention", kernel, launch, &mut arguments) }
    }

    fn geometry(&self) -> [u32; 3] {
        [self.heads.num_heads as u32, self.heads.num_kv_heads as u32, self.heads.head_dim as u32]
    }
}

/// Among how many thread blocks the blocks of a sequence are split, for every `group` of the `num_queries` queries: so
/// that all thread blocks run at once, and their partial results fit into `room` bytes.
fn num_splits(num_queries: usize, group: usize, at_once: usize, blocks_per_sequence: usize, room: usize) -> usize {
    /// Of a query in one split: sums, maximum and total.
    const ENTRY_BYTES: usize = (HEAD_DIM + 2) * 4;
    (at_once * group / num_queries).min(room / ENTRY_BYTES / num_queries).min(blocks_per_sequence).clamp(1, MAX_SPLITS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_fill_the_device_once() {
        let room = 30 << 20;
        assert_eq!(num_splits(32, 1, 528, 128, room), 16, "a sequence of 32 heads");
        assert_eq!(num_splits(32, 2, 264, 128, room), 16, "in pairs");
        assert_eq!(num_splits(16 * 32, 1, 528, 128, room), 1, "sixteen of them");
        assert_eq!(num_splits(32, 1, 528, 3, room), 3, "no more than blocks");
        assert_eq!(num_splits(2, 1, 528, 10_000, 520 * 2 * 7 + 519), 7, "no more than fit");
        assert_eq!(num_splits(1 << 20, 1, 528, 128, room), 1, "at least one");
        assert_eq!(num_splits(2, 1, 528, 128, room), MAX_SPLITS, "no more than are put together");
    }
}
