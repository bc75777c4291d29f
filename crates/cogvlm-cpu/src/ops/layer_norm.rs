//! Layer norm of one row.

use crate::element::Element;
use crate::simd::math;

/// Calls `store` with every element of `out` and of `layer_norm(x)`; statistics in f32, in two passes.
#[inline(always)]
pub(super) fn normalise<T: Element>(
    x: &[T], weight: &[f32], bias: &[f32], eps: f32, out: &mut [T], store: impl Fn(&mut T, f32),
) {
    let width = x.len() as f32;
    let mean = math::sum(x, |value| value.get()) / width;
    let variance = math::sum(x, |value| (value.get() - mean) * (value.get() - mean)) / width;
    let scale = 1.0 / (variance + eps).sqrt();
    for (((out, x), weight), bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
        store(out, (x.get() - mean) * scale * weight + bias);
    }
}
