use cogvlm_core::DType;

use super::harness::load;
use super::{Make, VecTensor};
use crate::{Backend, BackendError, HostTensor};

/// Most that a backend may add to an allocation so that it begins where the device likes.
const MAX_PADDING_BYTES: u64 = 4096;

/// Buffers come zeroed, and the arena counts what is taken and what is given back.
pub fn alloc<B: Backend>(make: Make<'_, B>) {
    let backend = make();
    let before = backend.memory();
    assert_eq!(before.in_use, 0, "a fresh arena holds nothing");
    let mut bytes = 0;
    let mut buffers = Vec::new();
    for (dtype, shape) in [(backend.activation_dtype(), [3, 1001]), (DType::F32, [1, 1]), (DType::F32, [70, 64])] {
        let buffer = backend.alloc("buffer", dtype, shape).expect("the arena has room");
        let held = backend.read(&buffer, 0..shape[0]).expect("all rows can be read");
        assert_eq!(held, vec![0.0; shape[0] * shape[1]], "a new buffer of {shape:?} is zeroed");
        bytes += (shape[0] * shape[1] * dtype.size_bytes()) as u64;
        buffers.push(buffer);
        check_in_use(&backend, bytes, buffers.len());
    }
    let peak = backend.memory().in_use;
    // A buffer that was written to and dropped: its place is zeroed for the next one.
    let mut dirty = backend.alloc("dirty buffer", DType::F32, [70, 64]).expect("the arena has room");
    backend.write(&[1.0; 70 * 64], &mut dirty, 0).expect("rows fit");
    drop(dirty);
    let clean = backend.alloc("clean buffer", DType::F32, [70, 64]).expect("the arena has room");
    assert_eq!(backend.read(&clean, 0..70).expect("rows fit"), vec![0.0; 70 * 64], "reused memory is zeroed");
    drop(clean);

    // One element of its own type per element of the activations, so that no conversion changes its size.
    let tensor = VecTensor::new("weight", backend.activation_dtype(), &[33, 100], &[1.0; 3300]);
    let weight = load(&backend, &tensor);
    let bytes_with_weight = bytes + 3300 * backend.activation_dtype().size_bytes() as u64;
    check_in_use(&backend, bytes_with_weight, buffers.len() + 1);
    let clone = weight.clone();
    check_in_use(&backend, bytes_with_weight, buffers.len() + 1);
    drop(weight);
    check_in_use(&backend, bytes_with_weight, buffers.len() + 1);
    drop(clone);
    let attached = backend.attach(&tensor.shared()).expect("a mapped weight can be attached");
    assert_eq!(backend.memory().in_use, peak, "an attached weight takes nothing from the arena");
    drop(attached);
    drop(buffers);
    let after = backend.memory();
    assert_eq!(after.in_use, 0, "everything dropped is given back");
    assert_eq!(after.capacity, before.capacity);
    assert!(after.peak >= bytes_with_weight, "the peak, {}, is what was held at most", after.peak);
}

fn check_in_use<B: Backend>(backend: &B, bytes: u64, allocations: usize) {
    let in_use = backend.memory().in_use;
    let most = bytes + allocations as u64 * MAX_PADDING_BYTES;
    assert!((bytes..=most).contains(&in_use), "{in_use} bytes are counted where {bytes} were taken");
}

/// What exceeds the arena is refused with numbers, and nothing is taken for it.
pub fn out_of_memory<B: Backend>(make: Make<'_, B>) {
    const ROW_BYTES: u64 = 4096;
    let backend = make();
    let memory = backend.memory();
    let too_many = (memory.capacity / ROW_BYTES + 1) as usize;
    check_refused(&backend, "giant", too_many as u64 * ROW_BYTES, |backend| {
        backend.alloc("giant", DType::F32, [too_many, ROW_BYTES as usize / 4])
    });
    // Products that overflow are refused too.
    assert!(backend.alloc("absurd", DType::F32, [usize::MAX, 2]).is_err(), "an absurd shape is refused");
    assert!(
        backend.alloc("absurd", DType::F32, [usize::MAX / 2, usize::MAX / 2]).is_err(),
        "an absurd shape is refused"
    );
    assert!(backend.staging(usize::MAX, usize::MAX).is_err(), "an absurd ring is refused");

    // All but 256 KiB or so.
    let filler_rows = (memory.capacity / ROW_BYTES - 64) as usize;
    let filler =
        backend.alloc("filler", DType::F32, [filler_rows, ROW_BYTES as usize / 4]).expect("the arena has room");
    let large = VecTensor::new("large.weight", backend.activation_dtype(), &[512, 1024], &vec![1.0; 512 * 1024]);
    let large_bytes = 512 * 1024 * backend.activation_dtype().size_bytes() as u64;
    for tensor in [large.clone(), large.clone().made()] {
        check_refused(&backend, large.name(), large_bytes, |backend| backend.load(&tensor.shared()));
    }
    check_refused(&backend, "", 3 << 20, |backend| backend.staging(3, 1 << 20));
    check_refused(&backend, "one more", 100 * ROW_BYTES, |backend| {
        backend.alloc("one more", DType::F32, [100, ROW_BYTES as usize / 4])
    });
    drop(filler);
    assert_eq!(backend.memory().in_use, 0, "nothing leaks");
    drop(load(&backend, &large));
    drop(backend.staging(3, 1 << 20).expect("there is room again"));
    assert_eq!(backend.memory().in_use, 0, "nothing leaks");
}

fn check_refused<B: Backend, T>(backend: &B, name: &str, bytes: u64, call: impl FnOnce(&B) -> Result<T, BackendError>) {
    let before = backend.memory();
    match call(backend) {
        Err(BackendError::OutOfMemory { what, requested, in_use, capacity, .. }) => {
            assert!(what.contains(name), "the error is about `{what}`, not about `{name}`");
            assert!(requested >= bytes, "{requested} bytes are said to be wanted, {bytes} were");
            assert_eq!((in_use, capacity), (before.in_use, before.capacity), "the error's numbers are the arena's");
        }
        Err(error) => panic!("`{name}` is refused, but not for want of memory: {error}"),
        Ok(_) => panic!("`{name}` exceeds the arena and is accepted"),
    }
    assert_eq!(backend.memory().in_use, before.in_use, "a refusal takes nothing");
}
