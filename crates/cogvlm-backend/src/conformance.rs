//! What every [`Backend`] has to pass.
//!
//! Each check takes a function that makes a fresh backend and panics with a message where an answer is wrong. A
//! backend's test file turns them into one test each:
//!
//! ```text
//! cogvlm_backend::conformance_suite!(bf16, || MyBackend::new(DType::Bf16, conformance::ARENA_BYTES));
//! ```
//!
//! What a right answer is: the operation in exact arithmetic, give or take an error that follows from the arithmetic
//! that the trait documents, element by element. It is
//!
//! - half a unit in the last place for each rounding that the documentation names;
//! - for a sum of `k` products in f32, `2⁻²⁴ (4 + 2√k) Σ|aᵢbᵢ|`, any order of summation;
//! - carried through what follows: products, activations, the softmax.
//!
//! In 16 bits the roundings hide small mistakes, so there a second rule holds: nine in ten elements equal bit for bit
//! what the [`oracle`](crate::oracle) gives when it rounds at the documented points. A rounding left out, or one too
//! many, moves a quarter of them or more. Attention is exempt, where rounding the probabilities is a backend's choice,
//! and so are weights of a wider type than the activations, which may be rounded first.
//!
//! Checks also show that these bounds can say no, by holding wrong answers against them.

mod approx;
mod attention;
mod batches;
mod data;
mod embed;
mod experts;
mod gate_up;
mod harness;
mod host_tensor;
mod image_attention;
mod layer_norm;
mod linear;
mod linear_residual;
mod memory;
mod patch_embed;
mod prefill;
mod qkv_rope_append;
mod rms_norm;
mod rows;
mod sample;
mod weights;

pub use attention::{attention, set_batch};
pub use embed::{copy_weight_rows, embed};
pub use gate_up::gate_up;
pub use host_tensor::VecTensor;
pub use image_attention::image_attention;
pub use layer_norm::{layer_norm_gelu, layer_norm_residual};
pub use linear::{linear, logits};
pub use linear_residual::linear_residual;
pub use memory::{alloc, out_of_memory};
pub use patch_embed::patch_embed;
pub use prefill::chunked_prefill;
pub use qkv_rope_append::qkv_rope_append;
pub use rms_norm::{rms_norm, rms_norm_logit_rows};
pub use rows::{copy_rows, moments, send_receive, write_read};
pub use sample::{embed_sampled, sample};
pub use weights::{host_failure, staging};

use crate::Backend;

/// The least arena of a backend under test, in bytes. More is welcome, but a check fills it: below a GiB. Checks have
/// two backends at a time.
pub const ARENA_BYTES: u64 = 64 << 20;

/// Makes the backend under test: fresh, with an empty arena of its own.
pub type Make<'a, B> = &'a dyn Fn() -> B;

/// One check of the suite.
pub struct Check<B> {
    /// The operation, or what else is checked.
    pub name: &'static str,
    /// Runs it; panics where the backend is wrong.
    pub run: fn(Make<'_, B>),
}

/// All checks.
pub fn checks<B: Backend>() -> Vec<Check<B>> {
    crate::conformance_suite! { @list checks () }
}

/// A module of tests, one per check: `conformance_suite!(module_name, || backend)`. Takes any number of attributes
/// for its tests before the name (`#[ignore = "needs a GPU"]`).
#[macro_export]
macro_rules! conformance_suite {
    (@list $rule:ident ($($arguments:tt)*)) => {
        $crate::conformance_suite! {
            @$rule ($($arguments)*)
            alloc out_of_memory write_read copy_rows send_receive moments staging host_failure
            embed copy_weight_rows rms_norm rms_norm_logit_rows linear logits linear_residual gate_up
            qkv_rope_append set_batch attention chunked_prefill sample embed_sampled
            patch_embed image_attention layer_norm_residual layer_norm_gelu
        }
    };
    (@checks () $($check:ident)*) => {
        vec![$($crate::conformance::Check { name: stringify!($check), run: $check }),*]
    };
    (@tests ($make:expr; $($attribute:tt)*) $($check:ident)*) => {
        $crate::conformance_suite! { @each ($make) ($($attribute)*) $($check)* }
    };
    (@each ($make:expr) $attributes:tt $($check:ident)*) => {
        $($crate::conformance_suite! { @test ($make) $attributes $check })*
    };
    (@test ($make:expr) ($($attribute:tt)*) $check:ident) => {
        #[test]
        $($attribute)*
        fn $check() {
            $crate::conformance::$check(&$make);
        }
    };
    ($(#[$attribute:meta])* $suite:ident, $make:expr) => {
        mod $suite {
            #[allow(unused_imports, reason = "the expression that makes the backend may name its whole path")]
            use super::*;
            $crate::conformance_suite! { @list tests ($make; $(#[$attribute])*) }
        }
    };
}
