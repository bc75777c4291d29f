//! Ranks as threads, and the links between them.
//!
//! Several steps are under way at a time. A thread calls the operations of one after the other without waiting for its
//! device, so that the device always has its next work before the last is done; only who asks for tokens waits.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use cogvlm_backend::{Backend, BackendError, MemoryUse};
use cogvlm_core::{Device, Unit};
use cogvlm_model::{Captured, Crossing, Rank, StageOutput, Step};
use tracing::debug_span;

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
}

/// Names a step that is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StepId(u64);

/// A step that has passed through all stages.
pub(crate) struct StepResult {
    pub(crate) tokens: Vec<u32>,
    pub(crate) logits: Vec<Vec<f32>>,
    pub(crate) captured: Vec<Captured>,
    pub(crate) vision_time: Duration,
}

/// A step on its way through the stages.
struct Envelope<B: Backend> {
    id: StepId,
    step: Arc<Step>,
    stage: usize,
    input: Option<Crossing<B::Parcel>>,
    captured: Vec<Captured>,
    vision: Vec<VisionSpan<B>>,
}

/// Begin and end of a rank's vision units, in the time of its device.
struct VisionSpan<B: Backend> {
    rank: usize,
    moments: [B::Moment; 2],
}

/// What a rank's thread is told.
enum Message<B: Backend> {
    Run(Envelope<B>),
    Stop,
}

/// What the last stage gives: the tokens are on their way.
struct LastOutput<B: Backend> {
    rank: usize,
    stage: usize,
    sampled: Option<B::Sampled>,
    logits: Vec<Vec<f32>>,
    captured: Vec<Captured>,
    vision: Vec<VisionSpan<B>>,
}

/// What became of a step.
type Outcome<B> = (StepId, Result<LastOutput<B>, RankError>);

/// A stage, and the rank that executes it.
#[derive(Debug, Clone)]
struct Route {
    rank: usize,
    units: Vec<Unit>,
}

/// All ranks of a run. Dropping it ends their threads.
pub struct Ranks<B: Backend> {
    devices: Vec<Device>,
    backends: Vec<Arc<B>>,
    routes: Arc<Vec<Route>>,
    inboxes: Vec<Sender<Message<B>>>,
    results: Receiver<Outcome<B>>,
    threads: Vec<JoinHandle<()>>,
    /// The only rank, if there is just one: it runs on the caller's thread, which waking another would only delay.
    alone: Option<Mutex<RankThread<B>>>,
    next_id: u64,
}

/// What a rank's thread works with.
struct RankThread<B: Backend> {
    index: usize,
    device: Device,
    rank: Rank<B>,
    routes: Arc<Vec<Route>>,
    /// Inboxes of all ranks.
    peers: Vec<Sender<Message<B>>>,
    results: Sender<Outcome<B>>,
}

impl<B: Backend> Ranks<B> {
    /// Starts a thread for each rank. `stages` are in order of execution, each with the index of its rank.
    pub(crate) fn start(
        ranks: Vec<(Device, Arc<B>, Rank<B>)>, stages: Vec<(usize, Vec<Unit>)>,
    ) -> std::io::Result<Self> {
        let routes: Arc<Vec<Route>> = Arc::new(stages.into_iter().map(|(rank, units)| Route { rank, units }).collect());
        let (result_sender, results) = channel();
        let (inboxes, outlets): (Vec<_>, Vec<_>) = ranks.iter().map(|_| channel()).unzip();
        let (devices, backends, threads) = (Vec::new(), Vec::new(), Vec::new());
        let is_alone = ranks.len() == 1;
        let mut all = Self { devices, backends, routes, inboxes, results, threads, alone: None, next_id: 0 };
        for (index, ((device, backend, rank), inbox)) in ranks.into_iter().zip(outlets).enumerate() {
            all.devices.push(device);
            all.backends.push(backend);
            let (routes, peers, results) = (Arc::clone(&all.routes), all.inboxes.clone(), result_sender.clone());
            let thread = RankThread { index, device, rank, routes, peers, results };
            if is_alone {
                all.alone = Some(Mutex::new(thread));
                break;
            }
            let name = format!("rank-{device}");
            all.threads.push(std::thread::Builder::new().name(name).spawn(move || thread.run(&inbox))?);
        }
        Ok(all)
    }

    /// Ranks that a step without images passes through: as many of them can be kept busy.
    pub(crate) fn num_text_ranks(&self) -> usize {
        let text = self.routes.iter().filter(|route| route.units.iter().any(|unit| !unit.is_vision()));
        let ranks: std::collections::BTreeSet<usize> = text.map(|route| route.rank).collect();
        ranks.len()
    }

    /// Steps that are worth being under way at a time. No more than that: whoever has to wait for room in an outbox is
    /// waited for by nobody.
    pub(crate) fn most_under_way(&self) -> usize {
        // A rank that comes twice could wait for one that waits for it, if more steps were under way than parcels fit.
        let mut ranks: Vec<usize> = self.routes.iter().map(|route| route.rank).collect();
        ranks.sort_unstable();
        let comes_twice = ranks.windows(2).any(|pair| pair[0] == pair[1]);
        if comes_twice { 2 } else { self.devices.len() + 1 }
    }

    /// Whether a step can continue one whose tokens the host does not know yet.
    pub(crate) fn can_continue(&self) -> bool {
        let rank_of = |unit: Unit| self.routes.iter().find(|route| route.units.contains(&unit)).map(|route| route.rank);
        rank_of(Unit::Embedding) == rank_of(Unit::Head)
    }

    /// Sends a step on its way through all stages. What becomes of it is told by [`wait`](Self::wait).
    pub(crate) fn submit(&mut self, step: Step) -> Result<StepId, RankError> {
        let id = StepId(self.next_id);
        self.next_id += 1;
        let stage = self.first_stage(&step);
        let rank = self.routes[stage].rank;
        let (captured, vision) = (Vec::new(), Vec::new());
        let envelope = Envelope { id, step: Arc::new(step), stage, input: None, captured, vision };
        let stopped = |rank: usize| RankError::Stopped { device: self.devices[rank] };
        match &self.alone {
            // A step that panicked may have left anything behind.
            Some(alone) => alone.lock().map_err(|_| stopped(rank))?.pass(envelope),
            None => self.inboxes[rank].send(Message::Run(envelope)).map_err(|_| stopped(rank))?,
        }
        Ok(id)
    }

    /// Waits for the end of a step: the one that ends first.
    ///
    /// # Errors
    /// Where no step will end any more. What goes wrong with a step is told with its name.
    pub(crate) fn wait(&self) -> Result<(StepId, Result<StepResult, RankError>), RankError> {
        loop {
            match self.results.recv_timeout(Duration::from_millis(200)) {
                Ok((id, outcome)) => return Ok((id, outcome.and_then(|output| self.finish(output)))),
                // A thread ends before its ranks are dropped only if it panicked.
                Err(_) => {
                    if let Some(rank) = self.threads.iter().position(JoinHandle::is_finished) {
                        return Err(RankError::Stopped { device: self.devices[rank] });
                    }
                }
            }
        }
    }

    /// Asks for times only once the tokens are there: then every device is past what it measured.
    fn finish(&self, output: LastOutput<B>) -> Result<StepResult, RankError> {
        let LastOutput { rank, stage, sampled, logits, captured, vision } = output;
        let tokens = sampled.map_or(Ok(Vec::new()), |sampled| self.backends[rank].sampled(&sampled));
        let tokens = tokens.map_err(|source| RankError::Stage { stage, device: self.devices[rank], source })?;
        let mut vision_time = Duration::ZERO;
        for VisionSpan { rank, moments: [begin, end] } in vision {
            let elapsed = self.backends[rank].elapsed(&begin, &end);
            vision_time += elapsed.map_err(|source| RankError::Clock { device: self.devices[rank], source })?;
        }
        Ok(StepResult { tokens, logits, captured, vision_time })
    }

    /// Stages that only have vision units are passed by steps without images.
    fn first_stage(&self, step: &Step) -> usize {
        let works = |route: &Route| !step.images.is_empty() || route.units.iter().any(|unit| !unit.is_vision());
        self.routes.iter().position(works).unwrap_or(0)
    }

    /// What each device holds, in rank order.
    pub fn memory(&self) -> Vec<(Device, MemoryUse)> {
        let ranks = self.devices.iter().zip(&self.backends);
        ranks.flat_map(|(device, backend)| backend.memory_by_device(*device)).collect()
    }
}

impl<B: Backend> Drop for Ranks<B> {
    fn drop(&mut self) {
        for inbox in &self.inboxes {
            drop(inbox.send(Message::Stop));
        }
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

impl<B: Backend> RankThread<B> {
    fn run(mut self, inbox: &Receiver<Message<B>>) {
        while let Ok(Message::Run(envelope)) = inbox.recv() {
            self.pass(envelope);
        }
    }

    /// Runs this rank's stage of a step, and those after it that are its own too, and hands the step on.
    fn pass(&mut self, envelope: Envelope<B>) {
        let id = envelope.id;
        match self.run_stages(envelope) {
            Ok(Passed::On(rank, envelope)) => {
                // The peer is gone only if it panicked, which the engine notices.
                drop(self.peers[rank].send(Message::Run(envelope)));
            }
            // The engine is gone only while everything is being dropped.
            Ok(Passed::Last(output)) => drop(self.results.send((id, Ok(output)))),
            Err(error) => drop(self.results.send((id, Err(error)))),
        }
    }

    fn run_stages(&mut self, envelope: Envelope<B>) -> Result<Passed<B>, RankError> {
        let Envelope { id, step, mut stage, mut input, mut captured, vision: mut spans } = envelope;
        let routes = Arc::clone(&self.routes);
        loop {
            let device = self.device;
            let span = debug_span!("stage", stage, %device, rows = step.batch.num_rows()).entered();
            let output = self.rank.run_stage(&routes[stage].units, &step, input.take());
            let output = output.map_err(|source| RankError::Stage { stage, device, source })?;
            drop(span);
            let StageOutput { crossing, sampled, logits, captured: taps, vision } = output;
            captured.extend(taps);
            spans.extend(vision.map(|moments| VisionSpan { rank: self.index, moments }));
            let Some(next) = routes.get(stage + 1) else {
                let rank = self.index;
                return Ok(Passed::Last(LastOutput { rank, stage, sampled, logits, captured, vision: spans }));
            };
            stage += 1;
            input = crossing;
            if next.rank != self.index {
                return Ok(Passed::On(next.rank, Envelope { id, step, stage, input, captured, vision: spans }));
            }
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
