use cogvlm_core::DType;

use super::{gelu, round_to};

/// [`Backend::rms_norm`](crate::Backend::rms_norm): x `[num_rows, width]`, weight `[width]`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, dtype: DType) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(weight.len()) {
        let mean_square = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / row.len() as f64;
        let scale = 1.0 / (mean_square + f64::from(eps)).sqrt();
        out.extend(row.iter().zip(weight).map(|(&x, &w)| round_to(dtype, f64::from(w) * f64::from(x) * scale)));
    }
    out
}

/// `weight (x - mean) / √(variance + eps) + bias`, biased variance, one rounding; x `[num_rows, width]`, weight and
/// bias
/// `[width]`.
pub fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, dtype: DType) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(weight.len()) {
        let width = row.len() as f64;
        let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / width;
        let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / width;
        let scale = 1.0 / (variance + f64::from(eps)).sqrt();
        let affine = |((&x, &w), &b): ((&f32, &f32), &f32)| {
            round_to(dtype, f64::from(w) * (f64::from(x) - mean) * scale + f64::from(b))
        };
        out.extend(row.iter().zip(weight).zip(bias).map(affine));
    }
    out
}

/// [`Backend::layer_norm_residual`](crate::Backend::layer_norm_residual): `residual + layer_norm(branch)`.
pub fn layer_norm_residual(
    branch: &[f32], weight: &[f32], bias: &[f32], eps: f32, residual: &[f32], dtype: DType,
) -> Vec<f32> {
    let normed = layer_norm(branch, weight, bias, eps, dtype);
    normed.iter().zip(residual).map(|(&n, &r)| round_to(dtype, f64::from(n) + f64::from(r))).collect()
}

/// [`Backend::layer_norm_gelu`](crate::Backend::layer_norm_gelu): `gelu(layer_norm(x))`.
pub fn layer_norm_gelu(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, dtype: DType) -> Vec<f32> {
    let normed = layer_norm(x, weight, bias, eps, dtype);
    normed.into_iter().map(|n| round_to(dtype, gelu(f64::from(n)))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norms_give_what_one_computes_by_hand() {
        // Mean square of 3, 4: 12.5, of which eps makes 16.
        let out = rms_norm(&[3.0, 4.0, -6.0, 8.0], &[2.0, 1.0], 3.5, DType::F32);
        assert_eq!(out[..2], [1.5, 1.0]);
        assert_eq!(out[2], (-12.0 / 53.5f64.sqrt()) as f32);
        // Mean 3, variance 4, of which eps makes 16.
        let out = layer_norm(&[1.0, 5.0], &[2.0, 1.0], &[10.0, 20.0], 12.0, DType::F32);
        assert_eq!(out, [9.0, 20.5]);
        assert_eq!(
            layer_norm_residual(&[1.0, 5.0], &[2.0, 1.0], &[10.0, 20.0], 12.0, &[1.0, 2.0], DType::F32),
            [10.0, 22.5]
        );
    }

    #[test]
    fn the_norm_is_rounded_before_it_is_added() {
        // 9 + 1/32 is not a bf16 number: 9.0 remains, and the sum of 9.0 and 1/32 is rounded again.
        let out = layer_norm_residual(&[1.0, 5.0], &[2.0, 1.0], &[10.03125, 20.0], 12.0, &[-9.0, 0.0], DType::Bf16);
        assert_eq!(out, [0.0, 20.5]);
    }
}
