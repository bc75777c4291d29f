//! Attention over more queries and keys than a block of either, at every level of instructions, against the oracle.

use std::sync::Arc;

use cogvlm_backend::{Backend, Batch, HeadGeometry, SequenceRows, oracle};
use cogvlm_core::workspace::{BLOCK_LEN, StepLimits};
use cogvlm_core::{DType, Device};
use cogvlm_cpu::{CpuBackend, Isa, Threads};
use half::bf16;

const HEADS: HeadGeometry = HeadGeometry { num_heads: 2, num_kv_heads: 1, head_dim: 40 };

/// Largest difference that is right where values lie within 1: a mean of them, its shares rounded to bf16 (half an ulp
/// each, and of their sum), and a rounding of the result; or some ulps of f32 in scores of up to 20.
fn bound(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 2e-5,
        _ => 3.0 / 256.0,
    }
}

/// Values within 1, exact in `dtype`.
fn values(dtype: DType, count: usize, mut seed: u32) -> Vec<f32> {
    let mut next = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 8) as f32 / (1u32 << 23) as f32 - 1.0
    };
    (0..count).map(|_| if dtype == DType::F32 { next() } else { bf16::from_f32(next()).to_f32() }).collect()
}

fn backend(dtype: DType, isa: Isa) -> CpuBackend {
    let threads = Threads::new(2).expect("threads can be started");
    CpuBackend::new(Device::Cpu, 64 << 20, dtype, Arc::new(threads)).expect("f32 and bf16 are supported").with_isa(isa)
}

fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn causal_attention_spans_blocks() {
    let (rows, context_len) = (1000, 1101);
    let blocks: Vec<u32> = (0..70).rev().collect();
    let sequence = SequenceRows { rows: 0..rows, context_len, blocks };
    let (width, kv_width) = (HEADS.num_heads * HEADS.head_dim, 2 * BLOCK_LEN * HEADS.head_dim);
    for dtype in [DType::F32, DType::Bf16] {
        // Larger queries, so that single keys matter.
        let query: Vec<f32> = values(dtype, rows * width, 1).iter().map(|value| 16.0 * value).collect();
        let kv = values(dtype, 70 * kv_width, 2);
        let expected = oracle::attention(&query, &kv, HEADS, std::slice::from_ref(&sequence), DType::F32);
        let one_less = SequenceRows { context_len: context_len - 1, ..sequence.clone() };
        let wrong = oracle::attention(&query, &kv, HEADS, &[one_less], DType::F32);
        assert!(difference(&wrong, &expected) > 4.0 * bound(dtype), "the bound cannot tell one key");
        for isa in Isa::available() {
            let cpu = backend(dtype, isa);
            let buffer = |values: &[f32], rows, width| {
                let mut buffer = cpu.alloc("test", dtype, [rows, width]).unwrap();
                cpu.write(values, &mut buffer, 0).unwrap();
                buffer
            };
            let (query, kv) = (buffer(&query, rows, width), buffer(&kv, 70, kv_width));
            let mut out = buffer(&[], rows, width);
            let mut tables = cpu.tables(&StepLimits::new(context_len, 1)).unwrap();
            let (input_ids, position_ids) = (vec![0; rows], vec![0; rows]);
            let sequences = vec![sequence.clone()];
            cpu.set_batch(&mut tables, &Batch { input_ids, position_ids, sequences, ..Batch::default() }).unwrap();
            cpu.attention(&query, &kv, HEADS, &tables, &mut out).unwrap();
            let error = difference(&cpu.read(&out, 0..rows).unwrap(), &expected);
            assert!(error <= bound(dtype), "{dtype} at level {isa}: {error}");
        }
    }
}

#[test]
fn image_attention_spans_blocks() {
    let heads = HeadGeometry { num_kv_heads: 2, ..HEADS };
    let (tokens, width) = (901, 2 * HEADS.head_dim);
    for dtype in [DType::F32, DType::Bf16] {
        let qkv = values(dtype, 2 * tokens * 3 * width, 3);
        let expected = oracle::image_attention(&qkv, tokens, heads, DType::F32);
        for isa in Isa::available() {
            let cpu = backend(dtype, isa);
            let mut buffer = cpu.alloc("test", dtype, [2 * tokens, 3 * width]).unwrap();
            cpu.write(&qkv, &mut buffer, 0).unwrap();
            let mut out = cpu.alloc("test", dtype, [2 * tokens, width]).unwrap();
            cpu.image_attention(&buffer, 2, tokens, heads, &mut out).unwrap();
            let error = difference(&cpu.read(&out, 0..2 * tokens).unwrap(), &expected);
            assert!(error <= bound(dtype), "{dtype} at level {isa}: {error}");
        }
    }
}
