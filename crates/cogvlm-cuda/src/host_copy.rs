//! Copies from the host that nobody waits for: small ones, and those of weights.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

use cogvlm_backend::shape::{expect, unsupported};
use cogvlm_backend::{BackendError, HostWeight, MappedRows};
use cudarc::driver::sys::{self as cu, CUdeviceptr, CUstream};

use crate::device::{Event, Gpu};
use crate::registered::{self, Registered};

/// Bytes of one pinned slot.
const SLOT_BYTES: usize = 1 << 20;
/// Slots; a copy waits where all of them are under way.
const NUM_SLOTS: usize = 4;

/// Pinned host memory.
pub(crate) struct Pinned {
    gpu: Arc<Gpu>,
    pub(crate) address: *mut u8,
    pub(crate) length: usize,
}

// SAFETY: plain memory; who has it decides who writes to it.
unsafe impl Send for Pinned {}
// SAFETY: as above; without `&mut` there are only addresses.
unsafe impl Sync for Pinned {}

impl Pinned {
    pub(crate) fn new(gpu: &Arc<Gpu>, length: usize) -> Result<Self, BackendError> {
        gpu.bind()?;
        let mut address = std::ptr::null_mut();
        // SAFETY: the pointer is to a local variable; freed on drop. 1 is CU_MEMHOSTALLOC_PORTABLE.
        let result = unsafe { cu::cuMemHostAlloc(&raw mut address, length, 1) };
        crate::driver::check(result)
            .map_err(|reason| gpu.error(format!("{length} bytes of pinned host memory: {reason}")))?;
        Ok(Self { gpu: Arc::clone(gpu), address: address.cast(), length })
    }

    pub(crate) fn slice_mut(&mut self) -> &mut [u8] {
        // SAFETY: allocated by `new` with this length, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.length) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: allocated by `new`; owners wait for copies from it before they drop it.
            let _ = unsafe { cu::cuMemFreeHost(self.address.cast()) };
        }
    }
}

/// Copies bytes to the device through pinned slots, in the order of the compute stream.
pub(crate) struct Uploader {
    gpu: Arc<Gpu>,
    slots: Mutex<Slots>,
}

struct Slots {
    slots: Vec<(Pinned, Event)>,
    next: usize,
}

impl Uploader {
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<Self, BackendError> {
        let slot = || Ok((Pinned::new(gpu, SLOT_BYTES)?, Event::new(gpu, false)?));
        let slots = (0..NUM_SLOTS).map(|_| slot()).collect::<Result<_, BackendError>>()?;
        Ok(Self { gpu: Arc::clone(gpu), slots: Mutex::new(Slots { slots, next: 0 }) })
    }

    /// Copies `bytes` to `to`, which has room for them. They may be changed as soon as this returns.
    pub(crate) fn upload(&self, to: CUdeviceptr, bytes: &[u8]) -> Result<(), BackendError> {
        // Every step brings its tables.
        registered::note_work();
        self.gpu.bind()?;
        let mut guard = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let Slots { slots, next } = &mut *guard;
        for (index, piece) in bytes.chunks(SLOT_BYTES).enumerate() {
            let (pinned, free) = &mut slots[*next];
            *next = (*next + 1) % NUM_SLOTS;
            free.wait()?;
            pinned.slice_mut()[..piece.len()].copy_from_slice(piece);
            let to = to + (index * SLOT_BYTES) as CUdeviceptr;
            // SAFETY: the caller vouches for the destination; the slot is not written before its event has come.
            let result = unsafe {
                cu::cuMemcpyHtoDAsync_v2(to, pinned.address.cast_const().cast(), piece.len(), self.gpu.stream)
            };
            self.gpu.check(result)?;
            free.record(self.gpu.stream)?;
        }
        Ok(())
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        // The slots are freed next: nothing may still be copied from them.
        drop(self.gpu.synchronize());
    }
}

/// How the bytes of weights get to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadPath {
    /// What is fastest. Weights that are streamed come straight from mapped files that are in the page cache, once these
    /// are registered: where there are cores enough to copy through pinned memory until then, while nothing else is done.
    /// Weights that are loaded come through pinned memory where there are such cores, else like those.
    Auto,
    /// Straight from mapped files, wherever they are; where the driver refuses to register one, that is an error.
    Registered,
    /// Through pinned memory.
    Staged,
}

/// The stream in whose order a weight is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Queue {
    /// That of the operations.
    Compute,
    /// The one beside it.
    Copy,
}

impl Queue {
    pub(crate) fn stream(self, gpu: &Gpu) -> CUstream {
        match self {
            Self::Compute => gpu.stream,
            Self::Copy => gpu.copy_stream,
        }
    }
}

/// Most threads that copy one streamed weight into pinned memory, each through slots of its own: one alone copies at a
/// sixth of the rate of the link. (Weights that are loaded come from as many threads as load.)
const STREAM_LANES: usize = 12;
/// Pinned slots of such a thread: one is filled while the device copies from the other.
const LANE_SLOTS: usize = 2;
/// Bytes of such a slot.
const PIECE_BYTES: usize = 2 << 20;
/// Threads that register what is going to be streamed: more are no faster.
const PREPARING_THREADS: usize = 4;
/// Cores from which on weights are loaded through pinned memory, though their file is in the page cache: 8 threads
/// copy 41 to 45 GB/s, whatever the cache's pages are, where registering manages 14 to 17 of small pages and 38 to 46
/// of large ones (16 cores, H100).
const STAGING_CORES: usize = 8;

/// Copies weights to a device.
pub(crate) struct Loader {
    path: LoadPath,
    /// Whether there are cores enough to copy through pinned memory what is not registered yet.
    has_cores: bool,
    /// Threads that copy one streamed weight.
    stream_lanes: usize,
    gpu: Arc<Gpu>,
    /// Those that nobody uses now; allocated when they are needed first.
    lanes: Mutex<Vec<Lane>>,
    /// Started when a weight is streamed first.
    stagers: OnceLock<Stagers>,
    /// Mappings that copies of this device may be under way from, by address.
    registered: Mutex<HashMap<usize, Arc<Registered>>>,
}

/// The slots of one thread, each with the event that comes when it has been copied.
struct Lane {
    slots: Vec<(Pinned, Event)>,
    next: usize,
}

/// A copy in pieces that several threads take turns at.
struct Pieces {
    gpu: Arc<Gpu>,
    weight: HostWeight,
    range: Range<usize>,
    to: CUdeviceptr,
    queue: Queue,
    /// The piece that is next.
    next: AtomicUsize,
}

/// Threads that copy streamed weights into pinned memory, each through a lane of its own.
struct Stagers {
    inboxes: Vec<Sender<StagingJob>>,
    threads: Vec<JoinHandle<()>>,
}

struct StagingJob {
    pieces: Arc<Pieces>,
    done: Sender<Result<(), BackendError>>,
}

impl Stagers {
    /// Up to `num_threads`, as far as there are threads and pinned memory for them.
    fn start(gpu: &Arc<Gpu>, num_threads: usize) -> Self {
        let mut stagers = Self { inboxes: Vec::new(), threads: Vec::new() };
        for _ in 0..num_threads {
            let mut lane = match Lane::new(gpu) {
                Ok(lane) => lane,
                Err(error) => {
                    tracing::warn!(%error, threads = stagers.threads.len(), "less pinned memory to stream through");
                    break;
                }
            };
            let (inbox, jobs) = mpsc::channel::<StagingJob>();
            let work = move || {
                for StagingJob { pieces, done } in jobs {
                    // Who asked is gone only after a failure that it has told.
                    drop(done.send(lane.run(&pieces)));
                }
            };
            let Ok(thread) = std::thread::Builder::new().name("staging".to_owned()).spawn(work) else { break };
            stagers.inboxes.push(inbox);
            stagers.threads.push(thread);
        }
        stagers
    }

    /// Copies all pieces; `None` without any thread.
    fn run(&self, pieces: Pieces) -> Option<Result<(), BackendError>> {
        let gpu = Arc::clone(&pieces.gpu);
        let num_pieces = pieces.range.len().div_ceil(PIECE_BYTES);
        let (pieces, (done, outcomes)) = (Arc::new(pieces), mpsc::channel());
        let inboxes = &self.inboxes[..self.inboxes.len().min(num_pieces)];
        for inbox in inboxes {
            // A thread that has died leaves its pieces to the others, and is missed below.
            drop(inbox.send(StagingJob { pieces: Arc::clone(&pieces), done: done.clone() }));
        }
        drop(done);
        let died = || gpu.error("a thread that streams weights ended early");
        let result = |_| outcomes.recv().unwrap_or_else(|_| Err(died()));
        // All of them are waited for: pieces may be under way until the last one is done.
        let results: Vec<Result<(), BackendError>> = (0..inboxes.len()).map(result).collect();
        (!results.is_empty()).then(|| results.into_iter().collect())
    }
}

impl Drop for Stagers {
    fn drop(&mut self) {
        self.inboxes.clear();
        for thread in self.threads.drain(..) {
            // Whether it panicked was told to those who waited for it.
            drop(thread.join());
        }
    }
}

impl Loader {
    pub(crate) fn new(gpu: &Arc<Gpu>, path: LoadPath) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let (has_cores, stream_lanes) = (cores >= STAGING_CORES, cores.clamp(2, STREAM_LANES));
        let gpu = Arc::clone(gpu);
        let (lanes, stagers, registered) = (Mutex::default(), OnceLock::new(), Mutex::default());
        Self { path, has_cores, stream_lanes, gpu, lanes, stagers, registered }
    }

    /// Copies bytes `range` of `weight`, as they are stored, to `to`, in the order of `queue`. When this returns, also
    /// with an error, whatever the device still copies from stays as it is.
    ///
    /// # Safety
    /// `to` has room for them on this device until the stream is past the copy.
    pub(crate) unsafe fn copy(
        &self, weight: &HostWeight, range: Range<usize>, to: CUdeviceptr, queue: Queue,
    ) -> Result<(), BackendError> {
        self.gpu.bind()?;
        if queue == Queue::Copy {
            registered::note_work();
        }
        if range.is_empty() || self.copy_registered(weight, &range, to, queue)? {
            return Ok(());
        }
        self.copy_staged(weight, range, to, queue)
    }

    /// Registers where `weights` are mapped, as far as they are in the page cache, so that the device copies them at the
    /// full rate of the link from the first time on. Meanwhile nothing else may run: both would wait for each other in
    /// the driver. What cannot be registered is told when it is copied.
    pub(crate) fn prepare(&self, weights: &[HostWeight]) {
        let next = AtomicUsize::new(0);
        let register = || {
            while let Some(weight) = weights.get(next.fetch_add(1, Ordering::Relaxed)) {
                let (Some(bytes), Some(registered)) = (weight.mapped(), self.registered(weight)) else { continue };
                let (address, length) = (bytes.as_ptr().addr(), bytes.len());
                if length == 0 || !registered::is_resident(address, length) {
                    continue;
                }
                let start = address - registered.address();
                if registered.ensure(&(start..start + length)).is_err() {
                    return;
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..PREPARING_THREADS {
                // Without them it takes longer.
                drop(std::thread::Builder::new().name("registrar".to_owned()).spawn_scoped(scope, register));
            }
            register();
        });
    }

    /// Copies straight from the mapped file; `false` where it has to be staged.
    fn copy_registered(
        &self, weight: &HostWeight, range: &Range<usize>, to: CUdeviceptr, queue: Queue,
    ) -> Result<bool, BackendError> {
        let can_wait = self.path == LoadPath::Auto && self.has_cores;
        if can_wait && queue == Queue::Compute {
            return Ok(false);
        }
        let Some(runs) = runs_of(weight, range) else { return Ok(false) };
        let Some(registered) = self.registered(weight) else { return Ok(false) };
        let start_of = |run: &MappedRows<'_>| run.bytes.as_ptr().addr() - registered.address();
        let spans: Vec<Range<usize>> = runs.iter().map(|run| start_of(run)..start_of(run) + run.bytes.len()).collect();
        let is_there = spans.iter().all(|span| registered.covers(span));
        let is_resident = |span: &Range<usize>| registered::is_resident(registered.address() + span.start, span.len());
        if self.path == LoadPath::Auto && !is_there && !spans.iter().all(is_resident) {
            return Ok(false);
        }
        if can_wait && !is_there {
            spans.iter().for_each(|span| registered.begin(span));
            return Ok(false);
        }
        let outcome = spans.iter().try_for_each(|span| registered.ensure(span));
        // A file that was cut off cannot be registered either: then this is what went wrong.
        weight.verify()?;
        if let Err(reason) = outcome {
            if self.path == LoadPath::Registered {
                return Err(self.gpu.error(format!("registering the file of `{}`: {reason}", weight.name())));
            }
            registered.warn(weight.name(), &reason);
            return Ok(false);
        }
        let mut to = to;
        for (run, span) in runs.iter().zip(spans) {
            for piece in registered::row_pieces(span.start, run.num_rows(), run.width, run.pitch) {
                let (from, stream) = (registered.address() + piece.start, queue.stream(&self.gpu));
                // SAFETY: the piece lies in one registered window, which `self.registered` keeps until the device is
                // past all copies (`drop`); the caller vouches for the destination, which pieces fill one after the
                // other.
                unsafe { self.gpu.copy_rows_from_host(from, run.pitch, to, piece.num_rows, piece.width, stream) }?;
                to += (piece.num_rows * piece.width) as CUdeviceptr;
            }
        }
        Ok(true)
    }

    /// The registration of the mapping of `weight`, kept from now on; `None` where it is not to be registered.
    fn registered(&self, weight: &HostWeight) -> Option<Arc<Registered>> {
        if self.path == LoadPath::Staged {
            return None;
        }
        let address = weight.mapping()?.as_ptr().addr();
        let mut known = self.registered.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(registered) = known.get(&address) {
            return Some(Arc::clone(registered));
        }
        let registered = Registered::of(&self.gpu, weight)?;
        known.insert(address, Arc::clone(&registered));
        Some(registered)
    }

    /// Copies through pinned slots: loads on the thread that asks, of which there are several, and what is streamed by
    /// threads of its own.
    fn copy_staged(
        &self, weight: &HostWeight, range: Range<usize>, to: CUdeviceptr, queue: Queue,
    ) -> Result<(), BackendError> {
        let (gpu, weight, next) = (Arc::clone(&self.gpu), HostWeight::clone(weight), AtomicUsize::new(0));
        let pieces = Pieces { gpu, weight, range, to, queue, next };
        if queue == Queue::Copy {
            let stagers = self.stagers.get_or_init(|| Stagers::start(&self.gpu, self.stream_lanes));
            let (weight, range) = (HostWeight::clone(&pieces.weight), pieces.range.clone());
            let outcome = stagers.run(pieces);
            return outcome.unwrap_or_else(|| self.copy_pageable(&weight, range, to, queue));
        }
        let free = self.lanes.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut lane = match free.map_or_else(|| Lane::new(&self.gpu), Ok) {
            Ok(lane) => lane,
            Err(error) => {
                tracing::warn!(%error, "no pinned memory: copying weights from ordinary memory");
                return self.copy_pageable(&pieces.weight, pieces.range, to, queue);
            }
        };
        let result = lane.run(&pieces);
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner).push(lane);
        result
    }

    /// Copies from ordinary memory, which the driver copies once more: the last resort.
    fn copy_pageable(
        &self, weight: &HostWeight, range: Range<usize>, to: CUdeviceptr, queue: Queue,
    ) -> Result<(), BackendError> {
        let mut bytes = vec![0; PIECE_BYTES.min(range.len())];
        let copied = Event::new(&self.gpu, false)?;
        for offset in range.clone().step_by(PIECE_BYTES) {
            let piece = &mut bytes[..PIECE_BYTES.min(range.end - offset)];
            weight.read_at(offset, piece)?;
            let to = to + (offset - range.start) as CUdeviceptr;
            // SAFETY: the caller vouches for the destination; the source is left alone until the wait below.
            let result =
                unsafe { cu::cuMemcpyHtoDAsync_v2(to, piece.as_ptr().cast(), piece.len(), queue.stream(&self.gpu)) };
            self.gpu.check(result)?;
            copied.record(queue.stream(&self.gpu))?;
            copied.wait()?;
        }
        Ok(())
    }
}

/// Where bytes `range` of `weight` lie in mapped memory; of one whose bytes do not follow each other there, only all.
fn runs_of<'a>(weight: &'a HostWeight, range: &Range<usize>) -> Option<Vec<MappedRows<'a>>> {
    if let Some(bytes) = weight.mapped() {
        return Some(vec![MappedRows::one(&bytes[range.clone()])]);
    }
    let runs = weight.mapped_rows()?;
    let num_bytes = runs.iter().map(|run| run.num_rows() * run.width).sum();
    (*range == (0..num_bytes)).then_some(runs)
}

impl Drop for Loader {
    fn drop(&mut self) {
        let registered = self.registered.get_mut().unwrap_or_else(PoisonError::into_inner);
        for mapping in registered.values() {
            mapping.end_ahead();
        }
        // Slots are freed and mappings let go next: nothing may still be copied from them.
        drop(self.gpu.synchronize());
        drop(Event::new(&self.gpu, false).and_then(|event| {
            event.record(self.gpu.copy_stream)?;
            event.wait()
        }));
    }
}

impl Lane {
    fn new(gpu: &Arc<Gpu>) -> Result<Self, BackendError> {
        let slot = |_| Ok((Pinned::new(gpu, PIECE_BYTES)?, Event::new(gpu, false)?));
        Ok(Self { slots: (0..LANE_SLOTS).map(slot).collect::<Result<_, BackendError>>()?, next: 0 })
    }

    /// Copies pieces until none is left.
    fn run(&mut self, pieces: &Pieces) -> Result<(), BackendError> {
        let result = self.run_all(pieces);
        if result.is_err() {
            // The others need not go on.
            pieces.next.store(usize::MAX / 2, Ordering::Relaxed);
        }
        result
    }

    fn run_all(&mut self, pieces: &Pieces) -> Result<(), BackendError> {
        let Pieces { gpu, weight, range, to, queue, next } = pieces;
        gpu.bind()?;
        loop {
            let piece = next.fetch_add(1, Ordering::Relaxed);
            if piece >= range.len().div_ceil(PIECE_BYTES) {
                return Ok(());
            }
            let start = piece * PIECE_BYTES;
            let num_bytes = PIECE_BYTES.min(range.len() - start);
            let num_slots = self.slots.len();
            let (pinned, free) = &mut self.slots[self.next];
            self.next = (self.next + 1) % num_slots;
            free.wait()?;
            weight.read_at(range.start + start, &mut pinned.slice_mut()[..num_bytes])?;
            let (from, to) = (pinned.address.cast_const().cast(), to + start as CUdeviceptr);
            // SAFETY: the caller of `copy` vouches for the destination; the slot is not written to before its event has
            // come, and lives until the device is past all copies (`Loader::drop`).
            gpu.check(unsafe { cu::cuMemcpyHtoDAsync_v2(to, from, num_bytes, queue.stream(gpu)) })?;
            free.record(queue.stream(gpu))?;
        }
    }
}

/// Elements of `weight`; refuses one whose shape takes other bytes than it has mapped.
pub(crate) fn num_elements(op: &'static str, weight: &HostWeight) -> Result<usize, BackendError> {
    let (shape, size) = (weight.shape(), weight.dtype().size_bytes());
    let count = shape.iter().try_fold(1_usize, |count, &extent| count.checked_mul(extent));
    let count = count.filter(|count| count.checked_mul(size).is_some());
    let count = count.ok_or_else(|| unsupported(op, format!("`{}` of {shape:?} is too large", weight.name())))?;
    if let Some(bytes) = weight.mapped() {
        expect(op, "weight", shape, bytes.len() == count * size, || {
            format!("`{}` in {} bytes, its shape takes {}", weight.name(), bytes.len(), count * size)
        })?;
    }
    Ok(count)
}
