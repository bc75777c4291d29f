//! A KV cache in host memory that two devices use: what one writes the other reads, and attends to as to a cache of its
//! own.

use std::sync::Arc;

use cogvlm_backend::{Backend, Batch, HeadGeometry, SequenceRows};
use cogvlm_core::tokens::ExpertRange;
use cogvlm_core::workspace::{BLOCK_LEN, StepLimits};
use cogvlm_core::{DType, Device, Expert};
use cogvlm_cpu::{CpuBackend, Threads};
use cogvlm_device::{AnyBackend, Buffer};

const ARENA_BYTES: u64 = 64 << 20;
const HEADS: HeadGeometry = HeadGeometry { num_heads: 4, num_kv_heads: 4, head_dim: 128 };
const NUM_BLOCKS: usize = 40;

fn cpu(device: Device, activations: DType) -> AnyBackend {
    let threads = Threads::new(2).expect("threads can be started");
    let backend = CpuBackend::new(device, ARENA_BYTES, activations, Arc::new(threads));
    AnyBackend::Cpu(backend.expect("f32 and bf16 are supported"))
}

fn values(seed: usize, count: usize) -> Vec<f32> {
    (0..count).map(|index| ((index * 37 + seed * 11) % 101) as f32 / 64.0 - 0.75).collect()
}

/// Attention of `rows` rows of a sequence that ends at 600 tokens, over `kv`.
fn attend(backend: &AnyBackend, kv: &Buffer, rows: usize) -> Vec<f32> {
    let (dtype, width) = (backend.activation_dtype(), HEADS.num_heads * HEADS.head_dim);
    let mut query = backend.alloc("query", dtype, [rows, width]).unwrap();
    let mut out = backend.alloc("out", dtype, [rows, width]).unwrap();
    backend.write(&values(5, rows * width), &mut query, 0).unwrap();
    let blocks = (0..NUM_BLOCKS as u32).rev().collect();
    let batch = Batch {
        input_ids: vec![0; rows],
        position_ids: vec![0; rows],
        expert_ranges: vec![ExpertRange { rows: 0..rows, expert: Expert::Language }],
        sequences: vec![SequenceRows { rows: 0..rows, context_len: 600, blocks }],
        logit_rows: vec![rows - 1],
    };
    let mut tables = backend.tables(&StepLimits::new(NUM_BLOCKS * BLOCK_LEN, 1)).unwrap();
    backend.set_batch(&mut tables, &batch).unwrap();
    backend.attention(&query, kv, HEADS, &tables, &mut out).unwrap();
    backend.read(&out, 0..rows).unwrap()
}

fn use_one_cache(host: &AnyBackend, other: &AnyBackend) {
    let dtype = host.activation_dtype();
    let columns = 2 * HEADS.num_kv_heads * BLOCK_LEN * HEADS.head_dim;
    let shape = [NUM_BLOCKS, columns];
    let before = [host.memory().in_use, other.memory().in_use];
    let mut of_host = host.alloc_shared("KV cache", dtype, shape).unwrap();
    let mut of_other = other.share(&of_host).unwrap();
    let bytes = (NUM_BLOCKS * columns * dtype.size_bytes()) as u64;
    assert_eq!([host.memory().in_use, other.memory().in_use], [before[0] + bytes, before[1]], "the host has it");
    assert_eq!(other.read(&of_other, 0..NUM_BLOCKS).unwrap(), vec![0.0; NUM_BLOCKS * columns]);

    let [by_host, by_other] = [1, 2].map(|seed| values(seed, 3 * columns));
    host.write(&by_host, &mut of_host, 4).unwrap();
    other.write(&by_other, &mut of_other, 7).unwrap();
    other.synchronize().unwrap();
    assert_eq!(host.read(&of_host, 4..10).unwrap(), [by_host, by_other].concat());
    assert_eq!(other.read(&of_other, 4..10).unwrap(), host.read(&of_host, 4..10).unwrap());

    // A prompt's attention and a token's, as over a cache of its own.
    for (backend, shared) in [(host, &of_host), (other, &of_other)] {
        let mut own = backend.alloc("KV cache", dtype, shape).unwrap();
        backend.write(&backend.read(shared, 0..NUM_BLOCKS).unwrap(), &mut own, 0).unwrap();
        for rows in [1, 200] {
            assert_eq!(attend(backend, shared, rows), attend(backend, &own, rows), "{rows} rows");
        }
        assert!(other.share(&own).is_err(), "memory of its own");
    }
    drop(of_host);
    assert_eq!(host.memory().in_use, before[0] + bytes, "somebody still has it");
    drop(of_other);
    assert_eq!(host.memory().in_use, before[0]);
}

#[test]
fn two_ranks_of_the_host_use_one_cache() {
    for activations in [DType::F32, DType::Bf16] {
        use_one_cache(&cpu(Device::Cpu, activations), &cpu(Device::Gpu(0), activations));
    }
}

#[test]
#[ignore = "needs a GPU; run with `--ignored` where there is one"]
fn the_host_and_a_gpu_use_one_cache() {
    for activations in [DType::F32, DType::Bf16] {
        let cuda = cogvlm_cuda::CudaBackend::new(Device::Gpu(0), 0, ARENA_BYTES, activations);
        let cuda = AnyBackend::Cuda(cuda.unwrap_or_else(|error| panic!("{error}")));
        use_one_cache(&cpu(Device::Cpu, activations), &cuda);
    }
}
