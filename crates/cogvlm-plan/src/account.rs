//! The consequences of a placement: what every device holds, what crosses every link, how long it takes. Plans of our
//! own, plans read from JSON and maps written by hand are all charged here, by the same rules.

use std::collections::BTreeMap;

use cogvlm_core::workspace::workspace_bytes;
use cogvlm_core::{Device, Phase, Unit, WeightGroup};

use crate::error::PlanError;
use crate::own::sizes::{Group, IMAGE_PROMPT_TEXT_TOKENS, Sizes, staging_bytes};
use crate::plan::{
    DeviceBudget, DevicePlan, LinkPlan, Plan, Policy, Rates, Residency, STAGING_SLOTS, StagePlan, TensorPlacement,
};

/// Who executes each unit, and where each tensor rests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placement {
    /// For each unit in the order of execution.
    pub(crate) executes_on: Vec<Device>,
    /// For each tensor of the inventory.
    pub(crate) residency: Vec<Residency>,
}

/// Predicted seconds of a placement.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Times {
    /// One decoded token of one sequence.
    pub(crate) token_s: f64,
    /// One image prefill.
    pub(crate) image_s: f64,
    /// Decode step of the planned batch on the slowest device.
    pub(crate) slowest_step_s: f64,
    /// Image prefill on the slowest device.
    pub(crate) slowest_image_s: f64,
}

impl Placement {
    /// Indices of the units that `device` executes.
    fn units_on(&self, device: Device) -> impl Iterator<Item = usize> {
        self.executes_on.iter().enumerate().filter(move |(_, on)| **on == device).map(|(unit, _)| unit)
    }

    /// Whether a group is streamed to the device that executes it, and so goes through the staging ring. A group of
    /// which only a part rests elsewhere is streamed as a whole.
    fn is_streamed(&self, group: &Group) -> bool {
        self.executes_on[group.unit] != Device::Cpu
            && group.group != WeightGroup::Norms
            && group.phase != Phase::RowLookup
            && group.tensors.iter().any(|&tensor| self.residency[tensor] != Residency::Device)
    }

    /// What every device of `budgets` holds, in device order.
    pub(crate) fn devices(&self, sizes: &Sizes, budgets: &[DeviceBudget], reserve_bytes: u64) -> Vec<DevicePlan> {
        let mut weights: BTreeMap<Device, u64> = BTreeMap::new();
        let mut slots: BTreeMap<Device, u64> = BTreeMap::new();
        for group in &sizes.groups {
            let on = self.executes_on[group.unit];
            for &tensor in &group.tensors {
                *weights.entry(self.residency[tensor].place(on)).or_default() += sizes.tensor_bytes(tensor);
            }
            if self.is_streamed(group) {
                let staged: u64 = group.tensors.iter().map(|&tensor| staging_bytes(sizes.tensor_bytes(tensor))).sum();
                let slot = slots.entry(on).or_default();
                *slot = staged.max(*slot);
            }
        }
        let mut devices: Vec<_> =
            budgets.iter().map(|budget| self.device(sizes, budget, &weights, &slots, reserve_bytes)).collect();
        devices.sort_by_key(|plan| plan.device);
        devices
    }

    fn device(
        &self, sizes: &Sizes, budget: &DeviceBudget, weights: &BTreeMap<Device, u64>, slots: &BTreeMap<Device, u64>,
        reserve_bytes: u64,
    ) -> DevicePlan {
        let device = budget.device;
        let units: Vec<Unit> = self.units_on(device).map(|unit| sizes.units[unit]).collect();
        let layers = units.iter().filter(|unit| matches!(unit, Unit::DecoderLayer(_))).count() as u64;
        let weight_bytes = weights.get(&device).copied().unwrap_or(0);
        // A card that nothing is asked of is never opened.
        let opened = matches!(device, Device::Gpu(_)) && (weight_bytes > 0 || !units.is_empty());
        DevicePlan {
            device,
            budget_bytes: (device != Device::Disk).then_some(budget.bytes),
            weight_bytes,
            kv_bytes: layers * sizes.kv_per_layer,
            workspace_bytes: workspace_bytes(&sizes.spec, &units, &sizes.limits, sizes.activation_dtype),
            staging_bytes: STAGING_SLOTS as u64 * slots.get(&device).copied().unwrap_or(0),
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
        for (unit, pair) in self.executes_on.windows(2).enumerate() {
            if pair[0] != pair[1] {
                let (per_token, per_image) = sizes.hop_bytes(unit);
                charge(pair[0], pair[1], per_token, per_image);
            }
        }
        for group in &sizes.groups {
            let on = self.executes_on[group.unit];
            for &tensor in &group.tensors {
                let rests = self.residency[tensor].place(on);
                // What the host executes it reads where it lies.
                let in_place = rests == on || (on == Device::Cpu && rests == Device::Cpu);
                if !in_place {
                    let (per_token, per_image) = sizes.travelling_bytes(tensor);
                    charge(rests, on, per_token, per_image);
                }
            }
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

    /// Predicted times. A unit takes as long as the slower of its arithmetic or reads and its copies, which run
    /// behind one another's backs; stages of one request follow each other.
    pub(crate) fn times(&self, sizes: &Sizes, rates: &Rates) -> Times {
        let batch = sizes.limits.max_sequences as f64;
        let mut times = Times::default();
        let mut busy: BTreeMap<Device, (f64, f64)> = BTreeMap::new();
        let mut first_group = 0;
        for (unit, &on) in self.executes_on.iter().enumerate() {
            let groups = &sizes.groups[first_group..first_group + sizes.groups_of[unit].len()];
            first_group += groups.len();
            let cost = self.unit_cost(sizes, rates, unit, groups);
            let (token, step) = (cost.decode_s(rates, on, 1.0), cost.decode_s(rates, on, batch));
            let image = cost.image_s(rates, on);
            times.token_s += token;
            times.image_s += image;
            let device = busy.entry(on).or_default();
            device.0 += step;
            device.1 += image;
            if let Some(&next) = self.executes_on.get(unit + 1).filter(|next| **next != on) {
                let (per_token, per_image) = sizes.hop_bytes(unit);
                let link = rates.between(on, next);
                if per_token > 0 {
                    times.token_s += rates.hop_s + per_token as f64 / link;
                }
                times.image_s += rates.hop_s + per_image as f64 / link;
            }
        }
        times.slowest_step_s = busy.values().map(|busy| busy.0).fold(0.0, f64::max);
        times.slowest_image_s = busy.values().map(|busy| busy.1).fold(0.0, f64::max);
        times
    }

    fn unit_cost(&self, sizes: &Sizes, rates: &Rates, unit: usize, groups: &[Group]) -> UnitCost {
        let on = self.executes_on[unit];
        let mut cost = UnitCost { prefill_flops: sizes.prefill_flops(&(unit..unit + 1)), ..UnitCost::default() };
        if matches!(sizes.units[unit], Unit::DecoderLayer(_)) {
            cost.kv_bytes = sizes.kv_per_layer as f64 / sizes.limits.max_sequences as f64;
        }
        for &tensor in groups.iter().flat_map(|group| &group.tensors) {
            let spec = &sizes.inventory[tensor];
            if spec.phase == Phase::EveryToken {
                cost.hot_bytes += sizes.tensor_bytes(tensor) as f64;
                cost.hot_elements += spec.num_elements() as f64;
            }
            let rests = self.residency[tensor].place(on);
            if rests != on {
                let (per_token, per_image) = sizes.travelling_bytes(tensor);
                let link = rates.between(rests, on);
                cost.decode_copy_s += per_token as f64 / link;
                cost.image_copy_s += per_image as f64 / link;
            }
        }
        cost
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
        let mut stages: Vec<StagePlan> = Vec::new();
        for (&unit, &device) in sizes.units.iter().zip(&self.executes_on) {
            match stages.last_mut() {
                Some(stage) if stage.device == device => stage.units.push(unit),
                _ => stages.push(StagePlan { device, units: vec![unit] }),
            }
        }
        stages
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
        self, sizes: &Sizes, request: &crate::plan::PlanRequest, policy: Policy, notices: Vec<String>,
    ) -> Result<Plan, PlanError> {
        let devices = self.devices(sizes, &request.budgets, request.card_reserve_bytes(sizes));
        Self::check(&devices)?;
        let times = self.times(sizes, &request.rates);
        Ok(Plan {
            policy,
            model: request.model.clone(),
            weight_dtype: sizes.weight_dtype,
            activation_dtype: sizes.activation_dtype,
            limits: sizes.limits,
            stages: self.stages(sizes),
            placements: self.tensors(sizes),
            devices,
            links: self.links(sizes),
            seconds_per_token: times.token_s,
            seconds_per_image: times.image_s,
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

/// What running one unit takes.
#[derive(Default)]
struct UnitCost {
    hot_bytes: f64,
    hot_elements: f64,
    /// Of one sequence.
    kv_bytes: f64,
    decode_copy_s: f64,
    image_copy_s: f64,
    prefill_flops: f64,
}

impl UnitCost {
    fn decode_s(&self, rates: &Rates, on: Device, batch: f64) -> f64 {
        let (bandwidth, arithmetic) = rates_of(rates, on);
        let reads = (self.hot_bytes + self.kv_bytes * batch) / bandwidth;
        reads.max(2.0 * self.hot_elements * batch / arithmetic).max(self.decode_copy_s)
    }

    fn image_s(&self, rates: &Rates, on: Device) -> f64 {
        (self.prefill_flops / rates_of(rates, on).1).max(self.image_copy_s)
    }
}

/// Bytes and operations per second of a device.
pub(crate) fn rates_of(rates: &Rates, device: Device) -> (f64, f64) {
    match device {
        Device::Gpu(_) => (rates.device_bytes_per_s, rates.device_flops_per_s),
        Device::Cpu | Device::Disk => (rates.host_bytes_per_s, rates.host_flops_per_s),
    }
}
