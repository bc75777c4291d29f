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

pub(crate) fn gate_up(
    _cuda: &CudaBackend, _x: &CudaBuffer, _gate: ExpertWeights<'_, CudaWeight>, _up: ExpertWeights<'_, CudaWeight>,
    _ranges: &[ExpertRange], _out: &mut CudaBuffer,
) -> Result<(), BackendError> {
    Err(unsupported("gate_up", "unwritten"))
}
