//! What a backend does where several devices of its kind compute one layer together.

use cogvlm_core::tokens::ExpertRange;

use crate::{Backend, BackendError, ExpertWeights};

/// A device that computes layers together with others of its kind: each has some of the inputs of a product, and the
/// sums of all of them are added up.
///
/// Everybody calls the same operations with the same numbers of rows in the same order. All members'
/// [`linear_partial`](Self::linear_partial) is called before any member's [`add_partials`](Self::add_partials) of the
/// same slot, and all members' `add_partials` before anything that waits for a device. Slots are used in turn: between
/// two uses of one lies a use of the other, or a wait for all members.
pub trait Shardable: Backend {
    /// One member's side of what sums are exchanged through.
    type Exchange: Send + Sync;

    /// Lets `members` exchange sums of up to `shape`, `[rows, columns]`: takes
    /// [`NUM_EXCHANGES`](cogvlm_core::sharing::NUM_EXCHANGES) buffers of that shape in f32 from the arena of each.
    /// Gives each member's side, in their order.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`]; [`BackendError::Unsupported`] where they cannot read each other's memory, or are
    /// not of one kind.
    fn join(members: &[&Self], shape: [usize; 2]) -> Result<Vec<Self::Exchange>, BackendError>
    where
        Self: Sized;

    /// This member's part of `x Wᵀ` with the weight of each row's expert, not rounded, into slot `slot` of its
    /// exchange: `x` and the weights have the columns of this member.
    fn linear_partial(
        &self, x: &Self::Buffer, weights: ExpertWeights<'_, Self::Weight>, ranges: &[ExpertRange], slot: usize,
        exchange: &mut Self::Exchange,
    ) -> Result<(), BackendError>;

    /// `residual += Σ partial` on the first `rows` rows: the sum over the slots `slot` of all members, in their order,
    /// is rounded, then the sum with the residual. Then, where `norm` is given, what
    /// [`rms_norm`](Backend::rms_norm) does with these rows.
    fn add_partials(
        &self, exchange: &mut Self::Exchange, slot: usize, rows: usize, residual: &mut Self::Buffer,
        norm: Option<FollowingNorm<'_, Self>>,
    ) -> Result<(), BackendError>
    where
        Self: Sized;

    /// Begins anew after operations that broke off half-way: what was exchanged is forgotten. Called of all members
    /// while nothing runs on any of them.
    ///
    /// # Errors
    /// [`BackendError::Device`]
    fn reset_exchange(&self, _exchange: &mut Self::Exchange) -> Result<(), BackendError> {
        Ok(())
    }

    /// Whether all members took part in everything that this one is past: to be asked once values have come from it.
    ///
    /// # Errors
    /// [`BackendError::Device`] that names a member which did not.
    fn check_exchange(&self, _exchange: &Self::Exchange) -> Result<(), BackendError> {
        Ok(())
    }

    /// [`Backend::replay`], of operations of all `members`.
    fn replay_together(
        members: &[&Self], key: u64, operations: &mut dyn FnMut() -> Result<(), BackendError>,
    ) -> Result<(), BackendError>
    where
        Self: Sized;
}

/// The norm of a residual that was just added to.
pub struct FollowingNorm<'a, B: Backend> {
    /// `[columns]`
    pub weight: &'a B::Weight,
    /// Added to the mean of the squares.
    pub eps: f32,
    /// Where it goes.
    pub out: &'a mut B::Buffer,
}
