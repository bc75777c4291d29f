//! What every unit of a model weighs and costs, ready for a search: groups of weights, prefix sums over the units in
//! the order of execution, workspace for every combination of parts.

use std::ops::Range;

use cogvlm_core::sharing::{member_kv_bytes_per_layer, member_workspace_bytes};
use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{DType, ModelSpec, Phase, TensorSpec, Unit, WeightGroup, tensor_inventory};

use crate::cost::{StepKind, unit_flops};
use crate::plan::STAGING_ALIGN;

/// Text tokens, BOS included, of the prompt with one image that predictions are made for.
pub(crate) const IMAGE_PROMPT_TEXT_TOKENS: usize = 33;

/// Tensors that rest and travel together.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    /// Index of the unit in the order of execution.
    pub(crate) unit: usize,
    pub(crate) group: WeightGroup,
    pub(crate) phase: Phase,
    pub(crate) bytes: u64,
    /// Bytes of a staging slot that holds the group.
    pub(crate) staged_bytes: u64,
    /// Indices into the inventory.
    pub(crate) tensors: Vec<usize>,
}

/// Which of several devices that compute every layer together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) index: usize,
    pub(crate) num_members: usize,
}

impl Member {
    /// A device alone, which has everything.
    pub(crate) const ALONE: Self = Self { index: 0, num_members: 1 };

    /// Bytes of its part of a tensor of that many.
    fn bytes(self, tensor: &TensorSpec, bytes: u64) -> u64 {
        tensor.sharing().bytes(bytes, self.index, self.num_members)
    }
}

/// Sizes of a model under given element types and limits, or of the part of it that one member of a group has.
pub(crate) struct Sizes {
    member: Member,
    pub(crate) spec: ModelSpec,
    pub(crate) weight_dtype: DType,
    pub(crate) activation_dtype: DType,
    pub(crate) limits: StepLimits,
    pub(crate) inventory: Vec<TensorSpec>,
    /// Units in the order of execution; the first [`num_vision`](Self::num_vision) are the vision tower.
    pub(crate) units: Vec<Unit>,
    pub(crate) num_vision: usize,
    /// Groups in the order of execution; in each unit norms first, then hot, then cold.
    pub(crate) groups: Vec<Group>,
    /// Groups of each unit: all, norms, hot, cold.
    pub(crate) groups_of: Vec<Range<usize>>,
    pub(crate) norms_of: Vec<Range<usize>>,
    pub(crate) hot_of: Vec<Range<usize>>,
    pub(crate) cold_of: Vec<Range<usize>>,
    /// Staging slot for the largest group of each unit that can be streamed.
    slot_of: Vec<u64>,
    /// Bytes of all units before an index: norms, hot without norms, cold.
    norms: Vec<u64>,
    hot: Vec<u64>,
    cold: Vec<u64>,
    /// Bytes of the embedding table.
    pub(crate) table_bytes: u64,
    pub(crate) kv_per_layer: u64,
    workspace: Vec<u64>,
    /// Arithmetic of an image prefill in all units before an index.
    prefill_flops: Vec<f64>,
}

impl Sizes {
    pub(crate) fn new(spec: &ModelSpec, weight_dtype: DType, activation_dtype: DType, limits: StepLimits) -> Self {
        Self::of(Member::ALONE, spec, weight_dtype, activation_dtype, limits)
    }

    /// What `member` has of the same model.
    pub(crate) fn of_member(&self, member: Member) -> Self {
        Self::of(member, &self.spec, self.weight_dtype, self.activation_dtype, self.limits)
    }

    fn of(member: Member, spec: &ModelSpec, weight_dtype: DType, activation_dtype: DType, limits: StepLimits) -> Self {
        let inventory = tensor_inventory(spec);
        let units = Unit::execution_order(spec);
        let num_vision = units.iter().take_while(|unit| unit.is_vision()).count();
        let groups = collect_groups(member, spec, &inventory, weight_dtype);
        let of = |keep: fn(&Group) -> bool| {
            let range = |unit: usize| {
                let start = groups.partition_point(|group| group.unit < unit);
                let inside = || groups[start..].iter().take_while(|group| group.unit == unit);
                let first = start + inside().take_while(|group| !keep(group)).count();
                first..first + inside().filter(|group| keep(group)).count()
            };
            (0..units.len()).map(range).collect::<Vec<_>>()
        };
        let (groups_of, norms_of) = (of(|_| true), of(Group::is_norms));
        let (hot_of, cold_of) = (of(Group::is_hot), of(Group::is_cold));
        let sums = |of: &dyn Fn(usize) -> u64| prefix_sums((0..units.len()).map(of));
        let bytes = |range: &Range<usize>| groups[range.clone()].iter().map(|group| group.bytes).sum::<u64>();
        let slot_bytes = |unit: usize| {
            let inside = groups[groups_of[unit].clone()].iter();
            let streamable =
                inside.filter(|group| group.group != WeightGroup::Norms && group.phase != Phase::RowLookup);
            streamable.map(|group| group.staged_bytes).max().unwrap_or(0)
        };
        let mut prefill_flops = vec![0.0];
        let image = StepKind::Prefill { has_image: true, text_tokens: IMAGE_PROMPT_TEXT_TOKENS };
        for (index, &unit) in units.iter().enumerate() {
            let tensors = groups[groups_of[index].clone()].iter().flat_map(|group| &group.tensors);
            let tensors: Vec<&TensorSpec> = tensors.map(|&tensor| &inventory[tensor]).collect();
            let (products, attention) = unit_flops(spec, unit, &tensors, image);
            prefill_flops.push(prefill_flops[index] + products + attention);
        }
        Self {
            slot_of: (0..units.len()).map(slot_bytes).collect(),
            norms: sums(&|unit| bytes(&norms_of[unit])),
            hot: sums(&|unit| bytes(&hot_of[unit])),
            cold: sums(&|unit| bytes(&cold_of[unit])),
            table_bytes: groups.iter().filter(|group| group.phase == Phase::RowLookup).map(|group| group.bytes).sum(),
            kv_per_layer: member_kv_bytes_per_layer(spec, &limits, activation_dtype, member.num_members),
            workspace: (0..1 << PARTS)
                .map(|parts| parts_workspace(member, spec, parts, &limits, activation_dtype))
                .collect(),
            prefill_flops,
            member,
            spec: spec.clone(),
            weight_dtype,
            activation_dtype,
            limits,
            inventory,
            num_vision,
            groups_of,
            norms_of,
            hot_of,
            cold_of,
            groups,
            units,
        }
    }

    /// Units that only decode and prefill of text pass through: embedding, decoder layers, head.
    pub(crate) fn num_text(&self) -> usize {
        self.units.len() - self.num_vision
    }

    /// Bytes of tensor `index` of the inventory.
    pub(crate) fn tensor_bytes(&self, index: usize) -> u64 {
        let tensor = &self.inventory[index];
        self.member.bytes(tensor, (tensor.num_elements() * self.weight_dtype.size_bytes()) as u64)
    }

    /// Norms of `units`.
    pub(crate) fn norm_bytes(&self, units: &Range<usize>) -> u64 {
        self.norms[units.end] - self.norms[units.start]
    }

    /// Hot weights of `units`, norms not included.
    pub(crate) fn hot_bytes(&self, units: &Range<usize>) -> u64 {
        self.hot[units.end] - self.hot[units.start]
    }

    /// Weights of `units` that only an image prefill reads.
    pub(crate) fn cold_bytes(&self, units: &Range<usize>) -> u64 {
        self.cold[units.end] - self.cold[units.start]
    }

    /// Hot weights of all units before each index, norms not included.
    pub(crate) fn hot_before(&self) -> &[u64] {
        &self.hot
    }

    /// Cold weights of all units before each index.
    pub(crate) fn cold_before(&self) -> &[u64] {
        &self.cold
    }

    /// Staging slot for any group of `units`.
    pub(crate) fn slot_of(&self, units: &Range<usize>) -> u64 {
        // All decoder layers are alike, and so are all ViT layers: the ends and one of the middle stand for all.
        let some = [units.start, units.start + units.len() / 2, units.end.saturating_sub(1)];
        some.into_iter().filter(|unit| units.contains(unit)).map(|unit| self.slot_of[unit]).max().unwrap_or(0)
    }

    /// Decoder layers in `units`.
    pub(crate) fn layers_in(&self, units: &Range<usize>) -> Range<usize> {
        let layers = self.num_vision + 1..self.units.len() - 1;
        intersect(units, &layers)
    }

    /// ViT layers in `units`.
    pub(crate) fn vit_layers_in(&self, units: &Range<usize>) -> Range<usize> {
        intersect(units, &(1..self.num_vision - 1))
    }

    /// KV cache that one token adds to one decoder layer.
    pub(crate) fn kv_bytes_per_token_and_layer(&self) -> f64 {
        (self.spec.kv_elements_per_token() * self.activation_dtype.size_bytes()) as f64
    }

    /// KV cache of the decoder layers in `units`.
    pub(crate) fn kv_bytes(&self, units: &Range<usize>) -> u64 {
        self.layers_in(units).len() as u64 * self.kv_per_layer
    }

    /// Workspace of a device that executes `vision` and `text`.
    pub(crate) fn workspace_bytes(&self, vision: &Range<usize>, text: &Range<usize>) -> u64 {
        let mut parts = 0;
        for (part, present) in [
            vision.contains(&0),
            !self.vit_layers_in(vision).is_empty(),
            vision.contains(&(self.num_vision - 1)),
            text.contains(&self.num_vision),
            !self.layers_in(text).is_empty(),
            text.contains(&(self.units.len() - 1)),
        ]
        .into_iter()
        .enumerate()
        {
            parts |= usize::from(present) << part;
        }
        self.workspace[parts]
    }

    /// Arithmetic of an image prefill in `units`.
    pub(crate) fn prefill_flops(&self, units: &Range<usize>) -> f64 {
        self.prefill_flops[units.end] - self.prefill_flops[units.start]
    }

    /// Bytes that cross from unit `index` to the next one where they run on different devices: for one decoded
    /// token, and for one image prefill.
    pub(crate) fn hop_bytes(&self, index: usize) -> (u64, u64) {
        let bytes = |step| self.step_hop_bytes(index, step) as u64;
        let token = StepKind::Decode { sequences: 1.0, context_len: 0.0 };
        (bytes(token), bytes(StepKind::Prefill { has_image: true, text_tokens: IMAGE_PROMPT_TEXT_TOKENS }))
    }

    /// Bytes that cross from unit `index` to the next one in `step`, where they run on different devices.
    pub(crate) fn step_hop_bytes(&self, index: usize, step: StepKind) -> f64 {
        let (spec, vision) = (&self.spec, &self.spec.vision);
        let values = match (self.units[index], self.units[index + 1]) {
            (unit, _) if unit.is_vision() && !step.has_image() => 0.0,
            // The adapter does not see the class token.
            (_, Unit::Adapter) => (vision.num_patches() * vision.hidden_size) as f64,
            (Unit::PatchEmbedding | Unit::VitLayer(_), _) => (vision.num_tokens() * vision.hidden_size) as f64,
            (Unit::Adapter, _) => (spec.num_vision_tokens() * spec.hidden_size) as f64,
            (_, Unit::Head) => step.sequences() * spec.hidden_size as f64,
            _ => step.rows(spec) * spec.hidden_size as f64,
        };
        values * self.activation_dtype.size_bytes() as f64
    }
}

impl Group {
    fn is_norms(&self) -> bool {
        self.group == WeightGroup::Norms
    }

    /// Read for every token, and large enough to think about.
    fn is_hot(&self) -> bool {
        self.phase == Phase::EveryToken && self.group != WeightGroup::Norms
    }

    /// Read for images only.
    fn is_cold(&self) -> bool {
        self.phase == Phase::ImagePrefill
    }
}

/// Tokens of the prompt with one image that predictions are made for.
pub(crate) fn image_prompt_tokens(spec: &ModelSpec) -> usize {
    image_rows(spec, true) + IMAGE_PROMPT_TEXT_TOKENS
}

/// Tokens that an image adds to a prompt.
pub(crate) fn image_rows(spec: &ModelSpec, has_image: bool) -> usize {
    if has_image { spec.num_vision_tokens() } else { 0 }
}

/// `bytes` rounded up to where the next tensor of a staging slot begins.
pub(crate) fn staging_bytes(bytes: u64) -> u64 {
    bytes.next_multiple_of(STAGING_ALIGN)
}

/// Parts of a model that need workspace of their own: one bit each.
const PARTS: usize = 6;

fn parts_workspace(member: Member, spec: &ModelSpec, parts: usize, limits: &StepLimits, activations: DType) -> u64 {
    let examples =
        [Unit::PatchEmbedding, Unit::VitLayer(0), Unit::Adapter, Unit::Embedding, Unit::DecoderLayer(0), Unit::Head];
    let present = examples.into_iter().enumerate().filter(|(part, _)| parts >> part & 1 == 1);
    let units: Vec<Unit> = present.map(|(_, unit)| unit).collect();
    member_workspace_bytes(spec, &units, limits, activations, member.index, member.num_members)
}

fn collect_groups(member: Member, spec: &ModelSpec, inventory: &[TensorSpec], dtype: DType) -> Vec<Group> {
    let num_vision = spec.vision.num_layers + 2;
    let unit_index = |unit: Unit| match unit {
        Unit::PatchEmbedding => 0,
        Unit::VitLayer(layer) => 1 + layer,
        Unit::Adapter => num_vision - 1,
        Unit::Embedding => num_vision,
        Unit::DecoderLayer(layer) => num_vision + 1 + layer,
        Unit::Head => num_vision + 1 + spec.num_layers,
    };
    let mut groups: Vec<Group> = Vec::new();
    for (index, tensor) in inventory.iter().enumerate() {
        let bytes = member.bytes(tensor, (tensor.num_elements() * dtype.size_bytes()) as u64);
        let unit = unit_index(tensor.unit);
        // Tensors of a group stand close together: look at the last few groups only.
        let known = groups.iter().rposition(|group| group.unit == unit && group.group == tensor.group);
        match known {
            Some(known) => {
                let group = &mut groups[known];
                group.bytes += bytes;
                group.staged_bytes += staging_bytes(bytes);
                group.tensors.push(index);
            }
            None => groups.push(Group {
                unit,
                group: tensor.group,
                phase: tensor.phase,
                bytes,
                staged_bytes: staging_bytes(bytes),
                tensors: vec![index],
            }),
        }
    }
    // Within a unit: norms, then hot, then cold; otherwise as they are registered.
    groups.sort_by_key(|group| (group.unit, group.group != WeightGroup::Norms, group.phase != Phase::EveryToken));
    groups
}

fn prefix_sums(values: impl Iterator<Item = u64>) -> Vec<u64> {
    let mut sums = vec![0];
    for value in values {
        sums.push(sums[sums.len() - 1] + value);
    }
    sums
}

fn intersect(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cogvlm_core::ModelConfig;

    #[test]
    fn sums_agree_with_the_inventory_and_work_with_the_published_figures() {
        let spec = ModelConfig::built_in("cogvlm-chat-17b").unwrap().resolve().unwrap();
        let sizes = Sizes::new(&spec, DType::Bf16, DType::Bf16, StepLimits::new(2048, 1));
        let all = 0..sizes.units.len();
        let hot = sizes.hot_bytes(&all) + sizes.norm_bytes(&all);
        // 32 inv_freq buffers of 128 B belong to the norms.
        assert_eq!(hot, 13_214_687_232 + 32 * 128);
        assert_eq!(sizes.cold_bytes(&all), 12_952_010_752 + 8_850_528_768);
        assert_eq!(hot + sizes.cold_bytes(&all) + sizes.table_bytes, 35_279_374_848);
        // ViT 11.2, adapter 0.35, 0.518 TFLOP of matrices per decoder layer at 1,280 tokens; here 1,260 and attention.
        let tflop = |units: Range<usize>| sizes.prefill_flops(&units) / 1e12;
        assert!((tflop(0..64) - 11.2).abs() < 0.05, "{}", tflop(0..64));
        assert!((tflop(64..65) - 0.35).abs() < 0.005, "{}", tflop(64..65));
        assert!((tflop(66..67) - 0.510 - 0.013).abs() < 0.001, "{}", tflop(66..67));
        assert_eq!(sizes.hop_bytes(70), (8192, 8192 * 1260));
        assert_eq!(sizes.hop_bytes(63), (0, 1225 * 3584));
        assert_eq!(sizes.hop_bytes(64), (0, 1227 * 8192));
        assert_eq!(sizes.hop_bytes(97), (8192, 8192));
    }
}
