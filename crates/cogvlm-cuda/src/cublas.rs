//! cuBLASLt, where it is installed: the yardstick that `bench` holds our products against. Nothing else uses it.

use std::ffi::{c_int, c_void};
use std::path::PathBuf;
use std::sync::Arc;

use cogvlm_backend::BackendError;
use cudarc::driver::sys::{CUdeviceptr, CUstream};
use libloading::Library;

use crate::device::Gpu;
use crate::memory::Allocation;

/// Sonames, newest first.
const NAMES: [&str; 2] = ["libcublasLt.so.13", "libcublasLt.so.12"];
static WORKSPACE_BYTES: usize = 64 << 20;

// Values of cublasLt.h and library_types.h.
const COMPUTE_32F: c_int = 68;
const R_32F: c_int = 0;
const R_16BF: c_int = 14;
const DESC_TRANSA: c_int = 3;
static OP_T: i32 = 1;
const PREF_MAX_WORKSPACE_BYTES: c_int = 1;

/// `cublasLtMatmulHeuristicResult_t`
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Heuristic {
    algo: [u64; 8],
    workspace_bytes: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

type Handle = *mut c_void;

/// An open cuBLASLt on one GPU.
pub(crate) struct CublasLt {
    library: Library,
    gpu: Arc<Gpu>,
    handle: Handle,
    workspace: Allocation,
}

/// A product `out[m, n] = x[m, k] w[n, k]ᵀ` in bf16, prepared.
pub(crate) struct Plan<'a> {
    lt: &'a CublasLt,
    desc: Handle,
    layouts: [Handle; 3],
    algo: [u64; 8],
}

impl CublasLt {
    /// The library, where it can be found and opened.
    pub(crate) fn open(gpu: &Arc<Gpu>) -> Option<Self> {
        gpu.bind().ok()?;
        // SAFETY: loading the library runs its initialisers, which is what it is for.
        let library = candidates().into_iter().find_map(|path| unsafe { Library::new(path) }.ok())?;
        let workspace = Allocation::new(gpu, "cuBLASLt's workspace", WORKSPACE_BYTES).ok()?;
        let mut handle: Handle = std::ptr::null_mut();
        // SAFETY: the function has this type in every version.
        let create = unsafe { library.get::<unsafe extern "C" fn(*mut Handle) -> c_int>(b"cublasLtCreate") }.ok()?;
        // SAFETY: the pointer is to a local variable; a context is current.
        let created = unsafe { create(&raw mut handle) } == 0;
        created.then(|| Self { library, gpu: Arc::clone(gpu), handle, workspace })
    }

    /// Prepares a product with the algorithm that the library thinks best.
    pub(crate) fn plan(&self, m: usize, n: usize, k: usize) -> Option<Plan<'_>> {
        self.gpu.bind().ok()?;
        // SAFETY: this function's type, as those of the others, is that of cublasLt.h in versions 12 and 13.
        let desc_create = unsafe {
            self.library.get::<unsafe extern "C" fn(*mut Handle, c_int, c_int) -> c_int>(b"cublasLtMatmulDescCreate")
        };
        // SAFETY: as above.
        let desc_set = unsafe {
            self.library.get::<unsafe extern "C" fn(Handle, c_int, *const c_void, usize) -> c_int>(
                b"cublasLtMatmulDescSetAttribute",
            )
        };
        // SAFETY: as above.
        let layout_create = unsafe {
            self.library
                .get::<unsafe extern "C" fn(*mut Handle, c_int, u64, u64, i64) -> c_int>(b"cublasLtMatrixLayoutCreate")
        };
        // SAFETY: as above.
        let preference_create = unsafe {
            self.library.get::<unsafe extern "C" fn(*mut Handle) -> c_int>(b"cublasLtMatmulPreferenceCreate")
        };
        // SAFETY: as above.
        let preference_set = unsafe {
            self.library.get::<unsafe extern "C" fn(Handle, c_int, *const c_void, usize) -> c_int>(
                b"cublasLtMatmulPreferenceSetAttribute",
            )
        };
        // SAFETY: as above.
        let heuristic = unsafe {
            self.library.get::<unsafe extern "C" fn(
                Handle,
                Handle,
                Handle,
                Handle,
                Handle,
                Handle,
                Handle,
                c_int,
                *mut Heuristic,
                *mut c_int,
            ) -> c_int>(b"cublasLtMatmulAlgoGetHeuristic")
        };
        let (desc_create, desc_set, layout_create) = (desc_create.ok()?, desc_set.ok()?, layout_create.ok()?);
        let (preference_create, preference_set) = (preference_create.ok()?, preference_set.ok()?);
        let heuristic = heuristic.ok()?;
        let (mut desc, mut preference) = (std::ptr::null_mut(), std::ptr::null_mut());
        let mut layouts: [Handle; 3] = [std::ptr::null_mut(); 3];
        let mut found = Heuristic::default();
        let mut count = 0;
        // Column-major, as the library has it: out [n, m] = w [k, n]ᵀ x [k, m].
        let sizes = [(k, n, k), (k, m, k), (n, m, n)];
        // SAFETY: every pointer is to a local variable that outlives the call; attributes have the sizes given.
        let succeeded = unsafe {
            desc_create(&raw mut desc, COMPUTE_32F, R_32F) == 0
                && desc_set(desc, DESC_TRANSA, (&raw const OP_T).cast(), 4) == 0
                && layouts.iter_mut().zip(sizes).all(|(layout, (rows, columns, stride))| {
                    layout_create(layout, R_16BF, rows as u64, columns as u64, stride as i64) == 0
                })
                && preference_create(&raw mut preference) == 0
                && preference_set(preference, PREF_MAX_WORKSPACE_BYTES, (&raw const WORKSPACE_BYTES).cast(), 8) == 0
                && heuristic(
                    self.handle,
                    desc,
                    layouts[0],
                    layouts[1],
                    layouts[2],
                    layouts[2],
                    preference,
                    1,
                    &raw mut found,
                    &raw mut count,
                ) == 0
                && count == 1
        };
        succeeded.then_some(Plan { lt: self, desc, layouts, algo: found.algo })
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        if self.gpu.synchronize().is_err() {
            return;
        }
        // SAFETY: this function has the type in every version; the library is closed after it.
        let destroy = unsafe { self.library.get::<unsafe extern "C" fn(Handle) -> c_int>(b"cublasLtDestroy") };
        if let Ok(destroy) = destroy {
            // SAFETY: created by `open`, plans borrow it, and nothing of it runs any more.
            unsafe { destroy(self.handle) };
        }
    }
}

impl Plan<'_> {
    /// Runs the product on `stream`.
    ///
    /// # Safety
    /// The addresses are of bf16 matrices of the sizes of the plan.
    pub(crate) unsafe fn run(
        &self, x: CUdeviceptr, weight: CUdeviceptr, out: CUdeviceptr, stream: CUstream,
    ) -> Result<(), BackendError> {
        type Matmul = unsafe extern "C" fn(
            Handle,
            Handle,
            *const f32,
            CUdeviceptr,
            Handle,
            CUdeviceptr,
            Handle,
            *const f32,
            CUdeviceptr,
            Handle,
            CUdeviceptr,
            Handle,
            *const u64,
            CUdeviceptr,
            usize,
            CUstream,
        ) -> c_int;
        let lt = self.lt;
        // SAFETY: the type is that of cublasLt.h; pointers to device memory are passed as the numbers they are.
        let matmul = unsafe { lt.library.get::<Matmul>(b"cublasLtMatmul") };
        let matmul = matmul.map_err(|error| lt.gpu.error(format!("cuBLASLt: {error}")))?;
        let (one, zero) = (1.0_f32, 0.0_f32);
        let [w, x_layout, out_layout] = self.layouts;
        // SAFETY: the caller vouches for the matrices; the plan was made by this handle.
        let status = unsafe {
            matmul(
                lt.handle,
                self.desc,
                &raw const one,
                weight,
                w,
                x,
                x_layout,
                &raw const zero,
                out,
                out_layout,
                out,
                out_layout,
                self.algo.as_ptr(),
                lt.workspace.address,
                WORKSPACE_BYTES,
                stream,
            )
        };
        if status == 0 { Ok(()) } else { Err(lt.gpu.error(format!("cuBLASLt failed with status {status}"))) }
    }
}

/// Where the library may lie: by its name, beside CUDA, in the wheels of the Python environments on PATH.
fn candidates() -> Vec<PathBuf> {
    let paths: Vec<PathBuf> =
        std::env::var_os("PATH").map(|paths| std::env::split_paths(&paths).collect()).unwrap_or_default();
    let wheels = paths.iter().filter_map(|folder| folder.parent()).flat_map(|environment| {
        let libraries = std::fs::read_dir(environment.join("lib")).into_iter().flatten().flatten();
        libraries.map(|entry| entry.path()).filter(|path| {
            path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("python3"))
        })
    });
    let wheels = wheels.flat_map(|python| {
        ["nvidia/cu13/lib", "nvidia/cublas/lib"].map(|folder| python.join("site-packages").join(folder))
    });
    let folders: Vec<PathBuf> =
        std::iter::once(PathBuf::new()).chain([PathBuf::from("/usr/local/cuda/lib64")]).chain(wheels).collect();
    folders.iter().flat_map(|folder| NAMES.map(|name| folder.join(name))).collect()
}
