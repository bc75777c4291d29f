use cogvlm_core::DType;
use cogvlm_core::tokens::ExpertRange;

use super::approx::Approx;
use super::batches::Routing;
use super::data::Random;
use super::experts::ExpertTensors;
use super::harness::{
    Case, EXTRA_ROWS, ROW_COUNTS, WEIGHT_DTYPES, buffer, devices, load, refuses, refuses_shape, verify, verify_rejects,
    verify_residency,
};
use super::{Make, VecTensor};
use crate::{Backend, BackendError, ExpertWeights, oracle};

#[derive(Clone)]
struct LinearResidual {
    dtype: DType,
    in_features: usize,
    out_features: usize,
    ranges: Vec<ExpertRange>,
    /// Rows beyond included.
    x: Vec<f32>,
    residual: Vec<f32>,
    weights: ExpertTensors,
}

impl LinearResidual {
    fn new(dtype: DType, weight_dtype: DType, [rows, in_features, out_features]: [usize; 3], routing: Routing) -> Self {
        let mut random = Random::new(41);
        let ranges = routing.ranges(rows);
        let x = random.values(dtype, (rows + EXTRA_ROWS) * in_features, 1.0);
        let residual = random.values(dtype, (rows + EXTRA_ROWS) * out_features, 2.0);
        let weights = ExpertTensors::new(&mut random, weight_dtype, [out_features, in_features], &ranges);
        Self { dtype, in_features, out_features, ranges, x, residual, weights }
    }

    fn num_rows(&self) -> usize {
        self.ranges.last().map_or(0, |range| range.rows.end)
    }
}

impl Case for LinearResidual {
    fn label(&self) -> String {
        let (Self { in_features, out_features, .. }, rows, ranges) = (self, self.num_rows(), self.ranges.len());
        let weight = self.weights.dtype().map_or("none".to_owned(), |dtype| dtype.to_string());
        format!("linear_residual [{rows}, {in_features}] -> {out_features}, weights {weight}, {ranges} ranges")
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn weights(&self) -> Vec<VecTensor> {
        self.weights.tensors().collect()
    }

    fn run<B: Backend>(&self, backend: &B, weights: &[B::Weight]) -> Result<Vec<f32>, BackendError> {
        let all_rows = self.num_rows() + EXTRA_ROWS;
        let x = buffer(backend, all_rows, self.in_features, &self.x);
        let mut residual = buffer(backend, all_rows, self.out_features, &self.residual);
        let weights = self.weights.take(&mut weights.iter());
        backend.linear_residual(&x, weights, &self.ranges, &mut residual)?;
        backend.read(&residual, 0..all_rows)
    }

    fn expected(&self) -> Vec<Approx> {
        let products = self.weights.products(&self.x, self.in_features, &self.ranges, self.dtype);
        let mut expected: Vec<Approx> = self.residual.iter().map(|&value| Approx::exact(value)).collect();
        for (expected, product) in expected.iter_mut().zip(products) {
            *expected = product.rounded(self.dtype).plus(*expected).rounded(self.dtype);
        }
        expected
    }

    fn oracle(&self, dtype: DType) -> Vec<f32> {
        let mut out = self.residual.clone();
        let sums = oracle::linear_residual(
            &self.x,
            self.weights.values(),
            &self.ranges,
            self.in_features,
            &self.residual,
            dtype,
        );
        out[..sums.len()].copy_from_slice(&sums);
        out
    }
}

/// The product with each row's expert, rounded, added to the residual in place, rounded.
pub fn linear_residual<B: Backend>(make: Make<'_, B>) {
    let devices = devices(make);
    let backend = &devices[0];
    let dtype = backend.activation_dtype();
    for (index, rows) in ROW_COUNTS.into_iter().enumerate() {
        for routing in Routing::ALL {
            let [in_features, out_features] = [[65, 33], [40, 64], [24, 7]][index % 3];
            verify(&devices, &LinearResidual::new(dtype, dtype, [rows, in_features, out_features], routing));
        }
    }
    for (shape, routing) in
        [([1, 4096, 33], Routing::Language), ([4, 4096, 12], Routing::Image), ([2, 11008, 9], Routing::Vision)]
    {
        for weight_dtype in WEIGHT_DTYPES {
            verify(&devices, &LinearResidual::new(dtype, weight_dtype, shape, routing));
        }
    }
    for shape in [[2, 24, 4700], [16, 24, 4700], [16, 2312, 20]] {
        verify(&devices, &LinearResidual::new(dtype, dtype, shape, Routing::Language));
    }
    for weight_dtype in WEIGHT_DTYPES {
        verify_residency(&devices, &LinearResidual::new(dtype, weight_dtype, [9, 101, 35], Routing::Image));
        verify_residency(&devices, &LinearResidual::new(dtype, weight_dtype, [1, 101, 35], Routing::Language));
    }

    let case = LinearResidual::new(dtype, dtype, [9, 33, 20], Routing::Image);
    verify_rejects(&case, "experts swapped", &LinearResidual { weights: case.weights.swapped(), ..case.clone() });
    let mut shifted = case.clone();
    shifted.ranges[0].rows.end += 1;
    shifted.ranges[1].rows.start += 1;
    verify_rejects(&case, "one row with the other expert", &shifted);

    let [language, vision] = [&case.weights.tensors().next(), &case.weights.tensors().nth(1)]
        .map(|tensor| load(backend, tensor.as_ref().expect("both experts have rows")));
    let both = ExpertWeights { language: Some(&language), vision: Some(&vision) };
    let attempt = |weights: ExpertWeights<'_, B::Weight>, x: [usize; 2], residual: [usize; 2]| {
        let x = buffer(backend, x[0], x[1], &[]);
        let mut residual = buffer(backend, residual[0], residual[1], &[]);
        backend.linear_residual(&x, weights, &case.ranges, &mut residual)
    };
    refuses_shape("linear_residual: ranges beyond x", attempt(both, [8, 33], [9, 20]));
    refuses_shape("linear_residual: ranges beyond the residual", attempt(both, [9, 33], [8, 20]));
    refuses_shape("linear_residual: x of another width", attempt(both, [9, 32], [9, 20]));
    refuses_shape("linear_residual: residual of another width", attempt(both, [9, 33], [9, 21]));
    refuses("linear_residual: no vision weight", attempt(ExpertWeights { vision: None, ..both }, [9, 33], [9, 20]));
    refuses("linear_residual: no language weight", attempt(ExpertWeights { language: None, ..both }, [9, 33], [9, 20]));
    let other = load(backend, &VecTensor::new("other", dtype, &[19, 33], &[0.0; 19 * 33]));
    let uneven = ExpertWeights { language: Some(&language), vision: Some(&other) };
    refuses_shape("linear_residual: one expert of another shape", attempt(uneven, [9, 33], [9, 20]));
}
