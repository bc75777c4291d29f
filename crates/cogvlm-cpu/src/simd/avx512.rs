//! Inner loops in AVX-512, and in AVX512-BF16 where sums of products of bf16 have an instruction of their own.
#![expect(unsafe_code, reason = "vector loads and stores take pointers")]

use std::arch::x86_64::*;

use cogvlm_core::DType;

use super::{PANEL, Update};

/// Rows whose sums are held at once: with two vectors each they leave registers for a line of the panel.
const ROWS: usize = 12;

/// Calls `$block::<M>` for `$m` rows, at most [`ROWS`] of them.
macro_rules! by_rows {
    ($m:expr, $block:ident($($argument:expr),*)) => {
        match $m {
            1 => $block::<1>($($argument),*),
            2 => $block::<2>($($argument),*),
            3 => $block::<3>($($argument),*),
            4 => $block::<4>($($argument),*),
            5 => $block::<5>($($argument),*),
            6 => $block::<6>($($argument),*),
            7 => $block::<7>($($argument),*),
            8 => $block::<8>($($argument),*),
            9 => $block::<9>($($argument),*),
            10 => $block::<10>($($argument),*),
            11 => $block::<11>($($argument),*),
            _ => $block::<ROWS>($($argument),*),
        }
    };
}

/// Refuses operands of a tile that are too short for its loops.
fn check_tile(a: usize, lda: usize, m: usize, depth: usize, c: usize, ldc: usize) {
    assert!(m == 0 || a >= (m - 1) * lda + depth, "{m} rows of {depth}, {lda} apart, in {a}");
    assert!(m == 0 || c >= (m - 1) * ldc + PANEL, "{m} rows of {PANEL}, {ldc} apart, in {c}");
}

/// As [`super::tile_f32`].
#[target_feature(enable = "avx512f")]
pub(super) fn tile_f32(a: &[f32], lda: usize, m: usize, b: &[f32], c: &mut [f32], ldc: usize, update: Update) {
    let depth = b.len() / PANEL;
    check_tile(a.len(), lda, m, depth, c.len(), ldc);
    for first in (0..m).step_by(ROWS) {
        // SAFETY: `check_tile` holds for all `m` rows, so it does for those from `first` on; b has `depth` lines.
        unsafe {
            let (a, c) = (a.as_ptr().add(first * lda), c.as_mut_ptr().add(first * ldc));
            by_rows!(m - first, block_f32(a, lda, b.as_ptr(), depth, c, ldc, update));
        }
    }
}

/// `M` rows of a tile.
///
/// # Safety
/// `a` has `M` rows of `depth`, `lda` apart, `b` `depth` lines of [`PANEL`], `c` `M` rows of [`PANEL`], `ldc` apart.
#[target_feature(enable = "avx512f")]
unsafe fn block_f32<const M: usize>(
    a: *const f32, lda: usize, b: *const f32, depth: usize, c: *mut f32, ldc: usize, update: Update,
) {
    let mut sums = [[_mm512_setzero_ps(); 2]; M];
    for k in 0..depth {
        // SAFETY: line k of b, element k of each row of a, by the contract.
        unsafe {
            let line = [_mm512_loadu_ps(b.add(k * PANEL)), _mm512_loadu_ps(b.add(k * PANEL + 16))];
            for (row, sums) in sums.iter_mut().enumerate() {
                let value = _mm512_set1_ps(*a.add(row * lda + k));
                sums[0] = _mm512_fmadd_ps(value, line[0], sums[0]);
                sums[1] = _mm512_fmadd_ps(value, line[1], sums[1]);
            }
        }
    }
    // SAFETY: the rows of c, by the contract.
    unsafe { store_rows(&sums, c, ldc, update) }
}

/// As [`super::tile_pairs`].
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn tile_pairs(a: &[u16], lda: usize, m: usize, b: &[u32], c: &mut [f32], ldc: usize, update: Update) {
    let num_pairs = b.len() / PANEL;
    check_tile(a.len(), lda, m, 2 * num_pairs, c.len(), ldc);
    for first in (0..m).step_by(ROWS) {
        // SAFETY: as in `tile_f32`.
        unsafe {
            let (a, c) = (a.as_ptr().add(first * lda), c.as_mut_ptr().add(first * ldc));
            by_rows!(m - first, block_pairs(a, lda, b.as_ptr(), num_pairs, c, ldc, update));
        }
    }
}

/// `M` rows of a tile.
///
/// # Safety
/// `a` has `M` rows of `2 * num_pairs`, `lda` apart, `b` `num_pairs` lines of [`PANEL`], `c` `M` rows of [`PANEL`],
/// `ldc` apart.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn block_pairs<const M: usize>(
    a: *const u16, lda: usize, b: *const u32, num_pairs: usize, c: *mut f32, ldc: usize, update: Update,
) {
    let mut sums = [[_mm512_setzero_ps(); 2]; M];
    for k in 0..num_pairs {
        // SAFETY: line k of b, pair k of each row of a, by the contract; the pair may lie at an odd address of u32.
        unsafe {
            let line = [load_pairs(b.add(k * PANEL).cast()), load_pairs(b.add(k * PANEL + 16).cast())];
            for (row, sums) in sums.iter_mut().enumerate() {
                let pair = _mm512_set1_epi32(a.add(row * lda + 2 * k).cast::<i32>().read_unaligned());
                // SAFETY (of the conversion): both are 512 bits without invalid patterns.
                let pair = std::mem::transmute::<__m512i, __m512bh>(pair);
                sums[0] = _mm512_dpbf16_ps(sums[0], pair, line[0]);
                sums[1] = _mm512_dpbf16_ps(sums[1], pair, line[1]);
            }
        }
    }
    // SAFETY: the rows of c, by the contract.
    unsafe { store_rows(&sums, c, ldc, update) }
}

/// Puts sums into `M` rows of `c`.
///
/// # Safety
/// `c` has `M` rows of [`PANEL`], `ldc` apart.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn store_rows<const M: usize>(sums: &[[__m512; 2]; M], c: *mut f32, ldc: usize, update: Update) {
    for (row, sums) in sums.iter().enumerate() {
        for (half, &sum) in sums.iter().enumerate() {
            // SAFETY: within row `row`, by the contract.
            unsafe {
                let c = c.add(row * ldc + 16 * half);
                let sum = if update == Update::Add { _mm512_add_ps(_mm512_loadu_ps(c), sum) } else { sum };
                _mm512_storeu_ps(c, sum);
            }
        }
    }
}

/// 32 bf16 at any address.
///
/// # Safety
/// `address` is the start of 64 readable bytes.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn load_pairs(address: *const u8) -> __m512bh {
    // SAFETY: 64 bytes by the contract; both types are 512 bits without invalid patterns.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(address.cast())) }
}

/// As [`super::dots_f32`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
pub(super) fn dots_f32(x: &[f32], depth: usize, dtype: DType, w: &[u8], c: &mut [f32], ldc: usize) {
    let (num_x, num_w) = check_dots(x.len(), depth, w.len() / dtype.size_bytes(), c.len(), ldc);
    let (x, w, c) = (x.as_ptr().cast(), w.as_ptr(), c.as_mut_ptr());
    // SAFETY: `check_dots` holds, for elements of the size of `dtype`; the features are this function's.
    unsafe {
        match dtype {
            DType::F32 => dots::<F32>(x, num_x, depth, w, num_w, c, ldc),
            DType::Bf16 => dots::<Bf16>(x, num_x, depth, w, num_w, c, ldc),
            DType::F16 => dots::<F16>(x, num_x, depth, w, num_w, c, ldc),
        }
    }
}

/// As [`super::dots_bf16`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) fn dots_bf16(x: &[u16], depth: usize, w: &[u8], c: &mut [f32], ldc: usize) {
    let (num_x, num_w) = check_dots(x.len(), depth, w.len() / 2, c.len(), ldc);
    // SAFETY: `check_dots` holds; the features are this function's.
    unsafe { dots::<Pairs>(x.as_ptr().cast(), num_x, depth, w.as_ptr(), num_w, c.as_mut_ptr(), ldc) }
}

/// Rows of x and of w; c has a place for each pair of them.
fn check_dots(x: usize, depth: usize, w: usize, c: usize, ldc: usize) -> (usize, usize) {
    let (num_x, num_w) = (x / depth, w / depth);
    assert!(num_x == 0 || num_w == 0 || c >= (num_x - 1) * ldc + num_w, "{num_x} rows of {num_w}, {ldc} apart, in {c}");
    (num_x, num_w)
}

/// Types of the two sides of a dot product. Functions must be inlined into one that has AVX-512 F, BW and VL, F16C for
/// [`F16`] and AVX512-BF16 for [`Pairs`]; elements that `mask` selects must be readable.
trait Sides {
    /// Elements of a vector.
    const STEP: usize;
    /// Bytes of an element of x.
    const X_BYTES: usize;
    /// Bytes of an element of w.
    const W_BYTES: usize;

    /// Elements of x that `mask` selects, zeros elsewhere.
    #[inline(always)]
    unsafe fn x(address: *const u8, mask: u32) -> __m512 {
        // SAFETY: by the contract of the trait.
        unsafe { _mm512_maskz_loadu_ps(mask as __mmask16, address.cast()) }
    }

    /// Elements of w that `mask` selects, zeros elsewhere.
    unsafe fn w(address: *const u8, mask: u32) -> __m512;

    /// `sum + x w` in each lane.
    #[inline(always)]
    unsafe fn add(sum: __m512, x: __m512, w: __m512) -> __m512 {
        // SAFETY: by the contract of the trait.
        unsafe { _mm512_fmadd_ps(x, w, sum) }
    }
}

struct F32;
struct Bf16;
struct F16;
/// Both sides stay bf16.
struct Pairs;

impl Sides for F32 {
    const STEP: usize = 16;
    const X_BYTES: usize = 4;
    const W_BYTES: usize = 4;

    #[inline(always)]
    unsafe fn w(address: *const u8, mask: u32) -> __m512 {
        // SAFETY: by the contract of the trait.
        unsafe { _mm512_maskz_loadu_ps(mask as __mmask16, address.cast()) }
    }
}

impl Sides for Bf16 {
    const STEP: usize = 16;
    const X_BYTES: usize = 4;
    const W_BYTES: usize = 2;

    #[inline(always)]
    unsafe fn w(address: *const u8, mask: u32) -> __m512 {
        // SAFETY: by the contract of the trait.
        unsafe {
            let bits = _mm256_maskz_loadu_epi16(mask as __mmask16, address.cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
        }
    }
}

impl Sides for F16 {
    const STEP: usize = 16;
    const X_BYTES: usize = 4;
    const W_BYTES: usize = 2;

    #[inline(always)]
    unsafe fn w(address: *const u8, mask: u32) -> __m512 {
        // SAFETY: by the contract of the trait.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask as __mmask16, address.cast())) }
    }
}

impl Sides for Pairs {
    const STEP: usize = 32;
    const X_BYTES: usize = 2;
    const W_BYTES: usize = 2;

    #[inline(always)]
    unsafe fn x(address: *const u8, mask: u32) -> __m512 {
        // SAFETY: by the contract of the trait.
        unsafe { Self::w(address, mask) }
    }

    #[inline(always)]
    unsafe fn w(address: *const u8, mask: u32) -> __m512 {
        // SAFETY: by the contract of the trait.
        unsafe { _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, address.cast())) }
    }

    #[inline(always)]
    unsafe fn add(sum: __m512, x: __m512, w: __m512) -> __m512 {
        // SAFETY: by the contract of the trait; the conversions are between types of 512 bits without invalid patterns.
        unsafe {
            _mm512_dpbf16_ps(
                sum,
                std::mem::transmute::<__m512, __m512bh>(x),
                std::mem::transmute::<__m512, __m512bh>(w),
            )
        }
    }
}

/// All dot products.
///
/// # Safety
/// `x` has `num_x` rows of `depth` elements, `w` `num_w` rows, `c` `num_x` rows of `num_w`, `ldc` apart; and the
/// features that [`Sides`] asks for.
#[inline(always)]
unsafe fn dots<S: Sides>(
    x: *const u8, num_x: usize, depth: usize, w: *const u8, num_w: usize, c: *mut f32, ldc: usize,
) {
    for first in (0..num_x).step_by(8) {
        // SAFETY: rows from `first` on, by the contract.
        unsafe {
            let (x, c) = (x.add(first * depth * S::X_BYTES), c.add(first * ldc));
            match num_x - first {
                1 => dot_rows::<S, 1, 4>(x, depth, w, num_w, c, ldc),
                2 => dot_rows::<S, 2, 4>(x, depth, w, num_w, c, ldc),
                3 => dot_rows::<S, 3, 4>(x, depth, w, num_w, c, ldc),
                4 => dot_rows::<S, 4, 4>(x, depth, w, num_w, c, ldc),
                5 => dot_rows::<S, 5, 2>(x, depth, w, num_w, c, ldc),
                6 => dot_rows::<S, 6, 2>(x, depth, w, num_w, c, ldc),
                7 => dot_rows::<S, 7, 2>(x, depth, w, num_w, c, ldc),
                _ => dot_rows::<S, 8, 2>(x, depth, w, num_w, c, ldc),
            }
        }
    }
}

/// Dot products of `M` rows of x with all rows of w, `R` of them at a time.
///
/// # Safety
/// As [`dots`], with `M` rows of x and c.
#[inline(always)]
unsafe fn dot_rows<S: Sides, const M: usize, const R: usize>(
    x: *const u8, depth: usize, w: *const u8, num_w: usize, c: *mut f32, ldc: usize,
) {
    let whole = num_w / R * R;
    // SAFETY: `R` rows from each multiple of it below `whole` on, then one at a time, by the contract.
    unsafe {
        for row in (0..whole).step_by(R) {
            dot_block::<S, M, R>(x, depth, w.add(row * depth * S::W_BYTES), c.add(row), ldc);
        }
        for row in whole..num_w {
            dot_block::<S, M, 1>(x, depth, w.add(row * depth * S::W_BYTES), c.add(row), ldc);
        }
    }
}

/// Dot products of `M` rows of x and `R` rows of w, each summed in the lanes of one vector, whatever `M` and `R`.
///
/// # Safety
/// As [`dots`].
#[inline(always)]
unsafe fn dot_block<S: Sides, const M: usize, const R: usize>(
    x: *const u8, depth: usize, w: *const u8, c: *mut f32, ldc: usize,
) {
    // SAFETY: by the contract: elements from k on, as many as the mask selects, of each row; and the features.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); M]; R];
        let whole = depth / S::STEP * S::STEP;
        for k in (0..whole).step_by(S::STEP) {
            dot_step::<S, M, R>(x, w, depth, k, u32::MAX, &mut sums);
        }
        if whole < depth {
            dot_step::<S, M, R>(x, w, depth, whole, (1 << (depth - whole)) - 1, &mut sums);
        }
        for (column, sums) in sums.iter().enumerate() {
            for (row, &sum) in sums.iter().enumerate() {
                *c.add(row * ldc + column) = _mm512_reduce_add_ps(sum);
            }
        }
    }
}

/// The elements of [`dot_block`] from `k` on that `mask` selects.
///
/// # Safety
/// As [`dots`].
#[inline(always)]
unsafe fn dot_step<S: Sides, const M: usize, const R: usize>(
    x: *const u8, w: *const u8, depth: usize, k: usize, mask: u32, sums: &mut [[__m512; M]; R],
) {
    // SAFETY: elements from k on, as many as the mask selects, of each row, by the contract; and the features.
    unsafe {
        for (column, sums) in sums.iter_mut().enumerate() {
            let w = S::w(w.add((column * depth + k) * S::W_BYTES), mask);
            for (row, sum) in sums.iter_mut().enumerate() {
                *sum = S::add(*sum, S::x(x.add((row * depth + k) * S::X_BYTES), mask), w);
            }
        }
    }
}

/// As [`super::pack_f32`].
#[target_feature(enable = "avx512f,avx512bw,f16c")]
pub(super) fn pack_f32(dtype: DType, rows: &[&[u8]], panel: &mut [f32]) {
    let lines = panel.as_chunks_mut::<PANEL>().0;
    check_rows(rows, lines.len() * dtype.size_bytes());
    for group in 0..PANEL / 16 {
        match dtype {
            DType::F32 => {
                for (block, lines) in lines.chunks_mut(16).enumerate() {
                    let columns = transpose(load_group(rows, group, block));
                    lines.iter_mut().zip(columns).for_each(|(line, column)| store(line, group, column));
                }
            }
            DType::Bf16 => {
                // A word holds two neighbours of a row, the first in its lower half.
                let upper = _mm512_set1_epi32(-65536);
                for (block, lines) in lines.chunks_mut(32).enumerate() {
                    let columns = transpose(load_group(rows, group, block));
                    for (lines, column) in lines.chunks_mut(2).zip(columns) {
                        store(&mut lines[0], group, _mm512_slli_epi32::<16>(column));
                        if let [_, line] = lines {
                            store(line, group, _mm512_and_si512(column, upper));
                        }
                    }
                }
            }
            DType::F16 => {
                for (block, lines) in lines.chunks_mut(32).enumerate() {
                    let words = load_group(rows, group, block);
                    let low = words.map(|words| _mm512_castps_si512(_mm512_cvtph_ps(_mm512_castsi512_si256(words))));
                    let high =
                        words.map(|words| _mm512_castps_si512(_mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(words))));
                    let columns = transpose(low).into_iter().chain(transpose(high));
                    lines.iter_mut().zip(columns).for_each(|(line, column)| store(line, group, column));
                }
            }
        }
    }
}

/// As [`super::pack_pairs`].
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn pack_pairs(rows: &[&[u8]], pairs: &mut [u32]) {
    let lines = bytemuck::cast_slice_mut::<u32, f32>(pairs).as_chunks_mut::<PANEL>().0;
    check_rows(rows, lines.len() * 4);
    for group in 0..PANEL / 16 {
        for (block, lines) in lines.chunks_mut(16).enumerate() {
            let columns = transpose(load_group(rows, group, block));
            lines.iter_mut().zip(columns).for_each(|(line, column)| store(line, group, column));
        }
    }
}

/// Refuses rows that are not `row_bytes` long.
fn check_rows(rows: &[&[u8]], row_bytes: usize) {
    assert!(rows.iter().all(|row| row.len() == row_bytes), "rows of other lengths than {row_bytes} bytes");
}

/// Bytes `64 * block..` of rows `16 * group..`; zeros beyond a row's end and the last row.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn load_group(rows: &[&[u8]], group: usize, block: usize) -> [__m512i; 16] {
    let rows = rows.get(16 * group..).unwrap_or(&[]);
    std::array::from_fn(|index| {
        let bytes = rows.get(index).map_or(&[][..], |row| &row[64 * block..]);
        let mask = if bytes.len() < 64 { (1u64 << bytes.len()) - 1 } else { u64::MAX };
        // SAFETY: bytes that the mask leaves out are not read; the others are in the row.
        unsafe { _mm512_maskz_loadu_epi8(mask, bytes.as_ptr().cast()) }
    })
}

#[target_feature(enable = "avx512f")]
#[inline]
fn store(line: &mut [f32; PANEL], group: usize, column: __m512i) {
    let half: &mut [f32; 16] = &mut line.as_chunks_mut().0[group];
    // SAFETY: the array has room for sixteen words.
    unsafe { _mm512_storeu_si512(half.as_mut_ptr().cast(), column) }
}

/// Word `j` of vector `i` becomes word `i` of vector `j`.
#[target_feature(enable = "avx512f")]
#[inline]
fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    // After the first two steps lane `l` of vector `4 g + j` holds word `4 l + j` of rows `4 g..4 g + 4`.
    let mut pairs = rows;
    for i in (0..16).step_by(2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    let mut fours = pairs;
    for g in (0..16).step_by(4) {
        fours[g] = _mm512_unpacklo_epi64(pairs[g], pairs[g + 2]);
        fours[g + 1] = _mm512_unpackhi_epi64(pairs[g], pairs[g + 2]);
        fours[g + 2] = _mm512_unpacklo_epi64(pairs[g + 1], pairs[g + 3]);
        fours[g + 3] = _mm512_unpackhi_epi64(pairs[g + 1], pairs[g + 3]);
    }
    // Then lanes: 0x88 takes lanes 0 and 2 of both, 0xdd lanes 1 and 3.
    let mut columns = fours;
    for j in 0..4 {
        let even = _mm512_shuffle_i32x4::<0x88>(fours[j], fours[4 + j]);
        let odd = _mm512_shuffle_i32x4::<0xdd>(fours[j], fours[4 + j]);
        let later_even = _mm512_shuffle_i32x4::<0x88>(fours[8 + j], fours[12 + j]);
        let later_odd = _mm512_shuffle_i32x4::<0xdd>(fours[8 + j], fours[12 + j]);
        columns[j] = _mm512_shuffle_i32x4::<0x88>(even, later_even);
        columns[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even, later_even);
        columns[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd, later_odd);
        columns[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd, later_odd);
    }
    columns
}
