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

pub(crate) fn write(
    _cuda: &CudaBackend, _values: &[f32], _buffer: &mut CudaBuffer, _first_row: usize,
) -> Result<(), BackendError> {
    Err(unsupported("write", "unwritten"))
}

pub(crate) fn read(_cuda: &CudaBackend, _buffer: &CudaBuffer, _rows: Range<usize>) -> Result<Vec<f32>, BackendError> {
    Err(unsupported("read", "unwritten"))
}

pub(crate) fn send(_cuda: &CudaBackend, _buffer: &CudaBuffer, _rows: Range<usize>) -> Result<CudaParcel, BackendError> {
    Err(unsupported("send", "unwritten"))
}

pub(crate) fn receive(
    _cuda: &CudaBackend, _parcel: CudaParcel, _buffer: &mut CudaBuffer, _first_row: usize,
) -> Result<(), BackendError> {
    Err(unsupported("receive", "unwritten"))
}

pub(crate) fn copy_rows(
    _cuda: &CudaBackend, _source: &CudaBuffer, _rows: Range<usize>, _destination: &mut CudaBuffer, _first_row: usize,
) -> Result<(), BackendError> {
    Err(unsupported("copy_rows", "unwritten"))
}

pub(crate) fn copy_weight_rows(
    _cuda: &CudaBackend, _weight: &CudaWeight, _destination: &mut CudaBuffer, _first_row: usize,
) -> Result<(), BackendError> {
    Err(unsupported("copy_weight_rows", "unwritten"))
}
