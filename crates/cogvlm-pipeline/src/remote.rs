//! Ranks of other processes: steps go to them and come from them over the wires of the run, and process 0 is told what
//! became of each.
//!
//! Process 0 has the engine. Every other process loads its share of the same plan and serves ([`Ranks::serve`]). A step
//! goes from process to process as it goes from rank to rank, with all that is known of it; rows cross in host memory.
//!
//! [`Ranks::serve`]: crate::Ranks::serve

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use cogvlm_backend::{HostRows, Portable};
use cogvlm_cluster::{Cluster, ClusterError, Control, TcpWire, Wire};
use cogvlm_core::{DType, Unit};
use cogvlm_model::{Captured, Crossing, Step};
use serde::{Deserialize, Serialize};

use crate::ranks::{Doors, Ended, Envelope, Message, Portal, RankError, Routes, StepId, StepResult};

/// Codes of control messages.
const RESULT: u16 = 1;
const END: u16 = 2;
/// Tags of what goes over a wire: how long the next message is, and the message.
const LENGTHS: u64 = 1;
const ENVELOPE: u64 = 2;
/// Most bytes of an envelope that are believed.
const MAX_ENVELOPE_BYTES: usize = 1 << 30;

/// The processes of a run, joined by wires. Dropping it before the run is over ends the run for everyone.
pub struct Processes {
    shared: Arc<Shared>,
}

struct Shared {
    control: Control,
    wire: TcpWire,
    /// Held while an envelope is sent to a process, by its rank.
    sending: Vec<Mutex<()>>,
    is_over: AtomicBool,
}

impl Processes {
    /// Connects to every other process of `cluster`, which do the same.
    ///
    /// # Errors
    /// Where one of them is not there.
    pub fn connect(cluster: Cluster) -> Result<Self, ClusterError> {
        let (rank, size) = (cluster.control.rank(), cluster.control.size());
        let others: Vec<usize> = (0..size).filter(|other| *other != rank).collect();
        let (control, wire) = cluster.connect(&others)?;
        let sending = (0..size).map(|_| Mutex::new(())).collect();
        Ok(Self { shared: Arc::new(Shared { control, wire, sending, is_over: AtomicBool::new(false) }) })
    }

    /// Which of them this is.
    pub fn rank(&self) -> usize {
        self.shared.control.rank()
    }

    /// Ends the run for everyone, since this process cannot go on.
    pub fn fail(&self, message: &str) -> ClusterError {
        self.shared.control.fail(message)
    }

    /// Starts to pass on what comes from other processes.
    pub(crate) fn open<B: Portable>(self, doors: Doors<B>) -> std::io::Result<(Remote, Arc<dyn Portal<B>>)> {
        let Self { shared } = self;
        let control = &shared.control;
        let (rank, size) = (control.rank(), control.size());
        let routes = Arc::clone(&doors.routes);
        let mut threads = Vec::new();
        let mut start = |name: String, work: Box<dyn FnOnce() + Send>| {
            threads.push(std::thread::Builder::new().name(name).spawn(work)?);
            Ok::<_, std::io::Error>(())
        };
        for from in (0..size).filter(|from| *from != rank) {
            let (shared, doors) = (Arc::clone(&shared), doors.clone());
            start(format!("from-{from}"), Box::new(move || shared.take_envelopes(from, &doors)))?;
        }
        let others = Arc::clone(&shared);
        if rank == 0 {
            start("results".to_owned(), Box::new(move || others.take_results(&doors)))?;
        } else {
            start("control".to_owned(), Box::new(move || others.await_end()))?;
        }
        let portal: Arc<dyn Portal<B>> = Arc::new(Gate { shared: Arc::clone(&shared), routes });
        Ok((Remote { shared, threads }, portal))
    }
}

/// What [`Ranks`](crate::Ranks) keeps of the other processes. Dropped last, it waits for all of them.
pub(crate) struct Remote {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Remote {
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
}

impl Drop for Remote {
    fn drop(&mut self) {
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
struct Gate {
    shared: Arc<Shared>,
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
    columns: usize,
    num_bytes: usize,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
enum RowsKind {
    VitHidden,
    VisionFeatures,
    Hidden,
}

impl<B: Portable> Portal<B> for Gate {
    fn send(&self, backend: Option<&B>, process: usize, envelope: Envelope<B>) -> Result<(), RankError> {
        let Envelope { id, step, stage, input, captured, vision_time, .. } = envelope;
        let step = Arc::unwrap_or_clone(step);
        let rows = match (input, backend) {
            (Some(input), Some(backend)) => {
                let (kind, parcel) = match input {
                    Crossing::VitHidden(parcel) => (RowsKind::VitHidden, parcel),
                    Crossing::VisionFeatures(parcel) => (RowsKind::VisionFeatures, parcel),
                    Crossing::Hidden(parcel) => (RowsKind::Hidden, parcel),
                };
                let packed = backend.pack(parcel).map_err(|error| RankError::Elsewhere(error.to_string()))?;
                Some((kind, packed))
            }
            _ => None,
        };
        let pixels: Vec<Arc<[f32]>> = step.images.iter().map(|image| Arc::clone(&image.pixels)).collect();
        let mut units = self.routes.of(&step)[stage..].iter().flat_map(|route| &route.units);
        let pixels = if units.any(|unit| *unit == Unit::PatchEmbedding) { pixels } else { Vec::new() };
        let letter = Letter {
            id,
            stage,
            step,
            num_pixels: pixels.iter().map(|pixels| pixels.len()).collect(),
            rows: rows.as_ref().map(|(kind, rows)| RowsHeader {
                kind: *kind,
                dtype: rows.dtype,
                columns: rows.columns,
                num_bytes: rows.bytes.len(),
            }),
            captured,
            vision_time,
        };
        let mut bytes = postcard::to_stdvec(&letter).map_err(|error| RankError::Elsewhere(error.to_string()))?;
        let letter_bytes = bytes.len();
        for pixels in &pixels {
            bytes.extend(pixels.iter().flat_map(|value| value.to_le_bytes()));
        }
        bytes.extend(rows.iter().flat_map(|(_, rows)| &rows.bytes));
        let lengths = [letter_bytes as u64, bytes.len() as u64].map(u64::to_le_bytes).concat();
        let Shared { wire, sending, .. } = &*self.shared;
        let _alone = sending[process].lock().unwrap_or_else(PoisonError::into_inner);
        wire.send(process, LENGTHS, &lengths)?;
        Ok(wire.send(process, ENVELOPE, &bytes)?)
    }
}

impl Shared {
    /// Hands steps that come from process `from` to the ranks that they are for, until the run ends.
    fn take_envelopes<B: Portable>(&self, from: usize, doors: &Doors<B>) {
        loop {
            let mut lengths = [0; 16];
            // That the run is over, or has failed, is known elsewhere.
            if self.wire.recv(from, LENGTHS, &mut lengths).is_err() {
                return;
            }
            let [letter, total] = [0, 8].map(|at| {
                let bytes: [u8; 8] = lengths[at..at + 8].try_into().expect("eight of sixteen bytes");
                u64::from_le_bytes(bytes) as usize
            });
            if letter > total || total > MAX_ENVELOPE_BYTES {
                self.control.fail(&format!("process {from} announces a step of {total} bytes"));
                return;
            }
            let mut bytes = vec![0; total];
            if self.wire.recv(from, ENVELOPE, &mut bytes).is_err() {
                return;
            }
            if let Err(problem) = deliver(&bytes, letter, doors) {
                self.control.fail(&format!("a step from process {from}: {problem}"));
                return;
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
fn deliver<B: Portable>(bytes: &[u8], letter_bytes: usize, doors: &Doors<B>) -> Result<(), String> {
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
    let input = match rows {
        None => None,
        Some(RowsHeader { kind, dtype, columns, num_bytes }) => {
            let rows = HostRows { dtype, columns, bytes: take(num_bytes)?.to_vec() };
            let parcel = backend.unpack(rows).map_err(|error| error.to_string())?;
            Some(match kind {
                RowsKind::VitHidden => Crossing::VitHidden(parcel),
                RowsKind::VisionFeatures => Crossing::VisionFeatures(parcel),
                RowsKind::Hidden => Crossing::Hidden(parcel),
            })
        }
    };
    let envelope = Envelope::arrived(id, step, stage, input, captured, vision_time);
    doors.inboxes[rank].send(Message::Run(envelope)).map_err(|_| "its rank has stopped".to_owned())
}
