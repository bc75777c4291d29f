//! `logits = x Wᵀ`, rounded to the activation type, stored as f32

use cogvlm_backend::BackendError;

use crate::backend::CpuBackend;
use crate::buffer::CpuBuffer;
use crate::element::Element;
use crate::matmul::{Input, Product};
use crate::shape::{expect_buffer, expect_weight};
use crate::weight::CpuWeight;

pub(crate) fn logits<T: Element>(
    cpu: &CpuBackend, x: &CpuBuffer, weight: &CpuWeight, rows: usize, logits: &mut CpuBuffer,
) -> Result<(), BackendError> {
    const OP: &str = "logits";
    let (depth, vocab_size) = (x.columns(), logits.columns());
    expect_buffer(OP, "x", x, rows, depth)?;
    expect_buffer(OP, "logits", logits, rows, vocab_size)?;
    expect_weight(OP, "weight", weight, &[vocab_size, depth])?;
    let product = Product { input: Input::Rows(x.view::<T>(OP, "x")?), rows: 0..rows, depth, weights: [weight] };
    let logits = logits.view_mut::<f32>(OP, "logits")?;
    product.finish_rows(cpu.isa, &cpu.threads, logits, vocab_size, |_, _, [sums], logits| {
        logits.iter_mut().zip(sums).for_each(|(logit, sum)| *logit = T::round(*sum));
    });
    Ok(())
}
