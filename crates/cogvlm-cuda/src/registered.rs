//! Mapped files registered with the driver, so that a device copies straight from the page cache.
//!
//! A mapping is registered in windows, as weights of it are asked for and a little ahead of that. All devices of the
//! process share one registration; it ends, and lets go of the mapping, when the last of them does.

use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cogvlm_backend::HostWeight;
use cudarc::driver::sys as cu;

use crate::device::Gpu;

/// Bytes registered by one call of the driver, which takes 1 to 3 ms.
pub(crate) const WINDOW_BYTES: usize = 32 << 20;
/// Windows beyond those asked for that are registered meanwhile, where who asks waits.
const WINDOWS_AHEAD: usize = 8;
/// Threads that do so: one registers half as fast as the link copies.
const THREADS: usize = 3;
/// What can wait is registered only when no GPU has been given work for this long. Meanwhile both would wait for each other
/// in the driver: decoding took 39 ms a token in place of 5, an image 2.6 s in place of 0.4 (H100, 13.5 GB/s).
const QUIET: Duration = Duration::from_millis(100);

/// Milliseconds from the first use of this to the last work that a GPU was given.
static LAST_WORK: AtomicU64 = AtomicU64::new(0);

fn since_first_use() -> u64 {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    FIRST.get_or_init(Instant::now).elapsed().as_millis() as u64
}

/// Says that a GPU is given work.
pub(crate) fn note_work() {
    LAST_WORK.store(since_first_use(), Ordering::Relaxed);
}

/// Flags of `cuMemHostRegister_v2`: for all contexts; memory that cannot be written to.
const PORTABLE: u32 = 1;
const READ_ONLY: u32 = 8;
/// Pages looked at to tell whether a range is in memory.
const SAMPLES: usize = 64;

/// Bytes that all registrations hold now: pages that the system cannot take back.
static HELD_BYTES: AtomicUsize = AtomicUsize::new(0);

// Of the C library, which the standard library links.
unsafe extern "C" {
    fn mincore(address: *mut c_void, length: usize, states: *mut u8) -> c_int;
    fn getpagesize() -> c_int;
}

/// One mapping.
pub(crate) struct Registered {
    /// In whose context it is registered.
    gpu: Arc<Gpu>,
    /// Keeps the mapping.
    _owner: HostWeight,
    address: usize,
    /// Whole pages.
    num_bytes: usize,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    windows: Vec<Window>,
    /// Why the driver refused one of them; it is asked for no other then.
    refused: Option<String>,
    is_warned: bool,
    /// Windows to register in the background, in this order.
    wanted: VecDeque<usize>,
    threads: Vec<JoinHandle<()>>,
    /// Whether what is wanted can wait until nothing else is done.
    is_patient: bool,
    /// Threads that will look into `wanted` again.
    num_looking: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Window {
    Untouched,
    /// Some thread is at it.
    Busy,
    Registered,
}

impl Registered {
    /// The registration of the mapping that `weight` lies in; begun by `gpu` where there is none. `None` where it lies in
    /// no mapping.
    pub(crate) fn of(gpu: &Arc<Gpu>, weight: &HostWeight) -> Option<Arc<Self>> {
        static KNOWN: Mutex<Vec<Weak<Registered>>> = Mutex::new(Vec::new());
        let mapping = weight.mapping()?;
        let address = mapping.as_ptr().addr();
        if mapping.is_empty() || !address.is_multiple_of(page_bytes()) {
            return None;
        }
        let num_bytes = mapping.len().next_multiple_of(page_bytes());
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|registered| registered.strong_count() > 0);
        // Who is registered keeps its mapping: no other can have come to lie at its address.
        let mut living = known.iter().filter_map(Weak::upgrade);
        if let Some(found) = living.find(|found| found.address == address && found.num_bytes == num_bytes) {
            return Some(found);
        }
        let state = State {
            windows: vec![Window::Untouched; num_bytes.div_ceil(WINDOW_BYTES)],
            refused: None,
            is_warned: false,
            wanted: VecDeque::new(),
            threads: Vec::new(),
            is_patient: false,
            num_looking: 0,
        };
        let begun = Arc::new(Self {
            gpu: Arc::clone(gpu),
            _owner: HostWeight::clone(weight),
            address,
            num_bytes,
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        known.push(Arc::downgrade(&begun));
        Some(begun)
    }

    pub(crate) fn address(&self) -> usize {
        self.address
    }

    /// Whether bytes `span` of the mapping are registered.
    pub(crate) fn covers(&self, span: &Range<usize>) -> bool {
        let state = self.lock();
        state.windows[windows(span)].iter().all(|window| *window == Window::Registered)
    }

    /// Registers bytes `span` of the mapping, and what follows in the background. An error says why it cannot.
    pub(crate) fn ensure(self: &Arc<Self>, span: &Range<usize>) -> Result<(), String> {
        let end = windows(span).end;
        self.want(end..end + WINDOWS_AHEAD, THREADS);
        windows(span).try_for_each(|window| self.ensure_window(window))
    }

    /// Registers bytes `span` of the mapping in the background, when nothing else is done.
    pub(crate) fn begin(self: &Arc<Self>, span: &Range<usize>) {
        self.lock().is_patient = true;
        self.want(windows(span), 1);
    }

    /// Says once that the mapping cannot be registered.
    pub(crate) fn warn(&self, tensor: &str, reason: &str) {
        let mut state = self.lock();
        if !std::mem::replace(&mut state.is_warned, true) {
            tracing::warn!(
                tensor,
                reason,
                "the weight file cannot be registered with the driver: copying it in pieces"
            );
        }
    }

    /// Ends the threads that register ahead.
    pub(crate) fn end_ahead(&self) {
        let mut state = self.lock();
        state.wanted.clear();
        let threads = std::mem::take(&mut state.threads);
        drop(state);
        for thread in threads {
            // One that panicked registers nothing any more, which is all that is asked for here.
            drop(thread.join());
        }
    }

    /// Lets threads register those of `windows` that nobody has registered or asked for yet.
    fn want(self: &Arc<Self>, windows: Range<usize>, num_threads: usize) {
        let mut state = self.lock();
        if state.refused.is_some() {
            return;
        }
        let windows = windows.start..windows.end.min(state.windows.len());
        let is_new = |window: &usize| state.windows[*window] == Window::Untouched && !state.wanted.contains(window);
        let new: Vec<usize> = windows.filter(is_new).collect();
        if new.is_empty() {
            return;
        }
        state.wanted.extend(new);
        state.threads.retain(|thread| !thread.is_finished());
        while state.num_looking < num_threads {
            let registered = Arc::clone(self);
            let builder = std::thread::Builder::new().name("registrar".to_owned());
            // Without such a thread windows are registered when they are asked for, or not at all.
            let Ok(thread) = builder.spawn(move || registered.register_wanted()) else { break };
            state.num_looking += 1;
            state.threads.push(thread);
        }
    }

    fn register_wanted(&self) {
        loop {
            let mut state = self.lock();
            let quiet_for = since_first_use().saturating_sub(LAST_WORK.load(Ordering::Relaxed));
            if state.is_patient && !state.wanted.is_empty() && u128::from(quiet_for) < QUIET.as_millis() {
                drop(state);
                std::thread::sleep(QUIET / 4);
                continue;
            }
            let Some(window) = state.wanted.pop_front() else {
                state.num_looking -= 1;
                return;
            };
            let is_wanted = state.windows[window] == Window::Untouched && state.refused.is_none();
            drop(state);
            let (start, num_bytes) = self.extent(window);
            if is_wanted && is_resident(start, num_bytes) {
                // A refusal is kept, and told to whoever asks for the window.
                drop(self.ensure_window(window));
            }
        }
    }

    fn ensure_window(&self, window: usize) -> Result<(), String> {
        let mut state = self.lock();
        loop {
            match state.windows[window] {
                Window::Registered => return Ok(()),
                Window::Busy => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Window::Untouched => {
                    if let Some(reason) = &state.refused {
                        return Err(reason.clone());
                    }
                    state.windows[window] = Window::Busy;
                    drop(state);
                    let result = self.register(window);
                    state = self.lock();
                    state.windows[window] = if result.is_ok() { Window::Registered } else { Window::Untouched };
                    if let Err(reason) = result {
                        state.refused.get_or_insert(reason);
                    }
                    self.changed.notify_all();
                }
            }
        }
    }

    fn register(&self, window: usize) -> Result<(), String> {
        let (address, num_bytes) = self.extent(window);
        self.gpu.bind().map_err(|error| error.to_string())?;
        let limit = held_limit();
        if HELD_BYTES.fetch_add(num_bytes, Ordering::Relaxed) + num_bytes > limit {
            HELD_BYTES.fetch_sub(num_bytes, Ordering::Relaxed);
            let limit = cogvlm_core::memory::format_bytes(limit as u64);
            return Err(format!("{limit}, three quarters of the memory that was free for it, are registered already"));
        }
        // SAFETY: the range lies in the mapping, rounded up to whole pages, which `_owner` keeps until `drop` has
        // unregistered it.
        let result = unsafe { cu::cuMemHostRegister_v2(address as *mut c_void, num_bytes, PORTABLE | READ_ONLY) };
        crate::driver::check(result).inspect_err(|_| {
            HELD_BYTES.fetch_sub(num_bytes, Ordering::Relaxed);
        })
    }

    /// Address and length of a window.
    fn extent(&self, window: usize) -> (usize, usize) {
        let start = window * WINDOW_BYTES;
        (self.address + start, WINDOW_BYTES.min(self.num_bytes - start))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Registered {
    /// Nothing is copied from it any more: who copies holds it until the copies are done.
    fn drop(&mut self) {
        if self.gpu.bind().is_err() {
            return;
        }
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let registered = state.windows.iter().enumerate().filter(|(_, window)| **window == Window::Registered);
        let registered: Vec<usize> = registered.map(|(window, _)| window).collect();
        for window in registered {
            let (address, num_bytes) = self.extent(window);
            // SAFETY: `register` registered exactly this address. What fails here is undone when the process ends.
            let _ = unsafe { cu::cuMemHostUnregister(address as *mut c_void) };
            HELD_BYTES.fetch_sub(num_bytes, Ordering::Relaxed);
        }
    }
}

/// The windows that hold bytes `span` of a mapping.
fn windows(span: &Range<usize>) -> Range<usize> {
    span.start / WINDOW_BYTES..span.end.div_ceil(WINDOW_BYTES)
}

/// Rows that are copied at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowPiece {
    /// Where the first one begins in the mapping.
    pub(crate) start: usize,
    pub(crate) num_rows: usize,
    /// Bytes of each.
    pub(crate) width: usize,
}

/// Cuts `num_rows` rows of `width` bytes, which begin at `start` of a mapping and lie `pitch` apart, at the borders of
/// windows: the driver copies from one registration at a time. Rows that a border goes through are cut by themselves.
pub(crate) fn row_pieces(start: usize, num_rows: usize, width: usize, pitch: usize) -> Vec<RowPiece> {
    let mut pieces = Vec::new();
    let (mut row, mut within) = (0, 0);
    while row < num_rows && width > 0 {
        let begin = start + row * pitch + within;
        let room = (begin / WINDOW_BYTES + 1) * WINDOW_BYTES - begin;
        if within == 0 && room >= width {
            let count = ((room - width) / pitch + 1).min(num_rows - row);
            pieces.push(RowPiece { start: begin, num_rows: count, width });
            row += count;
            continue;
        }
        let length = room.min(width - within);
        pieces.push(RowPiece { start: begin, num_rows: 1, width: length });
        within += length;
        if within == width {
            (row, within) = (row + 1, 0);
        }
    }
    pieces
}

/// Whether most of a range of mapped memory is in the page cache. (Where the system does not tell, since the file is
/// somebody else's, it says yes, and the driver reads the file.)
pub(crate) fn is_resident(address: usize, num_bytes: usize) -> bool {
    let page = page_bytes();
    let (first, end) = (address / page, (address + num_bytes).div_ceil(page));
    let num_samples = SAMPLES.min(end - first);
    let is_page_resident = |sample: &usize| {
        let address = (first + sample * (end - first) / num_samples) * page;
        let mut state = 0;
        // SAFETY: one page is asked about, so one byte is written; the system checks the address.
        let result = unsafe { mincore(address as *mut c_void, page, &raw mut state) };
        result == 0 && state & 1 == 1
    };
    (0..num_samples).filter(is_page_resident).count() * 2 >= num_samples
}

fn page_bytes() -> usize {
    // SAFETY: asks a constant of the system.
    unsafe { getpagesize() as usize }
}

/// Most that is registered at a time: three quarters of the memory that was available at first. Where the system does
/// not say, there is no limit.
fn held_limit() -> usize {
    static LIMIT: OnceLock<usize> = OnceLock::new();
    *LIMIT.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
        let kib = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<usize>().ok());
        kib.map_or(usize::MAX, |kib| kib * 1024 / 4 * 3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pieces as start, rows and width of each.
    fn pieces(start: usize, num_rows: usize, width: usize, pitch: usize) -> Vec<[usize; 3]> {
        row_pieces(start, num_rows, width, pitch)
            .iter()
            .map(|piece| [piece.start, piece.num_rows, piece.width])
            .collect()
    }

    #[test]
    fn pieces_end_at_windows() {
        const W: usize = WINDOW_BYTES;
        let one = |start, length| pieces(start, 1, length, length);
        assert_eq!(one(3, 2), [[3, 1, 2]]);
        assert_eq!(one(0, W), [[0, 1, W]]);
        assert_eq!(one(W - 1, 2), [[W - 1, 1, 1], [W, 1, 1]]);
        assert_eq!(one(5, 2 * W + 2), [[5, 1, W - 5], [W, 1, W], [2 * W, 1, 7]]);
        assert!(one(7, 0).is_empty());
        assert_eq!(windows(&(W..2 * W)), 1..2);
        // Rows of 10 bytes, 100 apart: one ends where a window does, one goes across, one begins behind.
        assert_eq!(pieces(W - 110, 3, 10, 100), [[W - 110, 2, 10], [W + 90, 1, 10]]);
        assert_eq!(pieces(W - 104, 3, 10, 100), [[W - 104, 1, 10], [W - 4, 1, 4], [W, 1, 6], [W + 96, 1, 10]]);
    }

    #[test]
    fn pieces_are_all_rows_in_order() {
        const W: usize = WINDOW_BYTES;
        for (start, num_rows, width, pitch) in [(0, 9, W / 3, W / 2), (17, 5, W + 3, W + 3), (W - 5, 4, 2 * W, 3 * W)] {
            let mut bytes = Vec::new();
            for piece in row_pieces(start, num_rows, width, pitch) {
                for row in 0..piece.num_rows {
                    let begin = piece.start + row * pitch;
                    assert_eq!(begin / W, (begin + piece.width - 1) / W, "{piece:?} goes across a border");
                    bytes.push(begin..begin + piece.width);
                }
            }
            // Joined where one follows the other, these are the rows.
            let mut rows = Vec::new();
            for span in bytes {
                match rows.last_mut() {
                    Some(Range { end, start }) if *end == span.start && *end - *start < width => *end = span.end,
                    _ => rows.push(span),
                }
            }
            let expected: Vec<_> = (0..num_rows).map(|row| start + row * pitch..start + row * pitch + width).collect();
            assert_eq!(rows, expected);
        }
    }

    #[test]
    fn memory_that_was_written_to_is_resident() {
        let bytes = vec![1_u8; 1 << 20];
        // Anonymous memory is told by its page tables.
        assert!(is_resident(bytes.as_ptr().addr(), bytes.len()));
        assert!(is_resident(bytes.as_ptr().addr(), 1));
    }
}
