//! Speeds of the operations on this machine: `cargo run --release -p cogvlm-cpu --example ops_bench [-- THREADS [PART_OF_A_NAME]]`.
//!
//! Times are the least of several runs. Prefill rows give arithmetic, decode rows the bytes of weights or cache that
//! are read, beside the rate at which the same threads read memory. One thread alone is timed by what it ran, where the
//! system tells, so that other programs disturb less.
#![expect(clippy::print_stdout, reason = "it is a program that prints a table")]

use std::error::Error;
use std::hint::black_box;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use cogvlm_backend::conformance::VecTensor;
use cogvlm_backend::{Activation, Backend, Batch, ExpertWeights, HeadGeometry, RopeMode, SequenceRows};
use cogvlm_core::tokens::ExpertRange;
use cogvlm_core::workspace::{BLOCK_LEN, StepLimits};
use cogvlm_core::{DType, Device, Expert};
use cogvlm_cpu::{CpuBackend, CpuBuffer, CpuWeight, Threads};
use rayon::ThreadPool;

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

/// Shapes of a model that matter here.
struct Model {
    name: &'static str,
    hidden: usize,
    inner: usize,
    heads: usize,
    vit_hidden: usize,
    vit_inner: usize,
    vit_heads: usize,
}

const MODELS: [Model; 2] = [
    Model { name: "small", hidden: 512, inner: 1376, heads: 4, vit_hidden: 448, vit_inner: 1920, vit_heads: 4 },
    Model { name: "17b", hidden: 4096, inner: 11008, heads: 32, vit_hidden: 1792, vit_inner: 15360, vit_heads: 16 },
];
const PROMPT: usize = 1260;
const VIT_TOKENS: usize = 1226;

fn main() -> Outcome {
    let threads = std::env::args().nth(1).map_or(Ok(0), |text| text.parse())?;
    let read_rate = read_rate(&rayon::ThreadPoolBuilder::new().num_threads(threads).build()?);
    let threads = Arc::new(Threads::new(threads)?);
    println!("{} threads, memory read {read_rate:.1} GB/s", threads.num_threads());
    for activations in [DType::F32, DType::Bf16] {
        for model in &MODELS {
            let cpu = CpuBackend::new(Device::Cpu, 8 << 30, activations, Arc::clone(&threads))?;
            println!("\n{} in {activations}, {}, weights in bf16", model.name, cpu.isa());
            Bench { cpu, model }.run()?;
        }
    }
    Ok(())
}

/// GB/s at which the threads read 1 GiB.
fn read_rate(pool: &ThreadPool) -> f64 {
    use rayon::prelude::*;
    let data = vec![1u64; 1 << 27];
    let pass = || {
        let start = Instant::now();
        black_box(pool.install(|| data.par_chunks(1 << 16).map(|chunk| chunk.iter().sum::<u64>()).sum::<u64>()));
        (1 << 30) as f64 / start.elapsed().as_secs_f64() / 1e9
    };
    (0..8).map(|_| pass()).fold(0.0, f64::max)
}

/// The least time of several runs. Short ones are repeated to a sample of some milliseconds where the clock is coarse.
fn least(mut run: impl FnMut() -> Outcome) -> Outcome<Duration> {
    let (begin, mut least, mut count, mut repeats) = (Instant::now(), Duration::MAX, 0, 1);
    while count < 3 || (begin.elapsed() < Duration::from_millis(600) && count < 1000) {
        let start = now();
        for _ in 0..repeats {
            run()?;
        }
        let time = now().saturating_sub(start);
        if alone() && time < Duration::from_millis(16) {
            repeats *= 2;
            continue;
        }
        least = least.min(time / repeats);
        count += 1;
    }
    Ok(least)
}

/// Whether the operations run on the calling thread alone.
fn alone() -> bool {
    std::env::args().nth(1).as_deref() == Some("1")
}

/// Time since some moment: of this thread on a core where it is alone at work and the system tells, so that other
/// programs count less; else of the clock on the wall.
fn now() -> Duration {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    let on_core = || -> Option<Duration> {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
        Some(Duration::from_nanos(text.split_whitespace().next()?.parse().ok()?))
    };
    alone().then(on_core).flatten().unwrap_or_else(|| START.elapsed())
}

struct Bench<'a> {
    cpu: CpuBackend,
    model: &'a Model,
}

impl Bench<'_> {
    fn run(&self) -> Outcome {
        let Model { hidden, inner, vit_hidden, vit_inner, .. } = *self.model;
        self.linear("vit qkv", VIT_TOKENS, vit_hidden, 3 * vit_hidden, Activation::Identity)?;
        self.linear("vit fc1 + gelu", VIT_TOKENS, vit_hidden, vit_inner, Activation::Gelu)?;
        self.linear("vit fc2", VIT_TOKENS, vit_inner, vit_hidden, Activation::Identity)?;
        self.image_attention()?;
        self.layer_norm(VIT_TOKENS, vit_hidden)?;
        self.rms_norm(PROMPT, hidden)?;
        for rows in [PROMPT, 1] {
            self.qkv(rows)?;
            self.gate_up(rows, hidden, inner)?;
            self.residual(rows, inner, hidden)?;
            self.attention(rows)?;
        }
        self.linear("lm_head", 1, hidden, 32000, Activation::Identity)?;
        self.linear("lm_head", 8, hidden, 32000, Activation::Identity)
    }

    /// The least time of `run`, unless `what` was not asked for.
    fn time(&self, what: &str, rows: usize, flops: f64, bytes: f64, run: impl FnMut() -> Outcome) -> Outcome {
        if std::env::args().nth(2).is_none_or(|part| what.contains(&part)) {
            self.report(what, rows, least(run)?, flops, bytes);
        }
        Ok(())
    }

    fn report(&self, what: &str, rows: usize, time: Duration, flops: f64, bytes: f64) {
        let seconds = time.as_secs_f64();
        print!("{what:24} {rows:5} rows {:10.3} ms", seconds * 1e3);
        if rows > 8 {
            println!(" {:8.1} GFLOP/s", flops / seconds / 1e9);
        } else {
            println!(" {:8.1} GB/s", bytes / seconds / 1e9);
        }
    }

    fn product(&self, what: &str, [rows, depth, columns]: [usize; 3], run: impl FnMut() -> Outcome) -> Outcome {
        let elements = (depth * columns) as f64;
        self.time(&format!("{what} {depth} x {columns}"), rows, 2.0 * rows as f64 * elements, 2.0 * elements, run)
    }

    fn weight(&self, shape: &[usize]) -> Outcome<CpuWeight> {
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|index| (index % 251) as f32 / 251.0 - 0.5).collect();
        Ok(self.cpu.load(&VecTensor::new("weight", DType::Bf16, shape, &values).shared())?)
    }

    fn buffer(&self, rows: usize, columns: usize) -> Outcome<CpuBuffer> {
        let mut buffer = self.cpu.alloc("buffer", self.cpu.activation_dtype(), [rows, columns])?;
        let values: Vec<f32> = (0..rows * columns).map(|index| (index % 241) as f32 / 241.0 - 0.5).collect();
        self.cpu.write(&values, &mut buffer, 0)?;
        Ok(buffer)
    }

    fn linear(&self, what: &str, rows: usize, depth: usize, columns: usize, activation: Activation) -> Outcome {
        let (weight, bias) = (self.weight(&[columns, depth])?, self.weight(&[columns])?);
        let (x, mut out) = (self.buffer(rows, depth)?, self.buffer(rows, columns)?);
        self.product(what, [rows, depth, columns], || {
            Ok(self.cpu.linear(&x, &weight, Some(&bias), activation, rows, &mut out)?)
        })
    }

    fn gate_up(&self, rows: usize, depth: usize, columns: usize) -> Outcome {
        let weights = [self.weight(&[columns, depth])?, self.weight(&[columns, depth])?];
        let [gate, up] = weights.each_ref().map(|weight| ExpertWeights { language: Some(weight), vision: None });
        let (x, mut out) = (self.buffer(rows, depth)?, self.buffer(rows, columns)?);
        self.product("gate_up", [rows, depth, 2 * columns], || {
            Ok(self.cpu.gate_up(&x, gate, up, &language(rows), &mut out)?)
        })
    }

    fn residual(&self, rows: usize, depth: usize, columns: usize) -> Outcome {
        let weight = self.weight(&[columns, depth])?;
        let weights = ExpertWeights { language: Some(&weight), vision: None };
        let (x, mut out) = (self.buffer(rows, depth)?, self.buffer(rows, columns)?);
        self.product("linear_residual", [rows, depth, columns], || {
            Ok(self.cpu.linear_residual(&x, weights, &language(rows), &mut out)?)
        })
    }

    fn heads(&self) -> HeadGeometry {
        let Model { heads, hidden, .. } = *self.model;
        HeadGeometry { num_heads: heads, num_kv_heads: heads, head_dim: hidden / heads }
    }

    fn batch(&self, rows: usize) -> Batch {
        let blocks = (0..PROMPT.div_ceil(BLOCK_LEN) as u32).collect();
        Batch {
            input_ids: vec![0; rows],
            position_ids: (0..rows as u32).collect(),
            expert_ranges: language(rows).to_vec(),
            sequences: vec![SequenceRows { rows: 0..rows, context_len: PROMPT, blocks }],
            logit_rows: vec![rows - 1],
        }
    }

    fn qkv(&self, rows: usize) -> Outcome {
        let (hidden, heads) = (self.model.hidden, self.heads());
        let weight = self.weight(&[3 * hidden, hidden])?;
        let weights = ExpertWeights { language: Some(&weight), vision: None };
        let mut tables = self.cpu.tables(&StepLimits::new(PROMPT, 1))?;
        self.cpu.set_batch(&mut tables, &self.batch(rows))?;
        let (x, mut query) = (self.buffer(rows, hidden)?, self.buffer(rows, hidden)?);
        let mut kv = self.buffer(PROMPT.div_ceil(BLOCK_LEN), 2 * BLOCK_LEN * hidden)?;
        let rope = self.cpu.alloc("rope", DType::F32, [PROMPT, heads.head_dim])?;
        self.product("qkv_rope_append", [rows, hidden, 3 * hidden], || {
            let mode = RopeMode::Float32;
            let ranges = language(rows);
            Ok(self.cpu.qkv_rope_append(&x, weights, &ranges, heads, &rope, mode, &tables, &mut query, &mut kv)?)
        })
    }

    fn attention(&self, rows: usize) -> Outcome {
        let (hidden, heads) = (self.model.hidden, self.heads());
        let mut tables = self.cpu.tables(&StepLimits::new(PROMPT, 1))?;
        self.cpu.set_batch(&mut tables, &self.batch(rows))?;
        let (query, mut out) = (self.buffer(rows, hidden)?, self.buffer(rows, hidden)?);
        let kv = self.buffer(PROMPT.div_ceil(BLOCK_LEN), 2 * BLOCK_LEN * hidden)?;
        // Of the square of scores half is seen.
        let flops = 2.0 * (rows * PROMPT * hidden) as f64;
        let bytes = (2 * PROMPT * hidden * self.cpu.activation_dtype().size_bytes()) as f64;
        self.time(&format!("attention over {PROMPT}"), rows, flops, bytes, || {
            Ok(self.cpu.attention(&query, &kv, heads, &tables, &mut out)?)
        })
    }

    fn image_attention(&self) -> Outcome {
        let Model { vit_hidden, vit_heads, .. } = *self.model;
        let heads = HeadGeometry { num_heads: vit_heads, num_kv_heads: vit_heads, head_dim: vit_hidden / vit_heads };
        let (qkv, mut out) = (self.buffer(VIT_TOKENS, 3 * vit_hidden)?, self.buffer(VIT_TOKENS, vit_hidden)?);
        let flops = 4.0 * (VIT_TOKENS * VIT_TOKENS * vit_hidden) as f64;
        self.time("image_attention", VIT_TOKENS, flops, 0.0, || {
            Ok(self.cpu.image_attention(&qkv, 1, VIT_TOKENS, heads, &mut out)?)
        })
    }

    fn layer_norm(&self, rows: usize, width: usize) -> Outcome {
        let (weight, bias) = (self.weight(&[width])?, self.weight(&[width])?);
        let (branch, mut out) = (self.buffer(rows, width)?, self.buffer(rows, width)?);
        self.time("layer_norm_residual", rows, 8.0 * (rows * width) as f64, 0.0, || {
            Ok(self.cpu.layer_norm_residual(&branch, &weight, &bias, 1e-6, rows, &mut out)?)
        })
    }

    fn rms_norm(&self, rows: usize, width: usize) -> Outcome {
        let weight = self.weight(&[width])?;
        let (x, mut out) = (self.buffer(rows, width)?, self.buffer(rows, width)?);
        self.time("rms_norm", rows, 4.0 * (rows * width) as f64, 0.0, || {
            Ok(self.cpu.rms_norm(&x, &weight, 1e-5, rows, &mut out)?)
        })
    }
}

/// All rows by the language expert.
fn language(rows: usize) -> [ExpertRange; 1] {
    [ExpertRange { rows: 0..rows, expert: Expert::Language }]
}
