//! Causal softmax attention over the paged cache.

use cogvlm_backend::{BackendError, HeadGeometry, SequenceRows};
use cogvlm_core::workspace::BLOCK_LEN;

use crate::attend::{Attend, QUERY_ROWS, accumulate_softmax};
use crate::backend::CpuBackend;
use crate::buffer::CpuBuffer;
use crate::element::Element;
use crate::scratch::{Scratch, grown};
use crate::shape::{expect_buffer, expect_heads};
use crate::simd::{self, Isa, vectorised};
use crate::tables::CpuTables;
use crate::{scratch, tiles};

/// Up to this many rows of a sequence are attended one by one, straight from the cache.
const MAX_SINGLE_ROWS: usize = 4;

/// Blocks of the cache whose scores are computed at a time.
const BLOCKS: usize = 16;

pub(crate) fn attention<T: Element>(
    cpu: &CpuBackend, query: &CpuBuffer, kv: &CpuBuffer, heads: HeadGeometry, tables: &CpuTables, out: &mut CpuBuffer,
) -> Result<(), BackendError> {
    const OP: &str = "attention";
    let HeadGeometry { num_heads, num_kv_heads, head_dim } = heads;
    let (batch, width) = (tables.batch(), num_heads.saturating_mul(head_dim));
    expect_heads(OP, heads)?;
    expect_buffer(OP, "query", query, batch.num_rows(), width)?;
    expect_buffer(OP, "out", out, batch.num_rows(), width)?;
    let used = |sequence: &SequenceRows| {
        let blocks = &sequence.blocks[..sequence.context_len.div_ceil(BLOCK_LEN)];
        blocks.iter().max().map_or(0, |&block| block as usize + 1)
    };
    let num_blocks = batch.sequences.iter().map(used).max().unwrap_or(0);
    let kv_columns = head_dim.saturating_mul(2 * BLOCK_LEN).saturating_mul(num_kv_heads);
    expect_buffer(OP, "kv", kv, num_blocks, kv_columns)?;

    let query = query.view::<T>(OP, "query")?;
    let held = kv.hold::<T>(OP, "kv")?;
    let kv = bytemuck::cast_slice::<u8, T>(&held);
    let out = out.view_mut::<T>(OP, "out")?;
    let mut row_blocks = Vec::new();
    let mut owners = Vec::new();
    for sequence in &batch.sequences {
        let longest = if sequence.rows.len() <= MAX_SINGLE_ROWS { 1 } else { QUERY_ROWS };
        for rows in tiles::row_blocks(sequence.rows.clone(), longest, if longest == 1 { 1 } else { 12 }) {
            row_blocks.push(rows);
            owners.push(sequence);
        }
    }
    tiles::for_each(&cpu.threads, out, width, &row_blocks, head_dim, |mut tile| {
        let (rows, head) = (tile.rows(), tile.columns().start / head_dim);
        let sequence = owners[row_blocks.partition_point(|block| block.start < rows.start)];
        let kv_head = head / (num_heads / num_kv_heads);
        let visible = sequence.first_token() + rows.start - sequence.rows.start + 1;
        // Keys (0) or values (1) of all tokens of a block of the sequence.
        let page = |index: usize, kind: usize| {
            let start = sequence.blocks[index] as usize * kv_columns;
            &kv[start + (kind * num_kv_heads + kv_head) * BLOCK_LEN * head_dim..][..BLOCK_LEN * head_dim]
        };
        let token =
            |index: usize, kind: usize| &page(index / BLOCK_LEN, kind)[index % BLOCK_LEN * head_dim..][..head_dim];
        let queries = &query[rows.start * width + head * head_dim..];
        scratch::with(|scratch| {
            if sequence.rows.len() <= MAX_SINGLE_ROWS {
                let result = attend_one(cpu.isa, scratch, &queries[..head_dim], visible, page);
                return tile.row(rows.start).iter_mut().zip(result).for_each(|(to, from)| *to = T::of(*from));
            }
            let attend = Attend {
                queries,
                query_stride: width,
                num_queries: rows.len(),
                head_dim,
                first_visible: visible,
                num_keys: sequence.context_len,
                key: |index| token(index, 0),
                value: |index| token(index, 1),
            };
            attend.run(cpu.isa, scratch, |query, result| {
                let out = tile.row(rows.start + query);
                out.iter_mut().zip(result).for_each(|(to, from)| *to = T::of(*from));
            });
        });
    });
    Ok(())
}

/// Attention of one query over the first `visible` tokens of the pages that `page` gives (keys 0, values 1).
fn attend_one<'a, 's, T: Element>(
    isa: Isa, scratch: &'s mut Scratch, query: &[T], visible: usize, page: impl Fn(usize, usize) -> &'a [T],
) -> &'s [f32] {
    const KEYS: usize = BLOCKS * BLOCK_LEN;
    let head_dim = query.len();
    let Scratch { rows, sums, scores, .. } = scratch;
    let (rows, sums, scores) = (grown(rows, head_dim), grown(sums, head_dim), grown(scores, KEYS));
    rows.iter_mut().zip(query).for_each(|(to, from)| *to = from.get());
    sums.fill(0.0);
    let mut softmax = [f32::NEG_INFINITY, 0.0];
    let scale = 1.0 / (head_dim as f32).sqrt();
    for first in (0..visible).step_by(KEYS) {
        let count = KEYS.min(visible - first);
        for (index, scores) in scores[..count.next_multiple_of(BLOCK_LEN)].chunks_exact_mut(BLOCK_LEN).enumerate() {
            let keys = page(first / BLOCK_LEN + index, 0);
            if simd::has_bf16_dot(isa) && T::DTYPE == cogvlm_core::DType::Bf16 {
                simd::dots_bf16(
                    isa,
                    bytemuck::cast_slice(query),
                    head_dim,
                    bytemuck::cast_slice(keys),
                    scores,
                    BLOCK_LEN,
                );
            } else {
                simd::dots_f32(isa, rows, head_dim, T::DTYPE, bytemuck::cast_slice(keys), scores, BLOCK_LEN);
            }
        }
        vectorised!(isa, {
            accumulate_softmax(&mut scores[..count], count, scale, &mut softmax, sums);
            for (index, shares) in scores[..count].chunks(BLOCK_LEN).enumerate() {
                add_values(shares, page(first / BLOCK_LEN + index, 1), sums);
            }
        });
    }
    sums.iter_mut().for_each(|sum| *sum /= softmax[1]);
    sums
}

/// Adds `shares` of the rows of `values` to `sums`.
#[inline(always)]
fn add_values<T: Element>(shares: &[f32], values: &[T], sums: &mut [f32]) {
    // Sums stay in registers while the rows pass.
    const LANES: usize = 32;
    let head_dim = sums.len();
    let rows = || shares.iter().zip(values.chunks_exact(head_dim));
    let (chunks, rest) = sums.as_chunks_mut::<LANES>();
    for (index, chunk) in chunks.iter_mut().enumerate() {
        let mut lanes = *chunk;
        for (share, value) in rows() {
            let value = &value[index * LANES..][..LANES];
            for lane in 0..LANES {
                lanes[lane] += share * value[lane].get();
            }
        }
        *chunk = lanes;
    }
    for (share, value) in rows() {
        for (sum, value) in rest.iter_mut().zip(&value[head_dim / LANES * LANES..]) {
            *sum += share * value.get();
        }
    }
}
