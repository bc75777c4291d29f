//! What is known of the run: who failed first, who has left, and what has to be woken when somebody fails.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::error::{ClusterError, Failure};

/// Something that may be waiting for another process.
pub trait Abort: Send + Sync {
    /// A process of the run has failed: wakes whoever waits. Returns at once; may come more than once.
    fn abort(&self);
    /// This process is about to leave: nothing more will be sent.
    fn finish(&self) {}
}

/// Knows the first failure of the run, and who has left. Shared by all connections of a process.
pub struct Watch {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    failure: Option<Arc<Failure>>,
    left: Vec<usize>,
    parts: Vec<Weak<dyn Abort>>,
}

/// What became of a process whose connection ended.
pub(crate) enum Verdict {
    /// The run failed, because of it or of another.
    Failed(Arc<Failure>),
    /// It said goodbye.
    Left,
    /// Nothing is known.
    Unknown,
}

/// A lock whose holders leave nothing half-done when they panic.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for at most `timeout`.
pub(crate) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>, timeout: Duration) -> MutexGuard<'a, T> {
    condvar.wait_timeout(guard, timeout).unwrap_or_else(PoisonError::into_inner).0
}

impl Watch {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(State::default()), changed: Condvar::new() })
    }

    /// The first failure of the run, where there was one.
    pub fn failure(&self) -> Option<Arc<Failure>> {
        lock(&self.state).failure.clone()
    }

    /// An error if a process of the run has failed.
    ///
    /// # Errors
    /// [`ClusterError::Failed`]
    pub fn check(&self) -> Result<(), ClusterError> {
        self.failure().map_or(Ok(()), |failure| Err(ClusterError::Failed(failure)))
    }

    /// Whether a process has ended its part of the run.
    pub fn has_left(&self, rank: usize) -> bool {
        lock(&self.state).left.contains(&rank)
    }

    /// Has `part` aborted when a process fails; at once if one has.
    pub fn register(&self, part: Weak<dyn Abort>) {
        let mut state = lock(&self.state);
        if state.failure.is_none() {
            state.parts.retain(|known| known.strong_count() > 0);
            state.parts.push(part);
            return;
        }
        drop(state);
        if let Some(part) = part.upgrade() {
            part.abort();
        }
    }

    /// Whether this failure is the first, which is the one that counts.
    pub(crate) fn fail(&self, failure: Failure) -> bool {
        let mut state = lock(&self.state);
        if state.failure.is_some() {
            return false;
        }
        tracing::debug!(%failure, "a process failed");
        state.failure = Some(Arc::new(failure));
        let parts = std::mem::take(&mut state.parts);
        drop(state);
        self.changed.notify_all();
        for part in parts.iter().filter_map(Weak::upgrade) {
            part.abort();
        }
        true
    }

    pub(crate) fn leave(&self, rank: usize) {
        let mut state = lock(&self.state);
        if !state.left.contains(&rank) {
            state.left.push(rank);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Tells all parts that this process is about to leave.
    pub(crate) fn finish(&self) {
        let parts: Vec<_> = lock(&self.state).parts.iter().filter_map(Weak::upgrade).collect();
        for part in parts {
            part.finish();
        }
    }

    /// Waits until all of `ranks` have left.
    pub(crate) fn wait_left(&self, ranks: &[usize]) -> Result<(), ClusterError> {
        let mut state = lock(&self.state);
        loop {
            if let Some(failure) = &state.failure {
                return Err(ClusterError::Failed(Arc::clone(failure)));
            }
            if ranks.iter().all(|rank| state.left.contains(rank)) {
                return Ok(());
            }
            state = wait(&self.changed, state, Duration::from_secs(1));
        }
    }

    /// What became of process `rank`; waits at most `patience` until something is known.
    pub(crate) fn verdict(&self, rank: usize, patience: Duration) -> Verdict {
        let deadline = Instant::now() + patience;
        let mut state = lock(&self.state);
        loop {
            if let Some(failure) = &state.failure {
                return Verdict::Failed(Arc::clone(failure));
            }
            if state.left.contains(&rank) {
                return Verdict::Left;
            }
            let remaining = deadline.saturating_duration_since(Instant::now());
            if remaining.is_zero() {
                return Verdict::Unknown;
            }
            state = wait(&self.changed, state, remaining);
        }
    }
}
