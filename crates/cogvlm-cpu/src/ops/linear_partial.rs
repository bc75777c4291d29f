//! `sums = x Wᵀ`, not rounded: a member's part of a product

use cogvlm_backend::{BackendError, ExpertWeights};
use cogvlm_core::tokens::ExpertRange;

use super::expert_weight;
use crate::backend::CpuBackend;
use crate::buffer::CpuBuffer;
use crate::element::Element;
use crate::matmul::{Input, Product};
use crate::shape::{expect_ranges, expect_weight};
use crate::weight::CpuWeight;

pub(crate) fn linear_partial<T: Element>(
    cpu: &CpuBackend, x: &CpuBuffer, weights: ExpertWeights<'_, CpuWeight>, ranges: &[ExpertRange],
    sums: &mut CpuBuffer,
) -> Result<(), BackendError> {
    const OP: &str = "linear_partial";
    let (depth, width) = (x.columns(), sums.columns());
    expect_ranges(OP, ranges, x.rows().min(sums.rows()))?;
    let x = x.view::<T>(OP, "x")?;
    for range in ranges.iter().filter(|range| !range.rows.is_empty()) {
        expect_weight(OP, "weights", expert_weight(OP, weights, range)?, &[width, depth])?;
    }
    let out = sums.view_mut::<f32>(OP, "sums")?;
    for range in ranges.iter().filter(|range| !range.rows.is_empty()) {
        let weight = expert_weight(OP, weights, range)?;
        let product = Product { input: Input::Rows(x), rows: range.rows.clone(), depth, weights: [weight] };
        product.finish_rows(cpu.isa, &cpu.threads, out, width, |_, _, [sums], out| out.copy_from_slice(sums));
    }
    Ok(())
}
