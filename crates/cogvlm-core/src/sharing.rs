//! How several devices that compute every layer together share it (tensor parallelism): who has which part of a weight
//! and of a buffer, and what that comes to in bytes. The planner counts these bytes and the executor allocates them,
//! both from here.
//!
//! Heads, the inner width of the MLP and the inputs of what follows them are cut; what is small or read by everybody is
//! there on every device; vision tower and adapter run on the first device alone.

use crate::dtype::DType;
use crate::inventory::{TensorSpec, Unit, WeightGroup};
use crate::spec::ModelSpec;
use crate::workspace::{BufferKind, PARCEL_ALIGN, StepLimits, kv_bytes_per_layer, outbox_bytes, workspace_buffers};

/// Who of several devices has what of a weight or a buffer. Where it is cut, each device has an equal part, the first
/// device the first one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sharing {
    /// Every device has all of it.
    Replicated,
    /// The first device has all of it, the others nothing.
    First,
    /// Each device has some of its rows.
    Rows,
    /// Of a fused `[q | k | v]` each device has the rows of some heads of all three.
    Heads,
    /// Each device has some of its columns.
    Columns,
}

impl Sharing {
    /// Bytes of its part that the device `member` of `num_members` has, of something of `bytes`.
    pub fn bytes(self, bytes: u64, member: usize, num_members: usize) -> u64 {
        match self {
            Self::Replicated => bytes,
            Self::First if member == 0 => bytes,
            Self::First => 0,
            Self::Rows | Self::Heads | Self::Columns => bytes / num_members as u64,
        }
    }
}

impl WeightGroup {
    /// How devices that compute together share the tensors of this group of `unit`.
    pub fn sharing(self, unit: Unit) -> Sharing {
        match self {
            _ if unit.is_vision() => Sharing::First,
            Self::Qkv(_) => Sharing::Heads,
            Self::GateUp(_) => Sharing::Rows,
            Self::Dense(_) | Self::Down(_) => Sharing::Columns,
            // The head is a fiftieth of what a token reads: every device computes all logits, chooses the same token,
            // and nothing has to be gathered.
            Self::Whole | Self::Norms => Sharing::Replicated,
        }
    }
}

impl TensorSpec {
    /// How devices that compute together share the tensor.
    pub fn sharing(&self) -> Sharing {
        self.group.sharing(self.unit)
    }
}

impl BufferKind {
    /// How devices that compute together share the buffer.
    pub fn sharing(self) -> Sharing {
        match self {
            Self::Hidden | Self::Normed | Self::RopeTable | Self::HeadInput | Self::Logits => Sharing::Replicated,
            Self::Query | Self::MlpInner => Sharing::Columns,
            Self::Pixels
            | Self::VitHidden
            | Self::VitQkv
            | Self::VitAttention
            | Self::VitBranch
            | Self::VitInner
            | Self::AdapterHidden
            | Self::AdapterInner
            | Self::VisionFeatures => Sharing::First,
        }
    }
}

/// Why a model cannot be shared.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{num_members} devices cannot share {value} {what} evenly")]
pub struct UnevenError {
    /// Devices that were to share it.
    pub num_members: usize,
    /// What is left over.
    pub what: &'static str,
    /// How many or how wide.
    pub value: usize,
}

/// Checks that `num_members` devices can share the model of `spec`.
///
/// # Errors
/// Where something that is cut does not come out even.
pub fn check_even(spec: &ModelSpec, num_members: usize) -> Result<(), UnevenError> {
    let cut = [
        ("query heads", spec.num_heads),
        ("key and value heads", spec.num_kv_heads),
        ("columns inside the MLP", spec.intermediate_size),
    ];
    let uneven = cut.into_iter().find(|(_, value)| num_members == 0 || !value.is_multiple_of(num_members));
    uneven.map_or(Ok(()), |(what, value)| Err(UnevenError { num_members, what, value }))
}

/// Buffers of sums that devices which compute together have each: one is read by the others while the next is filled.
pub const NUM_EXCHANGES: usize = 2;

/// Shape of one buffer of sums, f32.
pub fn exchange_shape(spec: &ModelSpec, limits: &StepLimits) -> [usize; 2] {
    [limits.max_tokens, spec.hidden_size]
}

/// Columns of what `num_members` devices attend to, each for itself.
pub fn attended_columns(spec: &ModelSpec, num_members: usize) -> usize {
    spec.num_heads * spec.head_dim / num_members
}

/// Bytes on the first device for what the images become, on its way to the others.
pub fn relay_bytes(spec: &ModelSpec, limits: &StepLimits, activations: DType) -> u64 {
    BufferKind::VisionFeatures.bytes(spec, limits, activations).next_multiple_of(PARCEL_ALIGN)
}

/// Bytes of all workspace buffers of the device `member` of `num_members` that compute `units` together.
pub fn member_workspace_bytes(
    spec: &ModelSpec, units: &[Unit], limits: &StepLimits, activations: DType, member: usize, num_members: usize,
) -> u64 {
    let kinds = workspace_buffers(units);
    let shared = |kind: &BufferKind| kind.sharing().bytes(kind.bytes(spec, limits, activations), member, num_members);
    let buffers: u64 = kinds.iter().map(shared).sum();
    let outbox = outbox_bytes(&kinds, spec, limits, activations);
    if num_members == 1 {
        return buffers + outbox;
    }
    let [rows, columns] = exchange_shape(spec, limits);
    let exchanges = (NUM_EXCHANGES * rows * columns * DType::F32.size_bytes()) as u64;
    let attended = if kinds.contains(&BufferKind::Normed) {
        (limits.max_tokens * attended_columns(spec, num_members) * activations.size_bytes()) as u64
    } else {
        0
    };
    let relayed = member == 0 && kinds.contains(&BufferKind::VisionFeatures);
    let relay = if relayed { relay_bytes(spec, limits, activations) } else { 0 };
    buffers + outbox + exchanges + attended + relay
}

/// Bytes of the KV cache of one decoder layer on each of `num_members` devices.
pub fn member_kv_bytes_per_layer(spec: &ModelSpec, limits: &StepLimits, activations: DType, num_members: usize) -> u64 {
    kv_bytes_per_layer(spec, limits, activations) / num_members as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ModelConfig;
    use crate::inventory::tensor_inventory;
    use crate::workspace::workspace_bytes;

    fn spec() -> ModelSpec {
        ModelConfig::built_in("cogvlm-chat-17b").unwrap().resolve().unwrap()
    }

    #[test]
    fn two_devices_read_half_of_the_layers_each() {
        let hot = |member| -> u64 {
            let inventory = tensor_inventory(&spec());
            let hot = inventory.iter().filter(|tensor| tensor.phase == crate::Phase::EveryToken && !tensor.optional);
            hot.map(|tensor| tensor.sharing().bytes(2 * tensor.num_elements() as u64, member, 2)).sum()
        };
        let (whole, head) = (13_214_687_232, 2 * 32_000 * 4096);
        let norms = 2 * 65 * 4096;
        assert_eq!([hot(0), hot(1)], [(whole - head - norms) / 2 + head + norms; 2]);
    }

    #[test]
    fn one_device_alone_needs_what_it_needs() {
        let (spec, limits) = (spec(), StepLimits::new(2048, 1));
        let units = Unit::execution_order(&spec);
        let alone = member_workspace_bytes(&spec, &units, &limits, DType::Bf16, 0, 1);
        assert_eq!(alone, workspace_bytes(&spec, &units, &limits, DType::Bf16));
    }

    #[test]
    fn what_does_not_come_out_even_is_refused() {
        assert_eq!(check_even(&spec(), 4), Ok(()));
        let error = check_even(&spec(), 3).unwrap_err();
        assert_eq!(error.to_string(), "3 devices cannot share 32 query heads evenly");
        assert!(check_even(&spec(), 0).is_err());
    }
}
