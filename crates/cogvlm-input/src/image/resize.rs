//! Bicubic resampling of 8-bit pictures, bit for bit as Pillow 10 does it.
//!
//! Two passes with 8-bit results between them, horizontal first. The weights are 22-bit fixed-point numbers, so that
//! the result does not depend on the order of the sums. Source: `Resample.c` of Pillow.

use super::Rgb8Image;

/// Bits after the point of a weight: 32, less 8 for the sample, 2 for sums above 1 and a sign.
const WEIGHT_BITS: u32 = 22;

/// `image`, squeezed or stretched to `width` x `height`, both at least 1.
pub(super) fn resize_bicubic(image: &Rgb8Image, width: usize, height: usize) -> Rgb8Image {
    let mut pixels = None;
    if image.width != width {
        pixels = Some(resize_rows(&image.pixels, image.width, width));
    }
    if image.height != height {
        pixels = Some(resize_columns(pixels.as_deref().unwrap_or(&image.pixels), width * 3, image.height, height));
    }
    Rgb8Image { width, height, pixels: pixels.unwrap_or_else(|| image.pixels.clone()) }
}

/// Weights of the input samples that make one output sample.
struct Filter {
    /// Index of the first input sample.
    first: usize,
    weights: Vec<i32>,
}

/// Filters of `num_out` samples made of `num_in`.
fn filters(num_in: usize, num_out: usize) -> Vec<Filter> {
    let scale = num_in as f64 / num_out as f64;
    let stretch = scale.max(1.0);
    let radius = 2.0 * stretch;
    let filter = |out: usize| {
        let centre = (out as f64 + 0.5) * scale;
        // Conversion to an integer drops the fraction. The order of the sums decides which samples are at the edge.
        let first = (centre - radius + 0.5).max(0.0) as usize;
        let end = ((centre + radius + 0.5) as usize).min(num_in);
        let weights: Vec<f64> =
            (first..end).map(|index| cubic((index as f64 - centre + 0.5) * (1.0 / stretch))).collect();
        let sum: f64 = weights.iter().sum();
        let fixed_point = |weight: f64| {
            let scaled = weight / sum * f64::from(1 << WEIGHT_BITS);
            (scaled + f64::copysign(0.5, scaled)) as i32
        };
        Filter { first, weights: weights.into_iter().map(fixed_point).collect() }
    };
    (0..num_out).map(filter).collect()
}

/// Keys' cubic kernel with a = -1/2.
fn cubic(x: f64) -> f64 {
    let x = x.abs();
    if x < 1.0 {
        (1.5 * x - 2.5) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    } else {
        0.0
    }
}

/// One half, which every sum starts from: the shift then rounds.
const HALF: i32 = 1 << (WEIGHT_BITS - 1);

fn to_u8(sum: i32) -> u8 {
    (sum >> WEIGHT_BITS).clamp(0, 255) as u8
}

/// Rows that the horizontal pass takes at once: enough that each weight meets whole vectors.
const BLOCK_ROWS: usize = 4;
/// Samples of one column of a block.
const BLOCK_LANES: usize = 3 * BLOCK_ROWS;

/// `[_, num_in, 3]` to `[_, num_out, 3]`.
fn resize_rows(pixels: &[u8], num_in: usize, num_out: usize) -> Vec<u8> {
    let filters = filters(num_in, num_out);
    // Whole numbers below 2^53 are exact as f64, and unlike i32 every x86-64 multiplies several of them at once.
    let mut out = vec![0; pixels.len() / num_in * num_out];
    let mut columns = vec![[0.0; BLOCK_LANES]; num_in];
    let blocks = pixels.chunks(BLOCK_ROWS * num_in * 3).zip(out.chunks_mut(BLOCK_ROWS * num_out * 3));
    for (block, out) in blocks {
        for (row, samples) in block.chunks_exact(num_in * 3).enumerate() {
            for (column, pixel) in columns.iter_mut().zip(samples.as_chunks::<3>().0) {
                for (lane, &sample) in column[3 * row..].iter_mut().zip(pixel) {
                    *lane = f64::from(sample);
                }
            }
        }
        for (index, Filter { first, weights }) in filters.iter().enumerate() {
            let mut sums = [f64::from(HALF); BLOCK_LANES];
            for (column, &weight) in columns[*first..].iter().zip(weights) {
                let weight = f64::from(weight);
                for (sum, &sample) in sums.iter_mut().zip(column) {
                    *sum += weight * sample;
                }
            }
            for (row, out) in out.chunks_exact_mut(num_out * 3).enumerate() {
                for (out, &sum) in out[3 * index..3 * index + 3].iter_mut().zip(&sums[3 * row..]) {
                    *out = to_u8(sum as i32);
                }
            }
        }
    }
    out
}

/// `[num_in, row_len]` to `[num_out, row_len]`.
fn resize_columns(rows: &[u8], row_len: usize, num_in: usize, num_out: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(num_out * row_len);
    let mut sums = vec![0; row_len];
    for Filter { first, weights } in filters(num_in, num_out) {
        sums.fill(HALF);
        for (row, weight) in rows[first * row_len..].chunks_exact(row_len).zip(weights) {
            for (sum, &sample) in sums.iter_mut().zip(row) {
                *sum += weight * i32::from(sample);
            }
        }
        out.extend(sums.iter().map(|&sum| to_u8(sum)));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(width: usize, height: usize) -> Rgb8Image {
        // A linear congruential generator: noise has every edge there is.
        let mut state = 1_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        Rgb8Image { width, height, pixels: (0..width * height * 3).map(|_| next()).collect() }
    }

    /// The definition, sample by sample: first along the rows, then along the columns.
    fn resize_plainly(image: &Rgb8Image, width: usize, height: usize) -> Vec<u8> {
        let sample = |pixels: &[u8], stride: usize, start: usize, filter: &Filter| {
            let products = filter
                .weights
                .iter()
                .enumerate()
                .map(|(tap, &weight)| i64::from(weight) * i64::from(pixels[start + (filter.first + tap) * stride]));
            (((1 << 21) + products.sum::<i64>()) >> 22).clamp(0, 255) as u8
        };
        let mut between = vec![0; width * image.height * 3];
        for (x, filter) in filters(image.width, width).iter().enumerate() {
            for y in 0..image.height {
                for c in 0..3 {
                    between[(y * width + x) * 3 + c] = sample(&image.pixels, 3, y * image.width * 3 + c, filter);
                }
            }
        }
        let mut out = vec![0; width * height * 3];
        for (y, filter) in filters(image.height, height).iter().enumerate() {
            for column in 0..width * 3 {
                out[y * width * 3 + column] = sample(&between, width * 3, column, filter);
            }
        }
        out
    }

    #[test]
    fn the_fast_passes_follow_the_definition() {
        for (from, to) in
            [((1, 1), (9, 5)), ((2, 3), (56, 56)), ((97, 61), (14, 14)), ((33, 7), (33, 14)), ((5, 90), (14, 90))]
        {
            let image = image(from.0, from.1);
            let resized = resize_bicubic(&image, to.0, to.1);
            assert!(resized.pixels == resize_plainly(&image, to.0, to.1), "{from:?} to {to:?}");
        }
    }

    #[test]
    fn a_picture_of_the_right_size_is_left_alone() {
        let image = image(14, 14);
        assert_eq!(resize_bicubic(&image, 14, 14), image);
    }

    /// The vertical pass adds up in i32.
    #[test]
    fn no_sum_overflows() {
        for num_out in [1, 2, 3, 14, 56, 224, 490, 1344] {
            for num_in in (1..700).chain([1023, 4096, 9999, 16_384]) {
                for Filter { weights, .. } in filters(num_in, num_out) {
                    let positive: i64 =
                        weights.iter().filter(|&&weight| weight > 0).map(|&weight| i64::from(weight)).sum();
                    let negative: i64 =
                        weights.iter().filter(|&&weight| weight < 0).map(|&weight| i64::from(weight)).sum();
                    let half = i64::from(HALF);
                    assert!(half + 255 * positive <= i64::from(i32::MAX), "{num_in} to {num_out}");
                    assert!(half + 255 * negative >= i64::from(i32::MIN), "{num_in} to {num_out}");
                }
            }
        }
    }
}
