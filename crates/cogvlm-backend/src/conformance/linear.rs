use cogvlm_core::DType;

use super::approx::Approx;
use super::data::{Random, garbage};
use super::harness::{
    Case, EXTRA_ROWS, ROW_COUNTS, WEIGHT_DTYPES, buffer, devices, load, refuses_shape, rotated, typed_buffer, verify,
    verify_rejects, verify_residency, weight_unit,
};
use super::{Make, VecTensor};
use crate::{Activation, Backend, BackendError, HostTensor, oracle};

/// `[rows, in_features]` by `[out_features, in_features]`: odd, and as the model has them, cut to a few columns.
const SHAPES: [[usize; 3]; 9] = [
    [1, 1, 1],
    [3, 5, 7],
    [5, 257, 100],
    [1, 4096, 130],
    [3, 4096, 24],
    [2, 1792, 40],
    [1, 11008, 9],
    [2, 15360, 5],
    [17, 588, 20],
];

#[derive(Clone)]
struct Linear {
    dtype: DType,
    rows: usize,
    in_features: usize,
    out_features: usize,
    /// Rows beyond included.
    x: Vec<f32>,
    weight: VecTensor,
    bias: Option<VecTensor>,
    activation: Activation,
    /// The operation: [`Backend::logits`], whose result is stored as f32, or [`Backend::linear`].
    gives_logits: bool,
}

impl Linear {
    fn new(dtype: DType, weight_dtype: DType, [rows, in_features, out_features]: [usize; 3]) -> Self {
        let mut random = Random::new(31);
        let x = random.values(dtype, (rows + EXTRA_ROWS) * in_features, 1.0);
        let scale = 1.0 / (in_features as f32).sqrt();
        let weight = random.values(DType::F32, out_features * in_features, scale);
        let weight = VecTensor::new("weight", weight_dtype, &[out_features, in_features], &weight);
        let activation = Activation::Identity;
        Self { dtype, rows, in_features, out_features, x, weight, bias: None, activation, gives_logits: false }
    }

    fn biased(self) -> Self {
        let values = Random::new(32).values(DType::F32, self.out_features, 1.0);
        let bias = VecTensor::new("bias", self.weight.dtype(), &[self.out_features], &values);
        Self { bias: Some(bias), ..self }
    }

    fn with_gelu(self) -> Self {
        Self { activation: Activation::Gelu, ..self }
    }

    fn with_rotated_weight(&self) -> Self {
        let weight = VecTensor::new("weight", self.weight.dtype(), self.weight.shape(), &rotated(self.weight.values()));
        Self { weight, ..self.clone() }
    }

    /// What stands in `out` before.
    fn before(&self) -> Vec<f32> {
        garbage(self.dtype, (self.rows + EXTRA_ROWS) * self.out_features)
    }

    fn used(&self) -> &[f32] {
        &self.x[..self.rows * self.in_features]
    }
}

impl Case for Linear {
    fn label(&self) -> String {
        let name = if self.gives_logits { "logits" } else { "linear" };
        let bias = if self.bias.is_some() { ", bias" } else { "" };
        let Self { rows, in_features, out_features, activation, .. } = self;
        format!(
            "{name} [{rows}, {in_features}] -> {out_features}, weight {}{bias}, {activation:?}",
            self.weight.dtype()
        )
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn weights(&self) -> Vec<VecTensor> {
        [&self.weight].into_iter().chain(&self.bias).cloned().collect()
    }

    fn run<B: Backend>(&self, backend: &B, weights: &[B::Weight]) -> Result<Vec<f32>, BackendError> {
        let all_rows = self.rows + EXTRA_ROWS;
        let x = buffer(backend, all_rows, self.in_features, &self.x);
        let out_dtype = if self.gives_logits { DType::F32 } else { self.dtype };
        let mut out = typed_buffer(backend, out_dtype, all_rows, self.out_features, &self.before());
        if self.gives_logits {
            backend.logits(&x, &weights[0], self.rows, &mut out)?;
        } else {
            backend.linear(&x, &weights[0], weights.get(1), self.activation, self.rows, &mut out)?;
        }
        backend.read(&out, 0..all_rows)
    }

    fn expected(&self) -> Vec<Approx> {
        let unit = weight_unit(self.weight.dtype(), self.dtype);
        let mut expected = Vec::new();
        for x in self.used().chunks_exact(self.in_features) {
            for (column, weight) in self.weight.values().chunks_exact(self.in_features).enumerate() {
                let bias = self.bias.as_ref().map_or(0.0, |bias| bias.values()[column]);
                let sum = Approx::dot(x, weight, unit).plus(Approx::weight(bias, unit)).rounded(self.dtype);
                expected.push(match self.activation {
                    Activation::Identity => sum,
                    Activation::Gelu => sum.gelu().rounded(self.dtype),
                });
            }
        }
        expected.extend(self.before()[expected.len()..].iter().map(|&value| Approx::exact(value)));
        expected
    }

    fn oracle(&self, dtype: DType) -> Vec<f32> {
        let bias = self.bias.as_ref().map(|bias| &bias.values()[..]);
        let mut out = oracle::linear(self.used(), self.weight.values(), bias, self.in_features, self.activation, dtype);
        out.extend(&self.before()[out.len()..]);
        out
    }
}

/// The product, rounded after the bias and after the activation.
pub fn linear<B: Backend>(make: Make<'_, B>) {
    let devices = devices(make);
    let backend = &devices[0];
    let dtype = backend.activation_dtype();
    for (index, rows) in ROW_COUNTS.into_iter().enumerate() {
        let [in_features, out_features] = [[65, 33], [64, 64], [30, 70]][index % 3];
        let case = Linear::new(dtype, dtype, [rows, in_features, out_features]);
        verify(&devices, &case);
        verify(&devices, &case.biased().with_gelu());
    }
    for (index, shape) in SHAPES.into_iter().enumerate() {
        verify(&devices, &Linear::new(dtype, WEIGHT_DTYPES[index % 3], shape).biased());
        verify(&devices, &Linear::new(dtype, dtype, shape).with_gelu());
    }
    // Few rows over much depth, and over more of a weight's rows than a device computes at once.
    for shape in [[3, 2312, 40], [9, 2312, 40], [16, 4616, 20], [1, 24, 8700], [16, 72, 8700]] {
        verify(&devices, &Linear::new(dtype, dtype, shape));
    }
    for weight_dtype in WEIGHT_DTYPES {
        for rows in [1, 2, 9] {
            verify_residency(&devices, &Linear::new(dtype, weight_dtype, [rows, 101, 35]).biased());
        }
    }
    // Sums of about ±100, where the activation is the identity or zero.
    let mut large = Linear::new(dtype, dtype, [5, 33, 40]).with_gelu();
    large.x.iter_mut().for_each(|x| *x = oracle::round_to(dtype, f64::from(*x) * 100.0));
    verify(&devices, &large);

    let case = Linear::new(dtype, dtype, [4, 33, 20]);
    verify_rejects(&case, "weight rotated", &case.with_rotated_weight());
    verify_rejects(&case.clone().biased(), "no bias", &case);
    verify_rejects(&case.clone().with_gelu(), "no activation", &case);
    if dtype == DType::F32 {
        // The other form of gelu is too near for 16 bits.
        let tanh_gelu = |x: f32| {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (f64::from(x) + 0.044_715 * f64::from(x).powi(3));
            (0.5 * f64::from(x) * (1.0 + inner.tanh())) as f32
        };
        let mut wrong = case.oracle(dtype);
        wrong[..4 * 20].iter_mut().for_each(|x| *x = tanh_gelu(*x));
        super::approx::assert_beyond("linear, tanh gelu", &wrong, &case.clone().with_gelu().expected());
    }

    let weight = load(backend, &case.weight);
    let bias = load(backend, &case.clone().biased().bias.expect("it has one"));
    let short_bias = load(backend, &Linear::new(dtype, dtype, [1, 1, 19]).biased().bias.expect("it has one"));
    let attempt = |what: &str, x: [usize; 2], bias: Option<&B::Weight>, rows: usize, out: [usize; 2]| {
        let x = buffer(backend, x[0], x[1], &[]);
        let mut out = buffer(backend, out[0], out[1], &[]);
        refuses_shape(what, backend.linear(&x, &weight, bias, Activation::Identity, rows, &mut out));
    };
    attempt("linear: more rows than x has", [4, 33], Some(&bias), 5, [9, 20]);
    attempt("linear: far more rows than x has", [4, 33], Some(&bias), usize::MAX, [9, 20]);
    attempt("linear: more rows than out has", [9, 33], None, 5, [4, 20]);
    attempt("linear: x of another width", [4, 32], None, 1, [4, 20]);
    attempt("linear: out of another width", [4, 33], None, 1, [4, 21]);
    attempt("linear: bias of another width", [4, 33], Some(&short_bias), 1, [4, 20]);
    attempt("linear: a weight as bias", [4, 33], Some(&weight), 1, [4, 20]);
}

/// Products rounded to the activation type, stored as f32.
pub fn logits<B: Backend>(make: Make<'_, B>) {
    let devices = devices(make);
    let backend = &devices[0];
    let dtype = backend.activation_dtype();
    let logits = |weight_dtype: DType, shape: [usize; 3]| Linear {
        gives_logits: true,
        ..Linear::new(dtype, weight_dtype, shape)
    };
    for (index, rows) in ROW_COUNTS.into_iter().enumerate() {
        verify(&devices, &logits(WEIGHT_DTYPES[index % 3], [rows, [24, 33, 64][index % 3], 65]));
        verify(&devices, &logits(dtype, [rows, 64, 33]));
    }
    verify(&devices, &logits(dtype, [1, 4096, 200]));
    verify(&devices, &logits(dtype, [2, 7, 3200]));
    verify(&devices, &logits(dtype, [16, 1096, 150]));
    verify(&devices, &logits(dtype, [16, 24, 8700]));
    verify_residency(&devices, &logits(dtype, [3, 65, 257]));
    let case = logits(dtype, [3, 65, 40]);
    verify_rejects(&case, "weight rotated", &case.with_rotated_weight());

    let weight = load(backend, &case.weight);
    let attempt = |what: &str, x: [usize; 2], rows: usize, out: [usize; 2]| {
        let x = buffer(backend, x[0], x[1], &[]);
        let mut out = typed_buffer(backend, DType::F32, out[0], out[1], &[]);
        refuses_shape(what, backend.logits(&x, &weight, rows, &mut out));
    };
    attempt("logits: more rows than x has", [2, 65], 3, [9, 40]);
    attempt("logits: more rows than logits has", [9, 65], 3, [2, 40]);
    attempt("logits: x of another width", [2, 64], 1, [2, 40]);
    attempt("logits: logits of another width", [2, 65], 1, [2, 41]);
}
