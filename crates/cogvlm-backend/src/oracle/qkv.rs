use cogvlm_core::DType;
use cogvlm_core::tokens::ExpertRange;
use cogvlm_core::workspace::BLOCK_LEN;

use super::{expert_linear, round_to};
use crate::{Batch, ExpertWeights, HeadGeometry, RopeMode};

/// Which half of a KV block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvPart {
    /// Rotated keys.
    Key,
    /// Values.
    Value,
}

/// Width of a row of the paged cache: one KV block.
pub fn kv_row_len(heads: HeadGeometry) -> usize {
    2 * heads.num_kv_heads * BLOCK_LEN * heads.head_dim
}

/// Where the vector of `kv_head` for `slot` begins in a paged cache
/// `[num_blocks][key/value][num_kv_heads][BLOCK_LEN][head_dim]`.
pub fn kv_index(heads: HeadGeometry, slot: usize, part: KvPart, kv_head: usize) -> usize {
    let (block, token) = (slot / BLOCK_LEN, slot % BLOCK_LEN);
    (((block * 2 + part as usize) * heads.num_kv_heads + kv_head) * BLOCK_LEN + token) * heads.head_dim
}

/// Rotates one head: dimension `j` is paired with `j + head_dim/2`, `angles` holds the cosines, then the sines.
pub fn rotate(head: &mut [f32], angles: &[f32], mode: RopeMode, dtype: DType) {
    let half = head.len() / 2;
    let product = |a: f32, b: f32| {
        let exact = f64::from(a) * f64::from(b);
        if mode == RopeMode::Published { f64::from(round_to(dtype, exact)) } else { exact }
    };
    for j in 0..half {
        let (a, b, cos, sin) = (head[j], head[j + half], angles[j], angles[j + half]);
        head[j] = round_to(dtype, product(a, cos) - product(b, sin));
        head[j + half] = round_to(dtype, product(a, sin) + product(b, cos));
    }
}

/// [`Backend::qkv_rope_append`](crate::Backend::qkv_rope_append): gives the queries `[num_rows, num_heads * head_dim]`
/// and writes keys and values to `kv`. x `[num_rows, in_features]`.
#[expect(clippy::too_many_arguments, reason = "the arguments of the operation")]
pub fn qkv_rope_append(
    x: &[f32], weights: ExpertWeights<'_, Vec<f32>>, ranges: &[ExpertRange], in_features: usize, heads: HeadGeometry,
    rope: &[f32], mode: RopeMode, batch: &Batch, kv: &mut [f32], dtype: DType,
) -> Vec<f32> {
    let HeadGeometry { num_heads, num_kv_heads, head_dim } = heads;
    let qkv = expert_linear(x, weights, ranges, in_features, dtype);
    let mut query = Vec::new();
    let rows = qkv.chunks_exact((num_heads + 2 * num_kv_heads) * head_dim);
    for ((row, slot), &position) in rows.zip(batch.slots()).zip(&batch.position_ids) {
        let slot = slot.expect("a row has a slot");
        let angles = &rope[position as usize * head_dim..][..head_dim];
        for (index, head) in row.chunks_exact(head_dim).enumerate() {
            let mut head = head.to_vec();
            if index < num_heads + num_kv_heads {
                rotate(&mut head, angles, mode, dtype);
            }
            if index < num_heads {
                query.extend(head);
                continue;
            }
            let kv_head = (index - num_heads) % num_kv_heads;
            let part = if index < num_heads + num_kv_heads { KvPart::Key } else { KvPart::Value };
            kv[kv_index(heads, slot, part, kv_head)..][..head_dim].copy_from_slice(&head);
        }
    }
    query
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_turn_moves_each_half_into_the_other() {
        let mut head = [1.0, 2.0, 3.0, 4.0];
        rotate(&mut head, &[0.0, 0.0, 1.0, 1.0], RopeMode::Float32, DType::F32);
        assert_eq!(head, [-3.0, -4.0, 1.0, 2.0]);
    }

    #[test]
    fn published_rotation_rounds_each_product() {
        let rotated = |mode| {
            let mut head = [1.0078125, 1.0];
            rotate(&mut head, &[1.0078125, 1.0078125], mode, DType::Bf16);
            head
        };
        // 1.0078125² = 1.01568 lies between the bf16 numbers 1.015625 and 1.0234375.
        assert_eq!(rotated(RopeMode::Published)[0], 0.0078125);
        assert_eq!(rotated(RopeMode::Float32)[0], round_to(DType::Bf16, 1.0078125f64.powi(2) - 1.0078125));
        assert_ne!(rotated(RopeMode::Float32), rotated(RopeMode::Published));
    }

    #[test]
    fn the_cache_is_paged_by_blocks_then_parts_then_heads() {
        let heads = HeadGeometry { num_heads: 4, num_kv_heads: 2, head_dim: 8 };
        let row = kv_row_len(heads);
        assert_eq!(row, 2 * 2 * BLOCK_LEN * 8);
        assert_eq!(kv_index(heads, 0, KvPart::Key, 1), BLOCK_LEN * 8);
        assert_eq!(kv_index(heads, 3 * BLOCK_LEN + 5, KvPart::Value, 1), 3 * row + 3 * BLOCK_LEN * 8 + 5 * 8);
    }
}
