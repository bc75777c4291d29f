//! Buffers.

use std::sync::Arc;

use cogvlm_backend::shape::{buffer_bytes, expect, unsupported};
use cogvlm_backend::{BackendError, SharedMemory};
use cogvlm_core::DType;
use cudarc::driver::sys::CUdeviceptr;

use crate::device::Gpu;
use crate::memory::{DeviceArena, Memory};
use crate::shared::Locked;

/// A row-major array of f32 or bf16 in the memory of a device, or in host memory that the device uses.
pub struct CudaBuffer {
    storage: Storage,
    pub(crate) dtype: DType,
    rows: usize,
    columns: usize,
}

enum Storage {
    Own(Memory),
    /// The host has it too.
    Shared(Locked),
}

/// The number by which kernels know an element type (`ElementType` in kernels/include/common.cuh).
pub(crate) fn dtype_code(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::Bf16 => 1,
        DType::F16 => 2,
    }
}

impl CudaBuffer {
    /// Takes a zeroed buffer from `arena`.
    pub(crate) fn take(
        arena: &DeviceArena, what: &str, dtype: DType, [rows, columns]: [usize; 2],
    ) -> Result<Self, BackendError> {
        let num_bytes = buffer_bytes(what, dtype, [rows, columns])?;
        let memory = arena.take(what, num_bytes)?;
        // SAFETY: the memory was just taken.
        unsafe { arena.gpu.zero(memory.address, num_bytes) }?;
        Ok(Self { storage: Storage::Own(memory), dtype, rows, columns })
    }

    /// A buffer in `memory`, which the host uses too.
    pub(crate) fn in_host_memory(
        gpu: &Arc<Gpu>, memory: &SharedMemory, dtype: DType, [rows, columns]: [usize; 2],
    ) -> Result<Self, BackendError> {
        let num_bytes = buffer_bytes("shared memory", dtype, [rows, columns])?;
        let fits = num_bytes <= memory.read().bytes().len();
        expect("share", "buffer", &[rows, columns], fits, || "at most what the memory holds".to_owned())?;
        Ok(Self { storage: Storage::Shared(Locked::new(gpu, memory)?), dtype, rows, columns })
    }

    /// Its memory, without its shape.
    ///
    /// # Errors
    /// Where it is not the device's own.
    pub(crate) fn into_memory(self) -> Result<Memory, BackendError> {
        match self.storage {
            Storage::Own(memory) => Ok(memory),
            Storage::Shared(_) => Err(unsupported("into_memory", "the buffer lies in host memory")),
        }
    }

    pub(crate) fn address(&self) -> CUdeviceptr {
        match &self.storage {
            Storage::Own(memory) => memory.address,
            Storage::Shared(memory) => memory.address,
        }
    }

    /// Address of a row.
    pub(crate) fn row(&self, row: usize) -> CUdeviceptr {
        self.address() + (row * self.row_bytes()) as CUdeviceptr
    }

    pub(crate) fn row_bytes(&self) -> usize {
        self.columns * self.dtype.size_bytes()
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    pub(crate) fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    /// Refuses a buffer of another element type.
    pub(crate) fn expect_dtype(
        &self, op: &'static str, argument: &'static str, dtype: DType,
    ) -> Result<(), BackendError> {
        if self.dtype == dtype {
            return Ok(());
        }
        Err(unsupported(op, format!("`{argument}` holds {}, the operation needs {dtype}", self.dtype)))
    }
}
