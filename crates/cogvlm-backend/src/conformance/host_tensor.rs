use std::sync::Arc;

use cogvlm_core::DType;
use half::{bf16, f16};

use crate::oracle::round_to;
use crate::{HostReadError, HostTensor, HostWeight};

/// A host tensor over numbers, for tests. Its bytes begin at an odd address, as those of a mapped file may.
#[derive(Debug, Clone)]
pub struct VecTensor {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    values: Vec<f32>,
    /// Padding, then the tensor.
    bytes: Vec<u8>,
    source: Source,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Mapped,
    Made,
    Broken,
}

/// Allocations begin at even addresses.
const PADDING_BYTES: usize = 1;

impl VecTensor {
    /// A tensor that lies in memory; `values` are rounded to `dtype`.
    ///
    /// # Panics
    /// Where `values` is not as long as `shape` says.
    pub fn new(name: &str, dtype: DType, shape: &[usize], values: &[f32]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "elements of `{name}`");
        let values: Vec<f32> = values.iter().map(|&value| round_to(dtype, f64::from(value))).collect();
        let mut bytes = vec![0; PADDING_BYTES];
        for &value in &values {
            match dtype {
                DType::F32 => bytes.extend(value.to_le_bytes()),
                DType::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
                DType::Bf16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
            }
        }
        Self { name: name.to_owned(), dtype, shape: shape.to_vec(), values, bytes, source: Source::Mapped }
    }

    /// The same, not in mapped memory: it can only be read.
    #[must_use]
    pub fn made(self) -> Self {
        Self { source: Source::Made, ..self }
    }

    /// The same, of which every read fails.
    #[must_use]
    pub fn broken(self) -> Self {
        Self { source: Source::Broken, ..self }
    }

    /// Its elements, rounded to its type.
    pub fn values(&self) -> &Vec<f32> {
        &self.values
    }

    /// To hand to a backend.
    pub fn shared(&self) -> HostWeight {
        Arc::new(self.clone())
    }

    fn data(&self) -> &[u8] {
        &self.bytes[PADDING_BYTES..]
    }
}

impl HostTensor for VecTensor {
    fn name(&self) -> &str {
        &self.name
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn mapped(&self) -> Option<&[u8]> {
        (self.source == Source::Mapped).then(|| self.data())
    }

    fn read_into(&self, destination: &mut [u8]) -> Result<(), HostReadError> {
        if self.source == Source::Broken {
            return Err(HostReadError { tensor: self.name.clone(), reason: "the test says so".to_owned() });
        }
        destination.copy_from_slice(self.data());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_little_endian_and_at_an_odd_address() {
        let tensor = VecTensor::new("w", DType::Bf16, &[1, 2], &[1.0, 257.0]);
        assert_eq!(tensor.mapped().unwrap(), [0x80, 0x3f, 0x80, 0x43]);
        assert_eq!(tensor.mapped().unwrap().as_ptr().addr() % 2, 1);
        assert_eq!(tensor.values(), &[1.0, 256.0]);
        let mut bytes = [0; 4];
        tensor.read_into(&mut bytes).unwrap();
        assert_eq!(bytes, tensor.mapped().unwrap());
        assert!(tensor.clone().made().mapped().is_none());
        assert!(tensor.broken().read_into(&mut bytes).is_err());
    }
}
