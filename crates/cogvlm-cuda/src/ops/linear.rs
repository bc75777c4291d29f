//! `out = activation(x Wᵀ + bias)`

use cogvlm_backend::shape::{expect_rows, expect_shape};
use cogvlm_backend::{Activation, BackendError, ExpertWeights};
use cogvlm_core::Expert;
use cogvlm_core::tokens::ExpertRange;

use crate::backend::CudaBackend;
use crate::buffer::CudaBuffer;
use crate::product::{Finish, Product, ProductWeights};
use crate::weight::CudaWeight;

pub(crate) fn linear(
    cuda: &CudaBackend, x: &CudaBuffer, weight: &CudaWeight, bias: Option<&CudaWeight>, activation: Activation,
    rows: usize, out: &mut CudaBuffer,
) -> Result<(), BackendError> {
    const OP: &str = "linear";
    let (depth, width) = (x.columns(), out.columns());
    expect_rows(OP, "x", x.shape(), [rows, depth])?;
    expect_rows(OP, "out", out.shape(), [rows, width])?;
    expect_shape(OP, "weight", weight.shape(), &[width, depth])?;
    if let Some(bias) = bias {
        expect_shape(OP, "bias", bias.shape(), &[width])?;
    }
    x.expect_dtype(OP, "x", cuda.activations)?;
    out.expect_dtype(OP, "out", cuda.activations)?;
    let finish = match activation {
        Activation::Identity => Finish::Bias,
        Activation::Gelu => Finish::BiasGelu,
    };
    let weights = ProductWeights { first: ExpertWeights { language: Some(weight), vision: None }, second: None };
    let ranges = [ExpertRange { rows: 0..rows, expert: Expert::Language }];
    Product::new(OP, finish, x, &weights, &ranges, width)?.with_bias(OP, bias)?.into_buffer(out).run(cuda)
}
