//! What every operation of [`Backend`](crate::Backend) computes, as plainly as it can be written: f32 slices in, f32
//! slices out, all sums in f64. Nobody runs a model with it; backends are checked against it.
//!
//! Matrices are row-major. `dtype` is the activation type: results are rounded to it at the points that the
//! operation's documentation names ([`round_to`]) and nowhere else. Slices that do not fit together panic.

mod activation;
mod attention;
mod linear;
mod made;
mod norm;
mod patch_embed;
mod qkv;

pub use activation::{erf, gelu, silu};
pub use attention::{attention, image_attention};
pub use linear::{expert_linear, gate_up, linear, linear_residual};
pub use made::made_element;
pub use norm::{layer_norm, layer_norm_gelu, layer_norm_residual, rms_norm};
pub use patch_embed::patch_embed;
pub use qkv::{KvPart, kv_index, kv_row_len, qkv_rope_append, rotate};

use cogvlm_core::DType;
use half::{bf16, f16};

/// The value of `dtype` nearest to `value`, ties to even. A 16-bit result goes through f32, as it does on a device.
pub fn round_to(dtype: DType, value: f64) -> f32 {
    let single = value as f32;
    match dtype {
        DType::F32 => single,
        DType::F16 => f16::from_f32(single).to_f32(),
        DType::Bf16 => bf16::from_f32(single).to_f32(),
    }
}

/// `Σ aᵢ bᵢ` in f64, where the product of two f32 is exact.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "vectors of different length");
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_goes_to_the_nearest_and_ties_to_even() {
        // bf16 has 8 significant bits: between 256 and 512 the even numbers.
        let cases = [(257.0, 256.0), (259.0, 260.0), (257.001, 258.0), (-259.0, -260.0), (0.1, 0.100_097_656)];
        for (value, expected) in cases {
            assert_eq!(round_to(DType::Bf16, value), expected, "{value}");
        }
        assert_eq!(round_to(DType::F16, 2049.0), 2048.0);
        assert_eq!(round_to(DType::F32, 1.0 + 2f64.powi(-25)), 1.0);
    }
}
