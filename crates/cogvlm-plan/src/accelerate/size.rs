//! Exact sizes: bytes, and the eighths of bytes that bool and 4-bit elements take.

use std::cmp::Ordering;
use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Sub};

use serde::{Serialize, Serializer};

/// A number of bytes, exact to the bit. Budgets may be negative.
///
/// Upstream's sizes are Python integers, or floats as soon as an element narrower than a byte takes part. A float
/// prints differently and cannot be the limit of a fallback search, so that is remembered; it does not take part in
/// comparisons.
#[derive(Debug, Clone, Copy, Default)]
pub struct Size {
    bits: i128,
    is_float: bool,
}

impl Size {
    /// No bytes.
    pub const ZERO: Self = Self { bits: 0, is_float: false };
    /// 2^100 bytes. Greater budgets count as this one: a tree's size is bounded far below it.
    pub const MAX: Self = Self { bits: 8 << 100, is_float: false };

    /// A whole number of bytes, held between [`Size::MAX`] and its negative.
    pub fn from_bytes(bytes: i128) -> Self {
        let most = Self::MAX.bits / 8;
        Self { bits: 8 * bytes.clamp(-most, most), is_float: false }
    }

    /// `num_elements` elements of `element_bits` bits each.
    pub(crate) fn of_elements(num_elements: u64, element_bits: u32) -> Self {
        Self { bits: i128::from(num_elements) * i128::from(element_bits), is_float: !element_bits.is_multiple_of(8) }
    }

    /// The same number as a Python float.
    pub(crate) fn as_float(self) -> Self {
        Self { is_float: true, ..self }
    }

    /// Whether upstream would hold this number as a float.
    pub(crate) fn is_float(self) -> bool {
        self.is_float
    }

    /// Bytes, where they are whole.
    pub fn whole_bytes(self) -> Option<i128> {
        (self.bits % 8 == 0).then_some(self.bits / 8)
    }

    /// Bytes as a number that may have a fraction.
    pub fn to_f64(self) -> f64 {
        self.bits as f64 / 8.0
    }

    /// Python's `self // parts`.
    pub(crate) fn floor_div(self, parts: usize) -> Self {
        Self { bits: 8 * self.bits.div_euclid(8 * parts as i128), is_float: self.is_float }
    }

    /// Python's `max`: of equals the first.
    pub(crate) fn max(self, other: Self) -> Self {
        if other > self { other } else { self }
    }

    /// Python's `min`: of equals the first.
    pub(crate) fn min(self, other: Self) -> Self {
        if other < self { other } else { self }
    }
}

impl Add for Size {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self { bits: self.bits + other.bits, is_float: self.is_float || other.is_float }
    }
}

impl Sub for Size {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self { bits: self.bits - other.bits, is_float: self.is_float || other.is_float }
    }
}

impl AddAssign for Size {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for Size {
    fn sum<I: Iterator<Item = Self>>(sizes: I) -> Self {
        sizes.fold(Self::ZERO, Add::add)
    }
}

impl PartialEq for Size {
    fn eq(&self, other: &Self) -> bool {
        self.bits == other.bits
    }
}

impl Eq for Size {}

impl PartialOrd for Size {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Size {
    fn cmp(&self, other: &Self) -> Ordering {
        self.bits.cmp(&other.bits)
    }
}

/// As Python prints it: `1512.5`, and `912.0` for a float that happens to be whole.
impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.whole_bytes() {
            Some(bytes) if !self.is_float => write!(f, "{bytes}"),
            _ => write!(f, "{:?}", self.to_f64()),
        }
    }
}

/// A JSON number, an integer where Python would hold one (and it fits in 64 bits).
impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.whole_bytes().map(i64::try_from) {
            Some(Ok(bytes)) if !self.is_float => serializer.serialize_i64(bytes),
            _ => serializer.serialize_f64(self.to_f64()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fractions_are_exact_and_print_as_in_python() {
        let flags = Size::of_elements(100, 1);
        assert_eq!((flags.to_string(), flags.whole_bytes()), ("12.5".into(), None));
        let sum = flags + Size::of_elements(4, 1) + Size::from_bytes(899);
        assert_eq!((sum.to_string(), sum.whole_bytes()), ("912.0".into(), Some(912)));
        assert_eq!(serde_json::to_string(&[flags, sum, Size::from_bytes(-3)]).unwrap(), "[12.5,912.0,-3]");
        assert_eq!(sum, Size::from_bytes(912));
        assert_eq!(Size::of_elements(18_500, 1).floor_div(2), Size::from_bytes(1156));
        assert_eq!(Size::from_bytes(i128::MAX), Size::MAX);
    }
}
