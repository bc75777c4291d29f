//! The operations of the model on NVIDIA GPUs: hand-written kernels behind the [`Backend`](cogvlm_backend::Backend)
//! trait.
//!
//! The only crate that launches anything. The kernels of `kernels/` are compiled by build.rs and embedded; the driver is
//! loaded at run time, so the same executable runs where there is no GPU. All work of a [`CudaBackend`] goes to one
//! stream in the order of the calls; nothing waits for the device but what gives values back to the host.
#![deny(unsafe_op_in_unsafe_fn)]

mod backend;
pub mod bench;
mod buffer;
pub mod ceiling;
mod channel;
mod cublas;
mod device;
mod driver;
#[cfg(test)]
mod echo;
mod error;
mod exchange;
mod graph;
mod host_copy;
mod kernels;
mod memory;
mod ops;
mod outbox;
mod product;
mod registered;
mod ring;
mod sampled;
mod shardable;
mod shared;
mod tables;
mod tensor_map;
mod weight;

pub use backend::CudaBackend;
pub use backend::KernelPath;
pub use channel::{ChannelEnd, NcclChannel};
pub use driver::{Context, DeviceInfo, devices, driver_version, usable_devices};
pub use error::CudaError;
pub use exchange::CudaExchange;
pub use host_copy::LoadPath;
pub use kernels::is_built_in;
