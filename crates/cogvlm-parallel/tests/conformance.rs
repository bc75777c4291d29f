//! The conformance suite through a group of one. What more members do is compared with one of them in `plans.rs`.

use std::sync::Arc;

use cogvlm_backend::conformance::ARENA_BYTES;
use cogvlm_backend::conformance_suite;
use cogvlm_core::{DType, Device};
use cogvlm_cpu::{CpuBackend, Threads};
use cogvlm_parallel::TensorParallel;

fn alone(activations: DType) -> TensorParallel<CpuBackend> {
    let threads = Threads::new(2).expect("threads can be started");
    let member = CpuBackend::new(Device::Cpu, ARENA_BYTES, activations, Arc::new(threads));
    TensorParallel::alone(Device::Cpu, member.expect("f32 and bf16 are supported"))
}

conformance_suite!(alone_f32, || alone(DType::F32));
conformance_suite!(alone_bf16, || alone(DType::Bf16));
