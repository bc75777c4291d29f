//! Buffers and weights of several members.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cogvlm_backend::shape::unsupported;
use cogvlm_backend::{Backend, BackendError, ExpertWeights};
use cogvlm_core::sharing::Sharing;
use cogvlm_core::tokens::ExpertRange;

/// An array of which each member has its part.
pub struct SharedBuffer<B: Backend> {
    shares: Arc<Mutex<Shares<B>>>,
}

/// What the members have of an array.
pub(crate) struct Shares<B: Backend> {
    pub(crate) sharing: Sharing,
    /// Of each member that has any.
    pub(crate) parts: Vec<B::Buffer>,
    /// Where the array also holds what comes of the attention: the heads of each member.
    pub(crate) attended: Vec<B::Buffer>,
    /// Whether `attended` is what was written last.
    pub(crate) holds_attended: bool,
}

impl<B: Backend> SharedBuffer<B> {
    pub(crate) fn new(sharing: Sharing, parts: Vec<B::Buffer>, attended: Vec<B::Buffer>) -> Self {
        Self { shares: Arc::new(Mutex::new(Shares { sharing, parts, attended, holds_attended: false })) }
    }

    /// Of a device alone.
    pub(crate) fn alone(buffer: B::Buffer) -> Self {
        Self::new(Sharing::Replicated, vec![buffer], Vec::new())
    }

    /// The parts. Nobody else has them meanwhile: one thread calls the operations of a group.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Shares<B>> {
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same array once more.
    pub(crate) fn again(&self) -> Self {
        Self { shares: Arc::clone(&self.shares) }
    }

    /// Whether both are one array.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shares, &other.shares)
    }
}

fn not_there(op: &'static str, member: usize) -> BackendError {
    unsupported(op, format!("member {member} of the group has no part of an argument"))
}

impl<B: Backend> Shares<B> {
    /// What `member` reads.
    pub(crate) fn input(&self, op: &'static str, member: usize) -> Result<&B::Buffer, BackendError> {
        let parts = if self.holds_attended { &self.attended } else { &self.parts };
        parts.get(member).ok_or_else(|| not_there(op, member))
    }

    /// Where `member` writes.
    pub(crate) fn output(&mut self, op: &'static str, member: usize) -> Result<&mut B::Buffer, BackendError> {
        self.holds_attended = false;
        self.parts.get_mut(member).ok_or_else(|| not_there(op, member))
    }

    /// Where `member` writes the heads that it attended to.
    pub(crate) fn attended(&mut self, op: &'static str, member: usize) -> Result<&mut B::Buffer, BackendError> {
        self.holds_attended = true;
        self.attended.get_mut(member).ok_or_else(|| not_there(op, member))
    }
}

/// A weight of which each member has its part. Clones share it.
pub struct SharedWeight<W> {
    pub(crate) sharing: Sharing,
    parts: Arc<Vec<W>>,
}

impl<W> Clone for SharedWeight<W> {
    fn clone(&self) -> Self {
        Self { sharing: self.sharing, parts: Arc::clone(&self.parts) }
    }
}

impl<W> SharedWeight<W> {
    pub(crate) fn new(sharing: Sharing, parts: Vec<W>) -> Self {
        Self { sharing, parts: Arc::new(parts) }
    }

    /// What `member` has.
    pub(crate) fn of(&self, op: &'static str, member: usize) -> Result<&W, BackendError> {
        self.parts.get(member).ok_or_else(|| not_there(op, member))
    }
}

/// Staging slots on every member.
pub struct SharedRing<B: Backend> {
    /// Of each member.
    pub(crate) rings: Vec<B::Ring>,
    /// How members share what was staged last into each slot.
    pub(crate) sharings: Vec<Sharing>,
}

/// What `member` has of the weights of two experts.
pub(crate) fn of_member<'a, W>(
    op: &'static str, weights: ExpertWeights<'a, SharedWeight<W>>, member: usize,
) -> Result<ExpertWeights<'a, W>, BackendError> {
    let of = |weight: Option<&'a SharedWeight<W>>| weight.map(|weight| weight.of(op, member)).transpose();
    Ok(ExpertWeights { language: of(weights.language)?, vision: of(weights.vision)? })
}

/// Rows that `ranges` cover from the first on, one range after the other.
pub(crate) fn covered_rows(op: &'static str, ranges: &[ExpertRange]) -> Result<usize, BackendError> {
    let mut covered = 0;
    for range in ranges {
        if range.rows.start != covered {
            return Err(unsupported(op, "devices that compute together add up rows without gaps"));
        }
        covered = range.rows.end.max(covered);
    }
    Ok(covered)
}
