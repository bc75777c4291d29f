//! Checkpoints and synthetic models as the loader wants them.

use std::sync::Arc;

use cogvlm_backend::{HostReadError, HostTensor, HostWeight};
use cogvlm_checkpoint::{Advice, MappedTensor, ModelSource, TensorInfo};
use cogvlm_core::{DType, TensorSpec};

use crate::load::WeightSource;

/// A tensor of a checkpoint or of a synthetic model.
struct SourceWeight {
    source: ModelSource,
    info: TensorInfo,
    mapped: Option<MappedTensor>,
}

impl WeightSource for ModelSource {
    fn weight(&self, tensor: &TensorSpec) -> Option<HostWeight> {
        let info = self.get(&tensor.name)?.clone();
        let mapped = self.mapped(&tensor.name);
        Some(Arc::new(SourceWeight { source: self.clone(), info, mapped }))
    }
}

impl HostTensor for SourceWeight {
    fn name(&self) -> &str {
        &self.info.spec.name
    }

    fn dtype(&self) -> DType {
        self.info.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.info.spec.shape
    }

    fn mapped(&self) -> Option<&[u8]> {
        self.mapped.as_ref().map(MappedTensor::bytes)
    }

    fn read_into(&self, destination: &mut [u8]) -> Result<(), HostReadError> {
        let failed = |error: cogvlm_checkpoint::CheckpointError| HostReadError {
            tensor: self.name().to_owned(),
            reason: error.to_string(),
        };
        self.source.read_into(self.name(), destination).map_err(failed)
    }

    fn read_ahead(&self) {
        if let Some(mapped) = &self.mapped {
            // A hint: where the system refuses it, pages are read when they are touched.
            drop(mapped.advise(Advice::WillNeed));
        }
    }
}
