//! Who goes next on a rank: decode steps pass prompts.
//!
//! A prompt that others would have to wait for is computed unit by unit, and decode steps that have come meanwhile go
//! first. Prompts keep their order among themselves, decode steps theirs. This is safe for blocks of the KV cache that
//! change hands. They are given to a prompt when their last owner has ended: every step that writes to them for that
//! owner was submitted before the prompt, comes to every rank before it, and is run there before it, for a prompt
//! overtakes nobody. And a decode step that overtakes a prompt is of a sequence that had its blocks before the prompt got
//! any, and has them until it ends: whoever got blocks after the prompt has a prompt of its own, which every rank computes
//! after this one.

use std::collections::VecDeque;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use cogvlm_backend::{Backend, BackendError};
use cogvlm_model::StepKind;

use crate::ranks::{Envelope, Message};

/// How long a thread that has to wait for its device looks into its inbox before it asks the device again. Shorter than
/// a unit by far: what comes is looked at when it comes.
pub(crate) const PATIENCE: Duration = Duration::from_micros(50);

/// How a prompt and decode steps take turns on a device. Decode steps that come go first; those after them when the
/// prompt has had as long as they had, so that neither of the two takes more than twice as long as it would alone.
///
/// The thread runs ahead of its device: it gives the device the next unit of the prompt when the last but one is done,
/// so that there always is something to do, and never more than two units before a decode step.
pub(crate) struct Turns<B: Backend> {
    /// Comes when what was called before the last unit is done.
    pub(crate) between_units: Option<B::Moment>,
    /// Begin and end of the decode steps that went first, until the prompt has had as long.
    pub(crate) passed: Option<[B::Moment; 2]>,
}

impl<B: Backend> Default for Turns<B> {
    fn default() -> Self {
        Self { between_units: None, passed: None }
    }
}

impl<B: Backend> Turns<B> {
    /// Tells that `moment` has come, which is not before the end of the decode steps that went first.
    pub(crate) fn tell(&mut self, backend: &B, moment: &B::Moment) -> Result<(), BackendError> {
        if let Some([begin, end]) = &self.passed
            && backend.elapsed(end, moment)? >= backend.elapsed(begin, end)?
        {
            self.passed = None;
        }
        Ok(())
    }
}

/// Steps that have come to a rank, in their order.
pub(crate) struct Waiting<B: Backend> {
    inbox: Receiver<Message<B>>,
    steps: VecDeque<Envelope<B>>,
    /// Nothing comes any more, and nothing that has come is wanted.
    is_over: bool,
}

impl<B: Backend> Waiting<B> {
    pub(crate) fn new(inbox: Receiver<Message<B>>) -> Self {
        Self { inbox, steps: VecDeque::new(), is_over: false }
    }

    /// The step that came first, waited for if need be. `None` when all is over.
    pub(crate) fn next(&mut self) -> Option<Envelope<B>> {
        loop {
            self.collect();
            if self.is_over {
                return None;
            }
            if let Some(envelope) = self.steps.pop_front() {
                return Some(envelope);
            }
            match self.inbox.recv() {
                Ok(message) => self.put(message),
                Err(_) => self.is_over = true,
            }
        }
    }

    /// The decode step that came first, if any is there. It waits for prompts before it whose rows come by a channel: these
    /// are received in the order in which they were sent.
    pub(crate) fn take_decode(&mut self) -> Option<Envelope<B>> {
        let index = self.steps.iter().position(|envelope| envelope.step.kind == StepKind::Decode)?;
        let is_next = !self.steps.range(..index).any(|envelope| envelope.is_by_channel);
        if is_next { self.steps.remove(index) } else { None }
    }

    /// Empties the inbox.
    pub(crate) fn collect(&mut self) {
        while let Ok(message) = self.inbox.try_recv() {
            self.put(message);
        }
    }

    /// Waits for something to come.
    pub(crate) fn wait(&mut self, patience: Duration) {
        if let Ok(message) = self.inbox.recv_timeout(patience) {
            self.put(message);
        }
    }

    fn put(&mut self, message: Message<B>) {
        match message {
            Message::Run(envelope) => self.steps.push_back(envelope),
            Message::Stop => self.is_over = true,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::channel;
    use std::time::Instant;

    use cogvlm_core::{DType, Device};
    use cogvlm_cpu::{CpuBackend, Threads};
    use cogvlm_model::Step;

    use super::*;
    use crate::ranks::StepId;

    fn waiting(kinds: &[StepKind]) -> Waiting<CpuBackend> {
        let (sender, inbox) = channel();
        for (id, kind) in kinds.iter().enumerate() {
            let step = Step { kind: *kind, ..Step::default() };
            let envelope = Envelope::arrived(StepId(id as u64), step, 0, None, Vec::new(), Duration::ZERO);
            assert!(sender.send(Message::Run(envelope)).is_ok());
        }
        let mut waiting = Waiting::new(inbox);
        waiting.collect();
        waiting
    }

    #[test]
    fn rows_of_a_channel_are_received_in_their_order() {
        use StepKind::{Decode, Prefill};
        let mut waiting = waiting(&[Decode, Prefill, Decode]);
        waiting.steps[1].is_by_channel = true;
        assert!(waiting.take_decode().is_some_and(|envelope| envelope.id == StepId(0)));
        assert!(waiting.take_decode().is_none(), "the prompt's rows are the next of the channel");
        assert!(waiting.next().is_some_and(|envelope| envelope.id == StepId(1)));
        assert!(waiting.take_decode().is_some_and(|envelope| envelope.id == StepId(2)));
    }

    #[test]
    fn only_decode_steps_overtake_and_only_prompts_are_overtaken() {
        use StepKind::{Decode, Prefill};
        let kinds = [Prefill, Decode, Prefill, Decode];
        let ids = |next: &mut dyn FnMut() -> Option<Envelope<CpuBackend>>| -> Vec<StepId> {
            std::iter::from_fn(|| next().map(|envelope| envelope.id)).collect()
        };
        let mut in_turn = waiting(&kinds);
        assert_eq!(ids(&mut || in_turn.next()), [0, 1, 2, 3].map(StepId), "between prompts in the order of arrival");
        let mut passing = waiting(&kinds);
        assert_eq!(ids(&mut || passing.take_decode()), [1, 3].map(StepId));
        assert_eq!(ids(&mut || passing.next()), [0, 2].map(StepId));
    }

    #[test]
    fn a_prompt_has_as_long_as_the_decode_steps_before_it() {
        let threads = Arc::new(Threads::new(1).unwrap());
        let backend = CpuBackend::new(Device::Gpu(0), 1 << 20, DType::F32, threads).unwrap();
        let start = Instant::now();
        let after = |ms: u64| start + Duration::from_millis(ms);
        let mut turns: Turns<CpuBackend> = Turns { passed: Some([after(0), after(10)]), ..Turns::default() };
        for (moment, may_pass) in [(10, false), (19, false), (20, true), (21, true)] {
            turns.tell(&backend, &after(moment)).unwrap();
            assert_eq!(turns.passed.is_none(), may_pass, "{moment} ms");
        }
    }
}
