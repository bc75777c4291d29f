//! A GPU or the host behind one type, so that one engine runs plans whose ranks are GPUs, the host, or both.
//!
//! [`AnyBackend`] hands each call to the backend it holds. What was made by a backend of the other kind is refused with
//! [`BackendError::Unsupported`](cogvlm_backend::BackendError::Unsupported), but for rows on their way between ranks,
//! which cross through host memory, bit for bit, and for a KV cache in host memory that both kinds use where it lies.
#![forbid(unsafe_code)]

mod argument;
mod backend;
mod parcel;
mod shardable;

pub use argument::{Buffer, Either, Moment, Outbox, Ring, Sampled, Tables, Weight};
pub use backend::AnyBackend;
pub use parcel::{GpuChannel, Parcel};
pub use shardable::Exchange;
