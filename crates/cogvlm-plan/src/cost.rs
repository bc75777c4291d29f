//! How long a unit takes: what it reads and computes, over the share of a device's measured rates that this program's
//! operations reach. Each share is a measurement (docs/benchmarks); `tests/predictions.rs` holds what they predict
//! against the times that were recorded.

use cogvlm_core::{DType, Device, ModelSpec, Phase, TensorSpec, Unit};

use crate::links::Links;
use crate::own::sizes::image_rows;

/// Of a card's copy, reached by products of few rows: a token of 1, 4 and 16 sequences took an H200 3.71, 4.16 and 6.01
/// ms.
const CARD_READ_SHARE: f64 = 0.95;
/// The same of attention over the KV cache, which writes nothing.
const CARD_CACHE_SHARE: f64 = 1.05;
/// The same where there are more rows, and tiles of many rows read the weights: 33 tokens of text take an H100 7.3 ms,
/// in which it reads 13.2 GB.
const CARD_TILE_READ_SHARE: f64 = 0.62;
/// Most rows that the products for few rows take.
const FEW_ROWS: f64 = 16.0;
/// Of a card's product of 8192 x 8192 x 8192, reached by the products of a prefill: 28.3 TFLOP in 55 ms on an H100 that
/// multiplies 785 TFLOP/s, attention and launches taken away.
const CARD_PRODUCT_SHARE: f64 = 0.70;
/// Of the same, reached by attention over many rows: 26 and 30 % on an H100.
const CARD_ATTENTION_SHARE: f64 = 0.27;
/// Seconds of a unit beyond its reads: seven kernels in turn, as a replayed graph launches them.
const CARD_UNIT_S: f64 = 6e-6;
/// Of what all cores of the host read, reached by decoding: 82 % on 16 cores, 81 % (bf16) and 70 % (f32) on two.
const HOST_READ_SHARE: f64 = 0.80;
/// Of the inner loop of a product, reached by attention over many rows; products themselves reach all of it. From
/// prefills with an image on two cores (f32, bf16) and on 16 (f32).
const HOST_ATTENTION_SHARE: f64 = 0.30;

/// A step of the engine, for which a time is predicted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum StepKind {
    /// One more token of so many sequences, each with so many tokens in its KV cache.
    Decode {
        /// Sequences.
        sequences: f64,
        /// Tokens of each.
        context_len: f64,
    },
    /// The prompt of one sequence.
    Prefill {
        /// Whether it has an image.
        has_image: bool,
        /// Tokens of text, BOS included.
        text_tokens: usize,
    },
}

impl StepKind {
    /// Rows of the text units.
    pub(crate) fn rows(self, spec: &ModelSpec) -> f64 {
        match self {
            Self::Decode { sequences, .. } => sequences,
            Self::Prefill { has_image, text_tokens } => (image_rows(spec, has_image) + text_tokens) as f64,
        }
    }

    /// Sequences, each of which has one row of logits.
    pub(crate) fn sequences(self) -> f64 {
        if let Self::Decode { sequences, .. } = self { sequences } else { 1.0 }
    }

    /// Whether it has an image.
    pub(crate) fn has_image(self) -> bool {
        matches!(self, Self::Prefill { has_image: true, .. })
    }

    /// Whether weights of this phase are read, all of them.
    pub(crate) fn reads(self, phase: Phase) -> bool {
        phase == Phase::EveryToken || phase == Phase::ImagePrefill && self.has_image()
    }
}

/// What a unit does in a step.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct UnitWork {
    /// Rows that its matrices multiply.
    pub(crate) rows: f64,
    /// Weights that it reads.
    pub(crate) weight_bytes: f64,
    /// KV cache that it reads.
    pub(crate) kv_bytes: f64,
    /// Operations of its matrices.
    pub(crate) product_flops: f64,
    /// Operations of attention over many rows.
    pub(crate) attention_flops: f64,
}

/// Operations of `unit`, which has `tensors`, in `step`: of its matrices, twice the elements of each for each row that it
/// multiplies, and of the two products of attention. Both experts of a layer are alike: a row counts once, with either.
pub(crate) fn unit_flops(spec: &ModelSpec, unit: Unit, tensors: &[&TensorSpec], step: StepKind) -> (f64, f64) {
    let vision = &spec.vision;
    let matrices = |keep: &dyn Fn(&TensorSpec) -> bool| -> f64 {
        let matrices = tensors.iter().filter(|tensor| tensor.shape.len() > 1 && keep(tensor));
        matrices.map(|tensor| 2.0 * tensor.num_elements() as f64).sum()
    };
    let (patches, vit_rows) = (vision.num_patches() as f64, vision.num_tokens() as f64);
    match unit {
        Unit::PatchEmbedding => (matrices(&|tensor| tensor.shape.len() == 4) * patches, 0.0),
        Unit::Adapter => (matrices(&|_| true) * patches, 0.0),
        Unit::VitLayer(_) => (matrices(&|_| true) * vit_rows, 4.0 * vit_rows * vit_rows * vision.hidden_size as f64),
        Unit::Embedding => (0.0, 0.0),
        Unit::DecoderLayer(_) => {
            let rows = step.rows(spec);
            // A decoded token's attention is bound by reading the KV cache.
            let pairs = if matches!(step, StepKind::Prefill { .. }) { rows * rows } else { 0.0 };
            let width = (spec.num_heads * spec.head_dim) as f64;
            (matrices(&|tensor| tensor.phase == Phase::EveryToken) * rows, 2.0 * pairs * width)
        }
        Unit::Head => (matrices(&|_| true) * step.sequences(), 0.0),
    }
}

/// Seconds that `device` takes for a unit whose weights are there.
pub(crate) fn unit_seconds(work: &UnitWork, device: Device, links: &Links, activations: DType) -> f64 {
    let UnitWork { rows, weight_bytes, kv_bytes, product_flops, attention_flops } = *work;
    match device {
        Device::Gpu(ordinal) if !links.is_host(device) => {
            let card = links.card(ordinal);
            let share = if rows <= FEW_ROWS { CARD_READ_SHARE } else { CARD_TILE_READ_SHARE };
            let reads = weight_bytes / (share * card.copy_bytes_per_s);
            let products = product_flops / (CARD_PRODUCT_SHARE * card.product_flops_per_s);
            let cache = kv_bytes / (CARD_CACHE_SHARE * card.copy_bytes_per_s);
            let attention = attention_flops / (CARD_ATTENTION_SHARE * card.product_flops_per_s);
            reads.max(products) + cache + attention + CARD_UNIT_S
        }
        _ => {
            let (reads, flops) = (read_bytes_per_s(links, device), links.host_flops_per_s(activations));
            let attention = attention_flops / (HOST_ATTENTION_SHARE * flops);
            (weight_bytes / reads).max(product_flops / flops) + kv_bytes / reads + attention
        }
    }
}

/// Bytes per second that decoding reads from the memory of `device`.
pub(crate) fn read_bytes_per_s(links: &Links, device: Device) -> f64 {
    match device {
        Device::Gpu(ordinal) if !links.is_host(device) => CARD_READ_SHARE * links.card(ordinal).copy_bytes_per_s,
        _ => HOST_READ_SHARE * links.host().read_bytes_per_s,
    }
}

/// Operations per second of the products of a prefill on card `ordinal`.
pub(crate) fn card_flops_per_s(links: &Links, ordinal: u32) -> f64 {
    CARD_PRODUCT_SHARE * links.card(ordinal).product_flops_per_s
}
