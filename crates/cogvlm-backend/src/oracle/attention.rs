use cogvlm_core::DType;

use super::{KvPart, dot, kv_index, round_to};
use crate::{HeadGeometry, SequenceRows};

/// [`Backend::attention`](crate::Backend::attention): query `[num_rows, num_heads * head_dim]`, kv the paged cache.
pub fn attention(query: &[f32], kv: &[f32], heads: HeadGeometry, sequences: &[SequenceRows], dtype: DType) -> Vec<f32> {
    let HeadGeometry { num_heads, num_kv_heads, head_dim } = heads;
    let vector = |slot, part, kv_head| &kv[kv_index(heads, slot, part, kv_head)..][..head_dim];
    let mut out = Vec::new();
    for sequence in sequences {
        for (index, row) in sequence.rows.clone().enumerate() {
            let num_keys = sequence.first_token() + index + 1;
            let slots: Vec<usize> =
                (0..num_keys).map(|token| sequence.slot(token).expect("a token has a slot")).collect();
            for head in 0..num_heads {
                let query = &query[(row * num_heads + head) * head_dim..][..head_dim];
                let kv_head = head / (num_heads / num_kv_heads);
                let keys = slots.iter().map(|&slot| vector(slot, KvPart::Key, kv_head));
                let values = slots.iter().map(|&slot| vector(slot, KvPart::Value, kv_head));
                out.extend(attend(query, keys, values, dtype));
            }
        }
    }
    out
}

/// [`Backend::image_attention`](crate::Backend::image_attention): qkv `[num_images * num_tokens, 3 * num_heads *
/// head_dim]`.
pub fn image_attention(qkv: &[f32], num_tokens: usize, heads: HeadGeometry, dtype: DType) -> Vec<f32> {
    let HeadGeometry { num_heads, head_dim, .. } = heads;
    let width = num_heads * head_dim;
    let mut out = Vec::new();
    for image in qkv.chunks_exact(num_tokens * 3 * width) {
        let vector = |token: usize, part: usize, head: usize| {
            &image[token * 3 * width + part * width + head * head_dim..][..head_dim]
        };
        for token in 0..num_tokens {
            for head in 0..num_heads {
                let keys = (0..num_tokens).map(|token| vector(token, 1, head));
                let values = (0..num_tokens).map(|token| vector(token, 2, head));
                out.extend(attend(vector(token, 0, head), keys, values, dtype));
            }
        }
    }
    out
}

/// `softmax(q kᵀ / √head_dim) v` of one query, rounded once.
fn attend<'a>(
    query: &[f32], keys: impl Iterator<Item = &'a [f32]>, values: impl Iterator<Item = &'a [f32]>, dtype: DType,
) -> Vec<f32> {
    let scale = 1.0 / (query.len() as f64).sqrt();
    let scores: Vec<f64> = keys.map(|key| dot(query, key) * scale).collect();
    let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - best).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut sums = vec![0.0; query.len()];
    for (weight, value) in weights.iter().zip(values) {
        for (sum, &value) in sums.iter_mut().zip(value) {
            *sum += weight / total * f64::from(value);
        }
    }
    sums.into_iter().map(|sum| round_to(dtype, sum)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::kv_row_len;

    #[test]
    fn attention_weighs_values_by_their_scores() {
        // Scores 0 and ln 3 after the scale ½ of head_dim 4.
        let query = [1.0, 0.0, 0.0, 0.0];
        let keys: [&[f32]; 2] = [&[0.0; 4], &[2.0 * 3f32.ln(), 0.0, 0.0, 0.0]];
        let values: [&[f32]; 2] = [&[4.0, 0.0, 8.0, 0.0], &[0.0, 4.0, 8.0, 1e4]];
        let out = attend(&query, keys.into_iter(), values.into_iter(), DType::F32);
        for (out, expected) in out.iter().zip([1.0, 3.0, 8.0, 7500.0]) {
            assert!((out / expected - 1.0).abs() < 1e-6, "{out} {expected}");
        }
    }

    #[test]
    fn a_row_sees_its_own_key_and_those_before_it() {
        let heads = HeadGeometry { num_heads: 1, num_kv_heads: 1, head_dim: 2 };
        let mut kv = vec![0.0; 3 * kv_row_len(heads)];
        // Two tokens in block 2, keys all zero: a plain mean of the values seen.
        let sequence = SequenceRows { rows: 0..2, context_len: 2, blocks: vec![2] };
        for (token, value) in [(0, 2.0), (1, 6.0)] {
            kv[kv_index(heads, sequence.slot(token).unwrap(), KvPart::Value, 0)] = value;
        }
        let out = attention(&[1.0; 4], &kv, heads, &[sequence], DType::F32);
        assert_eq!(out, [2.0, 0.0, 4.0, 0.0]);
    }

    #[test]
    fn images_are_attended_alone_and_split_in_three_first() {
        let heads = HeadGeometry { num_heads: 2, num_kv_heads: 2, head_dim: 1 };
        // Keys zero, so that every output is the mean of its image's values.
        let row = |a, b| [1.0, 1.0, 0.0, 0.0, a, b];
        let qkv = [row(1.0, 2.0), row(3.0, 4.0), row(10.0, 20.0), row(30.0, 40.0)].concat();
        assert_eq!(image_attention(&qkv, 2, heads, DType::F32), [2.0, 3.0, 2.0, 3.0, 20.0, 30.0, 20.0, 30.0]);
    }
}
