//! Two processes, a GPU each, and NCCL between them: rows arrive, and a process that dies releases the GPU that waits.

mod common;

use std::ffi::{c_int, c_uint, c_void};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cogvlm_cluster::nccl::{Communicator, Nccl, NcclError, Transfer};
use cogvlm_cluster::{Config, Control, Explicit, Options, join, membership};
use common::{Process, free_port, place, say, soon};
use libloading::Library;

const BYTES: usize = 20 << 20;
/// How long making a communicator may take: loading NCCL's kernels is part of it.
const MEETING: Duration = Duration::from_secs(25);
/// How long a whole test may take, in seconds.
const PATIENCE_S: u64 = 50;
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

/// Says how far this process has come, and when.
fn step(start: Instant, what: &str) {
    say(&format!("{:6.2} s  {what}", start.elapsed().as_secs_f64()));
}

#[test]
#[ignore = "is a process of the other tests"]
fn process() {
    let variables = cogvlm_cluster::membership::environment();
    let Some(job) = variables.get("TEST_JOB") else { return };
    let start = Instant::now();
    let place = membership(&Explicit::default(), &variables).unwrap();
    step(start, "begins");
    let nccl = match Nccl::load() {
        Ok(nccl) => nccl,
        Err(error) => return say(&format!("end: {error}; {}", error.hint().unwrap_or_default())),
    };
    step(start, &format!("NCCL {} is loaded from {}", nccl.version_text(), nccl.path().display()));
    let options = Options::from_variables(&variables).unwrap();
    let cluster = join(&place, &options, &Config::new(), &|_| ()).unwrap();
    let (control, _wire) = cluster.connect(&[]).unwrap();
    step(start, "the processes have met");
    let gpu = Gpu::open(place.rank as c_int);
    step(start, "the GPU is open");
    let communicator = match Communicator::connect(&nccl, &control, ID, MEETING) {
        Ok(communicator) => communicator,
        Err(error) => return say(&format!("end: {error}; {}", error.hint().unwrap_or_default())),
    };
    step(start, "the communicator is made");
    let result = match job.as_str() {
        "exchange" => exchange(communicator, &control, &gpu),
        "hang" => hang(communicator, &control, &gpu),
        other => panic!("no job is called {other}"),
    };
    step(start, "done");
    match result {
        Ok(()) => say("end: well"),
        Err(error) => say(&format!("end: {error}")),
    }
}

/// Both send and receive at once, then one row goes to and fro.
fn exchange(communicator: Communicator, control: &Control, gpu: &Gpu) -> Result<(), NcclError> {
    let (rank, peer) = (control.rank(), 1 - control.rank());
    let pattern = |rank: usize| (0..BYTES).map(|at| (at * 7 + at / 251 + rank * 91) as u8).collect::<Vec<u8>>();
    let (own, other) = (gpu.upload(&pattern(rank)), gpu.upload(&vec![0; BYTES]));
    let send = |num_bytes| Transfer::Send { address: own, num_bytes, peer };
    let recv = |num_bytes| Transfer::Recv { address: other, num_bytes, peer };
    // SAFETY: both buffers have the bytes named, belong to this GPU and are left alone until the stream is waited for.
    let run = |transfers: &[Transfer]| unsafe { communicator.exchange(transfers, gpu.stream) };
    run(&[send(BYTES), recv(BYTES)])?;
    say("a first exchange is enqueued");
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
fn hang(communicator: Communicator, control: &Control, gpu: &Gpu) -> Result<(), NcclError> {
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

/// Held by each test: they use the same GPUs, and one of them what all processes share.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Two processes, and how much of what they said was shown.
struct Both {
    processes: [Process; 2],
    shown: [usize; 2],
}

impl Both {
    fn start(job: &str) -> Self {
        let port = free_port();
        let processes = [0, 1].map(|rank| {
            let mut variables = place(rank, 2, port);
            let library = std::env::var("COGVLM_NCCL_LIBRARY").ok();
            variables.extend(library.map(|library| ("COGVLM_NCCL_LIBRARY", library)));
            // The harness has threads, so that it is too late to set it there.
            variables.push(("NCCL_NVLS_ENABLE", "0".to_owned()));
            variables.push(("NCCL_DEBUG", std::env::var("NCCL_DEBUG").unwrap_or_else(|_| "WARN".to_owned())));
            Process::start_loud(job, &variables)
        });
        Self { processes, shown: [0; 2] }
    }

    /// Shows what the processes say until `is_done`, which is before `deadline`.
    fn follow(&mut self, deadline: Instant, mut is_done: impl FnMut(&mut [Process; 2]) -> bool) {
        loop {
            let done = is_done(&mut self.processes);
            for (rank, (process, shown)) in self.processes.iter().zip(&mut self.shown).enumerate() {
                let output = process.output();
                output[*shown..]
                    .lines()
                    .filter(|line| !line.is_empty())
                    .for_each(|line| tell(&format!("{rank}| {line}")));
                *shown = output.len();
            }
            if done {
                return;
            }
            assert!(Instant::now() < deadline, "out of time; what the processes said stands above");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// How process `rank` ended.
    fn end(&mut self, rank: usize, deadline: Instant) -> String {
        self.follow(deadline, |both| !matches!(both[rank].child.try_wait(), Ok(None)));
        let end = self.processes[rank].end(deadline);
        self.follow(deadline, |_| true);
        end
    }
}

#[test]
#[ignore = "needs two GPUs and NCCL"]
fn rows_go_between_two_gpus() {
    let _alone = alone();
    let mut both = Both::start("exchange");
    let deadline = soon(PATIENCE_S);
    let ends = [0, 1].map(|rank| both.end(rank, deadline));
    assert_eq!(ends, ["well", "well"]);
}

#[test]
#[ignore = "needs two GPUs and NCCL"]
fn a_peer_that_dies_releases_the_gpu_that_waits_for_it() {
    let _alone = alone();
    let mut both = Both::start("hang");
    let mut is_waiting = false;
    both.follow(soon(PATIENCE_S), |both| {
        is_waiting = both.iter().all(|process| process.output().contains("# waits"));
        is_waiting || both.iter_mut().any(|process| !matches!(process.child.try_wait(), Ok(None)))
    });
    assert!(is_waiting, "a process ended before its time; what it said stands above");
    both.processes[1].child.kill().unwrap();
    let end = both.end(0, soon(5));
    assert!(end.contains("process 1 of 2") && end.contains("died"), "{end}");
}

/// Without a GPU: a real NCCL has all that is asked of it, gives an id, and says what it lacks.
#[test]
#[ignore = "needs NCCL"]
fn nccl_is_found_and_says_that_there_is_no_gpu() {
    let _alone = alone();
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
