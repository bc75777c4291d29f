//! The backend: one GPU as the model sees it.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cogvlm_backend::shape::unsupported;
use cogvlm_backend::{
    Activation, Backend, BackendError, Batch, ExpertWeights, HeadGeometry, HostWeight, MemoryUse, PatchGeometry,
    PatchWeights, RopeMode, SampleRequest, SharedMemory, StagedSource,
};
use cogvlm_core::tokens::ExpertRange;
use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{DType, Device};

use crate::buffer::CudaBuffer;
use crate::device::{Event, Gpu};
use crate::graph::Graphs;
use crate::host_copy::{LoadPath, Loader, Uploader};
use crate::kernels;
use crate::memory::{Allocation, DeviceArena};
use crate::ops;
use crate::outbox::{CudaOutbox, CudaParcel};
use crate::ring::CudaRing;
use crate::sampled::{SampledTokens, TokenSlots};
use crate::tables::CudaTables;
use crate::weight::CudaWeight;

/// Bytes of the scratch memory of operations. Part of the plan's reserve.
pub(crate) const SCRATCH_BYTES: usize = 32 << 20;

/// One GPU.
pub struct CudaBackend {
    // Fields are dropped in order: what waits for the stream before the memory that the stream uses.
    pub(crate) graphs: Graphs,
    pub(crate) uploader: Uploader,
    pub(crate) tokens: TokenSlots,
    pub(crate) loader: Arc<Loader>,
    pub(crate) arena: DeviceArena,
    /// Partial results between the kernels of one operation. Operations follow each other on one stream, so each may
    /// use all of it.
    pub(crate) scratch: Allocation,
    /// Held by the load that converts through scratch memory.
    pub(crate) converting: Mutex<()>,
    pub(crate) gpu: Arc<Gpu>,
    pub(crate) activations: DType,
    /// Which kernels multiply matrices.
    pub(crate) path: KernelPath,
    /// Bytes of shared memory of a multiprocessor that operations reckon with.
    pub(crate) shared_bytes: u32,
}

/// Kernels for matrix products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum KernelPath {
    /// Plain ones for any shape and type.
    Generic,
    /// `mma.sync` and `cp.async`: sm_80 on.
    Portable,
    /// `wgmma` and TMA: sm_90, in builds with 90a.
    Hopper,
}

impl CudaBackend {
    /// GPU `ordinal` as the rank `device`, with an arena of `capacity_bytes`. Beside the arena it takes what the driver
    /// needs for a context, 4 MiB for rounding, and 32 MiB for operations.
    ///
    /// # Errors
    /// [`BackendError::Device`] where there is no such GPU, it is in use, or has too little memory;
    /// [`BackendError::Unsupported`] for activations in f16.
    pub fn new(device: Device, ordinal: u32, capacity_bytes: u64, activations: DType) -> Result<Self, BackendError> {
        if activations == DType::F16 {
            return Err(unsupported(
                "new",
                "activations in f16 overflow where this model was trained in bf16; use bf16 or f32",
            ));
        }
        let gpu = Arc::new(Gpu::open(device, ordinal)?);
        let (free, _) = gpu.memory_info()?;
        let needed = capacity_bytes + SCRATCH_BYTES as u64;
        if free < needed {
            let name = gpu.info.name.clone();
            return Err(crate::CudaError::TooLittleMemory { ordinal, name, free, needed }.on(device));
        }
        let refused = |error: BackendError| match error {
            BackendError::Device { reason, .. } => {
                crate::CudaError::Allocation { ordinal, name: gpu.info.name.clone(), reason }.on(device)
            }
            other => other,
        };
        let arena = DeviceArena::new(&gpu, capacity_bytes).map_err(refused)?;
        let scratch = Allocation::new(&gpu, "scratch memory", SCRATCH_BYTES).map_err(refused)?;
        // SAFETY: the allocation has this length.
        unsafe { gpu.zero(scratch.address, SCRATCH_BYTES) }?;
        let path = match gpu.info.compute_capability {
            capability if kernels::has_wgmma(kernels::ARCHITECTURES, capability) => KernelPath::Hopper,
            (8.., _) => KernelPath::Portable,
            _ => KernelPath::Generic,
        };
        let (graphs, uploader, tokens) = (Graphs::new(&gpu), Uploader::new(&gpu)?, TokenSlots::new(&gpu));
        let loader = Arc::new(Loader::new(&gpu, LoadPath::Auto));
        let converting = Mutex::default();
        let shared_bytes = gpu.info.shared_bytes;
        Ok(Self { graphs, uploader, tokens, loader, arena, scratch, converting, gpu, activations, path, shared_bytes })
    }

    /// The same device with the kernels of `path` or plainer ones: for tests, and for comparing them.
    #[must_use]
    pub fn with_path(self, path: KernelPath) -> Self {
        let path = path.min(self.path);
        Self { path, ..self }
    }

    /// The same device, used as though its multiprocessors had no more than so much shared memory: for tests.
    #[must_use]
    pub fn with_shared_bytes(self, shared_bytes: u32) -> Self {
        let shared_bytes = shared_bytes.min(self.shared_bytes);
        Self { shared_bytes, ..self }
    }

    /// The same device, to which weights get by `path`: for tests, and for comparing them.
    #[must_use]
    pub fn with_load_path(self, path: LoadPath) -> Self {
        Self { loader: Arc::new(Loader::new(&self.gpu, path)), ..self }
    }

    /// `memory`, which the host's operations use as well, as a buffer of this device; row-major, and no longer than the
    /// memory. The device reads and writes it over its link.
    ///
    /// # Errors
    /// [`BackendError::Device`] where the driver does not lock the memory.
    pub fn share_host(
        &self, memory: &SharedMemory, dtype: DType, shape: [usize; 2],
    ) -> Result<CudaBuffer, BackendError> {
        CudaBuffer::in_host_memory(&self.gpu, memory, dtype, shape)
    }

    /// Free and total bytes of the device, as the driver sees them.
    ///
    /// # Errors
    /// Where the driver fails.
    pub fn memory_info(&self) -> Result<(u64, u64), BackendError> {
        self.gpu.memory_info()
    }
}

impl Backend for CudaBackend {
    type Buffer = CudaBuffer;
    type Weight = CudaWeight;
    type Tables = CudaTables;
    type Ring = CudaRing;
    type Parcel = CudaParcel;
    type Outbox = CudaOutbox;
    type Moment = Event;
    type Sampled = SampledTokens;

    fn activation_dtype(&self) -> DType {
        self.activations
    }

    fn memory(&self) -> MemoryUse {
        self.arena.memory()
    }

    fn alloc(&self, what: &'static str, dtype: DType, shape: [usize; 2]) -> Result<CudaBuffer, BackendError> {
        CudaBuffer::take(&self.arena, what, dtype, shape)
    }

    fn load(&self, weight: &HostWeight) -> Result<CudaWeight, BackendError> {
        ops::load::load(self, weight)
    }

    fn attach(&self, weight: &HostWeight) -> Result<CudaWeight, BackendError> {
        Ok(CudaWeight::attached(weight))
    }

    fn prepare_streaming(&self, weights: &[HostWeight]) {
        self.loader.prepare(weights);
    }

    fn staging(&self, num_slots: usize, slot_bytes: usize) -> Result<CudaRing, BackendError> {
        CudaRing::new(self, num_slots, slot_bytes)
    }

    fn stage(
        &self, ring: &mut CudaRing, slot: usize, sources: Vec<StagedSource<CudaWeight>>,
    ) -> Result<(), BackendError> {
        ring.stage(self, slot, sources)
    }

    fn staged(&self, ring: &mut CudaRing, slot: usize) -> Result<Vec<CudaWeight>, BackendError> {
        ring.staged(self, slot)
    }

    fn write(&self, values: &[f32], buffer: &mut CudaBuffer, first_row: usize) -> Result<(), BackendError> {
        ops::rows::write(self, values, buffer, first_row)
    }

    fn read(&self, buffer: &CudaBuffer, rows: Range<usize>) -> Result<Vec<f32>, BackendError> {
        ops::rows::read(self, buffer, rows)
    }

    fn outbox(&self, bytes: usize) -> Result<CudaOutbox, BackendError> {
        CudaOutbox::new(self, bytes)
    }

    fn send(&self, outbox: &CudaOutbox, buffer: &CudaBuffer, rows: Range<usize>) -> Result<CudaParcel, BackendError> {
        outbox.send(buffer, rows)
    }

    fn receive(&self, parcel: CudaParcel, buffer: &mut CudaBuffer, first_row: usize) -> Result<(), BackendError> {
        parcel.receive(self, buffer, first_row)
    }

    fn copy_rows(
        &self, source: &CudaBuffer, rows: Range<usize>, destination: &mut CudaBuffer, first_row: usize,
    ) -> Result<(), BackendError> {
        ops::rows::copy_rows(self, source, rows, destination, first_row)
    }

    fn tables(&self, limits: &StepLimits) -> Result<CudaTables, BackendError> {
        CudaTables::new(&self.gpu, limits)
    }

    fn set_batch(&self, tables: &mut CudaTables, batch: &Batch) -> Result<(), BackendError> {
        tables.set(&self.uploader, batch)
    }

    fn moment(&self) -> Result<Event, BackendError> {
        let event = Event::new(&self.gpu, true)?;
        event.record(self.gpu.stream)?;
        Ok(event)
    }

    fn has_come(&self, moment: &Event) -> Result<bool, BackendError> {
        moment.has_come()
    }

    fn elapsed(&self, from: &Event, to: &Event) -> Result<Duration, BackendError> {
        from.wait()?;
        to.wait()?;
        Ok(Duration::from_secs_f64(f64::from(from.milliseconds_to(to)?.max(0.0)) / 1e3))
    }

    fn synchronize(&self) -> Result<(), BackendError> {
        self.gpu.synchronize()
    }

    fn replay(&self, key: u64, operations: &mut dyn FnMut() -> Result<(), BackendError>) -> Result<(), BackendError> {
        self.graphs.replay(key, operations)
    }

    fn embed(&self, table: &CudaWeight, ids: &[u32], hidden: &mut CudaBuffer) -> Result<(), BackendError> {
        ops::embed::embed(self, table, ids, hidden)
    }

    fn rms_norm(
        &self, x: &CudaBuffer, weight: &CudaWeight, eps: f32, rows: usize, out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        ops::rms_norm::rms_norm(self, x, weight, eps, rows, out)
    }

    fn rms_norm_logit_rows(
        &self, x: &CudaBuffer, weight: &CudaWeight, eps: f32, tables: &CudaTables, out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        ops::rms_norm::rms_norm_logit_rows(self, x, weight, eps, tables, out)
    }

    fn qkv_rope_append(
        &self, x: &CudaBuffer, weights: ExpertWeights<'_, CudaWeight>, ranges: &[ExpertRange], heads: HeadGeometry,
        rope: &CudaBuffer, mode: RopeMode, tables: &CudaTables, query: &mut CudaBuffer, kv: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        ops::qkv_rope_append::qkv_rope_append(self, x, weights, ranges, heads, rope, mode, tables, query, kv)
    }

    fn attention(
        &self, query: &CudaBuffer, kv: &CudaBuffer, heads: HeadGeometry, tables: &CudaTables, out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        ops::attention::attention(self, query, kv, heads, tables, out)
    }

    fn linear_residual(
        &self, x: &CudaBuffer, weights: ExpertWeights<'_, CudaWeight>, ranges: &[ExpertRange],
        residual: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        ops::linear_residual::linear_residual(self, x, weights, ranges, residual)
    }

    fn gate_up(
        &self, x: &CudaBuffer, gate: ExpertWeights<'_, CudaWeight>, up: ExpertWeights<'_, CudaWeight>,
        ranges: &[ExpertRange], out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        ops::gate_up::gate_up(self, x, gate, up, ranges, out)
    }

    fn logits(
        &self, x: &CudaBuffer, weight: &CudaWeight, rows: usize, logits: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        ops::logits::logits(self, x, weight, rows, logits)
    }

    fn sample(&self, logits: &CudaBuffer, requests: &[SampleRequest<'_>]) -> Result<SampledTokens, BackendError> {
        ops::sample::sample(self, logits, requests)
    }

    fn sampled(&self, tokens: &SampledTokens) -> Result<Vec<u32>, BackendError> {
        tokens.wait()
    }

    fn embed_sampled(
        &self, table: &CudaWeight, tokens: &SampledTokens, hidden: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        ops::embed::embed_sampled(self, table, tokens, hidden)
    }

    fn patch_embed(
        &self, pixels: &CudaBuffer, weights: PatchWeights<'_, CudaWeight>, geometry: PatchGeometry,
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        ops::patch_embed::patch_embed(self, pixels, weights, geometry, out)
    }

    fn linear(
        &self, x: &CudaBuffer, weight: &CudaWeight, bias: Option<&CudaWeight>, activation: Activation, rows: usize,
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        ops::linear::linear(self, x, weight, bias, activation, rows, out)
    }

    fn image_attention(
        &self, qkv: &CudaBuffer, num_images: usize, num_tokens: usize, heads: HeadGeometry, out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        ops::image_attention::image_attention(self, qkv, num_images, num_tokens, heads, out)
    }

    fn layer_norm_residual(
        &self, branch: &CudaBuffer, weight: &CudaWeight, bias: &CudaWeight, eps: f32, rows: usize,
        residual: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        ops::layer_norm::layer_norm_residual(self, branch, weight, bias, eps, rows, residual)
    }

    fn layer_norm_gelu(
        &self, x: &mut CudaBuffer, weight: &CudaWeight, bias: &CudaWeight, eps: f32, rows: usize,
    ) -> Result<(), BackendError> {
        ops::layer_norm::layer_norm_gelu(self, x, weight, bias, eps, rows)
    }

    fn copy_weight_rows(
        &self, weight: &CudaWeight, destination: &mut CudaBuffer, first_row: usize,
    ) -> Result<(), BackendError> {
        ops::rows::copy_weight_rows(self, weight, destination, first_row)
    }
}
