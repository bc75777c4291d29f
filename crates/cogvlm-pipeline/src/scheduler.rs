//! Which sequences the next step computes.

use cogvlm_core::TokenType;
use cogvlm_core::spec::ModelSpec;
use cogvlm_core::tokens::{TokenLayout, expert_ranges, route_experts};
use cogvlm_core::workspace::StepLimits;

use cogvlm_backend::SequenceRows;
use cogvlm_model::{SampleSpec, Step, StepImage};

use crate::blocks::{BlockLease, BlockPool};
use crate::request::{CachedPrefix, Request, RequestId};

/// A sequence that is being answered.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: RequestId,
    pub(crate) request: Request,
    /// Prompt and everything fed after it.
    pub(crate) tokens: TokenLayout,
    /// First tokens whose keys and values are cached.
    pub(crate) num_cached: usize,
    /// Tokens chosen so far.
    pub(crate) num_chosen: usize,
    pub(crate) blocks: BlockLease,
}

impl Sequence {
    pub(crate) fn new(id: RequestId, mut request: Request, pool: &BlockPool) -> Self {
        let tokens = request.layout.clone();
        let (num_cached, blocks) = match request.prefix.take() {
            Some(prefix) => (prefix.covers(&tokens, request.image.as_ref()), prefix.blocks),
            None => (0, pool.empty_lease()),
        };
        Self { id, request, tokens, num_cached, num_chosen: 0, blocks }
    }

    /// Rows that the next step computes of it.
    pub(crate) fn num_rows(&self) -> usize {
        self.tokens.input_ids.len() - self.num_cached
    }

    /// Whether the next step computes its image.
    fn needs_image(&self) -> bool {
        self.tokens.token_types[self.num_cached..].contains(&TokenType::Vision)
    }

    /// Tokens that it may grow to.
    pub(crate) fn max_tokens(&self, context_len: usize) -> usize {
        (self.request.layout.input_ids.len() + self.request.max_new_tokens).min(context_len)
    }

    /// Feeds a token: the next step computes it.
    pub(crate) fn push(&mut self, id: u32) {
        self.num_cached = self.tokens.input_ids.len();
        let position = self.tokens.position_ids.last().map_or(0, |position| position + 1);
        self.tokens.input_ids.push(id);
        self.tokens.token_types.push(TokenType::Language);
        self.tokens.position_ids.push(position);
    }

    /// The cache of a finished sequence, of whose tokens the first `num_cached` were computed.
    pub(crate) fn into_prefix(self, num_cached: usize) -> CachedPrefix {
        let TokenLayout { mut input_ids, mut token_types, .. } = self.tokens;
        input_ids.truncate(num_cached);
        token_types.truncate(num_cached);
        CachedPrefix { input_ids, token_types, image: self.request.image, blocks: self.blocks }
    }
}

/// Sequences of `waiting` that are prefilled together next: in order, as many as fit one step beside `num_running`
/// others. Each gets the blocks it may ever need.
pub(crate) fn admit(waiting: &mut Vec<Sequence>, num_running: usize, limits: &StepLimits) -> Vec<Sequence> {
    let (mut rows, mut images) = (0, 0);
    let mut admitted = Vec::new();
    while let Some(next) = waiting.first_mut() {
        rows += next.num_rows();
        images += usize::from(next.needs_image());
        let too_many = num_running + admitted.len() >= limits.max_sequences;
        let too_large = rows > limits.max_tokens || images > limits.max_images;
        let wanted = next.max_tokens(limits.context_len);
        if too_many || too_large || !next.blocks.grow_to(wanted) {
            break;
        }
        admitted.push(waiting.remove(0));
    }
    admitted
}

/// The step that computes the rows of `sequences` that are not cached yet, and chooses a token for each.
pub(crate) fn step_of(sequences: &[Sequence], spec: &ModelSpec) -> Step {
    let mut step = Step::default();
    let mut experts = Vec::new();
    for sequence in sequences {
        let first_row = experts.len();
        let TokenLayout { input_ids, token_types, position_ids } = &sequence.tokens;
        let range = sequence.num_cached..input_ids.len();
        step.batch.input_ids.extend_from_slice(&input_ids[range.clone()]);
        step.batch.position_ids.extend_from_slice(&position_ids[range.clone()]);
        experts.extend_from_slice(&route_experts(token_types)[range.clone()]);
        step.batch.sequences.push(SequenceRows {
            rows: first_row..experts.len(),
            context_len: input_ids.len(),
            blocks: sequence.blocks.blocks().to_vec(),
        });
        step.batch.logit_rows.push(experts.len() - 1);
        if let (Some(image), true) = (&sequence.request.image, sequence.needs_image()) {
            // BOS stands before the image, and an image is cached whole or not at all.
            step.images.push(StepImage { pixels: image.pixels.clone(), first_row: first_row + 1 });
        }
        let params = sequence.request.params.clone();
        let seen = if params.repetition_penalty == 1.0 { Vec::new() } else { input_ids.clone() };
        step.samples.push(SampleSpec { params, seen, index: sequence.num_chosen as u64 });
        step.want_logits |= sequence.request.want_logits;
        step.capture |= sequence.request.capture && sequence.num_chosen == 0;
    }
    step.batch.expert_ranges = expert_ranges(&experts);
    debug_assert!(step.images.len() * spec.num_vision_tokens() <= step.batch.num_rows(), "vision tokens are rows");
    step
}
