//! The conformance suite: at the best level of instructions as one test per check, at every other level and number of
//! threads as one test.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use cogvlm_backend::conformance::{ARENA_BYTES, checks};
use cogvlm_backend::conformance_suite;
use cogvlm_core::{DType, Device};
use cogvlm_cpu::{CpuBackend, Isa, Threads};

fn backend(activations: DType, threads: usize, isa: Isa) -> CpuBackend {
    let threads = Threads::new(threads).expect("threads can be started");
    let backend =
        CpuBackend::new(Device::Cpu, ARENA_BYTES, activations, Arc::new(threads)).expect("f32 and bf16 are supported");
    backend.with_isa(isa)
}

conformance_suite!(f32, || backend(DType::F32, 2, Isa::best()));
conformance_suite!(bf16, || backend(DType::Bf16, 2, Isa::best()));

/// Runs all checks at every level that this machine has, and names the level and the check that fails.
fn conforms(activations: DType, threads: usize) {
    for isa in Isa::available() {
        for check in checks::<CpuBackend>() {
            let run = || (check.run)(&|| backend(activations, threads, isa));
            let outcome = catch_unwind(AssertUnwindSafe(run));
            assert!(outcome.is_ok(), "`{}` fails in {activations} at level {isa} with {threads} threads", check.name);
        }
    }
}

#[test]
fn every_level_conforms_in_f32() {
    conforms(DType::F32, 1);
}

#[test]
fn every_level_conforms_in_bf16() {
    conforms(DType::Bf16, 3);
}
