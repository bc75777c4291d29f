//! Softmax attention of a block of queries of one head, keys block by block, with a running maximum and sum.

use std::ops::Range;

use bytemuck::{cast_slice, cast_slice_mut};
use cogvlm_core::DType;
use half::bf16;

use crate::element::Element;
use crate::scratch::{Scratch, grown};
use crate::simd::{self, Isa, PANEL, Update, math, vectorised};

/// Queries of a block.
pub(crate) const QUERY_ROWS: usize = 420;

/// Rows that inner loops take at once, or a multiple of them.
const ROWS: usize = 12;

/// Keys of a block.
const KEY_ROWS: usize = 128;

/// Queries of one head, and the keys and values that they see.
pub(crate) struct Attend<'a, T, K, V> {
    /// Query `i` is at `i * query_stride`.
    pub(crate) queries: &'a [T],
    pub(crate) query_stride: usize,
    pub(crate) num_queries: usize,
    pub(crate) head_dim: usize,
    /// Keys that query `i` sees: `first_visible + i`, but no more than `num_keys`.
    pub(crate) first_visible: usize,
    pub(crate) num_keys: usize,
    /// Key of a token.
    pub(crate) key: K,
    /// Value of a token.
    pub(crate) value: V,
}

impl<'a, T: Element, K: Fn(usize) -> &'a [T], V: Fn(usize) -> &'a [T]> Attend<'a, T, K, V> {
    /// Calls `store` with the result of each query.
    pub(crate) fn run(&self, isa: Isa, scratch: &mut Scratch, mut store: impl FnMut(usize, &[f32])) {
        let Scratch { rows, rows_bf16, panel, pairs, sums, scores, softmax } = scratch;
        let (num_queries, head_dim) = (self.num_queries, self.head_dim);
        let use_pairs = T::DTYPE == DType::Bf16 && simd::has_bf16_dot(isa);
        let stride = head_dim.next_multiple_of(PANEL);
        let sums = grown(sums, num_queries * stride);
        sums.fill(0.0);
        let softmax = grown(softmax, num_queries);
        softmax.fill([f32::NEG_INFINITY, 0.0]);
        let scores = grown(scores, num_queries * KEY_ROWS);
        let probabilities = grown(rows_bf16, if use_pairs { num_queries * KEY_ROWS } else { 0 });
        let queries = grown(rows, if use_pairs { 0 } else { num_queries * head_dim });
        if !use_pairs {
            for (to, from) in queries.chunks_exact_mut(head_dim).zip(self.queries.chunks(self.query_stride)) {
                to.iter_mut().zip(from).for_each(|(to, from)| *to = from.get());
            }
        }

        for first_key in (0..self.visible(num_queries.saturating_sub(1))).step_by(KEY_ROWS) {
            let keys = first_key..self.visible(num_queries - 1).min(first_key + KEY_ROWS);
            for first in keys.clone().step_by(PANEL) {
                let count = PANEL.min(keys.end - first);
                let rows: [&[u8]; PANEL] =
                    std::array::from_fn(|index| cast_slice((self.key)(first + index.min(count - 1))));
                // Queries before this one see none of these keys; their scores stay what they were, and are not read.
                let query = self.first_query(first);
                let scores = &mut scores[query * KEY_ROWS + first - first_key..];
                if use_pairs {
                    let pairs = grown(pairs, head_dim / 2 * PANEL);
                    simd::pack_pairs(isa, &rows[..count], pairs);
                    let (lda, rows) = (self.query_stride, num_queries - query);
                    let queries = cast_slice(&self.queries[query * lda..]);
                    simd::tile_pairs(isa, queries, lda, rows, pairs, scores, KEY_ROWS, Update::Set);
                } else {
                    let panel = grown(panel, head_dim * PANEL);
                    simd::pack_f32(isa, T::DTYPE, &rows[..count], panel);
                    let (queries, rows) = (&queries[query * head_dim..], num_queries - query);
                    simd::tile_f32(isa, queries, head_dim, rows, panel, scores, KEY_ROWS, Update::Set);
                }
            }

            let depth = keys.len().next_multiple_of(2);
            let first_query = self.first_query(first_key);
            for query in first_query..num_queries {
                let scores = &mut scores[query * KEY_ROWS..][..depth];
                let visible = self.visible(query).saturating_sub(first_key).min(keys.len());
                let sums = &mut sums[query * stride..][..stride];
                vectorised!(isa, accumulate_softmax(scores, visible, self.scale(), &mut softmax[query], sums));
                if use_pairs {
                    let probabilities: &mut [bf16] = cast_slice_mut(&mut probabilities[query * KEY_ROWS..][..depth]);
                    vectorised!(isa, {
                        for (to, from) in probabilities.iter_mut().zip(scores) {
                            *to = Element::of(*from);
                        }
                    });
                }
            }

            for column in (0..head_dim).step_by(PANEL) {
                let columns = column..head_dim.min(column + PANEL);
                let sums = &mut sums[first_query * stride + column..];
                let rows = num_queries - first_query;
                if use_pairs {
                    let pairs = grown(pairs, depth / 2 * PANEL);
                    vectorised!(isa, self.pack_value_pairs(keys.clone(), columns, pairs));
                    let shares = &probabilities[first_query * KEY_ROWS..];
                    simd::tile_pairs(isa, shares, KEY_ROWS, rows, pairs, sums, stride, Update::Add);
                } else {
                    let panel = grown(panel, keys.len() * PANEL);
                    vectorised!(isa, self.pack_values(keys.clone(), columns, panel));
                    let shares = &scores[first_query * KEY_ROWS..];
                    simd::tile_f32(isa, shares, KEY_ROWS, rows, panel, sums, stride, Update::Add);
                }
            }
        }

        for query in 0..num_queries {
            let sums = &mut sums[query * stride..][..head_dim];
            let total = softmax[query][1];
            sums.iter_mut().for_each(|sum| *sum /= total);
            store(query, sums);
        }
    }

    fn visible(&self, query: usize) -> usize {
        (self.first_visible + query).min(self.num_keys)
    }

    /// The first query that sees key `key`, or one shortly before it, at the start of a block of rows.
    fn first_query(&self, key: usize) -> usize {
        (key + 1).saturating_sub(self.first_visible) / ROWS * ROWS
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Columns of values, `[keys][PANEL]`.
    #[inline(always)]
    fn pack_values(&self, keys: Range<usize>, columns: Range<usize>, panel: &mut [f32]) {
        for (line, key) in panel.as_chunks_mut::<PANEL>().0.iter_mut().zip(keys) {
            let value = &(self.value)(key)[columns.clone()];
            for (to, from) in line.iter_mut().zip(value) {
                *to = from.get();
            }
            line[value.len()..].fill(0.0);
        }
    }

    /// Columns of pairs of neighbouring values, `[keys / 2][PANEL]`; zero beside a last one without a neighbour.
    #[inline(always)]
    fn pack_value_pairs(&self, keys: Range<usize>, columns: Range<usize>, pairs: &mut [u32]) {
        let first_keys = keys.clone().step_by(2);
        for (line, key) in pairs.as_chunks_mut::<PANEL>().0.iter_mut().zip(first_keys) {
            let low: &[u16] = cast_slice(&(self.value)(key)[columns.clone()]);
            if key + 1 < keys.end {
                let high: &[u16] = cast_slice(&(self.value)(key + 1)[columns.clone()]);
                let both = low.iter().zip(high);
                for (to, (low, high)) in line.iter_mut().zip(both) {
                    *to = u32::from(*low) | u32::from(*high) << 16;
                }
            } else {
                line.iter_mut().zip(low).for_each(|(to, low)| *to = u32::from(*low));
            }
            line[low.len()..].fill(0);
        }
    }
}

/// Turns the first `visible` scores into shares, relative to the greatest score so far, and the others into 0;
/// rescales what was summed relative to the greatest before.
#[inline(always)]
pub(crate) fn accumulate_softmax(
    scores: &mut [f32], visible: usize, scale: f32, [greatest, total]: &mut [f32; 2], sums: &mut [f32],
) {
    let (seen, unseen) = scores.split_at_mut(visible);
    unseen.fill(0.0);
    if seen.is_empty() {
        return;
    }
    let now = math::max(seen) * scale;
    if now > *greatest {
        let shrink = math::exp(*greatest - now);
        *greatest = now;
        *total *= shrink;
        for sum in sums {
            *sum *= shrink;
        }
    }
    let base = *greatest;
    for score in &mut *seen {
        *score = math::exp(*score * scale - base);
    }
    *total += math::sum(seen, |share| share);
}
