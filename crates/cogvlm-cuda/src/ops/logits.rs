//! `logits = x Wᵀ`, rounded, in f32

use cogvlm_backend::shape::{expect_rows, expect_shape};
use cogvlm_backend::{BackendError, ExpertWeights};
use cogvlm_core::tokens::ExpertRange;
use cogvlm_core::{DType, Expert};

use crate::backend::CudaBackend;
use crate::buffer::CudaBuffer;
use crate::product::{Finish, Product, ProductWeights};
use crate::weight::CudaWeight;

pub(crate) fn logits(
    cuda: &CudaBackend, x: &CudaBuffer, weight: &CudaWeight, rows: usize, logits: &mut CudaBuffer,
) -> Result<(), BackendError> {
    const OP: &str = "logits";
    let (depth, width) = (x.columns(), logits.columns());
    expect_rows(OP, "x", x.shape(), [rows, depth])?;
    expect_rows(OP, "logits", logits.shape(), [rows, width])?;
    expect_shape(OP, "weight", weight.shape(), &[width, depth])?;
    x.expect_dtype(OP, "x", cuda.activations)?;
    logits.expect_dtype(OP, "logits", DType::F32)?;
    let weights = ProductWeights { first: ExpertWeights { language: Some(weight), vision: None }, second: None };
    let ranges = [ExpertRange { rows: 0..rows, expert: Expert::Language }];
    Product::new(OP, Finish::Logits, x, &weights, &ranges, width)?.into_buffer(logits).run(cuda)
}
