//! The backend that is either of the two.

use std::ops::Range;
use std::time::Duration;

use cogvlm_backend::{
    Activation, Backend, BackendError, Batch, ExpertWeights, HeadGeometry, HostWeight, MemoryUse, PatchGeometry,
    PatchWeights, RopeMode, SampleRequest, StagedSource,
};
use cogvlm_core::DType;
use cogvlm_core::tokens::ExpertRange;
use cogvlm_core::workspace::StepLimits;
use cogvlm_cpu::CpuBackend;
use cogvlm_cuda::CudaBackend;

use crate::argument::{Argument, Buffer, Either, Moment, Outbox, Ring, Sampled, Tables, Weight};
use crate::parcel::Parcel;

/// One device: a GPU, or the host (or one of several virtual ranks on it).
pub enum AnyBackend {
    /// The host.
    Cpu(CpuBackend),
    /// A GPU.
    Cuda(CudaBackend),
}

/// Calls the operation on the backend that there is, each argument as that one takes it.
macro_rules! delegate {
    ($self:ident.$op:ident($($argument:expr),*)) => {
        match $self {
            Self::Cpu(cpu) => cpu.$op($($argument.for_cpu(stringify!($op))?),*),
            Self::Cuda(cuda) => cuda.$op($($argument.for_cuda(stringify!($op))?),*),
        }
    };
}

/// [`delegate`], of an operation that makes something.
macro_rules! make {
    ($self:ident.$op:ident($($argument:expr),*)) => {
        match $self {
            Self::Cpu(cpu) => Either::Cpu(cpu.$op($($argument.for_cpu(stringify!($op))?),*)?),
            Self::Cuda(cuda) => Either::Cuda(cuda.$op($($argument.for_cuda(stringify!($op))?),*)?),
        }
    };
}

impl Backend for AnyBackend {
    type Buffer = Buffer;
    type Weight = Weight;
    type Tables = Tables;
    type Ring = Ring;
    type Parcel = Parcel;
    type Outbox = Outbox;
    type Moment = Moment;
    type Sampled = Sampled;

    fn activation_dtype(&self) -> DType {
        match self {
            Self::Cpu(cpu) => cpu.activation_dtype(),
            Self::Cuda(cuda) => cuda.activation_dtype(),
        }
    }

    fn memory(&self) -> MemoryUse {
        match self {
            Self::Cpu(cpu) => cpu.memory(),
            Self::Cuda(cuda) => cuda.memory(),
        }
    }

    fn alloc(&self, what: &'static str, dtype: DType, shape: [usize; 2]) -> Result<Buffer, BackendError> {
        Ok(Buffer { dtype, columns: shape[1], on: make!(self.alloc(what, dtype, shape)) })
    }

    fn alloc_shared(&self, what: &'static str, dtype: DType, shape: [usize; 2]) -> Result<Buffer, BackendError> {
        Ok(Buffer { dtype, columns: shape[1], on: make!(self.alloc_shared(what, dtype, shape)) })
    }

    /// Between the two kinds too: what the host took, a GPU uses over its link.
    fn share(&self, buffer: &Buffer) -> Result<Buffer, BackendError> {
        let Buffer { dtype, columns, .. } = *buffer;
        let on = match (self, &buffer.on) {
            (Self::Cuda(cuda), Either::Cpu(buffer)) => {
                Either::Cuda(cuda.share_host(buffer.shared_memory()?, dtype, buffer.shape())?)
            }
            _ => make!(self.share(buffer)),
        };
        Ok(Buffer { dtype, columns, on })
    }

    fn load(&self, weight: &HostWeight) -> Result<Weight, BackendError> {
        Ok(make!(self.load(weight)))
    }

    fn attach(&self, weight: &HostWeight) -> Result<Weight, BackendError> {
        Ok(make!(self.attach(weight)))
    }

    fn prepare_streaming(&self, weights: &[HostWeight]) {
        match self {
            Self::Cpu(cpu) => cpu.prepare_streaming(weights),
            Self::Cuda(cuda) => cuda.prepare_streaming(weights),
        }
    }

    fn staging(&self, num_slots: usize, slot_bytes: usize) -> Result<Ring, BackendError> {
        Ok(make!(self.staging(num_slots, slot_bytes)))
    }

    fn stage(&self, ring: &mut Ring, slot: usize, sources: Vec<StagedSource<Weight>>) -> Result<(), BackendError> {
        delegate!(self.stage(ring, slot, sources))
    }

    fn staged(&self, ring: &mut Ring, slot: usize) -> Result<Vec<Weight>, BackendError> {
        Ok(match self {
            Self::Cpu(cpu) => cpu.staged(ring.for_cpu("staged")?, slot)?.into_iter().map(Either::Cpu).collect(),
            Self::Cuda(cuda) => cuda.staged(ring.for_cuda("staged")?, slot)?.into_iter().map(Either::Cuda).collect(),
        })
    }

    fn write(&self, values: &[f32], buffer: &mut Buffer, first_row: usize) -> Result<(), BackendError> {
        delegate!(self.write(values, buffer, first_row))
    }

    fn read(&self, buffer: &Buffer, rows: Range<usize>) -> Result<Vec<f32>, BackendError> {
        delegate!(self.read(buffer, rows))
    }

    fn outbox(&self, bytes: usize) -> Result<Outbox, BackendError> {
        Ok(make!(self.outbox(bytes)))
    }

    fn send(&self, outbox: &Outbox, buffer: &Buffer, rows: Range<usize>) -> Result<Parcel, BackendError> {
        Parcel::pack(self, outbox, buffer, rows)
    }

    fn receive(&self, parcel: Parcel, buffer: &mut Buffer, first_row: usize) -> Result<(), BackendError> {
        parcel.unpack(self, buffer, first_row)
    }

    fn copy_rows(
        &self, source: &Buffer, rows: Range<usize>, destination: &mut Buffer, first_row: usize,
    ) -> Result<(), BackendError> {
        delegate!(self.copy_rows(source, rows, destination, first_row))
    }

    fn tables(&self, limits: &StepLimits) -> Result<Tables, BackendError> {
        Ok(make!(self.tables(limits)))
    }

    fn set_batch(&self, tables: &mut Tables, batch: &Batch) -> Result<(), BackendError> {
        delegate!(self.set_batch(tables, batch))
    }

    fn moment(&self) -> Result<Moment, BackendError> {
        Ok(make!(self.moment()))
    }

    fn has_come(&self, moment: &Moment) -> Result<bool, BackendError> {
        delegate!(self.has_come(moment))
    }

    fn elapsed(&self, from: &Moment, to: &Moment) -> Result<Duration, BackendError> {
        delegate!(self.elapsed(from, to))
    }

    fn synchronize(&self) -> Result<(), BackendError> {
        delegate!(self.synchronize())
    }

    fn replay(&self, key: u64, operations: &mut dyn FnMut() -> Result<(), BackendError>) -> Result<(), BackendError> {
        match self {
            Self::Cpu(cpu) => cpu.replay(key, operations),
            Self::Cuda(cuda) => cuda.replay(key, operations),
        }
    }

    fn embed(&self, table: &Weight, ids: &[u32], hidden: &mut Buffer) -> Result<(), BackendError> {
        delegate!(self.embed(table, ids, hidden))
    }

    fn rms_norm(
        &self, x: &Buffer, weight: &Weight, eps: f32, rows: usize, out: &mut Buffer,
    ) -> Result<(), BackendError> {
        delegate!(self.rms_norm(x, weight, eps, rows, out))
    }

    fn rms_norm_logit_rows(
        &self, x: &Buffer, weight: &Weight, eps: f32, tables: &Tables, out: &mut Buffer,
    ) -> Result<(), BackendError> {
        delegate!(self.rms_norm_logit_rows(x, weight, eps, tables, out))
    }

    fn qkv_rope_append(
        &self, x: &Buffer, weights: ExpertWeights<'_, Weight>, ranges: &[ExpertRange], heads: HeadGeometry,
        rope: &Buffer, mode: RopeMode, tables: &Tables, query: &mut Buffer, kv: &mut Buffer,
    ) -> Result<(), BackendError> {
        delegate!(self.qkv_rope_append(x, weights, ranges, heads, rope, mode, tables, query, kv))
    }

    fn attention(
        &self, query: &Buffer, kv: &Buffer, heads: HeadGeometry, tables: &Tables, out: &mut Buffer,
    ) -> Result<(), BackendError> {
        delegate!(self.attention(query, kv, heads, tables, out))
    }

    fn linear_residual(
        &self, x: &Buffer, weights: ExpertWeights<'_, Weight>, ranges: &[ExpertRange], residual: &mut Buffer,
    ) -> Result<(), BackendError> {
        delegate!(self.linear_residual(x, weights, ranges, residual))
    }

    fn gate_up(
        &self, x: &Buffer, gate: ExpertWeights<'_, Weight>, up: ExpertWeights<'_, Weight>, ranges: &[ExpertRange],
        out: &mut Buffer,
    ) -> Result<(), BackendError> {
        delegate!(self.gate_up(x, gate, up, ranges, out))
    }

    fn logits(&self, x: &Buffer, weight: &Weight, rows: usize, logits: &mut Buffer) -> Result<(), BackendError> {
        delegate!(self.logits(x, weight, rows, logits))
    }

    fn sample(&self, logits: &Buffer, requests: &[SampleRequest<'_>]) -> Result<Sampled, BackendError> {
        Ok(make!(self.sample(logits, requests)))
    }

    fn sampled(&self, tokens: &Sampled) -> Result<Vec<u32>, BackendError> {
        delegate!(self.sampled(tokens))
    }

    fn embed_sampled(&self, table: &Weight, tokens: &Sampled, hidden: &mut Buffer) -> Result<(), BackendError> {
        delegate!(self.embed_sampled(table, tokens, hidden))
    }

    fn patch_embed(
        &self, pixels: &Buffer, weights: PatchWeights<'_, Weight>, geometry: PatchGeometry, out: &mut Buffer,
    ) -> Result<(), BackendError> {
        delegate!(self.patch_embed(pixels, weights, geometry, out))
    }

    fn linear(
        &self, x: &Buffer, weight: &Weight, bias: Option<&Weight>, activation: Activation, rows: usize,
        out: &mut Buffer,
    ) -> Result<(), BackendError> {
        delegate!(self.linear(x, weight, bias, activation, rows, out))
    }

    fn image_attention(
        &self, qkv: &Buffer, num_images: usize, num_tokens: usize, heads: HeadGeometry, out: &mut Buffer,
    ) -> Result<(), BackendError> {
        delegate!(self.image_attention(qkv, num_images, num_tokens, heads, out))
    }

    fn layer_norm_residual(
        &self, branch: &Buffer, weight: &Weight, bias: &Weight, eps: f32, rows: usize, residual: &mut Buffer,
    ) -> Result<(), BackendError> {
        delegate!(self.layer_norm_residual(branch, weight, bias, eps, rows, residual))
    }

    fn layer_norm_gelu(
        &self, x: &mut Buffer, weight: &Weight, bias: &Weight, eps: f32, rows: usize,
    ) -> Result<(), BackendError> {
        delegate!(self.layer_norm_gelu(x, weight, bias, eps, rows))
    }

    fn copy_weight_rows(
        &self, weight: &Weight, destination: &mut Buffer, first_row: usize,
    ) -> Result<(), BackendError> {
        delegate!(self.copy_weight_rows(weight, destination, first_row))
    }
}
