//! Ranks of other processes: steps go to them and come from them over the wires of the run, and process 0 is told what
//! became of each.
//!
//! Process 0 has the engine. Every other process loads its share of the same plan and serves ([`Ranks::serve`]). A step
//! goes from process to process as it goes from rank to rank, with all that is known of it; its rows go by a channel
//! between the two devices where there is one ([`Way`]), else with it.
//!
//! [`Ranks::serve`]: crate::Ranks::serve

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cogvlm_backend::{Backend, HostRows, Portable, RowsLayout};
use cogvlm_cluster::{Cluster, ClusterError, Control, TcpWire, Watch, Wire};
use cogvlm_core::{DType, Unit};
use cogvlm_model::{Captured, Crossing, Step};
use serde::{Deserialize, Serialize};

use crate::load::LoadError;
use crate::ranks::{Doors, Ended, Envelope, Message, Portal, RankError, Routes, StepId, StepResult};
use crate::ways::{Channels, KnownWay, OpenChannels, Settling, Transport, Way};

/// Codes of control messages.
const RESULT: u16 = 1;
const END: u16 = 2;
const WAYS: u16 = 3;
/// Tags of what goes over a wire: how long the next message is, and the message.
const LENGTHS: u64 = 1;
const ENVELOPE: u64 = 2;
/// Most bytes of an envelope that are believed.
const MAX_ENVELOPE_BYTES: usize = 1 << 30;
/// Time between looks at channels.
const CHANNEL_TURN: Duration = Duration::from_millis(50);
/// How long a channel may be broken before that is a failure: at the end of a run the other end may close first.
const GRACE: Duration = Duration::from_secs(1);

/// The processes of a run, joined by wires. Dropping it before the run is over ends the run for everyone.
pub struct Processes<B: Backend> {
    shared: Arc<Shared>,
    transport: Transport,
    opener: Option<Box<dyn OpenChannels<B>>>,
}

pub(crate) struct Shared {
    control: Control,
    wire: TcpWire,
    /// Held while an envelope is sent to a process, by its rank.
    sending: Vec<Mutex<()>>,
    is_over: AtomicBool,
    /// This process has no use for its channels any more.
    is_closing: AtomicBool,
}

impl<B: Portable> Processes<B> {
    /// Connects to every other process of `cluster`, which do the same.
    ///
    /// # Errors
    /// Where one of them is not there.
    pub fn connect(cluster: Cluster) -> Result<Self, ClusterError> {
        let (rank, size) = (cluster.control.rank(), cluster.control.size());
        let others: Vec<usize> = (0..size).filter(|other| *other != rank).collect();
        let (control, wire) = cluster.connect(&others)?;
        let sending = (0..size).map(|_| Mutex::new(())).collect();
        let [is_over, is_closing] = [(); 2].map(|()| AtomicBool::new(false));
        let shared = Arc::new(Shared { control, wire, sending, is_over, is_closing });
        Ok(Self { shared, transport: Transport::Tcp, opener: None })
    }

    /// With channels between devices, as `transport` says, which all processes are to agree on. `opener` opens them, if
    /// this process's devices can have any.
    #[must_use]
    pub fn with_channels(self, transport: Transport, opener: Option<Box<dyn OpenChannels<B>>>) -> Self {
        Self { transport, opener, ..self }
    }

    /// Which of them this is.
    pub fn rank(&self) -> usize {
        self.shared.control.rank()
    }

    /// Ends the run for everyone, since this process cannot go on.
    pub fn fail(&self, message: &str) -> ClusterError {
        self.shared.control.fail(message)
    }

    /// Settles what carries rows, and starts to pass on what comes from other processes.
    pub(crate) fn open(self, doors: Doors<B>) -> Result<Opened<B>, LoadError> {
        let Self { shared, transport, opener } = self;
        let settling = Settling { shared: &shared, doors: &doors, transport, opener: opener.as_deref() };
        let (channels, ways) = settling.settle_all()?;
        let channels = Arc::new(channels);
        let control = &shared.control;
        let (rank, size) = (control.rank(), control.size());
        let routes = Arc::clone(&doors.routes);
        let mut threads = Vec::new();
        let mut start = |name: String, work: Box<dyn FnOnce() + Send>| {
            threads.push(std::thread::Builder::new().name(name).spawn(work)?);
            Ok::<_, std::io::Error>(())
        };
        for from in (0..size).filter(|from| *from != rank) {
            let (shared, doors, channels) = (Arc::clone(&shared), doors.clone(), Arc::clone(&channels));
            start(format!("from-{from}"), Box::new(move || shared.take_envelopes(from, &doors, &channels)))?;
        }
        if !channels.is_empty() {
            let (shared, channels) = (Arc::clone(&shared), Arc::clone(&channels));
            start("channels".to_owned(), Box::new(move || shared.look_after(&channels)))?;
        }
        let others = Arc::clone(&shared);
        if rank == 0 {
            start("results".to_owned(), Box::new(move || others.take_results(&doors)))?;
        } else {
            start("control".to_owned(), Box::new(move || others.await_end()))?;
        }
        let gate = Gate { shared: Arc::clone(&shared), channels: Arc::clone(&channels), routes };
        Ok((Remote { shared, channels, ways, threads }, Arc::new(gate)))
    }
}

/// What is kept of the other processes, and the way to their ranks.
pub(crate) type Opened<B> = (Remote<B>, Arc<dyn Portal<B>>);

/// What [`Ranks`](crate::Ranks) keeps of the other processes. Dropped last, it waits for all of them.
pub(crate) struct Remote<B: Backend> {
    shared: Arc<Shared>,
    channels: Arc<Channels<B>>,
    ways: Vec<Way>,
    threads: Vec<JoinHandle<()>>,
}

impl<B: Backend> Remote<B> {
    /// How rows get from process to process: all of it at process 0.
    pub(crate) fn ways(&self) -> &[Way] {
        &self.ways
    }

    /// An error where a process of the run has failed.
    pub(crate) fn check(&self) -> Result<(), RankError> {
        Ok(self.shared.control.watch().check()?)
    }

    /// Tells process 0 what became of a step.
    pub(crate) fn tell(&self, id: StepId, result: Result<StepResult, RankError>) -> Result<(), RankError> {
        let result = result.map_err(|error| error.to_string());
        let bytes = postcard::to_stdvec(&(id, result)).map_err(|error| self.fail(&format!("a result: {error}")))?;
        Ok(self.shared.control.send(0, RESULT, &bytes)?)
    }

    /// Ends the run, since this process cannot go on.
    pub(crate) fn fail(&self, message: &str) -> RankError {
        self.shared.control.fail(message).into()
    }

    /// Whether process 0 has ended the run.
    pub(crate) fn is_over(&self) -> bool {
        self.shared.is_over.load(Ordering::Acquire)
    }

    /// Ends the run in good order, if this is process 0.
    pub(crate) fn end(&self) {
        if self.shared.control.rank() == 0 {
            // Where somebody has failed, everybody knows.
            drop(self.shared.control.broadcast(END, &[]));
        }
    }

    /// Ends all channels, so that no device waits for one of another process.
    pub(crate) fn close_channels(&self) {
        self.shared.is_closing.store(true, Ordering::Release);
        self.channels.values().for_each(|channel| channel.close());
    }
}

impl<B: Backend> Drop for Remote<B> {
    fn drop(&mut self) {
        self.close_channels();
        if self.shared.control.rank() == 0 || self.is_over() {
            // A failure was told to whoever waited for a step.
            drop(self.shared.control.leave());
        } else if !std::thread::panicking() {
            drop(self.shared.control.fail("it ended before the run was over"));
        }
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

/// The way out.
struct Gate<B: Backend> {
    shared: Arc<Shared>,
    channels: Arc<Channels<B>>,
    routes: Arc<Routes>,
}

/// What is known of a step on its way, but for pixels and rows, which follow it in this order.
#[derive(Serialize, Deserialize)]
struct Letter {
    id: StepId,
    stage: usize,
    step: Step,
    /// Values of each image; none where nobody needs them any more.
    num_pixels: Vec<usize>,
    rows: Option<RowsHeader>,
    captured: Vec<Captured>,
    vision_time: Duration,
}

#[derive(Serialize, Deserialize)]
struct RowsHeader {
    kind: RowsKind,
    dtype: DType,
    rows: usize,
    columns: usize,
    /// The rank from which they come by a channel; `None` where they follow.
    by_channel_from: Option<usize>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
enum RowsKind {
    VitHidden,
    VisionFeatures,
    Hidden,
}

impl<B: Portable> Portal<B> for Gate<B> {
    fn send(&self, sender: Option<(usize, &B)>, process: usize, envelope: Envelope<B>) -> Result<(), RankError> {
        let Envelope { id, step, stage, input, captured, vision_time, .. } = envelope;
        let step = Arc::unwrap_or_clone(step);
        // Rows are on their way before the step is: what a device waits for is always on another one's stream.
        let (rows, row_bytes) = match (input, sender) {
            (Some(input), Some((from, backend))) => {
                let (header, bytes) = self.send_rows(input, from, backend, self.routes.of(&step)[stage].rank)?;
                (Some(header), bytes)
            }
            _ => (None, Vec::new()),
        };
        let pixels: Vec<Arc<[f32]>> = step.images.iter().map(|image| Arc::clone(&image.pixels)).collect();
        let mut units = self.routes.of(&step)[stage..].iter().flat_map(|route| &route.units);
        let pixels = if units.any(|unit| *unit == Unit::PatchEmbedding) { pixels } else { Vec::new() };
        let letter = Letter {
            id,
            stage,
            step,
            num_pixels: pixels.iter().map(|pixels| pixels.len()).collect(),
            rows,
            captured,
            vision_time,
        };
        let mut bytes = postcard::to_stdvec(&letter).map_err(|error| RankError::Elsewhere(error.to_string()))?;
        let num_letter_bytes = bytes.len();
        for pixels in &pixels {
            bytes.extend(pixels.iter().flat_map(|value| value.to_le_bytes()));
        }
        bytes.extend_from_slice(&row_bytes);
        let _alone = self.shared.sending[process].lock().unwrap_or_else(PoisonError::into_inner);
        Ok(self.shared.send_sized(process, &bytes, num_letter_bytes)?)
    }
}

impl<B: Portable> Gate<B> {
    /// Sends rows of `backend`, the rank `from`, to the rank `to`: by their channel, or as the bytes that are given, to be
    /// sent behind the step.
    fn send_rows(
        &self, input: Crossing<B::Parcel>, from: usize, backend: &B, to: usize,
    ) -> Result<(RowsHeader, Vec<u8>), RankError> {
        let failed = |error: cogvlm_backend::BackendError| RankError::Elsewhere(error.to_string());
        let (kind, parcel) = match input {
            Crossing::VitHidden(parcel) => (RowsKind::VitHidden, parcel),
            Crossing::VisionFeatures(parcel) => (RowsKind::VisionFeatures, parcel),
            Crossing::Hidden(parcel) => (RowsKind::Hidden, parcel),
        };
        let Some(channel) = self.channels.get(&(from, to)) else {
            let HostRows { dtype, columns, bytes } = backend.pack(parcel).map_err(failed)?;
            let rows = bytes.len().checked_div(columns * dtype.size_bytes()).unwrap_or(0);
            return Ok((RowsHeader { kind, dtype, rows, columns, by_channel_from: None }, bytes));
        };
        let RowsLayout { dtype, rows, columns } = channel.send(parcel).map_err(failed)?;
        Ok((RowsHeader { kind, dtype, rows, columns, by_channel_from: Some(from) }, Vec::new()))
    }
}

impl Shared {
    pub(crate) fn rank(&self) -> usize {
        self.control.rank()
    }

    pub(crate) fn size(&self) -> usize {
        self.control.size()
    }

    pub(crate) fn watch(&self) -> &Arc<Watch> {
        self.control.watch()
    }

    /// Ends the run for everyone, since this process cannot go on.
    pub(crate) fn fail(&self, message: &str) -> ClusterError {
        self.control.fail(message)
    }

    /// Sends a message, whose first part is `first` bytes, to process `to`.
    pub(crate) fn send_sized(&self, to: usize, bytes: &[u8], first: usize) -> Result<(), ClusterError> {
        let lengths = [first, bytes.len()].map(|length| (length as u64).to_le_bytes()).concat();
        self.wire.send(to, LENGTHS, &lengths)?;
        self.wire.send(to, ENVELOPE, bytes)
    }

    /// A message of process `from`, and the length of its first part.
    pub(crate) fn recv_sized(&self, from: usize) -> Result<(Vec<u8>, usize), ClusterError> {
        let mut lengths = [0; 16];
        self.wire.recv(from, LENGTHS, &mut lengths)?;
        let [first, total] = [0, 8].map(|at| {
            let bytes: [u8; 8] = lengths[at..at + 8].try_into().expect("eight of sixteen bytes");
            u64::from_le_bytes(bytes) as usize
        });
        if first > total || total > MAX_ENVELOPE_BYTES {
            return Err(self.fail(&format!("process {from} announces a message of {total} bytes")));
        }
        let mut bytes = vec![0; total];
        self.wire.recv(from, ENVELOPE, &mut bytes)?;
        Ok((bytes, first))
    }

    /// Tells process 0 how rows get here.
    pub(crate) fn report_ways(&self, ways: &[KnownWay]) -> Result<(), ClusterError> {
        let bytes = postcard::to_stdvec(ways).map_err(|error| self.fail(&format!("ways of rows: {error}")))?;
        self.control.send(0, WAYS, &bytes)
    }

    /// What process `process` tells of that, once it is loaded.
    pub(crate) fn await_ways(&self, process: usize) -> Result<Vec<KnownWay>, ClusterError> {
        let message = self.control.recv(process, None)?;
        let ways = if message.code == WAYS { postcard::from_bytes(&message.payload).ok() } else { None };
        ways.ok_or_else(|| self.fail(&format!("process {process} does not say how rows get there")))
    }

    /// Hands steps that come from process `from` to the ranks that they are for, until the run ends.
    fn take_envelopes<B: Portable>(&self, from: usize, doors: &Doors<B>, channels: &Channels<B>) {
        // That the run is over, or has failed, is known elsewhere.
        while let Ok((bytes, letter)) = self.recv_sized(from) {
            if let Err(problem) = deliver(&bytes, letter, doors, channels) {
                self.control.fail(&format!("a step from process {from}: {problem}"));
                return;
            }
        }
    }

    /// Looks whether channels have failed, until the run ends: devices that wait for them cannot tell.
    fn look_after<B: Backend>(&self, channels: &Channels<B>) {
        let is_ending = || {
            let flags = [&self.is_closing, &self.is_over];
            flags.iter().any(|flag| flag.load(Ordering::Acquire)) || self.control.failure().is_some()
        };
        while !is_ending() {
            std::thread::sleep(CHANNEL_TURN);
            let broken = channels.values().find_map(|channel| channel.check().err());
            let Some(error) = broken else { continue };
            let noticed = Instant::now();
            while !is_ending() {
                if noticed.elapsed() >= GRACE {
                    self.control.fail(&error.to_string());
                }
                std::thread::sleep(CHANNEL_TURN);
            }
        }
    }

    /// Hands on what other processes tell of steps, until the run ends.
    fn take_results<B: Portable>(&self, doors: &Doors<B>) {
        while let Ok(message) = self.control.recv_any(None) {
            if message.code != RESULT {
                continue;
            }
            match postcard::from_bytes::<(StepId, Result<StepResult, String>)>(&message.payload) {
                Ok((id, result)) => {
                    let result = result.map(Ended::Elsewhere).map_err(RankError::Elsewhere);
                    // The engine is gone only while everything is being dropped.
                    drop(doors.results.send((id, result)));
                }
                Err(error) => {
                    self.control.fail(&format!("a result from process {}: {error}", message.from));
                    return;
                }
            }
        }
    }

    fn await_end(&self) {
        while let Ok(message) = self.control.recv(0, None) {
            if message.code == END {
                self.is_over.store(true, Ordering::Release);
                return;
            }
        }
    }
}

/// Unpacks a step, and gives it to its rank.
fn deliver<B: Portable>(
    bytes: &[u8], letter_bytes: usize, doors: &Doors<B>, channels: &Channels<B>,
) -> Result<(), String> {
    let (letter, mut rest) = bytes.split_at(letter_bytes);
    let letter: Letter = postcard::from_bytes(letter).map_err(|error| error.to_string())?;
    let Letter { id, stage, mut step, num_pixels, rows, captured, vision_time } = letter;
    let mut take = |num_bytes: usize| {
        let (taken, left) = rest.split_at_checked(num_bytes).ok_or("it is shorter than it says")?;
        rest = left;
        Ok::<_, String>(taken)
    };
    for (image, num_pixels) in step.images.iter_mut().zip(&num_pixels) {
        let bytes = take(num_pixels.checked_mul(4).ok_or("an image is too large")?)?;
        image.pixels = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    }
    let rank = doors.routes.of(&step).get(stage).ok_or("its stage is none of the plan's")?.rank;
    let backend = doors.backends.get(rank).and_then(Option::as_ref).ok_or("its stage is another process's")?;
    let is_by_channel = rows.as_ref().is_some_and(|rows| rows.by_channel_from.is_some());
    let input = match rows {
        None => None,
        Some(RowsHeader { kind, dtype, rows, columns, by_channel_from }) => {
            let num_elements = rows.checked_mul(columns).filter(|count| *count < MAX_ENVELOPE_BYTES);
            let num_bytes = num_elements.ok_or("its rows are too large")? * dtype.size_bytes();
            let parcel = match by_channel_from {
                None => backend.unpack(HostRows { dtype, columns, bytes: take(num_bytes)?.to_vec() }),
                Some(from) => {
                    let channel = channels.get(&(from, rank)).ok_or("its rows come by a channel that there is not")?;
                    channel.receive(RowsLayout { dtype, rows, columns })
                }
            };
            let parcel = parcel.map_err(|error| error.to_string())?;
            Some(match kind {
                RowsKind::VitHidden => Crossing::VitHidden(parcel),
                RowsKind::VisionFeatures => Crossing::VisionFeatures(parcel),
                RowsKind::Hidden => Crossing::Hidden(parcel),
            })
        }
    };
    let mut envelope = Envelope::arrived(id, step, stage, input, captured, vision_time);
    envelope.is_by_channel = is_by_channel;
    doors.inboxes[rank].send(Message::Run(envelope)).map_err(|_| "its rank has stopped".to_owned())
}
