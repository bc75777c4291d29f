//! Results do not depend on the number of threads, nor on where the weights lie.

use std::sync::Arc;

use cogvlm_backend::conformance::VecTensor;
use cogvlm_backend::{Activation, Backend};
use cogvlm_core::{DType, Device};
use cogvlm_cpu::{CpuBackend, Isa, Threads};

/// The bits of `gelu(x Wᵀ)`, W attached or loaded.
fn linear(dtype: DType, isa: Isa, threads: usize, rows: usize, attached: bool) -> Vec<u32> {
    const DEPTH: usize = 1100;
    const WIDTH: usize = 333;
    let threads = Threads::new(threads).expect("threads can be started");
    let cpu = CpuBackend::new(Device::Cpu, 64 << 20, dtype, Arc::new(threads)).expect("f32 and bf16 are supported");
    let cpu = cpu.with_isa(isa);
    let value = |index: usize| (index * 7919 % 1009) as f32 / 1009.0 - 0.5;
    let weight: Vec<f32> = (0..DEPTH * WIDTH).map(value).collect();
    let host = VecTensor::new("weight", DType::Bf16, &[WIDTH, DEPTH], &weight).shared();
    let weight = if attached { cpu.attach(&host) } else { cpu.load(&host) }.unwrap();
    let mut x = cpu.alloc("x", dtype, [rows, DEPTH]).unwrap();
    cpu.write(&(0..rows * DEPTH).map(|index| value(index + 3)).collect::<Vec<_>>(), &mut x, 0).unwrap();
    let mut out = cpu.alloc("out", dtype, [rows, WIDTH]).unwrap();
    cpu.linear(&x, &weight, None, Activation::Gelu, rows, &mut out).unwrap();
    cpu.read(&out, 0..rows).unwrap().iter().map(|value| value.to_bits()).collect()
}

#[test]
fn bits_do_not_depend_on_threads() {
    for dtype in [DType::F32, DType::Bf16] {
        for isa in Isa::available() {
            for rows in [1, 8, 9, 300] {
                let one = linear(dtype, isa, 1, rows, true);
                assert!(one.iter().any(|&bits| bits != one[0]), "all results are the same");
                for threads in [2, 3, 7] {
                    assert_eq!(one, linear(dtype, isa, threads, rows, threads == 3), "{dtype} {isa} {rows} {threads}");
                }
            }
        }
    }
}

#[test]
fn few_rows_do_not_depend_on_each_other() {
    for dtype in [DType::F32, DType::Bf16] {
        for isa in Isa::available() {
            let (one, eight) = (linear(dtype, isa, 2, 1, true), linear(dtype, isa, 2, 8, true));
            assert_eq!(one, eight[..one.len()], "{dtype} {isa}");
        }
    }
}
