//! The consequences of a placement: what every device holds, what crosses every link, how long it takes. Plans of our
//! own, plans read from JSON and maps written by hand are all charged here, by the same rules.

use std::collections::{BTreeMap, BTreeSet};

use cogvlm_core::workspace::workspace_bytes;
use cogvlm_core::{Device, Phase, TensorSpec, Unit, WeightGroup};

use crate::cost::{StepKind, UnitWork, unit_flops, unit_seconds};
use crate::error::PlanError;
use crate::links::Links;
use crate::own::sizes::{Group, IMAGE_PROMPT_TEXT_TOKENS, Sizes, staging_bytes};
use crate::plan::{
    DeviceBudget, DevicePlan, LinkPlan, Plan, Policy, Prefill, Residency, STAGING_SLOTS, StagePlan, TensorPlacement,
};

/// Who executes each unit, and where each tensor rests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placement {
    /// For each unit in the order of execution.
    pub(crate) executes_on: Vec<Device>,
    /// For each tensor of the inventory.
    pub(crate) residency: Vec<Residency>,
    /// Who executes units of the host in steps of many rows, if not the host.
    pub(crate) prefill: Option<Prefill>,
}

/// Predicted seconds of a placement.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Times {
    /// One decoded token of one sequence.
    pub(crate) token_s: f64,
    /// One image prefill.
    pub(crate) image_s: f64,
    /// Decode step of the planned batch.
    pub(crate) step_s: f64,
    /// Decode step of the planned batch on the slowest device.
    pub(crate) slowest_step_s: f64,
    /// Image prefill on the slowest device.
    pub(crate) slowest_image_s: f64,
}

impl Placement {
    /// That of a plan.
    pub(crate) fn of(plan: &Plan) -> Self {
        let executes_on = plan.units().map(|(on, _)| on).collect();
        let residency = plan.placements.iter().map(|placement| placement.residency).collect();
        Self { executes_on, residency, prefill: plan.prefill }
    }

    /// The card that prefills a unit of the host.
    pub(crate) fn prefills(&self, sizes: &Sizes, unit: usize) -> Option<Device> {
        self.prefill?.instead_of(self.executes_on[unit], sizes.units[unit])
    }

    /// Whether `step` is the card's that prefills for the host.
    fn is_prefilled(&self, sizes: &Sizes, step: StepKind) -> bool {
        let Some(prefill) = self.prefill else { return false };
        let is_long = step.has_image() || step.rows(&sizes.spec) >= prefill.from_rows as f64;
        is_long && matches!(step, StepKind::Prefill { .. })
    }

    /// Who executes each unit in `step`.
    fn ranks_in(&self, sizes: &Sizes, step: StepKind) -> Vec<Device> {
        let is_prefilled = self.is_prefilled(sizes, step);
        let rank = |unit: usize| self.prefills(sizes, unit).filter(|_| is_prefilled).unwrap_or(self.executes_on[unit]);
        (0..self.executes_on.len()).map(rank).collect()
    }

    /// Lets `device` prefill units of the host, from as many rows of text on as it is faster with.
    pub(crate) fn prefill_on(&self, device: Device, sizes: &Sizes, links: &Links) -> Prefill {
        let ways = [None, Some(Prefill { device, from_rows: 0 })];
        let [by_host, by_card] = ways.map(|prefill| Self { prefill, ..self.clone() });
        let is_slower = |text_tokens: usize| {
            let step = StepKind::Prefill { has_image: false, text_tokens };
            by_card.step(sizes, links, step).seconds >= by_host.step(sizes, links, step).seconds
        };
        // The host takes longer with every row, the card all the time to stream the weights.
        let (mut slower, mut faster) = (0, sizes.limits.max_tokens + 1);
        while faster - slower > 1 {
            let middle = slower + (faster - slower) / 2;
            if is_slower(middle) { slower = middle } else { faster = middle }
        }
        Prefill { device, from_rows: faster }
    }

    /// Indices of the units that `device` executes in steps of any kind.
    fn units_on(&self, sizes: &Sizes, device: Device) -> impl Iterator<Item = usize> {
        let is_its =
            move |unit: &usize| self.executes_on[*unit] == device || self.prefills(sizes, *unit) == Some(device);
        (0..self.executes_on.len()).filter(is_its)
    }

    /// Whether a group is streamed to `on`, which executes its unit, and so goes through the staging ring. A group of
    /// which only a part rests elsewhere is streamed as a whole.
    fn is_streamed(&self, group: &Group, on: Device) -> bool {
        on != Device::Cpu
            && group.group != WeightGroup::Norms
            && group.phase != Phase::RowLookup
            && group.tensors.iter().any(|&tensor| self.residency[tensor] != Residency::Device)
    }

    /// What every device of `budgets` holds, in device order.
    pub(crate) fn devices(&self, sizes: &Sizes, budgets: &[DeviceBudget], reserve_bytes: u64) -> Vec<DevicePlan> {
        let mut weights: BTreeMap<Device, u64> = BTreeMap::new();
        // Slots of rings, and norms beside them.
        let mut slots: BTreeMap<Device, u64> = BTreeMap::new();
        let mut norms: BTreeMap<Device, u64> = BTreeMap::new();
        for group in &sizes.groups {
            let on = self.executes_on[group.unit];
            for &tensor in &group.tensors {
                *weights.entry(self.residency[tensor].place(on)).or_default() += sizes.tensor_bytes(tensor);
            }
            let prefilled_on = self.prefills(sizes, group.unit);
            if let Some(card) = prefilled_on.filter(|_| group.group == WeightGroup::Norms) {
                *norms.entry(card).or_default() += group.bytes;
            }
            for on in [Some(on), prefilled_on].into_iter().flatten().filter(|on| self.is_streamed(group, *on)) {
                let staged: u64 = group.tensors.iter().map(|&tensor| staging_bytes(sizes.tensor_bytes(tensor))).sum();
                let slot = slots.entry(on).or_default();
                *slot = staged.max(*slot);
            }
        }
        let device = |budget: &DeviceBudget| {
            let of = |bytes: &BTreeMap<Device, u64>| bytes.get(&budget.device).copied().unwrap_or(0);
            let staging_bytes = STAGING_SLOTS as u64 * of(&slots) + of(&norms);
            self.device(sizes, budget, of(&weights), staging_bytes, reserve_bytes)
        };
        let mut devices: Vec<_> = budgets.iter().map(device).collect();
        devices.sort_by_key(|plan| plan.device);
        devices
    }

    fn device(
        &self, sizes: &Sizes, budget: &DeviceBudget, weight_bytes: u64, staging_bytes: u64, reserve_bytes: u64,
    ) -> DevicePlan {
        let device = budget.device;
        let units: Vec<Unit> = self.units_on(sizes, device).map(|unit| sizes.units[unit]).collect();
        let executes_layer = |(unit, on): &(&Unit, &Device)| matches!(unit, Unit::DecoderLayer(_)) && **on == device;
        let layers = sizes.units.iter().zip(&self.executes_on).filter(executes_layer).count() as u64;
        // A card that nothing is asked of is never opened.
        let opened = matches!(device, Device::Gpu(_)) && (weight_bytes > 0 || !units.is_empty());
        DevicePlan {
            device,
            budget_bytes: (device != Device::Disk).then_some(budget.bytes),
            weight_bytes,
            kv_bytes: layers * sizes.kv_per_layer,
            workspace_bytes: workspace_bytes(&sizes.spec, &units, &sizes.limits, sizes.activation_dtype),
            staging_bytes,
            reserved_bytes: if opened { reserve_bytes } else { 0 },
        }
    }

    /// What crosses between devices, in device order.
    pub(crate) fn links(&self, sizes: &Sizes) -> Vec<LinkPlan> {
        let mut links: BTreeMap<(Device, Device), (u64, u64)> = BTreeMap::new();
        let mut charge = |from: Device, to: Device, per_token: u64, per_image: u64| {
            let link = links.entry((from, to)).or_default();
            link.0 += per_token;
            link.1 += per_image;
        };
        let prefills_on = self.ranks_in(sizes, IMAGE_PREFILL);
        for unit in 1..sizes.units.len() {
            let (per_token, per_image) = sizes.hop_bytes(unit - 1);
            for (ranks, per_token, per_image) in [(&self.executes_on, per_token, 0), (&prefills_on, 0, per_image)] {
                if ranks[unit - 1] != ranks[unit] {
                    charge(ranks[unit - 1], ranks[unit], per_token, per_image);
                }
            }
        }
        for group in &sizes.groups {
            for &tensor in &group.tensors {
                let (per_token, per_image) = sizes.travelling_bytes(tensor);
                let rests = self.residency[tensor].place(self.executes_on[group.unit]);
                for (ranks, per_token, per_image) in [(&self.executes_on, per_token, 0), (&prefills_on, 0, per_image)] {
                    let on = ranks[group.unit];
                    // What the host executes it reads where it lies; a card that prefills for it has norms of its own.
                    let has_own = group.group == WeightGroup::Norms && on != self.executes_on[group.unit];
                    if rests != on && !has_own {
                        charge(rests, on, per_token, per_image);
                    }
                }
            }
        }
        for (unit, &card) in prefills_on.iter().enumerate().filter(|(unit, on)| self.executes_on[*unit] != **on) {
            let kv = self.shared_kv_bytes(sizes, IMAGE_PREFILL, unit) as u64;
            charge(card, Device::Cpu, 0, kv);
            charge(Device::Cpu, card, 0, kv);
        }
        let plans = links.into_iter().filter(|(_, bytes)| *bytes != (0, 0));
        plans
            .map(|((from, to), (bytes_per_token, bytes_per_image))| LinkPlan {
                from,
                to,
                bytes_per_token,
                bytes_per_image,
            })
            .collect()
    }

    /// Predicted times of the planned batch.
    pub(crate) fn times(&self, sizes: &Sizes, links: &Links) -> Times {
        let context_len = sizes.limits.context_len as f64;
        let decode = |sequences: f64| self.step(sizes, links, StepKind::Decode { sequences, context_len });
        let image = self.step(sizes, links, IMAGE_PREFILL);
        let busiest = |times: &StepTimes| times.busy.values().copied().fold(0.0, f64::max);
        let step = decode(sizes.limits.max_sequences as f64);
        Times {
            token_s: decode(1.0).seconds,
            image_s: image.seconds,
            step_s: step.seconds,
            slowest_step_s: busiest(&step),
            slowest_image_s: busiest(&image),
        }
    }

    /// Predicted times of one step through all stages, which follow each other.
    pub(crate) fn step(&self, sizes: &Sizes, links: &Links, step: StepKind) -> StepTimes {
        let mut times = StepTimes::default();
        let mut ring = Ring::default();
        let mut last: Option<usize> = None;
        let ranks = self.ranks_in(sizes, step);
        for (unit, &on) in ranks.iter().enumerate() {
            if sizes.units[unit].is_vision() && !step.has_image() {
                continue;
            }
            if let Some(last) = last.filter(|&last| ranks[last] != on) {
                let from = ranks[last];
                times.seconds += std::mem::take(&mut ring).now;
                times.seconds += links.hop_s(from, on) + sizes.step_hop_bytes(last, step) / links.between(from, on);
            }
            let before = ring.now;
            self.pass_unit(sizes, links, step, unit, on, &mut ring);
            // Virtual ranks share the host.
            let busy = if links.is_host(on) { Device::Cpu } else { on };
            *times.busy.entry(busy).or_default() += ring.now - before;
            last = Some(unit);
        }
        times.seconds += ring.now;
        times
    }

    /// Seconds in which each of `sequences` sequences gets a token, where all of them are decoded at once. They form as
    /// many groups as ranks compute text, and the groups take turns: while one rank computes one group, the next one
    /// computes another. Every rank reads its weights for each group. So a round of all groups takes as long as the
    /// slowest device takes for one of them, times their number, and no less than one group takes through all stages.
    pub(crate) fn round_s(&self, sizes: &Sizes, links: &Links, sequences: f64, context_len: f64) -> f64 {
        let groups = (self.text_ranks(sizes).len() as f64).min(sequences).max(1.0);
        let of_group = self.step(sizes, links, StepKind::Decode { sequences: sequences / groups, context_len });
        let slowest = of_group.busy.values().copied().fold(0.0, f64::max);
        of_group.seconds.max(groups * slowest)
    }

    /// Devices that decoding passes through.
    pub(crate) fn text_ranks(&self, sizes: &Sizes) -> BTreeSet<Device> {
        let text = sizes.units.iter().zip(&self.executes_on).filter(|(unit, _)| !unit.is_vision());
        text.map(|(_, on)| *on).collect()
    }

    /// Bytes of keys and values of `unit` that `step` brings to host memory, where a card prefills it.
    fn shared_kv_bytes(&self, sizes: &Sizes, step: StepKind, unit: usize) -> f64 {
        match sizes.units[unit] {
            Unit::DecoderLayer(_) => step.rows(&sizes.spec) * sizes.kv_bytes_per_token_and_layer(),
            _ => 0.0,
        }
    }

    /// Passes `unit`, which `on` executes in this step, in the time of `ring`.
    fn pass_unit(&self, sizes: &Sizes, links: &Links, step: StepKind, unit: usize, on: Device, ring: &mut Ring) {
        let home = self.executes_on[unit];
        let groups = &sizes.groups[sizes.groups_of[unit].clone()];
        let tensors: Vec<&TensorSpec> =
            groups.iter().flat_map(|group| &group.tensors).map(|&tensor| &sizes.inventory[tensor]).collect();
        let (product_flops, attention_flops) = unit_flops(&sizes.spec, sizes.units[unit], &tensors, step);
        let read = |group: &&Group| step.reads(group.phase);
        let weight_bytes = groups.iter().filter(read).map(|group| group.bytes).sum::<u64>() as f64;
        let kv_bytes = match (step, sizes.units[unit]) {
            (StepKind::Decode { sequences, context_len }, Unit::DecoderLayer(_)) => {
                sequences * context_len * sizes.kv_bytes_per_token_and_layer()
            }
            _ => 0.0,
        };
        let rows = match sizes.units[unit] {
            Unit::Head => step.sequences(),
            _ => step.rows(&sizes.spec),
        };
        let work = UnitWork { rows, weight_bytes, kv_bytes, product_flops, attention_flops };
        let mut seconds = unit_seconds(&work, on, links, sizes.activation_dtype);
        if on != home {
            // Keys and values go to host memory, and come back to be attended to.
            let kv_bytes = self.shared_kv_bytes(sizes, step, unit);
            seconds += kv_bytes / links.between(on, home) + kv_bytes / links.between(home, on);
        }
        for group in groups.iter().filter(read) {
            let away = group.tensors.iter().map(|&tensor| (tensor, self.residency[tensor].place(home)));
            let copy_s: f64 = away
                .filter(|(_, rests)| *rests != on)
                .map(|(tensor, rests)| sizes.tensor_bytes(tensor) as f64 / links.between(rests, on))
                .sum();
            let use_s = seconds * group.bytes as f64 / weight_bytes.max(1.0);
            if self.is_streamed(group, on) { ring.pass_streamed(copy_s, use_s) } else { ring.now += use_s }
        }
        if weight_bytes == 0.0 {
            ring.now += seconds;
        }
        // Rows of the embedding are looked up where they rest.
        for group in groups.iter().filter(|group| group.phase == Phase::RowLookup) {
            let rests = self.residency[group.tensors[0]].place(home);
            if rests != on {
                let row = (sizes.spec.hidden_size * sizes.weight_dtype.size_bytes()) as f64;
                let text = if let StepKind::Prefill { text_tokens, .. } = step { text_tokens as f64 } else { rows };
                ring.now += row * text / links.between(rests, on);
            }
        }
    }

    /// Refuses what no budget allows.
    ///
    /// # Errors
    /// [`PlanError::OverBudget`] with the first device that holds more than it may.
    pub(crate) fn check(devices: &[DevicePlan]) -> Result<(), PlanError> {
        for plan in devices {
            if plan.budget_bytes.is_some_and(|budget| plan.used_bytes() > budget) {
                return Err(PlanError::OverBudget {
                    device: plan.device,
                    used_bytes: plan.used_bytes(),
                    budget_bytes: plan.budget_bytes.unwrap_or(0),
                });
            }
        }
        Ok(())
    }

    /// Consecutive units of one device.
    pub(crate) fn stages(&self, sizes: &Sizes) -> Vec<StagePlan> {
        StagePlan::join(self.executes_on.iter().copied().zip(sizes.units.iter().copied()))
    }

    /// Every tensor of the inventory with its place.
    pub(crate) fn tensors(&self, sizes: &Sizes) -> Vec<TensorPlacement> {
        let mut executes_on = vec![Device::Cpu; sizes.inventory.len()];
        for group in &sizes.groups {
            for &tensor in &group.tensors {
                executes_on[tensor] = self.executes_on[group.unit];
            }
        }
        let tensors = sizes.inventory.iter().zip(executes_on).zip(&self.residency).enumerate();
        tensors
            .map(|(index, ((tensor, executes_on), &residency))| TensorPlacement {
                tensor: tensor.clone(),
                executes_on,
                residency,
                bytes: sizes.tensor_bytes(index),
            })
            .collect()
    }

    /// The plan that this placement makes of `request`.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub(crate) fn into_plan(
        self, sizes: &Sizes, request: &crate::plan::PlanRequest, policy: Policy, mut notices: Vec<String>,
    ) -> Result<Plan, PlanError> {
        let devices = self.devices(sizes, &request.budgets, request.card_reserve_bytes(sizes));
        Self::check(&devices)?;
        let links = &request.links;
        let times = self.times(sizes, links);
        let limits = &sizes.limits;
        let sequences = limits.max_sequences as f64;
        let tokens_per_second = sequences / self.round_s(sizes, links, sequences, limits.context_len as f64);
        let used: Vec<Device> = devices.iter().filter(|plan| plan.used_bytes() > 0).map(|plan| plan.device).collect();
        notices.extend(links.missing(&used));
        Ok(Plan {
            policy,
            model: request.model.clone(),
            weight_dtype: sizes.weight_dtype,
            activation_dtype: sizes.activation_dtype,
            limits: sizes.limits,
            stages: self.stages(sizes),
            prefill: self.prefill,
            placements: self.tensors(sizes),
            devices,
            links: self.links(sizes),
            seconds_per_token: times.token_s,
            seconds_per_image: times.image_s,
            tokens_per_second,
            rates: links.describe(&used),
            notices,
            tensor_parallel: Vec::new(),
        })
    }
}

impl Sizes {
    /// Bytes of a tensor that travel where it does not rest with its unit: for one decoded token, for one image prefill.
    fn travelling_bytes(&self, tensor: usize) -> (u64, u64) {
        let bytes = self.tensor_bytes(tensor);
        match self.inventory[tensor].phase {
            Phase::EveryToken => (bytes, bytes),
            Phase::ImagePrefill => (0, bytes),
            Phase::RowLookup => {
                let row = (self.spec.hidden_size * self.weight_dtype.size_bytes()) as u64;
                // BOI, EOI and the patches come from the adapter.
                (row, row * IMAGE_PROMPT_TEXT_TOKENS as u64)
            }
        }
    }
}

/// The prompt that predictions are made for.
const IMAGE_PREFILL: StepKind = StepKind::Prefill { has_image: true, text_tokens: IMAGE_PROMPT_TEXT_TOKENS };

/// Predicted seconds of one step.
#[derive(Debug, Clone, Default)]
pub(crate) struct StepTimes {
    /// Through all stages.
    pub(crate) seconds: f64,
    /// Of each device in all its stages.
    pub(crate) busy: BTreeMap<Device, f64>,
}

/// The staging ring of a stage in time: groups are copied one after another, each as soon as a slot is free.
#[derive(Default)]
struct Ring {
    /// When the operations so far are done.
    now: f64,
    /// When the copies so far are done.
    copied: f64,
    /// When the group is done with that each slot held last.
    free: [f64; STAGING_SLOTS],
    num_groups: usize,
}

impl Ring {
    /// Copies a group into the next slot, and uses it.
    fn pass_streamed(&mut self, copy_s: f64, use_s: f64) {
        let slot = self.num_groups % STAGING_SLOTS;
        self.num_groups += 1;
        self.copied = self.copied.max(self.free[slot]) + copy_s;
        self.now = self.now.max(self.copied) + use_s;
        self.free[slot] = self.now;
    }
}
