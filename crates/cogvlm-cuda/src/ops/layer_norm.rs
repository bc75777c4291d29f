//! Unwritten.

#![allow(unused_imports)]
use std::ops::Range;

use cogvlm_backend::shape::unsupported;
use cogvlm_backend::{
    Activation, BackendError, Batch, ExpertWeights, HeadGeometry, HostWeight, PatchGeometry, PatchWeights, RopeMode,
    SampleRequest,
};
use cogvlm_core::tokens::ExpertRange;

use crate::backend::CudaBackend;
use crate::buffer::{CudaBuffer, CudaParcel};
use crate::tables::CudaTables;
use crate::weight::CudaWeight;

pub(crate) fn layer_norm_residual(
    _cuda: &CudaBackend, _branch: &CudaBuffer, _weight: &CudaWeight, _bias: &CudaWeight, _eps: f32, _rows: usize,
    _residual: &mut CudaBuffer,
) -> Result<(), BackendError> {
    Err(unsupported("layer_norm_residual", "unwritten"))
}

pub(crate) fn layer_norm_gelu(
    _cuda: &CudaBackend, _x: &mut CudaBuffer, _weight: &CudaWeight, _bias: &CudaWeight, _eps: f32, _rows: usize,
) -> Result<(), BackendError> {
    Err(unsupported("layer_norm_gelu", "unwritten"))
}
