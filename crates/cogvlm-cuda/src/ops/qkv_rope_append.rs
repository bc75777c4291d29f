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

pub(crate) fn qkv_rope_append(
    _cuda: &CudaBackend, _x: &CudaBuffer, _weights: ExpertWeights<'_, CudaWeight>, _ranges: &[ExpertRange],
    _heads: HeadGeometry, _rope: &CudaBuffer, _mode: RopeMode, _tables: &CudaTables, _query: &mut CudaBuffer,
    _kv: &mut CudaBuffer,
) -> Result<(), BackendError> {
    Err(unsupported("qkv_rope_append", "unwritten"))
}
