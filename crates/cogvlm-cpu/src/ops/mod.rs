//! The operations, one a file. Each checks its shapes first; what it may then rely on is not checked again.

pub(crate) mod attention;
pub(crate) mod copy_weight_rows;
pub(crate) mod embed;
pub(crate) mod gate_up;
pub(crate) mod image_attention;
mod layer_norm;
pub(crate) mod layer_norm_gelu;
pub(crate) mod layer_norm_residual;
pub(crate) mod linear;
pub(crate) mod linear_partial;
pub(crate) mod linear_residual;
pub(crate) mod logits;
pub(crate) mod patch_embed;
pub(crate) mod qkv_rope_append;
pub(crate) mod rms_norm;
pub(crate) mod rms_norm_logit_rows;
pub(crate) mod sample;

use cogvlm_backend::{BackendError, ExpertWeights};
use cogvlm_core::Expert;
use cogvlm_core::tokens::ExpertRange;

use crate::shape::unsupported;
use crate::weight::CpuWeight;

/// The weight of the expert of `range`.
fn expert_weight<'a>(
    op: &'static str, weights: ExpertWeights<'a, CpuWeight>, range: &ExpertRange,
) -> Result<&'a CpuWeight, BackendError> {
    let weight = match range.expert {
        Expert::Language => weights.language,
        Expert::Vision => weights.vision,
    };
    weight.ok_or_else(|| {
        unsupported(op, format!("rows {:?} need the {:?} expert, which is not here", range.rows, range.expert))
    })
}
