//! Times of single operations at a model's sizes: the table of `bench --kernels`.

use cogvlm_backend::{Activation, Backend, BackendError, Batch, ExpertWeights, HeadGeometry, RopeMode, SequenceRows};
use cogvlm_core::tokens::ExpertRange;
use cogvlm_core::workspace::{BLOCK_LEN, StepLimits};
use cogvlm_core::{DType, Device, Expert, ModelSpec};

use crate::backend::{CudaBackend, KernelPath};
use crate::buffer::CudaBuffer;
use crate::ceiling::median_seconds;
use crate::cublas::CublasLt;
use crate::tables::CudaTables;
use crate::weight::CudaWeight;

/// The time of one operation.
#[derive(Debug, Clone)]
pub struct KernelTiming {
    /// The operation and its sizes.
    pub name: String,
    /// Median seconds of one call among many on end.
    pub seconds: f64,
    /// Operations that it does.
    pub flops: f64,
    /// Bytes that it reads and writes at least.
    pub bytes: f64,
    /// Seconds of cuBLASLt for the plain products in it, where it is installed.
    pub library_seconds: Option<f64>,
}

/// Tokens that the timed sequences may have.
pub const CONTEXT_LEN: usize = 2048;
/// Tokens that a timed decode step finds after its prompt.
pub const NUM_DECODED: usize = 32;
/// Calls that are timed together, on end.
const CALLS: usize = 10;
/// Copies of a weight that calls take in turn, so that none finds it in the cache.
const WEIGHT_COPIES: usize = 2;

/// `rows` x `columns` random numbers of about ±1.
pub(crate) fn random_buffer(cuda: &CudaBackend, rows: usize, columns: usize) -> Result<CudaBuffer, BackendError> {
    let mut buffer = cuda.alloc("measuring", cuda.activations, [rows, columns])?;
    // A pattern whose length has no factor in common with rows is repeated: it differs in every row.
    let mut state = 0x9E37_79B9_7F4A_7C15_u64 ^ columns as u64;
    let pattern: Vec<f32> = (0..65_537)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect();
    let rows_at_once = (4_000_000 / columns.max(1)).clamp(1, rows.max(1));
    let mut first = 0;
    while first < rows {
        let count = rows_at_once.min(rows - first);
        let values: Vec<f32> =
            (0..count * columns).map(|index| pattern[(first * columns + index) % pattern.len()]).collect();
        cuda.write(&values, &mut buffer, first)?;
        first += count;
    }
    Ok(buffer)
}

/// A weight of random numbers.
pub(crate) fn random_weight(cuda: &CudaBackend, shape: &[usize]) -> Result<CudaWeight, BackendError> {
    let (rows, columns) = match shape {
        [width] => (1, *width),
        _ => (shape[0], shape[1..].iter().product()),
    };
    let values = random_buffer(cuda, rows, columns)?;
    let loaded = cuda.moment()?;
    Ok(CudaWeight::resident(cuda.activations, shape.to_vec(), values.into_memory()?, loaded))
}

struct Bench<'a> {
    cuda: &'a CudaBackend,
    library: Option<CublasLt>,
    table: Vec<KernelTiming>,
}

/// Times the operations of `spec` on GPU `ordinal`: a prefill of one image and `num_text` tokens, the vision tower, and
/// decode steps of several sizes at a context of that prompt. Gives the path that ran, `path` or a plainer one, too. Takes
/// about 4 GiB of the device for some seconds.
///
/// # Errors
/// Where the device cannot be opened, has too little memory, or an operation fails.
pub fn kernel_table(
    spec: &ModelSpec, num_text: usize, ordinal: u32, path: KernelPath,
) -> Result<(KernelPath, Vec<KernelTiming>), BackendError> {
    let cuda = CudaBackend::new(Device::Gpu(ordinal), ordinal, 4 << 30, DType::Bf16)?.with_path(path);
    let library = CublasLt::open(&cuda.gpu);
    let mut bench = Bench { cuda: &cuda, library, table: Vec::new() };
    bench.vision(spec)?;
    bench.prefill(spec, num_text)?;
    for rows in [1, 2, 4, 8, 16] {
        bench.decode(spec, num_text, rows)?;
    }
    Ok((cuda.path, bench.table))
}

impl Bench<'_> {
    fn time(
        &mut self, name: String, flops: f64, bytes: f64, library_seconds: Option<f64>,
        mut run: impl FnMut(&CudaBackend, usize) -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        let cuda = self.cuda;
        let seconds = median_seconds(&cuda.gpu, || (0..CALLS).try_for_each(|call| run(cuda, call % WEIGHT_COPIES)))?;
        let seconds = seconds / CALLS as f64;
        self.table.push(KernelTiming { name, seconds, flops, bytes, library_seconds });
        Ok(())
    }

    /// Time of cuBLASLt for `out[m, n] = x[m, k] w[n, k]ᵀ`, its weights from memory too.
    fn library_seconds(&self, m: usize, n: usize, k: usize) -> Option<f64> {
        let plan = self.library.as_ref()?.plan(m, n, k)?;
        let gpu = &self.cuda.gpu;
        let x = random_buffer(self.cuda, m, k).ok()?;
        let weights = self.weights(&[n, k]).ok()?;
        let out = random_buffer(self.cuda, m, n).ok()?;
        let seconds = median_seconds(gpu, || {
            (0..CALLS).try_for_each(|call| {
                let weight = weights[call % WEIGHT_COPIES].address("bench", "weight")?;
                // SAFETY: the matrices have the plan's sizes.
                unsafe { plan.run(x.address(), weight, out.address(), gpu.stream) }
            })
        });
        seconds.ok().map(|seconds| seconds / CALLS as f64)
    }

    fn weights(&self, shape: &[usize]) -> Result<Vec<CudaWeight>, BackendError> {
        (0..WEIGHT_COPIES).map(|_| random_weight(self.cuda, shape)).collect()
    }

    fn vision(&mut self, spec: &ModelSpec) -> Result<(), BackendError> {
        let vision = &spec.vision;
        let (rows, width, inner) = (vision.num_tokens(), vision.hidden_size, vision.intermediate_size);
        let products = [
            ("vit qkv", 3 * width, width, Activation::Identity),
            ("vit dense", width, width, Activation::Identity),
            ("vit fc1 + gelu", inner, width, Activation::Gelu),
            ("vit fc2", width, inner, Activation::Identity),
        ];
        for (name, out_features, in_features, activation) in products {
            self.linear(name, [rows, in_features, out_features], activation)?;
        }
        let qkv = random_buffer(self.cuda, rows, 3 * width)?;
        let mut out = random_buffer(self.cuda, rows, width)?;
        let heads =
            HeadGeometry { num_heads: vision.num_heads, num_kv_heads: vision.num_heads, head_dim: vision.head_dim };
        let flops = 4.0 * (rows * rows * width) as f64;
        self.time(format!("vit attention {rows}"), flops, (rows * width * 8) as f64, None, |cuda, _| {
            cuda.image_attention(&qkv, 1, rows, heads, &mut out)
        })?;
        let branch = random_buffer(self.cuda, rows, width)?;
        let (weight, bias) = (random_weight(self.cuda, &[width])?, random_weight(self.cuda, &[width])?);
        self.time(format!("vit layer norm {rows} x {width}"), 0.0, (rows * width * 6) as f64, None, |cuda, _| {
            cuda.layer_norm_residual(&branch, &weight, &bias, vision.layer_norm_eps, rows, &mut out)
        })?;
        self.linear("adapter linear", [vision.num_patches(), width, spec.hidden_size], Activation::Identity)
    }

    fn linear(
        &mut self, name: &str, [rows, in_features, out_features]: [usize; 3], activation: Activation,
    ) -> Result<(), BackendError> {
        let library = self.library_seconds(rows, out_features, in_features);
        let x = random_buffer(self.cuda, rows, in_features)?;
        let weights = self.weights(&[out_features, in_features])?;
        let mut out = random_buffer(self.cuda, rows, out_features)?;
        let flops = 2.0 * (rows * in_features * out_features) as f64;
        let bytes = 2.0 * (rows * in_features + in_features * out_features + rows * out_features) as f64;
        self.time(format!("{name} {rows} x {in_features} -> {out_features}"), flops, bytes, library, |cuda, copy| {
            cuda.linear(&x, &weights[copy], None, activation, rows, &mut out)
        })
    }

    fn prefill(&mut self, spec: &ModelSpec, num_text: usize) -> Result<(), BackendError> {
        let num_vision = spec.num_vision_tokens() - 1;
        let rows = num_vision + 2 + num_text;
        let vision = 1..1 + num_vision;
        let ranges = [
            ExpertRange { rows: 0..1, expert: Expert::Language },
            ExpertRange { rows: vision.clone(), expert: Expert::Vision },
            ExpertRange { rows: vision.end..rows, expert: Expert::Language },
        ];
        let batch = Batch {
            input_ids: vec![1; rows],
            position_ids: (0..rows as u32).collect(),
            expert_ranges: ranges.to_vec(),
            sequences: vec![SequenceRows {
                rows: 0..rows,
                context_len: rows,
                blocks: (0..rows.div_ceil(BLOCK_LEN) as u32).collect(),
            }],
            logit_rows: vec![rows - 1],
        };
        self.decoder("prefill", spec, &batch, num_vision)
    }

    fn decode(&mut self, spec: &ModelSpec, num_text: usize, rows: usize) -> Result<(), BackendError> {
        let context_len = spec.num_vision_tokens() + 1 + num_text + NUM_DECODED;
        let blocks = context_len.div_ceil(BLOCK_LEN);
        let batch = Batch {
            input_ids: vec![1; rows],
            position_ids: vec![context_len as u32 - 1; rows],
            expert_ranges: vec![ExpertRange { rows: 0..rows, expert: Expert::Language }],
            sequences: (0..rows)
                .map(|row| SequenceRows {
                    rows: row..row + 1,
                    context_len,
                    blocks: (row * blocks..(row + 1) * blocks).map(|block| block as u32).collect(),
                })
                .collect(),
            logit_rows: (0..rows).collect(),
        };
        self.decoder(&format!("decode {rows}"), spec, &batch, 0)
    }

    /// The operations of one decoder layer, and the head, on `batch`, of whose rows `num_vision` are the vision expert's.
    fn decoder(&mut self, phase: &str, spec: &ModelSpec, batch: &Batch, num_vision: usize) -> Result<(), BackendError> {
        let cuda = self.cuda;
        let (rows, width, inner) = (batch.num_rows(), spec.hidden_size, spec.intermediate_size);
        let heads =
            HeadGeometry { num_heads: spec.num_heads, num_kv_heads: spec.num_kv_heads, head_dim: spec.head_dim };
        let kv_width = spec.kv_elements_per_token();
        let num_blocks: usize = batch.sequences.iter().map(|sequence| sequence.blocks.len()).sum();
        let context_len = batch.sequences.iter().map(|sequence| sequence.context_len).max().unwrap_or(0);
        let limits = StepLimits {
            max_tokens: rows.max(context_len),
            max_sequences: rows,
            max_images: 1,
            parcels: 0,
            context_len: CONTEXT_LEN,
        };
        let mut tables: CudaTables = cuda.tables(&limits)?;
        cuda.set_batch(&mut tables, batch)?;
        let num_experts = if num_vision > 0 { 2 } else { 1 };
        let ranges = &batch.expert_ranges;
        let mut hidden = random_buffer(cuda, rows, width)?;
        let mut normed = random_buffer(cuda, rows, width)?;
        let mut query = random_buffer(cuda, rows, spec.num_heads * spec.head_dim)?;
        let mut mlp = random_buffer(cuda, rows, inner)?;
        let mut kv = random_buffer(cuda, num_blocks, BLOCK_LEN * kv_width)?;
        let mut rope = cuda.alloc("measuring", DType::F32, [CONTEXT_LEN, spec.head_dim])?;
        cuda.write(&vec![0.5; spec.head_dim], &mut rope, 0)?;
        let norm = random_weight(cuda, &[width])?;

        self.time(format!("{phase}: rms norm"), 0.0, (rows * width * 4) as f64, None, |cuda, _| {
            cuda.rms_norm(&hidden, &norm, 1e-5, rows, &mut normed)
        })?;
        let counted = |out_features: usize, in_features: usize| {
            let flops = 2.0 * (rows * in_features * out_features) as f64;
            let bytes = 2.0 * (num_experts * in_features * out_features + rows * (in_features + out_features)) as f64;
            (flops, bytes)
        };
        // cuBLASLt: one product for each expert.
        let library = |bench: &Self, out_features: usize, in_features: usize| {
            let language = bench.library_seconds(rows - num_vision, out_features, in_features)?;
            let vision =
                if num_vision > 0 { bench.library_seconds(num_vision, out_features, in_features)? } else { 0.0 };
            Some(language + vision)
        };
        {
            let out = spec.num_heads * spec.head_dim + kv_width;
            let (flops, bytes) = counted(out, width);
            let seconds = library(self, out, width);
            let [language, vision] = [self.weights(&[out, width])?, self.weights(&[out, width])?];
            self.time(format!("{phase}: qkv + rope"), flops, bytes, seconds, |cuda, copy| {
                let weights = ExpertWeights { language: Some(&language[copy]), vision: Some(&vision[copy]) };
                let mode = RopeMode::Float32;
                cuda.qkv_rope_append(&normed, weights, ranges, heads, &rope, mode, &tables, &mut query, &mut kv)
            })?;
        }
        let pairs: f64 = batch
            .sequences
            .iter()
            .map(|sequence| {
                let (first, last) = (sequence.first_token() + 1, sequence.context_len);
                sequence.rows.len() as f64 * (first + last) as f64 / 2.0
            })
            .sum();
        let keys: usize = batch.sequences.iter().map(|sequence| sequence.context_len).sum();
        let flops = 4.0 * pairs * (spec.num_heads * spec.head_dim) as f64;
        self.time(format!("{phase}: attention"), flops, (keys * kv_width * 2) as f64, None, |cuda, _| {
            cuda.attention(&query, &kv, heads, &tables, &mut normed)
        })?;
        for (name, out, depth) in [("dense + residual", width, width), ("down + residual", width, inner)] {
            let (flops, bytes) = counted(out, depth);
            let seconds = library(self, out, depth);
            let [language, vision] = [self.weights(&[out, depth])?, self.weights(&[out, depth])?];
            let x = random_buffer(cuda, rows, depth)?;
            self.time(format!("{phase}: {name}"), flops, bytes, seconds, |cuda, copy| {
                let weights = ExpertWeights { language: Some(&language[copy]), vision: Some(&vision[copy]) };
                cuda.linear_residual(&x, weights, ranges, &mut hidden)
            })?;
        }
        {
            let (flops, bytes) = counted(2 * inner, width);
            let seconds = library(self, 2 * inner, width);
            let weights = || self.weights(&[inner, width]);
            let [gates, ups, vision_gates, vision_ups] = [weights()?, weights()?, weights()?, weights()?];
            self.time(format!("{phase}: gate up"), flops, bytes, seconds, |cuda, copy| {
                let gate = ExpertWeights { language: Some(&gates[copy]), vision: Some(&vision_gates[copy]) };
                let up = ExpertWeights { language: Some(&ups[copy]), vision: Some(&vision_ups[copy]) };
                cuda.gate_up(&normed, gate, up, ranges, &mut mlp)
            })?;
        }
        let wanted = batch.logit_rows.len();
        let (flops, bytes) = (2.0 * (wanted * width * spec.vocab_size) as f64, 2.0 * (width * spec.vocab_size) as f64);
        let head = self.weights(&[spec.vocab_size, width])?;
        let mut logits = cuda.alloc("measuring", DType::F32, [wanted, spec.vocab_size])?;
        self.time(format!("{phase}: logits"), flops, bytes, None, |cuda, copy| {
            cuda.logits(&normed, &head[copy], wanted, &mut logits)
        })
    }
}
