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

pub(crate) fn sample(
    _cuda: &CudaBackend, _logits: &CudaBuffer, _requests: &[SampleRequest<'_>],
) -> Result<Vec<u32>, BackendError> {
    Err(unsupported("sample", "unwritten"))
}
