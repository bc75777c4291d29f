//! How a long job tells of its progress and is asked to stop.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Bytes done so far, of all bytes that the job will handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
}

/// What a long job reports to, and what it asks whether to go on. Both are used from many threads, every few megabytes.
#[derive(Clone, Copy)]
pub struct Monitor<'a> {
    /// Called after every chunk.
    pub on_progress: &'a (dyn Fn(Progress) + Sync),
    /// Set it to true, and the job ends within a chunk and leaves nothing half-written.
    pub cancel: &'a AtomicBool,
}

impl Monitor<'static> {
    /// Reports to nobody and is never cancelled.
    pub fn silent() -> Self {
        static NEVER: AtomicBool = AtomicBool::new(false);
        Self { on_progress: &|_| (), cancel: &NEVER }
    }
}

/// The job was asked to stop through [`Monitor::cancel`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cancelled")]
pub struct Cancelled;

/// Counts the bytes of one job.
pub(crate) struct Meter<'a> {
    monitor: &'a Monitor<'a>,
    done_bytes: AtomicU64,
    total_bytes: u64,
}

impl<'a> Meter<'a> {
    pub(crate) fn new(monitor: &'a Monitor<'a>, total_bytes: u64) -> Self {
        Self { monitor, done_bytes: AtomicU64::new(0), total_bytes }
    }

    pub(crate) fn check(&self) -> Result<(), Cancelled> {
        if self.monitor.cancel.load(Ordering::Relaxed) { Err(Cancelled) } else { Ok(()) }
    }

    pub(crate) fn advance(&self, bytes: usize) {
        let done_bytes = self.done_bytes.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        (self.monitor.on_progress)(Progress { done_bytes, total_bytes: self.total_bytes });
    }
}
