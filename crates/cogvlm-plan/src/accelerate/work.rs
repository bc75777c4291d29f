//! A bound on the work, so that no request can occupy the planner for long.

use super::error::AccelerateError;

/// Steps that one call may take. The 17B model takes some thousands; a step is a look at one queue entry or one name,
/// so that this many end within seconds.
const MAX_STEPS: u64 = 1 << 27;

/// Counts steps down.
#[derive(Debug)]
pub(crate) struct Work {
    left: u64,
}

/// The steps are used up.
#[derive(Debug)]
pub(crate) struct WorkSpent;

impl Work {
    pub(crate) fn new() -> Self {
        Self { left: MAX_STEPS }
    }

    pub(crate) fn spend(&mut self, steps: usize) -> Result<(), WorkSpent> {
        self.left = self.left.checked_sub(steps as u64).ok_or(WorkSpent)?;
        Ok(())
    }
}

impl From<WorkSpent> for AccelerateError {
    fn from(WorkSpent: WorkSpent) -> Self {
        Self::TooMuchWork { limit: MAX_STEPS }
    }
}
