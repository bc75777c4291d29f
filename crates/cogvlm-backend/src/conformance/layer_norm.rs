use cogvlm_core::DType;

use super::approx::{Approx, UNIT_F32, sum_error};
use super::data::Random;
use super::harness::{
    Case, EXTRA_ROWS, ROW_COUNTS, WEIGHT_DTYPES, buffer, devices, load, refuses_shape, rotated, verify, verify_rejects,
    verify_residency, weight_unit,
};
use super::{Make, VecTensor};
use crate::{Backend, BackendError, HostTensor, oracle};

/// What is done with the norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fused {
    Residual,
    Gelu,
}

#[derive(Clone)]
struct LayerNorm {
    fused: Fused,
    dtype: DType,
    rows: usize,
    width: usize,
    /// Rows beyond included.
    x: Vec<f32>,
    residual: Vec<f32>,
    weight: VecTensor,
    bias: VecTensor,
    eps: f32,
}

impl LayerNorm {
    /// Rows of size about `scale` around `mean`.
    fn new(fused: Fused, [dtype, weight_dtype]: [DType; 2], [rows, width]: [usize; 2], scale: f32, mean: f32) -> Self {
        let mut random = Random::new(61);
        let len = (rows + EXTRA_ROWS) * width;
        let x = random.values(dtype, len, scale);
        let x = x.into_iter().map(|x| oracle::round_to(dtype, f64::from(x) + f64::from(mean))).collect();
        let residual = random.values(dtype, len, 2.0);
        let mut tensor = |name| VecTensor::new(name, weight_dtype, &[width], &random.values(DType::F32, width, 1.0));
        let (weight, bias) = (tensor("weight"), tensor("bias"));
        Self { fused, dtype, rows, width, x, residual, weight, bias, eps: 1e-6 }
    }

    fn used(&self) -> &[f32] {
        &self.x[..self.rows * self.width]
    }

    /// What stands where the result goes.
    fn before(&self) -> &[f32] {
        match self.fused {
            Fused::Residual => &self.residual,
            Fused::Gelu => &self.x,
        }
    }

    /// `weight (x - mean) / √(variance + eps) + bias`. The error of the mean shifts all differences alike, so that it
    /// enters the variance only as a square: this asks for a variance of differences, not `mean(x²) - mean²`, which has
    /// lost all digits where the mean is large.
    fn normed(&self) -> Vec<Approx> {
        let unit = weight_unit(self.weight.dtype(), self.dtype);
        let mut normed = Vec::new();
        for row in self.used().chunks_exact(self.width) {
            let width = row.len() as f64;
            let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / width;
            let magnitude = row.iter().map(|&x| f64::from(x.abs())).sum::<f64>() / width;
            let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / width;
            let mean_error = sum_error(row.len()) * magnitude;
            let spread = variance + f64::from(self.eps);
            let scale_error = sum_error(row.len()) / 2.0 + mean_error * mean_error / spread + 4.0 * UNIT_F32;
            let scale = 1.0 / spread.sqrt();
            let scale = Approx::new(scale, scale * scale_error);
            for ((&x, &weight), &bias) in row.iter().zip(self.weight.values()).zip(self.bias.values()) {
                let difference = f64::from(x) - mean;
                let difference = Approx::new(difference, mean_error + UNIT_F32 * difference.abs());
                let scaled = difference.times(scale).times(Approx::weight(weight, unit));
                normed.push(scaled.plus(Approx::weight(bias, unit)).rounded(self.dtype));
            }
        }
        normed
    }
}

impl Case for LayerNorm {
    fn label(&self) -> String {
        format!("layer norm, then {:?}, [{}, {}], weight {}", self.fused, self.rows, self.width, self.weight.dtype())
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn weights(&self) -> Vec<VecTensor> {
        vec![self.weight.clone(), self.bias.clone()]
    }

    fn run<B: Backend>(&self, backend: &B, weights: &[B::Weight]) -> Result<Vec<f32>, BackendError> {
        let all_rows = self.rows + EXTRA_ROWS;
        let mut x = buffer(backend, all_rows, self.width, &self.x);
        if self.fused == Fused::Gelu {
            backend.layer_norm_gelu(&mut x, &weights[0], &weights[1], self.eps, self.rows)?;
            return backend.read(&x, 0..all_rows);
        }
        let mut residual = buffer(backend, all_rows, self.width, &self.residual);
        backend.layer_norm_residual(&x, &weights[0], &weights[1], self.eps, self.rows, &mut residual)?;
        backend.read(&residual, 0..all_rows)
    }

    fn expected(&self) -> Vec<Approx> {
        let mut expected: Vec<Approx> = self.before().iter().map(|&value| Approx::exact(value)).collect();
        for (expected, normed) in expected.iter_mut().zip(self.normed()) {
            *expected = match self.fused {
                Fused::Residual => normed.plus(*expected),
                Fused::Gelu => normed.gelu(),
            }
            .rounded(self.dtype);
        }
        expected
    }

    fn oracle(&self, dtype: DType) -> Vec<f32> {
        let (x, weight, bias) = (self.used(), self.weight.values(), self.bias.values());
        let mut out = match self.fused {
            Fused::Residual => oracle::layer_norm_residual(x, weight, bias, self.eps, &self.residual, dtype),
            Fused::Gelu => oracle::layer_norm_gelu(x, weight, bias, self.eps, dtype),
        };
        out.extend(&self.before()[out.len()..]);
        out
    }
}

/// The norm of a branch, rounded, added to the residual in place, rounded.
pub fn layer_norm_residual<B: Backend>(make: Make<'_, B>) {
    let devices = devices(make);
    check(&devices, Fused::Residual);
    let backend = &devices[0];
    let dtype = backend.activation_dtype();
    let case = LayerNorm::new(Fused::Residual, [dtype; 2], [4, 33], 1.0, 0.0);
    let [weight, bias] = [&case.weight, &case.bias].map(|tensor| load(backend, tensor));
    let narrow = load(backend, &LayerNorm::new(Fused::Residual, [dtype; 2], [1, 32], 1.0, 0.0).weight);
    let attempt = |what: &str, x: [usize; 2], [weight, bias]: [&B::Weight; 2], rows: usize, residual: [usize; 2]| {
        let x = buffer(backend, x[0], x[1], &[]);
        let mut residual = buffer(backend, residual[0], residual[1], &[]);
        refuses_shape(what, backend.layer_norm_residual(&x, weight, bias, 1e-6, rows, &mut residual));
    };
    attempt("layer_norm_residual: more rows than the branch has", [4, 33], [&weight, &bias], 5, [9, 33]);
    attempt("layer_norm_residual: far more rows", [4, 33], [&weight, &bias], usize::MAX, [9, 33]);
    attempt("layer_norm_residual: more rows than the residual has", [9, 33], [&weight, &bias], 5, [4, 33]);
    attempt("layer_norm_residual: residual of another width", [4, 33], [&weight, &bias], 2, [4, 34]);
    attempt("layer_norm_residual: weight of another width", [4, 33], [&narrow, &bias], 2, [4, 33]);
    attempt("layer_norm_residual: bias of another width", [4, 33], [&weight, &narrow], 2, [4, 33]);
}

/// The norm in place, rounded, then the activation, rounded.
pub fn layer_norm_gelu<B: Backend>(make: Make<'_, B>) {
    let devices = devices(make);
    check(&devices, Fused::Gelu);
    let backend = &devices[0];
    let dtype = backend.activation_dtype();
    let case = LayerNorm::new(Fused::Gelu, [dtype; 2], [4, 33], 1.0, 0.0);
    let [weight, bias] = [&case.weight, &case.bias].map(|tensor| load(backend, tensor));
    let narrow = load(backend, &LayerNorm::new(Fused::Gelu, [dtype; 2], [1, 32], 1.0, 0.0).weight);
    let mut x = buffer(backend, 4, 33, &[]);
    refuses_shape("layer_norm_gelu: more rows", backend.layer_norm_gelu(&mut x, &weight, &bias, 1e-5, 5));
    refuses_shape("layer_norm_gelu: far more rows", backend.layer_norm_gelu(&mut x, &weight, &bias, 1e-5, usize::MAX));
    refuses_shape("layer_norm_gelu: another weight", backend.layer_norm_gelu(&mut x, &narrow, &bias, 1e-5, 2));
    refuses_shape("layer_norm_gelu: another bias", backend.layer_norm_gelu(&mut x, &weight, &narrow, 1e-5, 2));
}

fn check<B: Backend>(devices: &[B; 2], fused: Fused) {
    let dtype = devices[0].activation_dtype();
    let case = |shape: [usize; 2]| LayerNorm::new(fused, [dtype; 2], shape, 1.0, 0.0);
    for (index, rows) in ROW_COUNTS.into_iter().enumerate() {
        verify(devices, &case([rows, [8, 33, 100][index % 3]]));
    }
    for shape in [[2, 1001], [3, 1792], [2, 4096], [5, 31]] {
        for weight_dtype in WEIGHT_DTYPES {
            verify(devices, &LayerNorm::new(fused, [dtype, weight_dtype], shape, 1.0, 0.0));
        }
    }
    // Large and small rows, zeros, and a mean far from zero.
    for (scale, mean) in [(1e7, 0.0), (1e-6, 0.0), (0.0, 0.0), (1.0, 64.0)] {
        verify(devices, &LayerNorm::new(fused, [dtype; 2], [4, 1000], scale, mean));
    }
    for weight_dtype in WEIGHT_DTYPES {
        verify_residency(devices, &LayerNorm::new(fused, [dtype, weight_dtype], [9, 101], 1.0, 0.0));
    }
    let case = case([4, 33]);
    let replaced = |tensor: &VecTensor, values: &[f32]| VecTensor::new("replaced", dtype, tensor.shape(), values);
    let rotated_weight = LayerNorm { weight: replaced(&case.weight, &rotated(case.weight.values())), ..case.clone() };
    verify_rejects(&case, "weight rotated", &rotated_weight);
    verify_rejects(&case, "no bias", &LayerNorm { bias: replaced(&case.bias, &[0.0; 33]), ..case.clone() });
    let small = LayerNorm::new(fused, [dtype; 2], [4, 33], 1e-3, 0.0);
    verify(devices, &small);
    verify_rejects(&small, "another eps", &LayerNorm { eps: 1e-5, ..small.clone() });
}
