//! Tensor parallelism: several devices that compute every layer together, behind one
//! [`Backend`](cogvlm_backend::Backend).
//!
//! [`TensorParallel`] has members of one kind. Each has some heads and some of the inner width of the MLP: it computes
//! its part of attention and MLP alone, and after the two products that bring the parts together the members add up
//! their sums ([`Shardable`](cogvlm_backend::Shardable)). So one rank, which knows nothing of it, drives them all: each
//! member reads its share of the weights, and a token takes that much less time. Who has what is said by
//! [`cogvlm_core::sharing`].
//!
//! Sums are added up in the order of the members: the same bits on all of them in every run, though not those of one
//! device alone. A member alone is a group too, and adds nothing to what it does by itself.
#![forbid(unsafe_code)]

mod channel;
mod group;
mod outside;
mod shard;
mod shares;

pub use channel::ChannelOfOne;
pub use group::TensorParallel;
pub use shard::Shard;
pub use shares::{SharedBuffer, SharedWeight};
