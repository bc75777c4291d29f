//! How the elements of each tensor are made.

use cogvlm_core::spec::ROPE_BASE;
use cogvlm_core::{ModelSpec, TensorSpec};

use super::element::{bf16_bits, fill_mixture, fill_uniform, fnv1a64, state};

/// Scale of the decoder's residual stream.
const RHO: f64 = 0.05;
const EMBEDDING: &str = "model.embed_tokens.weight";
/// Row `r` of `lm_head` is a mixture of the embeddings of the tokens `r * MUL[k] + ADD[k]`.
const SUCCESSOR_MUL: [u64; 4] = [1_000_003, 1_000_033, 1_000_037, 1_000_039];
const SUCCESSOR_ADD: [u64; 4] = [12_345, 24_690, 37_035, 49_380];

/// How the elements of one tensor are made.
#[derive(Debug, Clone, PartialEq)]
pub enum Rule {
    /// `base + amp * u`, with `u` in [-1, 1).
    Uniform {
        /// State of the generator at element 0.
        key: u64,
        /// Centre.
        base: f32,
        /// Half-width.
        amp: f32,
    },
    /// RoPE frequencies: no seed.
    InvFreq {
        /// How many.
        len: u64,
    },
    /// Each token is one of four likely successors of four tokens, so that greedy decoding has clear winners.
    LmHead {
        /// State of the generator at element 0 of the embedding, whose rows are mixed.
        embedding_key: u64,
        /// Half-width.
        amp: f32,
        /// Rows.
        vocab_size: u64,
        /// Columns.
        hidden_size: u64,
    },
}

impl Rule {
    pub(super) fn of_tensor(tensor: &TensorSpec, spec: &ModelSpec, seed: u64) -> Self {
        let (base, amp) = base_and_amp(tensor, spec);
        match tensor.name.as_str() {
            name if name.ends_with("rotary_emb.inv_freq") => Self::InvFreq { len: tensor.num_elements() as u64 },
            "lm_head.weight" => Self::LmHead {
                embedding_key: fnv1a64(EMBEDDING.as_bytes()) ^ seed,
                amp,
                vocab_size: spec.vocab_size as u64,
                hidden_size: spec.hidden_size as u64,
            },
            name => Self::Uniform { key: fnv1a64(name.as_bytes()) ^ seed, base, amp },
        }
    }

    /// Makes the elements from `first` on that fill `dst`, two bytes each. The arithmetic is the same with any
    /// instruction set; the widest one at hand makes 6 GB/s per core where plain x86-64 makes 1.7.
    pub(super) fn fill(&self, first: u64, dst: &mut [u8]) {
        let (dst, _) = dst.as_chunks_mut::<2>();
        match *self {
            Self::Uniform { key, base, amp } => {
                let first = state(key, first);
                pulp::Arch::new().dispatch(
                    #[inline(always)]
                    || fill_uniform(first, base, amp, dst),
                );
            }
            Self::InvFreq { len } => {
                for (index, element) in (first..).zip(dst) {
                    let frequency = ROPE_BASE.powf(-(index as f64) / len as f64);
                    *element = bf16_bits(frequency as f32).to_le_bytes();
                }
            }
            Self::LmHead { embedding_key, amp, vocab_size, hidden_size } => {
                let (mut row, mut column, mut rest) = (first / hidden_size, first % hidden_size, dst);
                while !rest.is_empty() {
                    let (dst, next) = rest.split_at_mut(rest.len().min((hidden_size - column) as usize));
                    let successor = |k: usize| (row * SUCCESSOR_MUL[k] + SUCCESSOR_ADD[k]) % vocab_size;
                    let states = [0, 1, 2, 3].map(|k| state(embedding_key, successor(k) * hidden_size + column));
                    pulp::Arch::new().dispatch(
                        #[inline(always)]
                        || fill_mixture(states, amp, dst),
                    );
                    (row, column, rest) = (row + 1, 0, next);
                }
            }
        }
    }
}

/// Centre and half-width of a tensor's values: f64, rounded to f32 once. The scales keep activations sane through all
/// layers; small inputs to the post-norms and a small residual make the epsilons of the norms matter.
fn base_and_amp(tensor: &TensorSpec, spec: &ModelSpec) -> (f32, f32) {
    let name = tensor.name.as_str();
    let fan_in: usize = tensor.shape.iter().skip(1).product();
    let unit = (3.0 / fan_in as f64).sqrt();
    let root3 = 3.0_f64.sqrt();
    let beta = 1.0 / (2.0 * spec.vision.num_layers as f64).sqrt();
    let depth = (spec.num_layers as f64).sqrt();
    let vision = name.starts_with("model.vision.");
    let ends_with = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
    let (base, amp) = match name {
        EMBEDDING => (0.0, RHO * root3 * (128.0 / spec.hidden_size as f64).sqrt()),
        "model.vision.boi" | "model.vision.eoi" => (0.0, RHO * root3),
        "model.vision.linear_proj.linear_proj.weight" => (0.0, 0.02 * unit),
        "model.vision.linear_proj.dense_4h_to_h.weight" => (0.0, 1.5 * RHO * unit),
        _ if ends_with(&["cls_embedding"]) => (0.0, root3),
        _ if ends_with(&["position_embedding.weight"]) => (0.0, 0.5 * root3),
        _ if vision && ends_with(&["layernorm.weight"]) => (beta, 0.1 * beta),
        _ if vision && ends_with(&["layernorm.bias"]) => (0.0, 0.1 * beta),
        _ if ends_with(&["norm.weight", "norm1.weight"]) => (1.0, 0.1),
        _ if vision && ends_with(&["attention.dense.weight", "mlp.fc2.weight"]) => (0.0, 0.05 * unit),
        _ if vision && ends_with(&["attention.dense.bias", "mlp.fc2.bias"]) => (0.0, 0.005),
        _ if ends_with(&["bias"]) => (0.0, 0.1),
        _ if ends_with(&["expert_dense.weight"]) => (0.0, 1.4 * RHO / depth * unit),
        _ if ends_with(&["down_proj.weight"]) => (0.0, 0.7 * RHO / depth * unit),
        _ if ends_with(&["linear_proj.dense_h_to_4h.weight", "linear_proj.gate_proj.weight"]) => (0.0, 1.5 * unit),
        _ => (0.0, unit),
    };
    (base as f32, amp as f32)
}

#[cfg(test)]
mod tests {
    use super::super::SyntheticModel;
    use super::*;

    /// Tensor, bits of base and amp, first four elements, last two.
    type Row = (&'static str, Option<[u32; 2]>, [u16; 4], [u16; 2]);

    const TINY_11: [Row; 17] = [
        (
            "model.embed_tokens.weight",
            Some([0x00000000, 0x3db15cac]),
            [0x3d4d, 0x3c21, 0x3d8b, 0xbd6c],
            [0x3d01, 0x3d10],
        ),
        (
            "model.layers.0.self_attn.vision_expert_query_key_value.weight",
            Some([0x00000000, 0x3e1cc471]),
            [0x3dcb, 0x3d1c, 0xbb2e, 0xbc90],
            [0xbdf4, 0x3d42],
        ),
        (
            "model.layers.0.self_attn.language_expert_dense.weight",
            Some([0x00000000, 0x3baf9455]),
            [0x3ac1, 0xbba9, 0xbb03, 0x3ba4],
            [0xbb73, 0x3b7e],
        ),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None, [0x3f80, 0x3f10, 0x3ea2, 0x3e36], [0x39a6, 0x393a]),
        (
            "model.layers.0.mlp.vision_mlp.down_proj.weight",
            Some([0x00000000, 0x3ad3c1bb]),
            [0x3a13, 0xba81, 0xba40, 0xbace],
            [0x3a64, 0xba4a],
        ),
        (
            "model.layers.0.input_layernorm.weight",
            Some([0x3f800000, 0x3dcccccd]),
            [0x3f69, 0x3f7f, 0x3f89, 0x3f87],
            [0x3f8a, 0x3f89],
        ),
        ("model.vision.boi", Some([0x00000000, 0x3db15cac]), [0x3c95, 0x3d94, 0x3d43, 0xbbf2], [0xbd84, 0xbd18]),
        (
            "model.vision.patch_embedding.proj.weight",
            Some([0x00000000, 0x3d924925]),
            [0xbc66, 0x3ca9, 0x3c89, 0xbccc],
            [0x3d8b, 0x3d1d],
        ),
        (
            "model.vision.patch_embedding.position_embedding.weight",
            Some([0x00000000, 0x3f5db3d7]),
            [0xbf42, 0xbec8, 0x3f35, 0x3b32],
            [0x3f41, 0xbf25],
        ),
        (
            "model.vision.transformer.layers.0.input_layernorm.weight",
            Some([0x3ed105ec, 0x3d2737f0]),
            [0x3ee0, 0x3ed7, 0x3ec9, 0x3eca],
            [0x3ee4, 0x3ec1],
        ),
        (
            "model.vision.transformer.layers.0.attention.query_key_value.bias",
            Some([0x00000000, 0x3dcccccd]),
            [0xbdcb, 0x3c9a, 0xbc95, 0xbc34],
            [0x3dc4, 0x3d98],
        ),
        (
            "model.vision.transformer.layers.0.mlp.fc2.weight",
            Some([0x00000000, 0x3bbd9ba3]),
            [0xbb58, 0x3baf, 0xbb9a, 0xbb0d],
            [0xb968, 0xba8b],
        ),
        (
            "model.vision.transformer.layers.0.mlp.fc2.bias",
            Some([0x00000000, 0x3ba3d70a]),
            [0x3b72, 0x3b0b, 0x3b9f, 0x3b95],
            [0xba12, 0xba4c],
        ),
        (
            "model.vision.linear_proj.linear_proj.weight",
            Some([0x00000000, 0x3b8de3bd]),
            [0xba98, 0x3b50, 0xbb5e, 0x3a3a],
            [0x3b36, 0xbb16],
        ),
        (
            "model.vision.linear_proj.norm1.bias",
            Some([0x00000000, 0x3dcccccd]),
            [0x3d8c, 0x3d20, 0x3cb4, 0xbd2e],
            [0xbdcb, 0x3d8f],
        ),
        (
            "model.vision.linear_proj.dense_4h_to_h.weight",
            Some([0x00000000, 0x3be2e1da]),
            [0xba85, 0x3b4b, 0xbb1d, 0xbbaa],
            [0xbb0c, 0xba90],
        ),
        ("lm_head.weight", Some([0x00000000, 0x3e1cc471]), [0xbe28, 0x3d47, 0xbe37, 0x3db8], [0xbe53, 0xbdc3]),
    ];
    const CHAT_17B_1: [Row; 17] = [
        (
            "model.embed_tokens.weight",
            Some([0x00000000, 0x3c7ad3e7]),
            [0xbaa1, 0xbb95, 0xbc64, 0x3c53],
            [0x3c16, 0xbc27],
        ),
        (
            "model.layers.0.self_attn.vision_expert_query_key_value.weight",
            Some([0x00000000, 0x3cddb3d7]),
            [0xbca6, 0x3c45, 0xbcd8, 0x3b28],
            [0x3ca5, 0x3c8b],
        ),
        (
            "model.layers.0.self_attn.language_expert_dense.weight",
            Some([0x00000000, 0x39af9455]),
            [0xb8d1, 0x3929, 0x391b, 0x38b2],
            [0x390b, 0xb993],
        ),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None, [0x3f80, 0x3f5e, 0x3f40, 0x3f26], [0x390c, 0x38f2]),
        (
            "model.layers.0.mlp.vision_mlp.down_proj.weight",
            Some([0x00000000, 0x38d63474]),
            [0xb857, 0x38c6, 0x3811, 0xb87f],
            [0x3485, 0x3752],
        ),
        (
            "model.layers.0.input_layernorm.weight",
            Some([0x3f800000, 0x3dcccccd]),
            [0x3f7a, 0x3f6c, 0x3f80, 0x3f8a],
            [0x3f78, 0x3f73],
        ),
        ("model.vision.boi", Some([0x00000000, 0x3db15cac]), [0x3d98, 0x3d9c, 0x3d94, 0xbd6c], [0xbc99, 0xbd90]),
        (
            "model.vision.patch_embedding.proj.weight",
            Some([0x00000000, 0x3d924925]),
            [0x3d63, 0xbc63, 0x3d30, 0x3c3d],
            [0xbca5, 0x3b73],
        ),
        (
            "model.vision.patch_embedding.position_embedding.weight",
            Some([0x00000000, 0x3f5db3d7]),
            [0xbf03, 0x3e59, 0xbf3d, 0xbf4d],
            [0x3f58, 0x3f19],
        ),
        (
            "model.vision.transformer.layers.0.input_layernorm.weight",
            Some([0x3db6734a, 0x3c11f5d4]),
            [0x3db2, 0x3db2, 0x3db8, 0x3db4],
            [0x3da7, 0x3da5],
        ),
        (
            "model.vision.transformer.layers.0.attention.query_key_value.bias",
            Some([0x00000000, 0x3dcccccd]),
            [0xbd81, 0xbd9c, 0xbd9c, 0x3d13],
            [0x3da5, 0xbdca],
        ),
        (
            "model.vision.transformer.layers.0.mlp.fc2.weight",
            Some([0x00000000, 0x3a372dbf]),
            [0x3990, 0xba34, 0xba22, 0xb7dc],
            [0x39df, 0x39a6],
        ),
        (
            "model.vision.transformer.layers.0.mlp.fc2.bias",
            Some([0x00000000, 0x3ba3d70a]),
            [0xbb5d, 0xbb0d, 0xbb52, 0xbb71],
            [0x3b8c, 0xbb79],
        ),
        (
            "model.vision.linear_proj.linear_proj.weight",
            Some([0x00000000, 0x3a568455]),
            [0x399d, 0x3a32, 0x39fb, 0xb9ab],
            [0x3a0f, 0x3a51],
        ),
        (
            "model.vision.linear_proj.norm1.bias",
            Some([0x00000000, 0x3dcccccd]),
            [0x3d97, 0xbd6e, 0xbdbc, 0x3d4f],
            [0x3d83, 0x3db2],
        ),
        (
            "model.vision.linear_proj.dense_4h_to_h.weight",
            Some([0x00000000, 0x3aa248e3]),
            [0x3a66, 0x3984, 0x3a3b, 0x3aa1],
            [0xba49, 0xb8cc],
        ),
        ("lm_head.weight", Some([0x00000000, 0x3cddb3d7]), [0x3d03, 0x3d04, 0x3d55, 0x3a2e], [0xbd68, 0x3d21]),
    ];

    fn elements(rule: &Rule, first: u64, count: usize) -> Vec<u16> {
        let mut bytes = vec![0; 2 * count];
        rule.fill(first, &mut bytes);
        bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect()
    }

    fn check_rows(name: &str, seed: u64, rows: &[Row]) {
        let model = SyntheticModel::built_in(name, seed).unwrap();
        for (tensor, scale, first, last) in rows {
            let index = model.tensors().iter().position(|info| info.spec.name == *tensor).unwrap();
            let rule = &model.rules[index];
            let spec = &model.tensors()[index].spec;
            if let Some(scale) = scale {
                let (base, amp) = base_and_amp(spec, model.spec());
                assert_eq!([base.to_bits(), amp.to_bits()], *scale, "{tensor}");
            }
            assert_eq!(elements(rule, 0, 4), first, "{tensor}");
            assert_eq!(elements(rule, spec.num_elements() as u64 - 2, 2), last, "{tensor}");
        }
    }

    #[test]
    fn tiny_is_the_specified_model() {
        check_rows("tiny", 11, &TINY_11);
    }

    #[test]
    fn the_17b_model_is_the_specified_one() {
        check_rows("cogvlm-chat-17b", 1, &CHAT_17B_1);
    }

    #[test]
    fn any_range_is_that_part_of_the_whole() {
        let model = SyntheticModel::built_in("tiny", 11).unwrap();
        let lm_head = model.rules.last().unwrap();
        for rule in [lm_head, &model.rules[0], &model.rules[5]] {
            let whole = elements(rule, 0, 16);
            assert_eq!(elements(rule, 3, 13), whole[3..]);
        }
        // Rows of lm_head have 128 elements; this range begins and ends inside one.
        let rows = elements(lm_head, 0, 5 * 128);
        for range in [0..0, 100..500, 127..129, 128..256] {
            assert_eq!(elements(lm_head, range.start as u64, range.len()), rows[range]);
        }
    }
}
