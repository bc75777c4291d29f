//! Checkpoints and synthetic models as the loader wants them.

use std::sync::Arc;

use cogvlm_backend::{ElementRule, HostReadError, HostTensor, HostWeight};
use cogvlm_checkpoint::{Advice, CheckpointError, MappedTensor, ModelSource, Rule, TensorInfo};
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

impl SourceWeight {
    fn failed(&self, error: &CheckpointError) -> HostReadError {
        HostReadError { tensor: self.name().to_owned(), reason: error.to_string() }
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
        self.source.read_into(self.name(), destination).map_err(|error| self.failed(&error))
    }

    fn read_at(&self, offset: usize, destination: &mut [u8]) -> Result<(), HostReadError> {
        let size = self.dtype().size_bytes();
        let elements = offset / size..(offset + destination.len()) / size;
        self.source.read_range_into(self.name(), elements, destination).map_err(|error| self.failed(&error))
    }

    fn read_ahead(&self) {
        if let Some(mapped) = &self.mapped {
            // A hint: where the system refuses it, pages are read when they are touched.
            drop(mapped.advise(Advice::WillNeed));
        }
    }
    fn mapping(&self) -> Option<&[u8]> {
        self.mapped.as_ref().map(|mapped| mapped.file().bytes())
    }

    fn verify(&self) -> Result<(), HostReadError> {
        self.mapped
            .as_ref()
            .map_or(Ok(()), |mapped| mapped.file().verify_unchanged())
            .map_err(|error| self.failed(&error))
    }

    fn rule(&self) -> Option<ElementRule> {
        match *self.source.rule(self.name())? {
            Rule::Uniform { key, base, amp } => Some(ElementRule { key, base, amplitude: amp, mixes_rows: false }),
            Rule::LmHead { embedding_key, amp, .. } => {
                Some(ElementRule { key: embedding_key, base: 0.0, amplitude: amp, mixes_rows: true })
            }
            Rule::InvFreq { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use cogvlm_backend::oracle::made_element;

    use super::*;

    /// What a device makes by the rule is what the host makes.
    #[test]
    fn rules_make_the_bytes_of_synthetic_tensors() {
        let model = ModelSource::open("tiny@11").unwrap();
        for info in model.tensors() {
            let weight = model.weight(&info.spec).unwrap();
            let mut bytes = vec![0; info.num_bytes()];
            weight.read_into(&mut bytes).unwrap();
            let tail = bytes.len() / 4 * 2;
            let mut read = vec![0; bytes.len() - tail];
            weight.read_at(tail, &mut read).unwrap();
            assert_eq!(read, bytes[tail..], "the second half of {}", info.spec.name);
            let Some(rule) = weight.rule() else {
                assert!(info.spec.optional, "{} has no rule", info.spec.name);
                continue;
            };
            let rows = info.spec.shape[0];
            let shape = [rows, info.spec.num_elements() / rows];
            for (index, element) in bytes.as_chunks::<2>().0.iter().enumerate() {
                let made = made_element(rule, shape, index);
                assert_eq!(made.to_bits(), u16::from_le_bytes(*element), "element {index} of {}", info.spec.name);
            }
        }
    }
}
