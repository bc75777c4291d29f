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

pub(crate) fn linear(
    _cuda: &CudaBackend, _x: &CudaBuffer, _weight: &CudaWeight, _bias: Option<&CudaWeight>, _activation: Activation,
    _rows: usize, _out: &mut CudaBuffer,
) -> Result<(), BackendError> {
    Err(unsupported("linear", "unwritten"))
}
