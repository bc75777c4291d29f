//! `sums = x Wᵀ`, not rounded: a member's part of a product

use cogvlm_backend::shape::expect_ranges;
use cogvlm_backend::{BackendError, ExpertWeights};
use cogvlm_core::DType;
use cogvlm_core::tokens::ExpertRange;

use crate::backend::CudaBackend;
use crate::buffer::CudaBuffer;
use crate::exchange::CudaExchange;
use crate::product::{Finish, Product, ProductWeights};
use crate::weight::CudaWeight;

pub(crate) fn linear_partial(
    cuda: &CudaBackend, x: &CudaBuffer, weights: ExpertWeights<'_, CudaWeight>, ranges: &[ExpertRange], slot: usize,
    exchange: &mut CudaExchange,
) -> Result<(), BackendError> {
    const OP: &str = "linear_partial";
    let sums = exchange.sums(slot);
    expect_ranges(OP, ranges, x.rows().min(sums.rows()))?;
    x.expect_dtype(OP, "x", cuda.activations)?;
    sums.expect_dtype(OP, "sums", DType::F32)?;
    let weights = ProductWeights { first: weights, second: None };
    let product = Product::new(OP, Finish::Partial, x, &weights, ranges, sums.columns())?.into_buffer(sums);
    let product = product.pushed(exchange.push(slot));
    exchange.set_pushed(slot, product.is_of_few_rows(cuda));
    product.run(cuda)
}
