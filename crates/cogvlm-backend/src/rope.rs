//! Rotary position embedding: the table of angles that all devices share.

use cogvlm_core::DType;
use half::bf16;

/// In which arithmetic angles are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum RopeMode {
    /// Everything in f32, the rotated value rounded once.
    #[default]
    Float32,
    /// As the published code runs: position, angle, cosine, sine, both products and the sum rounded to the model's
    /// type. Positions above 256 then collide in bf16.
    Published,
}

/// `10000^(-j / (head_dim / 2))` in f32: what the model uses where a checkpoint holds no `inv_freq`.
pub fn inv_freq(head_dim: usize) -> Vec<f32> {
    let half = head_dim / 2;
    (0..half).map(|j| (1.0 / cogvlm_core::spec::ROPE_BASE.powf(2.0 * j as f64 / head_dim as f64)) as f32).collect()
}

/// Cosines and sines of all positions: `[num_positions, 2 * inv_freq.len()]`, each row the cosines, then the sines.
/// With [`RopeMode::Published`] and bf16 activations every step is rounded to bf16.
pub fn table(inv_freq: &[f32], num_positions: usize, mode: RopeMode, activations: DType) -> Vec<f32> {
    let rounds = mode == RopeMode::Published && activations == DType::Bf16;
    let round = |value: f32| if rounds { bf16::from_f32(value).to_f32() } else { value };
    let mut table = Vec::with_capacity(num_positions * 2 * inv_freq.len());
    for position in 0..num_positions {
        let angles = inv_freq.iter().map(|&freq| round(round(position as f32) * round(freq)));
        table.extend(angles.clone().map(|angle| round(angle.cos())));
        table.extend(angles.map(|angle| round(angle.sin())));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn angles_follow_the_formula_and_the_published_rounding() {
        let freq = inv_freq(8);
        assert_eq!(freq.len(), 4);
        assert!((freq[1] - 0.1).abs() < 1e-8);
        let exact = table(&freq, 300, RopeMode::Float32, DType::Bf16);
        assert!((exact[299 * 8] - 299f32.cos()).abs() < 1e-6);
        assert!((exact[299 * 8 + 4] - 299f32.sin()).abs() < 1e-6);
        // bf16 has 8 bits: 299 rounds to 300.
        let published = table(&freq, 300, RopeMode::Published, DType::Bf16);
        assert_eq!(published[299 * 8], bf16::from_f32(300f32.cos()).to_f32());
    }
}
