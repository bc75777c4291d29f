//! One turn of the engine, as every stage sees it.

use std::sync::Arc;

use cogvlm_backend::{Backend, Batch, SamplingParams};
use cogvlm_core::Expert;
use serde::{Deserialize, Serialize};

/// What kind of step it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum StepKind {
    /// Prompts are computed.
    #[default]
    Prefill,
    /// One token of running sequences is computed: of all, or of a group of them.
    Decode,
}

/// What one step computes. Shared by all stages.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Step {
    /// Its kind. Decode steps may run between the units of a prompt, and never the other way round.
    pub kind: StepKind,
    /// Of a prompt: other sequences are running, whose decode steps are to pass it. Ranks have memory for that where
    /// [`StepLimits::decodes_pass_prompts`](cogvlm_core::workspace::StepLimits::decodes_pass_prompts).
    pub is_passed: bool,
    /// Its rows and sequences.
    pub batch: Batch,
    /// Images whose vision tokens are among the rows.
    pub images: Vec<StepImage>,
    /// How to choose the next token from each row of logits, in the order of `batch.logit_rows`.
    pub samples: Vec<SampleSpec>,
    /// The input ids are not known yet: they are the tokens that the step before chose, one for each row in its order, on
    /// the rank that both chooses and embeds. The ids in `batch` mean nothing then.
    pub continues: bool,
    /// Bring the logits back to the host as well.
    pub want_logits: bool,
    /// Bring the hidden states after every unit back to the host: for tests, and for finding where two runs part.
    pub capture: bool,
}

/// An image of a step.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StepImage {
    /// Normalised pixels, `[channels, image_size, image_size]`. To other processes they travel apart.
    #[serde(skip, default = "no_pixels")]
    pub pixels: Arc<[f32]>,
    /// Row of its first vision token, BOI.
    pub first_row: usize,
}

fn no_pixels() -> Arc<[f32]> {
    Arc::new([])
}

/// How the token after one row is chosen.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SampleSpec {
    /// How.
    pub params: SamplingParams,
    /// Every id of prompt and output so far; empty where no repetition penalty needs them.
    pub seen: Vec<u32>,
    /// Index of the new token in its answer.
    pub index: u64,
}

/// Hidden states after a unit, for tests.
#[derive(Debug, Serialize, Deserialize)]
pub struct Captured {
    /// Name of the tap: `vit.embed`, `vit.layer.M`, `vision.out`, `llm.embed`, `llm.layer.N`, `llm.norm`.
    pub name: String,
    /// Rows and columns.
    pub shape: [usize; 2],
    /// The values, row-major.
    pub values: Vec<f32>,
}

/// What crosses from a stage to the next.
pub enum Crossing<P> {
    /// ViT hidden states of all images: `[images * vit_tokens, vit_hidden]`.
    VitHidden(P),
    /// Vision tokens of all images as the decoder sees them: `[images * vision_tokens, hidden_size]`.
    VisionFeatures(P),
    /// Decoder hidden states: `[rows, hidden_size]`.
    Hidden(P),
}

/// What a stage gives when it is done.
pub struct StageOutput<B: Backend> {
    /// For the next stage; `None` after the head.
    pub crossing: Option<Crossing<B::Parcel>>,
    /// After the head: the chosen tokens, in the order of `batch.logit_rows`, as the device has them.
    pub sampled: Option<B::Sampled>,
    /// After the head, where the step wants them: logits of each of these rows.
    pub logits: Vec<Vec<f32>>,
    /// Hidden states, where the step wants them.
    pub captured: Vec<Captured>,
    /// When the first vision unit began and when the last one ended, where there were any. Asking for the time between
    /// them waits for the second.
    pub vision: Option<[B::Moment; 2]>,
}

impl Step {
    /// Whether any row is processed by `expert`.
    pub fn uses(&self, expert: Expert) -> bool {
        self.batch.expert_ranges.iter().any(|range| range.expert == expert)
    }

    /// Whether some sequence has more than one row: its prompt is computed.
    pub fn is_prefill(&self) -> bool {
        self.batch.sequences.iter().any(|sequence| sequence.rows.len() > 1)
    }

    /// Whether it computes the next token of every sequence and nothing else: then steps of as many rows differ in
    /// nothing but what tables say.
    pub(crate) fn is_plain_decode(&self) -> bool {
        let Batch { sequences, logit_rows, expert_ranges, .. } = &self.batch;
        self.kind == StepKind::Decode
            && self.images.is_empty()
            && !self.capture
            && sequences.iter().all(|sequence| sequence.rows.len() == 1)
            && logit_rows.len() == self.batch.num_rows()
            && matches!(&expert_ranges[..], [range] if range.expert == Expert::Language)
    }
}

#[cfg(test)]
mod tests {
    use cogvlm_backend::SequenceRows;
    use cogvlm_core::tokens::ExpertRange;

    use super::*;

    /// A step of `rows` rows for each of two sequences, all of them `expert`'s.
    fn step(rows: usize, expert: Expert) -> Step {
        let sequence = |first: usize| SequenceRows { rows: first..first + rows, context_len: 9, blocks: vec![0] };
        let batch = Batch {
            input_ids: vec![1; 2 * rows],
            position_ids: vec![8; 2 * rows],
            expert_ranges: vec![ExpertRange { rows: 0..2 * rows, expert }],
            sequences: vec![sequence(0), sequence(rows)],
            logit_rows: vec![rows - 1, 2 * rows - 1],
        };
        Step { kind: StepKind::Decode, batch, ..Step::default() }
    }

    #[test]
    fn a_plain_decode_is_one_language_row_of_every_sequence() {
        assert!(step(1, Expert::Language).is_plain_decode());
        assert!(!step(2, Expert::Language).is_plain_decode());
        assert!(!step(1, Expert::Vision).is_plain_decode());
        assert!(!Step { capture: true, ..step(1, Expert::Language) }.is_plain_decode());
        assert!(!Step { kind: StepKind::Prefill, ..step(1, Expert::Language) }.is_plain_decode());
        let image = StepImage { pixels: [].into(), first_row: 1 };
        assert!(!Step { images: vec![image], ..step(1, Expert::Language) }.is_plain_decode());
        let mut mixed = step(1, Expert::Language);
        mixed.batch.expert_ranges[0].rows.end = 1;
        mixed.batch.expert_ranges.push(ExpertRange { rows: 1..2, expert: Expert::Vision });
        assert!(!mixed.is_plain_decode());
        let mut silent = step(1, Expert::Language);
        silent.batch.logit_rows.pop();
        assert!(!silent.is_plain_decode());
        assert!(!Step::default().is_plain_decode(), "nothing to compute");
        assert!(step(2, Expert::Language).is_prefill() && !step(1, Expert::Language).is_prefill());
    }
}
