//! Buffers, and rows on their way to another device.

use std::ops::{Deref, DerefMut, Range};
use std::sync::{RwLockReadGuard, RwLockWriteGuard};

use bytemuck::{cast_slice, cast_slice_mut};
use cogvlm_backend::shared_memory::Pages;
use cogvlm_backend::{Arena, BackendError, HostRows, SharedMemory};
use cogvlm_core::DType;

use crate::element::Element;
use crate::memory::Memory;
use crate::shape::{buffer_bytes, expect, expect_fit, expect_span, expect_values, unsupported};
use crate::weight::widen;

/// A row-major array of f32 or bf16.
pub struct CpuBuffer {
    storage: Storage,
    dtype: DType,
    rows: usize,
    columns: usize,
}

enum Storage {
    Own(Memory),
    /// Other devices have it too.
    Shared(SharedMemory),
}

/// The bytes of a buffer, which no other device of the host uses meanwhile.
pub(crate) enum Held<'a> {
    Own(&'a [u8]),
    Shared(RwLockReadGuard<'a, Pages>),
}

/// The same, to write to.
pub(crate) enum HeldMut<'a> {
    Own(&'a mut [u8]),
    Shared(RwLockWriteGuard<'a, Pages>),
}

impl Deref for Held<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Own(bytes) => bytes,
            Self::Shared(pages) => pages.bytes(),
        }
    }
}

impl Deref for HeldMut<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Own(bytes) => bytes,
            Self::Shared(pages) => pages.bytes(),
        }
    }
}

impl DerefMut for HeldMut<'_> {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Own(bytes) => bytes,
            Self::Shared(pages) => pages.bytes_mut(),
        }
    }
}

/// Rows copied out of a buffer, as the bytes they were.
pub struct CpuParcel {
    bytes: Vec<u8>,
    dtype: DType,
    rows: usize,
    columns: usize,
}

fn is_shared(op: &'static str, argument: &'static str) -> BackendError {
    unsupported(op, format!("`{argument}` is shared with other devices, which only a KV cache can be"))
}

impl CpuParcel {
    /// Rows that came from another process. Refuses a broken row.
    pub fn of_host_rows(rows: HostRows) -> Result<Self, BackendError> {
        let HostRows { dtype, columns, bytes } = rows;
        let row_bytes = columns * dtype.size_bytes();
        let num_rows = bytes.len().checked_div(row_bytes).unwrap_or(0);
        let is_whole = num_rows * row_bytes == bytes.len();
        expect("unpack", "rows", &[bytes.len()], is_whole, || format!("a multiple of {row_bytes} bytes"))?;
        Ok(Self { bytes, dtype, rows: num_rows, columns })
    }

    /// The rows, for another process.
    pub fn into_host_rows(self) -> HostRows {
        let Self { bytes, dtype, columns, .. } = self;
        HostRows { dtype, columns, bytes }
    }

    /// The rows as f32: for a device of another kind.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.columns];
        widen(self.dtype, &self.bytes, &mut values);
        values
    }
}

impl CpuBuffer {
    /// Takes a zeroed buffer from `arena`.
    pub(crate) fn take(
        arena: &Arena, what: &str, dtype: DType, [rows, columns]: [usize; 2],
    ) -> Result<Self, BackendError> {
        let num_bytes = buffer_bytes(what, dtype, [rows, columns])?;
        Ok(Self { storage: Storage::Own(Memory::take(arena, what, num_bytes)?), dtype, rows, columns })
    }

    /// As [`take`](Self::take), for other devices too.
    pub(crate) fn take_shared(
        arena: &Arena, what: &str, dtype: DType, [rows, columns]: [usize; 2],
    ) -> Result<Self, BackendError> {
        let num_bytes = buffer_bytes(what, dtype, [rows, columns])?;
        Ok(Self { storage: Storage::Shared(SharedMemory::take(arena, what, num_bytes)?), dtype, rows, columns })
    }

    /// The same buffer, for another device of the host.
    pub(crate) fn share(&self) -> Result<Self, BackendError> {
        let Self { dtype, rows, columns, .. } = *self;
        Ok(Self { storage: Storage::Shared(self.shared_memory()?.clone()), dtype, rows, columns })
    }

    /// The memory that it shares with other devices, row-major; its rows and columns are [`shape`](Self::shape).
    ///
    /// # Errors
    /// Where it is in memory of its own.
    pub fn shared_memory(&self) -> Result<&SharedMemory, BackendError> {
        match &self.storage {
            Storage::Shared(memory) => Ok(memory),
            Storage::Own(_) => Err(unsupported("share", "the buffer is in memory that only its own device uses")),
        }
    }

    /// Its bytes, row-major.
    fn bytes(&self) -> Held<'_> {
        match &self.storage {
            Storage::Own(memory) => Held::Own(memory.slice()),
            Storage::Shared(memory) => Held::Shared(memory.read()),
        }
    }

    /// Its bytes, row-major.
    fn bytes_mut(&mut self) -> HeldMut<'_> {
        match &mut self.storage {
            Storage::Own(memory) => HeldMut::Own(memory.slice_mut()),
            Storage::Shared(memory) => HeldMut::Shared(memory.write()),
        }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// Its elements; an error where it holds another type, or is shared.
    pub(crate) fn view<T: Element>(&self, op: &'static str, argument: &'static str) -> Result<&[T], BackendError> {
        self.check_type::<T>(op, argument)?;
        match &self.storage {
            Storage::Own(memory) => Ok(memory.slice()),
            Storage::Shared(_) => Err(is_shared(op, argument)),
        }
    }

    /// Its elements; an error where it holds another type, or is shared.
    pub(crate) fn view_mut<T: Element>(
        &mut self, op: &'static str, argument: &'static str,
    ) -> Result<&mut [T], BackendError> {
        self.check_type::<T>(op, argument)?;
        match &mut self.storage {
            Storage::Own(memory) => Ok(memory.slice_mut()),
            Storage::Shared(_) => Err(is_shared(op, argument)),
        }
    }

    /// Its bytes, shared or not; an error where it holds another type than `T`.
    pub(crate) fn hold<T: Element>(&self, op: &'static str, argument: &'static str) -> Result<Held<'_>, BackendError> {
        self.check_type::<T>(op, argument)?;
        Ok(self.bytes())
    }

    /// Its bytes, shared or not; an error where it holds another type than `T`.
    pub(crate) fn hold_mut<T: Element>(
        &mut self, op: &'static str, argument: &'static str,
    ) -> Result<HeldMut<'_>, BackendError> {
        self.check_type::<T>(op, argument)?;
        Ok(self.bytes_mut())
    }

    fn check_type<T: Element>(&self, op: &'static str, argument: &'static str) -> Result<(), BackendError> {
        if self.dtype != T::DTYPE {
            return Err(unsupported(
                op,
                format!("`{argument}` holds {}, the operation needs {}", self.dtype, T::DTYPE),
            ));
        }
        Ok(())
    }

    /// Copies `values` into rows `first_row..`, rounded.
    pub(crate) fn write(&mut self, values: &[f32], first_row: usize) -> Result<(), BackendError> {
        let columns = self.columns;
        expect_values("write", values.len(), self.shape(), first_row)?;
        if values.is_empty() {
            return Ok(());
        }
        fn fill<T: Element>(values: &[f32], target: &mut [T]) {
            target.iter_mut().zip(values).for_each(|(to, &from)| *to = T::of(from));
        }
        let dtype = self.dtype;
        let mut bytes = self.bytes_mut();
        match dtype {
            DType::F32 => fill::<f32>(values, &mut cast_slice_mut(&mut bytes)[first_row * columns..]),
            _ => fill::<half::bf16>(values, &mut cast_slice_mut(&mut bytes)[first_row * columns..]),
        }
        Ok(())
    }

    /// The given rows as f32.
    pub(crate) fn read(&self, rows: Range<usize>) -> Result<Vec<f32>, BackendError> {
        let span = self.span("read", &rows)?;
        let bytes = self.bytes();
        Ok(match self.dtype {
            DType::F32 => cast_slice::<u8, f32>(&bytes)[span].to_vec(),
            _ => cast_slice::<u8, half::bf16>(&bytes)[span].iter().map(|value| value.get()).collect(),
        })
    }

    /// Takes rows along.
    pub(crate) fn send(&self, rows: Range<usize>) -> Result<CpuParcel, BackendError> {
        let span = self.span("send", &rows)?;
        let size = self.dtype.size_bytes();
        let bytes = self.bytes()[span.start * size..span.end * size].to_vec();
        Ok(CpuParcel { bytes, dtype: self.dtype, rows: rows.len(), columns: self.columns })
    }

    /// Unpacks rows.
    pub(crate) fn receive(&mut self, parcel: &CpuParcel, first_row: usize) -> Result<(), BackendError> {
        let CpuParcel { bytes, dtype, rows, columns } = parcel;
        self.accept("receive", *dtype, [*rows, *columns], bytes, first_row)
    }

    /// Copies rows of `source`.
    pub(crate) fn copy_rows(
        &mut self, source: &Self, rows: Range<usize>, first_row: usize,
    ) -> Result<(), BackendError> {
        let span = source.span("copy_rows", &rows)?;
        let size = source.dtype.size_bytes();
        let bytes = &source.bytes()[span.start * size..span.end * size];
        self.accept("copy_rows", source.dtype, [rows.len(), source.columns], bytes, first_row)
    }

    fn accept(
        &mut self, op: &'static str, dtype: DType, shape: [usize; 2], bytes: &[u8], first_row: usize,
    ) -> Result<(), BackendError> {
        expect_fit(op, (dtype, shape), (self.dtype, self.shape()), first_row)?;
        let start = first_row * self.columns * self.dtype.size_bytes();
        self.bytes_mut()[start..start + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn span(&self, op: &'static str, rows: &Range<usize>) -> Result<Range<usize>, BackendError> {
        expect_span(op, rows, self.rows)?;
        Ok(rows.start * self.columns..rows.end * self.columns)
    }
}
