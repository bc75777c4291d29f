//! The operations of the model on the CPU: vectorised, threaded, weights read where they lie.
//!
//! [`CpuBackend`] is one device, or one of several virtual ranks that share a pool of threads. Every operation is a
//! file of `ops/`, named as the method of [`Backend`](cogvlm_backend::Backend) that it implements. Matrix products go
//! through `matmul`, which cuts the result into tiles, hands each to one thread, and lets the operation finish the
//! tile (bias, activation, residual, rotation) while it is in cache. Results do not depend on the number of threads:
//! work is divided over results only, and every result is summed in one order.
#![deny(unsafe_code)]

#[cfg(target_endian = "big")]
compile_error!("weights are used as they lie in files, which are little-endian");

mod attend;
mod backend;
mod buffer;
pub mod ceiling;
mod element;
mod matmul;
mod memory;
mod ops;
mod ring;
mod scratch;
mod shape;
mod shardable;
mod simd;
mod tables;
mod threads;
mod tiles;
mod weight;

pub use backend::CpuBackend;
pub use buffer::{CpuBuffer, CpuParcel};
pub use ring::CpuRing;
pub use scratch::SCRATCH_BYTES_PER_THREAD;
pub use shardable::CpuExchange;
pub use simd::Isa;
pub use tables::CpuTables;
pub use threads::Threads;
pub use weight::CpuWeight;
