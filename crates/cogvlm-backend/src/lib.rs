//! The operations of the model, in the fused form in which a GPU wants them.
//!
//! [`Backend`] is one device as the model sees it: memory, weights, operations. Every backend passes the same
//! [`conformance`] suite, which compares it with the plain functions of [`oracle`].
#![forbid(unsafe_code)]

pub mod arena;
pub mod batch;
pub mod conformance;
pub mod error;
pub mod oracle;
pub mod rope;
pub mod sampling;
pub mod shape;
pub mod shardable;
pub mod shared_memory;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use cogvlm_core::sharing::Sharing;
use cogvlm_core::tokens::ExpertRange;
use cogvlm_core::workspace::BufferKind;
use cogvlm_core::{DType, Device, TensorSpec};

pub use arena::{Arena, Lease, MemoryUse};
pub use batch::{Batch, SequenceRows};
pub use error::{BackendError, HostReadError};
pub use rope::RopeMode;
pub use sampling::{SampleRequest, SamplingParams};
pub use shardable::{FollowingNorm, Shardable};
pub use shared_memory::SharedMemory;

/// A weight where it rests on the host: in a mapped file, or as a rule that makes it.
pub trait HostTensor: Send + Sync {
    /// Its published name, for messages.
    fn name(&self) -> &str;
    /// Element type it is stored in.
    fn dtype(&self) -> DType;
    /// Its shape.
    fn shape(&self) -> &[usize];
    /// Its bytes, row-major and little-endian, where they lie in mapped memory; `None` where they have to be made.
    /// They need not be aligned.
    fn mapped(&self) -> Option<&[u8]>;
    /// Where its bytes lie in mapped memory, in their order, also where they do not follow each other there.
    fn mapped_rows(&self) -> Option<Vec<MappedRows<'_>>> {
        self.mapped().map(|bytes| vec![MappedRows::one(bytes)])
    }
    /// Writes its bytes to `destination`, which is exactly as long.
    ///
    /// # Errors
    /// Where the file changed or cannot be read any more.
    fn read_into(&self, destination: &mut [u8]) -> Result<(), HostReadError>;
    /// Writes its bytes from `offset` on to `destination`; both are whole elements and lie within it. May be called by
    /// several threads at a time.
    ///
    /// # Errors
    /// As [`read_into`](Self::read_into).
    fn read_at(&self, offset: usize, destination: &mut [u8]) -> Result<(), HostReadError> {
        let wanted = offset..offset + destination.len();
        if let Some(bytes) = self.mapped() {
            destination.copy_from_slice(&bytes[wanted]);
            return Ok(());
        }
        let mut bytes = vec![0; self.shape().iter().product::<usize>() * self.dtype().size_bytes()];
        self.read_into(&mut bytes)?;
        destination.copy_from_slice(&bytes[wanted]);
        Ok(())
    }
    /// Asks the system to read it ahead; a hint.
    fn read_ahead(&self) {}
    /// The whole mapping that [`mapped`](Self::mapped) is a part of, from its first page on: what a device registers
    /// with its driver to copy from it at the full rate of the link. `None` where the bytes lie in ordinary memory.
    fn mapping(&self) -> Option<&[u8]> {
        None
    }
    /// Checks that what [`mapped`](Self::mapped) gives is still what it was at first.
    ///
    /// # Errors
    /// Where the file was written to.
    fn verify(&self) -> Result<(), HostReadError> {
        Ok(())
    }
    /// How its elements are made, where a rule makes them: a device that knows the rule makes them in place. Such a
    /// tensor is bf16.
    fn rule(&self) -> Option<ElementRule> {
        None
    }
}

/// Rows of equal length in mapped memory, equally far from each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MappedRows<'a> {
    /// From the first byte of the first row to the last one of the last row.
    pub bytes: &'a [u8],
    /// Bytes of a row.
    pub width: usize,
    /// Bytes from the begin of a row to that of the next one.
    pub pitch: usize,
}

impl<'a> MappedRows<'a> {
    /// A row by itself.
    pub fn one(bytes: &'a [u8]) -> Self {
        Self { bytes, width: bytes.len(), pitch: bytes.len() }
    }

    /// How many they are.
    pub fn num_rows(&self) -> usize {
        if self.width == 0 { 0 } else { (self.bytes.len() - self.width) / self.pitch + 1 }
    }
}

/// How the elements of a synthetic tensor are made, all in u64 and f32: element `i` is
/// `bf16(base + amplitude * u(key + i * 0x9E3779B97F4A7C15))` with `u` the top 24 bits of SplitMix64's output function
/// as a number in [-1, 1). A mixture adds up `u` of another tensor's rows before the amplitude. Every product and every
/// sum is rounded by itself; [`oracle::made_element`] says it in full.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ElementRule {
    /// State of the generator at element 0: of this tensor, or of the one whose rows are mixed.
    pub key: u64,
    /// Added at the end.
    pub base: f32,
    /// Scales the random number.
    pub amplitude: f32,
    /// For `lm_head.weight`: each row mixes four rows of the embedding.
    pub mixes_rows: bool,
}

/// A shared [`HostTensor`].
pub type HostWeight = Arc<dyn HostTensor>;

/// The weights that one expert-ranged operation may need. `None` for an expert that has no rows in the ranges given:
/// it is not read, and need not be there. An expert that has rows and no weight is refused.
#[derive(Debug)]
pub struct ExpertWeights<'a, W> {
    /// Weights of the language expert.
    pub language: Option<&'a W>,
    /// Weights of the vision expert.
    pub vision: Option<&'a W>,
}

impl<W> Clone for ExpertWeights<'_, W> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<W> Copy for ExpertWeights<'_, W> {}

/// What a plain linear applies to its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    Identity,
    /// `x/2 (1 + erf(x / sqrt 2))`
    Gelu,
}

/// Weights of the patch embedding.
#[derive(Debug)]
pub struct PatchWeights<'a, W> {
    /// `[width, channels, patch, patch]`
    pub projection: &'a W,
    /// `[width]`
    pub bias: &'a W,
    /// Class token, `[1, width]`
    pub class: &'a W,
    /// `[patches + 1, width]`
    pub position: &'a W,
}

/// Sizes of the images that the patch embedding cuts up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PatchGeometry {
    /// Images in the pixel buffer.
    pub num_images: usize,
    /// Channels of an image.
    pub num_channels: usize,
    /// Side of an image.
    pub image_size: usize,
    /// Side of a patch.
    pub patch_size: usize,
}

/// Head counts and head width of an attention. Query head `h` uses key/value head `h / (num_heads / num_kv_heads)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadGeometry {
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

/// What a buffer is in the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BufferRole {
    /// One of the workspace.
    Workspace(BufferKind),
    /// The KV cache of a decoder layer.
    Kv,
}

/// Weights of one streamed group on their way into a staging slot.
pub enum StagedSource<W> {
    /// From host memory or the mapped file.
    Host(HostWeight),
    /// From another device of the same backend, where it is resident.
    Peer(W),
}

/// One device: its memory, and the operations of the model on it.
///
/// Activations have the type [`activation_dtype`](Self::activation_dtype); sums are accumulated in f32 or better;
/// each result is rounded once, where it is stored, except where an operation says otherwise. A buffer is two
/// dimensional and row-major; operations read and write its first rows and leave the others alone. `rows` never
/// exceeds the rows of any buffer passed: an operation refuses shapes that do not fit with [`BackendError::Shape`].
///
/// Weights come as bf16, f16 or f32, whatever the activations are. Those of a wider type than the activations may be
/// rounded to it before use, as the reference model's are when it is loaded; where a weight rests, and how it came
/// there, changes no bit of a result.
///
/// The same call gives the same bits on every device of one kind, so that cutting the model into stages changes
/// nothing. Which other rows share a call may change the last bits of a row.
pub trait Backend: Send + Sync + 'static {
    /// A mutable array on the device, taken from the device's arena and returned to it on drop.
    type Buffer: Send;
    /// A weight that operations can read. Clones share the memory.
    type Weight: Clone + Send + Sync + 'static;
    /// The device's copy of a [`Batch`].
    type Tables: Send;
    /// Slots through which weights are streamed.
    type Ring: Send;
    /// Rows on their way to another device.
    type Parcel: Send;
    /// Memory that parcels are made of.
    type Outbox: Send + Sync;
    /// A point in the device's time.
    type Moment: Send;
    /// Tokens that the device chose. Clones share them.
    type Sampled: Clone + Send + 'static;

    // ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────

    /// Element type of activations and KV cache.
    fn activation_dtype(&self) -> DType;

    /// What the device's arena holds, held at most, and may hold.
    fn memory(&self) -> MemoryUse;

    /// [`memory`](Self::memory) of each device, where the backend of `device` is several.
    fn memory_by_device(&self, device: Device) -> Vec<(Device, MemoryUse)> {
        vec![(device, self.memory())]
    }

    /// Takes a zeroed buffer from the arena. `what` names it in an error.
    fn alloc(&self, what: &'static str, dtype: DType, shape: [usize; 2]) -> Result<Self::Buffer, BackendError>;

    /// As [`alloc`](Self::alloc), of a buffer that is `role` in the model: several devices that compute together decide
    /// by that who has what of it.
    fn alloc_for(
        &self, _role: BufferRole, what: &'static str, dtype: DType, shape: [usize; 2],
    ) -> Result<Self::Buffer, BackendError> {
        self.alloc(what, dtype, shape)
    }

    /// As [`alloc`](Self::alloc), in host memory that other devices of the process can use too
    /// ([`share`](Self::share)): devices that compute on the host have it.
    fn alloc_shared(
        &self, _what: &'static str, _dtype: DType, _shape: [usize; 2],
    ) -> Result<Self::Buffer, BackendError> {
        Err(shape::unsupported("alloc_shared", "memory for several devices is taken by those that compute on the host"))
    }

    /// What [`alloc_shared`](Self::alloc_shared) of another device gave, as a buffer of this one; the arena has nothing
    /// of it. What operations of either device write to it, operations of the other find there that are called once the
    /// first are done; [`qkv_rope_append`](Self::qkv_rope_append) and [`attention`](Self::attention) take such a buffer
    /// as `kv`.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`] for another kind of buffer; [`BackendError::Device`] where the system does not let
    /// the device use the memory.
    fn share(&self, _buffer: &Self::Buffer) -> Result<Self::Buffer, BackendError> {
        Err(shape::unsupported("share", "this backend has no memory in common with others"))
    }

    /// Copies a weight into the device's memory.
    fn load(&self, weight: &HostWeight) -> Result<Self::Weight, BackendError>;

    /// As [`load`](Self::load), of a weight that is `tensor` of the model: several devices that compute together decide
    /// by that who has what of it.
    fn load_for(&self, _tensor: &TensorSpec, weight: &HostWeight) -> Result<Self::Weight, BackendError> {
        self.load(weight)
    }

    /// A weight used where it rests on the host. Every backend can [`embed`](Self::embed) from it; whether other
    /// operations take it is the backend's own affair (the CPU's do; others answer [`BackendError::Unsupported`]). It
    /// takes nothing from the arena.
    fn attach(&self, weight: &HostWeight) -> Result<Self::Weight, BackendError>;

    /// Gets ready to stream `weights` from host memory again and again. A hint, given once before they are staged first.
    fn prepare_streaming(&self, _weights: &[HostWeight]) {}

    /// Takes `num_slots` staging slots of `slot_bytes` from the arena. A slot has room for weights whose sizes, each
    /// rounded up to 256 bytes, are `slot_bytes` together.
    fn staging(&self, num_slots: usize, slot_bytes: usize) -> Result<Self::Ring, BackendError>;

    /// Begins to copy `sources` into slot `slot` and returns. Nobody may still hold weights of what the slot held
    /// before. A slot or a size that does not fit is refused and leaves the slot as it was; a source that cannot be
    /// read is an error here or of [`staged`](Self::staged).
    fn stage(
        &self, ring: &mut Self::Ring, slot: usize, sources: Vec<StagedSource<Self::Weight>>,
    ) -> Result<(), BackendError>;

    /// As [`stage`](Self::stage), of weights that devices which compute together share by `sharing`.
    fn stage_for(
        &self, _sharing: Sharing, ring: &mut Self::Ring, slot: usize, sources: Vec<StagedSource<Self::Weight>>,
    ) -> Result<(), BackendError> {
        self.stage(ring, slot, sources)
    }

    /// The weights that were last staged into `slot`, in the order given, once they are there.
    fn staged(&self, ring: &mut Self::Ring, slot: usize) -> Result<Vec<Self::Weight>, BackendError>;

    /// Copies `values` into rows `first_row..` of `buffer`, rounding to its type.
    fn write(&self, values: &[f32], buffer: &mut Self::Buffer, first_row: usize) -> Result<(), BackendError>;

    /// The given rows as f32.
    fn read(&self, buffer: &Self::Buffer, rows: Range<usize>) -> Result<Vec<f32>, BackendError>;

    /// Takes `bytes` from the arena for parcels.
    fn outbox(&self, bytes: usize) -> Result<Self::Outbox, BackendError>;

    /// Takes rows along to another device, as they are now: what is written to `buffer` later does not reach the
    /// parcel. Waits while the outbox is full of parcels that nobody has received yet.
    fn send(
        &self, outbox: &Self::Outbox, buffer: &Self::Buffer, rows: Range<usize>,
    ) -> Result<Self::Parcel, BackendError>;

    /// Unpacks what another device sent into rows `first_row..`. On a GPU nothing waits but the stream of the operations.
    fn receive(&self, parcel: Self::Parcel, buffer: &mut Self::Buffer, first_row: usize) -> Result<(), BackendError>;

    /// Copies `rows` of `source` to rows `first_row..` of `destination`; same width, same type.
    fn copy_rows(
        &self, source: &Self::Buffer, rows: Range<usize>, destination: &mut Self::Buffer, first_row: usize,
    ) -> Result<(), BackendError>;

    /// Tables for batches of up to the given sizes.
    fn tables(&self, limits: &cogvlm_core::workspace::StepLimits) -> Result<Self::Tables, BackendError>;

    /// Makes `batch` the one that `tables` describe. A batch without rows is one too.
    ///
    /// # Errors
    /// [`BackendError::Shape`] where the batch exceeds the limits of the tables; where its sequences do not cover its
    /// rows in order, have contexts shorter than their rows, or have too few blocks; where a row has no position id, or
    /// logits are wanted of one that is not there. Blocks and positions that a cache or a table of angles lacks are
    /// refused by the operation that would use them.
    fn set_batch(&self, tables: &mut Self::Tables, batch: &Batch) -> Result<(), BackendError>;

    // ── running ─────────────────────────────────────────────────────────────────────────────────────────────────

    /// Does what operations called so far have put off until it is known what follows them.
    fn settle(&self) -> Result<(), BackendError> {
        Ok(())
    }

    /// The moment at which everything called so far is done.
    fn moment(&self) -> Result<Self::Moment, BackendError>;

    /// Whether a moment has come. Waits for nothing.
    fn has_come(&self, moment: &Self::Moment) -> Result<bool, BackendError>;

    /// The time between two moments, once both have come.
    fn elapsed(&self, from: &Self::Moment, to: &Self::Moment) -> Result<Duration, BackendError>;

    /// Waits until everything called so far is done.
    fn synchronize(&self) -> Result<(), BackendError> {
        Ok(())
    }

    /// Runs `operations`, or what was recorded when they were run before under the same `key`.
    ///
    /// All that the operations are called with, weights and buffers and numbers, must be the same each time; what differs
    /// from step to step is in tables. They must not read, write, load, stage, embed, sample, send or receive. Buffers
    /// and weights named by a recording must live as long as it is run. A recording checks nothing: that no batch names
    /// blocks or positions that cache and angles lack is the caller's to see to.
    fn replay(&self, _key: u64, operations: &mut dyn FnMut() -> Result<(), BackendError>) -> Result<(), BackendError> {
        operations()
    }

    // ── decoder ─────────────────────────────────────────────────────────────────────────────────────────────────

    /// `hidden[i] = table[ids[i]]`, rounded; table `[vocab_size, hidden_size]`, whose ids may not be exceeded.
    fn embed(&self, table: &Self::Weight, ids: &[u32], hidden: &mut Self::Buffer) -> Result<(), BackendError>;

    /// `out = weight * x / sqrt(mean(x²) + eps)` on the first `rows` rows, one rounding.
    fn rms_norm(
        &self, x: &Self::Buffer, weight: &Self::Weight, eps: f32, rows: usize, out: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// As [`rms_norm`](Self::rms_norm), of the rows that the batch wants logits of: `out[i] = norm(x[logit_rows[i]])`.
    fn rms_norm_logit_rows(
        &self, x: &Self::Buffer, weight: &Self::Weight, eps: f32, tables: &Self::Tables, out: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// `[q | k | v] = x Wᵀ` with the weight of each row's expert, rounded; then q and k rotated by the row's position
    /// id and rounded; q to `query`, k and v to the row's slot of the paged cache `kv`.
    ///
    /// W `[(num_heads + 2 num_kv_heads) * head_dim, hidden_size]`; `rope` f32 `[positions, head_dim]`, each row the
    /// cosines, then the sines ([`rope::table`]); `kv` `[num_blocks, 2 * num_kv_heads * BLOCK_LEN * head_dim]`, each
    /// row `[key/value][num_kv_heads][BLOCK_LEN][head_dim]`. With [`RopeMode::Published`] the two products of a
    /// rotation are rounded before their sum is.
    #[expect(clippy::too_many_arguments, reason = "one fused operation, as a GPU runs it")]
    fn qkv_rope_append(
        &self, x: &Self::Buffer, weights: ExpertWeights<'_, Self::Weight>, ranges: &[ExpertRange], heads: HeadGeometry,
        rope: &Self::Buffer, mode: RopeMode, tables: &Self::Tables, query: &mut Self::Buffer, kv: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// Causal softmax attention of every sequence of the batch over its paged cache, scale `head_dim^-½`; scores and
    /// softmax in f32, though the probabilities may be rounded before the product with the values. Row `j` of a
    /// sequence's rows sees the keys up to its own; slots beyond are not read, or have no effect.
    fn attention(
        &self, query: &Self::Buffer, kv: &Self::Buffer, heads: HeadGeometry, tables: &Self::Tables,
        out: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// `residual += x Wᵀ` with the weight of each row's expert; the product is rounded, then the sum.
    fn linear_residual(
        &self, x: &Self::Buffer, weights: ExpertWeights<'_, Self::Weight>, ranges: &[ExpertRange],
        residual: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// `out = silu(x Gᵀ) * (x Uᵀ)` with the weights of each row's expert; rounded: both products, the silu, the result.
    fn gate_up(
        &self, x: &Self::Buffer, gate: ExpertWeights<'_, Self::Weight>, up: ExpertWeights<'_, Self::Weight>,
        ranges: &[ExpertRange], out: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// `logits = x Wᵀ` for the first `rows` rows, rounded to the activation type, stored as f32.
    fn logits(
        &self, x: &Self::Buffer, weight: &Self::Weight, rows: usize, logits: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// Chooses one token for each of the first rows of `logits` ([`sampling::sample`] says which). They are on the device
    /// for [`embed_sampled`](Self::embed_sampled), and on their way to the host: nobody waits for them here.
    fn sample(&self, logits: &Self::Buffer, requests: &[SampleRequest<'_>]) -> Result<Self::Sampled, BackendError>;

    /// The tokens, in the order of the requests, once they are here.
    fn sampled(&self, tokens: &Self::Sampled) -> Result<Vec<u32>, BackendError>;

    /// As [`embed`](Self::embed), of tokens that this device chose. What waits for them, if anything has to, is the
    /// device, unless the table rests on the host.
    fn embed_sampled(
        &self, table: &Self::Weight, tokens: &Self::Sampled, hidden: &mut Self::Buffer,
    ) -> Result<(), BackendError> {
        self.embed(table, &self.sampled(tokens)?, hidden)
    }

    // ── vision ──────────────────────────────────────────────────────────────────────────────────────────────────

    /// Cuts images into patches and embeds them: per image the class token, then the patches row by row,
    /// `patch · Wᵀ + bias` (rounded), each plus its position embedding (rounded). `pixels`
    /// `[num_images, channels * size * size]`, `out` `[num_images * (patches + 1), width]`.
    fn patch_embed(
        &self, pixels: &Self::Buffer, weights: PatchWeights<'_, Self::Weight>, geometry: PatchGeometry,
        out: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// `out = activation(x Wᵀ + bias)` on the first `rows` rows; rounded after the bias, and after the activation.
    fn linear(
        &self, x: &Self::Buffer, weight: &Self::Weight, bias: Option<&Self::Weight>, activation: Activation,
        rows: usize, out: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// Full softmax attention inside each image, in the arithmetic of [`attention`](Self::attention), with as many
    /// key/value heads as query heads. `qkv` `[num_images * num_tokens, 3 * heads * head_dim]`, rows
    /// `[q | k | v]`; `out` `[num_images * num_tokens, heads * head_dim]`.
    fn image_attention(
        &self, qkv: &Self::Buffer, num_images: usize, num_tokens: usize, heads: HeadGeometry, out: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// `residual += layer_norm(branch)`; rounded: the norm, the sum.
    ///
    /// The norm is `weight * (x - mean) / sqrt(variance + eps) + bias`; the variance is the mean of `(x - mean)²`,
    /// computed so that a large mean costs it no digits.
    fn layer_norm_residual(
        &self, branch: &Self::Buffer, weight: &Self::Weight, bias: &Self::Weight, eps: f32, rows: usize,
        residual: &mut Self::Buffer,
    ) -> Result<(), BackendError>;

    /// `x = gelu(layer_norm(x))` in place, the norm as in [`layer_norm_residual`](Self::layer_norm_residual); rounded:
    /// the norm, the gelu.
    fn layer_norm_gelu(
        &self, x: &mut Self::Buffer, weight: &Self::Weight, bias: &Self::Weight, eps: f32, rows: usize,
    ) -> Result<(), BackendError>;

    /// Copies a weight of `[.., width]`, rounded, as rows into `first_row..` of `destination` (BOI and EOI beside the
    /// patches).
    fn copy_weight_rows(
        &self, weight: &Self::Weight, destination: &mut Self::Buffer, first_row: usize,
    ) -> Result<(), BackendError>;
}

/// Rows in host memory, on their way to another process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostRows {
    /// Element type.
    pub dtype: DType,
    /// Elements of a row.
    pub columns: usize,
    /// The rows, little-endian.
    pub bytes: Vec<u8>,
}

/// A backend whose parcels can leave the process.
pub trait Portable: Backend {
    /// The rows of a parcel, once they are there.
    fn pack(&self, parcel: Self::Parcel) -> Result<HostRows, BackendError>;

    /// A parcel of rows that came from another process; it gives what the other one packed.
    fn unpack(&self, rows: HostRows) -> Result<Self::Parcel, BackendError>;
}

/// Type and shape of rows that are on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowsLayout {
    /// Element type.
    pub dtype: DType,
    /// Rows.
    pub rows: usize,
    /// Elements of a row.
    pub columns: usize,
}

impl RowsLayout {
    /// Bytes of all rows.
    pub fn num_bytes(&self) -> usize {
        self.rows * self.columns * self.dtype.size_bytes()
    }
}

/// One end of a way from a device of one process to a device of another, on which rows go from memory to memory without
/// passing through the host. Layouts do not travel along: the caller tells them, in the order in which rows are sent.
pub trait DeviceChannel<B: Backend>: Send + Sync {
    /// Sends the rows of a parcel of this end's device. Returns at once; they leave when the other end receives them.
    ///
    /// # Errors
    /// Where the channel or the device fails.
    fn send(&self, parcel: B::Parcel) -> Result<RowsLayout, BackendError>;

    /// The parcel of the rows that come next, which have this layout. The device of this end receives all parcels in the
    /// order of these calls: rows that it does not receive break the channel.
    ///
    /// # Errors
    /// Where the channel has failed.
    fn receive(&self, layout: RowsLayout) -> Result<B::Parcel, BackendError>;

    /// An error if the channel has failed; to be asked now and then, since what is under way cannot tell.
    ///
    /// # Errors
    /// What went wrong.
    fn check(&self) -> Result<(), BackendError>;

    /// Ends the channel. What has not arrived by then does not, and whatever waits for it is released.
    fn close(&self);
}
