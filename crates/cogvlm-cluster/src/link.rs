//! One control connection: a queue that a thread of its own writes out, and signs of life in both directions.

use std::collections::VecDeque;
use std::io::Read;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::frame::{Kind, write_frame};
use crate::watch::{lock, wait};

/// Bytes that may wait to be written before whoever adds more has to wait.
const MAX_QUEUED_BYTES: usize = 64 << 20;

/// A control connection.
pub(crate) struct Link {
    stream: TcpStream,
    outbox: Mutex<Outbox>,
    changed: Condvar,
    start: Instant,
    /// Milliseconds from `start` to the last byte that came.
    heard_ms: AtomicU64,
}

#[derive(Default)]
struct Outbox {
    queue: VecDeque<Outgoing>,
    num_bytes: usize,
    /// Nothing more is taken; what is queued is still written.
    is_closing: bool,
    /// The writer has written everything, or cannot.
    is_written: bool,
    /// Nothing more will come.
    is_read: bool,
}

/// A frame to be written.
#[derive(Clone)]
pub(crate) struct Outgoing {
    pub(crate) kind: Kind,
    pub(crate) code: u16,
    pub(crate) payload: Arc<[u8]>,
}

impl Outgoing {
    pub(crate) fn new(kind: Kind, payload: impl Into<Arc<[u8]>>) -> Self {
        Self { kind, code: 0, payload: payload.into() }
    }
}

impl Link {
    pub(crate) fn new(stream: TcpStream) -> Self {
        let (outbox, changed, heard_ms) = (Mutex::default(), Condvar::new(), AtomicU64::new(0));
        Self { stream, outbox, changed, start: Instant::now(), heard_ms }
    }

    /// Queues a frame; waits while the queue is full and `may_wait` says so. Dropped where the connection is closing.
    pub(crate) fn push(&self, frame: Outgoing, may_wait: &dyn Fn() -> bool) {
        let mut outbox = lock(&self.outbox);
        while outbox.num_bytes > MAX_QUEUED_BYTES && !outbox.is_closing && may_wait() {
            outbox = wait(&self.changed, outbox, Duration::from_millis(50));
        }
        if !outbox.is_closing {
            outbox.num_bytes += frame.payload.len();
            outbox.queue.push_back(frame);
        }
        drop(outbox);
        self.changed.notify_all();
    }

    /// Writes `frame` before anything that is still queued, which is dropped, and ends this direction.
    pub(crate) fn last_words(&self, frame: Option<Outgoing>) {
        let mut outbox = lock(&self.outbox);
        if !outbox.is_closing {
            outbox.is_closing = true;
            outbox.queue.clear();
            outbox.queue.extend(frame);
        }
        drop(outbox);
        self.changed.notify_all();
    }

    /// Writes what is queued, and a heartbeat whenever nothing was for `interval`, until the connection closes.
    pub(crate) fn write(&self, interval: Duration) {
        let heartbeat = Outgoing::new(Kind::Heartbeat, []);
        let mut sequence = 0;
        while let Some(frame) = self.next(interval, &heartbeat) {
            let Outgoing { kind, code, payload } = frame;
            // What went wrong is told by the direction that reads.
            if write_frame(&mut &self.stream, kind, code, 0, sequence, &payload).is_err() {
                break;
            }
            sequence += 1;
        }
        drop(self.stream.shutdown(Shutdown::Write));
        let mut outbox = lock(&self.outbox);
        outbox.is_closing = true;
        outbox.is_written = true;
        drop(outbox);
        self.changed.notify_all();
    }

    fn next(&self, interval: Duration, heartbeat: &Outgoing) -> Option<Outgoing> {
        let deadline = Instant::now() + interval;
        let mut outbox = lock(&self.outbox);
        loop {
            if let Some(frame) = outbox.queue.pop_front() {
                outbox.num_bytes = outbox.num_bytes.saturating_sub(frame.payload.len());
                drop(outbox);
                self.changed.notify_all();
                return Some(frame);
            }
            if outbox.is_closing {
                return None;
            }
            let remaining = deadline.saturating_duration_since(Instant::now());
            if remaining.is_zero() {
                return Some(heartbeat.clone());
            }
            outbox = wait(&self.changed, outbox, remaining);
        }
    }

    /// What comes in; every byte is a sign of life.
    pub(crate) fn reader(&self) -> impl Read + '_ {
        std::io::BufReader::with_capacity(64 << 10, Heard(self))
    }

    /// Nothing more will come.
    pub(crate) fn end_reading(&self) {
        lock(&self.outbox).is_read = true;
        self.changed.notify_all();
    }

    pub(crate) fn has_ended(&self) -> bool {
        lock(&self.outbox).is_read
    }

    pub(crate) fn mark_heard(&self) {
        self.heard_ms.store(self.start.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// For how long nothing has come.
    pub(crate) fn silent_for(&self) -> Duration {
        let heard = Duration::from_millis(self.heard_ms.load(Ordering::Relaxed));
        self.start.elapsed().saturating_sub(heard)
    }

    /// Waits until everything is with the system, and where the other side answers until it has ended the connection; at
    /// most until `deadline`.
    pub(crate) fn wait_ended(&self, answers: bool, deadline: Instant) {
        let mut outbox = lock(&self.outbox);
        while !(outbox.is_written && (outbox.is_read || !answers)) {
            let remaining = deadline.saturating_duration_since(Instant::now());
            if remaining.is_zero() {
                return;
            }
            outbox = wait(&self.changed, outbox, remaining);
        }
    }

    /// Ends both directions; whoever reads or writes returns.
    pub(crate) fn shut_down(&self) {
        drop(self.stream.shutdown(Shutdown::Both));
        self.last_words(None);
    }
}

struct Heard<'a>(&'a Link);

impl Read for Heard<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = (&self.0.stream).read(buffer)?;
        self.0.mark_heard();
        Ok(count)
    }
}
