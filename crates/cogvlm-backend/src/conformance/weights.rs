use cogvlm_core::DType;

use super::approx::assert_same_bits;
use super::data::{Random, garbage};
use super::harness::{STAGED_ALIGNMENT, buffer, load, num_bytes, refuses};
use super::{Make, VecTensor};
use crate::{Backend, BackendError, HostTensor, StagedSource};

/// Slots are reused, keep the order of their weights, and refuse what does not fit.
pub fn staging<B: Backend>(make: Make<'_, B>) {
    const NUM_SLOTS: usize = 3;
    let backend = make();
    let dtype = backend.activation_dtype();
    // Groups of three weights of unequal sizes, as rows of 16.
    let tensor = |group: usize, index: usize| {
        let rows = [5, 1, 64][index];
        let values = Random::new((group * 3 + index) as u64).values(dtype, rows * 16, 1.0);
        let tensor = VecTensor::new(&format!("group{group}.{index}"), dtype, &[rows, 16], &values);
        if group.is_multiple_of(2) { tensor } else { tensor.made() }
    };
    let group = |group: usize| [tensor(group, 0), tensor(group, 1), tensor(group, 2)];
    let slot_bytes = group(0).iter().map(|tensor| num_bytes(tensor).next_multiple_of(STAGED_ALIGNMENT)).sum();
    let mut ring = backend.staging(NUM_SLOTS, slot_bytes).expect("the arena has room");
    let in_use = backend.memory().in_use;
    assert!(in_use >= (NUM_SLOTS * slot_bytes) as u64, "the ring's {slot_bytes} bytes per slot are counted: {in_use}");

    let stage = |ring: &mut B::Ring, slot: usize, index: usize| {
        let sources = group(index).iter().map(|tensor| StagedSource::Host(tensor.shared())).collect();
        backend.stage(ring, slot, sources).unwrap_or_else(|error| panic!("group {index} to slot {slot}: {error}"));
    };
    let check = |ring: &mut B::Ring, slot: usize, index: usize| {
        let weights = backend.staged(ring, slot).unwrap_or_else(|error| panic!("slot {slot}: {error}"));
        assert_eq!(weights.len(), 3, "weights in slot {slot}");
        for (weight, tensor) in weights.iter().zip(group(index)) {
            let held = read_weight(&backend, weight, tensor.shape()[0]);
            assert_same_bits(&format!("`{}` in slot {slot}", tensor.name()), &held, tensor.values());
        }
    };
    // Ahead of use: all slots are filled before the first is read, and read again later.
    for slot in 0..NUM_SLOTS {
        stage(&mut ring, slot, slot);
    }
    for slot in [1, 0, 2, 1] {
        check(&mut ring, slot, slot);
    }
    for index in NUM_SLOTS..4 * NUM_SLOTS {
        stage(&mut ring, index % NUM_SLOTS, index);
        check(&mut ring, (index + 1) % NUM_SLOTS, index + 1 - NUM_SLOTS);
        check(&mut ring, index % NUM_SLOTS, index);
    }
    assert_eq!(backend.memory().in_use, in_use, "staging takes nothing beside the ring");

    let large = VecTensor::new("large", dtype, &[slot_bytes, 16], &vec![0.0; slot_bytes * 16]);
    let too_large = vec![StagedSource::Host(large.shared())];
    refuses("stage: a group larger than its slot", backend.stage(&mut ring, 0, too_large));
    let two = group(0).iter().chain(&group(2)).map(|tensor| StagedSource::Host(tensor.shared())).collect();
    refuses("stage: weights that fit one by one, not together", backend.stage(&mut ring, 0, two));
    refuses("stage: a slot that is not there", backend.stage(&mut ring, NUM_SLOTS, Vec::new()));
    refuses("staged: a slot that is not there", backend.staged(&mut ring, usize::MAX));
    stage(&mut ring, 0, 7);
    check(&mut ring, 0, 7);

    // A read that fails is told where it is begun or where it is waited for; the slot is good for the next group.
    let broken = vec![StagedSource::Host(tensor(1, 0).broken().shared())];
    let failed = backend.stage(&mut ring, 1, broken).and_then(|()| backend.staged(&mut ring, 1).map(drop));
    match failed {
        Err(BackendError::Host(error)) => assert_eq!(error.tensor, "group1.0"),
        other => panic!("a weight that cannot be read is staged: {other:?}"),
    }
    stage(&mut ring, 1, 8);
    check(&mut ring, 1, 8);
    drop(ring);
    assert_eq!(backend.memory().in_use, 0, "the ring is given back");
}

/// A weight that cannot be read is an error that names it, and takes nothing.
pub fn host_failure<B: Backend>(make: Make<'_, B>) {
    let backend = make();
    for dtype in [DType::Bf16, DType::F16, DType::F32] {
        let tensor = VecTensor::new("lost.weight", dtype, &[3, 4], &[1.0; 12]).broken();
        match backend.load(&tensor.shared()) {
            Err(BackendError::Host(error)) => assert_eq!(error.tensor, "lost.weight"),
            Err(error) => panic!("a weight that cannot be read is refused otherwise: {error}"),
            Ok(_) => panic!("a weight that cannot be read is loaded"),
        }
        assert_eq!(backend.memory().in_use, 0, "a load that failed takes nothing");
    }
    // The next one is none the worse for it.
    let tensor = VecTensor::new("weight", backend.activation_dtype(), &[1, 16], &[1.5; 16]);
    assert_eq!(read_weight(&backend, &load(&backend, &tensor), 1), [1.5; 16]);
}

/// A weight `[rows, 16]`, by way of a buffer.
fn read_weight<B: Backend>(backend: &B, weight: &B::Weight, rows: usize) -> Vec<f32> {
    let mut copy = buffer(backend, rows, 16, &garbage(backend.activation_dtype(), rows * 16));
    backend.copy_weight_rows(weight, &mut copy, 0).unwrap_or_else(|error| panic!("{error}"));
    backend.read(&copy, 0..rows).expect("rows fit")
}
