//! Descriptors by which the tensor memory accelerator (TMA, sm_90 on) copies tiles into shared memory.

use cogvlm_backend::BackendError;
use cudarc::driver::sys::{self as cu, CUdeviceptr};

use crate::device::Gpu;

/// A descriptor, passed to kernels by value as `__grid_constant__`.
#[derive(Clone, Copy)]
#[repr(C, align(128))]
pub(crate) struct TensorMap {
    map: cu::CUtensorMap,
}

impl TensorMap {
    /// One that describes nothing.
    #[cfg(test)]
    pub(crate) fn of(opaque: [u64; 16]) -> Self {
        Self { map: cu::CUtensorMap { opaque } }
    }

    /// Tiles of `box_rows` rows by 64 columns of a row-major bf16 matrix `[rows, columns]`, in the 128-byte swizzle.
    /// What lies outside of the matrix reads as zero. `columns` is a multiple of 8, `address` of 16.
    pub(crate) fn tiles(
        gpu: &Gpu, address: CUdeviceptr, [rows, columns]: [usize; 2], box_rows: u32,
    ) -> Result<Self, BackendError> {
        gpu.bind()?;
        let mut map = cu::CUtensorMap { opaque: [0; 16] };
        let dims = [columns as u64, rows as u64];
        let strides = [columns as u64 * 2];
        let box_dims = [64, box_rows];
        let element_strides = [1, 1];
        // SAFETY: all arrays live past the call and have the two (strides: one) elements that rank 2 asks for; the
        // address is of a matrix of this size on the device.
        let result = unsafe {
            cu::cuTensorMapEncodeTiled(
                &raw mut map,
                cu::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                address as *mut _,
                dims.as_ptr(),
                strides.as_ptr(),
                box_dims.as_ptr(),
                element_strides.as_ptr(),
                cu::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                cu::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                cu::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                cu::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        crate::driver::check(result)
            .map_err(|reason| gpu.error(format!("tensor map of [{rows}, {columns}]: {reason}")))?;
        Ok(Self { map })
    }
}
