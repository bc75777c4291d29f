//! Inner loops for any machine, written so that compilers find their vectors.

use cogvlm_core::DType;
use half::{bf16, f16};

use super::{PANEL, Update};
use crate::element::Element;

/// Rows whose sums are held at once.
const ROWS: usize = 2;

/// As [`super::tile_f32`].
pub(super) fn tile_f32(a: &[f32], lda: usize, m: usize, b: &[f32], c: &mut [f32], ldc: usize, update: Update) {
    let panel = b.as_chunks::<PANEL>().0;
    for first in (0..m).step_by(ROWS) {
        let a = &a[first * lda..];
        let c = &mut c[first * ldc..];
        if m - first >= ROWS {
            block::<ROWS>(a, lda, panel, c, ldc, update);
        } else {
            block::<1>(a, lda, panel, c, ldc, update);
        }
    }
}

#[inline(always)]
fn block<const M: usize>(a: &[f32], lda: usize, panel: &[[f32; PANEL]], c: &mut [f32], ldc: usize, update: Update) {
    // Half a panel at a time: the sums of two rows then fit into sixteen registers of four lanes.
    const HALF: usize = PANEL / 2;
    for half in 0..2 {
        let mut sums = [[0.0f32; HALF]; M];
        for (depth, row) in panel.iter().enumerate() {
            let row = &row[half * HALF..][..HALF];
            for (index, sums) in sums.iter_mut().enumerate() {
                let value = a[index * lda + depth];
                sums.iter_mut().zip(row).for_each(|(sum, weight)| *sum += value * weight);
            }
        }
        for (index, sums) in sums.iter().enumerate() {
            let row = &mut c[index * ldc + half * HALF..][..HALF];
            for (to, sum) in row.iter_mut().zip(sums) {
                *to = if update == Update::Add { *to + sum } else { *sum };
            }
        }
    }
}

/// `x · w` in sixteen partial sums.
#[inline(always)]
pub(super) fn dot(x: &[f32], w: impl Fn(usize) -> f32) -> f32 {
    const LANES: usize = 16;
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0.0f32; LANES];
    for (index, chunk) in chunks.iter().enumerate() {
        for lane in 0..LANES {
            lanes[lane] += chunk[lane] * w(index * LANES + lane);
        }
    }
    for (lane, value) in rest.iter().enumerate() {
        lanes[lane] += value * w(chunks.len() * LANES + lane);
    }
    lanes.iter().sum()
}

/// As [`super::pack_f32`].
#[inline(always)]
pub(super) fn pack_f32(dtype: DType, rows: &[&[u8]], panel: &mut [f32]) {
    let panel = panel.as_chunks_mut::<PANEL>().0;
    for column in 0..PANEL {
        let Some(row) = rows.get(column) else {
            panel.iter_mut().for_each(|line| line[column] = 0.0);
            continue;
        };
        match dtype {
            DType::F32 => {
                let values = row.as_chunks::<4>().0;
                panel.iter_mut().zip(values).for_each(|(line, value)| line[column] = f32::from_le_bytes(*value));
            }
            DType::Bf16 => {
                let values = row.as_chunks::<2>().0;
                panel.iter_mut().zip(values).for_each(|(line, value)| line[column] = bf16::from_le_bytes(*value).get());
            }
            DType::F16 => {
                let values = row.as_chunks::<2>().0;
                panel
                    .iter_mut()
                    .zip(values)
                    .for_each(|(line, value)| line[column] = f16::from_le_bytes(*value).to_f32());
            }
        }
    }
}

/// As [`super::pack_pairs`].
#[inline(always)]
pub(super) fn pack_pairs(rows: &[&[u8]], pairs: &mut [u32]) {
    let panel = pairs.as_chunks_mut::<PANEL>().0;
    for column in 0..PANEL {
        match rows.get(column) {
            None => panel.iter_mut().for_each(|line| line[column] = 0),
            Some(row) => {
                let values = row.as_chunks::<4>().0;
                panel.iter_mut().zip(values).for_each(|(line, value)| line[column] = u32::from_le_bytes(*value));
            }
        }
    }
}

/// As [`super::dots_f32`].
#[inline(always)]
pub(super) fn dots_f32(x: &[f32], depth: usize, dtype: DType, w: &[u8], c: &mut [f32], ldc: usize) {
    for (column, row) in w.chunks_exact(depth * dtype.size_bytes()).enumerate() {
        for (index, x) in x.chunks_exact(depth).enumerate() {
            c[index * ldc + column] = match dtype {
                DType::F32 => {
                    let row = row.as_chunks::<4>().0;
                    dot(x, |at| f32::from_le_bytes(row[at]))
                }
                DType::Bf16 => {
                    let row = row.as_chunks::<2>().0;
                    dot(x, |at| bf16::from_le_bytes(row[at]).get())
                }
                DType::F16 => {
                    let row = row.as_chunks::<2>().0;
                    dot(x, |at| f16::from_le_bytes(row[at]).to_f32())
                }
            };
        }
    }
}

/// As [`super::tile_pairs`].
pub(super) fn tile_pairs(a: &[u16], lda: usize, m: usize, b: &[u32], c: &mut [f32], ldc: usize, update: Update) {
    let widen = |bits: u32| f32::from_bits(bits << 16);
    for (row, a) in a.chunks(lda).take(m).enumerate() {
        let c = &mut c[row * ldc..][..PANEL];
        if update == Update::Set {
            c.fill(0.0);
        }
        for (pair, line) in a.as_chunks::<2>().0.iter().zip(b.as_chunks::<PANEL>().0) {
            let [first, second] = pair.map(|bits| widen(bits.into()));
            let products = line.iter().map(|&word| first * widen(word) + second * widen(word >> 16));
            c.iter_mut().zip(products).for_each(|(sum, product)| *sum += product);
        }
    }
}

/// As [`super::dots_bf16`].
pub(super) fn dots_bf16(x: &[u16], depth: usize, w: &[u8], c: &mut [f32], ldc: usize) {
    let x: Vec<f32> = x.iter().map(|&bits| bf16::from_bits(bits).get()).collect();
    dots_f32(&x, depth, DType::Bf16, w, c, ldc);
}
