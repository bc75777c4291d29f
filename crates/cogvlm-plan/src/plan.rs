//! What planning takes and what it gives.

use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{DType, Device, ModelSpec, TensorSpec, Unit};
use serde::{Deserialize, Serialize};

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

/// Rates that predicted times and the choice between streaming and computing on the host rest on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Memory bandwidth of a card.
    pub device_bytes_per_s: f64,
    /// Matrix arithmetic of a card.
    pub device_flops_per_s: f64,
    /// Host memory to card.
    pub host_link_bytes_per_s: f64,
    /// Card to card.
    pub peer_link_bytes_per_s: f64,
    /// Time for a small message from card to card.
    pub hop_s: f64,
    /// Memory bandwidth of the host.
    pub host_bytes_per_s: f64,
    /// Matrix arithmetic of the host.
    pub host_flops_per_s: f64,
    /// Reads from disk.
    pub disk_bytes_per_s: f64,
}

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
    /// Bytes set aside on every card for what is not ours to place: the CUDA context, library handles, kernel images.
    pub reserve_bytes: u64,
    /// Rates of the machine.
    pub rates: Rates,
}

/// Where a tensor rests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Residency {
    /// In the memory of the device that executes its unit.
    Device,
    /// On another card, from which it is streamed when needed.
    Peer(Device),
    /// In host memory: the registered mapping of the checkpoint, streamed when needed.
    Host,
    /// In the mapped file only, read and streamed when needed.
    File,
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

/// What a device holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DevicePlan {
    /// The device.
    pub device: Device,
    /// What the operator allows. `None` where there is no limit (disk).
    pub budget_bytes: Option<u64>,
    /// Weights that rest here.
    pub weight_bytes: u64,
    /// KV cache of the decoder layers executed here.
    pub kv_bytes: u64,
    /// Activations of the units executed here.
    pub workspace_bytes: u64,
    /// The staging ring through which weights resting elsewhere are streamed.
    pub staging_bytes: u64,
    /// Set aside for what is not ours to place.
    pub reserved_bytes: u64,
}

impl DevicePlan {
    /// Everything planned on the device.
    pub fn used_bytes(&self) -> u64 {
        self.weight_bytes + self.kv_bytes + self.workspace_bytes + self.staging_bytes + self.reserved_bytes
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
#[derive(Debug, Clone)]
pub struct Plan {
    /// The policy that made it; `auto` is resolved.
    pub policy: Policy,
    /// Name of the model.
    pub model: String,
    /// Element type of activations and KV cache that sizes were computed for.
    pub activation_dtype: DType,
    /// The step that sizes were computed for.
    pub limits: StepLimits,
    /// Stages in the order of execution. Every unit stands in exactly one.
    pub stages: Vec<StagePlan>,
    /// Every tensor of the inventory, in its order.
    pub placements: Vec<TensorPlacement>,
    /// What each device holds, in device order.
    pub devices: Vec<DevicePlan>,
    /// What crosses between devices.
    pub links: Vec<LinkPlan>,
    /// Predicted seconds for one decoded token of one sequence.
    pub seconds_per_token: f64,
    /// Predicted seconds for one image prefill.
    pub seconds_per_image: f64,
    /// What a person should know: what is streamed, what limits the plan, what would lift the limit.
    pub notices: Vec<String>,
}

impl Plan {
    /// The placement of the tensor called `name`.
    pub fn placement(&self, name: &str) -> Option<&TensorPlacement> {
        self.placements.iter().find(|placement| placement.tensor.name == name)
    }
}

/// Bytes of one slot of a staging ring: the largest group of weights that is streamed as one piece to a device.
/// Each tensor of a slot begins at a multiple of [`STAGING_ALIGN`].
pub const STAGING_ALIGN: u64 = 256;
/// Slots of a staging ring: one is computed with while the next is filled.
pub const STAGING_SLOTS: usize = 2;
