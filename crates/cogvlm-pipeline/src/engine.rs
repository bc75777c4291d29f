//! The step loop: schedule, run, choose.

use std::time::{Duration, Instant};

use cogvlm_backend::{Backend, MemoryUse};
use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{Device, ModelSpec};
use cogvlm_model::{Captured, StepKind};
use tracing::debug;

use crate::blocks::BlockPool;
use crate::ranks::{RankError, Ranks, StepId, StepResult};
use crate::request::{CachedPrefix, FinishReason, Request, RequestError, RequestId};
use crate::scheduler::{Sequence, admit, step_of};

/// Answers requests on the ranks of a plan.
///
/// Several steps are under way at a time. Where several ranks compute text, the running sequences are decoded in as many
/// groups, so that every rank has work. Where one does, the next step is begun before the tokens of the last one are
/// known to the host, so that the device never waits for it. Running sequences go on while prompts are computed: their
/// steps pass those of the prompts on every rank.
pub struct Engine<B: Backend> {
    spec: ModelSpec,
    limits: StepLimits,
    pool: BlockPool,
    ranks: Ranks<B>,
    waiting: Vec<Sequence>,
    /// Sequences whose prompts are computed or under way.
    running: Vec<Sequence>,
    /// In the order of submission.
    under_way: Vec<UnderWay>,
    next_id: u64,
    /// Steps begun so far.
    num_turns: u64,
    /// When a step ended last.
    last_end: Option<Instant>,
}

/// A step that was begun.
struct UnderWay {
    id: StepId,
    kind: StepKind,
    num_rows: usize,
    /// Whose tokens it chooses, in its order. Some may have ended meanwhile.
    requests: Vec<RequestId>,
    begun: Instant,
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

/// One turn of the engine.
#[derive(Debug)]
pub struct StepReport {
    /// Its kind.
    pub kind: StepKind,
    /// Rows computed.
    pub num_rows: usize,
    /// Time from its begin to its tokens, or from the end of the step before where that came later: the times of all
    /// steps add up to the time that they took together.
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
        Self {
            spec,
            limits,
            pool,
            ranks,
            waiting: Vec::new(),
            running: Vec::new(),
            under_way: Vec::new(),
            next_id: 0,
            num_turns: 0,
            last_end: None,
        }
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

    /// Gets ready for many prompts: what is streamed for them from host memory is registered with the drivers of this
    /// process's GPUs, so that the first of them is as fast as all that follow. That takes a while (1.1 to 1.5 s for 13 to
    /// 22 GB on an H100), which a single prompt does not pay back; otherwise it is done when nothing else is. To be called
    /// while nothing is under way.
    pub fn expect_many_prompts(&mut self) {
        self.ranks.expect_many_prompts();
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
        if sequence.num_under_way > 0 {
            self.ranks.fence();
        }
        // The token that was chosen last is not cached, or by a step that is under way: nobody counts on it. Blocks may
        // go to others even while such a step is: what it writes to them comes before what theirs do.
        let num_cached = sequence.num_cached;
        sequence.request.keep_cache.then(|| sequence.into_prefix(num_cached))
    }

    /// Whether nothing is left to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Begins what can be begun and waits for the step that ends first. `None` when idle. Prompts that fit are prefilled
    /// while the running sequences get their tokens.
    ///
    /// # Errors
    /// Where a rank fails. The sequences of the step are dropped; others can go on.
    pub fn step(&mut self) -> Result<Option<StepReport>, EngineError> {
        loop {
            self.begin()?;
            if self.under_way.is_empty() {
                if self.waiting.is_empty() {
                    return Ok(None);
                }
                let (num_free, num_blocks) = (self.pool.num_free(), self.pool.num_blocks());
                self.waiting.remove(0);
                return Err(EngineError::NoBlocks { num_free, num_blocks });
            }
            let (id, outcome) = self.ranks.wait().inspect_err(|_| {
                // Nothing that is under way will end.
                for step in std::mem::take(&mut self.under_way) {
                    self.running.retain(|sequence| !step.requests.contains(&sequence.id));
                }
            })?;
            let index = self.under_way.iter().position(|step| step.id == id);
            let step = self.under_way.remove(index.expect("every step that ends was begun"));
            let result = outcome.inspect_err(|_| {
                self.running.retain(|sequence| !step.requests.contains(&sequence.id));
                self.ranks.fence();
            })?;
            // Of a step that was begun before its sequences ended nothing is left to tell.
            if let Some(report) = self.finish(step, result) {
                return Ok(Some(report));
            }
        }
    }

    /// Begins steps while there is something to compute and somebody to do it.
    fn begin(&mut self) -> Result<(), EngineError> {
        while let Some((kind, indices)) = self.next_step() {
            let begun = Instant::now();
            let sequences: Vec<&Sequence> = indices.iter().map(|index| &self.running[*index]).collect();
            let mut step = step_of(&sequences, &self.spec);
            step.kind = kind;
            step.is_passed = kind == StepKind::Prefill && self.running.len() > sequences.len();
            let num_rows = step.batch.num_rows();
            let requests: Vec<RequestId> = sequences.iter().map(|sequence| sequence.id).collect();
            let id = self.ranks.submit(step).inspect_err(|_| {
                self.running.retain(|sequence| !requests.contains(&sequence.id));
            })?;
            self.num_turns += 1;
            for index in indices {
                self.running[index].num_under_way += 1;
                self.running[index].last_turn = self.num_turns;
            }
            self.under_way.push(UnderWay { id, kind, num_rows, requests, begun });
        }
        Ok(())
    }

    /// What is to be begun next: its kind, and which of the running sequences.
    fn next_step(&mut self) -> Option<(StepKind, Vec<usize>)> {
        if let Some(group) = self.decode_group() {
            return Some((StepKind::Decode, group));
        }
        if let Some(admitted) = self.admitted() {
            return Some((StepKind::Prefill, admitted));
        }
        self.continued_group().map(|group| (StepKind::Decode, group))
    }

    /// Steps of a kind that are under way.
    fn num_under_way(&self, kind: StepKind) -> usize {
        self.under_way.iter().filter(|step| step.kind == kind).count()
    }

    /// Sequences whose prompts can be computed now.
    fn admitted(&mut self) -> Option<Vec<usize>> {
        if self.num_under_way(StepKind::Prefill) >= self.ranks.most_under_way() {
            return None;
        }
        let first = self.running.len();
        self.running.extend(admit(&mut self.waiting, first, &self.limits));
        (self.running.len() > first).then(|| (first..self.running.len()).collect())
    }

    /// Sequences that wait for their next token: those that have waited longest, so many that all ranks can be busy with
    /// one group each. Groups of sequences that do not wait yet are left to grow.
    fn decode_group(&self) -> Option<Vec<usize>> {
        let num_groups = self.ranks.num_text_ranks().max(1);
        if self.num_under_way(StepKind::Decode) >= num_groups.min(self.ranks.most_under_way()) {
            return None;
        }
        let is_waiting = |index: &usize| self.running[*index].num_under_way == 0;
        let mut group: Vec<usize> = (0..self.running.len()).filter(is_waiting).collect();
        group.sort_by_key(|index| self.running[*index].last_turn);
        group.truncate(self.running.len().div_ceil(num_groups));
        // In the order of their submission, whatever became of their last steps.
        group.sort_unstable();
        (!group.is_empty()).then_some(group)
    }

    /// The sequences of the step that was begun last, whose tokens can be fed before they are known: where one rank both
    /// chooses and embeds, and nobody waits who could join them.
    fn continued_group(&mut self) -> Option<Vec<usize>> {
        let [step] = &self.under_way[..] else { return None };
        let everybody = step.requests.len() == self.running.len();
        if step.kind != StepKind::Decode || !everybody || self.ranks.num_text_ranks() > 1 || !self.ranks.can_continue()
        {
            return None;
        }
        let same = self.running.iter().zip(&step.requests).all(|(sequence, request)| sequence.id == *request);
        let context_len = self.limits.context_len;
        if !same || !self.running.iter().all(|sequence| sequence.can_go_on(context_len)) {
            return None;
        }
        self.running.iter_mut().for_each(Sequence::push_unknown);
        Some((0..self.running.len()).collect())
    }

    /// Tells what became of the sequences of a step; `None` where all of them had ended before.
    fn finish(&mut self, step: UnderWay, result: StepResult) -> Option<StepReport> {
        let UnderWay { kind, num_rows, requests, begun, .. } = step;
        let StepResult { tokens, logits, captured, vision_time } = result;
        let mut logits = logits.into_iter();
        let mut events = Vec::new();
        for (request, token) in requests.into_iter().zip(tokens) {
            let logits = logits.next();
            let Some(index) = self.running.iter().position(|sequence| sequence.id == request) else { continue };
            self.running[index].num_under_way -= 1;
            let logits = logits.filter(|_| self.running[index].request.want_logits);
            events.push(Event::Token { request, id: token, logits });
            self.advance(index, token, &mut events);
        }
        let now = Instant::now();
        let elapsed = now - self.last_end.replace(now).map_or(begun, |end| end.max(begun));
        debug!(?kind, num_rows, elapsed_us = elapsed.as_micros() as u64, "step");
        (!events.is_empty()).then_some(StepReport { kind, num_rows, elapsed, vision_time, events, captured })
    }

    /// Decides whether the running sequence at `index` goes on after choosing `id`.
    fn advance(&mut self, index: usize, id: u32, events: &mut Vec<Event>) {
        let sequence = &mut self.running[index];
        let request = &sequence.request;
        let fed = request.forced.as_ref().map_or(Some(id), |forced| forced.get(sequence.num_chosen).copied());
        sequence.num_chosen += 1;
        let at_end = match &request.forced {
            Some(forced) => sequence.num_chosen >= forced.len(),
            None => sequence.num_chosen >= request.max_new_tokens,
        };
        let stopped = request.forced.is_none() && !request.ignore_eos && id == self.spec.eos_token_id;
        let full = sequence.num_known() >= self.limits.context_len;
        let reason = if stopped {
            Some(FinishReason::Stop)
        } else if at_end || full {
            Some(FinishReason::Length)
        } else {
            None
        };
        match (reason, fed) {
            (None, Some(fed)) => sequence.reveal(fed),
            (reason, _) => {
                let sequence = self.running.remove(index);
                if sequence.num_under_way > 0 {
                    self.ranks.fence();
                }
                let request = sequence.id;
                // The token that was chosen last is not among them.
                let num_cached = sequence.num_known();
                let prefix = sequence.request.keep_cache.then(|| sequence.into_prefix(num_cached));
                events.push(Event::Finished { request, reason: reason.unwrap_or(FinishReason::Length), prefix });
            }
        }
    }
}
