//! What the model has to do, counted from its tensors: what measured times are held against.

use cogvlm_core::{Expert, ModelSpec, Phase, TensorSpec, Unit, WeightGroup, tensor_inventory};

/// What the model has to do, counted from its tensors.
pub(super) struct Work {
    /// Bytes of the weights that every decoded token reads.
    pub(super) hot_bytes: u64,
    pub(super) vision_flops: f64,
    pub(super) prefill_flops: f64,
}

impl Work {
    pub(super) fn of(spec: &ModelSpec, num_prompt: usize, has_image: bool) -> Self {
        let vision = &spec.vision;
        let vision_rows = if has_image { spec.num_vision_tokens() - 1 } else { 0 };
        let images = usize::from(has_image);
        let rows = |tensor: &TensorSpec| match (tensor.unit, tensor.group) {
            (Unit::PatchEmbedding | Unit::Adapter, _) => images * vision.num_patches(),
            (Unit::VitLayer(_), _) => images * vision.num_tokens(),
            (Unit::Embedding, _) => 0,
            (Unit::Head, _) => 1,
            (Unit::DecoderLayer(_), WeightGroup::Norms | WeightGroup::Whole) => 0,
            (Unit::DecoderLayer(_), group) => {
                let (WeightGroup::Qkv(expert)
                | WeightGroup::Dense(expert)
                | WeightGroup::GateUp(expert)
                | WeightGroup::Down(expert)) = group
                else {
                    return 0;
                };
                if expert == Expert::Vision { vision_rows } else { num_prompt - vision_rows }
            }
        };
        let mut work = Self { hot_bytes: 0, vision_flops: 0.0, prefill_flops: 0.0 };
        for tensor in tensor_inventory(spec) {
            // A position embedding is added, not multiplied.
            let is_matrix =
                tensor.shape.len() > 1 && tensor.shape[0] > 1 && !tensor.name.ends_with("position_embedding.weight");
            let flops = if is_matrix { 2.0 * tensor.num_elements() as f64 * rows(&tensor) as f64 } else { 0.0 };
            work.prefill_flops += flops;
            if tensor.unit.is_vision() {
                work.vision_flops += flops;
            }
            if tensor.phase == Phase::EveryToken {
                work.hot_bytes += tensor.num_elements() as u64 * 2;
            }
        }
        let attention = |layers: usize, width: usize, pairs: f64| layers as f64 * 4.0 * width as f64 * pairs;
        let vit = attention(vision.num_layers, vision.hidden_size, (images * vision.num_tokens().pow(2)) as f64);
        let causal = (num_prompt * (num_prompt + 1)) as f64 / 2.0;
        work.vision_flops += vit;
        work.prefill_flops += vit + attention(spec.num_layers, spec.num_heads * spec.head_dim, causal);
        work
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cogvlm_core::ModelConfig;

    #[test]
    fn work_of_the_17b_model_is_what_its_sizes_imply() {
        let spec = ModelConfig::built_in("cogvlm-chat-17b").unwrap().resolve().unwrap();
        let work = Work::of(&spec, 1260, true);
        assert_eq!(work.hot_bytes, 13_214_687_232 + 4096);
        // About 27.5 TFLOP for an image and 32 tokens, of which the ViT's matrices are 11.2 with its attention.
        assert!((work.prefill_flops / 27.5e12 - 1.0).abs() < 0.03, "{}", work.prefill_flops);
        assert!(work.vision_flops < 0.5 * work.prefill_flops);
    }
}
