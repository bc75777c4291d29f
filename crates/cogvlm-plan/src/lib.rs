//! cogvlm-plan
#![forbid(unsafe_code)]

mod account;
pub mod accelerate;
mod device_map;
mod error;
mod json;
mod max_memory;
mod own;
pub mod plan;
mod report;
pub mod requests;

pub use error::{Change, PlanError};
pub use json::PLAN_SCHEMA;
pub use max_memory::{MaxMemoryError, parse_max_memory};
pub use own::plan;
