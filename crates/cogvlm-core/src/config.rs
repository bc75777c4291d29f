//! `config.json` of a CogVLM checkpoint, key for key, and the built-in configurations.

use serde::{Deserialize, Serialize};

use crate::prompt::Template;
use crate::spec::{ModelSpec, VisionSpec};

/// The keys of `config.json` that the model reads, under their published names. Unknown keys are ignored.
///
/// Source: `CogVLMConfig` of the published model; defaults are those of that class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// `["CogVLMForCausalLM"]`.
    #[serde(default)]
    pub architectures: Vec<String>,
    /// Width of the decoder's hidden states.
    pub hidden_size: usize,
    /// Width inside the decoder's MLPs.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads of the decoder.
    pub num_attention_heads: usize,
    /// Key/value heads (CogVLM2 only); as many as query heads where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_multi_query_heads: Option<usize>,
    /// Rows of the embedding and of `lm_head`.
    pub vocab_size: usize,
    /// Epsilon of every RMSNorm.
    #[serde(default = "default_rms_norm_eps")]
    pub rms_norm_eps: f64,
    /// Context length that the model was trained for.
    #[serde(default = "default_max_position_embeddings")]
    pub max_position_embeddings: usize,
    /// Id of the token every sequence begins with.
    #[serde(default = "default_bos")]
    pub bos_token_id: u32,
    /// Id of the token that ends an answer.
    #[serde(default = "default_eos")]
    pub eos_token_id: u32,
    /// Id under the vision tokens; never read.
    #[serde(default)]
    pub pad_token_id: u32,
    /// Activation of the decoder's MLPs, `silu`.
    #[serde(default = "default_hidden_act")]
    pub hidden_act: String,
    /// Prompt template used where a request names none.
    #[serde(default)]
    pub template_version: Template,
    /// Always false for CogVLM.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Element type the weights were published in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub torch_dtype: Option<String>,
    /// The vision tower.
    pub vision_config: VisionConfig,
}

/// `vision_config` of `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VisionConfig {
    /// Width of the ViT's hidden states.
    pub hidden_size: usize,
    /// Width inside the ViT's MLPs.
    pub intermediate_size: usize,
    /// ViT layers.
    pub num_hidden_layers: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Side of the square input image in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Colour channels, 3.
    pub in_channels: usize,
    /// Rows of the position embedding: patches and the class token.
    pub num_positions: usize,
    /// Epsilon of the ViT's LayerNorms.
    pub layer_norm_eps: f64,
    /// Activation of the ViT's MLPs, `gelu` (the erf form).
    #[serde(default = "default_vision_act")]
    pub hidden_act: String,
}

/// Most layers of the decoder, and of the vision tower.
const MAX_LAYERS: usize = 256;
/// Most patches along a side of an image.
const MAX_GRID: usize = 1 << 10;

fn default_rms_norm_eps() -> f64 {
    1e-6
}
fn default_max_position_embeddings() -> usize {
    2048
}
fn default_bos() -> u32 {
    1
}
fn default_eos() -> u32 {
    2
}
fn default_hidden_act() -> String {
    "silu".to_owned()
}
fn default_vision_act() -> String {
    "gelu".to_owned()
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, or a key is missing or of the wrong type.
    #[error("not a usable CogVLM configuration: {0}")]
    Json(#[from] serde_json::Error),
    /// A key has a value that no CogVLM model has.
    #[error("`{key}` is {found}, but {expected}")]
    Value {
        /// The key, with its path.
        key: &'static str,
        /// What the file says.
        found: String,
        /// What it has to be.
        expected: String,
    },
}

/// The configurations that come with the program: name, and the text of `configs/models/NAME.json`.
const BUILT_IN: [(&str, &str); 7] = [
    ("tiny", include_str!("../../../configs/models/tiny.json")),
    ("small", include_str!("../../../configs/models/small.json")),
    ("deep", include_str!("../../../configs/models/deep.json")),
    ("cogvlm-chat-17b", include_str!("../../../configs/models/cogvlm-chat-17b.json")),
    ("cogvlm-base-490-17b", include_str!("../../../configs/models/cogvlm-base-490-17b.json")),
    ("cogvlm-base-224-17b", include_str!("../../../configs/models/cogvlm-base-224-17b.json")),
    ("cogvlm2-19b", include_str!("../../../configs/models/cogvlm2-19b.json")),
];

/// Names of the built-in configurations.
pub fn built_in_names() -> impl Iterator<Item = &'static str> {
    BUILT_IN.iter().map(|(name, _)| *name)
}

/// The text of the built-in `config.json` called `name`.
pub fn built_in_json(name: &str) -> Option<&'static str> {
    BUILT_IN.iter().find(|(known, _)| *known == name).map(|(_, text)| *text)
}

impl ModelConfig {
    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// Where it is not JSON or lacks a key that the model needs.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        Ok(serde_json::from_str(text)?)
    }

    /// The built-in configuration called `name`.
    pub fn built_in(name: &str) -> Option<Self> {
        built_in_json(name).map(|text| Self::from_json(text).expect("built-in configurations are parsed by a test"))
    }

    /// Checks every relation between the keys and resolves them into sizes.
    ///
    /// # Errors
    /// [`ConfigError::Value`] with the key, where a value is impossible or describes a model that this program
    /// does not know.
    pub fn resolve(&self) -> Result<ModelSpec, ConfigError> {
        let vision = &self.vision_config;
        // Far above every model in use, and low enough that no list of layers fills the memory and no product of these,
        // summed over the model for the longest context and the largest batch, leaves 64 bits.
        for (key, value, most) in [
            ("hidden_size", self.hidden_size, 1 << 18),
            ("intermediate_size", self.intermediate_size, 1 << 20),
            ("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_attention_heads, 1 << 18),
            ("vocab_size", self.vocab_size, 1 << 22),
            ("max_position_embeddings", self.max_position_embeddings, 1 << 20),
            ("vision_config.hidden_size", vision.hidden_size, 1 << 18),
            ("vision_config.intermediate_size", vision.intermediate_size, 1 << 20),
            ("vision_config.num_hidden_layers", vision.num_hidden_layers, MAX_LAYERS),
            ("vision_config.num_heads", vision.num_heads, 1 << 18),
            ("vision_config.image_size", vision.image_size, 1 << 14),
            ("vision_config.patch_size", vision.patch_size, 1 << 14),
        ] {
            expect(key, value, (1..=most).contains(&value), &format!("it must lie between 1 and {most}"))?;
        }
        let head_dim = self.hidden_size / self.num_attention_heads;
        expect(
            "num_attention_heads",
            self.num_attention_heads,
            self.hidden_size.is_multiple_of(self.num_attention_heads) && head_dim.is_multiple_of(2),
            &format!("hidden_size {} must divide into heads of an even size", self.hidden_size),
        )?;
        let num_kv_heads = self.num_multi_query_heads.unwrap_or(self.num_attention_heads);
        expect(
            "num_multi_query_heads",
            num_kv_heads,
            num_kv_heads > 0 && self.num_attention_heads.is_multiple_of(num_kv_heads),
            &format!("it must divide num_attention_heads {}", self.num_attention_heads),
        )?;
        expect(
            "vision_config.num_heads",
            vision.num_heads,
            vision.hidden_size.is_multiple_of(vision.num_heads),
            &format!("it must divide vision_config.hidden_size {}", vision.hidden_size),
        )?;
        expect(
            "vision_config.in_channels",
            vision.in_channels,
            vision.in_channels == 3,
            "images have 3 channels here",
        )?;
        expect(
            "vision_config.image_size",
            vision.image_size,
            vision.image_size.is_multiple_of(vision.patch_size),
            &format!("it must be a multiple of patch_size {}", vision.patch_size),
        )?;
        let grid = vision.image_size / vision.patch_size;
        expect(
            "vision_config.patch_size",
            vision.patch_size,
            grid <= MAX_GRID,
            &format!("that makes {grid} patches a side, and at most {MAX_GRID} are possible"),
        )?;
        let num_patches = grid.pow(2);
        expect(
            "vision_config.num_positions",
            vision.num_positions,
            vision.num_positions == num_patches + 1,
            &format!("image_size and patch_size imply {}", num_patches + 1),
        )?;
        expect("hidden_act", &self.hidden_act, self.hidden_act == "silu", "CogVLM's MLPs use \"silu\"")?;
        expect(
            "vision_config.hidden_act",
            &vision.hidden_act,
            vision.hidden_act == "gelu",
            "CogVLM's ViT uses \"gelu\"",
        )?;
        expect(
            "tie_word_embeddings",
            self.tie_word_embeddings,
            !self.tie_word_embeddings,
            "CogVLM has an lm_head of its own",
        )?;
        for (key, eps) in [("rms_norm_eps", self.rms_norm_eps), ("vision_config.layer_norm_eps", vision.layer_norm_eps)]
        {
            // As it is used, in single precision: 1e-300 would be no epsilon at all.
            expect(key, eps, eps as f32 > 0.0 && eps < 1.0, "an epsilon lies between 1e-45 and 1")?;
        }
        for (key, id) in [
            ("bos_token_id", self.bos_token_id),
            ("eos_token_id", self.eos_token_id),
            ("pad_token_id", self.pad_token_id),
        ] {
            // CogVLM2's placeholder ids lie just above what `vocab_size` of some of its files says.
            expect(key, id, (id as usize) < self.vocab_size, &format!("vocab_size is {}", self.vocab_size))?;
        }
        Ok(ModelSpec {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_layers: self.num_hidden_layers,
            num_heads: self.num_attention_heads,
            num_kv_heads,
            head_dim,
            vocab_size: self.vocab_size,
            rms_norm_eps: self.rms_norm_eps as f32,
            max_position_embeddings: self.max_position_embeddings,
            bos_token_id: self.bos_token_id,
            eos_token_id: self.eos_token_id,
            pad_token_id: self.pad_token_id,
            template: self.template_version,
            grouped_kv: self.num_multi_query_heads.is_some(),
            vision: VisionSpec {
                hidden_size: vision.hidden_size,
                intermediate_size: vision.intermediate_size,
                num_layers: vision.num_hidden_layers,
                num_heads: vision.num_heads,
                head_dim: vision.hidden_size / vision.num_heads,
                image_size: vision.image_size,
                patch_size: vision.patch_size,
                num_channels: vision.in_channels,
                layer_norm_eps: vision.layer_norm_eps as f32,
            },
        })
    }
}

fn expect(key: &'static str, found: impl ToString, holds: bool, expected: &str) -> Result<(), ConfigError> {
    if holds {
        Ok(())
    } else {
        Err(ConfigError::Value { key, found: found.to_string(), expected: expected.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_configurations_resolve() {
        for name in built_in_names() {
            ModelConfig::built_in(name).unwrap().resolve().unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }

    #[test]
    fn impossible_values_name_their_key() {
        let change = |pointer: &str, value: serde_json::Value| {
            let mut json: serde_json::Value = serde_json::from_str(built_in_json("tiny").unwrap()).unwrap();
            *json.pointer_mut(pointer).unwrap() = value;
            ModelConfig::from_json(&json.to_string()).and_then(|config| config.resolve()).unwrap_err().to_string()
        };
        assert_eq!(
            change("/num_attention_heads", 3.into()),
            "`num_attention_heads` is 3, but hidden_size 128 must divide into heads of an even size"
        );
        assert_eq!(
            change("/vision_config/num_positions", 18.into()),
            "`vision_config.num_positions` is 18, but image_size and patch_size imply 17"
        );
        assert_eq!(
            change("/vision_config/hidden_act", "relu".into()),
            "`vision_config.hidden_act` is relu, but CogVLM's ViT uses \"gelu\""
        );
        assert!(change("/hidden_size", "wide".into()).contains("invalid type"));
        assert!(change("/num_hidden_layers", 0.into()).contains("between 1 and"));
        // 2^24 layers would be a list of gigabytes wherever someone asks for the units.
        assert_eq!(
            change("/vision_config/num_hidden_layers", (1 << 24).into()),
            "`vision_config.num_hidden_layers` is 16777216, but it must lie between 1 and 256"
        );
        assert!(change("/vision_config/image_size", 14350.into()).contains("1025 patches a side"));
        assert!(change("/rms_norm_eps", 1e-300.into()).contains("an epsilon lies between"));
    }
}
