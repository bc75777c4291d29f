//! What planning takes and what it gives.

use cogvlm_core::memory::MIB;
use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{DType, Device, ModelSpec, TensorSpec, Unit};
use serde::{Deserialize, Serialize};

use crate::error::PlanError;
use crate::links::Links;
use crate::own::sizes::Sizes;

/// How units and weights are placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// `latency` for one sequence, `throughput` for more.
    Auto,
    /// Even free memory and even work on all cards.
    Balanced,
    /// Hot weights and KV on as few cards as hold them, so that decoding makes as few hops as possible.
    Latency,
    /// Stages of equal decode time, so that several sequences keep every card busy.
    Throughput,
    /// Exactly the map that accelerate's `infer_auto_device_map` computes.
    Accelerate,
}

/// Memory of one device that this run may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceBudget {
    /// The device.
    pub device: Device,
    /// Its budget. For [`Device::Disk`] it is not a limit: the files are there already.
    pub bytes: u64,
}

/// What a CUDA process holds on a card beside what it allocates: context, module images, library handles. Between 300
/// and 550 MiB on the drivers and cards in use; the rest is margin.
pub const CUDA_RESERVE_BYTES: u64 = 600 * MIB;
/// Bytes of host memory for which a card that streams from it needs a byte more: what the driver keeps for each page that
/// is registered. 16.2 GB took 50 MB, 20.4 GB took 60 MB of an H100 (driver 580).
const HOST_BYTES_PER_RESERVED_BYTE: u64 = 384;

/// What NCCL may take of a card beside that, where it joins it to cards of other processes: its kernels, and buffers of
/// each of its few channels. Of two H200, NCCL 2.28.9 took 546 MiB each for a channel in each direction. How much it took
/// is logged when a channel is opened.
pub const NCCL_RESERVE_BYTES: u64 = 640 * MIB;

/// The same for a virtual rank of the CPU backend, which holds nothing but its arena.
pub const VIRTUAL_RANK_RESERVE_BYTES: u64 = 0;

/// Everything a plan depends on.
#[derive(Debug, Clone)]
pub struct PlanRequest {
    /// Name of the model, for the report.
    pub model: String,
    /// Its sizes.
    pub spec: ModelSpec,
    /// Element type of the weights as they are stored, which is how they rest and travel.
    pub weight_dtype: DType,
    /// Element type of activations and KV cache.
    pub activation_dtype: DType,
    /// Devices and their budgets, each device once.
    pub budgets: Vec<DeviceBudget>,
    /// How to place.
    pub policy: Policy,
    /// The largest step, and the sequences that the KV cache is made for.
    pub limits: StepLimits,
    /// Bytes set aside on every card for what is not ours to place: the CUDA context, library handles, kernel images. A
    /// card that has such a reserve is also left what it needs to stream from host memory.
    pub reserve_bytes: u64,
    /// Rates of the machine.
    pub links: Links,
}

/// Most tokens of a sequence and of a step that can be planned for.
pub const MAX_CONTEXT: usize = 1 << 20;
/// Most sequences and most images of a step that can be planned for.
pub const MAX_BATCH: usize = 1 << 12;

impl PlanRequest {
    /// The policy, `auto` resolved.
    pub(crate) fn resolved_policy(&self) -> Result<Policy, PlanError> {
        match self.policy {
            Policy::Auto if self.limits.max_sequences > 1 => Ok(Policy::Throughput),
            Policy::Auto => Ok(Policy::Latency),
            Policy::Accelerate => Err(PlanError::Accelerate),
            policy => Ok(policy),
        }
    }

    /// What the model takes under this request.
    pub(crate) fn sizes(&self) -> Sizes {
        Sizes::new(&self.spec, self.weight_dtype, self.activation_dtype, limits_on(self.limits, &self.budgets))
    }

    /// What stays free on every card: the reserve, and what the driver keeps of host memory that it locks, as much as may
    /// rest off the cards, KV cache of layers that a card prefills for the host included.
    pub(crate) fn card_reserve_bytes(&self, sizes: &Sizes) -> u64 {
        if self.reserve_bytes == 0 {
            return 0;
        }
        let weight_bytes: u64 = sizes.groups.iter().map(|group| group.bytes).sum();
        let most = weight_bytes.saturating_add(sizes.kv_bytes(&(0..sizes.units.len())));
        let locked = self.budgets.iter().map(|budget| match budget.device {
            Device::Gpu(_) => 0,
            Device::Cpu => budget.bytes.min(most),
            Device::Disk => weight_bytes,
        });
        let locked = locked.sum::<u64>().min(most);
        let for_pages = locked.div_ceil(HOST_BYTES_PER_RESERVED_BYTE).next_multiple_of(MIB);
        self.reserve_bytes.saturating_add(for_pages)
    }

    /// Refuses what no search can meet.
    pub(crate) fn check(&self) -> Result<(), PlanError> {
        check_limits(&self.limits)?;
        check_budgets(&self.budgets)
    }
}

/// `limits` of a run on the devices of `budgets`, of which every one but the disk may be a rank.
pub(crate) fn limits_on(limits: StepLimits, budgets: &[DeviceBudget]) -> StepLimits {
    limits.among(budgets.iter().filter(|budget| budget.device.executes()).count())
}

/// Refuses limits that no run can have.
pub(crate) fn check_limits(limits: &StepLimits) -> Result<(), PlanError> {
    for (flag, value, low, high) in [
        ("--context", limits.context_len, 1, MAX_CONTEXT),
        ("--batch", limits.max_sequences, 1, MAX_BATCH),
        ("tokens of a step", limits.max_tokens, limits.max_sequences, MAX_CONTEXT),
        ("images of a step", limits.max_images, 0, MAX_BATCH),
    ] {
        if !(low..=high).contains(&value) {
            return Err(PlanError::Limit { flag, value, low, high });
        }
    }
    Ok(())
}

/// Refuses budgets that hold nothing or contradict each other.
pub(crate) fn check_budgets(budgets: &[DeviceBudget]) -> Result<(), PlanError> {
    for (index, budget) in budgets.iter().enumerate() {
        let device = budget.device;
        if budgets[..index].iter().any(|other| other.device == device) {
            return Err(PlanError::DuplicateDevice { device });
        }
        if budget.bytes == 0 && device.executes() {
            return Err(PlanError::ZeroBudget { device });
        }
    }
    if budgets.iter().any(|budget| budget.device.executes()) { Ok(()) } else { Err(PlanError::NoDevice) }
}

/// Where a tensor rests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Residency {
    /// In the memory of the device that executes its unit.
    Device,
    /// On another card, from which it is streamed when needed.
    Peer(Device),
    /// In host memory: the registered mapping of the checkpoint. Streamed when needed; used in place by units that
    /// execute on the host, and by the embedding, of which only the rows asked for travel.
    Host,
    /// In the mapped file only, read and streamed when needed.
    File,
}

impl Residency {
    /// The place where a tensor rests whose unit executes on `executes_on`.
    pub fn place(self, executes_on: Device) -> Device {
        match self {
            Self::Device => executes_on,
            Self::Peer(device) => device,
            Self::Host => Device::Cpu,
            Self::File => Device::Disk,
        }
    }
}

/// Where one tensor rests and who executes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorPlacement {
    /// The tensor.
    pub tensor: TensorSpec,
    /// Device that executes its unit.
    pub executes_on: Device,
    /// Where it rests.
    pub residency: Residency,
    /// Bytes it occupies there.
    pub bytes: u64,
}

/// Consecutive units that one device executes. One device may have several stages (part of the ViT, then part of the
/// decoder).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StagePlan {
    /// The device.
    pub device: Device,
    /// Its units, consecutive in the order of execution.
    pub units: Vec<Unit>,
}

impl StagePlan {
    /// Consecutive units of one device become a stage.
    pub(crate) fn join(units: impl Iterator<Item = (Device, Unit)>) -> Vec<Self> {
        let mut stages: Vec<Self> = Vec::new();
        for (device, unit) in units {
            match stages.last_mut() {
                Some(stage) if stage.device == device => stage.units.push(unit),
                _ => stages.push(Self { device, units: vec![unit] }),
            }
        }
        stages
    }
}

/// Prompts on another device than decoding: a card executes the embedding and the decoder layers of the host in steps of
/// many rows, where it computes so much faster that it is worth streaming their weights to it. The KV cache of these
/// layers lies in host memory, which both use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prefill {
    /// The card.
    pub device: Device,
    /// Rows from which on it is the card's turn. Prompts with images are the card's, however short; steps of one row for
    /// each sequence are the host's, however many.
    pub from_rows: usize,
}

impl Prefill {
    /// The card, if it takes a unit over that `executes_on` executes otherwise.
    pub(crate) fn instead_of(self, executes_on: Device, unit: Unit) -> Option<Device> {
        let takes_over = executes_on == Device::Cpu && matches!(unit, Unit::Embedding | Unit::DecoderLayer(_));
        takes_over.then_some(self.device)
    }
}

/// What a device holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DevicePlan {
    /// The device.
    pub device: Device,
    /// What the operator allows. `None` where there is no limit (disk).
    pub budget_bytes: Option<u64>,
    /// Weights that rest here.
    pub weight_bytes: u64,
    /// KV cache of the decoder layers executed here, but for those that are only prefilled here.
    pub kv_bytes: u64,
    /// Activations of the units executed here.
    pub workspace_bytes: u64,
    /// The staging ring through which weights resting elsewhere are streamed, and a copy of the norms of layers that are
    /// only prefilled here.
    pub staging_bytes: u64,
    /// Set aside for what is not ours to place.
    pub reserved_bytes: u64,
}

impl DevicePlan {
    /// Everything planned on the device.
    pub fn used_bytes(&self) -> u64 {
        let parts = [self.kv_bytes, self.workspace_bytes, self.staging_bytes, self.reserved_bytes];
        parts.into_iter().fold(self.weight_bytes, u64::saturating_add)
    }

    /// What is left of the budget; `None` without a budget.
    pub fn free_bytes(&self) -> Option<u64> {
        self.budget_bytes.map(|budget| budget.saturating_sub(self.used_bytes()))
    }
}

/// Bytes that cross between two places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkPlan {
    /// Where they come from.
    pub from: Device,
    /// Where they go.
    pub to: Device,
    /// For every decoded token of one sequence.
    pub bytes_per_token: u64,
    /// For one image prefill.
    pub bytes_per_image: u64,
}

/// A placement of a whole model, with its consequences.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The policy that made it; `auto` is resolved.
    pub policy: Policy,
    /// Name of the model.
    pub model: String,
    /// Element type of the weights, at rest and under way.
    pub weight_dtype: DType,
    /// Element type of activations and KV cache that sizes were computed for.
    pub activation_dtype: DType,
    /// The step that sizes were computed for.
    pub limits: StepLimits,
    /// Stages in the order of execution. Every unit stands in exactly one.
    pub stages: Vec<StagePlan>,
    /// Where steps of many rows go otherwise; `None` where all steps pass through the same stages.
    pub prefill: Option<Prefill>,
    /// Every tensor of the inventory, in its order.
    pub placements: Vec<TensorPlacement>,
    /// What each device holds, in device order.
    pub devices: Vec<DevicePlan>,
    /// What crosses between devices.
    pub links: Vec<LinkPlan>,
    /// Predicted seconds for one decoded token of one sequence that fills the planned context.
    pub seconds_per_token: f64,
    /// Predicted seconds for one image prefill, with 32 tokens of text.
    pub seconds_per_image: f64,
    /// Predicted tokens per second of all planned sequences together, as [`Prediction::tokens_per_s`] has them.
    ///
    /// [`Prediction::tokens_per_s`]: crate::Prediction::tokens_per_s
    pub tokens_per_second: f64,
    /// Which rates the predictions rest on, in words. Empty for a plan from a file that does not say.
    pub rates: String,
    /// What a person should know: what is streamed, what limits the plan, what would lift the limit.
    pub notices: Vec<String>,
    /// Cards that compute every layer together, in their order; the first stands for all of them in stages and
    /// placements. Empty where every rank is a device alone.
    pub tensor_parallel: Vec<Device>,
}

impl Plan {
    /// The placement of the tensor called `name`.
    pub fn placement(&self, name: &str) -> Option<&TensorPlacement> {
        self.placements.iter().find(|placement| placement.tensor.name == name)
    }

    /// All units in the order of execution, with who executes them.
    pub(crate) fn units(&self) -> impl Iterator<Item = (Device, Unit)> {
        self.stages.iter().flat_map(|stage| stage.units.iter().map(|unit| (stage.device, *unit)))
    }

    /// The stages of steps that are the card's of [`Prefill`]; `None` where there are no such steps.
    pub fn prefill_stages(&self) -> Option<Vec<StagePlan>> {
        self.prefill?;
        Some(StagePlan::join(self.units().map(|(on, unit)| (self.prefills(on, unit).unwrap_or(on), unit))))
    }

    /// The units that `device` executes in steps of any kind, in the order of execution.
    pub fn executed_on(&self, device: Device) -> Vec<Unit> {
        let is_its = |(on, unit): &(Device, Unit)| *on == device || self.prefills(*on, *unit) == Some(device);
        self.units().filter(is_its).map(|(_, unit)| unit).collect()
    }

    /// Who prefills a unit that `executes_on` executes otherwise, where that is somebody else.
    pub fn prefills(&self, executes_on: Device, unit: Unit) -> Option<Device> {
        self.prefill?.instead_of(executes_on, unit)
    }

    /// Whether a run needs a backend on `device`: it executes, or holds weights for one that does. Weights in host
    /// memory or in the file are read where they are mapped.
    pub fn uses(&self, device: Device) -> bool {
        self.stages.iter().any(|stage| stage.device == device)
            || self.prefill.is_some_and(|prefill| prefill.device == device)
            || self.placements.iter().any(|placement| placement.residency == Residency::Peer(device))
    }
}

/// Each tensor in a slot of a staging ring begins at a multiple of this. A slot holds the largest group of weights that
/// is streamed to the device.
pub const STAGING_ALIGN: u64 = 256;
/// Slots of a staging ring: one is computed with while the next is filled.
pub const STAGING_SLOTS: usize = 2;
