//! cogvlm-plan
#![forbid(unsafe_code)]

mod account;
pub mod accelerate;
mod error;
mod own;
pub mod plan;
pub mod requests;

pub use error::{Change, PlanError};
pub use own::plan;
