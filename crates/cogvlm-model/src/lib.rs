//! CogVLM, written once over any [`Backend`](cogvlm_backend::Backend): vision tower, adapter, decoder layers, head.
//!
//! [`Rank`] is one device's share of the model. It runs a stage of units on what the stage before sent, and gives what
//! the next one needs. Names no backend, and no other rank.
#![forbid(unsafe_code)]

mod decoder;
mod rank;
mod step;
mod vision;
mod weights;

pub use rank::{LetPass, LoadError, Rank, RankSpec, kv_shape};
pub use step::{Captured, Crossing, SampleSpec, StageOutput, Step, StepImage, StepKind};
pub use weights::{GroupKey, GroupSource, SourceTensor, Weights};
