//! Elementary functions in f32, without branches, so that loops over them become vector instructions.
//!
//! Products and sums are not fused: all levels of instructions give the same bits.

/// Sums kept apart in a reduction: fixed, so that its order does not depend on the instructions.
const LANES: usize = 16;

/// A polynomial, highest power first. Not a loop: compilers find vectors in loops over what has none.
macro_rules! polynomial {
    ($x:ident: $first:expr $(, $coefficient:expr)*) => {{
        let mut value: f32 = $first;
        $(value = value * $x + $coefficient;)*
        value
    }};
}

/// `e^x` within 2e-7 relative; 0 below -87.3, infinite above 88.7.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts: the first has few bits, so that its multiples are exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.clamp(-87.3, 88.7);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let count = shifted - ROUND;
    let r = (clamped - count * LN2_HIGH) - count * LN2_LOW;
    // Interpolation of e^r at Chebyshev nodes of |r| <= ln 2 / 2; 2.5e-9 relative.
    let power = polynomial!(r: 0.001_394_110_8, 0.008_375_126, 0.041_666_35, 0.166_664_16, 0.5, 1.0, 1.0);
    // 2^count in two factors: the exponent may be one more than a float has.
    let half = |shift: u32| f32::from_bits((shift << 23).wrapping_add(0x3f80_0000));
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let low = exponent >> 1;
    let result = power * half(low as u32) * half(exponent.wrapping_sub(low) as u32);
    let result = if x < -87.3 { 0.0 } else { result };
    let result = if x > 88.7 { f32::INFINITY } else { result };
    if x.is_nan() { x } else { result }
}

/// `x / (1 + e^-x)`
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `x/2 (1 + erf(x / sqrt 2))`, within 1e-6 relative for x > -5.
#[inline(always)]
pub(crate) fn gelu(x: f32) -> f32 {
    // erfc(z) = e^(-z²) t P(t), t = 1 / (1 + z/2), z >= 0: erfc has no cancellation where gelu is small. P
    // interpolates at Chebyshev nodes of t in 1/8..1; 8e-8 relative.
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.5 * z);
    let p = polynomial!(t: 0.010_138_115, -0.110_258_79, 0.395_292_47, -0.621_309, 0.377_905_08, -0.073_796_965,
        0.216_776_13, 0.240_546_31, 0.282_630_98, 0.282_075_68);
    let tail = 0.5 * exp(-0.5 * x * x) * t * p;
    x * if x < 0.0 { tail } else { 1.0 - tail }
}

/// Sum of `term` over `values`.
#[inline(always)]
pub(crate) fn sum<T: Copy>(values: &[T], term: impl Fn(T) -> f32) -> f32 {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] += term(chunk[lane]);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane += term(value);
    }
    fold(lanes, |a, b| a + b)
}

/// The greatest of `values`; minus infinity of none.
#[inline(always)]
pub(crate) fn max(values: &[f32]) -> f32 {
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let greater = |a: f32, b: f32| if a > b { a } else { b };
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = greater(chunk[lane], lanes[lane]);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(rest) {
        *lane = greater(value, *lane);
    }
    fold(lanes, greater)
}

#[inline(always)]
fn fold(mut lanes: [f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = join(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_right_everywhere() {
        for step in -88_000..88_700 {
            let x = step as f32 / 1000.0;
            let exact = f64::from(x).exp();
            if x >= -87.3 {
                assert!((f64::from(exp(x)) / exact - 1.0).abs() < 2e-7, "exp({x}) = {}, not {exact}", exp(x));
            } else {
                assert_eq!(exp(x), 0.0);
            }
        }
        assert_eq!((exp(f32::NEG_INFINITY), exp(f32::INFINITY), exp(0.0)), (0.0, f32::INFINITY, 1.0));
        assert!(exp(f32::NAN).is_nan());
    }

    /// `erfc(z)` for z >= 0 by its continued fraction, or by the series of erf where that converges fast.
    fn erfc(z: f64) -> f64 {
        let scale = (-z * z).exp() / std::f64::consts::PI.sqrt();
        if z < 2.0 {
            let (mut term, mut total) = (z, z);
            for n in 1..80 {
                term *= 2.0 * z * z / f64::from(2 * n + 1);
                total += term;
            }
            return 1.0 - 2.0 * scale * total;
        }
        let fraction = (1..200).rev().fold(z, |below, n| z + f64::from(n) / 2.0 / below);
        scale / fraction
    }

    #[test]
    fn gelu_is_right_in_the_tail_too() {
        for step in -5000..5000 {
            let x = f64::from(step as f32 / 1000.0);
            let tail = 0.5 * erfc(x.abs() / 2f64.sqrt());
            let exact = x * if x < 0.0 { tail } else { 1.0 - tail };
            let error = (f64::from(gelu(x as f32)) - exact).abs();
            // The rounding of x²/2 alone is 25/2 ulp/2 at the end of the range.
            assert!(error <= 1e-6 * exact.abs(), "gelu({x}) = {}, not {exact}", gelu(x as f32));
        }
        // The approximation by tanh differs by up to 5e-4: the bound would refuse it.
        let tanh = |x: f64| 0.5 * x * (1.0 + (0.797_884_560_802_865_4 * (x + 0.044_715 * x * x * x)).tanh());
        assert!((tanh(2.0) - f64::from(gelu(2.0))).abs() > 1e-5);
        assert_eq!((gelu(-20.0), gelu(20.0)), (0.0, 20.0));
    }

    #[test]
    fn sums_and_maxima_take_every_value() {
        for len in [0, 1, 15, 16, 17, 100] {
            let values: Vec<f32> = (0..len).map(|index| (index * 7 % 101) as f32).collect();
            assert_eq!(sum(&values, |value| value), values.iter().sum::<f32>());
            assert_eq!(max(&values), values.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}
