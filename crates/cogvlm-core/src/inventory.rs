//! Every tensor of a CogVLM checkpoint: its name, its shape, who uses it and when.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::spec::ModelSpec;

/// Which of the two sets of decoder weights processes a token. A token's type decides, never a router.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Expert {
    /// Text, BOS and EOI: every decoded token.
    Language,
    /// BOI and patches: image prefill only.
    Vision,
}

/// The least that is executed in one place: a residual block (the no-split classes of the published instructions)
/// or one of the parts around them. Units execute in the order of [`Unit::execution_order`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Unit {
    /// `model.vision.patch_embedding`: pixels to patch vectors.
    PatchEmbedding,
    /// `model.vision.transformer.layers.N`.
    VitLayer(usize),
    /// `model.vision.linear_proj`, with `boi` and `eoi`.
    Adapter,
    /// `model.embed_tokens`.
    Embedding,
    /// `model.layers.N`.
    DecoderLayer(usize),
    /// `model.norm` and `lm_head`.
    Head,
}

impl Unit {
    /// All units of a model in the order in which a prompt with an image passes through them.
    pub fn execution_order(spec: &ModelSpec) -> Vec<Self> {
        let vit = (0..spec.vision.num_layers).map(Self::VitLayer);
        let decoder = (0..spec.num_layers).map(Self::DecoderLayer);
        let vision = [Self::PatchEmbedding].into_iter().chain(vit).chain([Self::Adapter]);
        vision.chain([Self::Embedding]).chain(decoder).chain([Self::Head]).collect()
    }

    /// Whether only prompts with an image pass through this unit.
    pub const fn is_vision(self) -> bool {
        matches!(self, Self::PatchEmbedding | Self::VitLayer(_) | Self::Adapter)
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PatchEmbedding => f.write_str("patch embedding"),
            Self::VitLayer(layer) => write!(f, "ViT layer {layer}"),
            Self::Adapter => f.write_str("adapter"),
            Self::Embedding => f.write_str("embedding"),
            Self::DecoderLayer(layer) => write!(f, "decoder layer {layer}"),
            Self::Head => f.write_str("head"),
        }
    }
}

/// When a tensor is read. What is cold may rest off the card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Hot: read for every token, in prefill and decode.
    EveryToken,
    /// Read once per image.
    ImagePrefill,
    /// One row is read per token.
    RowLookup,
}

/// The tensors of a unit that one operation needs together: what is streamed as one piece when it rests off the
/// device that executes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WeightGroup {
    /// Everything the unit has, where one pass over it uses all of it.
    Whole,
    /// RMSNorm weights and `inv_freq`: a few kilobytes, never worth moving.
    Norms,
    /// The expert's fused query, key and value projection.
    Qkv(Expert),
    /// The expert's attention output projection.
    Dense(Expert),
    /// The expert's gate and up projections, which one fused operation reads.
    GateUp(Expert),
    /// The expert's down projection.
    Down(Expert),
}

impl WeightGroup {
    /// Whose weights they are, where experts have their own.
    pub fn expert(self) -> Option<Expert> {
        match self {
            Self::Whole | Self::Norms => None,
            Self::Qkv(expert) | Self::Dense(expert) | Self::GateUp(expert) | Self::Down(expert) => Some(expert),
        }
    }
}

/// One tensor of the checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its published name.
    pub name: String,
    /// Its shape; a linear weight is `[out_features, in_features]`.
    pub shape: Vec<usize>,
    /// The unit that uses it.
    pub unit: Unit,
    /// What it is streamed with.
    pub group: WeightGroup,
    /// When it is read.
    pub phase: Phase,
    /// A checkpoint may lack it (`rotary_emb.inv_freq`).
    pub optional: bool,
}

impl TensorSpec {
    /// Number of elements.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Name of the tensor of decoder layer `layer` whose name ends in `rest`.
pub fn decoder_tensor(layer: usize, rest: &str) -> String {
    format!("model.layers.{layer}.{rest}")
}

/// Name of the tensor of ViT layer `layer` whose name ends in `rest`.
pub fn vit_tensor(layer: usize, rest: &str) -> String {
    format!("model.vision.transformer.layers.{layer}.{rest}")
}

/// Every tensor, in the order of the published files (the order in which the modules are registered).
pub fn tensor_inventory(spec: &ModelSpec) -> Vec<TensorSpec> {
    let mut list = Inventory { tensors: Vec::new() };
    let hidden = spec.hidden_size;
    list.add("model.embed_tokens.weight", &[spec.vocab_size, hidden], Unit::Embedding, WeightGroup::Whole);
    for layer in 0..spec.num_layers {
        list.add_decoder_layer(spec, layer);
    }
    list.add("model.norm.weight", &[hidden], Unit::Head, WeightGroup::Norms);
    list.add_vision_tower(spec);
    list.add("lm_head.weight", &[spec.vocab_size, hidden], Unit::Head, WeightGroup::Whole);
    list.tensors
}

struct Inventory {
    tensors: Vec<TensorSpec>,
}

impl Inventory {
    fn add(&mut self, name: &str, shape: &[usize], unit: Unit, group: WeightGroup) {
        use WeightGroup::{Dense, Down, GateUp, Qkv};
        let phase = match group {
            _ if unit == Unit::Embedding => Phase::RowLookup,
            _ if unit.is_vision() => Phase::ImagePrefill,
            Qkv(Expert::Vision) | Dense(Expert::Vision) | GateUp(Expert::Vision) | Down(Expert::Vision) => {
                Phase::ImagePrefill
            }
            _ => Phase::EveryToken,
        };
        let optional = name.ends_with("rotary_emb.inv_freq");
        self.tensors.push(TensorSpec { name: name.to_owned(), shape: shape.to_vec(), unit, group, phase, optional });
    }

    fn add_decoder_layer(&mut self, spec: &ModelSpec, layer: usize) {
        let (hidden, inner) = (spec.hidden_size, spec.intermediate_size);
        let unit = Unit::DecoderLayer(layer);
        for (expert, prefix) in
            [(Expert::Vision, "self_attn.vision_expert"), (Expert::Language, "self_attn.language_expert")]
        {
            let name = |rest: &str| decoder_tensor(layer, &format!("{prefix}_{rest}"));
            self.add(&name("query_key_value.weight"), &[spec.qkv_size(), hidden], unit, WeightGroup::Qkv(expert));
            if spec.grouped_kv && expert == Expert::Vision {
                self.add(&name("query_key_value.bias"), &[spec.qkv_size()], unit, WeightGroup::Qkv(expert));
            }
            self.add(
                &name("dense.weight"),
                &[hidden, spec.num_heads * spec.head_dim],
                unit,
                WeightGroup::Dense(expert),
            );
        }
        let inv_freq = decoder_tensor(layer, "self_attn.rotary_emb.inv_freq");
        self.add(&inv_freq, &[spec.head_dim / 2], unit, WeightGroup::Norms);
        for (expert, prefix) in [(Expert::Language, "mlp.language_mlp"), (Expert::Vision, "mlp.vision_mlp")] {
            let name = |rest: &str| decoder_tensor(layer, &format!("{prefix}.{rest}"));
            self.add(&name("gate_proj.weight"), &[inner, hidden], unit, WeightGroup::GateUp(expert));
            self.add(&name("up_proj.weight"), &[inner, hidden], unit, WeightGroup::GateUp(expert));
            self.add(&name("down_proj.weight"), &[hidden, inner], unit, WeightGroup::Down(expert));
        }
        for norm in ["input_layernorm.weight", "post_attention_layernorm.weight"] {
            self.add(&decoder_tensor(layer, norm), &[hidden], unit, WeightGroup::Norms);
        }
    }

    fn add_vision_tower(&mut self, spec: &ModelSpec) {
        let (hidden, vision, whole) = (spec.hidden_size, &spec.vision, WeightGroup::Whole);
        let (width, inner) = (vision.hidden_size, vision.intermediate_size);
        self.add("model.vision.boi", &[1, 1, hidden], Unit::Adapter, whole);
        self.add("model.vision.eoi", &[1, 1, hidden], Unit::Adapter, whole);
        let patch = "model.vision.patch_embedding";
        let side = vision.patch_size;
        self.add(&format!("{patch}.cls_embedding"), &[1, width], Unit::PatchEmbedding, whole);
        self.add(
            &format!("{patch}.proj.weight"),
            &[width, vision.num_channels, side, side],
            Unit::PatchEmbedding,
            whole,
        );
        self.add(&format!("{patch}.proj.bias"), &[width], Unit::PatchEmbedding, whole);
        self.add(
            &format!("{patch}.position_embedding.weight"),
            &[vision.num_tokens(), width],
            Unit::PatchEmbedding,
            whole,
        );
        for layer in 0..vision.num_layers {
            let linears = [
                ("input_layernorm", vec![width]),
                ("attention.query_key_value", vec![3 * width, width]),
                ("attention.dense", vec![width, width]),
                ("mlp.fc1", vec![inner, width]),
                ("mlp.fc2", vec![width, inner]),
                ("post_attention_layernorm", vec![width]),
            ];
            for (module, shape) in linears {
                self.add(&vit_tensor(layer, &format!("{module}.weight")), &shape, Unit::VitLayer(layer), whole);
                self.add(&vit_tensor(layer, &format!("{module}.bias")), &shape[..1], Unit::VitLayer(layer), whole);
            }
        }
        let inner = spec.intermediate_size;
        for (rest, shape) in [
            ("linear_proj.weight", vec![hidden, width]),
            ("norm1.weight", vec![hidden]),
            ("norm1.bias", vec![hidden]),
            ("dense_h_to_4h.weight", vec![inner, hidden]),
            ("gate_proj.weight", vec![inner, hidden]),
            ("dense_4h_to_h.weight", vec![hidden, inner]),
        ] {
            self.add(&format!("model.vision.linear_proj.{rest}"), &shape, Unit::Adapter, whole);
        }
        if spec.grouped_kv {
            self.add("model.vision.conv.weight", &[width, width, 2, 2], Unit::Adapter, whole);
            self.add("model.vision.conv.bias", &[width], Unit::Adapter, whole);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ModelConfig;

    fn bytes_of(name: &str, keep: impl Fn(&TensorSpec) -> bool) -> usize {
        let spec = ModelConfig::built_in(name).unwrap().resolve().unwrap();
        tensor_inventory(&spec).iter().filter(|tensor| keep(tensor)).map(|tensor| 2 * tensor.num_elements()).sum()
    }

    #[test]
    fn parameter_counts_are_the_published_ones() {
        for (name, parameters) in [
            ("cogvlm-chat-17b", 17_639_685_376),
            ("cogvlm-base-224-17b", 17_637_948_928),
            ("cogvlm2-19b", 19_503_105_280),
            ("tiny", 10_119_072),
            ("small", 62_490_048),
            ("deep", 24_120_096),
        ] {
            assert_eq!(bytes_of(name, |tensor| !tensor.optional), 2 * parameters, "{name}");
        }
        assert_eq!(bytes_of("cogvlm-chat-17b", |_| true), 35_279_374_848);
    }

    #[test]
    fn phases_split_the_bytes_as_the_model_reads_them() {
        let hot = |tensor: &TensorSpec| tensor.phase == Phase::EveryToken && !tensor.optional;
        assert_eq!(bytes_of("cogvlm-chat-17b", hot), 13_214_687_232);
        assert_eq!(bytes_of("cogvlm2-19b", hot), 15_009_849_344);
        let cold = |tensor: &TensorSpec| tensor.phase == Phase::ImagePrefill;
        assert_eq!(bytes_of("cogvlm-chat-17b", cold), 12_952_010_752 + 8_850_528_768);
        assert_eq!(bytes_of("cogvlm-chat-17b", |tensor| tensor.phase == Phase::RowLookup), 262_144_000);
    }
}
