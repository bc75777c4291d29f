//! Buffers.

use cogvlm_backend::BackendError;
use cogvlm_backend::shape::{buffer_bytes, unsupported};
use cogvlm_core::DType;
use cudarc::driver::sys::CUdeviceptr;

use crate::memory::{DeviceArena, Memory};

/// A row-major array of f32 or bf16 in the memory of a device.
pub struct CudaBuffer {
    memory: Memory,
    pub(crate) dtype: DType,
    rows: usize,
    columns: usize,
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
        Ok(Self { memory, dtype, rows, columns })
    }

    /// Its memory, without its shape.
    pub(crate) fn into_memory(self) -> Memory {
        self.memory
    }

    pub(crate) fn address(&self) -> CUdeviceptr {
        self.memory.address
    }

    /// Address of a row.
    pub(crate) fn row(&self, row: usize) -> CUdeviceptr {
        self.memory.address + (row * self.row_bytes()) as CUdeviceptr
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
