//! The sharded runtime: loads a plan onto its ranks, and turns requests into tokens.
//!
//! A rank is a device with a thread of its own. A step of the engine passes through the stages of the plan; what
//! crosses between two stages goes from rank to rank directly. The engine only schedules steps and reads tokens.
#![forbid(unsafe_code)]

mod blocks;
mod engine;
mod load;
mod ranks;
mod remote;
mod request;
mod scheduler;
mod source;
mod turns;
mod ways;

pub use blocks::{BlockLease, BlockPool};
pub use cogvlm_model::StepKind;
pub use engine::{Engine, EngineError, Event, StepReport};
pub use load::{LoadError, LoadProgress, WeightSource, load_plan};
pub use ranks::{RankError, Ranks};
pub use remote::Processes;
pub use request::{CachedPrefix, FinishReason, Image, Request, RequestError, RequestId};
pub use ways::{Carrier, OpenChannels, Transport, Way};
