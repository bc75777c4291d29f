use cogvlm_core::tokens::ExpertRange;
use cogvlm_core::{DType, Expert};

use super::{dot, gelu, round_to, silu};
use crate::{Activation, ExpertWeights};

/// [`Backend::linear`](crate::Backend::linear): x `[num_rows, in_features]`, weight `[out_features, in_features]`, bias
/// `[out_features]`.
pub fn linear(
    x: &[f32], weight: &[f32], bias: Option<&[f32]>, in_features: usize, activation: Activation, dtype: DType,
) -> Vec<f32> {
    let mut out = Vec::new();
    for x_row in x.chunks_exact(in_features) {
        for (column, weight_row) in weight.chunks_exact(in_features).enumerate() {
            let bias = bias.map_or(0.0, |bias| f64::from(bias[column]));
            let sum = round_to(dtype, dot(x_row, weight_row) + bias);
            out.push(match activation {
                Activation::Identity => sum,
                Activation::Gelu => round_to(dtype, gelu(f64::from(sum))),
            });
        }
    }
    out
}

/// `x Wᵀ` with the weight of each row's expert, rounded.
pub fn expert_linear(
    x: &[f32], weights: ExpertWeights<'_, Vec<f32>>, ranges: &[ExpertRange], in_features: usize, dtype: DType,
) -> Vec<f32> {
    let mut out = Vec::new();
    for range in ranges {
        let weight = match range.expert {
            Expert::Language => weights.language,
            Expert::Vision => weights.vision,
        };
        let weight = weight.expect("an expert that has rows has a weight");
        let rows = &x[range.rows.start * in_features..range.rows.end * in_features];
        out.extend(linear(rows, weight, None, in_features, Activation::Identity, dtype));
    }
    out
}

/// [`Backend::linear_residual`](crate::Backend::linear_residual): `residual + x Wᵀ`.
pub fn linear_residual(
    x: &[f32], weights: ExpertWeights<'_, Vec<f32>>, ranges: &[ExpertRange], in_features: usize, residual: &[f32],
    dtype: DType,
) -> Vec<f32> {
    let products = expert_linear(x, weights, ranges, in_features, dtype);
    products.iter().zip(residual).map(|(&p, &r)| round_to(dtype, f64::from(p) + f64::from(r))).collect()
}

/// [`Backend::gate_up`](crate::Backend::gate_up): `silu(x Gᵀ) * (x Uᵀ)`.
pub fn gate_up(
    x: &[f32], gate: ExpertWeights<'_, Vec<f32>>, up: ExpertWeights<'_, Vec<f32>>, ranges: &[ExpertRange],
    in_features: usize, dtype: DType,
) -> Vec<f32> {
    let gate = expert_linear(x, gate, ranges, in_features, dtype);
    let up = expert_linear(x, up, ranges, in_features, dtype);
    let product =
        |(&g, &u): (&f32, &f32)| round_to(dtype, f64::from(round_to(dtype, silu(f64::from(g)))) * f64::from(u));
    gate.iter().zip(&up).map(product).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linears_give_what_one_computes_by_hand() {
        let (x, weight) = ([1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 1.0, 1.0, -1.0, 2.0]);
        let out = linear(&x, &weight, Some(&[10.0, 20.0, 30.0]), 2, Activation::Identity, DType::F32);
        assert_eq!(out, [11.0, 23.0, 33.0, 13.0, 27.0, 35.0]);

        let (language, vision) = (vec![1.0, 0.0], vec![0.0, 1.0]);
        let weights = ExpertWeights { language: Some(&language), vision: Some(&vision) };
        let ranges =
            [ExpertRange { rows: 0..1, expert: Expert::Vision }, ExpertRange { rows: 1..2, expert: Expert::Language }];
        assert_eq!(expert_linear(&x, weights, &ranges, 2, DType::F32), [2.0, 3.0]);
        assert_eq!(linear_residual(&x, weights, &ranges, 2, &[10.0, 20.0], DType::F32), [12.0, 23.0]);
        let swapped = ExpertWeights { language: Some(&vision), vision: Some(&language) };
        let out = gate_up(&x, weights, swapped, &ranges, 2, DType::F32);
        assert_eq!(out, [silu(2.0) as f32, round_to(DType::F32, f64::from(silu(3.0) as f32) * 4.0)]);
    }
}
