use cogvlm_core::DType;

use super::approx::{Approx, UNIT_F32, sum_error};
use super::batches::{self, Routing};
use super::data::{Random, garbage};
use super::harness::{
    Case, EXTRA_ROWS, ROW_COUNTS, WEIGHT_DTYPES, buffer, devices, load, refuses_shape, rotated, verify, verify_rejects,
    verify_residency, weight_unit,
};
use super::{Make, VecTensor};
use crate::{Backend, BackendError, Batch, HostTensor, oracle};

#[derive(Clone)]
struct RmsNorm {
    dtype: DType,
    rows: usize,
    width: usize,
    /// Rows beyond included.
    x: Vec<f32>,
    weight: VecTensor,
    eps: f32,
}

impl RmsNorm {
    /// Rows of size about `scale`.
    fn new(dtype: DType, weight_dtype: DType, rows: usize, width: usize, scale: f32) -> Self {
        let mut random = Random::new(21);
        let x = random.values(dtype, (rows + EXTRA_ROWS) * width, scale);
        let weight = VecTensor::new("norm", weight_dtype, &[width], &random.values(DType::F32, width, 1.0));
        Self { dtype, rows, width, x, weight, eps: 1e-5 }
    }

    fn used(&self) -> &[f32] {
        &self.x[..self.rows * self.width]
    }

    fn with_weight(&self, values: &[f32]) -> Self {
        Self { weight: VecTensor::new("norm", self.weight.dtype(), &[self.width], values), ..self.clone() }
    }
}

/// `weight x / √(mean square + eps)` of each row. Half the error of the mean square goes to its root; the division, the
/// sum with eps, the root and the two products add a few units.
fn expected_rows(x: &[f32], weight: &VecTensor, eps: f32, dtype: DType) -> Vec<Approx> {
    let width = weight.values().len();
    let weight_unit = weight_unit(weight.dtype(), dtype);
    let relative = sum_error(width) / 2.0 + 8.0 * UNIT_F32 + weight_unit;
    let mut expected = Vec::new();
    for row in x.chunks_exact(width) {
        let mean_square = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / width as f64;
        let scale = 1.0 / (mean_square + f64::from(eps)).sqrt();
        for (&x, &weight) in row.iter().zip(weight.values()) {
            let value = f64::from(weight) * f64::from(x) * scale;
            expected.push(Approx::new(value, value.abs() * relative).rounded(dtype));
        }
    }
    expected
}

impl Case for RmsNorm {
    fn label(&self) -> String {
        format!("rms_norm [{}, {}], weight {}", self.rows, self.width, self.weight.dtype())
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn weights(&self) -> Vec<VecTensor> {
        vec![self.weight.clone()]
    }

    fn run<B: Backend>(&self, backend: &B, weights: &[B::Weight]) -> Result<Vec<f32>, BackendError> {
        let all_rows = self.rows + EXTRA_ROWS;
        let x = buffer(backend, all_rows, self.width, &self.x);
        let mut out = buffer(backend, all_rows, self.width, &garbage(self.dtype, self.x.len()));
        backend.rms_norm(&x, &weights[0], self.eps, self.rows, &mut out)?;
        backend.read(&out, 0..all_rows)
    }

    fn expected(&self) -> Vec<Approx> {
        let mut expected = expected_rows(self.used(), &self.weight, self.eps, self.dtype);
        expected.extend(garbage(self.dtype, self.x.len())[expected.len()..].iter().map(|&value| Approx::exact(value)));
        expected
    }

    fn oracle(&self, dtype: DType) -> Vec<f32> {
        let mut out = oracle::rms_norm(self.used(), self.weight.values(), self.eps, dtype);
        out.extend(&garbage(self.dtype, self.x.len())[out.len()..]);
        out
    }
}

/// One rounding, eps inside the root, rows of any size.
pub fn rms_norm<B: Backend>(make: Make<'_, B>) {
    let devices = devices(make);
    let backend = &devices[0];
    let dtype = backend.activation_dtype();
    for (index, rows) in ROW_COUNTS.into_iter().enumerate() {
        verify(&devices, &RmsNorm::new(dtype, WEIGHT_DTYPES[index % 3], rows, [8, 33, 100][index % 3], 1.0));
    }
    for (rows, width) in [(1, 1), (2, 1001), (3, 1792), (2, 4096), (5, 31)] {
        for weight_dtype in WEIGHT_DTYPES {
            verify(&devices, &RmsNorm::new(dtype, weight_dtype, rows, width, 1.0));
        }
    }
    // Squares of 10⁷ still fit f32; rows of zeros have eps alone under the root.
    for scale in [1e7, 1e-6, 0.0] {
        verify(&devices, &RmsNorm::new(dtype, dtype, 4, 100, scale));
    }
    for weight_dtype in WEIGHT_DTYPES {
        verify_residency(&devices, &RmsNorm::new(dtype, weight_dtype, 9, 101, 1.0));
    }
    let case = RmsNorm::new(dtype, dtype, 4, 33, 1.0);
    verify_rejects(&case, "weight rotated", &case.with_weight(&rotated(case.weight.values())));
    let small = RmsNorm::new(dtype, dtype, 4, 33, 3e-3);
    verify(&devices, &small);
    verify_rejects(&small, "another eps", &RmsNorm { eps: 1e-6, ..small.clone() });

    let (weight, other) = (load(backend, &case.weight), load(backend, &RmsNorm::new(dtype, dtype, 1, 32, 1.0).weight));
    let x = buffer(backend, 7, 33, &[]);
    let [mut out, mut short, mut narrow] =
        [(7, 33), (4, 33), (7, 32)].map(|(rows, width)| buffer(backend, rows, width, &[]));
    refuses_shape("rms_norm: more rows than x has", backend.rms_norm(&x, &weight, 1e-5, 8, &mut out));
    refuses_shape("rms_norm: far more rows than x has", backend.rms_norm(&x, &weight, 1e-5, usize::MAX, &mut out));
    refuses_shape("rms_norm: more rows than out has", backend.rms_norm(&x, &weight, 1e-5, 5, &mut short));
    refuses_shape("rms_norm: out of another width", backend.rms_norm(&x, &weight, 1e-5, 2, &mut narrow));
    refuses_shape("rms_norm: weight of another width", backend.rms_norm(&x, &other, 1e-5, 2, &mut out));
}

#[derive(Clone)]
struct RmsNormLogitRows {
    norm: RmsNorm,
    batch: Batch,
}

impl RmsNormLogitRows {
    fn new(dtype: DType, sequences: &[(usize, usize)], logit_rows: Option<&[usize]>) -> Self {
        let (mut batch, _) = batches::batch(&mut Random::new(22), sequences, Routing::Language, 100);
        if let Some(logit_rows) = logit_rows {
            batch.logit_rows = logit_rows.to_vec();
        }
        Self { norm: RmsNorm::new(dtype, dtype, batch.num_rows(), 65, 1.0), batch }
    }

    fn gathered(&self) -> Vec<f32> {
        let width = self.norm.width;
        self.batch.logit_rows.iter().flat_map(|row| self.norm.x[row * width..][..width].to_vec()).collect()
    }

    fn out_rows(&self) -> usize {
        self.batch.logit_rows.len() + EXTRA_ROWS
    }
}

impl Case for RmsNormLogitRows {
    fn label(&self) -> String {
        format!("rms_norm_logit_rows {:?} of {}", self.batch.logit_rows, self.norm.rows)
    }

    fn dtype(&self) -> DType {
        self.norm.dtype
    }

    fn weights(&self) -> Vec<VecTensor> {
        self.norm.weights()
    }

    fn run<B: Backend>(&self, backend: &B, weights: &[B::Weight]) -> Result<Vec<f32>, BackendError> {
        let RmsNorm { dtype, rows, width, ref x, eps, .. } = self.norm;
        let x = buffer(backend, rows + EXTRA_ROWS, width, x);
        let out_rows = self.out_rows();
        let mut out = buffer(backend, out_rows, width, &garbage(dtype, out_rows * width));
        backend.rms_norm_logit_rows(&x, &weights[0], eps, &batches::tables(backend, &self.batch), &mut out)?;
        backend.read(&out, 0..out_rows)
    }

    fn expected(&self) -> Vec<Approx> {
        let RmsNorm { dtype, width, ref weight, eps, .. } = self.norm;
        let mut expected = expected_rows(&self.gathered(), weight, eps, dtype);
        let tail = &garbage(dtype, self.out_rows() * width)[expected.len()..];
        expected.extend(tail.iter().map(|&value| Approx::exact(value)));
        expected
    }

    fn oracle(&self, dtype: DType) -> Vec<f32> {
        let mut out = oracle::rms_norm(&self.gathered(), self.norm.weight.values(), self.norm.eps, dtype);
        out.extend(&garbage(self.norm.dtype, self.out_rows() * self.norm.width)[out.len()..]);
        out
    }
}

/// The rows that logits are wanted of, in order.
pub fn rms_norm_logit_rows<B: Backend>(make: Make<'_, B>) {
    let devices = devices(make);
    let backend = &devices[0];
    let dtype = backend.activation_dtype();
    verify(&devices, &RmsNormLogitRows::new(dtype, &[(1, 1)], None));
    verify(&devices, &RmsNormLogitRows::new(dtype, &[(1, 9), (1, 30), (1, 2)], None));
    verify(&devices, &RmsNormLogitRows::new(dtype, &[(40, 40)], Some(&[])));
    verify(&devices, &RmsNormLogitRows::new(dtype, &[(33, 40), (1, 2), (9, 9)], Some(&[0, 5, 6, 32, 42])));
    let case = RmsNormLogitRows::new(dtype, &[(33, 40), (1, 2), (9, 9)], None);
    verify(&devices, &case);
    verify_residency(&devices, &case);
    let mut neighbours = case.clone();
    neighbours.batch.logit_rows.iter_mut().for_each(|row| *row -= 1);
    verify_rejects(&case, "the rows before", &neighbours);

    let weight = load(backend, &case.norm.weight);
    let tables = batches::tables(backend, &case.batch);
    let attempt = |what: &str, [x_rows, x_width]: [usize; 2], [out_rows, out_width]: [usize; 2]| {
        let x = buffer(backend, x_rows, x_width, &[]);
        let mut out = buffer(backend, out_rows, out_width, &[]);
        refuses_shape(what, backend.rms_norm_logit_rows(&x, &weight, 1e-5, &tables, &mut out));
    };
    attempt("rms_norm_logit_rows: x ends before the last row", [42, 65], [3, 65]);
    attempt("rms_norm_logit_rows: too few rows in out", [43, 65], [2, 65]);
    attempt("rms_norm_logit_rows: x of another width", [43, 64], [3, 65]);
    attempt("rms_norm_logit_rows: out of another width", [43, 65], [3, 64]);
}
