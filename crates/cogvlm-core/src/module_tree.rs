//! The model as a tree of modules, with upstream's names, classes and order of registration: what accelerate's
//! planner sees.

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::spec::ModelSpec;

/// A module: its class, the tensors it owns itself, and its children, all in the order of registration.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Module {
    /// Bare name of the Python class.
    pub class: String,
    /// Own parameters.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub params: Vec<TreeTensor>,
    /// Own buffers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub buffers: Vec<TreeBuffer>,
    /// Children by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub children: Vec<(String, Module)>,
}

/// `[name, shape, dtype]` of a parameter; the dtype is PyTorch's name without `torch.`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeTensor(pub String, pub Vec<u64>, pub String);

/// `[name, shape, dtype, persistent]` of a buffer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeBuffer(pub String, pub Vec<u64>, pub String, pub bool);

impl Module {
    fn new(class: &str) -> Self {
        Self { class: class.to_owned(), ..Self::default() }
    }

    fn param(mut self, name: &str, shape: &[usize], dtype: DType) -> Self {
        self.params.push(TreeTensor(name.to_owned(), to_u64(shape), dtype.torch_name().to_owned()));
        self
    }

    fn child(mut self, name: &str, module: Module) -> Self {
        self.children.push((name.to_owned(), module));
        self
    }

    fn list(count: usize, item: &Module) -> Self {
        let children = (0..count).map(|index| (index.to_string(), item.clone())).collect();
        Self { children, ..Self::new("ModuleList") }
    }

    fn linear(shape: &[usize], bias: bool, dtype: DType) -> Self {
        Self::affine("Linear", shape, bias, dtype)
    }

    fn affine(class: &str, shape: &[usize], bias: bool, dtype: DType) -> Self {
        let module = Self::new(class).param("weight", shape, dtype);
        if bias { module.param("bias", &shape[..1], dtype) } else { module }
    }

    /// The published model's tree, every tensor of type `dtype`.
    pub fn of_model(spec: &ModelSpec, dtype: DType) -> Self {
        let (hidden, vocab) = (spec.hidden_size, spec.vocab_size);
        let table = Self::affine("Embedding", &[vocab, hidden], false, dtype);
        let norm = Self::affine("RMSNorm", &[hidden], false, dtype);
        let model = Self::new("CogVLMModel")
            .child("embed_tokens", table)
            .child("layers", Self::list(spec.num_layers, &decoder_layer(spec, dtype)))
            .child("norm", norm)
            .child("vision", vision_tower(spec, dtype));
        Self::new("CogVLMForCausalLM")
            .child("model", model)
            .child("lm_head", Self::linear(&[vocab, hidden], false, dtype))
    }
}

fn to_u64(shape: &[usize]) -> Vec<u64> {
    shape.iter().map(|&size| size as u64).collect()
}

fn decoder_layer(spec: &ModelSpec, dtype: DType) -> Module {
    let (hidden, inner, qkv) = (spec.hidden_size, spec.intermediate_size, spec.qkv_size());
    let inv_freq = TreeBuffer("inv_freq".into(), vec![spec.head_dim as u64 / 2], dtype.torch_name().into(), true);
    let rotary_class = if spec.grouped_kv { "FastRotaryEmbedding" } else { "RotaryEmbedding" };
    let rotary = Module { buffers: vec![inv_freq], ..Module::new(rotary_class) };
    let attention = Module::new("VisionExpertAttention")
        .child("rotary_emb", rotary)
        .child("vision_expert_query_key_value", Module::linear(&[qkv, hidden], spec.grouped_kv, dtype))
        .child("vision_expert_dense", Module::linear(&[hidden, hidden], false, dtype))
        .child("language_expert_query_key_value", Module::linear(&[qkv, hidden], false, dtype))
        .child("language_expert_dense", Module::linear(&[hidden, hidden], false, dtype));
    let expert_mlp = Module::new("MLP")
        .child("gate_proj", Module::linear(&[inner, hidden], false, dtype))
        .child("up_proj", Module::linear(&[inner, hidden], false, dtype))
        .child("down_proj", Module::linear(&[hidden, inner], false, dtype))
        .child("act_fn", Module::new("SiLUActivation"));
    let mlp = Module::new("VisionExpertMLP").child("language_mlp", expert_mlp.clone()).child("vision_mlp", expert_mlp);
    let norm = Module::affine("RMSNorm", &[hidden], false, dtype);
    Module::new("CogVLMDecoderLayer")
        .child("self_attn", attention)
        .child("mlp", mlp)
        .child("input_layernorm", norm.clone())
        .child("post_attention_layernorm", norm)
}

fn vision_tower(spec: &ModelSpec, dtype: DType) -> Module {
    let vision = &spec.vision;
    let (hidden, width, side) = (spec.hidden_size, vision.hidden_size, vision.patch_size);
    let patches = Module::new("PatchEmbedding")
        .param("cls_embedding", &[1, width], dtype)
        .child("proj", Module::affine("Conv2d", &[width, vision.num_channels, side, side], true, dtype))
        .child("position_embedding", Module::affine("Embedding", &[vision.num_tokens(), width], false, dtype));
    let norm = Module::affine("LayerNorm", &[width], true, dtype);
    let attention = Module::new("Attention")
        .child("query_key_value", Module::linear(&[3 * width, width], true, dtype))
        .child("dense", Module::linear(&[width, width], true, dtype))
        .child("output_dropout", Module::new("Dropout"));
    let mlp = Module::new("MLP")
        .child("activation_fn", Module::new("GELUActivation"))
        .child("fc1", Module::linear(&[vision.intermediate_size, width], true, dtype))
        .child("fc2", Module::linear(&[width, vision.intermediate_size], true, dtype));
    let layer = Module::new("TransformerLayer")
        .child("input_layernorm", norm.clone())
        .child("attention", attention)
        .child("mlp", mlp)
        .child("post_attention_layernorm", norm);
    let inner = spec.intermediate_size;
    let adapter = Module::new("GLU")
        .child("linear_proj", Module::linear(&[hidden, width], false, dtype))
        .child("norm1", Module::affine("LayerNorm", &[hidden], true, dtype))
        .child("act1", Module::new("GELU"))
        .child("dense_h_to_4h", Module::linear(&[inner, hidden], false, dtype))
        .child("gate_proj", Module::linear(&[inner, hidden], false, dtype))
        .child("dense_4h_to_h", Module::linear(&[hidden, inner], false, dtype));
    let tower = Module::new("EVA2CLIPModel")
        .param("boi", &[1, 1, hidden], dtype)
        .param("eoi", &[1, 1, hidden], dtype)
        .child("patch_embedding", patches)
        .child("transformer", Module::new("Transformer").child("layers", Module::list(vision.num_layers, &layer)))
        .child("linear_proj", adapter);
    if spec.grouped_kv {
        tower.child("conv", Module::affine("Conv2d", &[width, width, 2, 2], true, dtype))
    } else {
        tower
    }
}
