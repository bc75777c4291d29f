//! The pseudo-random numbers behind synthetic weights, and their rounding. The order of the operations is the
//! definition: every product and sum is rounded to f32 by itself.

/// Difference between the states of neighbouring elements: SplitMix64's increment.
pub(super) const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// FNV-1a, 64 bits.
pub(super) fn fnv1a64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xCBF2_9CE4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3))
}

/// State of element `index` of the stream `key`.
pub(super) fn state(key: u64, index: u64) -> u64 {
    key.wrapping_add(index.wrapping_mul(STEP))
}

/// SplitMix64's output function.
#[inline(always)]
pub(super) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The number in [-1, 1) that belongs to a state; exact, a multiple of 2^-23.
#[inline(always)]
pub(super) fn uniform(state: u64) -> f32 {
    const SCALE: f32 = 1.0 / (1 << 23) as f32;
    ((mix(state) >> 40) as i32 - (1 << 23)) as f32 * SCALE
}

/// Bits of a finite value as bf16, rounded to nearest, ties to even.
#[inline(always)]
pub(super) fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) as u16
}

/// `base + amp * u` for consecutive elements, the first of which has state `state`.
#[inline(always)]
pub(super) fn fill_uniform(mut state: u64, base: f32, amp: f32, dst: &mut [[u8; 2]]) {
    for element in dst {
        *element = bf16_bits(base + amp * uniform(state)).to_le_bytes();
        state = state.wrapping_add(STEP);
    }
}

/// `amp` times the weighted sum of four streams, for consecutive elements of a row of `lm_head`.
#[inline(always)]
pub(super) fn fill_mixture(states: [u64; 4], amp: f32, dst: &mut [[u8; 2]]) {
    let [mut a, mut b, mut c, mut d] = states;
    for element in dst {
        let x = uniform(a) + 0.89 * uniform(b) + 0.78 * uniform(c) + 0.67 * uniform(d);
        *element = bf16_bits(0.0 + amp * x).to_le_bytes();
        [a, b, c, d] = [a, b, c, d].map(|state| state.wrapping_add(STEP));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_the_specified_ones() {
        let hash = fnv1a64(b"model.embed_tokens.weight");
        assert_eq!(hash, 0xa88f_d795_d5c6_d156);
        let key = hash ^ 11;
        assert_eq!(key, 0xa88f_d795_d5c6_d15d);
        let mixed = [0, 1, 2].map(|index| mix(state(key, index)));
        assert_eq!(mixed, [0xc9d5_09fb_ec3e_ddc9, 0x8e86_ebca_220d_09cd, 0xe495_1a93_142d_f8a5]);
        let numbers = [0, 1, 2].map(|index| f64::from(uniform(state(key, index))));
        assert_eq!(numbers, [0.576813817024231, 0.11349236965179443, 0.7858002185821533]);
    }

    #[test]
    fn bf16_rounds_ties_to_even() {
        for (bits, expected) in [
            (0x3F80_0000, 0x3F80),
            (0x3F80_8000, 0x3F80),
            (0x3F81_8000, 0x3F82),
            (0x3F80_8001, 0x3F81),
            (0x3FFF_FFFF, 0x4000),
            (0x8000_0000, 0x8000),
        ] {
            assert_eq!(bf16_bits(f32::from_bits(bits)), expected, "{bits:#x}");
        }
    }
}
