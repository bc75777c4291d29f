//! Element types of activations.

use bytemuck::Pod;
use cogvlm_core::DType;
use half::bf16;

/// A type that activations can have. Arithmetic is done in f32; `of` rounds to nearest even.
pub(crate) trait Element: Pod + Send + Sync {
    /// Its name.
    const DTYPE: DType;

    /// Rounds `value` to this type.
    fn of(value: f32) -> Self;

    /// The exact value.
    fn get(self) -> f32;

    /// `value` after a rounding to this type.
    #[inline(always)]
    fn round(value: f32) -> f32 {
        Self::of(value).get()
    }
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;

    #[inline(always)]
    fn of(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn get(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;

    #[inline(always)]
    fn of(value: f32) -> Self {
        // Without a branch, so that loops over it become vector instructions.
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet_nan = (bits >> 16) | 0x40;
        bf16::from_bits(if value.is_nan() { quiet_nan } else { rounded } as u16)
    }

    #[inline(always)]
    fn get(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_to_bf16_is_to_nearest_even() {
        let mut bits = 1u32;
        for _ in 0..100_000 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = f32::from_bits(bits);
            let (ours, theirs) = (<bf16 as Element>::of(value), bf16::from_f32(value));
            assert!(ours == theirs || (ours.is_nan() && theirs.is_nan()), "{value:e}");
        }
        // Exactly half way between two neighbours: the even one.
        assert_eq!(<bf16 as Element>::of(f32::from_bits(0x3f80_8000)).to_bits(), 0x3f80);
        assert_eq!(<bf16 as Element>::of(f32::from_bits(0x3f81_8000)).to_bits(), 0x3f82);
    }
}
