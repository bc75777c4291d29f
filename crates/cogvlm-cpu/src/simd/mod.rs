//! The inner loops, once for each level of vector instructions.
//!
//! Everything above this module is written once; the functions here choose the loop for an [`Isa`].
#![expect(unsafe_code, reason = "functions that use instructions beyond the baseline are called here")]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod isa;
pub(crate) mod math;
mod portable;

use cogvlm_core::DType;

pub use isa::Isa;
use isa::Level;
pub(crate) use isa::vectorised;

/// Columns of a packed panel, and of the block of sums that an inner loop holds.
pub(crate) const PANEL: usize = 32;

/// Packs rows of a weight, at most [`PANEL`] of them, into `panel`, `[depth][PANEL]` in f32; missing rows are zero.
pub(crate) fn pack_f32(isa: Isa, dtype: DType, rows: &[&[u8]], panel: &mut [f32]) {
    match isa.0 {
        // SAFETY: values of these levels exist only where the features were found.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Bf16 => unsafe { avx512::pack_f32(dtype, rows, panel) },
        _ => vectorised!(isa, portable::pack_f32(dtype, rows, panel)),
    }
}

/// Packs rows of bf16, at most [`PANEL`] of them, into `pairs`, `[depth / 2][PANEL]`, each word two neighbours of one
/// row; missing rows are zero. The depth is even.
pub(crate) fn pack_pairs(isa: Isa, rows: &[&[u8]], pairs: &mut [u32]) {
    match isa.0 {
        // SAFETY: as in `pack_f32`.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Bf16 => unsafe { avx512::pack_pairs(rows, pairs) },
        _ => portable::pack_pairs(rows, pairs),
    }
}

/// What becomes of the sums that a tile finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Update {
    /// They are replaced.
    Set,
    /// They are added to.
    Add,
}

/// `C = A B`, or `C += A B`: `a` `[m, depth]` with rows `lda` apart, `b` `[depth][PANEL]`, `c` `[m, PANEL]` with rows
/// `ldc` apart. Every sum is in ascending depth.
#[expect(clippy::too_many_arguments, reason = "three matrices and where their rows are")]
pub(crate) fn tile_f32(
    isa: Isa, a: &[f32], lda: usize, m: usize, b: &[f32], c: &mut [f32], ldc: usize, update: Update,
) {
    match isa.0 {
        // SAFETY: as in `pack_f32`.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Bf16 => unsafe { avx512::tile_f32(a, lda, m, b, c, ldc, update) },
        // SAFETY: as in `pack_f32`.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { avx2::tile_f32(a, lda, m, b, c, ldc, update) },
        Level::Portable => portable::tile_f32(a, lda, m, b, c, ldc, update),
    }
}

/// Whether products of bf16 have instructions of their own. Elsewhere [`tile_pairs`] and [`dots_bf16`] are slow.
pub(crate) fn has_bf16_dot(isa: Isa) -> bool {
    match isa.0 {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 => true,
        _ => false,
    }
}

/// As [`tile_f32`], of pairs of bf16: `a` `[m, depth]` in bits of bf16, `b` `[depth / 2][PANEL]`.
#[expect(clippy::too_many_arguments, reason = "as there")]
pub(crate) fn tile_pairs(
    isa: Isa, a: &[u16], lda: usize, m: usize, b: &[u32], c: &mut [f32], ldc: usize, update: Update,
) {
    match isa.0 {
        // SAFETY: as in `pack_f32`.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 => unsafe { avx512::tile_pairs(a, lda, m, b, c, ldc, update) },
        _ => portable::tile_pairs(a, lda, m, b, c, ldc, update),
    }
}

/// `c[i][j] = x[i] · w[j]`: `x` rows of `depth` elements, `w` rows of `depth` elements of `dtype`, rows of `c` `ldc`
/// apart. A result does not depend on the other rows of `x` and `w`.
pub(crate) fn dots_f32(isa: Isa, x: &[f32], depth: usize, dtype: DType, w: &[u8], c: &mut [f32], ldc: usize) {
    match isa.0 {
        // SAFETY: as in `pack_f32`.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Bf16 => unsafe { avx512::dots_f32(x, depth, dtype, w, c, ldc) },
        _ => vectorised!(isa, portable::dots_f32(x, depth, dtype, w, c, ldc)),
    }
}

/// As [`dots_f32`], both sides in bf16.
pub(crate) fn dots_bf16(isa: Isa, x: &[u16], depth: usize, w: &[u8], c: &mut [f32], ldc: usize) {
    match isa.0 {
        // SAFETY: as in `pack_f32`.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512Bf16 => unsafe { avx512::dots_bf16(x, depth, w, c, ldc) },
        _ => portable::dots_bf16(x, depth, w, c, ldc),
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    /// Small integers, exact in every type and in every sum of these tests, whatever the order.
    fn integers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|index| ((index * 7 + seed * 13 + index * index % 11) % 9) as f32 - 4.0).collect()
    }

    fn bytes(values: &[f32], dtype: DType) -> Vec<u8> {
        match dtype {
            DType::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            DType::Bf16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
            DType::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
        }
    }

    fn bits(values: &[f32]) -> Vec<u16> {
        values.iter().map(|value| bf16::from_f32(*value).to_bits()).collect()
    }

    fn product(x: &[f32], w: &[f32], depth: usize) -> Vec<f32> {
        let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(a, b)| a * b).sum::<f32>();
        x.chunks_exact(depth).flat_map(|x| w.chunks_exact(depth).map(move |w| dot(x, w))).collect()
    }

    /// Calls `check` for every level, and rows of x, rows of w and depths with every kind of remainder.
    fn for_all(row_limit: usize, check: impl Fn(Isa, usize, usize, usize)) {
        for isa in Isa::available() {
            for m in 1..=row_limit {
                for (n, depth) in [(1, 1), (3, 2), (32, 16), (31, 17), (5, 31), (7, 32), (9, 33), (17, 130), (32, 64)] {
                    check(isa, m, n, depth);
                }
            }
        }
    }

    #[test]
    fn dots_are_exact_at_every_level() {
        for_all(10, |isa, m, n, depth| {
            let (x, w) = (integers(m * depth, 1), integers(n * depth, 2));
            let expected = product(&x, &w, depth);
            for dtype in [DType::F32, DType::Bf16, DType::F16] {
                // One byte off: at no address that is aligned to anything.
                let w = [vec![0], bytes(&w, dtype)].concat();
                let mut c = vec![9.0; m * n];
                dots_f32(isa, &x, depth, dtype, &w[1..], &mut c, n);
                assert_eq!(c, expected, "{isa} {dtype}: {m} x {n} x {depth}");
            }
            let w = [vec![0], bytes(&w, DType::Bf16)].concat();
            let mut c = vec![9.0; m * n];
            dots_bf16(isa, &bits(&x), depth, &w[1..], &mut c, n);
            assert_eq!(c, expected, "{isa} pairs: {m} x {n} x {depth}");
        });
    }

    #[test]
    fn tiles_are_exact_at_every_level() {
        for_all(27, |isa, m, n, depth| {
            let (x, w) = (integers(m * depth, 3), integers(n * depth, 4));
            let expected = product(&x, &w, depth);
            let check = |c: &[f32], what: &str| {
                for (index, row) in c.chunks_exact(PANEL + 1).enumerate() {
                    let sums: Vec<f32> = expected[index * n..][..n].iter().map(|sum| sum + 1.0).collect();
                    assert_eq!(row[..n], sums, "{isa} {what}: {m} x {n} x {depth}");
                    assert!(row[n..PANEL].iter().all(|&beyond| beyond == 1.0), "{isa} {what}: {m} x {n} x {depth}");
                    assert_eq!(row[PANEL], 7.0, "{isa} {what} writes beside its rows");
                }
            };
            for dtype in [DType::F32, DType::Bf16, DType::F16] {
                let w = [vec![0], bytes(&w, dtype)].concat();
                let rows: Vec<&[u8]> = w[1..].chunks_exact(depth * dtype.size_bytes()).collect();
                let mut panel = vec![f32::NAN; depth * PANEL];
                pack_f32(isa, dtype, &rows, &mut panel);
                let mut c = vec![7.0; m * (PANEL + 1)];
                tile_f32(isa, &x, depth, m, &panel, &mut c, PANEL + 1, Update::Set);
                tile_f32(isa, &vec![1.0; m], 1, m, &[1.0; PANEL], &mut c, PANEL + 1, Update::Add);
                check(&c, &format!("{dtype}"));
            }
            if depth.is_multiple_of(2) {
                let w = [vec![0], bytes(&w, DType::Bf16)].concat();
                let rows: Vec<&[u8]> = w[1..].chunks_exact(depth * 2).collect();
                let mut pairs = vec![u32::MAX; depth / 2 * PANEL];
                pack_pairs(isa, &rows, &mut pairs);
                let mut c = vec![7.0; m * (PANEL + 1)];
                tile_pairs(isa, &bits(&x), depth, m, &pairs, &mut c, PANEL + 1, Update::Set);
                let one = bits(&[1.0, 0.0].repeat(m));
                tile_pairs(isa, &one, 2, m, &[0x3f80; PANEL], &mut c, PANEL + 1, Update::Add);
                check(&c, "pairs");
            }
        });
    }

    #[test]
    fn a_dot_product_does_not_depend_on_its_company() {
        let depth = 77;
        let value = |index: usize| ((index * 37 % 101) as f32 / 50.0 - 1.0) * 1.1;
        let x: Vec<f32> = (0..8 * depth).map(value).collect();
        let w = bytes(&(0..9 * depth).map(|index| value(index + 5)).collect::<Vec<_>>(), DType::Bf16);
        for isa in Isa::available() {
            let mut together = vec![0.0; 8 * 9];
            dots_f32(isa, &x, depth, DType::Bf16, &w, &mut together, 9);
            for (row, x) in x.chunks_exact(depth).enumerate() {
                for (column, w) in w.chunks_exact(2 * depth).enumerate() {
                    let mut alone = [0.0];
                    dots_f32(isa, x, depth, DType::Bf16, w, &mut alone, 1);
                    assert_eq!(alone[0].to_bits(), together[row * 9 + column].to_bits(), "{isa}");
                }
            }
        }
    }
}
