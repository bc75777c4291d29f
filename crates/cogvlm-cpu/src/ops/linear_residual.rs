//! `residual += x Wᵀ`

use cogvlm_backend::{BackendError, ExpertWeights};
use cogvlm_core::tokens::ExpertRange;

use super::expert_weight;
use crate::backend::CpuBackend;
use crate::buffer::CpuBuffer;
use crate::element::Element;
use crate::matmul::{Input, Product};
use crate::shape::{expect_ranges, expect_weight};
use crate::simd::vectorised;
use crate::weight::CpuWeight;

pub(crate) fn linear_residual<T: Element>(
    cpu: &CpuBackend, x: &CpuBuffer, weights: ExpertWeights<'_, CpuWeight>, ranges: &[ExpertRange],
    residual: &mut CpuBuffer,
) -> Result<(), BackendError> {
    const OP: &str = "linear_residual";
    let (depth, width) = (x.columns(), residual.columns());
    expect_ranges(OP, ranges, x.rows().min(residual.rows()))?;
    let x = x.view::<T>(OP, "x")?;
    for range in ranges.iter().filter(|range| !range.rows.is_empty()) {
        expect_weight(OP, "weights", expert_weight(OP, weights, range)?, &[width, depth])?;
    }
    let residual = residual.view_mut::<T>(OP, "residual")?;
    for range in ranges.iter().filter(|range| !range.rows.is_empty()) {
        let weight = expert_weight(OP, weights, range)?;
        let product = Product { input: Input::Rows(x), rows: range.rows.clone(), depth, weights: [weight] };
        product.finish_rows(cpu.isa, &cpu.threads, residual, width, |_, _, [sums], residual| {
            vectorised!(cpu.isa, {
                for (residual, sum) in residual.iter_mut().zip(sums) {
                    *residual = T::of(residual.get() + T::round(*sum));
                }
            });
        });
    }
    Ok(())
}
