//! The inner loops, once for each level of vector instructions.
//!
//! Everything above this module is written once; the functions here choose the loop for an [`Isa`].

mod isa;
pub(crate) mod math;
mod portable;

use cogvlm_core::DType;

pub use isa::Isa;

/// Columns of a packed panel, and of the block of sums that an inner loop holds.
pub(crate) const PANEL: usize = 32;

/// Packs rows of a weight, at most [`PANEL`] of them, into `panel`, `[depth][PANEL]` in f32; missing rows are zero.
pub(crate) fn pack_f32(isa: Isa, dtype: DType, rows: &[&[u8]], panel: &mut [f32]) {
    isa.vectorised(|| portable::pack_f32(dtype, rows, panel));
}

/// Packs rows of bf16, at most [`PANEL`] of them, into `pairs`, `[depth / 2][PANEL]`, each word two neighbours of one
/// row; missing rows are zero. The depth is even.
pub(crate) fn pack_pairs(isa: Isa, rows: &[&[u8]], pairs: &mut [u32]) {
    isa.vectorised(|| portable::pack_pairs(rows, pairs));
}

/// Packs `depth` rows of values, each cut to at most [`PANEL`] columns, into `panel`, `[depth][PANEL]` in f32.
/// `C += A B`: `a` `[m, depth]` with rows `lda` apart, `b` `[depth][PANEL]`, `c` `[m, PANEL]` with rows `ldc` apart.
/// Every sum is in ascending depth.
pub(crate) fn tile_f32(isa: Isa, a: &[f32], lda: usize, m: usize, b: &[f32], c: &mut [f32], ldc: usize) {
    isa.vectorised(|| portable::tile_f32(a, lda, m, b, c, ldc));
}

/// Whether products of bf16 have instructions of their own: then [`tile_pairs`] and [`dots_bf16`] may be called.
pub(crate) fn has_bf16_dot(_isa: Isa) -> bool {
    false
}

/// `C += A B` as [`tile_f32`], of pairs of bf16: `a` `[m, depth]` in bits of bf16, `b` `[depth / 2][PANEL]`.
pub(crate) fn tile_pairs(isa: Isa, a: &[u16], lda: usize, m: usize, b: &[u32], c: &mut [f32], ldc: usize) {
    let _ = (isa, a, lda, m, b, c, ldc);
}

/// `c[i][j] = x[i] · w[j]`: `x` `[m, depth]`, `w` rows of `depth` elements of `dtype`, one after the other; rows of
/// `c` are `ldc` apart. A result does not depend on `m`, or on the other rows of `w`.
pub(crate) fn dots_f32(isa: Isa, x: &[f32], depth: usize, dtype: DType, w: &[u8], c: &mut [f32], ldc: usize) {
    isa.vectorised(|| portable::dots_f32(x, depth, dtype, w, c, ldc));
}

/// As [`dots_f32`], both sides in bf16.
pub(crate) fn dots_bf16(isa: Isa, x: &[u16], depth: usize, w: &[u8], c: &mut [f32], ldc: usize) {
    let _ = (isa, x, depth, w, c, ldc);
}
