//! Numbers known up to an error: what a right answer may be.

use std::fmt;

use cogvlm_core::DType;

/// Half a unit in the last place of f32, relative.
pub(crate) const UNIT_F32: f64 = 1.0 / (1 << 24) as f64;

/// Bits of the significand, the hidden one included.
fn precision(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => 24,
        DType::F16 => 11,
        DType::Bf16 => 8,
    }
}

/// The error of rounding to `dtype`, relative.
pub(crate) fn unit(dtype: DType) -> f64 {
    2f64.powi(-precision(dtype))
}

/// Largest error of a sum of `k` products in f32, relative to the sum of their magnitudes. Any order of summation stays
/// below `k` units; rounding errors of either sign stay below a small multiple of `√k` of them (Higham and Mary 2019,
/// "A new approach to probabilistic rounding error analysis"). Below 10 terms this is the first bound.
pub(crate) fn sum_error(k: usize) -> f64 {
    UNIT_F32 * (4.0 + 2.0 * (k as f64).sqrt())
}

/// Error of a sum whose terms were each rounded with relative error `unit`: below `unit Σ|t|` always, and below
/// `6 unit √Σt²` with probability 1 - 3e-8 for independent roundings (Hoeffding).
pub(crate) fn rounded_terms_error(unit: f64, magnitude: f64, squares: f64) -> f64 {
    unit * magnitude.min(6.0 * squares.sqrt())
}

/// `value`, give or take `error`.
#[derive(Clone, Copy)]
pub(crate) struct Approx {
    pub(crate) value: f64,
    pub(crate) error: f64,
}

impl fmt::Debug for Approx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:e} ± {:.1e}", self.value, self.error)
    }
}

impl Approx {
    pub(crate) fn exact(value: f32) -> Self {
        Self { value: f64::from(value), error: 0.0 }
    }

    pub(crate) fn new(value: f64, error: f64) -> Self {
        Self { value, error }
    }

    /// `Σ xᵢ wᵢ`, where the weights may have been rounded with relative error `weight_unit` before.
    pub(crate) fn dot(x: &[f32], weights: &[f32], weight_unit: f64) -> Self {
        let (mut value, mut magnitude, mut squares) = (0.0, 0.0, 0.0);
        for (&x, &weight) in x.iter().zip(weights) {
            let product = f64::from(x) * f64::from(weight);
            value += product;
            magnitude += product.abs();
            squares += product * product;
        }
        let error = sum_error(x.len()) * magnitude + rounded_terms_error(weight_unit, magnitude, squares);
        Self { value, error }
    }

    /// A weight that may have been rounded with relative error `weight_unit`.
    pub(crate) fn weight(value: f32, weight_unit: f64) -> Self {
        Self { value: f64::from(value), error: f64::from(value.abs()) * weight_unit }
    }

    /// Stored as `dtype`: half a unit in the last place more, of the largest number that it may be. The last term is
    /// for devices that flush subnormal numbers to zero.
    pub(crate) fn rounded(self, dtype: DType) -> Self {
        let largest = self.value.abs() + self.error;
        let half_ulp = if largest > 0.0 { 2f64.powi(largest.log2().floor() as i32 - precision(dtype)) } else { 0.0 };
        Self { value: self.value, error: self.error + half_ulp + UNIT_F32 * largest + f64::from(f32::MIN_POSITIVE) }
    }

    /// The sum, computed in f32.
    pub(crate) fn plus(self, other: Self) -> Self {
        let value = self.value + other.value;
        let error = self.error + other.error;
        Self { value, error: error + UNIT_F32 * (value.abs() + error) }
    }

    /// The product, computed in f32.
    pub(crate) fn times(self, other: Self) -> Self {
        let value = self.value * other.value;
        let error = self.value.abs() * other.error + other.value.abs() * self.error + self.error * other.error;
        Self { value, error: error + UNIT_F32 * (value.abs() + error) }
    }

    pub(crate) fn negated(self) -> Self {
        Self { value: -self.value, error: self.error }
    }

    /// [`gelu`](crate::oracle::gelu), whose slope is below 1.13, computed in f32 as `x/2 (1 + erf)`: the sum in
    /// brackets is off by a few units of 1, whatever is left of it.
    pub(crate) fn gelu(self) -> Self {
        let error = 1.13 * self.error + 4.0 * UNIT_F32 * (self.value.abs() + self.error);
        Self { value: crate::oracle::gelu(self.value), error }
    }

    /// [`silu`](crate::oracle::silu), whose slope is below 1.1, computed in f32: the exponential is off by a few units,
    /// and by as many as its argument where that is scaled for a power of two. Below -88.7 it overflows, which leaves 0
    /// in the place of up to 23 times the smallest normal number.
    pub(crate) fn silu(self) -> Self {
        let value = crate::oracle::silu(self.value);
        let own = UNIT_F32 * (self.value.abs() + 8.0) * value.abs() + 23.0 * f64::from(f32::MIN_POSITIVE);
        Self { value, error: 1.1 * self.error + own }
    }

    pub(crate) fn accepts(self, value: f32) -> bool {
        (f64::from(value) - self.value).abs() <= self.error
    }
}

/// Panics unless every element is what it may be. Not-a-number never is.
#[track_caller]
pub(crate) fn assert_within(what: &str, found: &[f32], expected: &[Approx]) {
    assert_eq!(found.len(), expected.len(), "{what}: number of elements");
    let wrong: Vec<usize> = (0..found.len()).filter(|&index| !expected[index].accepts(found[index])).collect();
    if let Some(&first) = wrong.first() {
        let (num_wrong, total) = (wrong.len(), found.len());
        let last = wrong[num_wrong - 1];
        panic!(
            "{what}: {num_wrong} of {total} elements are beyond their bounds; element {first} is {:e}, expected {:?}; \
             element {last} is {:e}, expected {:?}",
            found[first], expected[first], found[last], expected[last]
        );
    }
}

/// Panics unless a wrong answer is recognised as one.
#[track_caller]
pub(crate) fn assert_beyond(what: &str, wrong: &[f32], expected: &[Approx]) {
    assert_eq!(wrong.len(), expected.len(), "{what}: number of elements");
    let rejected = wrong.iter().zip(expected).any(|(&wrong, expected)| !expected.accepts(wrong));
    assert!(rejected, "{what}: the bounds accept a wrong answer");
}

/// Panics unless both are the same bits.
#[track_caller]
pub(crate) fn assert_same_bits(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}: number of elements");
    let differs = |index: &usize| found[*index].to_bits() != expected[*index].to_bits();
    if let Some(index) = (0..found.len()).find(differs) {
        let count = (0..found.len()).filter(differs).count();
        let (found, expected) = (found[index], expected[index]);
        panic!("{what}: {count} elements differ; element {index} is {found:e}, expected exactly {expected:e}");
    }
}

/// Panics unless nine in ten elements equal the oracle's, which rounds where the documentation says (two may always
/// differ: sums in f32 fall on the other side of a tie now and then).
#[track_caller]
pub(crate) fn assert_rounds_like(what: &str, found: &[f32], oracle: &[f32]) {
    let num_different = found.iter().zip(oracle).filter(|(found, oracle)| found != oracle).count();
    assert!(
        num_different <= 2 + found.len() / 10,
        "{what}: {num_different} of {} elements are rounded otherwise than documented",
        found.len()
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::round_to;

    #[test]
    fn a_rounding_costs_half_a_unit_in_the_last_place() {
        for (value, half_ulp) in [(1.0, 1.0 / 256.0), (1.99, 1.0 / 256.0), (2.0, 1.0 / 128.0), (-300.0, 1.0)] {
            let error = Approx::new(value, 0.0).rounded(DType::Bf16).error;
            assert!((error / half_ulp - 1.0).abs() < 1e-4, "{value} {error}");
        }
        let approx = Approx::new(257.0, 0.0).rounded(DType::Bf16);
        assert!(approx.accepts(round_to(DType::Bf16, 257.0)) && approx.accepts(258.0) && !approx.accepts(260.0));
        assert_eq!(Approx::exact(0.0).rounded(DType::F32).error, f64::from(f32::MIN_POSITIVE));
    }

    #[test]
    fn errors_travel_through_what_follows() {
        let (a, b) = (Approx::new(3.0, 0.5), Approx::new(-4.0, 0.25));
        let product = a.times(b);
        // The furthest that (3 ± ½)(-4 ± ¼) comes from -12.
        assert!((product.error - 2.875).abs() < 1e-5 && product.value == -12.0);
        assert!((a.plus(b).error - 0.75).abs() < 1e-6);
        assert!(!a.accepts(f32::NAN) && a.accepts(3.5) && !a.accepts(3.6));
    }

    #[test]
    fn activations_in_f32_stay_within_their_errors() {
        for step in -1200..1200 {
            let x = step as f32 / 10.0;
            let silu = x / (1.0 + (-x).exp());
            assert!(Approx::exact(x).silu().accepts(silu), "{x} {silu:e} {:?}", Approx::exact(x).silu());
            let gelu = x / 2.0 * (1.0 + crate::oracle::erf(f64::from(x) / 2f64.sqrt()) as f32);
            assert!(Approx::exact(x).gelu().accepts(gelu), "{x} {gelu:e} {:?}", Approx::exact(x).gelu());
        }
    }

    #[test]
    #[should_panic(expected = "2 of 3 elements are beyond their bounds; element 0 is 2e0, expected 1e0 ± 0.0e0")]
    fn a_wrong_answer_is_named() {
        assert_within("case", &[2.0, 2.0, f32::NAN], &[1.0, 2.0, 3.0].map(Approx::exact));
    }

    #[test]
    #[should_panic(expected = "the bounds accept a wrong answer")]
    fn a_bound_that_accepts_anything_is_named() {
        assert_beyond("case", &[2.0], &[Approx::new(1.0, 1e9)]);
    }
}
