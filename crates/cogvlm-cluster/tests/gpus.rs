//! Two processes, a GPU each, and NCCL between them: rows arrive, and a process that dies releases the GPU that waits.

mod common;

use std::ffi::{c_int, c_uint, c_void};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cogvlm_cluster::nccl::{Communicator, Nccl, NcclError, Transfer};
use cogvlm_cluster::{Config, Control, Explicit, Options, join, membership};
use common::{Process, free_port, place, say, soon};
use libloading::Library;

const BYTES: usize = 20 << 20;
/// Code of the message that carries NCCL's id.
const ID: u16 = 1;

/// The few functions of the driver that a test needs, on one GPU.
struct Gpu {
    library: Library,
    stream: u64,
}

impl Gpu {
    fn open(ordinal: c_int) -> Self {
        // SAFETY: loading the driver runs its initialisers, which is what it is for.
        let library = unsafe { Library::new("libcuda.so.1") }.expect("an NVIDIA driver");
        let mut gpu = Self { library, stream: 0 };
        let (mut device, mut context) = (0_i32, std::ptr::null_mut::<c_void>());
        let (mut stream, flags): (u64, c_uint) = (0, 0);
        // SAFETY: types are those of cuda.h; pointers are to local variables.
        unsafe {
            check(gpu.function::<extern "C" fn(c_uint) -> c_int>(b"cuInit")(0));
            check(gpu.function::<extern "C" fn(*mut c_int, c_int) -> c_int>(b"cuDeviceGet")(&raw mut device, ordinal));
            let retain = gpu.function::<extern "C" fn(*mut *mut c_void, c_int) -> c_int>(b"cuDevicePrimaryCtxRetain");
            check(retain(&raw mut context, device));
            check(gpu.function::<extern "C" fn(*mut c_void) -> c_int>(b"cuCtxSetCurrent")(context));
            let create = gpu.function::<extern "C" fn(*mut u64, c_uint) -> c_int>(b"cuStreamCreate");
            check(create(&raw mut stream, flags));
        }
        gpu.stream = stream;
        gpu
    }

    /// # Safety
    /// `T` is the type of the function.
    unsafe fn function<T: Copy>(&self, name: &[u8]) -> T {
        // SAFETY: the caller vouches for the type.
        *unsafe { self.library.get::<T>(name) }.expect("every driver has it")
    }

    fn upload(&self, bytes: &[u8]) -> u64 {
        let mut address = 0_u64;
        // SAFETY: types are those of cuda.h; the memory is as large as what is copied.
        unsafe {
            check(self.function::<extern "C" fn(*mut u64, usize) -> c_int>(b"cuMemAlloc_v2")(
                &raw mut address,
                bytes.len(),
            ));
            let copy = self.function::<extern "C" fn(u64, *const u8, usize) -> c_int>(b"cuMemcpyHtoD_v2");
            check(copy(address, bytes.as_ptr(), bytes.len()));
        }
        address
    }

    fn download(&self, address: u64, num_bytes: usize) -> Vec<u8> {
        let mut bytes = vec![0; num_bytes];
        // SAFETY: as above.
        unsafe {
            let copy = self.function::<extern "C" fn(*mut u8, u64, usize) -> c_int>(b"cuMemcpyDtoH_v2");
            check(copy(bytes.as_mut_ptr(), address, num_bytes));
        }
        bytes
    }

    /// Waits for the stream without blocking, so that a failure is noticed.
    fn wait(&self, communicator: &Communicator) -> Result<(), NcclError> {
        // SAFETY: the type is that of cuda.h.
        let query = unsafe { self.function::<extern "C" fn(u64) -> c_int>(b"cuStreamQuery") };
        loop {
            communicator.check()?;
            match query(self.stream) {
                0 => return Ok(()),
                600 => std::thread::yield_now(),
                code => panic!("the stream failed with CUDA error {code}"),
            }
        }
    }
}

fn check(code: c_int) {
    assert_eq!(code, 0, "CUDA error {code}");
}

#[test]
#[ignore = "is a process of the other tests"]
fn process() {
    let variables = cogvlm_cluster::membership::environment();
    let Some(job) = variables.get("TEST_JOB") else { return };
    let place = membership(&Explicit::default(), &variables).unwrap();
    let nccl = match Nccl::load() {
        Ok(nccl) => nccl,
        Err(error) => return say(&format!("end: {error}; {}", error.hint().unwrap_or_default())),
    };
    say(&format!("NCCL {} at {}", nccl.version_text(), nccl.path().display()));
    let options = Options::from_variables(&variables).unwrap();
    let cluster = join(&place, &options, &Config::new(), &|_| ()).unwrap();
    let (control, _wire) = cluster.connect(&[]).unwrap();
    let gpu = Gpu::open(place.rank as c_int);
    let result = match job.as_str() {
        "exchange" => exchange(&nccl, &control, &gpu),
        "hang" => hang(&nccl, &control, &gpu),
        other => panic!("no job is called {other}"),
    };
    match result {
        Ok(()) => say("end: well"),
        Err(error) => say(&format!("end: {error}")),
    }
}

/// Both send and receive at once, then one row goes to and fro.
fn exchange(nccl: &Arc<Nccl>, control: &Control, gpu: &Gpu) -> Result<(), NcclError> {
    let communicator = Communicator::connect(nccl, control, ID, Duration::from_secs(60))?;
    let (rank, peer) = (control.rank(), 1 - control.rank());
    let pattern = |rank: usize| (0..BYTES).map(|at| (at * 7 + at / 251 + rank * 91) as u8).collect::<Vec<u8>>();
    let (own, other) = (gpu.upload(&pattern(rank)), gpu.upload(&vec![0; BYTES]));
    let send = |num_bytes| Transfer::Send { address: own, num_bytes, peer };
    let recv = |num_bytes| Transfer::Recv { address: other, num_bytes, peer };
    // SAFETY: both buffers have the bytes named, belong to this GPU and are left alone until the stream is waited for.
    let run = |transfers: &[Transfer]| unsafe { communicator.exchange(transfers, gpu.stream) };
    run(&[send(BYTES), recv(BYTES)])?;
    gpu.wait(&communicator)?;
    assert!(gpu.download(other, BYTES) == pattern(peer), "other rows came than were sent");
    let (turns, row) = (200, 8192);
    let start = Instant::now();
    for _ in 0..turns {
        run(&[send(BYTES), recv(BYTES)])?;
    }
    gpu.wait(&communicator)?;
    let gigabytes = (turns * BYTES) as f64 / 1e9;
    say(&format!("{:.1} GB/s in each direction at once", gigabytes / start.elapsed().as_secs_f64()));
    let start = Instant::now();
    for _ in 0..turns {
        let one_way = if rank == 0 { [send(row), recv(row)] } else { [recv(row), send(row)] };
        run(&one_way[..1])?;
        run(&one_way[1..])?;
        gpu.wait(&communicator)?;
    }
    say(&format!("{:.1} us for {row} bytes to go and come", start.elapsed().as_secs_f64() / turns as f64 * 1e6));
    drop(communicator);
    control.leave()?;
    Ok(())
}

/// Process 0 waits for rows that never come.
fn hang(nccl: &Arc<Nccl>, control: &Control, gpu: &Gpu) -> Result<(), NcclError> {
    let communicator = Communicator::connect(nccl, control, ID, Duration::from_secs(60))?;
    let peer = 1 - control.rank();
    let buffer = gpu.upload(&[0; 1024]);
    let first = if peer == 1 {
        Transfer::Recv { address: buffer, num_bytes: 1024, peer }
    } else {
        Transfer::Send { address: buffer, num_bytes: 1024, peer }
    };
    // SAFETY: the buffer has the bytes named, belongs to this GPU and is left alone.
    unsafe { communicator.exchange(&[first], gpu.stream) }?;
    gpu.wait(&communicator)?;
    if peer == 0 {
        say("waits");
        return Ok(control.recv(0, None).map(|_| ())?);
    }
    // SAFETY: as above.
    unsafe { communicator.exchange(&[first], gpu.stream) }?;
    say("waits");
    gpu.wait(&communicator)
}

fn start_both(job: &str) -> [Process; 2] {
    let port = free_port();
    [0, 1].map(|rank| {
        let mut variables = place(rank, 2, port);
        variables.extend(["COGVLM_NCCL_LIBRARY"].iter().filter_map(|name| Some((*name, std::env::var(name).ok()?))));
        Process::start(job, &variables)
    })
}

#[test]
#[ignore = "needs two GPUs and NCCL"]
fn rows_go_between_two_gpus() {
    let mut both = start_both("exchange");
    let ends = both.each_mut().map(|process| process.end(soon(120)));
    let output = both[0].output();
    assert_eq!(ends, ["well", "well"], "{output}");
    tell(&output);
}

#[test]
#[ignore = "needs two GPUs and NCCL"]
fn a_killed_process_releases_the_gpu_that_waits_for_it() {
    let mut both = start_both("hang");
    both.iter().for_each(|process| process.wait_for("# waits"));
    both[1].child.kill().unwrap();
    let end = both[0].end(soon(5));
    assert!(end.contains("process 1 of 2") && end.contains("died"), "{end}");
}

/// Without a GPU: a real NCCL has all that is asked of it, gives an id, and says what it lacks.
#[test]
#[ignore = "needs NCCL"]
fn nccl_is_found_and_says_that_there_is_no_gpu() {
    let gpus = Command::new("nvidia-smi").arg("-L").output().is_ok_and(|output| output.status.success());
    // SAFETY: nothing else of this executable runs beside this test that looks at the environment.
    unsafe { std::env::set_var("NCCL_NVLS_ENABLE", "0") };
    let nccl = Nccl::load().unwrap();
    let id = nccl.unique_id().unwrap();
    assert!(id.as_bytes().iter().any(|byte| *byte != 0));
    if !gpus {
        let place = membership(&Explicit::default(), &Default::default()).unwrap();
        let cluster = join(&place, &Options::default(), &Config::new(), &|_| ()).unwrap();
        let (control, _wire) = cluster.connect(&[]).unwrap();
        let error = Communicator::connect(&nccl, &control, ID, Duration::from_secs(10)).err().unwrap();
        assert!(matches!(&error, NcclError::Call { .. }), "{error}");
        tell(&error.to_string());
        control.leave().unwrap();
    }
}

#[expect(clippy::print_stderr, reason = "measured by hand, with --nocapture")]
fn tell(text: &str) {
    eprintln!("{text}");
}
