//! The conformance suite on the GPU, with every path of kernels.

use std::cell::Cell;

use cogvlm_backend::conformance::ARENA_BYTES;
use cogvlm_backend::conformance_suite;
use cogvlm_core::{DType, Device};
use cogvlm_cuda::{CudaBackend, KernelPath};

/// Shared memory of a multiprocessor of compute capability 8.6, 8.9 or 12.0, and of 8.0: kernels that keep as many rounds
/// under way as it holds are tested with that, too.
const SMALL: u32 = 100 << 10;
const MIDDLE: u32 = 164 << 10;

fn backend(activations: DType, path: KernelPath) -> CudaBackend {
    let backend = CudaBackend::new(Device::Gpu(0), 0, 4 * ARENA_BYTES, activations);
    backend.unwrap_or_else(|error| panic!("{error}")).with_path(path)
}

/// Each backend of a test on the next GPU of those that there are, so that what passes between two of them crosses a link
/// where there is one.
fn spread() -> CudaBackend {
    thread_local!(static NEXT: Cell<u32> = const { Cell::new(0) });
    let num_gpus = cogvlm_cuda::usable_devices().unwrap_or_else(|error| panic!("{error}")).len() as u32;
    let ordinal = NEXT.replace(NEXT.get() + 1) % num_gpus;
    let backend = CudaBackend::new(Device::Gpu(ordinal), ordinal, 4 * ARENA_BYTES, DType::Bf16);
    backend.unwrap_or_else(|error| panic!("{error}")).with_shared_bytes(MIDDLE)
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
    || backend(DType::Bf16, KernelPath::Portable).with_shared_bytes(SMALL)
);
conformance_suite!(
    #[ignore = "needs a GPU; run with `--ignored` where there is one"]
    bf16_hopper,
    || backend(DType::Bf16, KernelPath::Hopper)
);
conformance_suite!(
    #[ignore = "needs a GPU; more than one says more; run with `--ignored` where there are some"]
    spread,
    spread
);
