//! The conformance suite through the type that is either backend: here the host's.

use std::sync::Arc;

use cogvlm_backend::conformance::ARENA_BYTES;
use cogvlm_backend::conformance_suite;
use cogvlm_core::{DType, Device};
use cogvlm_cpu::{CpuBackend, Threads};
use cogvlm_device::AnyBackend;

fn cpu(activations: DType) -> AnyBackend {
    let threads = Threads::new(2).expect("threads can be started");
    let backend = CpuBackend::new(Device::Cpu, ARENA_BYTES, activations, Arc::new(threads));
    AnyBackend::Cpu(backend.expect("f32 and bf16 are supported"))
}

fn cuda(activations: DType) -> AnyBackend {
    let backend = cogvlm_cuda::CudaBackend::new(Device::Gpu(0), 0, 4 * ARENA_BYTES, activations);
    AnyBackend::Cuda(backend.unwrap_or_else(|error| panic!("{error}")))
}

conformance_suite!(cpu_f32, || cpu(DType::F32));
conformance_suite!(cpu_bf16, || cpu(DType::Bf16));
conformance_suite!(
    #[ignore = "needs a GPU; run with `--ignored` where there is one"]
    cuda_bf16,
    || cuda(DType::Bf16)
);
