//! One typed function per operation: it checks shapes, computes the launch and names the kernel of the same name in
//! `kernels/`.

pub(crate) mod add_partials;
pub(crate) mod attention;
pub(crate) mod embed;
pub(crate) mod gate_up;
pub(crate) mod image_attention;
pub(crate) mod layer_norm;
pub(crate) mod linear;
pub(crate) mod linear_partial;
pub(crate) mod linear_residual;
pub(crate) mod load;
pub(crate) mod logits;
pub(crate) mod patch_embed;
pub(crate) mod product_generic;
pub(crate) mod product_mma;
pub(crate) mod product_rows;
pub(crate) mod product_wgmma;
pub(crate) mod qkv_rope_append;
pub(crate) mod rms_norm;
pub(crate) mod rows;
pub(crate) mod sample;
