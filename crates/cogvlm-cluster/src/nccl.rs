//! NCCL, which carries rows between GPUs of different processes: found and loaded at run time, every failure an error.
//!
//! Communicators do not block: whatever may wait for another process is polled, and aborted when the run fails.
//! Operations of one communicator are called one at a time, which NCCL asks for.

mod search;

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use libloading::Library;

use crate::control::{Control, register};
use crate::error::ClusterError;
use crate::watch::{Abort, Watch, lock, wait};

/// Oldest version that is used: 2.18.0.
const OLDEST: i32 = 21_800;
/// How long an operation that has not ended is looked at without a pause: as long as enqueuing takes when peers are
/// known.
const EAGER: Duration = Duration::from_millis(2);
/// Time between looks after that.
const POLL: Duration = Duration::from_micros(500);
/// How long ending a communicator in order may take before it is aborted.
const FINISH: Duration = Duration::from_secs(2);
/// Most blocks of a transfer's kernel, and so most of NCCL's channels, each with buffers of a few MiB on the GPU. What
/// crosses is one row for a token and some thousand rows for a prompt: more would take memory and multiprocessors for
/// nothing.
const MAX_CTAS: c_int = 4;

// Values of nccl.h.
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
const INT8: c_int = 0;
const CONFIG_MAGIC: u32 = 0xcafe_beef;
const UNDEFINED: c_int = c_int::MIN;
const UNIQUE_ID_BYTES: usize = 128;

type Comm = *mut c_void;

/// `ncclConfig_t` as version 2.18 has it, which newer libraries read too.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    /// Padding in 2.18, and later versions know it to be.
    reserved: c_int,
}

/// What makes processes find each other in NCCL. Made by one, and shared with the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct UniqueId([u8; UNIQUE_ID_BYTES]);

impl UniqueId {
    /// Its bytes, to be sent.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// From what was sent. `None` if it is not as long as one.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

/// Why NCCL cannot be used, or did not do what it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NcclError {
    /// It was not found.
    #[error("NCCL is not found: {reason}")]
    NotFound {
        /// What the loader said of the first candidate.
        reason: String,
    },
    /// A library by its name is not one.
    #[error("{} has no `{symbol}`: it is not NCCL, or one that is too old", path.display())]
    NotNccl {
        /// The library.
        path: PathBuf,
        /// The function that it lacks.
        symbol: String,
    },
    /// It is too old.
    #[error("{} is NCCL {found}, and {needed} is the oldest that is used", path.display())]
    TooOld {
        /// The library.
        path: PathBuf,
        /// Its version.
        found: String,
        /// The oldest version.
        needed: String,
    },
    /// A variable has to be set before there are threads.
    #[error("{variable} is not set, and it is too late to set it")]
    Environment {
        /// The variable.
        variable: &'static str,
    },
    /// A call failed.
    #[error("{call} of {} ({version}) failed at rank {rank} of {size}: {reason}", path.display())]
    Call {
        /// The function.
        call: &'static str,
        /// The library.
        path: PathBuf,
        /// Its version.
        version: String,
        /// The communicator's rank that called it.
        rank: usize,
        /// Of how many.
        size: usize,
        /// What NCCL said.
        reason: String,
    },
    /// A call did not end in time.
    #[error(
        "{call} of {} ({version}) did not end within {} s at rank {rank} of {size}",
        path.display(), timeout.as_secs_f64()
    )]
    Timeout {
        /// The function.
        call: &'static str,
        /// The library.
        path: PathBuf,
        /// Its version.
        version: String,
        /// The communicator's rank that called it.
        rank: usize,
        /// Of how many.
        size: usize,
        /// How long.
        timeout: Duration,
    },
    /// The communicator was aborted.
    #[error("the NCCL communicator of rank {rank} of {size} is closed")]
    Closed {
        /// The communicator's rank.
        rank: usize,
        /// Of how many.
        size: usize,
    },
    /// An operation names a rank that there is not.
    #[error("rank {rank} of {size} of an NCCL communicator cannot exchange rows with rank {peer}")]
    Peer {
        /// The communicator's rank.
        rank: usize,
        /// Of how many.
        size: usize,
        /// The other one.
        peer: usize,
    },
    /// A process failed, or its messages cannot be read.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
}

impl NcclError {
    /// What to do about it, where that is known.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NotFound { .. } => {
                "install it (`pip install nvidia-nccl-cu12`, or your system's libnccl2), or name the \
                                      file in COGVLM_NCCL_LIBRARY"
                    .to_owned()
            }
            Self::NotNccl { .. } | Self::TooOld { .. } => {
                "install a newer one (`pip install nvidia-nccl-cu12`), or name another file in COGVLM_NCCL_LIBRARY"
                    .to_owned()
            }
            Self::Call { .. } | Self::Timeout { .. } => {
                "NCCL_DEBUG=WARN makes NCCL say more; NCCL_SOCKET_IFNAME chooses its network interface".to_owned()
            }
            Self::Environment { variable } => format!("set {variable}=0 in the environment of every process"),
            Self::Cluster(error) => return error.hint(),
            Self::Closed { .. } | Self::Peer { .. } => return None,
        })
    }
}

/// Functions of nccl.h, with the types that they have in every version from 2.18 on.
struct Functions {
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    get_last_error: unsafe extern "C" fn(Comm) -> *const c_char,
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    comm_init_rank_config: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> c_int,
    comm_get_async_error: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    comm_finalize: unsafe extern "C" fn(Comm) -> c_int,
    comm_destroy: unsafe extern "C" fn(Comm) -> c_int,
    comm_abort: unsafe extern "C" fn(Comm) -> c_int,
    send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int,
    recv: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
}

/// NCCL, loaded and checked.
pub struct Nccl {
    functions: Functions,
    version: i32,
    path: PathBuf,
}

impl std::fmt::Debug for Nccl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nccl").field("path", &self.path).field("version", &self.version).finish_non_exhaustive()
    }
}

/// Sets NCCL_NVLS_ENABLE=0 unless it is set: NVLink multicast stays unused, since nothing here has use for it and some
/// hosts do not bear it. To be called as the program starts: the environment can be changed only as long as there is
/// one thread.
///
/// # Errors
/// Where it is not set and there are other threads.
pub fn prepare_environment() -> Result<(), NcclError> {
    const VARIABLE: &str = "NCCL_NVLS_ENABLE";
    if std::env::var_os(VARIABLE).is_some() {
        return Ok(());
    }
    let num_threads = std::fs::read_dir("/proc/self/task").map(Iterator::count).unwrap_or(usize::MAX);
    if num_threads != 1 {
        return Err(NcclError::Environment { variable: VARIABLE });
    }
    // SAFETY: this is the only thread, and no other can begin meanwhile: nobody else reads or writes the environment.
    unsafe { std::env::set_var(VARIABLE, "0") };
    Ok(())
}

impl Nccl {
    /// Finds and loads NCCL: at `COGVLM_NCCL_LIBRARY` where that is set, else as libnccl.so.2 or libnccl.so by the
    /// system's loader, in Python environments and beside CUDA. The first that can be used is.
    ///
    /// # Errors
    /// Where there is none, or only such as cannot be used; where [`prepare_environment`] fails, which was to be called
    /// before.
    pub fn load() -> Result<Arc<Self>, NcclError> {
        prepare_environment()?;
        Self::load_first(&search::candidates(&|name| std::env::var_os(name), Path::new("/")))
    }

    /// The first of `candidates` that can be used. Where none can, the error is that of the first one that was found.
    fn load_first(candidates: &[PathBuf]) -> Result<Arc<Self>, NcclError> {
        let mut first: Option<NcclError> = None;
        for candidate in candidates {
            match Self::load_file(candidate) {
                Ok(nccl) => {
                    tracing::info!(path = %candidate.display(), version = nccl.version_text(), "loaded NCCL");
                    return Ok(nccl);
                }
                Err(error) => {
                    tracing::debug!(path = %candidate.display(), %error, "no usable NCCL");
                    let was_found = !matches!(error, NcclError::NotFound { .. });
                    if first.as_ref().is_none_or(|first| was_found && matches!(first, NcclError::NotFound { .. })) {
                        first = Some(error);
                    }
                }
            }
        }
        Err(first.unwrap_or(NcclError::NotFound { reason: "there is nowhere to look".to_owned() }))
    }

    /// Loads NCCL from one file, or from a file name that the system's loader finds.
    ///
    /// # Errors
    /// Where it cannot be loaded, lacks a function, or is too old.
    pub fn load_file(path: &Path) -> Result<Arc<Self>, NcclError> {
        // SAFETY: loading the library runs its initialisers, which is what it is for.
        let library = unsafe { Library::new(path) };
        let library = library.map_err(|error| NcclError::NotFound { reason: chain(&error) })?;
        macro_rules! function {
            ($name:literal) => {{
                // SAFETY: the field that this goes to has the type that nccl.h gives the function.
                let symbol = unsafe { library.get($name.as_bytes()) };
                *symbol.map_err(|_| NcclError::NotNccl { path: path.to_owned(), symbol: $name.to_owned() })?
            }};
        }
        let get_version: unsafe extern "C" fn(*mut c_int) -> c_int = function!("ncclGetVersion");
        let mut version = 0;
        // SAFETY: the pointer is to a local variable.
        let result = unsafe { get_version(&raw mut version) };
        if result != SUCCESS || version < OLDEST {
            let (found, needed) = (version_text(version), version_text(OLDEST));
            return Err(NcclError::TooOld { path: path.to_owned(), found, needed });
        }
        let functions = Functions {
            get_error_string: function!("ncclGetErrorString"),
            get_last_error: function!("ncclGetLastError"),
            get_unique_id: function!("ncclGetUniqueId"),
            comm_init_rank_config: function!("ncclCommInitRankConfig"),
            comm_get_async_error: function!("ncclCommGetAsyncError"),
            comm_finalize: function!("ncclCommFinalize"),
            comm_destroy: function!("ncclCommDestroy"),
            comm_abort: function!("ncclCommAbort"),
            send: function!("ncclSend"),
            recv: function!("ncclRecv"),
            group_start: function!("ncclGroupStart"),
            group_end: function!("ncclGroupEnd"),
        };
        // It stays loaded: its threads, such as the one behind every id, outlive whatever they were made for.
        std::mem::forget(library);
        Ok(Arc::new(Self { functions, version, path: path.to_owned() }))
    }

    /// Its version, such as `2.28.9`.
    pub fn version_text(&self) -> String {
        version_text(self.version)
    }

    /// The file, or the name under which the system's loader found it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A new id. NCCL opens a port for it at this host.
    ///
    /// # Errors
    /// Where NCCL fails, for want of a network interface for example.
    pub fn unique_id(&self) -> Result<UniqueId, NcclError> {
        let mut id = UniqueId([0; UNIQUE_ID_BYTES]);
        // SAFETY: the pointer is to a local variable of the size that nccl.h gives it.
        let result = unsafe { (self.functions.get_unique_id)(&raw mut id) };
        self.check("ncclGetUniqueId", result, None, 0, 1)?;
        Ok(id)
    }

    fn check(
        &self, call: &'static str, result: c_int, comm: Option<Comm>, rank: usize, size: usize,
    ) -> Result<(), NcclError> {
        if result == SUCCESS || result == IN_PROGRESS {
            return Ok(());
        }
        Err(self.failed(call, rank, size, self.describe(result, comm)))
    }

    fn failed(&self, call: &'static str, rank: usize, size: usize, reason: String) -> NcclError {
        NcclError::Call { call, path: self.path.clone(), version: self.version_text(), rank, size, reason }
    }

    fn describe(&self, result: c_int, comm: Option<Comm>) -> String {
        let text = |pointer: *const c_char| {
            // SAFETY: NCCL's strings end in a zero and live at least until its next call.
            (!pointer.is_null()).then(|| unsafe { CStr::from_ptr(pointer) }.to_string_lossy().trim().to_owned())
        };
        // SAFETY: takes any number.
        let words = text(unsafe { (self.functions.get_error_string)(result) }).unwrap_or_default();
        // SAFETY: takes a communicator or null.
        let last = text(unsafe { (self.functions.get_last_error)(comm.unwrap_or(std::ptr::null_mut())) });
        let last = last.filter(|last| !last.is_empty()).map(|last| format!(": {last}")).unwrap_or_default();
        format!("{words} (NCCL error {result}){last}")
    }
}

fn version_text(version: i32) -> String {
    // Up to 2.8 a version has one digit less.
    let (major, rest) =
        if version < 10_000 { (version / 1000, version % 1000) } else { (version / 10_000, version % 10_000) };
    format!("{major}.{}.{}", rest / 100, rest % 100)
}

/// An error and its causes, in one line: libloading keeps the loader's words in the cause.
fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

/// One half of an exchange of rows between GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transfer {
    /// `num_bytes` from device address `address` to process `peer`.
    Send {
        /// Where they lie.
        address: u64,
        /// How many.
        num_bytes: usize,
        /// For whom.
        peer: usize,
    },
    /// `num_bytes` from process `peer` to device address `address`.
    Recv {
        /// Where they go.
        address: u64,
        /// How many.
        num_bytes: usize,
        /// From whom.
        peer: usize,
    },
}

/// Ranks that exchange rows, each with a GPU, as one of them sees it. Dropping it ends it, as [`close`](Self::close) does.
pub struct Communicator {
    inner: Arc<Inner>,
}

struct Inner {
    nccl: Arc<Nccl>,
    rank: usize,
    size: usize,
    timeout: Duration,
    watch: Arc<Watch>,
    comm: Mutex<Handle>,
    /// An operation failed: it cannot be ended in order any more.
    is_broken: AtomicBool,
    /// Whether NCCL is at work ending it.
    ending: Arc<(Mutex<bool>, Condvar)>,
}

/// The communicator; null once it is closed.
struct Handle(Comm);

// SAFETY: NCCL's handles may be used from any thread, one at a time, which the lock around this one sees to.
unsafe impl Send for Handle {}

impl Abort for Inner {
    fn abort(&self) {
        // Calls do not block, so the lock is free soon.
        self.end(self.nccl.functions.comm_abort, "ncclCommAbort");
    }
}

impl Communicator {
    /// Makes a communicator of all processes of the run, for the GPU whose context is current on this thread. All
    /// processes call it at the same point of their messages: the id goes through `control`, marked with `code`. No
    /// single call waits for longer than `timeout`.
    ///
    /// # Errors
    /// Where NCCL fails, or a process does.
    pub fn connect(nccl: &Arc<Nccl>, control: &Control, code: u16, timeout: Duration) -> Result<Self, NcclError> {
        let own = if control.rank() == 0 { Some(nccl.unique_id()?) } else { None };
        let bytes = control.share(code, own.as_ref().map_or(&[0; UNIQUE_ID_BYTES], UniqueId::as_bytes))?;
        let (rank, size) = (control.rank(), control.size());
        let id = UniqueId::from_bytes(&bytes).ok_or_else(|| {
            let reason = format!("process 0 shared an id of {} bytes", bytes.len());
            nccl.failed("ncclCommInitRankConfig", rank, size, reason)
        })?;
        Self::init(nccl, id, rank, size, control.watch(), timeout)
    }

    /// Makes the communicator of `id`, of `size` ranks of which this is `rank`, for the GPU whose context is current on
    /// this thread. Waits for the others, which do the same, for at most `timeout`. It is aborted when `watch` learns of
    /// a failure.
    ///
    /// # Errors
    /// Where NCCL fails, a process does, or the time is over.
    pub fn init(
        nccl: &Arc<Nccl>, id: UniqueId, rank: usize, size: usize, watch: &Arc<Watch>, timeout: Duration,
    ) -> Result<Self, NcclError> {
        let mut config = Config {
            size: size_of::<Config>(),
            magic: CONFIG_MAGIC,
            version: OLDEST as u32,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: MAX_CTAS,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
            reserved: UNDEFINED,
        };
        let mut comm: Comm = std::ptr::null_mut();
        const CALL: &str = "ncclCommInitRankConfig";
        // SAFETY: the pointers are to local variables, which NCCL reads and writes before it returns; the configuration
        // is that of the version it names.
        let result = unsafe {
            (nccl.functions.comm_init_rank_config)(&raw mut comm, size as c_int, id, rank as c_int, &raw mut config)
        };
        let (comm, ending) = (Mutex::new(Handle(comm)), Arc::default());
        let (nccl_of, watch_of, is_broken) = (Arc::clone(nccl), Arc::clone(watch), AtomicBool::new(false));
        let inner = Inner { nccl: nccl_of, rank, size, timeout, watch: watch_of, comm, is_broken, ending };
        let communicator = Self { inner: Arc::new(inner) };
        let inner = &communicator.inner;
        if let Err(error) = nccl.check(CALL, result, None, rank, size) {
            // What failed at once has given no communicator that could be ended.
            lock(&inner.comm).0 = std::ptr::null_mut();
            return Err(error);
        }
        register(watch, inner);
        inner.noted(inner.wait_for(CALL, timeout))?;
        Ok(communicator)
    }

    /// Enqueues `transfers` on `stream`, all at once, so that none waits for another. Returns when they are enqueued,
    /// which may wait for the peers the first time; that they have ended the stream knows. A stream that waits for a
    /// process that fails is released by the abort that follows, with an error.
    ///
    /// # Safety
    /// `stream` is a stream of the GPU that this was made for, or 0 for the default one; every address is one of that
    /// GPU's memory with so many bytes behind it, which nobody else reads or writes until the stream is past this.
    ///
    /// # Errors
    /// Where NCCL fails, or a process does.
    pub unsafe fn exchange(&self, transfers: &[Transfer], stream: u64) -> Result<(), NcclError> {
        let Inner { rank, size, .. } = &*self.inner;
        let (rank, size) = (*rank, *size);
        for Transfer::Send { peer, .. } | Transfer::Recv { peer, .. } in transfers {
            if *peer >= size || *peer == rank {
                return Err(NcclError::Peer { rank, size, peer: *peer });
            }
        }
        // SAFETY: as the caller says.
        let enqueued = unsafe { self.enqueue(transfers, stream as *mut c_void) };
        self.inner.noted(enqueued.and_then(|()| self.inner.wait_for("ncclGroupEnd", self.inner.timeout)))
    }

    /// # Safety
    /// As [`exchange`](Self::exchange).
    unsafe fn enqueue(&self, transfers: &[Transfer], stream: *mut c_void) -> Result<(), NcclError> {
        let Inner { nccl, rank, size, .. } = &*self.inner;
        let (rank, size) = (*rank, *size);
        let handle = self.inner.open()?;
        let comm = handle.0;
        let functions = &nccl.functions;
        // SAFETY: has no preconditions; the group is ended below on this thread.
        let started = unsafe { (functions.group_start)() };
        nccl.check("ncclGroupStart", started, Some(comm), rank, size)?;
        let mut called = Ok(());
        for transfer in transfers {
            let (call, result) = match *transfer {
                Transfer::Send { address, num_bytes, peer } => {
                    // SAFETY: the caller vouches for address and stream; the communicator is open while it is locked.
                    let result = unsafe {
                        (functions.send)(address as *const c_void, num_bytes, INT8, peer as c_int, comm, stream)
                    };
                    ("ncclSend", result)
                }
                Transfer::Recv { address, num_bytes, peer } => {
                    // SAFETY: as above.
                    let result = unsafe {
                        (functions.recv)(address as *mut c_void, num_bytes, INT8, peer as c_int, comm, stream)
                    };
                    ("ncclRecv", result)
                }
            };
            called = nccl.check(call, result, Some(comm), rank, size);
            if called.is_err() {
                break;
            }
        }
        // SAFETY: ends the group begun above, whatever happened in it.
        let ended = unsafe { (functions.group_end)() };
        called?;
        nccl.check("ncclGroupEnd", ended, Some(comm), rank, size)
    }

    /// An error if the communicator has failed, of itself or because a process has: to be asked while waiting for a
    /// stream.
    ///
    /// # Errors
    /// Where it has.
    pub fn check(&self) -> Result<(), NcclError> {
        self.inner.noted(self.inner.poll("ncclCommGetAsyncError").map(|_| ()))
    }

    /// Ends the communicator: in order where nothing failed and what was enqueued ends within 2 s, else by aborting it. In
    /// order, NCCL waits for the other end to do the same: two processes end those that they share in one order. Whatever
    /// the stream still waits for is released, and every later call is an error.
    pub fn close(&self) {
        let inner = &self.inner;
        let is_whole = inner.watch.failure().is_none() && !inner.is_broken.load(Ordering::SeqCst);
        let in_order = is_whole && inner.finish().is_ok();
        if !in_order {
            inner.abort();
        }
        // The library should not be at work any more when the process ends.
        let deadline = Instant::now() + FINISH;
        let mut is_ending = lock(&inner.ending.0);
        while *is_ending && Instant::now() < deadline {
            is_ending = wait(&inner.ending.1, is_ending, FINISH);
        }
        if *is_ending {
            tracing::warn!(rank = inner.rank, "NCCL did not end a communicator within {} s", FINISH.as_secs());
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.close();
    }
}

impl Inner {
    /// The communicator, locked; an error where it is closed.
    fn open(&self) -> Result<std::sync::MutexGuard<'_, Handle>, NcclError> {
        self.watch.check()?;
        let handle = lock(&self.comm);
        if handle.0.is_null() {
            drop(handle);
            self.watch.check()?;
            return Err(NcclError::Closed { rank: self.rank, size: self.size });
        }
        Ok(handle)
    }

    /// Keeps in mind that something failed.
    fn noted(&self, result: Result<(), NcclError>) -> Result<(), NcclError> {
        result.inspect_err(|_| self.is_broken.store(true, Ordering::SeqCst))
    }

    /// Whether what was called last has ended.
    fn poll(&self, call: &'static str) -> Result<bool, NcclError> {
        let handle = self.open()?;
        let mut state = SUCCESS;
        // SAFETY: the communicator is open while it is locked; the pointer is to a local variable.
        let result = unsafe { (self.nccl.functions.comm_get_async_error)(handle.0, &raw mut state) };
        self.nccl.check("ncclCommGetAsyncError", result, Some(handle.0), self.rank, self.size)?;
        self.nccl.check(call, state, Some(handle.0), self.rank, self.size)?;
        Ok(state == SUCCESS)
    }

    fn wait_for(&self, call: &'static str, timeout: Duration) -> Result<(), NcclError> {
        let start = Instant::now();
        while !self.poll(call)? {
            if start.elapsed() >= timeout {
                let (path, version) = (self.nccl.path.clone(), self.nccl.version_text());
                return Err(NcclError::Timeout { call, path, version, rank: self.rank, size: self.size, timeout });
            }
            if start.elapsed() < EAGER { std::thread::yield_now() } else { std::thread::sleep(POLL) }
        }
        Ok(())
    }

    /// Ends the communicator in order, which waits until what was enqueued is done.
    fn finish(&self) -> Result<(), NcclError> {
        const CALL: &str = "ncclCommFinalize";
        let handle = self.open()?;
        // SAFETY: the communicator is open while it is locked.
        let result = unsafe { (self.nccl.functions.comm_finalize)(handle.0) };
        self.nccl.check(CALL, result, Some(handle.0), self.rank, self.size)?;
        drop(handle);
        self.wait_for(CALL, FINISH)?;
        self.end(self.nccl.functions.comm_destroy, "ncclCommDestroy");
        Ok(())
    }

    /// Has `function` end the communicator, on a thread of its own: it waits for threads of NCCL, and these for the other
    /// end, longer than anyone here may wait. There is no thread to be had where the system has none, and then the
    /// process's end is what ends it.
    fn end(&self, function: unsafe extern "C" fn(Comm) -> c_int, call: &'static str) {
        let comm = std::mem::replace(&mut *lock(&self.comm), Handle(std::ptr::null_mut()));
        if comm.0.is_null() {
            return;
        }
        // The library stays loaded while it is at work.
        let (nccl, ending) = (Arc::clone(&self.nccl), Arc::clone(&self.ending));
        *lock(&ending.0) = true;
        let end = move || {
            let (comm, _nccl) = (comm, nccl);
            // SAFETY: the communicator was open, and nobody else has it any more.
            let result = unsafe { function(comm.0) };
            tracing::debug!(result, call, "ended a communicator");
            *lock(&ending.0) = false;
            ending.1.notify_all();
        };
        if std::thread::Builder::new().name("nccl-end".to_owned()).spawn(end).is_err() {
            *lock(&self.ending.0) = false;
        }
    }
}

#[cfg(test)]
mod tests;
