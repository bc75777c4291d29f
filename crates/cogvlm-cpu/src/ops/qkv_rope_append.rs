//! `[q | k | v] = x Wᵀ`, q and k rotated, k and v into the paged cache
#![expect(unsafe_code, reason = "a tile of the product goes to scattered rows of two buffers")]

use cogvlm_backend::{BackendError, ExpertWeights, HeadGeometry, RopeMode};
use cogvlm_core::tokens::ExpertRange;
use cogvlm_core::workspace::BLOCK_LEN;

use super::expert_weight;
use crate::backend::CpuBackend;
use crate::buffer::CpuBuffer;
use crate::element::Element;
use crate::matmul::{Input, Product};
use crate::shape::{expect, expect_buffer, expect_heads, expect_ranges, expect_weight};
use crate::simd::vectorised;
use crate::tables::CpuTables;
use crate::tiles::Disjoint;
use crate::weight::CpuWeight;

#[expect(clippy::too_many_arguments, reason = "one fused operation, as the trait has it")]
pub(crate) fn qkv_rope_append<T: Element>(
    cpu: &CpuBackend, x: &CpuBuffer, weights: ExpertWeights<'_, CpuWeight>, ranges: &[ExpertRange],
    heads: HeadGeometry, rope: &CpuBuffer, mode: RopeMode, tables: &CpuTables, query: &mut CpuBuffer,
    kv: &mut CpuBuffer,
) -> Result<(), BackendError> {
    const OP: &str = "qkv_rope_append";
    let HeadGeometry { num_heads, num_kv_heads, head_dim } = heads;
    let (batch, slots, depth) = (tables.batch(), tables.slots(), x.columns());
    let (rows, columns) =
        (batch.num_rows(), head_dim.saturating_mul(num_heads.saturating_add(num_kv_heads.saturating_mul(2))));
    expect_heads(OP, heads)?;
    expect_buffer(OP, "x", x, rows, depth)?;
    expect_ranges(OP, ranges, rows)?;
    let covered: usize = ranges.iter().map(|range| range.rows.len()).sum();
    expect(OP, "ranges", &[covered], covered == rows, || format!("ranges of all {rows} rows of the batch"))?;
    expect_buffer(OP, "query", query, rows, num_heads.saturating_mul(head_dim))?;
    let kv_columns = head_dim.saturating_mul(2 * BLOCK_LEN).saturating_mul(num_kv_heads);
    let num_blocks = slots.iter().max().map_or(0, |slot| slot / BLOCK_LEN + 1);
    expect_buffer(OP, "kv", kv, num_blocks, kv_columns)?;
    let num_positions = batch.position_ids.iter().max().map_or(0, |&position| position as usize + 1);
    expect_buffer(OP, "rope", rope, num_positions, head_dim)?;
    for range in ranges.iter().filter(|range| !range.rows.is_empty()) {
        expect_weight(OP, "weights", expert_weight(OP, weights, range)?, &[columns, depth])?;
    }

    let (x, rope) = (x.view::<T>(OP, "x")?, rope.view::<f32>(OP, "rope")?);
    let query = Disjoint::new(query.view_mut::<T>(OP, "query")?);
    let mut held = kv.hold_mut::<T>(OP, "kv")?;
    let kv = Disjoint::new(bytemuck::cast_slice_mut::<u8, T>(&mut held));
    for range in ranges.iter().filter(|range| !range.rows.is_empty()) {
        let weights = [expert_weight(OP, weights, range)?];
        let product = Product { input: Input::Rows(x), rows: range.rows.clone(), depth, weights };
        // The product is cut into heads. It is a matrix of nothing: what is computed of it goes elsewhere.
        let heads = &mut vec![(); rows * columns];
        product.finish_tiles(cpu.isa, &cpu.threads, heads, columns, head_dim, |tile, sums| {
            let head = tile.columns().start / head_dim;
            for row in tile.rows() {
                let [sums] = sums.row(row - tile.rows().start);
                let destination = if head < num_heads {
                    let start = (row * num_heads + head) * head_dim;
                    // SAFETY: no other tile has this row of this head (`finish_tiles`), so none has this part.
                    unsafe { query.part(start..start + head_dim) }
                } else {
                    // Keys of all heads, then values of all heads.
                    let (block, offset) = (slots[row] / BLOCK_LEN, slots[row] % BLOCK_LEN);
                    let start = block * kv_columns + ((head - num_heads) * BLOCK_LEN + offset) * head_dim;
                    // SAFETY: as above; slots of different rows differ (`CpuTables::set`), and so do their parts.
                    unsafe { kv.part(start..start + head_dim) }
                };
                vectorised!(cpu.isa, {
                    if head < num_heads + num_kv_heads {
                        let angles = &rope[batch.position_ids[row] as usize * head_dim..][..head_dim];
                        rotate(sums, angles, mode, destination);
                    } else {
                        for (to, sum) in destination.iter_mut().zip(sums) {
                            *to = T::of(*sum);
                        }
                    }
                });
            }
        });
    }
    Ok(())
}

/// Rotates `head`, rounded first; `angles` holds the cosines, then the sines.
#[inline(always)]
fn rotate<T: Element>(head: &[f32], angles: &[f32], mode: RopeMode, rotated: &mut [T]) {
    let half = head.len() / 2;
    let ((low, high), (cos, sin)) = (head.split_at(half), angles.split_at(half));
    let (rotated_low, rotated_high) = rotated.split_at_mut(half);
    // What happens to each of the two products of a sum.
    let product = |value: f32| match mode {
        RopeMode::Float32 => value,
        RopeMode::Published => T::round(value),
    };
    for j in 0..half {
        let (low, high) = (T::round(low[j]), T::round(high[j]));
        rotated_low[j] = T::of(product(low * cos[j]) - product(high * sin[j]));
        rotated_high[j] = T::of(product(low * sin[j]) + product(high * cos[j]));
    }
}
