//! Inputs of the cases.

use cogvlm_core::DType;

use crate::oracle::round_to;

/// A stream of numbers from a seed (SplitMix64).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// Standard deviation about `scale`, roughly normal; one in 64 is eight times as large: outliers are what sums in
    /// too small a type stumble over.
    pub(crate) fn values(&mut self, dtype: DType, len: usize, scale: f32) -> Vec<f32> {
        let mut value = || {
            // Six uniform numbers have variance ½.
            let sum: f64 = (0..6).map(|_| (self.next() >> 11) as f64 / (1u64 << 53) as f64 - 0.5).sum();
            let salt = if self.below(64) == 0 { 8.0 } else { 1.0 };
            round_to(dtype, sum * 2f64.sqrt() * salt * f64::from(scale))
        };
        (0..len).map(|_| value()).collect()
    }

    /// The numbers below `len` in some order.
    pub(crate) fn permutation(&mut self, len: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..len as u32).collect();
        for index in (1..len).rev() {
            order.swap(index, self.below(index + 1));
        }
        order
    }
}

/// What stands in a buffer before an operation writes to it: odd numbers that no operation comes upon.
pub(crate) fn garbage(dtype: DType, len: usize) -> Vec<f32> {
    (0..len).map(|index| round_to(dtype, -1000.0 - (index % 509) as f64)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_the_scale_asked_for_and_outliers() {
        let values = Random::new(1).values(DType::F32, 100_000, 3.0);
        // One in 64 of eight times the size adds 63/64 to the variance.
        let variance = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / values.len() as f64 / 9.0;
        assert!((1.85..2.1).contains(&variance), "{variance}");
        assert!(values.iter().any(|value| value.abs() > 30.0));
        assert_eq!(values, Random::new(1).values(DType::F32, 100_000, 3.0));
    }

    #[test]
    fn a_permutation_holds_every_number_once() {
        let mut order = Random::new(3).permutation(50);
        assert_ne!(order, (0..50).collect::<Vec<u32>>());
        order.sort_unstable();
        assert_eq!(order, (0..50).collect::<Vec<u32>>());
    }
}
