//! Weights arrive unchanged by every way there is; `rates` prints how fast.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use cogvlm_backend::{Backend, BackendError, HostReadError, HostTensor, HostWeight, StagedSource};
use cogvlm_checkpoint::ModelSource;
use cogvlm_core::{DType, Device};
use cogvlm_cuda::{CudaBackend, LoadPath};
use cogvlm_pipeline::WeightSource;
use half::{bf16, f16};
use memmap2::Mmap;

const WIDTH: usize = 16;
const PATHS: [LoadPath; 3] = [LoadPath::Auto, LoadPath::Registered, LoadPath::Staged];
const DTYPES: [DType; 3] = [DType::Bf16, DType::F16, DType::F32];

fn backend(activations: DType, path: LoadPath) -> CudaBackend {
    let backend = CudaBackend::new(Device::Gpu(0), 0, 3 << 30, activations);
    backend.unwrap_or_else(|error| panic!("{error}")).with_load_path(path)
}

/// A file of pseudo-random numbers behind a few odd bytes.
struct NumberFile {
    file: File,
    map: Mmap,
    dtype: DType,
}

const HEADER_BYTES: usize = 1001;

/// Number `index` of every file: in [-1, 1), with more digits than 16 bits hold.
fn number(index: usize) -> f32 {
    let mixed = (index as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    ((mixed ^ mixed >> 29) >> 40) as f32 / (1 << 23) as f32 - 1.0
}

/// It as it is stored, then as it is on a device that computes in `activations`.
fn number_as(index: usize, stored: DType, activations: DType) -> f32 {
    let round = |dtype: DType, value: f32| match dtype {
        DType::F32 => value,
        DType::F16 => f16::from_f32(value).to_f32(),
        DType::Bf16 => bf16::from_f32(value).to_f32(),
    };
    round(activations, round(stored, number(index)))
}

impl NumberFile {
    fn new(dtype: DType, count: usize) -> Arc<Self> {
        let mut file = tempfile::tempfile().expect("a temporary file");
        let mut bytes = vec![7; HEADER_BYTES];
        for index in 0..count {
            match dtype {
                DType::F32 => bytes.extend(number(index).to_le_bytes()),
                DType::F16 => bytes.extend(f16::from_f32(number(index)).to_le_bytes()),
                DType::Bf16 => bytes.extend(bf16::from_f32(number(index)).to_le_bytes()),
            }
        }
        file.write_all(&bytes).expect("room for the file");
        // SAFETY: the file has no name: nobody else writes to it. The case that cuts it off does not read the mapping.
        let map = unsafe { Mmap::map(&file) }.expect("files can be mapped");
        Arc::new(Self { file, map, dtype })
    }
}

/// Rows of such a file.
struct Rows {
    source: Arc<NumberFile>,
    shape: [usize; 2],
    first: usize,
}

fn rows(source: &Arc<NumberFile>, first_row: usize, rows: usize) -> HostWeight {
    Arc::new(Rows { source: Arc::clone(source), shape: [rows, WIDTH], first: first_row * WIDTH })
}

impl Rows {
    fn start(&self) -> usize {
        HEADER_BYTES + self.first * self.dtype().size_bytes()
    }

    fn changed(&self) -> HostReadError {
        HostReadError { tensor: self.name().to_owned(), reason: "the file was cut off".to_owned() }
    }
}

impl HostTensor for Rows {
    fn name(&self) -> &str {
        "rows.weight"
    }

    fn dtype(&self) -> DType {
        self.source.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn mapped(&self) -> Option<&[u8]> {
        let num_bytes = self.shape.iter().product::<usize>() * self.dtype().size_bytes();
        Some(&self.source.map[self.start()..][..num_bytes])
    }

    fn read_into(&self, destination: &mut [u8]) -> Result<(), HostReadError> {
        self.read_at(0, destination)
    }

    fn read_at(&self, offset: usize, destination: &mut [u8]) -> Result<(), HostReadError> {
        let offset = (self.start() + offset) as u64;
        self.source.file.read_exact_at(destination, offset).map_err(|_| self.changed())
    }

    fn mapping(&self) -> Option<&[u8]> {
        Some(&self.source.map)
    }

    fn verify(&self) -> Result<(), HostReadError> {
        let metadata = self.source.file.metadata().map_err(|_| self.changed())?;
        if metadata.len() == self.source.map.len() as u64 { Ok(()) } else { Err(self.changed()) }
    }
}

/// The elements of a weight of `[rows, width]`, as the device has them.
fn elements<B: Backend>(backend: &B, weight: &B::Weight, [rows, width]: [usize; 2]) -> Vec<f32> {
    let mut buffer = backend.alloc("copy", backend.activation_dtype(), [rows, width]).expect("room");
    backend.copy_weight_rows(weight, &mut buffer, 0).unwrap_or_else(|error| panic!("{error}"));
    backend.read(&buffer, 0..rows).expect("rows fit")
}

#[track_caller]
fn check(what: &str, found: &[f32], first: usize, stored: DType, activations: DType) {
    for (offset, value) in found.iter().enumerate() {
        let expected = number_as(first + offset, stored, activations);
        assert_eq!(value.to_bits(), expected.to_bits(), "{what}: element {offset} is {value}, not {expected}");
    }
}

/// First row and rows: one row, odd places, more than a slot, more than all slots, across the windows of a registration.
const SPANS: [(usize, usize); 5] = [(0, 1), (3, 1021), (70_000, 300_001), (1, 2_600_000), (1_999_999, 700_000)];
const FILE_ROWS: usize = 2_700_000;

#[test]
#[ignore = "needs a GPU"]
fn every_way_gives_the_same_numbers() {
    for stored in DTYPES {
        let file = NumberFile::new(stored, FILE_ROWS * WIDTH);
        for activations in [DType::Bf16, DType::F32] {
            for path in PATHS {
                let backend = backend(activations, path);
                let load = |(first, count)| (first, count, backend.load(&rows(&file, first, count)).expect("loads"));
                // All of them are under way before the first is looked at.
                for (first, count, weight) in SPANS.map(load) {
                    let what = format!("{path:?}, {stored} for {activations}, rows {first}.. of {count}");
                    let found = elements(&backend, &weight, [count, WIDTH]);
                    check(&what, &found, first * WIDTH, stored, activations);
                }
            }
        }
    }
}

/// As a plan is loaded: several threads at a time, some of whose weights go through the memory that others convert in.
#[test]
#[ignore = "needs a GPU"]
fn threads_load_what_one_loads() {
    const THREADS: usize = 8;
    const ROUNDS: usize = 24;
    const COUNT: usize = 4_001;
    let files = DTYPES.map(|dtype| NumberFile::new(dtype, (THREADS * ROUNDS + COUNT) * WIDTH));
    for path in PATHS {
        let backend = &backend(DType::Bf16, path);
        let load = |thread: usize| {
            let load = |round: usize| {
                let (file, first) = (&files[(thread + round) % files.len()], thread * ROUNDS + round);
                (file.dtype, first, backend.load(&rows(file, first, COUNT)).expect("loads"))
            };
            (0..ROUNDS).map(load).collect::<Vec<_>>()
        };
        let loaded: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || load(thread))).collect();
            threads.into_iter().flat_map(|thread| thread.join().expect("no load panics")).collect()
        });
        for (stored, first, weight) in loaded {
            let found = elements(backend, &weight, [COUNT, WIDTH]);
            check(&format!("{path:?}, {stored}"), &found, first * WIDTH, stored, DType::Bf16);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn rings_give_what_load_gives() {
    const COUNT: usize = 1_200_001;
    let files = DTYPES.map(|dtype| NumberFile::new(dtype, (COUNT + 8) * WIDTH));
    for activations in [DType::Bf16, DType::F32] {
        for path in PATHS {
            let [backend, peer] = [backend(activations, path), backend(activations, path)];
            let slot_bytes = (COUNT * WIDTH * 8 + 3 * 256).next_multiple_of(256);
            let mut ring = backend.staging(2, slot_bytes).expect("room");
            for round in 0..5 {
                let (slot, first) = (round % 2, round);
                let sources = files.iter().map(|file| {
                    let host = rows(file, first, COUNT);
                    if round == 2 {
                        StagedSource::Peer(peer.load(&host).expect("loads"))
                    } else {
                        StagedSource::Host(host)
                    }
                });
                backend.stage(&mut ring, slot, sources.collect()).expect("fits");
                for _ in 0..2 {
                    let weights = backend.staged(&mut ring, slot).expect("copied");
                    for (weight, file) in weights.iter().zip(&files) {
                        let what = format!("{path:?}, {} for {activations}, round {round}", file.dtype);
                        let found = elements(&backend, weight, [COUNT, WIDTH]);
                        check(&what, &found, first * WIDTH, file.dtype, activations);
                    }
                }
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn rules_make_what_the_host_makes() {
    let tiny = ModelSource::open("tiny@11").expect("a built-in model");
    let large = ModelSource::open("cogvlm-chat-17b@1").expect("a built-in model");
    let large_names = ["model.layers.31.mlp.language_mlp.gate_proj.weight", "lm_head.weight"];
    let tensors = tiny.tensors().iter().map(|info| (&tiny, info));
    let tensors = tensors.chain(large_names.map(|name| (&large, large.info(name).expect("the model has it"))));
    for activations in [DType::Bf16, DType::F32] {
        let backend = backend(activations, LoadPath::Auto);
        for (model, info) in tensors.clone() {
            let weight = model.weight(&info.spec).expect("the model has it");
            let mut bytes = vec![0; info.num_bytes()];
            weight.read_into(&mut bytes).expect("it can be made");
            let width = *info.spec.shape.last().expect("tensors have a shape");
            let shape = [info.spec.num_elements() / width, width];
            let found = elements(&backend, &backend.load(&weight).expect("loads"), shape);
            for (index, (value, expected)) in found.iter().zip(bytes.as_chunks::<2>().0).enumerate() {
                let expected = bf16::from_le_bytes(*expected).to_f32();
                assert_eq!(value.to_bits(), expected.to_bits(), "{activations}, element {index} of {}", info.spec.name);
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn a_file_that_was_cut_off_is_named() {
    for path in PATHS {
        let file = NumberFile::new(DType::Bf16, 100_000 * WIDTH);
        let backend = backend(DType::Bf16, path);
        file.file.set_len(4096).expect("it can be cut off");
        match backend.load(&rows(&file, 50_000, 50_000)) {
            Err(BackendError::Host(error)) => assert_eq!(error.tensor, "rows.weight", "{path:?}"),
            Err(error) => panic!("{path:?}: {error}"),
            Ok(_) => panic!("{path:?}: half a weight is loaded"),
        }
        assert_eq!(backend.memory().in_use, 0, "{path:?}");
    }
}

/// `cargo test --release -p cogvlm-cuda --test load -- --ignored --nocapture rates`
#[test]
#[ignore = "needs a GPU"]
#[expect(clippy::print_stdout, reason = "prints what it measures")]
fn rates() {
    const NUM_WEIGHTS: usize = 8;
    const ROWS: usize = (128 << 20) / (2 * WIDTH);
    let file = NumberFile::new(DType::Bf16, NUM_WEIGHTS * ROWS * WIDTH);
    let total = (NUM_WEIGHTS * ROWS * WIDTH * 2) as f64;
    for path in [LoadPath::Registered, LoadPath::Staged] {
        let backend = backend(DType::Bf16, path);
        // The second time its pages are registered, or its slots are allocated.
        for round in ["first", "again"] {
            let start = Instant::now();
            let load = |index| backend.load(&rows(&file, index * ROWS, ROWS)).expect("loads");
            let weights: Vec<_> = (0..NUM_WEIGHTS).map(load).collect();
            backend.synchronize().expect("the device works");
            println!("{path:?}, {round}: {:.1} GB/s", total / start.elapsed().as_secs_f64() / 1e9);
            drop(weights);
        }
    }
    let model = ModelSource::open("cogvlm-chat-17b@1").expect("a built-in model");
    let backend = backend(DType::Bf16, LoadPath::Auto);
    for name in ["model.layers.31.mlp.language_mlp.gate_proj.weight", "lm_head.weight"] {
        let info = model.info(name).expect("the model has it");
        let weight = model.weight(&info.spec).expect("the model has it");
        for round in ["first", "again"] {
            let start = Instant::now();
            let made = backend.load(&weight).expect("loads");
            backend.synchronize().expect("the device works");
            println!(
                "{name}, made, {round}: {:.1} GB/s",
                info.num_bytes() as f64 / start.elapsed().as_secs_f64() / 1e9
            );
            drop(made);
        }
    }
}
