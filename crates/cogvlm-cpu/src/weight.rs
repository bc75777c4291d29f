//! Weights, wherever their bytes lie.

use std::ops::Range;
use std::sync::Arc;

use cogvlm_backend::{Arena, BackendError, HostTensor, HostWeight};
use cogvlm_core::DType;
use half::{bf16, f16};

use crate::element::Element;
use crate::memory::Memory;
use crate::shape::{expect, unsupported};

/// A weight that operations read where it lies: in the mapped file, in the device's memory, or in a staging slot.
#[derive(Clone)]
pub struct CpuWeight(Arc<Inner>);

struct Inner {
    dtype: DType,
    shape: Vec<usize>,
    storage: Storage,
}

enum Storage {
    Mapped(HostWeight),
    Owned(Memory),
    Slot(Arc<Memory>, Range<usize>),
}

impl CpuWeight {
    /// Copies `weight` into memory of `arena`.
    pub(crate) fn load(arena: &Arena, weight: &HostWeight) -> Result<Self, BackendError> {
        let mut memory = Memory::take(arena, weight.name(), host_bytes("load", &**weight)?)?;
        let destination = memory.slice_mut::<u8>();
        match weight.mapped() {
            // Weights are loaded by several threads at a time.
            Some(bytes) => destination.copy_from_slice(bytes),
            None => weight.read_into(destination)?,
        }
        Ok(Self::new(weight.dtype(), weight.shape().to_vec(), Storage::Owned(memory)))
    }

    /// Uses `weight` where it is mapped; one that has to be made is made into memory of `arena`.
    pub(crate) fn attach(arena: &Arena, weight: &HostWeight) -> Result<Self, BackendError> {
        host_bytes("attach", &**weight)?;
        if weight.mapped().is_none() {
            return Self::load(arena, weight);
        }
        Ok(Self::new(weight.dtype(), weight.shape().to_vec(), Storage::Mapped(Arc::clone(weight))))
    }

    /// A weight at `span` of a staging slot.
    pub(crate) fn in_slot(slot: &Arc<Memory>, dtype: DType, shape: Vec<usize>, span: Range<usize>) -> Self {
        Self::new(dtype, shape, Storage::Slot(Arc::clone(slot), span))
    }

    fn new(dtype: DType, shape: Vec<usize>, storage: Storage) -> Self {
        Self(Arc::new(Inner { dtype, shape, storage }))
    }

    pub(crate) fn dtype(&self) -> DType {
        self.0.dtype
    }

    pub(crate) fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    /// Number of elements.
    pub(crate) fn len(&self) -> usize {
        self.shape().iter().product()
    }

    /// Its bytes, row-major and little-endian. They may lie at any address.
    pub(crate) fn bytes(&self) -> &[u8] {
        match &self.0.storage {
            // `attach` refuses tensors that are not mapped, and a mapping does not end while it is held.
            Storage::Mapped(host) => host.mapped().unwrap_or(&[]),
            Storage::Owned(memory) => memory.slice(),
            Storage::Slot(memory, span) => &memory.slice()[span.clone()],
        }
    }

    /// Bytes of rows `rows`, each of `columns` elements.
    pub(crate) fn rows(&self, rows: Range<usize>, columns: usize) -> &[u8] {
        let row_bytes = columns * self.dtype().size_bytes();
        &self.bytes()[rows.start * row_bytes..rows.end * row_bytes]
    }

    /// Elements `index * row.len()..` as the type of activations.
    pub(crate) fn round_row<T: Element>(&self, index: usize, row: &mut [T]) {
        let bytes = self.rows(index..index + 1, row.len());
        if self.dtype() == T::DTYPE {
            return bytemuck::cast_slice_mut::<T, u8>(row).copy_from_slice(bytes);
        }
        let mut values = vec![0.0; row.len()];
        widen(self.dtype(), bytes, &mut values);
        row.iter_mut().zip(values).for_each(|(to, value)| *to = T::of(value));
    }

    /// All elements, widened.
    pub(crate) fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.len()];
        widen(self.dtype(), self.bytes(), &mut values);
        values
    }
}

/// Widens the elements that `bytes` hold into `values`, as many as fit.
#[inline(always)]
pub(crate) fn widen(dtype: DType, bytes: &[u8], values: &mut [f32]) {
    match dtype {
        DType::F32 => {
            let elements = bytes.as_chunks::<4>().0;
            values.iter_mut().zip(elements).for_each(|(to, from)| *to = f32::from_le_bytes(*from));
        }
        DType::Bf16 => {
            let elements = bytes.as_chunks::<2>().0;
            values.iter_mut().zip(elements).for_each(|(to, from)| *to = bf16::from_le_bytes(*from).get());
        }
        DType::F16 => {
            let elements = bytes.as_chunks::<2>().0;
            values.iter_mut().zip(elements).for_each(|(to, from)| *to = f16::from_le_bytes(*from).to_f32());
        }
    }
}

/// Bytes of `weight`, checked against what it has mapped.
pub(crate) fn host_bytes(op: &'static str, weight: &dyn HostTensor) -> Result<usize, BackendError> {
    let shape = weight.shape();
    let size = weight.dtype().size_bytes();
    let num_bytes = shape.iter().try_fold(size, |bytes, &extent| bytes.checked_mul(extent));
    let num_bytes =
        num_bytes.ok_or_else(|| unsupported(op, format!("`{}` of {shape:?} is too large", weight.name())))?;
    if let Some(bytes) = weight.mapped() {
        let fits = bytes.len() == num_bytes;
        expect(op, "weight", shape, fits, || {
            format!("`{}` in {} bytes, its shape takes {num_bytes}", weight.name(), bytes.len())
        })?;
    }
    Ok(num_bytes)
}
