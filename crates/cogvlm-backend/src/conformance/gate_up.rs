use cogvlm_core::DType;
use cogvlm_core::tokens::ExpertRange;

use super::approx::Approx;
use super::batches::Routing;
use super::data::{Random, garbage};
use super::experts::ExpertTensors;
use super::harness::{
    Case, EXTRA_ROWS, ROW_COUNTS, WEIGHT_DTYPES, buffer, devices, load, refuses, refuses_shape, verify, verify_rejects,
    verify_residency,
};
use super::{Make, VecTensor};
use crate::{Backend, BackendError, ExpertWeights, oracle};

#[derive(Clone)]
struct GateUp {
    dtype: DType,
    in_features: usize,
    out_features: usize,
    ranges: Vec<ExpertRange>,
    /// Rows beyond included.
    x: Vec<f32>,
    gate: ExpertTensors,
    up: ExpertTensors,
}

impl GateUp {
    /// Rows of size about `scale`.
    fn new(
        dtype: DType, weight_dtype: DType, [rows, in_features, out_features]: [usize; 3], routing: Routing, scale: f32,
    ) -> Self {
        let mut random = Random::new(51);
        let ranges = routing.ranges(rows);
        let x = random.values(dtype, (rows + EXTRA_ROWS) * in_features, scale);
        let mut weights = || ExpertTensors::new(&mut random, weight_dtype, [out_features, in_features], &ranges);
        let (gate, up) = (weights(), weights());
        Self { dtype, in_features, out_features, ranges, x, gate, up }
    }

    fn all_rows(&self) -> usize {
        self.ranges.last().map_or(0, |range| range.rows.end) + EXTRA_ROWS
    }

    fn before(&self) -> Vec<f32> {
        garbage(self.dtype, self.all_rows() * self.out_features)
    }
}

impl Case for GateUp {
    fn label(&self) -> String {
        let (Self { in_features, out_features, .. }, ranges) = (self, self.ranges.len());
        let rows = self.all_rows() - EXTRA_ROWS;
        let weight = self.gate.dtype().map_or("none".to_owned(), |dtype| dtype.to_string());
        format!("gate_up [{rows}, {in_features}] -> {out_features}, weights {weight}, {ranges} ranges")
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn weights(&self) -> Vec<VecTensor> {
        self.gate.tensors().chain(self.up.tensors()).collect()
    }

    fn run<B: Backend>(&self, backend: &B, weights: &[B::Weight]) -> Result<Vec<f32>, BackendError> {
        let x = buffer(backend, self.all_rows(), self.in_features, &self.x);
        let mut out = buffer(backend, self.all_rows(), self.out_features, &self.before());
        let mut weights = weights.iter();
        let (gate, up) = (self.gate.take(&mut weights), self.up.take(&mut weights));
        backend.gate_up(&x, gate, up, &self.ranges, &mut out)?;
        backend.read(&out, 0..self.all_rows())
    }

    fn expected(&self) -> Vec<Approx> {
        let products = |weights: &ExpertTensors| weights.products(&self.x, self.in_features, &self.ranges, self.dtype);
        let mut expected: Vec<Approx> = self.before().into_iter().map(Approx::exact).collect();
        for ((expected, gate), up) in expected.iter_mut().zip(products(&self.gate)).zip(products(&self.up)) {
            let silu = gate.rounded(self.dtype).silu().rounded(self.dtype);
            *expected = silu.times(up.rounded(self.dtype)).rounded(self.dtype);
        }
        expected
    }

    fn oracle(&self, dtype: DType) -> Vec<f32> {
        let (gate, up) = (self.gate.values(), self.up.values());
        let mut out = oracle::gate_up(&self.x, gate, up, &self.ranges, self.in_features, dtype);
        out.extend(&self.before()[out.len()..]);
        out
    }
}

/// The gated product, rounded four times.
pub fn gate_up<B: Backend>(make: Make<'_, B>) {
    let devices = devices(make);
    let backend = &devices[0];
    let dtype = backend.activation_dtype();
    for (index, rows) in ROW_COUNTS.into_iter().enumerate() {
        for routing in Routing::ALL {
            let [in_features, out_features] = [[64, 33], [40, 48], [23, 7]][index % 3];
            verify(&devices, &GateUp::new(dtype, dtype, [rows, in_features, out_features], routing, 1.0));
        }
    }
    for weight_dtype in WEIGHT_DTYPES {
        verify(&devices, &GateUp::new(dtype, weight_dtype, [1, 4096, 30], Routing::Language, 1.0));
        verify(&devices, &GateUp::new(dtype, weight_dtype, [4, 4096, 9], Routing::Image, 1.0));
        verify_residency(&devices, &GateUp::new(dtype, weight_dtype, [9, 101, 35], Routing::Image, 1.0));
        verify_residency(&devices, &GateUp::new(dtype, weight_dtype, [1, 101, 35], Routing::Language, 1.0));
    }
    for shape in [[3, 24, 4300], [16, 24, 4300], [16, 2312, 20]] {
        verify(&devices, &GateUp::new(dtype, dtype, shape, Routing::Language, 1.0));
    }
    // Gates of hundreds, where e^100 is beyond f32.
    verify(&devices, &GateUp::new(dtype, dtype, [9, 33, 40], Routing::Image, 100.0));

    let case = GateUp::new(dtype, dtype, [9, 33, 20], Routing::Image, 1.0);
    let (gate, up) = (case.gate.clone(), case.up.clone());
    let exchanged = GateUp { gate: up.clone(), up: gate.clone(), ..case.clone() };
    verify_rejects(&case, "gate and up exchanged", &exchanged);
    let swapped = GateUp { gate: gate.swapped(), up: up.swapped(), ..case.clone() };
    verify_rejects(&case, "experts swapped", &swapped);

    let [gate_language, gate_vision, up_language, up_vision] = <[VecTensor; 4]>::try_from(case.weights())
        .expect("both experts have rows")
        .map(|tensor| load(backend, &tensor));
    let gate = ExpertWeights { language: Some(&gate_language), vision: Some(&gate_vision) };
    let up = ExpertWeights { language: Some(&up_language), vision: Some(&up_vision) };
    type Pair<'a, B> = ExpertWeights<'a, <B as Backend>::Weight>;
    let attempt = |gate: Pair<'_, B>, up: Pair<'_, B>, x: [usize; 2], out: [usize; 2]| {
        let x = buffer(backend, x[0], x[1], &[]);
        let mut out = buffer(backend, out[0], out[1], &[]);
        backend.gate_up(&x, gate, up, &case.ranges, &mut out)
    };
    refuses_shape("gate_up: ranges beyond x", attempt(gate, up, [8, 33], [9, 20]));
    refuses_shape("gate_up: ranges beyond out", attempt(gate, up, [9, 33], [8, 20]));
    refuses_shape("gate_up: x of another width", attempt(gate, up, [9, 34], [9, 20]));
    refuses_shape("gate_up: out of another width", attempt(gate, up, [9, 33], [9, 19]));
    refuses("gate_up: no vision gate", attempt(ExpertWeights { vision: None, ..gate }, up, [9, 33], [9, 20]));
    refuses("gate_up: no language up", attempt(gate, ExpertWeights { language: None, ..up }, [9, 33], [9, 20]));
    let other = load(backend, &VecTensor::new("other", dtype, &[19, 33], &[0.0; 19 * 33]));
    let uneven = ExpertWeights { language: Some(&other), vision: Some(&up_vision) };
    refuses_shape("gate_up: up of another shape than gate", attempt(gate, uneven, [9, 33], [9, 20]));
}
