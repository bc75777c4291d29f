//! What a rank needs beside its weights: workspace buffers and KV cache. The planner counts these bytes and the
//! executor allocates them, both from here, so that a plan is what a run uses.

use crate::dtype::DType;
use crate::inventory::Unit;
use crate::spec::ModelSpec;

/// Tokens in one block of the paged KV cache.
pub const BLOCK_LEN: usize = 16;

/// The largest step that buffers are made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepLimits {
    /// Rows of a step: the tokens of all its sequences together.
    pub max_tokens: usize,
    /// Sequences in one step, and sequences whose KV cache fits.
    pub max_sequences: usize,
    /// Images in one step.
    pub max_images: usize,
    /// Tokens of the longest sequence.
    pub context_len: usize,
    /// Whole steps of rows that a rank may have under way to other ranks: 0 where one rank runs alone.
    pub parcels: usize,
}

/// [`StepLimits::parcels`] of a rank that is not alone: the next step is computed while the last one is fetched.
pub const PARCELS: usize = 2;

impl StepLimits {
    /// Limits for `batch_size` sequences of `context_len` tokens: a step holds one whole prompt, or one token of
    /// every sequence, and one image.
    pub fn new(context_len: usize, batch_size: usize) -> Self {
        Self {
            max_tokens: context_len.max(batch_size),
            max_sequences: batch_size,
            max_images: 1,
            context_len,
            parcels: 0,
        }
    }

    /// The same among `num_ranks` ranks.
    #[must_use]
    pub fn among(self, num_ranks: usize) -> Self {
        Self { parcels: if num_ranks > 1 { PARCELS } else { 0 }, ..self }
    }

    /// Whether decode steps may run between the units of a prompt: then they have memory of their own for what they leave
    /// behind from unit to unit.
    pub fn decodes_pass_prompts(&self) -> bool {
        self.max_sequences > 1
    }

    /// Limits of decode steps alone: a row of every sequence, and no image.
    #[must_use]
    pub fn of_decodes(self) -> Self {
        Self { max_tokens: self.max_sequences, max_images: 0, ..self }
    }

    /// KV blocks that hold `max_sequences` sequences of `context_len` tokens.
    pub fn num_kv_blocks(&self) -> usize {
        self.max_sequences * self.context_len.div_ceil(BLOCK_LEN)
    }
}

/// One workspace buffer of a rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BufferKind {
    /// Decoder hidden states, the residual: `[max_tokens, hidden_size]`.
    Hidden,
    /// The same of decode steps, where these may run between the units of a prompt: `[max_sequences, hidden_size]`. They
    /// share all other buffers with the prompt, which leaves nothing in them from unit to unit.
    DecodeHidden,
    /// Input of a projection, and output of the attention: `[max_tokens, hidden_size]`.
    Normed,
    /// Rotated queries: `[max_tokens, num_heads * head_dim]`.
    Query,
    /// `silu(gate) * up`: `[max_tokens, intermediate_size]`.
    MlpInner,
    /// Cosines and sines of every position: f32 `[context_len, head_dim]`.
    RopeTable,
    /// Input image: `[max_images, channels, image_size, image_size]`.
    Pixels,
    /// ViT hidden states: `[max_images * vit_tokens, vit_hidden]`.
    VitHidden,
    /// ViT queries, keys and values: `[max_images * vit_tokens, 3 * vit_hidden]`.
    VitQkv,
    /// Attention output of the ViT: `[max_images * vit_tokens, vit_hidden]`.
    VitAttention,
    /// Branch output before its norm: `[max_images * vit_tokens, vit_hidden]`.
    VitBranch,
    /// `gelu(fc1)`: `[max_images * vit_tokens, vit_intermediate]`.
    VitInner,
    /// Adapter activations: `[max_images * patches, hidden_size]`.
    AdapterHidden,
    /// `silu(gate) * up` of the adapter: `[max_images * patches, intermediate_size]`.
    AdapterInner,
    /// What the decoder sees of the images: `[max_images * vision_tokens, hidden_size]`.
    VisionFeatures,
    /// Normalised last rows: `[max_sequences, hidden_size]`.
    HeadInput,
    /// Logits: f32 `[max_sequences, vocab_size]`.
    Logits,
}

impl BufferKind {
    /// Shape of the buffer.
    pub fn shape(self, spec: &ModelSpec, limits: &StepLimits) -> [usize; 2] {
        let vision = &spec.vision;
        let (tokens, images) = (limits.max_tokens, limits.max_images);
        let (vit_rows, patches) = (images * vision.num_tokens(), images * vision.num_patches());
        match self {
            Self::Hidden | Self::Normed => [tokens, spec.hidden_size],
            Self::Query => [tokens, spec.num_heads * spec.head_dim],
            Self::MlpInner => [tokens, spec.intermediate_size],
            Self::RopeTable => [limits.context_len, spec.head_dim],
            Self::Pixels => [images, vision.num_channels * vision.image_size * vision.image_size],
            Self::VitHidden | Self::VitAttention | Self::VitBranch => [vit_rows, vision.hidden_size],
            Self::VitQkv => [vit_rows, 3 * vision.hidden_size],
            Self::VitInner => [vit_rows, vision.intermediate_size],
            Self::AdapterHidden => [patches, spec.hidden_size],
            Self::AdapterInner => [patches, spec.intermediate_size],
            Self::VisionFeatures => [images * spec.num_vision_tokens(), spec.hidden_size],
            Self::HeadInput | Self::DecodeHidden => [limits.max_sequences, spec.hidden_size],
            Self::Logits => [limits.max_sequences, spec.vocab_size],
        }
    }

    /// Element type of the buffer where activations are `activations`.
    pub fn dtype(self, activations: DType) -> DType {
        if matches!(self, Self::Logits | Self::RopeTable) { DType::F32 } else { activations }
    }

    /// Bytes of the buffer.
    pub fn bytes(self, spec: &ModelSpec, limits: &StepLimits, activations: DType) -> u64 {
        let [rows, columns] = self.shape(spec, limits);
        rows as u64 * columns as u64 * self.dtype(activations).size_bytes() as u64
    }
}

/// The buffers that a rank executing `units` needs for steps of up to `limits`, each once, in a fixed order.
pub fn workspace_buffers(units: &[Unit], limits: &StepLimits) -> Vec<BufferKind> {
    use BufferKind::{
        AdapterHidden, AdapterInner, DecodeHidden, HeadInput, Hidden, Logits, MlpInner, Normed, Pixels, Query,
        RopeTable, VisionFeatures, VitAttention, VitBranch, VitHidden, VitInner, VitQkv,
    };
    let needed = |unit: &Unit| -> &'static [BufferKind] {
        match unit {
            Unit::PatchEmbedding => &[Pixels, VitHidden],
            Unit::VitLayer(_) => &[VitHidden, VitQkv, VitAttention, VitBranch, VitInner],
            Unit::Adapter => &[VitHidden, VitBranch, AdapterHidden, AdapterInner, VisionFeatures],
            Unit::Embedding => &[VisionFeatures, Hidden],
            Unit::DecoderLayer(_) => &[Hidden, Normed, Query, MlpInner, RopeTable],
            Unit::Head => &[Hidden, HeadInput, Logits],
        }
    };
    let mut kinds: Vec<BufferKind> = Vec::new();
    for kind in units.iter().flat_map(needed) {
        if !kinds.contains(kind) {
            kinds.push(*kind);
        }
    }
    if limits.decodes_pass_prompts() && kinds.contains(&Hidden) {
        kinds.push(DecodeHidden);
    }
    kinds
}

/// Bytes of all workspace buffers of a rank executing `units`, and of its outboxes.
pub fn workspace_bytes(spec: &ModelSpec, units: &[Unit], limits: &StepLimits, activations: DType) -> u64 {
    let kinds = workspace_buffers(units, limits);
    let buffers: u64 = kinds.iter().map(|kind| kind.bytes(spec, limits, activations)).sum();
    buffers + outbox_bytes(&kinds, spec, limits, activations) + decode_outbox_bytes(&kinds, spec, limits, activations)
}

/// Bytes for rows on their way to other ranks, of a rank with the buffers `kinds`: any of those that can cross.
pub fn outbox_bytes(kinds: &[BufferKind], spec: &ModelSpec, limits: &StepLimits, activations: DType) -> u64 {
    use BufferKind::{Hidden, VisionFeatures, VitHidden};
    let crossing = kinds.iter().filter(|kind| matches!(kind, VitHidden | VisionFeatures | Hidden));
    let largest = crossing.map(|kind| kind.bytes(spec, limits, activations)).max().unwrap_or(0);
    limits.parcels as u64 * largest.next_multiple_of(PARCEL_ALIGN)
}

/// The same for decode steps that may pass prompts: they never wait for room behind one.
pub fn decode_outbox_bytes(kinds: &[BufferKind], spec: &ModelSpec, limits: &StepLimits, activations: DType) -> u64 {
    let crosses = kinds.contains(&BufferKind::DecodeHidden);
    let rows = if crosses { BufferKind::DecodeHidden.bytes(spec, limits, activations) } else { 0 };
    limits.parcels as u64 * rows.next_multiple_of(PARCEL_ALIGN)
}

/// Parcels begin at multiples of this many bytes.
pub const PARCEL_ALIGN: u64 = 256;

/// Bytes of the paged KV cache of one decoder layer.
pub fn kv_bytes_per_layer(spec: &ModelSpec, limits: &StepLimits, activations: DType) -> u64 {
    let tokens = (limits.num_kv_blocks() * BLOCK_LEN) as u64;
    tokens * spec.kv_elements_per_token() as u64 * activations.size_bytes() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ModelConfig;

    #[test]
    fn kv_of_the_17b_model_takes_half_a_mebibyte_per_token() {
        let spec = ModelConfig::built_in("cogvlm-chat-17b").unwrap().resolve().unwrap();
        let limits = StepLimits::new(2048, 1);
        assert_eq!(32 * kv_bytes_per_layer(&spec, &limits, DType::Bf16), 2048 * 524_288);
    }

    #[test]
    fn buffers_are_listed_once() {
        let spec = ModelConfig::built_in("tiny").unwrap().resolve().unwrap();
        for (max_sequences, num_kinds) in [(1, 16), (2, 17)] {
            let kinds = workspace_buffers(&Unit::execution_order(&spec), &StepLimits::new(64, max_sequences));
            for (index, kind) in kinds.iter().enumerate() {
                assert!(!kinds[..index].contains(kind), "{kind:?} stands twice");
            }
            assert_eq!(kinds.len(), num_kinds);
        }
    }

    #[test]
    fn decode_steps_have_rows_of_their_own_where_they_may_pass_prompts() {
        let spec = ModelConfig::built_in("cogvlm-chat-17b").unwrap().resolve().unwrap();
        let layers: Vec<Unit> = (0..4).map(Unit::DecoderLayer).collect();
        let bytes = |limits: StepLimits| workspace_bytes(&spec, &layers, &limits, DType::Bf16);
        let row = 2 * spec.hidden_size as u64;
        for sequences in [2, 7] {
            let limits = StepLimits::new(2048, sequences);
            let alone = StepLimits { max_sequences: 1, ..limits };
            assert_eq!(bytes(limits), bytes(alone) + sequences as u64 * row);
            let (limits, alone) = (limits.among(2), alone.among(2));
            assert_eq!(bytes(limits), bytes(alone) + (1 + PARCELS) as u64 * sequences as u64 * row);
        }
        let vision = [Unit::PatchEmbedding, Unit::VitLayer(0)];
        let limits = StepLimits::new(2048, 2);
        assert!(!workspace_buffers(&vision, &limits).contains(&BufferKind::DecodeHidden), "no decode step comes here");
    }
}
