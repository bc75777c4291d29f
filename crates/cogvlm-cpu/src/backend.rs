//! The backend: one device's memory, threads and instructions.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cogvlm_backend::{
    Activation, Arena, Backend, BackendError, Batch, ExpertWeights, HeadGeometry, HostRows, HostWeight, Lease,
    MemoryUse, PatchGeometry, PatchWeights, Portable, RopeMode, SampleRequest, StagedSource,
};
use cogvlm_core::tokens::ExpertRange;
use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{DType, Device};
use half::bf16;

use crate::buffer::{CpuBuffer, CpuParcel};
use crate::ops;
use crate::ring::{Copier, CpuRing};
use crate::simd::Isa;
use crate::tables::CpuTables;
use crate::threads::Threads;
use crate::weight::CpuWeight;

/// The CPU as one device, or as one of several virtual ranks.
pub struct CpuBackend {
    pub(crate) arena: Arena,
    pub(crate) threads: Arc<Threads>,
    pub(crate) isa: Isa,
    activations: DType,
    copier: Copier,
}

impl CpuBackend {
    /// A device with an arena of `capacity_bytes` and the best instructions that the machine has. Ranks of one
    /// process share `threads`: operations run on the calling thread and on the others.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`] for activations in f16.
    pub fn new(
        device: Device, capacity_bytes: u64, activations: DType, threads: Arc<Threads>,
    ) -> Result<Self, BackendError> {
        if activations == DType::F16 {
            let reason = "activations in f16 overflow where this model was trained in bf16; use bf16 or f32".to_owned();
            return Err(BackendError::Unsupported { op: "new", reason });
        }
        let (arena, copier) = (Arena::new(device, capacity_bytes), Copier::new(device));
        Ok(Self { arena, threads, isa: Isa::best(), activations, copier })
    }

    /// The same device, restricted to the instructions of `isa`. Levels differ in the last bits of sums.
    #[must_use]
    pub fn with_isa(self, isa: Isa) -> Self {
        Self { isa, ..self }
    }

    /// The instructions that it uses.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}

/// Calls an operation for the element type of activations.
macro_rules! op {
    ($cpu:ident, $name:ident($($argument:expr),*)) => {
        match $cpu.activations {
            DType::F32 => ops::$name::$name::<f32>($cpu, $($argument),*),
            _ => ops::$name::$name::<bf16>($cpu, $($argument),*),
        }
    };
}

impl Backend for CpuBackend {
    type Buffer = CpuBuffer;
    type Weight = CpuWeight;
    type Tables = CpuTables;
    type Ring = CpuRing;
    type Parcel = CpuParcel;
    type Outbox = Lease;
    type Moment = Instant;
    type Sampled = Vec<u32>;

    fn activation_dtype(&self) -> DType {
        self.activations
    }

    fn moment(&self) -> Result<Instant, BackendError> {
        Ok(Instant::now())
    }

    /// Operations are done when they return.
    fn has_come(&self, _moment: &Instant) -> Result<bool, BackendError> {
        Ok(true)
    }

    fn elapsed(&self, from: &Instant, to: &Instant) -> Result<Duration, BackendError> {
        Ok(to.duration_since(*from))
    }

    fn memory(&self) -> MemoryUse {
        self.arena.memory()
    }

    fn alloc(&self, what: &'static str, dtype: DType, shape: [usize; 2]) -> Result<CpuBuffer, BackendError> {
        CpuBuffer::take(&self.arena, what, dtype, shape)
    }

    fn alloc_shared(&self, what: &'static str, dtype: DType, shape: [usize; 2]) -> Result<CpuBuffer, BackendError> {
        CpuBuffer::take_shared(&self.arena, what, dtype, shape)
    }

    fn share(&self, buffer: &CpuBuffer) -> Result<CpuBuffer, BackendError> {
        buffer.share()
    }

    fn load(&self, weight: &HostWeight) -> Result<CpuWeight, BackendError> {
        CpuWeight::load(&self.arena, weight)
    }

    fn attach(&self, weight: &HostWeight) -> Result<CpuWeight, BackendError> {
        CpuWeight::attach(&self.arena, weight)
    }

    fn staging(&self, num_slots: usize, slot_bytes: usize) -> Result<CpuRing, BackendError> {
        CpuRing::new(&self.arena, num_slots, slot_bytes)
    }

    fn stage(
        &self, ring: &mut CpuRing, slot: usize, sources: Vec<StagedSource<CpuWeight>>,
    ) -> Result<(), BackendError> {
        ring.stage(&self.copier, slot, sources)
    }

    fn staged(&self, ring: &mut CpuRing, slot: usize) -> Result<Vec<CpuWeight>, BackendError> {
        ring.staged(self.arena.device(), slot)
    }

    fn write(&self, values: &[f32], buffer: &mut CpuBuffer, first_row: usize) -> Result<(), BackendError> {
        buffer.write(values, first_row)
    }

    fn read(&self, buffer: &CpuBuffer, rows: Range<usize>) -> Result<Vec<f32>, BackendError> {
        buffer.read(rows)
    }

    fn outbox(&self, bytes: usize) -> Result<Lease, BackendError> {
        self.arena.lease("rows on their way to other ranks", bytes as u64)
    }

    fn send(&self, _outbox: &Lease, buffer: &CpuBuffer, rows: Range<usize>) -> Result<CpuParcel, BackendError> {
        buffer.send(rows)
    }

    fn receive(&self, parcel: CpuParcel, buffer: &mut CpuBuffer, first_row: usize) -> Result<(), BackendError> {
        buffer.receive(&parcel, first_row)
    }

    fn copy_rows(
        &self, source: &CpuBuffer, rows: Range<usize>, destination: &mut CpuBuffer, first_row: usize,
    ) -> Result<(), BackendError> {
        destination.copy_rows(source, rows, first_row)
    }

    fn tables(&self, limits: &StepLimits) -> Result<CpuTables, BackendError> {
        Ok(CpuTables::new(limits))
    }

    fn set_batch(&self, tables: &mut CpuTables, batch: &Batch) -> Result<(), BackendError> {
        tables.set(batch)
    }

    fn embed(&self, table: &CpuWeight, ids: &[u32], hidden: &mut CpuBuffer) -> Result<(), BackendError> {
        op!(self, embed(table, ids, hidden))
    }

    fn rms_norm(
        &self, x: &CpuBuffer, weight: &CpuWeight, eps: f32, rows: usize, out: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        op!(self, rms_norm(x, weight, eps, rows, out))
    }

    fn rms_norm_logit_rows(
        &self, x: &CpuBuffer, weight: &CpuWeight, eps: f32, tables: &CpuTables, out: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        op!(self, rms_norm_logit_rows(x, weight, eps, tables, out))
    }

    fn qkv_rope_append(
        &self, x: &CpuBuffer, weights: ExpertWeights<'_, CpuWeight>, ranges: &[ExpertRange], heads: HeadGeometry,
        rope: &CpuBuffer, mode: RopeMode, tables: &CpuTables, query: &mut CpuBuffer, kv: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        op!(self, qkv_rope_append(x, weights, ranges, heads, rope, mode, tables, query, kv))
    }

    fn attention(
        &self, query: &CpuBuffer, kv: &CpuBuffer, heads: HeadGeometry, tables: &CpuTables, out: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        op!(self, attention(query, kv, heads, tables, out))
    }

    fn linear_residual(
        &self, x: &CpuBuffer, weights: ExpertWeights<'_, CpuWeight>, ranges: &[ExpertRange], residual: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        op!(self, linear_residual(x, weights, ranges, residual))
    }

    fn gate_up(
        &self, x: &CpuBuffer, gate: ExpertWeights<'_, CpuWeight>, up: ExpertWeights<'_, CpuWeight>,
        ranges: &[ExpertRange], out: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        op!(self, gate_up(x, gate, up, ranges, out))
    }

    fn logits(
        &self, x: &CpuBuffer, weight: &CpuWeight, rows: usize, logits: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        op!(self, logits(x, weight, rows, logits))
    }

    fn sample(&self, logits: &CpuBuffer, requests: &[SampleRequest<'_>]) -> Result<Vec<u32>, BackendError> {
        ops::sample::sample(self, logits, requests)
    }

    fn sampled(&self, tokens: &Vec<u32>) -> Result<Vec<u32>, BackendError> {
        Ok(tokens.clone())
    }

    fn patch_embed(
        &self, pixels: &CpuBuffer, weights: PatchWeights<'_, CpuWeight>, geometry: PatchGeometry, out: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        op!(self, patch_embed(pixels, weights, geometry, out))
    }

    fn linear(
        &self, x: &CpuBuffer, weight: &CpuWeight, bias: Option<&CpuWeight>, activation: Activation, rows: usize,
        out: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        op!(self, linear(x, weight, bias, activation, rows, out))
    }

    fn image_attention(
        &self, qkv: &CpuBuffer, num_images: usize, num_tokens: usize, heads: HeadGeometry, out: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        op!(self, image_attention(qkv, num_images, num_tokens, heads, out))
    }

    fn layer_norm_residual(
        &self, branch: &CpuBuffer, weight: &CpuWeight, bias: &CpuWeight, eps: f32, rows: usize,
        residual: &mut CpuBuffer,
    ) -> Result<(), BackendError> {
        op!(self, layer_norm_residual(branch, weight, bias, eps, rows, residual))
    }

    fn layer_norm_gelu(
        &self, x: &mut CpuBuffer, weight: &CpuWeight, bias: &CpuWeight, eps: f32, rows: usize,
    ) -> Result<(), BackendError> {
        op!(self, layer_norm_gelu(x, weight, bias, eps, rows))
    }

    fn copy_weight_rows(
        &self, weight: &CpuWeight, destination: &mut CpuBuffer, first_row: usize,
    ) -> Result<(), BackendError> {
        op!(self, copy_weight_rows(weight, destination, first_row))
    }
}

impl Portable for CpuBackend {
    fn pack(&self, parcel: CpuParcel) -> Result<HostRows, BackendError> {
        Ok(parcel.into_host_rows())
    }

    fn unpack(&self, rows: HostRows) -> Result<CpuParcel, BackendError> {
        CpuParcel::of_host_rows(rows)
    }
}
