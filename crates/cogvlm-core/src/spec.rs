//! The model's sizes, resolved and checked: what every crate after the configuration file works with.

use crate::prompt::Template;

/// Epsilon of the adapter's LayerNorm; a constant of the published code, not in `config.json`.
pub const ADAPTER_NORM_EPS: f32 = 1e-5;
/// Base of the rotary position embedding; a constant of the published code, not in `config.json`.
pub const ROPE_BASE: f64 = 10_000.0;

/// Sizes of a CogVLM model. Made by [`crate::ModelConfig::resolve`], which checks every relation between them.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Width inside an expert's MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the embedding and of `lm_head`.
    pub vocab_size: usize,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f32,
    /// Most tokens of a sequence that the model was trained for.
    pub max_position_embeddings: usize,
    /// First token of every sequence.
    pub bos_token_id: u32,
    /// Token that ends an answer.
    pub eos_token_id: u32,
    /// Id under the vision tokens; never read.
    pub pad_token_id: u32,
    /// Template used where a request names none.
    pub template: Template,
    /// CogVLM2's decoder: grouped key/value heads, a bias on the vision QKV, a convolution after the ViT.
    /// Such a model can be planned, not run.
    pub grouped_kv: bool,
    /// The vision tower.
    pub vision: VisionSpec,
}

/// Sizes of the vision tower.
#[derive(Debug, Clone, PartialEq)]
pub struct VisionSpec {
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// ViT layers.
    pub num_layers: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Side of the square input in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Colour channels.
    pub num_channels: usize,
    /// Epsilon of the LayerNorms.
    pub layer_norm_eps: f32,
}

impl ModelSpec {
    /// Rows of a QKV weight: queries, keys and values of all heads.
    pub fn qkv_size(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }

    /// Vision tokens of one image: its patches, BOI and EOI. (CogVLM2's 2 x 2 convolution quarters the patches.)
    pub fn num_vision_tokens(&self) -> usize {
        let patches = if self.grouped_kv { self.vision.num_patches() / 4 } else { self.vision.num_patches() };
        patches + 2
    }

    /// Elements that one token adds to the KV cache of one decoder layer: its key and its value.
    pub fn kv_elements_per_token(&self) -> usize {
        2 * self.num_kv_heads * self.head_dim
    }
}

impl VisionSpec {
    /// Patches of an image.
    pub fn num_patches(&self) -> usize {
        (self.image_size / self.patch_size).pow(2)
    }

    /// Tokens inside the ViT: the patches and the class token.
    pub fn num_tokens(&self) -> usize {
        self.num_patches() + 1
    }

    /// Numbers in one patch.
    pub fn patch_elements(&self) -> usize {
        self.num_channels * self.patch_size * self.patch_size
    }
}
