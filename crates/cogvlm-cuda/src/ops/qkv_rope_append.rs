//! `[q | k | v] = x Wᵀ`, q and k rotated, k and v into the paged cache

use cogvlm_backend::shape::{expect, expect_heads, expect_ranges, expect_rows};
use cogvlm_backend::{BackendError, ExpertWeights, HeadGeometry, RopeMode};
use cogvlm_core::DType;
use cogvlm_core::tokens::ExpertRange;
use cogvlm_core::workspace::BLOCK_LEN;

use crate::backend::CudaBackend;
use crate::buffer::CudaBuffer;
use crate::product::{Finish, Product, ProductWeights};
use crate::tables::CudaTables;
use crate::weight::CudaWeight;

#[expect(clippy::too_many_arguments, reason = "one fused operation, as the trait has it")]
pub(crate) fn qkv_rope_append(
    cuda: &CudaBackend, x: &CudaBuffer, weights: ExpertWeights<'_, CudaWeight>, ranges: &[ExpertRange],
    heads: HeadGeometry, rope: &CudaBuffer, mode: RopeMode, tables: &CudaTables, query: &mut CudaBuffer,
    kv: &mut CudaBuffer,
) -> Result<(), BackendError> {
    const OP: &str = "qkv_rope_append";
    let HeadGeometry { num_heads, num_kv_heads, head_dim } = heads;
    let rows = tables.batch.num_rows();
    let columns = head_dim.saturating_mul(num_heads.saturating_add(num_kv_heads.saturating_mul(2)));
    expect_heads(OP, heads)?;
    expect_rows(OP, "x", x.shape(), [rows, x.columns()])?;
    expect_ranges(OP, ranges, rows)?;
    let covered: usize = ranges.iter().map(|range| range.rows.len()).sum();
    expect(OP, "ranges", &[covered], covered == rows, || format!("ranges of all {rows} rows of the batch"))?;
    expect_rows(OP, "query", query.shape(), [rows, num_heads.saturating_mul(head_dim)])?;
    let kv_columns = head_dim.saturating_mul(2 * BLOCK_LEN).saturating_mul(num_kv_heads);
    expect_rows(OP, "kv", kv.shape(), [tables.num_slot_blocks, kv_columns])?;
    expect_rows(OP, "rope", rope.shape(), [tables.num_positions_used, head_dim])?;
    for (argument, buffer) in [("x", x), ("query", &*query), ("kv", &*kv)] {
        buffer.expect_dtype(OP, argument, cuda.activations)?;
    }
    rope.expect_dtype(OP, "rope", DType::F32)?;
    let weights = ProductWeights { first: weights, second: None };
    Product::new(OP, Finish::Qkv, x, &weights, ranges, columns)?
        .into_heads(heads, rope, mode, tables, query, kv)
        .run(cuda)
}
