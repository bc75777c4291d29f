//! The conformance suite on the GPU, with every path of kernels.

use cogvlm_backend::conformance::ARENA_BYTES;
use cogvlm_backend::conformance_suite;
use cogvlm_core::{DType, Device};
use cogvlm_cuda::{CudaBackend, KernelPath};

fn backend(activations: DType, path: KernelPath) -> CudaBackend {
    let backend = CudaBackend::new(Device::Gpu(0), 0, 4 * ARENA_BYTES, activations);
    backend.unwrap_or_else(|error| panic!("{error}")).with_path(path)
}

conformance_suite!(
    #[ignore = "needs a GPU; run with `--ignored` where there is one"]
    f32,
    || backend(DType::F32, KernelPath::Hopper)
);
conformance_suite!(
    #[ignore = "needs a GPU; run with `--ignored` where there is one"]
    bf16_generic,
    || backend(DType::Bf16, KernelPath::Generic)
);
conformance_suite!(
    #[ignore = "needs a GPU; run with `--ignored` where there is one"]
    bf16_portable,
    || backend(DType::Bf16, KernelPath::Portable)
);
conformance_suite!(
    #[ignore = "needs a GPU; run with `--ignored` where there is one"]
    bf16_hopper,
    || backend(DType::Bf16, KernelPath::Hopper)
);
