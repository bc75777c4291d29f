//! The least that a backend can be: values in vectors, the oracle for arithmetic, every argument checked. It shows how
//! to implement the trait, and that a right backend passes the suite.

use std::ops::Range;
use std::sync::Arc;

use cogvlm_backend::{
    Activation, Arena, Backend, BackendError, Batch, ExpertWeights, HeadGeometry, HostTensor, HostWeight, Lease,
    MemoryUse, PatchGeometry, PatchWeights, RopeMode, SampleRequest, StagedSource, oracle, sampling,
};
use cogvlm_core::tokens::ExpertRange;
use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{DType, Device, Expert};
use half::{bf16, f16};

type Result<T> = std::result::Result<T, BackendError>;

/// A device in host memory.
pub(crate) struct PlainBackend {
    dtype: DType,
    arena: Arena,
}

/// A matrix.
pub(crate) struct PlainBuffer {
    pub(crate) dtype: DType,
    pub(crate) shape: [usize; 2],
    pub(crate) values: Vec<f32>,
    _lease: Lease,
}

/// A weight; clones share it.
#[derive(Clone)]
pub(crate) struct PlainWeight(Arc<Tensor>);

struct Tensor {
    shape: Vec<usize>,
    values: Vec<f32>,
    /// In the type that it is stored in.
    num_bytes: usize,
    /// Its share of the arena, where it was loaded.
    _lease: Option<Lease>,
}

/// The batch itself, and the limits it keeps to.
pub(crate) struct PlainTables {
    pub(crate) limits: StepLimits,
    pub(crate) batch: Batch,
}

/// Weights per slot.
pub(crate) struct PlainRing {
    slot_bytes: usize,
    slots: Vec<Vec<PlainWeight>>,
    _lease: Lease,
}

/// Rows.
pub(crate) struct PlainParcel {
    pub(crate) width: usize,
    pub(crate) values: Vec<f32>,
}

impl PlainBackend {
    pub(crate) fn new(dtype: DType, capacity: u64) -> Self {
        Self { dtype, arena: Arena::new(Device::Cpu, capacity) }
    }

    fn weight(&self, tensor: &dyn HostTensor, lease: Option<Lease>) -> Result<PlainWeight> {
        let (size, num_bytes) = (tensor.dtype().size_bytes(), num_bytes(tensor));
        let mut bytes = vec![0; num_bytes];
        tensor.read_into(&mut bytes)?;
        let value = |bytes: &[u8]| match (tensor.dtype(), bytes) {
            (DType::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
            (DType::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
            (DType::Bf16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
            _ => unreachable!("chunks have the size of an element"),
        };
        let values = bytes.chunks_exact(size).map(value).collect();
        Ok(PlainWeight(Arc::new(Tensor { shape: tensor.shape().to_vec(), values, num_bytes, _lease: lease })))
    }
}

impl PlainBuffer {
    fn rows(&self) -> usize {
        self.shape[0]
    }

    fn width(&self) -> usize {
        self.shape[1]
    }

    fn first(&self, rows: usize) -> &[f32] {
        &self.values[..rows * self.width()]
    }

    /// The given rows.
    fn slice(&self, op: &'static str, rows: Range<usize>) -> Result<&[f32]> {
        if rows.start > rows.end || rows.end > self.rows() {
            return Err(shape(op, "rows", &[rows.start, rows.end], format!("a range in 0..{}", self.rows())));
        }
        Ok(&self.values[rows.start * self.width()..rows.end * self.width()])
    }

    /// Writes whole rows, rounded to the buffer's type.
    fn put(&mut self, op: &'static str, first_row: usize, values: &[f32]) -> Result<()> {
        let width = self.width();
        let fits = values.len().is_multiple_of(width)
            && first_row <= self.rows()
            && values.len() / width <= self.rows() - first_row;
        if !fits {
            let expected = format!("rows of {width} that end before row {}", self.rows());
            return Err(shape(op, "values", &[first_row, values.len()], expected));
        }
        let round = |&value: &f32| oracle::round_to(self.dtype, f64::from(value));
        let values: Vec<f32> = values.iter().map(round).collect();
        self.values[first_row * width..][..values.len()].copy_from_slice(&values);
        Ok(())
    }

    fn expect(&self, op: &'static str, argument: &'static str, rows: usize, width: usize) -> Result<()> {
        if self.rows() < rows || self.width() != width {
            return Err(shape(op, argument, &self.shape, format!("at least {rows} rows of {width}")));
        }
        Ok(())
    }
}

impl PlainWeight {
    pub(crate) fn new(shape: &[usize], values: Vec<f32>) -> Self {
        Self(Arc::new(Tensor { shape: shape.to_vec(), values, num_bytes: 0, _lease: None }))
    }

    pub(crate) fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    pub(crate) fn values(&self) -> &Vec<f32> {
        &self.0.values
    }

    fn expect(&self, op: &'static str, argument: &'static str, expected: &[usize]) -> Result<()> {
        if self.shape() != expected {
            return Err(shape(op, argument, self.shape(), format!("{expected:?}")));
        }
        Ok(())
    }

    /// `[out_features, in_features]`
    fn matrix(&self, op: &'static str) -> Result<[usize; 2]> {
        <[usize; 2]>::try_from(self.shape()).map_err(|_| shape(op, "weight", self.shape(), "two dimensions".to_owned()))
    }
}

fn num_bytes(tensor: &dyn HostTensor) -> usize {
    tensor.shape().iter().product::<usize>() * tensor.dtype().size_bytes()
}

fn shape(op: &'static str, argument: &'static str, found: &[usize], expected: String) -> BackendError {
    BackendError::Shape { op, argument, found: found.to_vec(), expected }
}

fn unsupported(op: &'static str, reason: &str) -> BackendError {
    BackendError::Unsupported { op, reason: reason.to_owned() }
}

fn values<'a>(weights: ExpertWeights<'a, PlainWeight>) -> ExpertWeights<'a, Vec<f32>> {
    let values = |weight: &'a PlainWeight| weight.values();
    ExpertWeights { language: weights.language.map(values), vision: weights.vision.map(values) }
}

/// Checks that every expert with rows has a weight `[out_features, in_features]`, and gives the number of rows.
fn expect_experts(
    op: &'static str, weights: ExpertWeights<'_, PlainWeight>, ranges: &[ExpertRange], expected: [usize; 2],
) -> Result<usize> {
    let mut end = 0;
    for range in ranges {
        if range.rows.start != end || range.rows.end < end {
            return Err(shape(op, "ranges", &[range.rows.start, range.rows.end], format!("a run from row {end} on")));
        }
        end = range.rows.end;
        let weight = match range.expert {
            Expert::Language => weights.language,
            Expert::Vision => weights.vision,
        };
        weight
            .ok_or_else(|| unsupported(op, "an expert that has rows has no weight"))?
            .expect(op, "weights", &expected)?;
    }
    Ok(end)
}

fn expect_even_heads(op: &'static str, heads: HeadGeometry) -> Result<()> {
    if heads.num_kv_heads == 0 || !heads.num_heads.is_multiple_of(heads.num_kv_heads) {
        return Err(shape(
            op,
            "heads",
            &[heads.num_heads, heads.num_kv_heads],
            "query heads in even groups".to_owned(),
        ));
    }
    Ok(())
}

/// Checks a paged cache and that the batch's blocks are in it.
fn expect_cache(op: &'static str, kv: &PlainBuffer, heads: HeadGeometry, batch: &Batch) -> Result<()> {
    let last = batch.sequences.iter().flat_map(|sequence| &sequence.blocks).max();
    kv.expect(op, "kv", last.map_or(0, |&block| block as usize + 1), oracle::kv_row_len(heads))
}

impl Backend for PlainBackend {
    type Buffer = PlainBuffer;
    type Weight = PlainWeight;
    type Tables = PlainTables;
    type Ring = PlainRing;
    type Parcel = PlainParcel;
    type Outbox = Lease;
    type Moment = std::time::Instant;
    type Sampled = Vec<u32>;

    fn moment(&self) -> Result<Self::Moment> {
        Ok(std::time::Instant::now())
    }

    fn has_come(&self, _moment: &Self::Moment) -> Result<bool> {
        Ok(true)
    }

    fn elapsed(&self, from: &Self::Moment, to: &Self::Moment) -> Result<std::time::Duration> {
        Ok(to.duration_since(*from))
    }

    fn activation_dtype(&self) -> DType {
        self.dtype
    }

    fn memory(&self) -> MemoryUse {
        self.arena.memory()
    }

    fn alloc(&self, what: &'static str, dtype: DType, shape: [usize; 2]) -> Result<PlainBuffer> {
        let len = shape[0].saturating_mul(shape[1]);
        let lease = self.arena.lease(what, len.saturating_mul(dtype.size_bytes()) as u64)?;
        Ok(PlainBuffer { dtype, shape, values: vec![0.0; len], _lease: lease })
    }

    fn load(&self, weight: &HostWeight) -> Result<PlainWeight> {
        let lease = self.arena.lease(&format!("weight `{}`", weight.name()), num_bytes(&**weight) as u64)?;
        self.weight(&**weight, Some(lease))
    }

    fn attach(&self, weight: &HostWeight) -> Result<PlainWeight> {
        self.weight(&**weight, None)
    }

    fn staging(&self, num_slots: usize, slot_bytes: usize) -> Result<PlainRing> {
        let lease = self.arena.lease("staging ring", num_slots.saturating_mul(slot_bytes) as u64)?;
        Ok(PlainRing { slot_bytes, slots: vec![Vec::new(); num_slots], _lease: lease })
    }

    fn stage(&self, ring: &mut PlainRing, slot: usize, sources: Vec<StagedSource<PlainWeight>>) -> Result<()> {
        let bytes = |source: &StagedSource<PlainWeight>| match source {
            StagedSource::Host(weight) => num_bytes(&**weight),
            StagedSource::Peer(weight) => weight.0.num_bytes,
        };
        let group_bytes: usize = sources.iter().map(bytes).sum();
        if slot >= ring.slots.len() || group_bytes > ring.slot_bytes {
            let expected = format!("a slot below {} and at most {} bytes", ring.slots.len(), ring.slot_bytes);
            return Err(shape("stage", "sources", &[slot, group_bytes], expected));
        }
        let weight = |source| match source {
            StagedSource::Host(weight) => self.weight(&*weight, None),
            StagedSource::Peer(weight) => Ok(weight),
        };
        ring.slots[slot] = sources.into_iter().map(weight).collect::<Result<_>>()?;
        Ok(())
    }

    fn staged(&self, ring: &mut PlainRing, slot: usize) -> Result<Vec<PlainWeight>> {
        let num_slots = ring.slots.len();
        let weights = ring.slots.get(slot).cloned();
        weights.ok_or_else(|| shape("staged", "slot", &[slot], format!("below {num_slots}")))
    }

    fn write(&self, values: &[f32], buffer: &mut PlainBuffer, first_row: usize) -> Result<()> {
        buffer.put("write", first_row, values)
    }

    fn read(&self, buffer: &PlainBuffer, rows: Range<usize>) -> Result<Vec<f32>> {
        Ok(buffer.slice("read", rows)?.to_vec())
    }

    fn outbox(&self, bytes: usize) -> Result<Lease> {
        self.arena.lease("outbox", bytes as u64)
    }

    fn send(&self, _outbox: &Lease, buffer: &PlainBuffer, rows: Range<usize>) -> Result<PlainParcel> {
        Ok(PlainParcel { width: buffer.width(), values: buffer.slice("send", rows)?.to_vec() })
    }

    fn receive(&self, parcel: PlainParcel, buffer: &mut PlainBuffer, first_row: usize) -> Result<()> {
        buffer.expect("receive", "buffer", 0, parcel.width)?;
        buffer.put("receive", first_row, &parcel.values)
    }

    fn copy_rows(
        &self, source: &PlainBuffer, rows: Range<usize>, destination: &mut PlainBuffer, first_row: usize,
    ) -> Result<()> {
        destination.expect("copy_rows", "destination", 0, source.width())?;
        if source.dtype != destination.dtype {
            return Err(unsupported("copy_rows", "the buffers differ in type"));
        }
        destination.put("copy_rows", first_row, source.slice("copy_rows", rows)?)
    }

    fn tables(&self, limits: &StepLimits) -> Result<PlainTables> {
        Ok(PlainTables { limits: *limits, batch: Batch::default() })
    }

    fn set_batch(&self, tables: &mut PlainTables, batch: &Batch) -> Result<()> {
        const OP: &str = "set_batch";
        let (num_rows, limits) = (batch.num_rows(), tables.limits);
        if num_rows > limits.max_tokens || batch.position_ids.len() != num_rows {
            let found = [num_rows, batch.position_ids.len()];
            return Err(shape(OP, "position_ids", &found, format!("one of each row, {} at most", limits.max_tokens)));
        }
        if batch.sequences.len() > limits.max_sequences {
            return Err(shape(OP, "sequences", &[batch.sequences.len()], format!("at most {}", limits.max_sequences)));
        }
        let mut end = 0;
        for sequence in &batch.sequences {
            let rows = sequence.rows.clone();
            let fits = rows.start == end && rows.end >= end && rows.end <= num_rows;
            if !fits || sequence.context_len < rows.len() || sequence.context_len > limits.context_len {
                let found = [rows.start, rows.end, sequence.context_len];
                return Err(shape(OP, "sequences", &found, format!("rows from {end}, context {}", limits.context_len)));
            }
            if sequence.context_len > 0 && sequence.slot(sequence.context_len - 1).is_none() {
                return Err(shape(OP, "blocks", &[sequence.blocks.len()], format!("{} tokens", sequence.context_len)));
            }
            end = rows.end;
        }
        if end != num_rows {
            return Err(shape(OP, "sequences", &[end], format!("{num_rows} rows")));
        }
        if let Some(&row) = batch.logit_rows.iter().find(|&&row| row >= num_rows) {
            return Err(shape(OP, "logit_rows", &[row], format!("below {num_rows}")));
        }
        tables.batch = batch.clone();
        Ok(())
    }

    fn embed(&self, table: &PlainWeight, ids: &[u32], hidden: &mut PlainBuffer) -> Result<()> {
        let [vocab_size, width] = table.matrix("embed")?;
        hidden.expect("embed", "hidden", ids.len(), width)?;
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(unsupported("embed", &format!("id {id} is beyond the vocabulary of {vocab_size}")));
        }
        let rows: Vec<f32> =
            ids.iter().flat_map(|&id| &table.values()[id as usize * width..][..width]).copied().collect();
        hidden.put("embed", 0, &rows)
    }

    fn rms_norm(
        &self, x: &PlainBuffer, weight: &PlainWeight, eps: f32, rows: usize, out: &mut PlainBuffer,
    ) -> Result<()> {
        weight.expect("rms_norm", "weight", &[x.width()])?;
        x.expect("rms_norm", "x", rows, x.width())?;
        out.expect("rms_norm", "out", rows, x.width())?;
        out.put("rms_norm", 0, &oracle::rms_norm(x.first(rows), weight.values(), eps, self.dtype))
    }

    fn rms_norm_logit_rows(
        &self, x: &PlainBuffer, weight: &PlainWeight, eps: f32, tables: &PlainTables, out: &mut PlainBuffer,
    ) -> Result<()> {
        const OP: &str = "rms_norm_logit_rows";
        let rows = &tables.batch.logit_rows;
        weight.expect(OP, "weight", &[x.width()])?;
        x.expect(OP, "x", rows.iter().max().map_or(0, |row| row + 1), x.width())?;
        out.expect(OP, "out", rows.len(), x.width())?;
        let gathered: Vec<f32> =
            rows.iter().flat_map(|row| &x.values[row * x.width()..][..x.width()]).copied().collect();
        out.put(OP, 0, &oracle::rms_norm(&gathered, weight.values(), eps, self.dtype))
    }

    fn qkv_rope_append(
        &self, x: &PlainBuffer, weights: ExpertWeights<'_, PlainWeight>, ranges: &[ExpertRange], heads: HeadGeometry,
        rope: &PlainBuffer, mode: RopeMode, tables: &PlainTables, query: &mut PlainBuffer, kv: &mut PlainBuffer,
    ) -> Result<()> {
        const OP: &str = "qkv_rope_append";
        let (batch, HeadGeometry { num_heads, num_kv_heads, head_dim }) = (&tables.batch, heads);
        let rows = expect_experts(OP, weights, ranges, [(num_heads + 2 * num_kv_heads) * head_dim, x.width()])?;
        if rows != batch.num_rows() {
            return Err(shape(OP, "ranges", &[rows], format!("the {} rows of the batch", batch.num_rows())));
        }
        expect_even_heads(OP, heads)?;
        x.expect(OP, "x", rows, x.width())?;
        query.expect(OP, "query", rows, num_heads * head_dim)?;
        rope.expect(
            OP,
            "rope",
            batch.position_ids.iter().max().map_or(0, |&position| position as usize + 1),
            head_dim,
        )?;
        expect_cache(OP, kv, heads, batch)?;
        let queries = oracle::qkv_rope_append(
            x.first(rows),
            values(weights),
            ranges,
            x.width(),
            heads,
            &rope.values,
            mode,
            batch,
            &mut kv.values,
            self.dtype,
        );
        query.put(OP, 0, &queries)
    }

    fn attention(
        &self, query: &PlainBuffer, kv: &PlainBuffer, heads: HeadGeometry, tables: &PlainTables, out: &mut PlainBuffer,
    ) -> Result<()> {
        let (batch, width) = (&tables.batch, heads.num_heads * heads.head_dim);
        expect_even_heads("attention", heads)?;
        query.expect("attention", "query", batch.num_rows(), width)?;
        out.expect("attention", "out", batch.num_rows(), width)?;
        expect_cache("attention", kv, heads, batch)?;
        let rows = oracle::attention(&query.values, &kv.values, heads, &batch.sequences, self.dtype);
        out.put("attention", 0, &rows)
    }

    fn linear_residual(
        &self, x: &PlainBuffer, weights: ExpertWeights<'_, PlainWeight>, ranges: &[ExpertRange],
        residual: &mut PlainBuffer,
    ) -> Result<()> {
        const OP: &str = "linear_residual";
        let rows = expect_experts(OP, weights, ranges, [residual.width(), x.width()])?;
        x.expect(OP, "x", rows, x.width())?;
        residual.expect(OP, "residual", rows, residual.width())?;
        let sums =
            oracle::linear_residual(&x.values, values(weights), ranges, x.width(), residual.first(rows), self.dtype);
        residual.put(OP, 0, &sums)
    }

    fn gate_up(
        &self, x: &PlainBuffer, gate: ExpertWeights<'_, PlainWeight>, up: ExpertWeights<'_, PlainWeight>,
        ranges: &[ExpertRange], out: &mut PlainBuffer,
    ) -> Result<()> {
        const OP: &str = "gate_up";
        let rows = expect_experts(OP, gate, ranges, [out.width(), x.width()])?;
        expect_experts(OP, up, ranges, [out.width(), x.width()])?;
        x.expect(OP, "x", rows, x.width())?;
        out.expect(OP, "out", rows, out.width())?;
        out.put(OP, 0, &oracle::gate_up(&x.values, values(gate), values(up), ranges, x.width(), self.dtype))
    }

    fn logits(&self, x: &PlainBuffer, weight: &PlainWeight, rows: usize, logits: &mut PlainBuffer) -> Result<()> {
        self.linear(x, weight, None, Activation::Identity, rows, logits)
    }

    fn sample(&self, logits: &PlainBuffer, requests: &[SampleRequest<'_>]) -> Result<Vec<u32>> {
        logits.expect("sample", "logits", requests.len(), logits.width())?;
        let rows = logits.values.chunks_exact(logits.width());
        Ok(rows.zip(requests).map(|(row, request)| sampling::sample(row, request)).collect())
    }

    fn sampled(&self, tokens: &Vec<u32>) -> Result<Vec<u32>> {
        Ok(tokens.clone())
    }

    fn patch_embed(
        &self, pixels: &PlainBuffer, weights: PatchWeights<'_, PlainWeight>, geometry: PatchGeometry,
        out: &mut PlainBuffer,
    ) -> Result<()> {
        const OP: &str = "patch_embed";
        let PatchGeometry { num_images, num_channels, image_size, patch_size } = geometry;
        if patch_size == 0 || !image_size.is_multiple_of(patch_size) {
            return Err(shape(OP, "geometry", &[image_size, patch_size], "patches that fill the image".to_owned()));
        }
        let (tokens, width) = ((image_size / patch_size).pow(2) + 1, out.width());
        pixels.expect(OP, "pixels", num_images, num_channels * image_size * image_size)?;
        out.expect(OP, "out", num_images * tokens, width)?;
        weights.projection.expect(OP, "projection", &[width, num_channels, patch_size, patch_size])?;
        weights.bias.expect(OP, "bias", &[width])?;
        weights.class.expect(OP, "class", &[1, width])?;
        weights.position.expect(OP, "position", &[tokens, width])?;
        let weights = PatchWeights {
            projection: weights.projection.values(),
            bias: weights.bias.values(),
            class: weights.class.values(),
            position: weights.position.values(),
        };
        out.put(OP, 0, &oracle::patch_embed(&pixels.values, weights, geometry, self.dtype))
    }

    fn linear(
        &self, x: &PlainBuffer, weight: &PlainWeight, bias: Option<&PlainWeight>, activation: Activation, rows: usize,
        out: &mut PlainBuffer,
    ) -> Result<()> {
        let [out_features, in_features] = weight.matrix("linear")?;
        x.expect("linear", "x", rows, in_features)?;
        out.expect("linear", "out", rows, out_features)?;
        if let Some(bias) = bias {
            bias.expect("linear", "bias", &[out_features])?;
        }
        let bias = bias.map(|bias| &bias.values()[..]);
        let rows = oracle::linear(x.first(rows), weight.values(), bias, in_features, activation, self.dtype);
        out.put("linear", 0, &rows)
    }

    fn image_attention(
        &self, qkv: &PlainBuffer, num_images: usize, num_tokens: usize, heads: HeadGeometry, out: &mut PlainBuffer,
    ) -> Result<()> {
        const OP: &str = "image_attention";
        if heads.num_heads != heads.num_kv_heads {
            return Err(shape(OP, "heads", &[heads.num_heads, heads.num_kv_heads], "as many of both".to_owned()));
        }
        let (rows, width) = (num_images.saturating_mul(num_tokens), heads.num_heads * heads.head_dim);
        qkv.expect(OP, "qkv", rows, 3 * width)?;
        out.expect(OP, "out", rows, width)?;
        out.put(OP, 0, &oracle::image_attention(qkv.first(rows), num_tokens, heads, self.dtype))
    }

    fn layer_norm_residual(
        &self, branch: &PlainBuffer, weight: &PlainWeight, bias: &PlainWeight, eps: f32, rows: usize,
        residual: &mut PlainBuffer,
    ) -> Result<()> {
        const OP: &str = "layer_norm_residual";
        weight.expect(OP, "weight", &[branch.width()])?;
        bias.expect(OP, "bias", &[branch.width()])?;
        branch.expect(OP, "branch", rows, branch.width())?;
        residual.expect(OP, "residual", rows, branch.width())?;
        let (x, before) = (branch.first(rows), residual.first(rows));
        let sums = oracle::layer_norm_residual(x, weight.values(), bias.values(), eps, before, self.dtype);
        residual.put(OP, 0, &sums)
    }

    fn layer_norm_gelu(
        &self, x: &mut PlainBuffer, weight: &PlainWeight, bias: &PlainWeight, eps: f32, rows: usize,
    ) -> Result<()> {
        const OP: &str = "layer_norm_gelu";
        weight.expect(OP, "weight", &[x.width()])?;
        bias.expect(OP, "bias", &[x.width()])?;
        x.expect(OP, "x", rows, x.width())?;
        let normed = oracle::layer_norm_gelu(x.first(rows), weight.values(), bias.values(), eps, self.dtype);
        x.put(OP, 0, &normed)
    }

    fn copy_weight_rows(&self, weight: &PlainWeight, destination: &mut PlainBuffer, first_row: usize) -> Result<()> {
        if weight.shape().last() != Some(&destination.width()) {
            let expected = format!("rows of {}", destination.width());
            return Err(shape("copy_weight_rows", "weight", weight.shape(), expected));
        }
        destination.put("copy_weight_rows", first_row, weight.values())
    }
}
