//! `out = activation(x Wᵀ + bias)`

use cogvlm_backend::{Activation, BackendError};

use crate::backend::CpuBackend;
use crate::buffer::CpuBuffer;
use crate::element::Element;
use crate::matmul::{Input, Product};
use crate::shape::{expect_buffer, expect_weight};
use crate::simd::{math, vectorised};
use crate::weight::CpuWeight;

pub(crate) fn linear<T: Element>(
    cpu: &CpuBackend, x: &CpuBuffer, weight: &CpuWeight, bias: Option<&CpuWeight>, activation: Activation, rows: usize,
    out: &mut CpuBuffer,
) -> Result<(), BackendError> {
    const OP: &str = "linear";
    let (depth, width) = (x.columns(), out.columns());
    expect_buffer(OP, "x", x, rows, depth)?;
    expect_buffer(OP, "out", out, rows, width)?;
    expect_weight(OP, "weight", weight, &[width, depth])?;
    if let Some(bias) = bias {
        expect_weight(OP, "bias", bias, &[width])?;
    }
    let bias = bias.map_or_else(|| vec![0.0; width], CpuWeight::to_f32);
    let product = Product { input: Input::Rows(x.view::<T>(OP, "x")?), rows: 0..rows, depth, weights: [weight] };
    let out = out.view_mut::<T>(OP, "out")?;
    product.finish_rows(cpu.isa, &cpu.threads, out, width, |_, columns, [sums], out| {
        let bias = &bias[columns];
        vectorised!(cpu.isa, {
            let elements = out.iter_mut().zip(sums).zip(bias);
            match activation {
                Activation::Identity => {
                    for ((out, sum), bias) in elements {
                        *out = T::of(*sum + bias);
                    }
                }
                Activation::Gelu => {
                    for ((out, sum), bias) in elements {
                        *out = T::of(math::gelu(T::round(*sum + bias)));
                    }
                }
            }
        });
    });
    Ok(())
}
