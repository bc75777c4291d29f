//! The conformance suite refuses wrong backends: each fault below breaks one thing in a right one, and the check named
//! beside it has to notice.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::plain::{PlainBackend, PlainBuffer, PlainParcel, PlainRing, PlainTables, PlainWeight};
use cogvlm_backend::conformance::{ARENA_BYTES, checks};
use cogvlm_backend::oracle::{self, KvPart, kv_index, round_to};
use cogvlm_backend::{
    Activation, Backend, BackendError, Batch, ExpertWeights, HeadGeometry, HostWeight, Lease, MemoryUse, PatchGeometry,
    PatchWeights, RopeMode, SampleRequest, SamplingParams, SequenceRows, StagedSource,
};
use cogvlm_core::DType;
use cogvlm_core::tokens::ExpertRange;
use cogvlm_core::workspace::{BLOCK_LEN, StepLimits};

type Result<T> = std::result::Result<T, BackendError>;

/// In which activation types a fault shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shows {
    Always,
    /// Smaller than a rounding to bf16.
    InF32,
    /// A rounding of bf16 that is not there, or one too many.
    InBf16,
}

macro_rules! faults {
    ($($(#[$doc:meta])* $fault:ident $check:ident $shows:ident)*) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        enum Fault { $($(#[$doc])* $fault),* }

        /// Every fault, the check that has to notice it, and where it shows.
        const FAULTS: &[(Fault, &str, Shows)] = &[$((Fault::$fault, stringify!($check), Shows::$shows)),*];
    };
}

faults! {
    // Memory.
    BuffersNotZeroed alloc Always
    AttachTakesMemory alloc Always
    ArenaWithoutEnd out_of_memory Always
    FailedLoadLeaks host_failure Always
    FailedLoadGivesZeros host_failure Always
    // Rows.
    WriteTruncates write_read InBf16
    ReadBeyondEndIsCut write_read Always
    CopyDropsLastRow copy_rows Always
    CopyIgnoresFirstRow copy_rows Always
    ReceiveIgnoresFirstRow send_receive Always
    ReceiveTakesAnyWidth send_receive Always
    MomentsNeverCome moments Always
    // Streaming.
    StagedInReverse staging Always
    SlotKeepsItsFirstGroup staging Always
    SlotsHoldAnything staging Always
    StagedWeightsAreRounded rms_norm InF32
    // Rows of weights.
    EmbedNextId embed Always
    EmbedClampsIds embed Always
    WeightRowsOneTooEarly copy_weight_rows Always
    // Norms.
    RmsEpsTenfold rms_norm Always
    RmsRoundsBeforeWeight rms_norm InBf16
    RmsDropsLastRow rms_norm Always
    RmsWritesARowMore rms_norm Always
    RmsRefusesWithAnotherError rms_norm Always
    RmsPanics rms_norm Always
    RmsDiffersEachTime rms_norm Always
    RmsSquareOverflows rms_norm Always
    LogitRowsAreTheFirst rms_norm_logit_rows Always
    LayerNormEpsTenfold layer_norm_residual Always
    LayerNormUnbiased layer_norm_residual Always
    LayerNormOnePass layer_norm_residual InF32
    LayerNormWithoutBias layer_norm_gelu Always
    LayerNormResidualRoundsOnce layer_norm_residual InBf16
    LayerNormTanhGelu layer_norm_gelu InF32
    // Linears.
    LinearWithoutBias linear Always
    LinearTransposesSquares linear Always
    LinearTanhGelu linear InF32
    LinearGeluOfUnrounded linear InBf16
    LinearRoundsBeforeBias linear InBf16
    LinearSumsInBf16 linear Always
    LogitsNotRounded logits InBf16
    ExpertsSwapped linear_residual Always
    RangeEndsARowLate linear_residual Always
    MissingExpertIsSkipped linear_residual Always
    ResidualOverwritten linear_residual Always
    ResidualRoundsOnce linear_residual InBf16
    GateAndUpExchanged gate_up Always
    SiluNotRounded gate_up InBf16
    SiluOverflows gate_up Always
    MissingGateIsSkipped gate_up Always
    // Keys, values, attention.
    RopeInterleaved qkv_rope_append Always
    RopeByTokenIndex qkv_rope_append Always
    RopeOnValues qkv_rope_append Always
    RopeModeIgnored qkv_rope_append InBf16
    AppendNextSlot qkv_rope_append Always
    AppendIgnoresBlockTable qkv_rope_append Always
    AppendExchangesHeads qkv_rope_append Always
    AppendRestartsAtEachChunk chunked_prefill Always
    BatchNotChecked set_batch Always
    MaskOneKeyLess attention Always
    MaskMissing attention Always
    MaskToEndOfBlock attention Always
    MaskMissingInChunks chunked_prefill Always
    ScaleMissing attention Always
    SoftmaxWithoutMaximum attention Always
    KvHeadsInterleaved attention Always
    BlockTableOfFirstSequence attention Always
    // Sampling.
    TiesGoToTheLast sample Always
    PenaltyIgnored sample Always
    DrawIgnoresIndex sample Always
    SampledAreTheLast sample Always
    EmbedsTheLastSampled embed_sampled Always
    EmbedsSampledInReverse embed_sampled Always
    // Vision.
    PatchesColumnMajor patch_embed Always
    PatchPositionsShifted patch_embed Always
    PatchRoundsOnce patch_embed InBf16
    ImagesAttendToEachOther image_attention Always
    ImageSplitByHead image_attention Always
    ImageScaleMissing image_attention Always
}

fn missed(dtype: DType) -> Vec<(Fault, &'static str)> {
    let hides = if dtype == DType::F32 { Shows::InBf16 } else { Shows::InF32 };
    let suite = checks::<FaultyBackend>();
    let expected = FAULTS.iter().filter(|(.., shows)| *shows != hides);
    let is_missed = |(fault, check, _): &&(Fault, &'static str, Shows)| {
        let check = suite.iter().find(|candidate| candidate.name == *check).expect("the check exists");
        let make = || FaultyBackend::new(dtype, *fault);
        let Err(panic) = catch_unwind(AssertUnwindSafe(|| (check.run)(&make))) else { return true };
        report(*fault, dtype, panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref().copied()));
        false
    };
    expected.filter(is_missed).map(|(fault, check, _)| (*fault, *check)).collect()
}

/// What the suite says of a fault: for who runs this with `--nocapture`.
#[expect(clippy::print_stderr, reason = "captured by the test harness")]
fn report(fault: Fault, dtype: DType, message: Option<&str>) {
    eprintln!("{fault:?} in {dtype}: {}", message.unwrap_or("(no message)"));
}

#[test]
fn every_fault_is_noticed_in_f32() {
    assert_eq!(missed(DType::F32), []);
}

#[test]
fn every_fault_is_noticed_in_bf16() {
    assert_eq!(missed(DType::Bf16), []);
}

/// A right backend with one fault.
struct FaultyBackend {
    inner: PlainBackend,
    dtype: DType,
    fault: Fault,
    /// What the last `sample` chose.
    last_sampled: Mutex<Vec<u32>>,
}

impl FaultyBackend {
    fn new(dtype: DType, fault: Fault) -> Self {
        let capacity = if fault == Fault::ArenaWithoutEnd { u64::MAX } else { ARENA_BYTES };
        Self { inner: PlainBackend::new(dtype, capacity), dtype, fault, last_sampled: Mutex::default() }
    }

    fn has(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    /// The batch, with its sequences changed.
    fn with_sequences(tables: &PlainTables, change: impl Fn(&mut SequenceRows)) -> PlainTables {
        let mut batch = tables.batch.clone();
        batch.sequences.iter_mut().for_each(change);
        PlainTables { limits: tables.limits, batch }
    }

    fn round(&self, value: f64) -> f32 {
        round_to(self.dtype, value)
    }

    /// `change` on the first rows.
    fn change_rows(&self, buffer: &mut PlainBuffer, rows: usize, change: impl Fn(usize, f32) -> f64) {
        let width = buffer.shape[1];
        for (index, value) in buffer.values[..rows * width].iter_mut().enumerate() {
            *value = self.round(change(index, *value));
        }
    }
}

fn tanh_gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
}

/// A weight of zeros in the place of a missing one.
fn filled<'a>(weights: ExpertWeights<'a, PlainWeight>, zeros: &'a PlainWeight) -> ExpertWeights<'a, PlainWeight> {
    ExpertWeights { language: weights.language.or(Some(zeros)), vision: weights.vision.or(Some(zeros)) }
}

/// Products of f32 without the rounding to the activation type.
fn unrounded(x: &[f32], weights: ExpertWeights<'_, PlainWeight>, ranges: &[ExpertRange], width: usize) -> Vec<f32> {
    let weights = ExpertWeights {
        language: weights.language.map(PlainWeight::values),
        vision: weights.vision.map(PlainWeight::values),
    };
    oracle::expert_linear(x, weights, ranges, width, DType::F32)
}

impl Backend for FaultyBackend {
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
        Ok(!self.has(Fault::MomentsNeverCome))
    }

    fn elapsed(&self, from: &Self::Moment, to: &Self::Moment) -> Result<std::time::Duration> {
        Ok(to.duration_since(*from))
    }

    fn activation_dtype(&self) -> DType {
        self.dtype
    }

    fn memory(&self) -> MemoryUse {
        let memory = self.inner.memory();
        MemoryUse { capacity: memory.capacity.min(ARENA_BYTES), ..memory }
    }

    fn alloc(&self, what: &'static str, dtype: DType, shape: [usize; 2]) -> Result<PlainBuffer> {
        let shape = if self.has(Fault::ArenaWithoutEnd) && shape[0] > 1 << 32 { [1, 1] } else { shape };
        let mut buffer = self.inner.alloc(what, dtype, shape)?;
        if self.has(Fault::BuffersNotZeroed) {
            buffer.values.fill(1.0);
        }
        Ok(buffer)
    }

    fn load(&self, weight: &HostWeight) -> Result<PlainWeight> {
        let loaded = self.inner.load(weight);
        if loaded.is_err() && self.has(Fault::FailedLoadLeaks) {
            std::mem::forget(self.inner.alloc("leak", DType::F32, [1, 1])?);
        }
        if loaded.is_err() && self.has(Fault::FailedLoadGivesZeros) {
            let len = weight.shape().iter().product();
            return Ok(PlainWeight::new(weight.shape(), vec![0.0; len]));
        }
        loaded
    }

    fn attach(&self, weight: &HostWeight) -> Result<PlainWeight> {
        if self.has(Fault::AttachTakesMemory) { self.inner.load(weight) } else { self.inner.attach(weight) }
    }

    fn staging(&self, num_slots: usize, slot_bytes: usize) -> Result<PlainRing> {
        let slot_bytes = if self.has(Fault::SlotsHoldAnything) { slot_bytes * 1000 } else { slot_bytes };
        self.inner.staging(num_slots, slot_bytes)
    }

    fn stage(&self, ring: &mut PlainRing, slot: usize, mut sources: Vec<StagedSource<PlainWeight>>) -> Result<()> {
        if self.has(Fault::StagedInReverse) {
            sources.reverse();
        }
        if self.has(Fault::SlotKeepsItsFirstGroup) && self.inner.staged(ring, slot).is_ok_and(|held| !held.is_empty()) {
            return Ok(());
        }
        self.inner.stage(ring, slot, sources)
    }

    fn staged(&self, ring: &mut PlainRing, slot: usize) -> Result<Vec<PlainWeight>> {
        let weights = self.inner.staged(ring, slot)?;
        if !self.has(Fault::StagedWeightsAreRounded) {
            return Ok(weights);
        }
        let rounded = |weight: &PlainWeight| {
            let values = weight.values().iter().map(|&value| round_to(DType::Bf16, f64::from(value))).collect();
            PlainWeight::new(weight.shape(), values)
        };
        Ok(weights.iter().map(rounded).collect())
    }

    fn write(&self, values: &[f32], buffer: &mut PlainBuffer, first_row: usize) -> Result<()> {
        if self.has(Fault::WriteTruncates) && buffer.dtype == DType::Bf16 {
            let values: Vec<f32> = values.iter().map(|value| f32::from_bits(value.to_bits() & 0xffff_0000)).collect();
            return self.inner.write(&values, buffer, first_row);
        }
        self.inner.write(values, buffer, first_row)
    }

    fn read(&self, buffer: &PlainBuffer, rows: Range<usize>) -> Result<Vec<f32>> {
        let end = if self.has(Fault::ReadBeyondEndIsCut) { rows.end.min(buffer.shape[0]) } else { rows.end };
        self.inner.read(buffer, rows.start..end)
    }

    fn outbox(&self, bytes: usize) -> Result<Lease> {
        self.inner.outbox(bytes)
    }

    fn send(&self, outbox: &Lease, buffer: &PlainBuffer, rows: Range<usize>) -> Result<PlainParcel> {
        self.inner.send(outbox, buffer, rows)
    }

    fn receive(&self, parcel: PlainParcel, buffer: &mut PlainBuffer, first_row: usize) -> Result<()> {
        if self.has(Fault::ReceiveTakesAnyWidth) && parcel.width != buffer.shape[1] {
            return Ok(());
        }
        let first_row = if self.has(Fault::ReceiveIgnoresFirstRow) { 0 } else { first_row };
        self.inner.receive(parcel, buffer, first_row)
    }

    fn copy_rows(
        &self, source: &PlainBuffer, rows: Range<usize>, destination: &mut PlainBuffer, first_row: usize,
    ) -> Result<()> {
        let end = if self.has(Fault::CopyDropsLastRow) && rows.len() > 1 { rows.end - 1 } else { rows.end };
        let first_row = if self.has(Fault::CopyIgnoresFirstRow) { 0 } else { first_row };
        self.inner.copy_rows(source, rows.start..end, destination, first_row)
    }

    fn tables(&self, limits: &StepLimits) -> Result<PlainTables> {
        self.inner.tables(limits)
    }

    fn set_batch(&self, tables: &mut PlainTables, batch: &Batch) -> Result<()> {
        if self.has(Fault::BatchNotChecked) {
            tables.batch = batch.clone();
            return Ok(());
        }
        self.inner.set_batch(tables, batch)
    }

    fn embed(&self, table: &PlainWeight, ids: &[u32], hidden: &mut PlainBuffer) -> Result<()> {
        let vocab_size = table.shape()[0] as u32;
        let changed = |&id: &u32| match self.fault {
            Fault::EmbedNextId => (id + 1) % vocab_size,
            Fault::EmbedClampsIds => id.min(vocab_size - 1),
            _ => id,
        };
        self.inner.embed(table, &ids.iter().map(changed).collect::<Vec<_>>(), hidden)
    }

    fn rms_norm(
        &self, x: &PlainBuffer, weight: &PlainWeight, eps: f32, rows: usize, out: &mut PlainBuffer,
    ) -> Result<()> {
        static CALLS: AtomicUsize = AtomicUsize::new(0);
        let width = x.shape[1];
        let (eps, rows) = match self.fault {
            Fault::RmsEpsTenfold => (eps * 10.0, rows),
            Fault::RmsDropsLastRow => (eps, rows.saturating_sub(1)),
            Fault::RmsWritesARowMore if rows < x.shape[0].min(out.shape[0]) => (eps, rows + 1),
            _ => (eps, rows),
        };
        let result = self.inner.rms_norm(x, weight, eps, rows, out);
        match (self.fault, &result) {
            (Fault::RmsRefusesWithAnotherError, Err(_)) => {
                return Err(BackendError::Unsupported { op: "rms_norm", reason: "shapes".to_owned() });
            }
            (Fault::RmsPanics, Err(error)) => panic!("{error}"),
            (_, Err(_)) => return result,
            (Fault::RmsRoundsBeforeWeight, Ok(())) => {
                let ones = vec![1.0; width];
                let normed = oracle::rms_norm(&x.values[..rows * width], &ones, eps, self.dtype);
                self.change_rows(out, rows, |i, _| f64::from(normed[i]) * f64::from(weight.values()[i % width]));
            }
            (Fault::RmsSquareOverflows, Ok(())) => {
                // A sum of squares in f16, which ends at 65,504.
                let overflows = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>() > 65_504.0;
                let overflows: Vec<bool> = x.values.chunks_exact(width).map(overflows).collect();
                self.change_rows(out, rows, |i, y| if overflows[i / width] { 0.0 } else { f64::from(y) });
            }
            (Fault::RmsDiffersEachTime, Ok(())) if CALLS.fetch_add(1, Ordering::Relaxed) % 2 == 1 => {
                if let Some(value) = out.values[..rows * width].iter_mut().find(|value| **value != 0.0) {
                    // The next number of either type.
                    let step = if self.dtype == DType::F32 { 1 } else { 1 << 16 };
                    *value = f32::from_bits(value.to_bits() + step);
                }
            }
            _ => {}
        }
        result
    }

    fn rms_norm_logit_rows(
        &self, x: &PlainBuffer, weight: &PlainWeight, eps: f32, tables: &PlainTables, out: &mut PlainBuffer,
    ) -> Result<()> {
        let mut batch = tables.batch.clone();
        if self.has(Fault::LogitRowsAreTheFirst) {
            batch.logit_rows = (0..batch.logit_rows.len()).collect();
        }
        self.inner.rms_norm_logit_rows(x, weight, eps, &PlainTables { limits: tables.limits, batch }, out)
    }

    fn qkv_rope_append(
        &self, x: &PlainBuffer, weights: ExpertWeights<'_, PlainWeight>, ranges: &[ExpertRange], heads: HeadGeometry,
        rope: &PlainBuffer, mode: RopeMode, tables: &PlainTables, query: &mut PlainBuffer, kv: &mut PlainBuffer,
    ) -> Result<()> {
        let HeadGeometry { num_heads, num_kv_heads, head_dim } = heads;
        let batch = &tables.batch;
        let mut changed = Self::with_sequences(tables, |sequence| match self.fault {
            // Within its last block, so that there is a next slot.
            Fault::AppendNextSlot if sequence.context_len % BLOCK_LEN != 0 => sequence.context_len += 1,
            Fault::AppendIgnoresBlockTable => sequence.blocks.sort_unstable(),
            Fault::AppendRestartsAtEachChunk => sequence.context_len = sequence.rows.len(),
            _ => {}
        });
        if self.has(Fault::RopeByTokenIndex) {
            let tokens = batch.sequences.iter().flat_map(|sequence| sequence.first_token()..sequence.context_len);
            changed.batch.position_ids = tokens.map(|token| token as u32).collect();
        }
        let mode = if self.has(Fault::RopeModeIgnored) { RopeMode::Float32 } else { mode };
        self.inner.qkv_rope_append(x, weights, ranges, heads, rope, mode, &changed, query, kv)?;
        let products = unrounded(&x.values, weights, ranges, x.shape[1]);
        let row_len = (num_heads + 2 * num_kv_heads) * head_dim;
        for (row, slot) in batch.slots().enumerate() {
            let slot = slot.expect("the batch was accepted");
            let angles = &rope.values[batch.position_ids[row] as usize * head_dim..][..head_dim];
            let head = |index: usize| {
                let products = &products[row * row_len + index * head_dim..][..head_dim];
                products.iter().map(|&product| self.round(f64::from(product))).collect::<Vec<f32>>()
            };
            match self.fault {
                Fault::RopeInterleaved => {
                    for index in 0..num_heads {
                        let head = head(index);
                        let out = &mut query.values[(row * num_heads + index) * head_dim..][..head_dim];
                        for j in 0..head_dim / 2 {
                            let [a, b] = [head[2 * j], head[2 * j + 1]].map(f64::from);
                            let [cos, sin] = [angles[j], angles[j + head_dim / 2]].map(f64::from);
                            out[2 * j] = self.round(a * cos - b * sin);
                            out[2 * j + 1] = self.round(a * sin + b * cos);
                        }
                    }
                }
                Fault::RopeOnValues => {
                    let mut value = head(num_heads + num_kv_heads);
                    oracle::rotate(&mut value, angles, mode, self.dtype);
                    kv.values[kv_index(heads, slot, KvPart::Value, 0)..][..head_dim].copy_from_slice(&value);
                }
                Fault::AppendExchangesHeads => {
                    let [first, last] = [0, num_kv_heads - 1].map(|head| kv_index(heads, slot, KvPart::Value, head));
                    for column in 0..head_dim {
                        kv.values.swap(first + column, last + column);
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn attention(
        &self, query: &PlainBuffer, kv: &PlainBuffer, heads: HeadGeometry, tables: &PlainTables, out: &mut PlainBuffer,
    ) -> Result<()> {
        self.inner.attention(query, kv, heads, tables, out)?;
        if !is_attention_fault(self.fault) {
            return Ok(());
        }
        let HeadGeometry { num_heads, num_kv_heads, head_dim } = heads;
        let sequences = &tables.batch.sequences;
        let scale = 1.0 / (head_dim as f64).sqrt();
        for (sequence, row) in sequences.iter().flat_map(|s| s.rows.clone().map(move |row| (s, row))) {
            let own = sequence.first_token() + (row - sequence.rows.start) + 1;
            let is_chunk = sequence.first_token() > 0;
            let num_keys = match self.fault {
                Fault::MaskOneKeyLess => own.max(2) - 1,
                Fault::MaskMissing => sequence.context_len,
                Fault::MaskMissingInChunks if is_chunk => sequence.context_len,
                Fault::MaskToEndOfBlock => own.next_multiple_of(BLOCK_LEN),
                _ => own,
            };
            let blocks = if self.has(Fault::BlockTableOfFirstSequence) { &sequences[0] } else { sequence };
            for head in 0..num_heads {
                let kv_head = if self.has(Fault::KvHeadsInterleaved) {
                    head % num_kv_heads
                } else {
                    head * num_kv_heads / num_heads
                };
                let vector = |token: usize, part| {
                    let slot = blocks.slot(token).or_else(|| sequence.slot(token)).expect("the batch was accepted");
                    &kv.values[kv_index(heads, slot, part, kv_head)..][..head_dim]
                };
                let at = (row * num_heads + head) * head_dim;
                let q = &query.values[at..][..head_dim];
                let score = |token| {
                    let product: f64 = q.iter().zip(vector(token, KvPart::Key)).map(|(&q, &k)| f64::from(q * k)).sum();
                    if self.has(Fault::ScaleMissing) { product } else { product * scale }
                };
                let scores: Vec<f64> = (0..num_keys).map(score).collect();
                let best = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = match self.fault {
                    Fault::SoftmaxWithoutMaximum => scores.iter().map(|&s| f64::from((s as f32).exp())).collect(),
                    _ => scores.iter().map(|s| (s - best).exp()).collect(),
                };
                let total: f64 = weights.iter().sum();
                for column in 0..head_dim {
                    let sum: f64 =
                        (0..num_keys).map(|t| weights[t] * f64::from(vector(t, KvPart::Value)[column])).sum();
                    out.values[at + column] = self.round(sum / total);
                }
            }
        }
        Ok(())
    }

    fn linear_residual(
        &self, x: &PlainBuffer, weights: ExpertWeights<'_, PlainWeight>, ranges: &[ExpertRange],
        residual: &mut PlainBuffer,
    ) -> Result<()> {
        let before = residual.values.clone();
        let width = residual.shape[1];
        let zeros = PlainWeight::new(&[width, x.shape[1]], vec![0.0; width * x.shape[1]]);
        let mut ranges = ranges.to_vec();
        let weights = match self.fault {
            Fault::MissingExpertIsSkipped => filled(weights, &zeros),
            Fault::ExpertsSwapped if weights.language.is_some() && weights.vision.is_some() => {
                ExpertWeights { language: weights.vision, vision: weights.language }
            }
            Fault::RangeEndsARowLate if ranges.len() > 1 && ranges[1].rows.len() > 1 => {
                ranges[0].rows.end += 1;
                ranges[1].rows.start += 1;
                weights
            }
            _ => weights,
        };
        self.inner.linear_residual(x, weights, &ranges, residual)?;
        let rows = ranges.last().map_or(0, |range| range.rows.end);
        let products = unrounded(&x.values, weights, &ranges, x.shape[1]);
        match self.fault {
            Fault::ResidualOverwritten => self.change_rows(residual, rows, |i, _| f64::from(products[i])),
            Fault::ResidualRoundsOnce => {
                self.change_rows(residual, rows, |i, _| f64::from(products[i]) + f64::from(before[i]));
            }
            _ => {}
        }
        Ok(())
    }

    fn gate_up(
        &self, x: &PlainBuffer, gate: ExpertWeights<'_, PlainWeight>, up: ExpertWeights<'_, PlainWeight>,
        ranges: &[ExpertRange], out: &mut PlainBuffer,
    ) -> Result<()> {
        let (rows, width) = (ranges.last().map_or(0, |range| range.rows.end), x.shape[1]);
        let zeros = PlainWeight::new(&[out.shape[1], width], vec![0.0; out.shape[1] * width]);
        let (gate, up) = match self.fault {
            Fault::GateAndUpExchanged => (up, gate),
            Fault::MissingGateIsSkipped => (filled(gate, &zeros), up),
            _ => (gate, up),
        };
        self.inner.gate_up(x, gate, up, ranges, out)?;
        let rounded = |weights| {
            let products = unrounded(&x.values, weights, ranges, width).into_iter();
            products.map(|product| f64::from(self.round(f64::from(product)))).collect::<Vec<f64>>()
        };
        let (g, u) = (rounded(gate), rounded(up));
        match self.fault {
            Fault::SiluNotRounded => self.change_rows(out, rows, |i, _| oracle::silu(g[i]) * u[i]),
            Fault::SiluOverflows => self.change_rows(out, rows, |i, _| {
                let e = (g[i] as f32).exp();
                f64::from(self.round(g[i] * f64::from(e / (1.0 + e)))) * u[i]
            }),
            _ => {}
        }
        Ok(())
    }

    fn logits(&self, x: &PlainBuffer, weight: &PlainWeight, rows: usize, logits: &mut PlainBuffer) -> Result<()> {
        self.inner.logits(x, weight, rows, logits)?;
        if self.has(Fault::LogitsNotRounded) {
            let (width, x) = (x.shape[1], &x.values[..rows * x.shape[1]]);
            let exact = oracle::linear(x, weight.values(), None, width, Activation::Identity, DType::F32);
            logits.values[..exact.len()].copy_from_slice(&exact);
        }
        Ok(())
    }

    fn sample(&self, logits: &PlainBuffer, requests: &[SampleRequest<'_>]) -> Result<Vec<u32>> {
        let mut tokens = self.inner.sample(logits, requests)?;
        for (row, request) in requests.iter().enumerate() {
            let row = logits.values[row * logits.shape[1]..][..logits.shape[1]].to_vec();
            let again = |params: &SamplingParams, index| {
                cogvlm_backend::sampling::sample(&row, &SampleRequest { params, index, ..*request })
            };
            let token = &mut tokens[0];
            match self.fault {
                Fault::TiesGoToTheLast if request.params == &SamplingParams::default() => {
                    let best = row[*token as usize];
                    *token = row.iter().rposition(|&score| score == best).map_or(0, |id| id as u32);
                }
                Fault::PenaltyIgnored => {
                    let params = SamplingParams { repetition_penalty: 1.0, ..request.params.clone() };
                    *token = again(&params, request.index);
                }
                Fault::DrawIgnoresIndex => *token = again(request.params, 0),
                _ => {}
            }
            tokens.rotate_left(1);
        }
        self.last_sampled.lock().unwrap().clone_from(&tokens);
        Ok(tokens)
    }

    fn sampled(&self, tokens: &Vec<u32>) -> Result<Vec<u32>> {
        if self.has(Fault::SampledAreTheLast) {
            return Ok(self.last_sampled.lock().unwrap().clone());
        }
        Ok(tokens.clone())
    }

    fn embed_sampled(&self, table: &PlainWeight, tokens: &Vec<u32>, hidden: &mut PlainBuffer) -> Result<()> {
        match self.fault {
            Fault::EmbedsTheLastSampled => {
                let mut last = self.last_sampled.lock().unwrap().clone();
                last.resize(tokens.len(), 0);
                self.embed(table, &last, hidden)
            }
            Fault::EmbedsSampledInReverse => {
                self.embed(table, &tokens.iter().rev().copied().collect::<Vec<_>>(), hidden)
            }
            _ => self.embed(table, tokens, hidden),
        }
    }

    fn patch_embed(
        &self, pixels: &PlainBuffer, weights: PatchWeights<'_, PlainWeight>, geometry: PatchGeometry,
        out: &mut PlainBuffer,
    ) -> Result<()> {
        let PatchWeights { projection, bias, class, position } = weights;
        self.inner.patch_embed(pixels, PatchWeights { projection, bias, class, position }, geometry, out)?;
        let (per_side, width) = (geometry.image_size / geometry.patch_size, out.shape[1]);
        let tokens = per_side * per_side + 1;
        let rows = geometry.num_images * tokens;
        let position_of = |row: usize, column: usize| f64::from(position.values()[row % tokens * width + column]);
        let right = out.values.clone();
        match self.fault {
            // The patch of each place without that place's position, then the place's own.
            Fault::PatchesColumnMajor => self.change_rows(out, rows, |i, _| {
                let (row, column) = (i / width, i % width);
                let (image, token) = (row / tokens, row % tokens);
                let transposed = match token.checked_sub(1) {
                    Some(patch) => patch % per_side * per_side + patch / per_side + 1,
                    None => 0,
                };
                let from = image * tokens + transposed;
                f64::from(right[from * width + column]) - position_of(from, column) + position_of(row, column)
            }),
            Fault::PatchPositionsShifted => self.change_rows(out, rows, |i, value| {
                f64::from(value) - position_of(i / width, i % width) + position_of(i / width + 1, i % width)
            }),
            Fault::PatchRoundsOnce => {
                let [projection, bias, class, position] = [projection, bias, class, position].map(PlainWeight::values);
                let weights = PatchWeights { projection, bias, class, position };
                let exact = oracle::patch_embed(&pixels.values, weights, geometry, DType::F32);
                self.change_rows(out, rows, |i, _| f64::from(exact[i]));
            }
            _ => {}
        }
        Ok(())
    }

    fn linear(
        &self, x: &PlainBuffer, weight: &PlainWeight, bias: Option<&PlainWeight>, activation: Activation, rows: usize,
        out: &mut PlainBuffer,
    ) -> Result<()> {
        self.inner.linear(x, weight, bias, activation, rows, out)?;
        let [out_features, in_features] = [weight.shape()[0], weight.shape()[1]];
        let used = &x.values[..rows * in_features];
        let bias_values = bias.map(|bias| &bias.values()[..]);
        let bias_of = |i: usize| bias_values.map_or(0.0, |bias| f64::from(bias[i % out_features]));
        let activate = |value: f64| match activation {
            Activation::Identity => value,
            Activation::Gelu => oracle::gelu(value),
        };
        let product =
            |bias, dtype| oracle::linear(used, weight.values(), bias, in_features, Activation::Identity, dtype);
        match self.fault {
            Fault::LinearWithoutBias => {
                let sums = product(None, self.dtype);
                self.change_rows(out, rows, |i, _| activate(f64::from(sums[i])));
            }
            Fault::LinearTransposesSquares if out_features == in_features => {
                let n = in_features;
                let transposed = (0..n * n).map(|i| weight.values()[i % n * n + i / n]).collect();
                return self.inner.linear(x, &PlainWeight::new(&[n, n], transposed), bias, activation, rows, out);
            }
            Fault::LinearTanhGelu if activation == Activation::Gelu => {
                let sums = product(bias_values, self.dtype);
                self.change_rows(out, rows, |i, _| tanh_gelu(f64::from(sums[i])));
            }
            Fault::LinearGeluOfUnrounded => {
                let sums = product(bias_values, DType::F32);
                self.change_rows(out, rows, |i, _| activate(f64::from(sums[i])));
            }
            Fault::LinearRoundsBeforeBias => {
                let sums = product(None, self.dtype);
                self.change_rows(out, rows, |i, _| activate(f64::from(self.round(f64::from(sums[i]) + bias_of(i)))));
            }
            Fault::LinearSumsInBf16 => {
                let weight_rows = |i: usize| &weight.values()[i % out_features * in_features..][..in_features];
                let sum = |i: usize| {
                    let x = &used[i / out_features * in_features..][..in_features];
                    let terms = x.iter().zip(weight_rows(i));
                    terms.fold(0.0, |sum, (&x, &w)| round_to(DType::Bf16, f64::from(sum) + f64::from(x * w)))
                };
                self.change_rows(out, rows, |i, _| activate(f64::from(self.round(f64::from(sum(i)) + bias_of(i)))));
            }
            _ => {}
        }
        Ok(())
    }

    fn image_attention(
        &self, qkv: &PlainBuffer, num_images: usize, num_tokens: usize, heads: HeadGeometry, out: &mut PlainBuffer,
    ) -> Result<()> {
        self.inner.image_attention(qkv, num_images, num_tokens, heads, out)?;
        let HeadGeometry { num_heads, head_dim, .. } = heads;
        let (rows, width) = (num_images * num_tokens, num_heads * head_dim);
        let mut used = qkv.values[..rows * 3 * width].to_vec();
        let num_tokens = if self.has(Fault::ImagesAttendToEachOther) { rows } else { num_tokens };
        match self.fault {
            Fault::ImageSplitByHead => used.chunks_exact_mut(3 * width).for_each(|row| {
                let head =
                    |index: usize| row[(index % num_heads * 3 + index / num_heads) * head_dim..][..head_dim].to_vec();
                let split: Vec<f32> = (0..3 * num_heads).flat_map(head).collect();
                row.copy_from_slice(&split);
            }),
            Fault::ImageScaleMissing => {
                used.chunks_exact_mut(3 * width).for_each(|row| {
                    row[..width].iter_mut().for_each(|q| *q *= (head_dim as f32).sqrt());
                });
            }
            Fault::ImagesAttendToEachOther if rows > 0 => {}
            _ => return Ok(()),
        }
        let wrong = oracle::image_attention(&used, num_tokens, heads, self.dtype);
        out.values[..wrong.len()].copy_from_slice(&wrong);
        Ok(())
    }

    fn layer_norm_residual(
        &self, branch: &PlainBuffer, weight: &PlainWeight, bias: &PlainWeight, eps: f32, rows: usize,
        residual: &mut PlainBuffer,
    ) -> Result<()> {
        let before = residual.values.clone();
        let eps = if self.has(Fault::LayerNormEpsTenfold) { eps * 10.0 } else { eps };
        self.inner.layer_norm_residual(branch, weight, bias, eps, rows, residual)?;
        let width = branch.shape[1];
        let used = &branch.values[..rows * width];
        let (w, b) = (weight.values(), bias.values());
        let normed_with = |variance: &dyn Fn(&[f32], f32) -> f32| -> Vec<f32> {
            let norm = |row: &[f32]| {
                let mean = row.iter().sum::<f32>() / width as f32;
                let scale = 1.0 / (variance(row, mean) + eps).sqrt();
                (0..width).map(|i| self.round(f64::from(w[i] * (row[i] - mean) * scale + b[i]))).collect::<Vec<f32>>()
            };
            used.chunks_exact(width).flat_map(norm).collect()
        };
        let wrong = match self.fault {
            Fault::LayerNormUnbiased => {
                normed_with(&|row, mean| row.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / (width as f32 - 1.0))
            }
            Fault::LayerNormOnePass => {
                normed_with(&|row, mean| row.iter().map(|x| x * x).sum::<f32>() / width as f32 - mean * mean)
            }
            Fault::LayerNormResidualRoundsOnce => oracle::layer_norm(used, w, b, eps, DType::F32),
            _ => return Ok(()),
        };
        self.change_rows(residual, rows, |i, _| f64::from(wrong[i]) + f64::from(before[i]));
        Ok(())
    }

    fn layer_norm_gelu(
        &self, x: &mut PlainBuffer, weight: &PlainWeight, bias: &PlainWeight, eps: f32, rows: usize,
    ) -> Result<()> {
        let width = x.shape[1];
        let before = x.values.clone();
        let zeros = PlainWeight::new(&[width], vec![0.0; width]);
        let without_bias = self.has(Fault::LayerNormWithoutBias) && bias.shape() == zeros.shape();
        self.inner.layer_norm_gelu(x, weight, if without_bias { &zeros } else { bias }, eps, rows)?;
        if self.has(Fault::LayerNormTanhGelu) {
            let normed = oracle::layer_norm(&before[..rows * width], weight.values(), bias.values(), eps, self.dtype);
            self.change_rows(x, rows, |i, _| tanh_gelu(f64::from(normed[i])));
        }
        Ok(())
    }

    fn copy_weight_rows(&self, weight: &PlainWeight, destination: &mut PlainBuffer, first_row: usize) -> Result<()> {
        let early = self.has(Fault::WeightRowsOneTooEarly);
        self.inner.copy_weight_rows(weight, destination, if early { first_row.saturating_sub(1) } else { first_row })
    }
}

fn is_attention_fault(fault: Fault) -> bool {
    use Fault::{
        BlockTableOfFirstSequence, KvHeadsInterleaved, MaskMissing, MaskMissingInChunks, MaskOneKeyLess,
        MaskToEndOfBlock, ScaleMissing, SoftmaxWithoutMaximum,
    };
    let faults = [BlockTableOfFirstSequence, KvHeadsInterleaved, MaskMissing, MaskMissingInChunks, MaskOneKeyLess];
    faults.contains(&fault) || [MaskToEndOfBlock, ScaleMissing, SoftmaxWithoutMaximum].contains(&fault)
}
