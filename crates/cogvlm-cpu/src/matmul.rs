//! Matrix products, finished tile by tile.
//!
//! The result of `x Wᵀ` is cut into tiles. One thread computes the sums of a tile in f32 and hands them to the
//! operation, which rounds, adds and stores them: no product is ever stored whole. Few rows are dot products, each row
//! of a weight read once (decoding: bound by memory). Many rows go through panels of a weight, packed for the inner
//! loop and used for all rows of the tile (prefill: bound by arithmetic).

use std::array;
use std::ops::Range;

use bytemuck::cast_slice;
use cogvlm_core::DType;

use crate::element::Element;
use crate::scratch::{self, Scratch, grown};
use crate::simd::{self, Isa, PANEL, Update};
use crate::threads::Threads;
use crate::tiles::{self, Tile};
use crate::weight::CpuWeight;

/// Up to this many rows are dot products.
const MAX_DOT_ROWS: usize = 8;

/// Rows of a tile of packed products; a multiple of the rows of every inner loop.
const MAX_TILE_ROWS: usize = 240;

/// Sums of a tile: they, a packed panel and the rows beside it stay in a second-level cache.
const MAX_TILE_SUMS: usize = 32 << 10;

/// Columns of a tile.
const TILE_COLUMNS: usize = 64;

/// Bytes of a row that are packed and multiplied at a time.
const DEPTH_BYTES: usize = 2048;

/// Bytes of weights that one task of dot products reads.
const DOT_TASK_BYTES: usize = 64 << 10;

/// The left operand.
#[derive(Clone, Copy)]
pub(crate) enum Input<'a, T> {
    /// Rows in memory, as long as the depth.
    Rows(&'a [T]),
    /// Made where needed: elements of row `.0` from column `.1` on.
    Made(&'a (dyn Fn(usize, usize, &mut [T]) + Sync)),
}

/// `x Wᵀ` for `N` weights of one shape.
pub(crate) struct Product<'a, T, const N: usize> {
    pub(crate) input: Input<'a, T>,
    /// Rows of x, and of the result.
    pub(crate) rows: Range<usize>,
    /// Columns of x, and of each weight.
    pub(crate) depth: usize,
    pub(crate) weights: [&'a CpuWeight; N],
}

impl<T: Element, const N: usize> Product<'_, T, N> {
    /// Columns of a tile that suit the product: `N` weights share a tile.
    pub(crate) fn tile_columns(&self) -> usize {
        if self.rows.len() > MAX_DOT_ROWS {
            return (TILE_COLUMNS / N).max(PANEL);
        }
        let row_bytes = self.depth * self.weights[0].dtype().size_bytes();
        (DOT_TASK_BYTES / row_bytes.max(1)).next_multiple_of(PANEL).clamp(PANEL, 8 * PANEL)
    }

    /// Calls `finish` for each row of each tile of `out`, `[rows, columns]`: with the row, its columns, the sums for
    /// them by each weight, and where the results go.
    pub(crate) fn finish_rows<O: Send>(
        &self, isa: Isa, threads: &Threads, out: &mut [O], columns: usize,
        finish: impl Fn(usize, Range<usize>, [&mut [f32]; N], &mut [O]) + Sync,
    ) {
        self.finish_tiles(isa, threads, out, columns, self.tile_columns(), |tile, sums| {
            for row in tile.rows() {
                finish(row, tile.columns(), sums.row(row - tile.rows().start), tile.row(row));
            }
        });
    }

    /// Calls `finish` for each tile of `out`, `[rows, columns]`, `width` columns wide.
    pub(crate) fn finish_tiles<O: Send>(
        &self, isa: Isa, threads: &Threads, out: &mut [O], columns: usize, width: usize,
        finish: impl Fn(&mut Tile<'_, O>, &mut Sums<'_, N>) + Sync,
    ) {
        let stride = width.next_multiple_of(PANEL);
        let row_limit = (MAX_TILE_SUMS / (N * stride) / 12 * 12).clamp(12, MAX_TILE_ROWS);
        let few = self.rows.len() <= MAX_DOT_ROWS;
        // Dot products read all rows many times over: they are widened and made once, before.
        let made = if few { self.few_rows(isa) } else { FewRows::default() };
        let row_blocks = tiles::row_blocks(self.rows.clone(), row_limit, 12);
        tiles::for_each(threads, out, columns, &row_blocks, width, |mut tile| {
            scratch::with(|scratch| {
                let mut sums = std::mem::take(&mut scratch.sums);
                let num_rows = tile.rows().len();
                let values = grown(&mut sums, N * num_rows * stride);
                for (index, weight) in self.weights.iter().enumerate() {
                    let values = &mut values[index * num_rows * stride..][..num_rows * stride];
                    if self.depth == 0 {
                        values.fill(0.0);
                    } else if few {
                        self.dot_rows(isa, &made, weight, tile.columns(), values, stride);
                    } else {
                        self.packed(isa, scratch, weight, tile.rows(), tile.columns(), values, stride);
                    }
                }
                let width = tile.columns().len();
                finish(&mut tile, &mut Sums { values, num_rows, stride, width });
                scratch.sums = sums;
            });
        });
    }

    /// All rows, as dot products with each of the weights want them.
    fn few_rows(&self, isa: Isa) -> FewRows {
        let elements: Vec<T> = match self.input {
            Input::Rows(x) => x[self.rows.start * self.depth..self.rows.end * self.depth].to_vec(),
            Input::Made(make) => {
                let mut elements = vec![T::of(0.0); self.rows.len() * self.depth];
                if self.depth > 0 {
                    elements.chunks_exact_mut(self.depth).zip(self.rows.clone()).for_each(|(to, row)| make(row, 0, to));
                }
                elements
            }
        };
        let mut rows = FewRows::default();
        if self.weights.iter().any(|weight| self.multiplies_bf16(isa, weight)) {
            rows.bf16 = cast_slice(&elements).to_vec();
        }
        if self.weights.iter().any(|weight| !self.multiplies_bf16(isa, weight)) {
            rows.f32 = elements.iter().map(|element| element.get()).collect();
        }
        rows
    }

    fn dot_rows(
        &self, isa: Isa, rows: &FewRows, weight: &CpuWeight, columns: Range<usize>, sums: &mut [f32], stride: usize,
    ) {
        let w = weight.rows(columns, self.depth);
        if self.multiplies_bf16(isa, weight) {
            simd::dots_bf16(isa, &rows.bf16, self.depth, w, sums, stride);
        } else {
            simd::dots_f32(isa, &rows.f32, self.depth, weight.dtype(), w, sums, stride);
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the place of a tile in all three matrices")]
    fn packed(
        &self, isa: Isa, scratch: &mut Scratch, weight: &CpuWeight, rows: Range<usize>, columns: Range<usize>,
        sums: &mut [f32], stride: usize,
    ) {
        let pairs = self.multiplies_bf16(isa, weight);
        let w = weight.rows(columns.clone(), self.depth);
        let size = weight.dtype().size_bytes();
        let step = DEPTH_BYTES / if pairs { 2 } else { 4 };
        let Scratch { rows: f32_rows, rows_bf16: bf16_rows, panel, pairs: pair_panel, .. } = scratch;
        for first in (0..self.depth).step_by(step) {
            let depth = step.min(self.depth - first);
            let update = if first == 0 { Update::Set } else { Update::Add };
            let x = if pairs {
                Operand::Bf16(self.bf16_rows(bf16_rows, rows.clone(), first, depth))
            } else {
                Operand::F32(self.f32_rows(f32_rows, rows.clone(), first, depth))
            };
            for column in (0..columns.len()).step_by(PANEL) {
                let count = PANEL.min(columns.len() - column);
                let panel_rows: [&[u8]; PANEL] = array::from_fn(|index| {
                    let start = ((column + index.min(count - 1)) * self.depth + first) * size;
                    &w[start..start + depth * size]
                });
                let sums = &mut sums[column..];
                match x {
                    Operand::F32((x, lda)) => {
                        let panel = grown(panel, depth * PANEL);
                        simd::pack_f32(isa, weight.dtype(), &panel_rows[..count], panel);
                        simd::tile_f32(isa, x, lda, rows.len(), panel, sums, stride, update);
                    }
                    Operand::Bf16((x, lda)) => {
                        let panel = grown(pair_panel, depth / 2 * PANEL);
                        simd::pack_pairs(isa, &panel_rows[..count], panel);
                        simd::tile_pairs(isa, x, lda, rows.len(), panel, sums, stride, update);
                    }
                }
            }
        }
    }

    /// Whether x and `weight` are multiplied in bf16, without widening.
    fn multiplies_bf16(&self, isa: Isa, weight: &CpuWeight) -> bool {
        let both = T::DTYPE == DType::Bf16 && weight.dtype() == DType::Bf16;
        both && self.depth.is_multiple_of(2) && simd::has_bf16_dot(isa)
    }

    /// Columns `first..first + depth` of `rows`, and how far apart rows are: where they lie, or copied to `made`.
    fn bf16_rows<'s>(
        &'s self, made: &'s mut Vec<u16>, rows: Range<usize>, first: usize, depth: usize,
    ) -> (&'s [u16], usize) {
        match self.input {
            Input::Rows(x) => (&cast_slice(x)[rows.start * self.depth + first..rows.end * self.depth], self.depth),
            Input::Made(make) => {
                let made = grown(made, rows.len() * depth);
                let rows = made.chunks_exact_mut(depth).zip(rows);
                rows.for_each(|(to, row)| make(row, first, bytemuck::cast_slice_mut(to)));
                (made, depth)
            }
        }
    }

    /// As [`Self::bf16_rows`], widened.
    fn f32_rows<'s>(
        &'s self, made: &'s mut Vec<f32>, rows: Range<usize>, first: usize, depth: usize,
    ) -> (&'s [f32], usize) {
        match self.input {
            Input::Rows(x) if T::DTYPE == DType::F32 => {
                (&cast_slice(x)[rows.start * self.depth + first..rows.end * self.depth], self.depth)
            }
            Input::Rows(x) => {
                let made = grown(made, rows.len() * depth);
                for (to, row) in made.chunks_exact_mut(depth).zip(rows) {
                    let from = &x[row * self.depth + first..][..depth];
                    to.iter_mut().zip(from).for_each(|(to, from)| *to = from.get());
                }
                (made, depth)
            }
            Input::Made(make) => {
                let made = grown(made, rows.len() * depth);
                let mut elements = vec![T::of(0.0); depth];
                for (to, row) in made.chunks_exact_mut(depth).zip(rows) {
                    make(row, first, &mut elements);
                    to.iter_mut().zip(&elements).for_each(|(to, from)| *to = from.get());
                }
                (made, depth)
            }
        }
    }
}

/// Rows of x as an inner loop takes them, and how far apart they are.
#[derive(Clone, Copy)]
enum Operand<'s> {
    F32((&'s [f32], usize)),
    Bf16((&'s [u16], usize)),
}

/// The rows of a product that has few, in each of the types that its weights are multiplied in.
#[derive(Default)]
struct FewRows {
    f32: Vec<f32>,
    bf16: Vec<u16>,
}

/// The sums of a tile, by each of `N` weights.
pub(crate) struct Sums<'a, const N: usize> {
    values: &'a mut [f32],
    num_rows: usize,
    stride: usize,
    width: usize,
}

impl<const N: usize> Sums<'_, N> {
    /// The sums of the tile's row `index`, from 0.
    pub(crate) fn row(&mut self, index: usize) -> [&mut [f32]; N] {
        let mut rest = &mut *self.values;
        array::from_fn(|_| {
            let (block, others) = std::mem::take(&mut rest).split_at_mut(self.num_rows * self.stride);
            rest = others;
            &mut block[index * self.stride..][..self.width]
        })
    }
}
