//! Threads that share operations. A decoded token is some hundreds of operations of a few microseconds to a millisecond
//! each, so that what it takes to bring threads together counts: they wait awake for the next one for a while.
#![expect(unsafe_code, reason = "threads that outlive an operation are lent what it borrows")]

use std::cell::UnsafeCell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread waits awake for the next operation: longer than the host needs between two of them.
const AWAKE: Duration = Duration::from_micros(100);
/// Looks at what is waited for before others on the core are let through.
const EAGER_LOOKS: u32 = 200;

/// Threads that run the operations of one device, or of several virtual ranks: as many as asked for, with the thread
/// that calls. Ranks take turns, operation by operation.
pub struct Threads {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// Held by whom the helpers work for.
    turn: Mutex<()>,
}

struct Shared {
    /// Number of the operation from bit [`NUMBER`] on, whether helpers may still join it ([`OPEN`]), and how many have
    /// joined and are not done.
    state: AtomicU64,
    /// What the operation is; helpers that have joined it may use it.
    work: UnsafeCell<Option<Work>>,
    is_over: AtomicBool,
    has_panicked: AtomicBool,
    /// Helpers that have to be woken.
    asleep: AtomicUsize,
    gate: Mutex<()>,
    wake: Condvar,
}

/// Lent by [`Threads::run`] until no helper has it any more.
type Work = *const (dyn Fn() + Sync);

const OPEN: u64 = 1 << 31;
const JOINED: u64 = OPEN - 1;
const NUMBER: u32 = 32;

// SAFETY: `work` is written by the thread that has the turn, while no helper has joined, and read by helpers that have;
// it points to what may be called from any thread. All else is atomic or locked.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Threads {
    /// `num_threads` threads, the caller of an operation among them; 0 stands for one on each core.
    ///
    /// # Errors
    /// Where the system starts no more threads.
    pub fn new(num_threads: usize) -> io::Result<Self> {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let num_threads = if num_threads == 0 { cores() } else { num_threads };
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            work: UnsafeCell::new(None),
            is_over: AtomicBool::new(false),
            has_panicked: AtomicBool::new(false),
            asleep: AtomicUsize::new(0),
            gate: Mutex::new(()),
            wake: Condvar::new(),
        });
        let mut threads = Self { shared, helpers: Vec::new(), turn: Mutex::new(()) };
        for index in 1..num_threads {
            let shared = Arc::clone(&threads.shared);
            let builder = std::thread::Builder::new().name(format!("cpu-{index}"));
            threads.helpers.push(builder.spawn(move || shared.help())?);
        }
        Ok(threads)
    }

    /// How many they are, with the caller of an operation.
    pub fn num_threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Runs `task` for every index below `num_tasks`. Which thread runs which index is left to chance, so a task must not
    /// depend on it.
    pub(crate) fn for_each(&self, num_tasks: usize, task: impl Fn(usize) + Sync) {
        if num_tasks < 2 || self.helpers.is_empty() {
            return (0..num_tasks).for_each(task);
        }
        let next = AtomicUsize::new(0);
        self.run(&|| {
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= num_tasks {
                    break;
                }
                task(index);
            }
        });
    }

    /// Calls `work` on this thread, and on every helper that comes before this thread is done.
    fn run(&self, work: &(dyn Fn() + Sync)) {
        /// Lets no helper join any more, and waits for those that have: also where the caller's own part panics.
        struct End<'a>(&'a Shared);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.state.fetch_and(!OPEN, Ordering::AcqRel);
                let mut looks = 0;
                while self.0.state.load(Ordering::Acquire) & JOINED != 0 {
                    pause(&mut looks);
                }
            }
        }
        let shared = &*self.shared;
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: this thread has the turn, and no helper has joined: the last operation waited for all that had. What
        // is lent is given back by `End`, before this call ends.
        unsafe { *shared.work.get() = Some(std::mem::transmute::<&(dyn Fn() + Sync), Work>(work)) };
        let number = (shared.state.load(Ordering::Relaxed) >> NUMBER).wrapping_add(1);
        shared.state.store(number << NUMBER | OPEN, Ordering::Release);
        let end = End(shared);
        // Either this sees who has fallen asleep, or they see the new state (`sleep`).
        fence(Ordering::SeqCst);
        if shared.asleep.load(Ordering::Relaxed) > 0 {
            drop(shared.gate.lock().unwrap_or_else(PoisonError::into_inner));
            shared.wake.notify_all();
        }
        work();
        drop(end);
        if shared.has_panicked.swap(false, Ordering::Relaxed) {
            resume_unwind(Box::new("a thread of an operation panicked; its own message stands above"));
        }
    }
}

impl Shared {
    /// A helper's life.
    fn help(&self) {
        let mut last = 0;
        while let Some(state) = self.next_operation(last) {
            if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                // Others joined or left at the same time, or it is over.
                continue;
            }
            last = state >> NUMBER;
            // SAFETY: joined, so that whoever lends the work waits for this thread.
            let work = unsafe { (*self.work.get()).map(|work| &*work) };
            if catch_unwind(AssertUnwindSafe(|| work.map(|work| work()))).is_err() {
                self.has_panicked.store(true, Ordering::Relaxed);
            }
            self.state.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Waits for an operation after number `last` that can be joined; `None` at the end.
    fn next_operation(&self, last: u64) -> Option<u64> {
        let (mut looks, mut since) = (0, None);
        loop {
            let state = self.state.load(Ordering::Acquire);
            if state >> NUMBER != last && state & OPEN != 0 {
                return Some(state);
            }
            if self.is_over.load(Ordering::Relaxed) {
                return None;
            }
            pause(&mut looks);
            if looks > EAGER_LOOKS && since.get_or_insert_with(Instant::now).elapsed() > AWAKE {
                self.sleep(last);
                (looks, since) = (0, None);
            }
        }
    }

    /// Sleeps until there is an operation after number `last`, or no more.
    fn sleep(&self, last: u64) {
        let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        self.asleep.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let is_quiet = || {
            let state = self.state.load(Ordering::Acquire);
            (state >> NUMBER == last || state & OPEN == 0) && !self.is_over.load(Ordering::Relaxed)
        };
        while is_quiet() {
            gate = self.wake.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        self.asleep.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Between two looks at what is waited for.
fn pause(looks: &mut u32) {
    *looks = looks.saturating_add(1);
    if *looks < EAGER_LOOKS { std::hint::spin_loop() } else { std::thread::yield_now() }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Relaxed);
        drop(self.shared.gate.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.wake.notify_all();
        for helper in self.helpers.drain(..) {
            // What panics in it is caught.
            drop(helper.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[test]
    fn every_task_runs_once() {
        for num_threads in [1, 2, 5] {
            let threads = Threads::new(num_threads).unwrap();
            assert_eq!(threads.num_threads(), num_threads);
            for num_tasks in [0, 1, 2, 1000] {
                let seen = Mutex::new(Vec::new());
                threads.for_each(num_tasks, |index| seen.lock().unwrap().push(index));
                let mut seen = seen.into_inner().unwrap();
                seen.sort_unstable();
                assert_eq!(seen, (0..num_tasks).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn ranks_take_turns() {
        let threads = Threads::new(3).unwrap();
        std::thread::scope(|scope| {
            for rank in 0..4 {
                let threads = &threads;
                scope.spawn(move || {
                    for turn in 0..300 {
                        let results: Vec<AtomicU32> = (0..20).map(|_| AtomicU32::new(0)).collect();
                        threads.for_each(20, |index| {
                            results[index].fetch_add(rank * 1000 + turn + index as u32, Ordering::Relaxed);
                        });
                        for (index, result) in results.iter().enumerate() {
                            assert_eq!(result.load(Ordering::Relaxed), rank * 1000 + turn + index as u32);
                        }
                        // Now and then for so long that helpers fall asleep.
                        if turn % 100 == 99 {
                            std::thread::sleep(3 * AWAKE);
                        }
                    }
                });
            }
        });
    }

    #[test]
    fn a_task_that_panics_is_told_and_harms_nobody() {
        let threads = Threads::new(3).unwrap();
        for bad in [0, 57, 99] {
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                threads.for_each(100, |index| assert!(index != bad, "as it should"));
            }));
            assert!(outcome.is_err());
            let sum = AtomicUsize::new(0);
            threads.for_each(100, |index| {
                sum.fetch_add(index, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 4950);
        }
    }
}
