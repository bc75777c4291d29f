//! The step loop: schedule, run, choose.

use std::time::{Duration, Instant};

use cogvlm_backend::{Backend, MemoryUse};
use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{Device, ModelSpec};
use cogvlm_model::Captured;
use tracing::debug;

use crate::blocks::BlockPool;
use crate::ranks::{RankError, Ranks, StepResult};
use crate::request::{CachedPrefix, FinishReason, Request, RequestError, RequestId};
use crate::scheduler::{Sequence, admit, step_of};

/// Answers requests on the ranks of a plan.
pub struct Engine<B: Backend> {
    spec: ModelSpec,
    limits: StepLimits,
    pool: BlockPool,
    ranks: Ranks<B>,
    waiting: Vec<Sequence>,
    running: Vec<Sequence>,
    next_id: u64,
}

/// Why the engine cannot go on with a request, or at all.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The request is refused; the engine is as before.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The KV cache has no room for the next request, and nothing is running that would free some.
    #[error(
        "the KV cache has {num_free} of {num_blocks} blocks free, too few for the next request; kept conversations hold the rest"
    )]
    NoBlocks {
        /// Blocks that nobody holds.
        num_free: usize,
        /// Blocks in all.
        num_blocks: usize,
    },
    /// A rank failed; the requests of the step are gone, their blocks free.
    #[error(transparent)]
    Rank(#[from] RankError),
}

/// What became of a request in a step.
#[derive(Debug)]
pub enum Event {
    /// A token was chosen.
    Token {
        /// Of this request.
        request: RequestId,
        /// The token, as the model chose it.
        id: u32,
        /// What it was chosen from, where the request wants that.
        logits: Option<Vec<f32>>,
    },
    /// The request is finished.
    Finished {
        /// The request.
        request: RequestId,
        /// Why.
        reason: FinishReason,
        /// Its KV cache, where it was to be kept.
        prefix: Option<CachedPrefix>,
    },
}

/// What kind of step it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepKind {
    /// Prompts were computed.
    Prefill,
    /// One token of every running sequence was computed.
    Decode,
}

/// One turn of the engine.
#[derive(Debug)]
pub struct StepReport {
    /// Its kind.
    pub kind: StepKind,
    /// Rows computed.
    pub num_rows: usize,
    /// Time from scheduling to tokens.
    pub elapsed: Duration,
    /// Of it, time in the vision tower and the adapter.
    pub vision_time: Duration,
    /// What became of the requests.
    pub events: Vec<Event>,
    /// Hidden states, where a request wants them.
    pub captured: Vec<Captured>,
}

impl<B: Backend> Engine<B> {
    /// An engine on `ranks`, which were made for `limits`.
    pub fn new(spec: ModelSpec, limits: StepLimits, ranks: Ranks<B>) -> Self {
        let pool = BlockPool::new(limits.num_kv_blocks());
        Self { spec, limits, pool, ranks, waiting: Vec::new(), running: Vec::new(), next_id: 0 }
    }

    /// The model that answers.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Blocks of the KV cache, for those who watch it.
    pub fn block_pool(&self) -> &BlockPool {
        &self.pool
    }

    /// What each device holds, in rank order.
    pub fn memory(&self) -> Vec<(Device, MemoryUse)> {
        self.ranks.memory()
    }

    /// Queues a request.
    ///
    /// # Errors
    /// Where it can never be answered: the prompt is too long, or not one of this model.
    pub fn submit(&mut self, request: Request) -> Result<RequestId, RequestError> {
        request.validate(&self.spec, self.limits.context_len)?;
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.waiting.push(Sequence::new(id, request, &self.pool));
        Ok(id)
    }

    /// Ends a request as if it had stopped by itself. Gives its KV cache where it was to be kept.
    pub fn stop(&mut self, id: RequestId) -> Option<CachedPrefix> {
        self.waiting.retain(|sequence| sequence.id != id);
        let index = self.running.iter().position(|sequence| sequence.id == id)?;
        let sequence = self.running.remove(index);
        // The token that was chosen last waits to be fed: nothing of it is cached.
        let num_cached = sequence.num_cached;
        sequence.request.keep_cache.then(|| sequence.into_prefix(num_cached))
    }

    /// Whether nothing is left to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// One turn: prompts that fit are prefilled, else every running sequence gets a token. `None` when idle.
    ///
    /// # Errors
    /// Where a rank fails. The sequences of the step are dropped; others can go on.
    pub fn step(&mut self) -> Result<Option<StepReport>, EngineError> {
        let start = Instant::now();
        let admitted = admit(&mut self.waiting, self.running.len(), &self.limits);
        let (kind, sequences) = if admitted.is_empty() {
            (StepKind::Decode, std::mem::take(&mut self.running))
        } else {
            (StepKind::Prefill, admitted)
        };
        if sequences.is_empty() {
            if self.waiting.is_empty() {
                return Ok(None);
            }
            let (num_free, num_blocks) = (self.pool.num_free(), self.pool.num_blocks());
            self.waiting.remove(0);
            return Err(EngineError::NoBlocks { num_free, num_blocks });
        }
        let step = step_of(&sequences, &self.spec);
        let num_rows = step.batch.num_rows();
        let StepResult { tokens, logits, captured, vision_time } = self.ranks.run(step)?;
        let mut logits = logits.into_iter();
        let mut events = Vec::new();
        for (sequence, id) in sequences.into_iter().zip(tokens) {
            let logits = logits.next().filter(|_| sequence.request.want_logits);
            events.push(Event::Token { request: sequence.id, id, logits });
            self.advance(sequence, id, &mut events);
        }
        let elapsed = start.elapsed();
        debug!(?kind, num_rows, elapsed_us = elapsed.as_micros() as u64, "step");
        Ok(Some(StepReport { kind, num_rows, elapsed, vision_time, events, captured }))
    }

    /// Decides whether a sequence goes on after choosing `id`.
    fn advance(&mut self, mut sequence: Sequence, id: u32, events: &mut Vec<Event>) {
        let request = &sequence.request;
        let fed = request.forced.as_ref().map_or(Some(id), |forced| forced.get(sequence.num_chosen).copied());
        sequence.num_chosen += 1;
        let at_end = match &request.forced {
            Some(forced) => sequence.num_chosen >= forced.len(),
            None => sequence.num_chosen >= request.max_new_tokens,
        };
        let stopped = request.forced.is_none() && !request.ignore_eos && id == self.spec.eos_token_id;
        let full = sequence.tokens.input_ids.len() >= self.limits.context_len;
        let reason = if stopped {
            Some(FinishReason::Stop)
        } else if at_end || full {
            Some(FinishReason::Length)
        } else {
            None
        };
        match (reason, fed) {
            (None, Some(fed)) => {
                sequence.push(fed);
                self.running.push(sequence);
            }
            (reason, _) => {
                let request = sequence.id;
                // The token that was chosen last is not among them.
                let num_cached = sequence.tokens.input_ids.len();
                let prefix = sequence.request.keep_cache.then(|| sequence.into_prefix(num_cached));
                events.push(Event::Finished { request, reason: reason.unwrap_or(FinishReason::Length), prefix });
            }
        }
    }
}
