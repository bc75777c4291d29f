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
    /// Whether the last of `tokens` was fed before it was known: it stands for what is being chosen.
    pub(crate) is_last_unknown: bool,
    /// First tokens whose keys and values are cached, or will be by the steps under way before the last one.
    pub(crate) num_cached: usize,
    /// Tokens chosen so far.
    pub(crate) num_chosen: usize,
    pub(crate) blocks: BlockLease,
    /// Steps under way that compute it: two where one was begun before the token of the other was known.
    pub(crate) num_under_way: usize,
    /// When it was scheduled last, in steps.
    pub(crate) last_turn: u64,
}

impl Sequence {
    pub(crate) fn new(id: RequestId, mut request: Request, pool: &BlockPool) -> Self {
        let tokens = request.layout.clone();
        let (num_cached, blocks) = match request.prefix.take() {
            Some(prefix) => (prefix.covers(&tokens, request.image.as_ref()), prefix.blocks),
            None => (0, pool.empty_lease()),
        };
        let (is_last_unknown, num_chosen, num_under_way, last_turn) = (false, 0, 0, 0);
        Self { id, request, tokens, is_last_unknown, num_cached, num_chosen, blocks, num_under_way, last_turn }
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

    /// Tokens that are known.
    pub(crate) fn num_known(&self) -> usize {
        self.tokens.input_ids.len() - usize::from(self.is_last_unknown)
    }

    /// Feeds a token: the next step computes it.
    pub(crate) fn push(&mut self, id: u32) {
        self.num_cached = self.tokens.input_ids.len();
        let position = self.tokens.position_ids.last().map_or(0, |position| position + 1);
        self.tokens.input_ids.push(id);
        self.tokens.token_types.push(TokenType::Language);
        self.tokens.position_ids.push(position);
    }

    /// Feeds the token that the step under way chooses.
    pub(crate) fn push_unknown(&mut self) {
        self.push(0);
        self.is_last_unknown = true;
    }

    /// Says which token it was that was fed, or is to be fed.
    pub(crate) fn reveal(&mut self, id: u32) {
        match self.tokens.input_ids.last_mut().filter(|_| self.is_last_unknown) {
            Some(last) => *last = id,
            None => self.push(id),
        }
        self.is_last_unknown = false;
    }

    /// Whether the token that the step under way chooses can be fed before it is known: unless it ends the sequence by
    /// itself, the sequence goes on, and nothing but this token is chosen by it.
    pub(crate) fn can_go_on(&self, context_len: usize) -> bool {
        let Request { max_new_tokens, forced, want_logits, params, .. } = &self.request;
        let goes_on = self.num_chosen + 1 < *max_new_tokens && self.tokens.input_ids.len() < context_len;
        let is_free = forced.is_none() && !want_logits && params.repetition_penalty == 1.0;
        goes_on && is_free && self.num_under_way == 1 && !self.is_last_unknown
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
pub(crate) fn step_of(sequences: &[&Sequence], spec: &ModelSpec) -> Step {
    // All of them are continued, or none is.
    let continues = sequences.first().is_some_and(|sequence| sequence.is_last_unknown);
    let mut step = Step { continues, ..Step::default() };
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
        // The token before may still be on its way.
        let index = sequence.num_chosen as u64 + u64::from(continues);
        step.samples.push(SampleSpec { params, seen, index });
        step.want_logits |= sequence.request.want_logits;
        step.capture |= sequence.request.capture && sequence.num_chosen == 0;
    }
    step.batch.expert_ranges = expert_ranges(&experts);
    debug_assert!(step.images.len() * spec.num_vision_tokens() <= step.batch.num_rows(), "vision tokens are rows");
    step
}
