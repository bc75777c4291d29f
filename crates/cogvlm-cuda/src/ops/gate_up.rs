//! `out = silu(x Gᵀ) * (x Uᵀ)`

use cogvlm_backend::shape::expect_ranges;
use cogvlm_backend::{BackendError, ExpertWeights};
use cogvlm_core::tokens::ExpertRange;

use crate::backend::CudaBackend;
use crate::buffer::CudaBuffer;
use crate::product::{Finish, Product, ProductWeights};
use crate::weight::CudaWeight;

pub(crate) fn gate_up(
    cuda: &CudaBackend, x: &CudaBuffer, gate: ExpertWeights<'_, CudaWeight>, up: ExpertWeights<'_, CudaWeight>,
    ranges: &[ExpertRange], out: &mut CudaBuffer,
) -> Result<(), BackendError> {
    const OP: &str = "gate_up";
    expect_ranges(OP, ranges, x.rows().min(out.rows()))?;
    x.expect_dtype(OP, "x", cuda.activations)?;
    out.expect_dtype(OP, "out", cuda.activations)?;
    let weights = ProductWeights { first: gate, second: Some(up) };
    Product::new(OP, Finish::GateUp, x, &weights, ranges, out.columns())?.into_buffer(out).run(cuda)
}
