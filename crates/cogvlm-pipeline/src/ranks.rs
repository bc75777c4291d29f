//! Ranks as threads, and the links between them.

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

/// A step that has passed through all stages.
pub(crate) struct StepResult {
    pub(crate) tokens: Vec<u32>,
    pub(crate) logits: Vec<Vec<f32>>,
    pub(crate) captured: Vec<Captured>,
    pub(crate) vision_time: Duration,
}

/// A step on its way through the stages.
struct Envelope<B: Backend> {
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

/// What the last stage gives.
struct LastOutput<B: Backend> {
    tokens: Vec<u32>,
    logits: Vec<Vec<f32>>,
    captured: Vec<Captured>,
    vision: Vec<VisionSpan<B>>,
}

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
    results: Receiver<Result<LastOutput<B>, RankError>>,
    threads: Vec<JoinHandle<()>>,
    /// The only rank, if there is just one: it runs on the caller's thread, which waking another would only delay.
    alone: Option<Mutex<RankThread<B>>>,
}

/// What a rank's thread works with.
struct RankThread<B: Backend> {
    index: usize,
    device: Device,
    rank: Rank<B>,
    routes: Arc<Vec<Route>>,
    /// Inboxes of all ranks.
    peers: Vec<Sender<Message<B>>>,
    results: Sender<Result<LastOutput<B>, RankError>>,
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
        let mut all = Self { devices, backends, routes, inboxes, results, threads, alone: None };
        for (index, ((device, backend, rank), inbox)) in ranks.into_iter().zip(outlets).enumerate() {
            all.devices.push(device);
            all.backends.push(backend);
            let peers = all.inboxes.clone();
            let routes = Arc::clone(&all.routes);
            let thread = RankThread { index, device, rank, routes, peers, results: result_sender.clone() };
            if is_alone {
                all.alone = Some(Mutex::new(thread));
                break;
            }
            let name = format!("rank-{device}");
            all.threads.push(std::thread::Builder::new().name(name).spawn(move || thread.run(&inbox))?);
        }
        Ok(all)
    }

    /// Sends a step through all stages and waits for its end.
    pub(crate) fn run(&self, step: Step) -> Result<StepResult, RankError> {
        let first = self.first_stage(&step);
        let rank = self.routes[first].rank;
        let envelope =
            Envelope { step: Arc::new(step), stage: first, input: None, captured: Vec::new(), vision: Vec::new() };
        let stopped = |rank: usize| RankError::Stopped { device: self.devices[rank] };
        if let Some(alone) = &self.alone {
            // A step that panicked may have left anything behind.
            let mut alone = alone.lock().map_err(|_| stopped(rank))?;
            alone.pass(envelope)?;
        } else {
            self.inboxes[rank].send(Message::Run(envelope)).map_err(|_| stopped(rank))?;
        }
        loop {
            match self.results.recv_timeout(Duration::from_millis(200)) {
                Ok(result) => return self.finish(result?),
                // A thread ends before its ranks are dropped only if it panicked.
                Err(_) => {
                    if let Some(rank) = self.threads.iter().position(JoinHandle::is_finished) {
                        return Err(stopped(rank));
                    }
                }
            }
        }
    }

    /// Asks for times only now: with the tokens there, every device is past what it measured.
    fn finish(&self, output: LastOutput<B>) -> Result<StepResult, RankError> {
        let LastOutput { tokens, logits, captured, vision } = output;
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
        self.devices.iter().copied().zip(self.backends.iter().map(|backend| backend.memory())).collect()
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
            if let Err(error) = self.pass(envelope) {
                drop(self.results.send(Err(error)));
            }
        }
    }

    /// Runs this rank's stage of a step, and those after it that are its own too, and hands the step on.
    fn pass(&mut self, envelope: Envelope<B>) -> Result<(), RankError> {
        let Envelope { step, mut stage, mut input, mut captured, vision: mut spans } = envelope;
        let routes = Arc::clone(&self.routes);
        loop {
            let device = self.device;
            let span = debug_span!("stage", stage, %device, rows = step.batch.num_rows()).entered();
            let output = self.rank.run_stage(&routes[stage].units, &step, input.take());
            let output = output.map_err(|source| RankError::Stage { stage, device, source })?;
            drop(span);
            let StageOutput { crossing, tokens, logits, captured: taps, vision } = output;
            captured.extend(taps);
            spans.extend(vision.map(|moments| VisionSpan { rank: self.index, moments }));
            stage += 1;
            let Some(next) = routes.get(stage) else {
                // The engine is gone only while everything is being dropped.
                drop(self.results.send(Ok(LastOutput { tokens, logits, captured, vision: spans })));
                return Ok(());
            };
            input = crossing;
            if next.rank != self.index {
                let envelope = Envelope { step, stage, input, captured, vision: spans };
                // The peer is gone only if it panicked, which the engine notices.
                drop(self.peers[next.rank].send(Message::Run(envelope)));
                return Ok(());
            }
        }
    }
}
