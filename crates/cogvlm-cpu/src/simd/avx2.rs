//! Inner loops in AVX2 and FMA.
#![expect(unsafe_code, reason = "vector loads and stores take pointers")]

use std::arch::x86_64::*;

use super::{PANEL, Update};

/// Rows whose sums are held at once: with two vectors each they leave registers for a line of half a panel.
const ROWS: usize = 6;

/// As [`super::tile_f32`].
#[target_feature(enable = "avx2,fma")]
pub(super) fn tile_f32(a: &[f32], lda: usize, m: usize, b: &[f32], c: &mut [f32], ldc: usize, update: Update) {
    let depth = b.len() / PANEL;
    assert!(m == 0 || a.len() >= (m - 1) * lda + depth, "{m} rows of {depth}, {lda} apart, in {}", a.len());
    assert!(m == 0 || c.len() >= (m - 1) * ldc + PANEL, "{m} rows of {PANEL}, {ldc} apart, in {}", c.len());
    for first in (0..m).step_by(ROWS) {
        for half in [0, PANEL / 2] {
            // SAFETY: the assertions hold for all `m` rows, so they do for those from `first` on.
            unsafe {
                let (a, b) = (a.as_ptr().add(first * lda), b.as_ptr().add(half));
                let c = c.as_mut_ptr().add(first * ldc + half);
                match m - first {
                    1 => block::<1>(a, lda, b, depth, c, ldc, update),
                    2 => block::<2>(a, lda, b, depth, c, ldc, update),
                    3 => block::<3>(a, lda, b, depth, c, ldc, update),
                    4 => block::<4>(a, lda, b, depth, c, ldc, update),
                    5 => block::<5>(a, lda, b, depth, c, ldc, update),
                    _ => block::<ROWS>(a, lda, b, depth, c, ldc, update),
                }
            }
        }
    }
}

/// `M` rows of half a tile.
///
/// # Safety
/// `a` has `M` rows of `depth`, `lda` apart, `b` half of `depth` lines of [`PANEL`], `c` `M` rows of half a
/// [`PANEL`], `ldc` apart.
#[target_feature(enable = "avx2,fma")]
unsafe fn block<const M: usize>(
    a: *const f32, lda: usize, b: *const f32, depth: usize, c: *mut f32, ldc: usize, update: Update,
) {
    let mut sums = [[_mm256_setzero_ps(); 2]; M];
    for k in 0..depth {
        // SAFETY: line k of b, element k of each row of a, by the contract.
        unsafe {
            let line = [_mm256_loadu_ps(b.add(k * PANEL)), _mm256_loadu_ps(b.add(k * PANEL + 8))];
            for (row, sums) in sums.iter_mut().enumerate() {
                let value = _mm256_set1_ps(*a.add(row * lda + k));
                sums[0] = _mm256_fmadd_ps(value, line[0], sums[0]);
                sums[1] = _mm256_fmadd_ps(value, line[1], sums[1]);
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        for (part, &sum) in sums.iter().enumerate() {
            // SAFETY: within row `row` of c, by the contract.
            unsafe {
                let c = c.add(row * ldc + 8 * part);
                let sum = if update == Update::Add { _mm256_add_ps(_mm256_loadu_ps(c), sum) } else { sum };
                _mm256_storeu_ps(c, sum);
            }
        }
    }
}
