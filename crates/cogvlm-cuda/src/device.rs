//! One GPU: its context, its streams, its kernels.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use cogvlm_backend::BackendError;
use cogvlm_core::Device;
use cudarc::driver::sys::{self as cu, CUcontext, CUdeviceptr, CUevent, CUfunction, CUmodule, CUstream};

use crate::driver::{self, Context, DeviceInfo, check};
use crate::error::CudaError;
use crate::kernels;

/// A context with a stream for operations and one for weights. Everything else of this crate borrows or shares it.
pub(crate) struct Gpu {
    pub(crate) device: Device,
    pub(crate) info: DeviceInfo,
    /// Where all operations go.
    pub(crate) stream: CUstream,
    /// Where weights are copied beside the operations.
    pub(crate) copy_stream: CUstream,
    /// Where rows for other devices are copied to the host.
    pub(crate) link_stream: CUstream,
    /// Whether this device reads the memory of others, by the addresses of their contexts.
    reached: Mutex<HashMap<usize, bool>>,
    /// Whether the kernels of this build wait by themselves on this GPU for those before them.
    can_overlap: AtomicBool,
    functions: Mutex<Functions>,
    context: CUcontext,
    /// What keeps the context open.
    _open: Context,
}

#[derive(Default)]
struct Functions {
    modules: HashMap<&'static str, CUmodule>,
    /// Kernels by name, with the shared memory that they were allowed.
    kernels: HashMap<&'static str, (CUfunction, u32)>,
}

// SAFETY: handles of the driver may be used from any thread; each call makes the context current first (`bind`).
unsafe impl Send for Gpu {}
// SAFETY: as above; what changes is behind a lock.
unsafe impl Sync for Gpu {}

/// `off` in this variable lets rows between GPUs pass through host memory even where one reads the other's.
const PEER_ACCESS: &str = "COGVLM_PEER_ACCESS";

/// How a kernel is launched.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Launch {
    pub(crate) grid: [u32; 3],
    pub(crate) block: u32,
    /// Bytes of dynamic shared memory.
    pub(crate) shared: u32,
    /// Whether it may start before the kernel before it has ended, where the GPU can: it waits by itself
    /// (`wait_for_previous`).
    pub(crate) overlap: bool,
}

impl Launch {
    /// A grid of `grid` blocks of `block` threads that waits by itself for what came before.
    pub(crate) fn blocks(grid: u32, block: u32) -> Self {
        Self { grid: [grid, 1, 1], block, shared: 0, overlap: true }
    }
}

/// The address of an argument, for [`Gpu::launch`].
pub(crate) fn arg<T>(value: &T) -> *mut c_void {
    std::ptr::from_ref(value).cast_mut().cast()
}

impl Gpu {
    /// Opens GPU `ordinal` for the rank `device`.
    pub(crate) fn open(device: Device, ordinal: u32) -> Result<Self, BackendError> {
        let open = Context::open(ordinal).map_err(|error| error.on(device))?;
        let info = open.info().clone();
        let failed = |result: cu::CUresult| {
            check(result).map_err(|reason| {
                CudaError::Open { ordinal, name: info.name.clone(), reason, code: result as u32 }.on(device)
            })
        };
        let mut gpu = Self {
            device,
            info: info.clone(),
            stream: std::ptr::null_mut(),
            copy_stream: std::ptr::null_mut(),
            link_stream: std::ptr::null_mut(),
            reached: Mutex::default(),
            can_overlap: AtomicBool::new(kernels::can_overlap(kernels::ARCHITECTURES, info.compute_capability)),
            functions: Mutex::default(),
            context: open.handle,
            _open: open,
        };
        gpu.bind()?;
        let flags = cu::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        for stream in [&raw mut gpu.stream, &raw mut gpu.copy_stream, &raw mut gpu.link_stream] {
            // SAFETY: the context is current; all of them are destroyed on drop.
            failed(unsafe { cu::cuStreamCreate(stream, flags) })?;
        }
        Ok(gpu)
    }

    /// Lets every kernel end before the next one starts: where others on the same GPU have to run meanwhile.
    pub(crate) fn forbid_overlap(&self) {
        self.can_overlap.store(false, Ordering::Relaxed);
    }

    /// Makes the context current on this thread.
    pub(crate) fn bind(&self) -> Result<(), BackendError> {
        // SAFETY: the context is retained until drop.
        self.check(unsafe { cu::cuCtxSetCurrent(self.context) })
    }

    /// A failed call of the driver as an error that names the device.
    pub(crate) fn check(&self, result: cu::CUresult) -> Result<(), BackendError> {
        check(result).map_err(|reason| self.error(reason))
    }

    /// An error of this device.
    pub(crate) fn error(&self, reason: impl Into<String>) -> BackendError {
        BackendError::Device { device: self.device, reason: reason.into() }
    }

    /// Free and total bytes, as the driver sees them.
    pub(crate) fn memory_info(&self) -> Result<(u64, u64), BackendError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the pointers are to local variables.
        self.check(unsafe { cu::cuMemGetInfo_v2(&raw mut free, &raw mut total) })?;
        Ok((free as u64, total as u64))
    }

    /// Launches `kernel` of `kernels/MODULE.cu` on the compute stream. Nothing is launched for an empty grid.
    ///
    /// # Safety
    /// `arguments` are addresses of values of the kernel's parameter types, in order ([`arg`]), and what the kernel
    /// reads and writes through them lies in memory of this device that stays allocated until the stream is past it.
    pub(crate) unsafe fn launch(
        &self, module: &'static str, kernel: &'static str, launch: Launch, arguments: &mut [*mut c_void],
    ) -> Result<(), BackendError> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        self.bind()?;
        let function = self.function(module, kernel, launch.shared)?;
        let mut overlap = cu::CUlaunchAttribute {
            id: cu::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: cu::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = cu::CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared,
            hStream: self.stream,
            attrs: &raw mut overlap,
            numAttrs: u32::from(launch.overlap && self.can_overlap.load(Ordering::Relaxed)),
        };
        // SAFETY: the caller vouches for the arguments; the configuration and its attribute live past the call.
        let result =
            unsafe { cu::cuLaunchKernelEx(&raw const config, function, arguments.as_mut_ptr(), std::ptr::null_mut()) };
        check(result).map_err(|reason| self.error(format!("launching `{kernel}`: {reason}")))
    }

    /// The kernel, loaded when it is asked for first, allowed `shared` bytes of dynamic shared memory.
    fn function(&self, module: &'static str, kernel: &'static str, shared: u32) -> Result<CUfunction, BackendError> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((function, allowed)) = functions.kernels.get(kernel)
            && *allowed >= shared
        {
            return Ok(*function);
        }
        let handle = match functions.modules.get(module) {
            Some(handle) => *handle,
            None => {
                let handle = self.load_module(module)?;
                functions.modules.insert(module, handle);
                handle
            }
        };
        let name = CString::new(kernel).map_err(|_| self.error("a kernel's name has a zero in it"))?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded; the name ends in a zero.
        let result = unsafe { cu::cuModuleGetFunction(&raw mut function, handle, name.as_ptr()) };
        check(result).map_err(|reason| self.error(format!("kernel `{kernel}` of `{module}`: {reason}")))?;
        use cu::CUfunction_attribute as A;
        let set = |attribute, value: u32| {
            // SAFETY: the function was just found.
            check(unsafe { cu::cuFuncSetAttribute(function, attribute, value as i32) }).map_err(|reason| {
                self.error(format!("`{kernel}` with {shared} bytes of shared memory on {}: {reason}", self.info.name))
            })
        };
        set(A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)?;
        if shared > 0 {
            // All that there is, in per cent: a multiprocessor that has to change its share lets nothing overlap.
            set(A::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100)?;
        }
        functions.kernels.insert(kernel, (function, shared));
        Ok(function)
    }

    fn load_module(&self, module: &'static str) -> Result<CUmodule, BackendError> {
        let found = kernels::MODULES.iter().find(|(name, _)| *name == module);
        let (_, image) = found.ok_or_else(|| self.error(format!("this build has no kernels `{module}`")))?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the image is a fat binary that nvcc made, which says itself how long it is.
        let result = unsafe { cu::cuModuleLoadData(&raw mut handle, image.as_ptr().cast()) };
        check(result).map_err(|reason| {
            let (major, minor) = self.info.compute_capability;
            self.error(format!(
                "the driver does not take the kernels `{module}` for {} (compute capability {major}.{minor}): {reason}; \
                 update the driver, or build with its CUDA version",
                self.info.name
            ))
        })?;
        Ok(handle)
    }

    /// Waits until the compute stream has done all it was given.
    pub(crate) fn synchronize(&self) -> Result<(), BackendError> {
        self.bind()?;
        // SAFETY: the stream lives as long as this.
        self.check(unsafe { cu::cuStreamSynchronize(self.stream) })
    }

    /// Zeroes memory of this device, in the order of the compute stream.
    ///
    /// # Safety
    /// `bytes` from `address` on are allocated on this device.
    pub(crate) unsafe fn zero(&self, address: CUdeviceptr, bytes: usize) -> Result<(), BackendError> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller vouches for the range.
        self.check(unsafe { cu::cuMemsetD8Async(address, 0, bytes, self.stream) })
    }

    /// Lets `count` words be `value`, in the order of the compute stream.
    ///
    /// # Safety
    /// That many words from `address` on are allocated on this device.
    pub(crate) unsafe fn fill_words(&self, address: CUdeviceptr, value: u32, count: usize) -> Result<(), BackendError> {
        self.bind()?;
        // SAFETY: the caller vouches for the range.
        self.check(unsafe { cu::cuMemsetD32Async(address, value, count, self.stream) })
    }

    /// Copies `num_rows` rows of `width` bytes, which lie `pitch` bytes apart from host address `from` on, to where they
    /// follow each other, in the order of `stream`.
    ///
    /// # Safety
    /// The rows are page-locked and stay until the stream is past the copy; `to` has room for them on this device.
    pub(crate) unsafe fn copy_rows_from_host(
        &self, from: usize, pitch: usize, to: CUdeviceptr, num_rows: usize, width: usize, stream: CUstream,
    ) -> Result<(), BackendError> {
        let from = from as *const c_void;
        if num_rows == 1 {
            // SAFETY: the caller vouches for both sides.
            return self.check(unsafe { cu::cuMemcpyHtoDAsync_v2(to, from, width, stream) });
        }
        let rows = cu::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: cu::CUmemorytype::CU_MEMORYTYPE_HOST,
            srcHost: from,
            srcDevice: 0,
            srcArray: std::ptr::null_mut(),
            srcPitch: pitch,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: cu::CUmemorytype::CU_MEMORYTYPE_DEVICE,
            dstHost: std::ptr::null_mut(),
            dstDevice: to,
            dstArray: std::ptr::null_mut(),
            dstPitch: width,
            WidthInBytes: width,
            Height: num_rows,
        };
        // SAFETY: as above; the description is read before the call returns.
        self.check(unsafe { cu::cuMemcpy2DAsync_v2(&raw const rows, stream) })
    }

    /// Copies within the device, in the order of the compute stream.
    ///
    /// # Safety
    /// Both ranges are allocated on this device and do not overlap.
    pub(crate) unsafe fn copy(&self, from: CUdeviceptr, to: CUdeviceptr, bytes: usize) -> Result<(), BackendError> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the caller vouches for the ranges.
        self.check(unsafe { cu::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream) })
    }

    /// Whether this device reads the memory of `peer` itself; else what it gets from there passes through the host.
    pub(crate) fn reaches(&self, peer: &Self) -> bool {
        if peer.context == self.context {
            return true;
        }
        let mut reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        *reached.entry(peer.context.addr()).or_insert_with(|| {
            let outcome = self.open_peer(peer);
            let (device, sender) = (self.device, peer.device);
            match &outcome {
                Ok(()) => tracing::debug!(%device, %sender, "reads the other's memory"),
                Err(reason) => tracing::info!(%device, %sender, reason, "rows from there pass through host memory"),
            }
            outcome.is_ok()
        })
    }

    /// Lets this device read the memory of `peer`.
    fn open_peer(&self, peer: &Self) -> Result<(), String> {
        if std::env::var(PEER_ACCESS).is_ok_and(|value| matches!(value.as_str(), "off" | "0")) {
            return Err(format!("{PEER_ACCESS} says so"));
        }
        self.bind().map_err(|error| error.to_string())?;
        let mut can = 0;
        let [device, other] = [self.info.ordinal as i32, peer.info.ordinal as i32];
        // SAFETY: the pointer is to a local variable; both ordinals are those of devices.
        check(unsafe { cu::cuDeviceCanAccessPeer(&raw mut can, device, other) })?;
        if can == 0 {
            return Err("these two GPUs cannot read each other's memory".to_owned());
        }
        // SAFETY: this one's context is current, the other one is retained; 0 is the only flag there is.
        match unsafe { cu::cuCtxEnablePeerAccess(peer.context, 0) } {
            cu::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
            result => check(result),
        }
    }

    /// Copies from memory of `peer`, which may be the same device, in the order of `stream`, one of this device's.
    ///
    /// # Safety
    /// `bytes` from `from` on are allocated on `peer`, from `to` on on this device, until `stream` is past the copy, and
    /// do not overlap.
    pub(crate) unsafe fn copy_from_peer(
        &self, peer: &Self, from: CUdeviceptr, to: CUdeviceptr, bytes: usize, stream: CUstream,
    ) -> Result<(), BackendError> {
        if bytes == 0 {
            return Ok(());
        }
        // Without it the driver passes the copy through the host by itself.
        let _ = self.reaches(peer);
        self.bind()?;
        self.check(if peer.context == self.context {
            // SAFETY: the caller vouches for the ranges.
            unsafe { cu::cuMemcpyDtoDAsync_v2(to, from, bytes, stream) }
        } else {
            // SAFETY: as above; both contexts are retained.
            unsafe { cu::cuMemcpyPeerAsync(to, self.context, from, peer.context, bytes, stream) }
        })
    }

    /// Copies to the host and waits.
    pub(crate) fn download(&self, from: CUdeviceptr, to: &mut [u8]) -> Result<(), BackendError> {
        if to.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the destination is borrowed until the wait below; callers give addresses of their own allocations.
        self.check(unsafe { cu::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, to.len(), self.stream) })?;
        self.synchronize()
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.bind().is_err() {
            return;
        }
        let functions = self.functions.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: all of them belong to this, and are used by nobody after it. What fails here fails for the process
        // as a whole, and was or will be reported by other calls.
        unsafe {
            let _ = cu::cuStreamSynchronize(self.stream);
            for module in functions.modules.values() {
                let _ = cu::cuModuleUnload(*module);
            }
            for stream in [self.link_stream, self.copy_stream, self.stream] {
                if !stream.is_null() {
                    let _ = cu::cuStreamDestroy_v2(stream);
                }
            }
        }
    }
}

/// A point in the time of a stream.
pub struct Event {
    gpu: std::sync::Arc<Gpu>,
    handle: CUevent,
}

// SAFETY: events may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above, several at a time.
unsafe impl Sync for Event {}

impl Event {
    /// An event; with `timed` for measuring.
    pub(crate) fn new(gpu: &std::sync::Arc<Gpu>, timed: bool) -> Result<Self, BackendError> {
        gpu.bind()?;
        let flags = if timed { 0 } else { cu::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32 };
        let mut handle = std::ptr::null_mut();
        // SAFETY: the context is current; destroyed on drop.
        gpu.check(unsafe { cu::cuEventCreate(&raw mut handle, flags) })?;
        Ok(Self { gpu: std::sync::Arc::clone(gpu), handle })
    }

    /// Comes when `stream` is past what it was given so far.
    pub(crate) fn record(&self, stream: CUstream) -> Result<(), BackendError> {
        self.gpu.bind()?;
        // SAFETY: the event is this one's own, the stream its GPU's.
        self.gpu.check(unsafe { cu::cuEventRecord(self.handle, stream) })
    }

    /// Lets `stream` wait for the event.
    pub(crate) fn hold(&self, stream: CUstream) -> Result<(), BackendError> {
        self.gpu.bind()?;
        // SAFETY: as above; 0 is the only flag outside of captures.
        self.gpu.check(unsafe { cu::cuStreamWaitEvent(stream, self.handle, 0) })
    }

    /// Waits for the event.
    pub(crate) fn wait(&self) -> Result<(), BackendError> {
        self.gpu.bind()?;
        // SAFETY: as above.
        self.gpu.check(unsafe { cu::cuEventSynchronize(self.handle) })
    }

    /// Whether it has come.
    pub(crate) fn has_come(&self) -> Result<bool, BackendError> {
        self.gpu.bind()?;
        // SAFETY: as above.
        match unsafe { cu::cuEventQuery(self.handle) } {
            cu::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => self.gpu.check(result).map(|()| true),
        }
    }

    /// Milliseconds from this event to `later`; both were waited for.
    pub(crate) fn milliseconds_to(&self, later: &Self) -> Result<f32, BackendError> {
        self.gpu.bind()?;
        // SAFETY: both events belong to this context.
        unsafe { driver::event_elapsed_time(self.handle, later.handle) }.map_err(|reason| self.gpu.error(reason))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: the event is this one's own; destroying one that is still awaited is allowed.
            let _ = unsafe { cu::cuEventDestroy_v2(self.handle) };
        }
    }
}
