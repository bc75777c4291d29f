//! What the host could do at most: measured, so that speeds can be given as a share of it.

use std::hint::black_box;
use std::time::Instant;

use cogvlm_core::DType;
use rayon::prelude::*;

use crate::simd::{self, Isa, PANEL, Update, vectorised};

/// Larger than any cache, and large enough to time.
const READ_BYTES: usize = 1 << 30;
/// Depth of the product that the arithmetic is measured with: its operands stay in the first cache.
const DEPTH: usize = 128;

/// Bytes per second that all cores together read from memory: the median of nine passes over 1 GiB, since speeds are
/// given as medians too.
pub fn read_bytes_per_s() -> f64 {
    let words = vec![1_u64; READ_BYTES / 8];
    let sum = |chunk: &[u64]| chunk.iter().fold(0_u64, |sum, word| sum.wrapping_add(*word));
    let isa = Isa::best();
    let pass = || {
        let start = Instant::now();
        let total: u64 = words.par_chunks(1 << 17).map(|chunk| vectorised!(isa, sum(chunk))).sum();
        black_box(total);
        READ_BYTES as f64 / start.elapsed().as_secs_f64()
    };
    let mut rates: Vec<f64> = (0..9).map(|_| pass()).collect();
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

/// Operations per second of all cores together in the innermost loop of a matrix product, its operands in the first
/// cache: f32, or bf16 with f32 sums.
pub fn flops_per_s(dtype: DType) -> f64 {
    let isa = Isa::best();
    let pairs = dtype == DType::Bf16 && simd::has_bf16_dot(isa);
    let rows = 16;
    let rounds = 20_000;
    let work = || {
        let mut sums = vec![0.0_f32; rows * PANEL];
        if pairs {
            let (a, b) = (vec![0x3c00_u16; rows * DEPTH], vec![0x3c00_3c00_u32; DEPTH / 2 * PANEL]);
            for _ in 0..rounds {
                simd::tile_pairs(isa, black_box(&a), DEPTH, rows, &b, &mut sums, PANEL, Update::Add);
            }
        } else {
            let (a, b) = (vec![1e-3_f32; rows * DEPTH], vec![1e-3_f32; DEPTH * PANEL]);
            for _ in 0..rounds {
                simd::tile_f32(isa, black_box(&a), DEPTH, rows, &b, &mut sums, PANEL, Update::Add);
            }
        }
        black_box(sums);
    };
    let threads = rayon::current_num_threads();
    let operations = (2 * rows * DEPTH * PANEL * rounds * threads) as f64;
    let pass = || {
        let start = Instant::now();
        (0..threads).into_par_iter().with_max_len(1).for_each(|_| work());
        operations / start.elapsed().as_secs_f64()
    };
    (0..4).map(|_| pass()).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ceilings_are_those_of_a_computer() {
        assert!((1e8..1e13).contains(&read_bytes_per_s()));
        for dtype in [DType::F32, DType::Bf16] {
            assert!((1e8..1e14).contains(&flops_per_s(dtype)));
        }
    }
}
