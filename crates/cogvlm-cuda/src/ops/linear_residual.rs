//! `residual += x Wᵀ`

use cogvlm_backend::shape::expect_ranges;
use cogvlm_backend::{BackendError, ExpertWeights};
use cogvlm_core::tokens::ExpertRange;

use crate::backend::CudaBackend;
use crate::buffer::CudaBuffer;
use crate::product::{Finish, Product, ProductWeights};
use crate::weight::CudaWeight;

pub(crate) fn linear_residual(
    cuda: &CudaBackend, x: &CudaBuffer, weights: ExpertWeights<'_, CudaWeight>, ranges: &[ExpertRange],
    residual: &mut CudaBuffer,
) -> Result<(), BackendError> {
    const OP: &str = "linear_residual";
    expect_ranges(OP, ranges, x.rows().min(residual.rows()))?;
    x.expect_dtype(OP, "x", cuda.activations)?;
    residual.expect_dtype(OP, "residual", cuda.activations)?;
    let weights = ProductWeights { first: weights, second: None };
    Product::new(OP, Finish::Residual, x, &weights, ranges, residual.columns())?.into_buffer(residual).run(cuda)
}
