//! The words of cogvlm-shard, and the facts about the model that every other crate agrees on.
//!
//! No I/O, no threads, no unsafe code: values in, values out.
#![forbid(unsafe_code)]

pub mod config;
pub mod device;
pub mod dtype;
pub mod inventory;
pub mod memory;
pub mod module_tree;
pub mod prompt;
pub mod sharing;
pub mod spec;
pub mod tokens;
pub mod workspace;

pub use config::{ConfigError, ModelConfig};
pub use device::Device;
pub use dtype::DType;
pub use inventory::{Expert, Phase, TensorSpec, Unit, WeightGroup, tensor_inventory};
pub use prompt::Template;
pub use spec::ModelSpec;
pub use tokens::TokenType;
