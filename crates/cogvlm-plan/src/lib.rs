//! cogvlm-plan
#![forbid(unsafe_code)]

pub mod accelerate;
