//! Places a model on devices before anything is loaded: a pure function of the model's sizes and the budgets.
//!
//! [`plan()`] makes plans by policies of our own, [`accelerate`] reproduces accelerate's device maps exactly, and
//! [`plan::Plan`] is what either comes to: who executes each unit, where each weight rests, what every device then
//! holds and every link carries. Nothing here opens a file or a GPU.
#![forbid(unsafe_code)]

pub mod accelerate;
mod account;
mod cost;
mod device_map;
mod error;
mod json;
pub mod links;
mod max_memory;
mod own;
pub mod plan;
mod predict;
mod report;
pub mod requests;
mod tensor;

pub use error::{Change, PlanError};
pub use json::PLAN_SCHEMA;
pub use max_memory::{MaxMemoryError, parse_max_memory};
pub use own::plan;
pub use predict::Prediction;
pub use tensor::plan_tensor_parallel;
