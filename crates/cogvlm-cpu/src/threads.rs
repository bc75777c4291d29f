//! Tasks over threads.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::ThreadPool;

/// Runs `task` for every index below `num_tasks`, on the calling thread and those of `pool`, as many as the pool has.
/// Which thread runs which index is left to chance, so a task must not depend on it.
pub(crate) fn for_each(pool: &ThreadPool, num_tasks: usize, task: impl Fn(usize) + Sync) {
    let helpers = pool.current_num_threads().min(num_tasks).saturating_sub(1);
    if helpers == 0 {
        return (0..num_tasks).for_each(task);
    }
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= num_tasks {
                break;
            }
            task(index);
        }
    };
    pool.in_place_scope(|scope| {
        for _ in 0..helpers {
            scope.spawn(|_| work());
        }
        work();
    });
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for num_tasks in [0, 1, 2, 1000] {
                let seen = Mutex::new(Vec::new());
                for_each(&pool, num_tasks, |index| seen.lock().unwrap().push(index));
                let mut seen = seen.into_inner().unwrap();
                seen.sort_unstable();
                assert_eq!(seen, (0..num_tasks).collect::<Vec<_>>());
            }
        }
    }
}
