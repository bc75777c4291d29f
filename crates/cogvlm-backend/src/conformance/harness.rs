//! Running cases.

use cogvlm_core::DType;

use super::approx::{Approx, assert_beyond, assert_rounds_like, assert_same_bits, assert_within, unit};
use super::{Make, VecTensor};
use crate::{Backend, BackendError, HostTensor, StagedSource};

/// Rows that buffers have beyond those that a case uses.
pub(crate) const EXTRA_ROWS: usize = 3;

/// Row counts that cross the edges of tiles.
pub(crate) const ROW_COUNTS: [usize; 11] = [0, 1, 2, 7, 8, 9, 16, 17, 33, 65, 130];

/// The types that weights come in.
pub(crate) const WEIGHT_DTYPES: [DType; 3] = [DType::Bf16, DType::F16, DType::F32];

/// Alignment that a backend may give to each weight in a staging slot.
pub(crate) const STAGED_ALIGNMENT: usize = 256;

/// One call of an operation.
pub(crate) trait Case {
    /// For messages: the operation and its sizes.
    fn label(&self) -> String;

    /// The type of its activations.
    fn dtype(&self) -> DType;

    /// Its weights.
    fn weights(&self) -> Vec<VecTensor>;

    /// Runs it with those weights, in their order, and reads back every row of the buffers that it may have written.
    fn run<B: Backend>(&self, backend: &B, weights: &[B::Weight]) -> Result<Vec<f32>, BackendError>;

    /// What `run` may give back: exact numbers where the operation has nothing to write.
    fn expected(&self) -> Vec<Approx>;

    /// What `run` gives back where it rounds to `dtype`.
    fn oracle(&self, dtype: DType) -> Vec<f32>;

    /// Whether a backend has to round as the oracle does.
    fn roundings_are_fixed(&self) -> bool {
        self.weights().iter().all(|weight| weight_unit(weight.dtype(), self.dtype()) == 0.0)
    }
}

/// Relative error of the weights that a backend may work with: those of a wider type than the activations may be
/// rounded to it, as the reference model's are.
pub(crate) fn weight_unit(weight: DType, activations: DType) -> f64 {
    if weight == activations || activations == DType::F32 { 0.0 } else { unit(activations) }
}

/// Two backends made alike.
pub(crate) fn devices<B: Backend>(make: Make<'_, B>) -> [B; 2] {
    [make(), make()]
}

/// Checks a case: the answer within its bounds, rows beyond untouched, roundings as documented, the same bits on both
/// devices.
#[track_caller]
pub(crate) fn verify<B: Backend>(devices: &[B; 2], case: &impl Case) {
    let label = case.label();
    let [found, again] = devices.each_ref().map(|backend| {
        let weights = load_all(backend, &case.weights());
        case.run(backend, &weights).unwrap_or_else(|error| panic!("{label}: {error}"))
    });
    assert_same_bits(&format!("{label}, called a second time"), &again, &found);
    let expected = case.expected();
    let oracle = case.oracle(case.dtype());
    assert_within(&format!("{label}, the oracle itself"), &oracle, &expected);
    assert_within(&label, &found, &expected);
    if case.dtype() != DType::F32 && case.roundings_are_fixed() {
        assert_rounds_like(&label, &found, &oracle);
    }
}

/// Checks that the bounds of `case` reject the answer of a case that differs in one thing.
#[track_caller]
pub(crate) fn verify_rejects(case: &impl Case, mistake: &str, wrong: &impl Case) {
    assert_beyond(&format!("{}, {mistake}", case.label()), &wrong.oracle(case.dtype()), &case.expected());
}

/// Checks that a case gives the same bits wherever its weights rest and however they came there.
#[track_caller]
pub(crate) fn verify_residency<B: Backend>(devices: &[B; 2], case: &impl Case) {
    let [backend, peer] = devices;
    let (label, tensors) = (case.label(), case.weights());
    let run = |weights: &[B::Weight], how: &str| {
        case.run(backend, weights).unwrap_or_else(|error| panic!("{label}, weights {how}: {error}"))
    };
    let loaded = run(&load_all(backend, &tensors), "loaded");
    let made: Vec<VecTensor> = tensors.iter().cloned().map(VecTensor::made).collect();
    assert_same_bits(&format!("{label}, weights made"), &run(&load_all(backend, &made), "made"), &loaded);

    let peer_weights = load_all(peer, &tensors).into_iter().map(StagedSource::Peer).collect();
    let hosts = |tensors: &[VecTensor]| tensors.iter().map(|tensor| StagedSource::Host(tensor.shared())).collect();
    let slot_bytes = tensors.iter().map(|tensor| num_bytes(tensor).next_multiple_of(STAGED_ALIGNMENT)).sum();
    let mut ring = backend.staging(2, slot_bytes).unwrap_or_else(|error| panic!("{label}: {error}"));
    let sources: [(&str, Vec<StagedSource<B::Weight>>); 3] = [
        ("staged from the file", hosts(&tensors)),
        ("staged as they are made", hosts(&made)),
        ("staged from a peer", peer_weights),
    ];
    for (index, (how, sources)) in sources.into_iter().enumerate() {
        let slot = index % 2;
        backend.stage(&mut ring, slot, sources).unwrap_or_else(|error| panic!("{label}, {how}: {error}"));
        let weights = backend.staged(&mut ring, slot).unwrap_or_else(|error| panic!("{label}, {how}: {error}"));
        assert_eq!(weights.len(), tensors.len(), "{label}, {how}: number of weights");
        assert_same_bits(&format!("{label}, weights {how}"), &run(&weights, how), &loaded);
    }

    let attached = tensors.iter().map(|tensor| backend.attach(&tensor.shared())).collect::<Result<Vec<_>, _>>();
    match attached.and_then(|weights| case.run(backend, &weights)) {
        Ok(found) => assert_same_bits(&format!("{label}, weights attached"), &found, &loaded),
        // Whether an operation takes attached weights is the backend's own affair.
        Err(BackendError::Unsupported { .. }) => {}
        Err(error) => panic!("{label}, weights attached: {error}"),
    }
}

/// Checks that a call is refused for its shapes.
#[track_caller]
pub(crate) fn refuses_shape<T>(what: &str, result: Result<T, BackendError>) {
    match result {
        Err(BackendError::Shape { .. }) => {}
        Err(error) => panic!("{what}: refused, but not as a wrong shape: {error}"),
        Ok(_) => panic!("{what}: accepted"),
    }
}

/// Checks that a call is refused.
#[track_caller]
pub(crate) fn refuses<T>(what: &str, result: Result<T, BackendError>) {
    assert!(result.is_err(), "{what}: accepted");
}

/// A buffer of activations whose first rows are `values`.
#[track_caller]
pub(crate) fn buffer<B: Backend>(backend: &B, rows: usize, width: usize, values: &[f32]) -> B::Buffer {
    typed_buffer(backend, backend.activation_dtype(), rows, width, values)
}

/// A buffer of `dtype` whose first rows are `values`.
#[track_caller]
pub(crate) fn typed_buffer<B: Backend>(
    backend: &B, dtype: DType, rows: usize, width: usize, values: &[f32],
) -> B::Buffer {
    let mut buffer = backend.alloc("test buffer", dtype, [rows, width]).unwrap_or_else(|error| panic!("{error}"));
    backend.write(values, &mut buffer, 0).unwrap_or_else(|error| panic!("{error}"));
    buffer
}

/// The weight in the device's memory.
#[track_caller]
pub(crate) fn load<B: Backend>(backend: &B, tensor: &VecTensor) -> B::Weight {
    backend.load(&tensor.shared()).unwrap_or_else(|error| panic!("{error}"))
}

fn load_all<B: Backend>(backend: &B, tensors: &[VecTensor]) -> Vec<B::Weight> {
    tensors.iter().map(|tensor| load(backend, tensor)).collect()
}

/// Bytes of a tensor in its file.
pub(crate) fn num_bytes(tensor: &VecTensor) -> usize {
    tensor.values().len() * tensor.dtype().size_bytes()
}

/// `values` with each row moved on by one place, for wrong answers.
pub(crate) fn rotated(values: &[f32]) -> Vec<f32> {
    let mut rotated = values.to_vec();
    rotated.rotate_right(1);
    rotated
}
