//! The conformance suite accepts a right backend, and notices what is wrong with others.

mod faults;
mod plain;

use cogvlm_backend::conformance::ARENA_BYTES;
use cogvlm_core::DType;
use plain::PlainBackend;

cogvlm_backend::conformance_suite!(f32, || PlainBackend::new(DType::F32, ARENA_BYTES));
cogvlm_backend::conformance_suite!(bf16, || PlainBackend::new(DType::Bf16, ARENA_BYTES));
