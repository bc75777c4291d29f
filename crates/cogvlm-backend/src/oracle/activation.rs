use std::f64::consts::{FRAC_1_SQRT_2, PI};

/// `x/2 (1 + erf(x / √2))`
pub fn gelu(x: f64) -> f64 {
    // `1 + erf(-y)` is `erfc(y)`: written so, the left tail loses no digits.
    0.5 * x * erfc(-x * FRAC_1_SQRT_2)
}

/// `x / (1 + e⁻ˣ)`
pub fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// `2/√π ∫₀ˣ e^(-t²) dt`, to about 1e-15.
pub fn erf(x: f64) -> f64 {
    if x.abs() < SERIES_END { erf_series(x) } else { 1f64.copysign(x) - erfc_fraction(x.abs()).copysign(x) }
}

/// `1 - erf(x)`, to about 1e-14 of its value for positive `x`.
fn erfc(x: f64) -> f64 {
    if x.abs() < SERIES_END {
        1.0 - erf_series(x)
    } else if x > 0.0 {
        erfc_fraction(x)
    } else {
        2.0 - erfc_fraction(-x)
    }
}

/// Below, the series has lost no digits to cancellation; above, the fraction has converged.
const SERIES_END: f64 = 1.5;

/// Abramowitz and Stegun 7.1.6: `2/√π e^(-x²) Σ 2ⁿ x²ⁿ⁺¹ / (1·3·…·(2n+1))`; every term has the sign of `x`.
fn erf_series(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..100 {
        term *= 2.0 * x * x / f64::from(2 * n + 1);
        sum += term;
    }
    2.0 / PI.sqrt() * (-x * x).exp() * sum
}

/// Abramowitz and Stegun 7.1.14: `√π e^(x²) erfc(x) = 1/(x + (1/2)/(x + 1/(x + (3/2)/(x + …))))`, from the far end.
fn erfc_fraction(x: f64) -> f64 {
    let tail = (1..=200).rev().fold(x, |tail, n| x + f64::from(n) / 2.0 / tail);
    (-x * x).exp() / PI.sqrt() / tail
}

#[cfg(test)]
mod tests {
    use super::*;

    /// x, erf(x) and erfc(x), from tables of the function.
    const KNOWN: [(f64, f64, f64); 7] = [
        (0.1, 0.1124629160182849, 0.8875370839817152),
        (0.5, 0.5204998778130465, 0.4795001221869535),
        (1.0, 0.8427007929497149, 0.15729920705028513),
        (1.5, 0.9661051464753108, 0.033894853524689274),
        (2.0, 0.9953222650189527, 0.004677734981047265),
        (3.0, 0.9999779095030014, 2.2090496998585438e-5),
        (5.0, 0.9999999999984626, 1.5374597944280351e-12),
    ];

    #[test]
    fn erf_agrees_with_tables() {
        for (x, erf_x, erfc_x) in KNOWN {
            assert!((erf(x) - erf_x).abs() < 2e-15, "erf({x}) = {}", erf(x));
            assert!((erf(-x) + erf_x).abs() < 2e-15, "erf(-{x}) = {}", erf(-x));
            assert!((erfc(x) / erfc_x - 1.0).abs() < 2e-14, "erfc({x}) = {:e}", erfc(x));
            assert!((erfc(-x) - 1.0 - erf_x).abs() < 2e-15, "erfc(-{x}) = {}", erfc(-x));
        }
        assert_eq!(erf(0.0), 0.0);
        assert_eq!(erf(100.0), 1.0);
    }

    #[test]
    fn erf_is_smooth_where_its_two_forms_meet() {
        let step = 1e-9;
        let slope = (erf(SERIES_END + step) - erf(SERIES_END - step)) / (2.0 * step);
        let expected = 2.0 / PI.sqrt() * (-SERIES_END * SERIES_END).exp();
        assert!((slope / expected - 1.0).abs() < 1e-5, "{slope} {expected}");
    }

    #[test]
    fn activations_hold_at_their_ends() {
        assert!((gelu(1.0) - 0.841_344_746_068_542_9).abs() < 1e-15);
        assert!((gelu(-5.0) / -1.433_257_859_395_973e-6 - 1.0).abs() < 1e-13, "{:e}", gelu(-5.0));
        assert_eq!((gelu(100.0), gelu(-100.0).abs()), (100.0, 0.0));
        assert!((silu(1.0) - 0.731_058_578_630_004_9).abs() < 1e-15);
        assert_eq!(silu(100.0), 100.0);
        assert!(silu(-1000.0).abs() == 0.0 && silu(-100.0) < 0.0);
    }
}
