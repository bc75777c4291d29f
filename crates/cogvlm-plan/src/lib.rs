//! cogvlm-plan
#![forbid(unsafe_code)]

pub mod accelerate;
pub mod plan;
