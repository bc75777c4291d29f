//! Ranks as threads, and the links between them.
//!
//! Several steps are under way at a time. A thread calls the operations of one after the other without waiting for its
//! device, so that the device always has its next work before the last is done; only who asks for tokens waits.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use cogvlm_backend::{Backend, BackendError, HostWeight, MemoryUse};
use cogvlm_cluster::ClusterError;
use cogvlm_core::workspace::{PARCELS, StepLimits};
use cogvlm_core::{Device, Unit};
use cogvlm_model::{Captured, Crossing, Rank, StageOutput, Step};
use serde::{Deserialize, Serialize};
use tracing::debug_span;

use crate::load::LoadError;
use crate::remote::{Opened, Remote};
use crate::turns::{PATIENCE, Turns, Waiting};
use crate::ways::Way;

/// What went wrong on a rank.
#[derive(Debug, thiserror::Error)]
pub enum RankError {
    /// An operation failed.
    #[error("stage {stage} on rank {device}: {source}")]
    Stage {
        /// The stage.
        stage: usize,
        /// Its device.
        device: Device,
        /// What the device said.
        source: BackendError,
    },
    /// A device cannot say how long something took.
    #[error("the time of the vision tower on rank {device}: {source}")]
    Clock {
        /// Its device.
        device: Device,
        /// What the device said.
        source: BackendError,
    },
    /// The rank's thread has ended.
    #[error("rank {device} has stopped; its own message stands above")]
    Stopped {
        /// The rank's device.
        device: Device,
    },
    /// Another process says what went wrong with a step.
    #[error("{0}")]
    Elsewhere(String),
    /// A process of the run is gone, and with it the run.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
}

/// Names a step that is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StepId(pub(crate) u64);

/// A step that has passed through all stages.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct StepResult {
    pub(crate) tokens: Vec<u32>,
    pub(crate) logits: Vec<Vec<f32>>,
    pub(crate) captured: Vec<Captured>,
    pub(crate) vision_time: Duration,
}

/// A step on its way through the stages.
pub(crate) struct Envelope<B: Backend> {
    pub(crate) id: StepId,
    pub(crate) step: Arc<Step>,
    pub(crate) stage: usize,
    pub(crate) input: Option<Crossing<B::Parcel>>,
    /// Whether its rows come by a channel, where they are received in the order in which they were sent.
    pub(crate) is_by_channel: bool,
    pub(crate) captured: Vec<Captured>,
    /// Vision units on ranks of this process.
    vision: Vec<VisionSpan<B>>,
    /// Time of vision units on ranks of other processes.
    pub(crate) vision_time: Duration,
}

/// Begin and end of a rank's vision units, in the time of its device.
struct VisionSpan<B: Backend> {
    device: Device,
    backend: Arc<B>,
    moments: [B::Moment; 2],
}

impl<B: Backend> Envelope<B> {
    /// One that came from another process.
    pub(crate) fn arrived(
        id: StepId, step: Step, stage: usize, input: Option<Crossing<B::Parcel>>, captured: Vec<Captured>,
        vision_time: Duration,
    ) -> Self {
        let (step, is_by_channel) = (Arc::new(step), false);
        Self { id, step, stage, input, is_by_channel, captured, vision: Vec::new(), vision_time }
    }

    /// Waits for what devices of this process measured: another one cannot ask them.
    fn settle_vision_time(mut self) -> Result<Self, RankError> {
        for span in self.vision.drain(..) {
            self.vision_time += span.time()?;
        }
        Ok(self)
    }
}

/// What a rank's thread is told.
pub(crate) enum Message<B: Backend> {
    Run(Envelope<B>),
    Stop,
}

/// What the last stage gives: the tokens are on their way.
pub(crate) struct LastOutput<B: Backend> {
    device: Device,
    backend: Arc<B>,
    stage: usize,
    sampled: Option<B::Sampled>,
    logits: Vec<Vec<f32>>,
    captured: Vec<Captured>,
    vision: Vec<VisionSpan<B>>,
    vision_time: Duration,
}

/// What the last stage gave.
pub(crate) enum Ended<B: Backend> {
    /// On a rank of this process.
    Here(LastOutput<B>),
    /// In another process.
    Elsewhere(StepResult),
}

/// What became of a step.
pub(crate) type Outcome<B> = (StepId, Result<Ended<B>, RankError>);

/// The way to a rank.
enum Inbox<B: Backend> {
    Here(Sender<Message<B>>),
    Elsewhere(Arc<dyn Portal<B>>),
}

impl<B: Backend> Clone for Inbox<B> {
    fn clone(&self) -> Self {
        match self {
            Self::Here(inbox) => Self::Here(inbox.clone()),
            Self::Elsewhere(portal) => Self::Elsewhere(Arc::clone(portal)),
        }
    }
}

/// The way to the ranks of other processes.
pub(crate) trait Portal<B: Backend>: Send + Sync {
    /// Sends a step to `process`; its rows are of `sender`, a rank by its index and its backend. All of its time in vision
    /// units is in `vision_time`.
    fn send(&self, sender: Option<(usize, &B)>, process: usize, envelope: Envelope<B>) -> Result<(), RankError>;
}

/// A stage, and the rank that executes it.
#[derive(Debug, Clone)]
pub(crate) struct Route {
    pub(crate) rank: usize,
    pub(crate) units: Vec<Unit>,
}

/// The stages that steps pass through. Which way a step goes follows from the step alone, so that every rank and every
/// process knows.
#[derive(Debug)]
pub(crate) struct Routes {
    pub(crate) decode: Vec<Route>,
    /// Of steps that have at least so many rows for prompts, or an image; `None` where they go the same way.
    pub(crate) prefill: Option<(usize, Vec<Route>)>,
}

impl Routes {
    /// The way of `step`.
    pub(crate) fn of(&self, step: &Step) -> &[Route] {
        match &self.prefill {
            Some((from_rows, routes))
                if !step.images.is_empty() || step.is_prefill() && step.batch.num_rows() >= *from_rows =>
            {
                routes
            }
            _ => &self.decode,
        }
    }

    /// Both ways.
    pub(crate) fn all(&self) -> impl Iterator<Item = &[Route]> {
        std::iter::once(&self.decode[..]).chain(self.prefill.iter().map(|(_, routes)| &routes[..]))
    }
}

/// All ranks of a run. Dropping it ends their threads.
pub struct Ranks<B: Backend> {
    devices: Vec<Device>,
    /// Of the ranks of this process.
    backends: Vec<Option<Arc<B>>>,
    routes: Arc<Routes>,
    inboxes: Vec<Inbox<B>>,
    results: Receiver<Outcome<B>>,
    /// Steps that were sent on their way and have not ended.
    num_under_way: usize,
    /// Steps that wait for these to end, one after the other.
    held: VecDeque<(StepId, Step)>,
    /// Steps wait from now on.
    is_fenced: bool,
    /// What is streamed to ranks of this process from host memory, though not for every token.
    for_prompts: Vec<(Arc<B>, Vec<HostWeight>)>,
    threads: Vec<(Device, JoinHandle<()>)>,
    /// The other processes of the run, if any; ends after the threads.
    remote: Option<Remote<B>>,
    /// The only rank, if there is just one and nobody to pass anybody: it runs on the caller's thread, which waking
    /// another would only delay.
    alone: Option<Mutex<(RankThread<B>, Rank<B>)>>,
    next_id: u64,
}

/// What a rank's thread works with, beside the rank.
struct RankThread<B: Backend> {
    index: usize,
    device: Device,
    routes: Arc<Routes>,
    backend: Arc<B>,
    /// Processes of all ranks, and the ways to them.
    peers: Vec<(usize, Inbox<B>)>,
    results: Sender<Outcome<B>>,
    waiting: Waiting<B>,
}

/// A rank of the plan.
pub(crate) struct RankOf<B: Backend> {
    pub(crate) device: Device,
    /// Where it is a rank of this process.
    pub(crate) here: Option<RankHere<B>>,
}

/// A rank of this process.
pub(crate) struct RankHere<B: Backend> {
    pub(crate) backend: Arc<B>,
    pub(crate) rank: Rank<B>,
    /// Weights that are streamed to it from host memory, though not for every token.
    pub(crate) for_prompts: Vec<HostWeight>,
}

impl<B: Backend> Ranks<B> {
    /// Starts a thread for each rank of this process. `connect` is given what other processes need of this one.
    pub(crate) fn start(
        ranks: Vec<RankOf<B>>, routes: Routes, limits: &StepLimits,
        connect: impl FnOnce(Doors<B>) -> Result<Option<Opened<B>>, LoadError>,
    ) -> Result<Self, LoadError> {
        let routes = Arc::new(routes);
        let (result_sender, results) = channel();
        let (senders, outlets): (Vec<_>, Vec<_>) = ranks.iter().map(|_| channel()).unzip();
        let backend_of = |rank: &RankOf<B>| rank.here.as_ref().map(|here| Arc::clone(&here.backend));
        let backends: Vec<Option<Arc<B>>> = ranks.iter().map(backend_of).collect();
        let doors = Doors {
            devices: ranks.iter().map(|rank| rank.device).collect(),
            routes: Arc::clone(&routes),
            inboxes: senders.clone(),
            backends: backends.clone(),
            results: result_sender.clone(),
        };
        let (remote, portal) = connect(doors)?.unzip();
        let way = |rank: &RankOf<B>, sender: Sender<Message<B>>| match (&rank.here, &portal) {
            (None, Some(portal)) => Inbox::Elsewhere(Arc::clone(portal)),
            _ => Inbox::Here(sender),
        };
        let inboxes: Vec<Inbox<B>> = ranks.iter().zip(senders).map(|(rank, sender)| way(rank, sender)).collect();
        let processes = ranks.iter().map(|rank| rank.device.process());
        let peers: Vec<(usize, Inbox<B>)> = processes.zip(inboxes.iter().cloned()).collect();
        // Where decode steps may pass prompts, both have to come from elsewhere.
        let is_alone = ranks.len() == 1 && remote.is_none() && !limits.decodes_pass_prompts();
        let (devices, threads) = (ranks.iter().map(|rank| rank.device).collect(), Vec::new());
        let mut all = Self {
            devices,
            backends,
            routes,
            inboxes,
            results,
            num_under_way: 0,
            held: VecDeque::new(),
            is_fenced: false,
            for_prompts: Vec::new(),
            threads,
            remote,
            alone: None,
            next_id: 0,
        };
        for (index, (RankOf { device, here }, inbox)) in ranks.into_iter().zip(outlets).enumerate() {
            let Some(RankHere { backend, rank, for_prompts }) = here else { continue };
            all.for_prompts.push((Arc::clone(&backend), for_prompts));
            let (routes, peers, results) = (Arc::clone(&all.routes), peers.clone(), result_sender.clone());
            let waiting = Waiting::new(inbox);
            let thread = RankThread { index, device, routes, backend, peers, results, waiting };
            if is_alone {
                all.alone = Some(Mutex::new((thread, rank)));
                break;
            }
            let name = format!("rank-{device}");
            all.threads.push((device, std::thread::Builder::new().name(name).spawn(move || thread.run(rank))?));
        }
        Ok(all)
    }

    /// Ranks that decoding passes through: as many of them can be kept busy.
    pub(crate) fn num_text_ranks(&self) -> usize {
        let text = self.routes.decode.iter().filter(|route| route.units.iter().any(|unit| !unit.is_vision()));
        let ranks: std::collections::BTreeSet<usize> = text.map(|route| route.rank).collect();
        ranks.len()
    }

    /// Steps of one kind that are worth being under way at a time. No more than that: whoever has to wait for room in an
    /// outbox is waited for by nobody. Up to two ranks never have to; in a longer row, before a rank that is much slower
    /// than the others, prompts may, and decode steps behind them.
    pub(crate) fn most_under_way(&self) -> usize {
        // A rank that comes twice could wait for one that waits for it, if more steps were under way than parcels fit.
        let comes_twice = |routes: &[Route]| {
            let mut ranks: Vec<usize> = routes.iter().map(|route| route.rank).collect();
            ranks.sort_unstable();
            ranks.windows(2).any(|pair| pair[0] == pair[1])
        };
        if self.routes.all().any(comes_twice) { PARCELS } else { self.devices.len() + 1 }
    }

    /// Whether a step can continue one whose tokens the host does not know yet.
    pub(crate) fn can_continue(&self) -> bool {
        let rank_of =
            |unit: Unit| self.routes.decode.iter().find(|route| route.units.contains(&unit)).map(|route| route.rank);
        rank_of(Unit::Embedding) == rank_of(Unit::Head)
    }

    /// Sends a step on its way through all stages. What becomes of it is told by [`wait`](Self::wait).
    pub(crate) fn submit(&mut self, step: Step) -> Result<StepId, RankError> {
        let id = StepId(self.next_id);
        self.next_id += 1;
        if self.is_fenced {
            self.held.push_back((id, step));
        } else {
            self.send(id, step)?;
        }
        Ok(id)
    }

    /// Steps that are submitted from now on begin when those under way have ended: for blocks that change hands before
    /// the last step that writes to them has ended. Where every rank has a KV cache of its own, the order of the steps is
    /// enough; where two ranks write to one, nothing else orders them.
    pub(crate) fn fence(&mut self) {
        self.is_fenced = self.routes.prefill.is_some() && self.num_under_way > 0;
    }

    fn send(&mut self, id: StepId, step: Step) -> Result<(), RankError> {
        let routes = self.routes.of(&step);
        let stage = first_stage(routes, &step);
        let rank = routes[stage].rank;
        let envelope = Envelope::arrived(id, step, stage, None, Vec::new(), Duration::ZERO);
        let stopped = |rank: usize| RankError::Stopped { device: self.devices[rank] };
        match (&self.alone, &self.inboxes[rank]) {
            // A step that panicked may have left anything behind.
            (Some(alone), _) => {
                let (thread, rank) = &mut *alone.lock().map_err(|_| stopped(rank))?;
                thread.pass(rank, envelope);
            }
            (None, Inbox::Here(inbox)) => inbox.send(Message::Run(envelope)).map_err(|_| stopped(rank))?,
            (None, Inbox::Elsewhere(portal)) => {
                portal.send(None, self.devices[rank].process(), envelope)?;
            }
        }
        self.num_under_way += 1;
        Ok(())
    }

    /// Takes note of the end of a step. Sends the next one that is held.
    fn end(&mut self, failed: bool) -> Result<(), RankError> {
        // What a device was given before another one failed may still write to a cache that both use.
        if failed && self.routes.prefill.is_some() {
            // One that cannot say when it is done refuses what follows.
            self.backends.iter().flatten().for_each(|backend| drop(backend.synchronize()));
        }
        self.num_under_way = self.num_under_way.saturating_sub(1);
        if self.num_under_way == 0 {
            match self.held.pop_front() {
                Some((id, step)) => self.send(id, step)?,
                None => self.is_fenced = false,
            }
        }
        Ok(())
    }

    /// Waits for the end of a step: the one that ends first.
    ///
    /// # Errors
    /// Where no step will end any more. What goes wrong with a step is told with its name.
    pub(crate) fn wait(&mut self) -> Result<(StepId, Result<StepResult, RankError>), RankError> {
        loop {
            if let Some(ended) = self.wait_for(Duration::from_millis(200))? {
                self.end(ended.1.is_err())?;
                return Ok(ended);
            }
        }
    }

    /// The step that ends within `patience`, if any does.
    #[expect(clippy::type_complexity, reason = "what `wait` gives, or nothing")]
    fn wait_for(&self, patience: Duration) -> Result<Option<(StepId, Result<StepResult, RankError>)>, RankError> {
        if let Ok((id, outcome)) = self.results.recv_timeout(patience) {
            let result = outcome.and_then(|ended| match ended {
                Ended::Here(output) => Self::finish(output),
                Ended::Elsewhere(result) => Ok(result),
            });
            // Where a process has failed, channels were aborted, and what came over them is no result.
            if let Some(remote) = &self.remote {
                remote.check()?;
            }
            return Ok(Some((id, result)));
        }
        if let Some(remote) = &self.remote {
            remote.check()?;
        }
        // A thread ends before its ranks are dropped only if it panicked.
        match self.threads.iter().find(|(_, thread)| thread.is_finished()) {
            Some((device, _)) => Err(RankError::Stopped { device: *device }),
            None => Ok(None),
        }
    }

    /// Asks for times only once the tokens are there: then every device is past what it measured.
    fn finish(output: LastOutput<B>) -> Result<StepResult, RankError> {
        let LastOutput { device, backend, stage, sampled, logits, captured, vision, mut vision_time } = output;
        let tokens = sampled.map_or(Ok(Vec::new()), |sampled| backend.sampled(&sampled));
        let tokens = tokens.map_err(|source| RankError::Stage { stage, device, source })?;
        for span in vision {
            vision_time += span.time()?;
        }
        Ok(StepResult { tokens, logits, captured, vision_time })
    }

    /// Gets ready to stream weights of many prompts: see [`Engine::expect_many_prompts`](crate::Engine::expect_many_prompts).
    pub(crate) fn expect_many_prompts(&mut self) {
        for (backend, weights) in self.for_prompts.drain(..) {
            backend.prepare_streaming(&weights);
        }
    }

    /// What each device of this process holds, in rank order.
    pub fn memory(&self) -> Vec<(Device, MemoryUse)> {
        let here = self.devices.iter().zip(&self.backends);
        let here = here.filter_map(|(device, backend)| Some((device, backend.as_ref()?)));
        here.flat_map(|(device, backend)| backend.memory_by_device(*device)).collect()
    }

    /// How rows get from process to process: of the whole run at process 0, where there are several processes.
    pub fn ways(&self) -> &[Way] {
        self.remote.as_ref().map_or(&[], Remote::ways)
    }

    /// Works for process 0 until it ends the run: the part of every other process.
    ///
    /// # Errors
    /// Where a process of the run fails.
    pub fn serve(self) -> Result<(), RankError> {
        let Some(remote) = &self.remote else { return Ok(()) };
        while !remote.is_over() {
            match self.wait_for(Duration::from_millis(50)) {
                Ok(Some((id, result))) => remote.tell(id, result)?,
                Ok(None) => {}
                // The others know of it already.
                Err(error @ RankError::Cluster(_)) => return Err(error),
                Err(error) => return Err(remote.fail(&error.to_string())),
            }
        }
        Ok(())
    }
}

/// Stages that only have vision units are passed by steps without images.
fn first_stage(routes: &[Route], step: &Step) -> usize {
    let works = |route: &Route| !step.images.is_empty() || route.units.iter().any(|unit| !unit.is_vision());
    routes.iter().position(works).unwrap_or(0)
}

impl<B: Backend> VisionSpan<B> {
    /// Waits until both moments have come.
    fn time(self) -> Result<Duration, RankError> {
        let Self { device, backend, moments: [begin, end] } = self;
        backend.elapsed(&begin, &end).map_err(|source| RankError::Clock { device, source })
    }
}

/// What other processes need of this one.
pub(crate) struct Doors<B: Backend> {
    /// Of all ranks.
    pub(crate) devices: Vec<Device>,
    pub(crate) routes: Arc<Routes>,
    /// Of all ranks; those of other processes have nobody behind them.
    pub(crate) inboxes: Vec<Sender<Message<B>>>,
    pub(crate) backends: Vec<Option<Arc<B>>>,
    pub(crate) results: Sender<Outcome<B>>,
}

impl<B: Backend> Clone for Doors<B> {
    fn clone(&self) -> Self {
        let Self { devices, routes, inboxes, backends, results } = self;
        let (devices, routes, inboxes) = (devices.clone(), Arc::clone(routes), inboxes.clone());
        Self { devices, routes, inboxes, backends: backends.clone(), results: results.clone() }
    }
}

impl<B: Backend> Drop for Ranks<B> {
    fn drop(&mut self) {
        if let Some(remote) = &self.remote {
            remote.end();
            // What is under way is wanted by nobody, and its devices may wait for processes that have stopped.
            remote.close_channels();
        }
        for inbox in &self.inboxes {
            if let Inbox::Here(inbox) = inbox {
                drop(inbox.send(Message::Stop));
            }
        }
        for (_, thread) in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

impl<B: Backend> RankThread<B> {
    fn run(mut self, mut rank: Rank<B>) {
        while let Some(envelope) = self.waiting.next() {
            self.pass(&mut rank, envelope);
        }
    }

    /// Runs this rank's stage of a step, and those after it that are its own too, and hands the step on.
    fn pass(&mut self, rank: &mut Rank<B>, envelope: Envelope<B>) {
        let id = envelope.id;
        match self.run_stages(rank, envelope) {
            Ok(Passed::On(rank, envelope)) => match &self.peers[rank] {
                // The peer is gone only if it panicked, which the engine notices.
                (_, Inbox::Here(inbox)) => drop(inbox.send(Message::Run(envelope))),
                (process, Inbox::Elsewhere(portal)) => {
                    let settled = envelope.settle_vision_time();
                    let sent =
                        settled.and_then(|envelope| portal.send(Some((self.index, &self.backend)), *process, envelope));
                    if let Err(error) = sent {
                        drop(self.results.send((id, Err(error))));
                    }
                }
            },
            // The engine is gone only while everything is being dropped.
            Ok(Passed::Last(output)) => drop(self.results.send((id, Ok(Ended::Here(output))))),
            Err(error) => drop(self.results.send((id, Err(error)))),
        }
    }

    fn run_stages(&mut self, rank: &mut Rank<B>, envelope: Envelope<B>) -> Result<Passed<B>, RankError> {
        let Envelope { id, step, mut stage, mut input, mut captured, vision: mut spans, vision_time, .. } = envelope;
        let routes = Arc::clone(&self.routes);
        let routes = routes.of(&step);
        let mut turns = Turns::default();
        loop {
            let device = self.device;
            let span = debug_span!("stage", stage, %device, rows = step.batch.num_rows()).entered();
            let mut let_pass = |rank: &mut Rank<B>| self.let_pass(rank, &mut turns);
            let output = rank.run_stage(&routes[stage].units, &step, input.take(), &mut let_pass);
            let output = output.map_err(|source| RankError::Stage { stage, device, source })?;
            drop(span);
            let StageOutput { crossing, sampled, logits, captured: taps, vision } = output;
            captured.extend(taps);
            spans.extend(vision.map(|moments| VisionSpan { device, backend: Arc::clone(&self.backend), moments }));
            let Some(next) = routes.get(stage + 1) else {
                let (backend, vision) = (Arc::clone(&self.backend), spans);
                let output = LastOutput { device, backend, stage, sampled, logits, captured, vision, vision_time };
                return Ok(Passed::Last(output));
            };
            stage += 1;
            input = crossing;
            if next.rank != self.index {
                let (vision, is_by_channel) = (spans, false);
                let envelope = Envelope { id, step, stage, input, is_by_channel, captured, vision, vision_time };
                return Ok(Passed::On(next.rank, envelope));
            }
        }
    }

    /// Between two units of a prompt: runs decode steps that wait, when it is their turn, and keeps the device at most two
    /// units behind the host.
    fn let_pass(&mut self, rank: &mut Rank<B>, turns: &mut Turns<B>) -> Result<(), BackendError> {
        let backend = Arc::clone(&self.backend);
        let (before, now) = (turns.between_units.take(), backend.moment()?);
        loop {
            self.waiting.collect();
            let latest = if backend.has_come(&now)? { Some(&now) } else { before.as_ref() };
            let is_there = latest.map_or(Ok(true), |latest| backend.has_come(latest))?;
            if let Some(latest) = latest.filter(|_| is_there) {
                turns.tell(&*backend, latest)?;
            }
            if turns.passed.is_none()
                && let Some(first) = self.waiting.take_decode()
            {
                let begin = backend.moment()?;
                self.pass(rank, first);
                while let Some(next) = self.waiting.take_decode() {
                    self.pass(rank, next);
                }
                turns.passed = Some([begin, backend.moment()?]);
                turns.between_units = Some(backend.moment()?);
                return Ok(());
            }
            if is_there {
                turns.between_units = Some(now);
                return Ok(());
            }
            self.waiting.wait(PATIENCE);
        }
    }
}

/// Where a step goes from a rank.
enum Passed<B: Backend> {
    /// To another rank.
    On(usize, Envelope<B>),
    /// Nowhere: it has passed all stages.
    Last(LastOutput<B>),
}
