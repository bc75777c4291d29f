//! The tensors that a source offers, in checkpoint order and by name.

use std::collections::HashMap;

use cogvlm_core::{DType, TensorSpec};

use crate::error::{CheckpointError, printable};

/// A tensor that a source offers: what the model says about it, and the type it is stored in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, shape, and who uses it when.
    pub spec: TensorSpec,
    /// Element type of the stored data, which is little-endian and row-major.
    pub dtype: DType,
}

impl TensorInfo {
    /// Bytes of the stored data.
    pub fn num_bytes(&self) -> usize {
        self.spec.num_elements() * self.dtype.size_bytes()
    }
}

#[derive(Debug)]
pub(crate) struct TensorTable {
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
}

impl TensorTable {
    pub(crate) fn new(tensors: Vec<TensorInfo>) -> Self {
        let by_name = tensors.iter().enumerate().map(|(index, tensor)| (tensor.spec.name.clone(), index)).collect();
        Self { tensors, by_name }
    }

    pub(crate) fn all(&self) -> &[TensorInfo] {
        &self.tensors
    }

    pub(crate) fn index_of(&self, name: &str) -> Result<usize, CheckpointError> {
        let unknown = || CheckpointError::UnknownTensor { tensor: printable(name) };
        self.by_name.get(name).copied().ok_or_else(unknown)
    }

    pub(crate) fn total_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.num_bytes() as u64).sum()
    }
}
