//! The driver's library: found, checked, and called so that every failure is an error.
//!
//! cudarc panics where the library or a function of it is missing, so both are looked for first.

use std::ffi::{CStr, c_char};
use std::sync::OnceLock;

use cudarc::driver::sys::{self as cu, CUresult};

use crate::error::CudaError;
use crate::kernels;

/// Functions that this crate calls: all of them have to be there before the first call.
const SYMBOLS: [&str; 48] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetUuid_v2",
    "cuDeviceGetAttribute",
    "cuDeviceTotalMem_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxSetCurrent",
    "cuDeviceCanAccessPeer",
    "cuCtxEnablePeerAccess",
    "cuMemGetInfo_v2",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuFuncSetAttribute",
    "cuLaunchKernelEx",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuEventElapsedTime",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemHostGetDevicePointer_v2",
    "cuMemFreeHost",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyPeerAsync",
    "cuMemsetD8Async",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphExecDestroy",
    "cuGraphDestroy",
    "cuGetErrorString",
];

/// The function of drivers before 12.8 too, which cudarc's bindings for CUDA 13 leave out.
type EventElapsedTime = unsafe extern "C" fn(*mut f32, cu::CUevent, cu::CUevent) -> CUresult;
static EVENT_ELAPSED_TIME: OnceLock<EventElapsedTime> = OnceLock::new();

/// Milliseconds between two events.
///
/// # Safety
/// Both belong to the current context.
pub(crate) unsafe fn event_elapsed_time(from: cu::CUevent, to: cu::CUevent) -> Result<f32, String> {
    let function = EVENT_ELAPSED_TIME.get().expect("`start` looks it up before there are events");
    let mut milliseconds = 0.0;
    // SAFETY: the caller vouches for the events; the pointer is to a local variable.
    check(unsafe { function(&raw mut milliseconds, from, to) })?;
    Ok(milliseconds)
}

/// A GPU, as the driver describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its CUDA ordinal.
    pub ordinal: u32,
    /// Its name.
    pub name: String,
    /// Bytes of its memory.
    pub total_bytes: u64,
    /// Compute capability, major and minor.
    pub compute_capability: (u32, u32),
    /// Multiprocessors.
    pub num_multiprocessors: u32,
    /// Bytes of shared memory of each multiprocessor, for all blocks that run there.
    pub shared_bytes: u32,
}

/// How many thread blocks with `shared_bytes` of shared memory run at once on a multiprocessor that has `all_bytes`, if
/// nothing else limits them.
pub(crate) fn num_blocks_of(shared_bytes: u32, all_bytes: u32) -> u32 {
    /// What the system takes for itself of every thread block (compute capability 8.0 on).
    const OF_SYSTEM: u32 = 1024;
    all_bytes / (shared_bytes + OF_SYSTEM)
}

/// What a call of the driver gave.
pub(crate) fn check(result: CUresult) -> Result<(), String> {
    if result == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(describe(result)) }
}

/// The driver's words for a code.
pub(crate) fn describe(result: CUresult) -> String {
    let mut text: *const c_char = std::ptr::null();
    // SAFETY: the function exists (`start` saw to it before any code could come); it stores the address of a constant
    // string, or null for a code that it does not know.
    let found = unsafe { cu::cuGetErrorString(result, &raw mut text) };
    let words = if found == CUresult::CUDA_SUCCESS && !text.is_null() {
        // SAFETY: the driver's strings end in a zero and live as long as the library.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    } else {
        "unknown error".to_owned()
    };
    format!("{words} (CUDA error {})", result as u32)
}

/// Loads and starts the driver, once; later calls give the first one's answer.
pub(crate) fn start() -> Result<(), &'static CudaError> {
    static STARTED: OnceLock<Result<(), CudaError>> = OnceLock::new();
    STARTED.get_or_init(start_once).as_ref().copied()
}

fn start_once() -> Result<(), CudaError> {
    if !kernels::is_built_in() {
        return Err(CudaError::NotBuiltIn);
    }
    // The name that cudarc takes is this one, or one that links to it: here the soname of every driver.
    const LIBRARY: &str = "libcuda.so.1";
    // SAFETY: loading the driver's library runs its initialisers, which is what it is for.
    let library = unsafe { libloading::Library::new(LIBRARY) };
    let library = library.map_err(|error| CudaError::NoDriver { reason: chain(&error) })?;
    for symbol in SYMBOLS {
        // SAFETY: only whether there is such a symbol is asked; it is not called with this type.
        let found = unsafe { library.get::<unsafe extern "C" fn()>(symbol.as_bytes()) };
        if found.is_err() {
            return Err(CudaError::NotADriver { library: LIBRARY.to_owned(), symbol: symbol.to_owned() });
        }
    }
    // SAFETY: the type is that of the function in every version of the driver.
    let elapsed = unsafe { library.get::<EventElapsedTime>(b"cuEventElapsedTime") };
    let elapsed = elapsed.map_err(|error| CudaError::NoDriver { reason: chain(&error) })?;
    // This runs once: nothing was set before.
    let _ = EVENT_ELAPSED_TIME.set(*elapsed);
    // The handle stays open: cudarc finds the library loaded.
    std::mem::forget(library);
    // SAFETY: asks without loading anything else than what was loaded above, or a link to it.
    if !unsafe { cu::is_culib_present() } {
        return Err(CudaError::NoDriver { reason: "it is loaded as libcuda.so.1, but not found again".to_owned() });
    }
    let mut version = 0;
    // SAFETY: the pointer is to a local variable.
    let result = unsafe { cu::cuDriverGetVersion(&raw mut version) };
    let needed = kernels::CUDA_VERSION;
    if result == CUresult::CUDA_SUCCESS && version < needed {
        let text = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
        return Err(CudaError::DriverTooOld { found: text(version), needed: text(needed) });
    }
    // SAFETY: no other call came before; 0 is the only flag there is.
    let result = unsafe { cu::cuInit(0) };
    check(result).map_err(|reason| CudaError::Init { reason, code: result as u32 })
}

/// An error and its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

/// All GPUs that the driver shows.
///
/// # Errors
/// Where there is no driver, or it does not start.
pub fn devices() -> Result<Vec<DeviceInfo>, &'static CudaError> {
    start()?;
    let mut count = 0;
    // SAFETY: the pointer is to a local variable.
    let result = unsafe { cu::cuDeviceGetCount(&raw mut count) };
    let count = if result == CUresult::CUDA_SUCCESS { count } else { 0 };
    Ok((0..count).filter_map(|ordinal| device_info(ordinal as u32)).collect())
}

/// [`devices`], of which there is at least one.
///
/// # Errors
/// Where there is no driver, it does not start, or it shows no device.
pub fn usable_devices() -> Result<Vec<DeviceInfo>, CudaError> {
    let found = devices().map_err(Clone::clone)?;
    if found.is_empty() { Err(CudaError::NoDevices { visible: visible_devices() }) } else { Ok(found) }
}

/// The CUDA version that the driver supports, major and minor.
///
/// # Errors
/// Where there is no driver, or it does not start.
pub fn driver_version() -> Result<(u32, u32), &'static CudaError> {
    start()?;
    let mut version = 0;
    // SAFETY: the pointer is to a local variable. Where this fails the version is 0.0.
    let _ = unsafe { cu::cuDriverGetVersion(&raw mut version) };
    Ok((version as u32 / 1000, version as u32 % 1000 / 10))
}

/// How the variable stands that hides devices.
fn visible_devices() -> String {
    match std::env::var_os("CUDA_VISIBLE_DEVICES") {
        Some(value) => format!("CUDA_VISIBLE_DEVICES is `{}`", value.display()),
        None => "CUDA_VISIBLE_DEVICES is not set".to_owned(),
    }
}

/// A GPU's context, open as long as this lives. All in one process share one, so opening the GPU again is quick.
pub struct Context {
    info: DeviceInfo,
    device: cu::CUdevice,
    pub(crate) handle: cu::CUcontext,
}

// SAFETY: handles of the driver may be used from any thread.
unsafe impl Send for Context {}
// SAFETY: as above; nothing here changes.
unsafe impl Sync for Context {}

impl Context {
    /// Opens GPU `ordinal`. The driver takes some hundred MiB of it.
    ///
    /// # Errors
    /// Where there is no driver or no such device, or where others have it for themselves.
    pub fn open(ordinal: u32) -> Result<Self, CudaError> {
        let infos = devices().map_err(Clone::clone)?;
        let Some(info) = infos.iter().find(|info| info.ordinal == ordinal).cloned() else {
            return Err(CudaError::NoDevice { ordinal, count: infos.len(), visible: visible_devices() });
        };
        let failed = |result: CUresult| {
            check(result).map_err(|reason| CudaError::Open {
                ordinal,
                name: info.name.clone(),
                reason,
                code: result as u32,
            })
        };
        let mut device = 0;
        // SAFETY: the pointer is to a local variable.
        failed(unsafe { cu::cuDeviceGet(&raw mut device, ordinal as i32) })?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: as above; released on drop.
        failed(unsafe { cu::cuDevicePrimaryCtxRetain(&raw mut handle, device) })?;
        Ok(Self { info, device, handle })
    }

    /// The GPU.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Free and total bytes, as the driver sees them now.
    ///
    /// # Errors
    /// Where the driver fails.
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is retained until drop; the pointers are to local variables.
        let result = unsafe {
            match cu::cuCtxSetCurrent(self.handle) {
                CUresult::CUDA_SUCCESS => cu::cuMemGetInfo_v2(&raw mut free, &raw mut total),
                failed => failed,
            }
        };
        let DeviceInfo { ordinal, name, .. } = self.info.clone();
        check(result).map_err(|reason| CudaError::Open { ordinal, name, reason, code: result as u32 })?;
        Ok((free as u64, total as u64))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained by `open`. What fails here fails for the process as a whole.
        let _ = unsafe { cu::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// What tells GPU `ordinal` from all others, whatever they are called by processes and containers.
pub(crate) fn uuid(ordinal: u32) -> Result<[u8; 16], String> {
    let (mut device, mut uuid) = (0, cu::CUuuid { bytes: [0; 16] });
    // SAFETY: the pointer is to a local variable.
    check(unsafe { cu::cuDeviceGet(&raw mut device, ordinal as i32) })?;
    // SAFETY: as above; the device was just given.
    check(unsafe { cu::cuDeviceGetUuid_v2(&raw mut uuid, device) })?;
    Ok(uuid.bytes.map(|byte| byte as u8))
}

fn device_info(ordinal: u32) -> Option<DeviceInfo> {
    let mut device = 0;
    // SAFETY: the pointer is to a local variable.
    check(unsafe { cu::cuDeviceGet(&raw mut device, ordinal as i32) }).ok()?;
    let mut name = [0 as c_char; 256];
    // SAFETY: the buffer has the length given; the driver ends what it writes with a zero.
    check(unsafe { cu::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, device) }).ok()?;
    let mut total_bytes = 0;
    // SAFETY: the pointer is to a local variable.
    check(unsafe { cu::cuDeviceTotalMem_v2(&raw mut total_bytes, device) }).ok()?;
    use cu::CUdevice_attribute as A;
    let attribute = |attribute: A| {
        let mut value = 0;
        // SAFETY: the pointer is to a local variable.
        check(unsafe { cu::cuDeviceGetAttribute(&raw mut value, attribute, device) }).ok().map(|()| value as u32)
    };
    // SAFETY: the buffer ends in zeros, whatever was written.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    Some(DeviceInfo {
        ordinal,
        name,
        total_bytes: total_bytes as u64,
        compute_capability: (
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        num_multiprocessors: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_bytes: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?,
    })
}
