//! Predictions for work other than what was planned for: what `bench` holds measured times against.

use cogvlm_core::{Device, ModelSpec};

use crate::account::Placement;
use crate::cost::StepKind;
use crate::links::Links;
use crate::own::sizes::{Sizes, image_rows};
use crate::plan::Plan;
use crate::tensor::{group_s, together};

/// Predicted times of a plan under given rates.
pub struct Prediction {
    sizes: Sizes,
    placement: Placement,
    links: Links,
    /// Devices that compute every layer together; one where none do.
    members: Vec<Device>,
}

impl Plan {
    /// What the rates of `links` predict of this plan, which is one of the model of `spec`.
    pub fn prediction(&self, spec: &ModelSpec, links: &Links) -> Prediction {
        let sizes = Sizes::new(spec, self.weight_dtype, self.activation_dtype, self.limits);
        let (placement, members) = (Placement::of(self), self.tensor_parallel.clone());
        Prediction { sizes, placement, links: links.clone(), members }
    }
}

impl Prediction {
    /// Rates of the devices as they compute, and seconds of a step of `rows` rows beyond what these take.
    fn group(&self, has_image: bool, rows: usize) -> (Links, f64) {
        if self.members.is_empty() {
            return (self.links.clone(), 0.0);
        }
        let beyond_s = group_s(&self.placement, &self.sizes, &self.links, &self.members, has_image, rows);
        (together(&self.links, &self.members), beyond_s)
    }

    /// Seconds of a decode step of `sequences` sequences, each with `context_len` tokens in its KV cache, through all
    /// stages in turn: how long one of them waits for a token where nothing else is under way.
    pub fn decode_step_s(&self, sequences: usize, context_len: f64) -> f64 {
        let step = StepKind::Decode { sequences: sequences as f64, context_len };
        let (links, beyond_s) = self.group(false, sequences);
        self.placement.step(&self.sizes, &links, step).seconds + beyond_s
    }

    /// Seconds in which each of `sequences` sequences gets a token, all decoded at once. Where several ranks compute
    /// text, the sequences are decoded in as many groups, which take turns: a round of them takes as long as the slowest
    /// rank takes for one group, times the groups. Where one rank computes all text it is a decode step.
    pub fn decode_round_s(&self, sequences: usize, context_len: f64) -> f64 {
        let (links, beyond_s) = self.group(false, sequences);
        self.placement.round_s(&self.sizes, &links, sequences as f64, context_len) + beyond_s
    }

    /// Tokens per second of all `sequences` together.
    pub fn tokens_per_s(&self, sequences: usize, context_len: f64) -> f64 {
        sequences as f64 / self.decode_round_s(sequences, context_len)
    }

    /// Ranks that compute text.
    pub fn text_ranks(&self) -> Vec<Device> {
        self.placement.text_ranks(&self.sizes).into_iter().collect()
    }

    /// Seconds of the prefill of one prompt of `text_tokens` tokens, BOS included, beside those of an image where it
    /// has one.
    pub fn prefill_s(&self, has_image: bool, text_tokens: usize) -> f64 {
        let rows = image_rows(&self.sizes.spec, has_image) + text_tokens;
        let (links, beyond_s) = self.group(has_image, rows);
        self.placement.step(&self.sizes, &links, StepKind::Prefill { has_image, text_tokens }).seconds + beyond_s
    }
}
