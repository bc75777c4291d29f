//! `out = silu(x Gᵀ) * (x Uᵀ)`

use cogvlm_backend::{BackendError, ExpertWeights};
use cogvlm_core::tokens::ExpertRange;

use super::expert_weight;
use crate::backend::CpuBackend;
use crate::buffer::CpuBuffer;
use crate::element::Element;
use crate::matmul::{Input, Product};
use crate::shape::{expect_ranges, expect_weight};
use crate::simd::{math, vectorised};
use crate::weight::CpuWeight;

pub(crate) fn gate_up<T: Element>(
    cpu: &CpuBackend, x: &CpuBuffer, gate: ExpertWeights<'_, CpuWeight>, up: ExpertWeights<'_, CpuWeight>,
    ranges: &[ExpertRange], out: &mut CpuBuffer,
) -> Result<(), BackendError> {
    const OP: &str = "gate_up";
    let (depth, width) = (x.columns(), out.columns());
    expect_ranges(OP, ranges, x.rows().min(out.rows()))?;
    let x = x.view::<T>(OP, "x")?;
    for range in ranges.iter().filter(|range| !range.rows.is_empty()) {
        expect_weight(OP, "gate", expert_weight(OP, gate, range)?, &[width, depth])?;
        expect_weight(OP, "up", expert_weight(OP, up, range)?, &[width, depth])?;
    }
    let out = out.view_mut::<T>(OP, "out")?;
    for range in ranges.iter().filter(|range| !range.rows.is_empty()) {
        let weights = [expert_weight(OP, gate, range)?, expert_weight(OP, up, range)?];
        let product = Product { input: Input::Rows(x), rows: range.rows.clone(), depth, weights };
        product.finish_rows(cpu.isa, &cpu.threads, out, width, |_, _, [gate, up], out| {
            vectorised!(cpu.isa, {
                for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
                    *out = T::of(T::round(math::silu(T::round(*gate))) * T::round(*up));
                }
            });
        });
    }
    Ok(())
}
