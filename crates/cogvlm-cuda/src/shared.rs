//! Host memory that a device uses where it lies.

use std::ffi::c_void;
use std::sync::Arc;

use cogvlm_backend::{BackendError, SharedMemory};
use cudarc::driver::sys::{self as cu, CUdeviceptr};

use crate::device::Gpu;

/// Flags of `cuMemHostRegister_v2`: for all contexts; with an address on the device.
const PORTABLE: u32 = 1;
const DEVICE_MAP: u32 = 2;

/// Memory of the host, locked and addressed by a device for as long as this lives.
pub(crate) struct Locked {
    gpu: Arc<Gpu>,
    memory: SharedMemory,
    /// On the device.
    pub(crate) address: CUdeviceptr,
}

impl Locked {
    pub(crate) fn new(gpu: &Arc<Gpu>, memory: &SharedMemory) -> Result<Self, BackendError> {
        gpu.bind()?;
        let (start, num_bytes) = (memory.address() as *mut c_void, memory.num_page_bytes());
        // SAFETY: whole pages of the memory's own, which `memory` keeps until `drop` has unregistered them.
        let result = unsafe { cu::cuMemHostRegister_v2(start, num_bytes, PORTABLE | DEVICE_MAP) };
        crate::driver::check(result).map_err(|reason| {
            let amount = cogvlm_core::memory::format_bytes(num_bytes as u64);
            gpu.error(format!("cannot lock {amount} of host memory to use it from the device: {reason}"))
        })?;
        let mut locked = Self { gpu: Arc::clone(gpu), memory: memory.clone(), address: 0 };
        // SAFETY: the pointer is to a local variable; the memory was just registered with an address on the device.
        gpu.check(unsafe { cu::cuMemHostGetDevicePointer_v2(&raw mut locked.address, start, 0) })?;
        Ok(locked)
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // What was given to the stream may still use the memory. Where that cannot be told, it stays locked.
        if self.gpu.synchronize().is_ok() {
            // SAFETY: registered by `new`, and nothing uses it any more. What fails here is undone when the process ends.
            let _ = unsafe { cu::cuMemHostUnregister(self.memory.address() as *mut c_void) };
        }
    }
}
