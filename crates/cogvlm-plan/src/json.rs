//! Plans as JSON, `cogvlm-shard.plan/1`: written, and read back with nothing taken on trust.

use std::collections::BTreeMap;

use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{DType, Device, ModelSpec, Phase, Unit, WeightGroup};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::account::Placement;
use crate::error::PlanError;
use crate::links::Links;
use crate::own::sizes::Sizes;
use crate::plan::{
    DeviceBudget, DevicePlan, LinkPlan, Plan, PlanRequest, Policy, Prefill, Residency, StagePlan, check_budgets,
    check_limits, limits_on,
};
use crate::tensor::plan_reserving;

/// The schema that is written, and the only one that is read.
pub const PLAN_SCHEMA: &str = "cogvlm-shard.plan/1";

/// The file, key for key. Keys of `devices` are device names; units stand under their module paths.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PlanFile {
    schema: String,
    policy: Policy,
    model: String,
    weight_dtype: DType,
    activation_dtype: DType,
    limits: LimitsFile,
    device_map: Map<String, Value>,
    placed: Vec<(String, Device)>,
    devices: Map<String, Value>,
    stages: Vec<StageFile>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    prefill: Option<Prefill>,
    /// Where each tensor rests that does not rest with the unit that uses it.
    tensors_off_device: Map<String, Value>,
    links: Vec<LinkFile>,
    predicted_seconds_per_token: f64,
    predicted_seconds_per_image: f64,
    /// Plans were written before there were these two.
    #[serde(default)]
    predicted_tokens_per_second: f64,
    #[serde(default)]
    predicted_with: String,
    notices: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    tensor_parallel: Vec<Device>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LimitsFile {
    context: usize,
    batch: usize,
    max_tokens: usize,
    max_images: usize,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DeviceFile {
    budget_bytes: Option<u64>,
    weight_bytes: u64,
    kv_bytes: u64,
    workspace_bytes: u64,
    staging_bytes: u64,
    reserved_bytes: u64,
    free_bytes: Option<u64>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StageFile {
    device: Device,
    units: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LinkFile {
    from: Device,
    to: Device,
    bytes_per_token: u64,
    bytes_per_image: u64,
}

impl Plan {
    /// The plan as pretty-printed JSON. The same plan gives the same text.
    pub fn to_json(&self) -> String {
        let file = PlanFile {
            schema: PLAN_SCHEMA.to_owned(),
            policy: self.policy,
            model: self.model.clone(),
            weight_dtype: self.weight_dtype,
            activation_dtype: self.activation_dtype,
            limits: LimitsFile {
                context: self.limits.context_len,
                batch: self.limits.max_sequences,
                max_tokens: self.limits.max_tokens,
                max_images: self.limits.max_images,
            },
            device_map: self.device_map().into_iter().map(|(key, device)| (key, device_value(device))).collect(),
            placed: self.placed(),
            devices: self.devices.iter().map(device_entry).collect(),
            stages: self
                .stages
                .iter()
                .map(|stage| StageFile {
                    device: stage.device,
                    units: stage.units.iter().map(|&unit| unit_path(unit)).collect(),
                })
                .collect(),
            prefill: self.prefill,
            tensors_off_device: self.tensors_off_device(),
            links: self
                .links
                .iter()
                .map(|link| LinkFile {
                    from: link.from,
                    to: link.to,
                    bytes_per_token: link.bytes_per_token,
                    bytes_per_image: link.bytes_per_image,
                })
                .collect(),
            predicted_seconds_per_token: self.seconds_per_token,
            predicted_seconds_per_image: self.seconds_per_image,
            predicted_tokens_per_second: self.tokens_per_second,
            predicted_with: self.rates.clone(),
            notices: self.notices.clone(),
            tensor_parallel: self.tensor_parallel.clone(),
        };
        serde_json::to_string_pretty(&file).expect("a plan has text keys and finite numbers")
    }

    /// Tensors that do not rest with the unit that uses them, and where they rest.
    fn tensors_off_device(&self) -> Map<String, Value> {
        let placements = self.placements.iter().map(|placement| {
            (&placement.tensor.name, placement.executes_on, placement.residency.place(placement.executes_on))
        });
        let off_device = placements.filter(|(_, executes_on, rests)| rests != executes_on);
        off_device.map(|(name, _, rests)| (name.clone(), device_value(rests))).collect()
    }

    /// Reads a plan of the model of `spec` that [`to_json`](Self::to_json) wrote. Everything that follows from stages
    /// and places is computed again and has to agree; only predicted times and notices are taken as they stand.
    ///
    /// # Errors
    /// [`PlanError::Map`] with the field that does not hold; [`PlanError::OverBudget`]; the errors of a request for
    /// limits and budgets.
    pub fn from_json(text: &str, spec: &ModelSpec) -> Result<Self, PlanError> {
        let value: Value = serde_json::from_str(text).map_err(|error| wrong("plan", &error.to_string()))?;
        match value.get("schema").and_then(Value::as_str) {
            Some(PLAN_SCHEMA) => {}
            Some(other) => return Err(wrong("schema", &format!("is `{other}`; this program reads `{PLAN_SCHEMA}`"))),
            None => return Err(wrong("schema", &format!("is missing; a plan says `{PLAN_SCHEMA}`"))),
        }
        let file: PlanFile = serde_json::from_value(value).map_err(|error| wrong("plan", &error.to_string()))?;
        if file.policy == Policy::Auto {
            return Err(wrong("policy", "is `auto`; a plan names the policy that made it"));
        }
        for (field, what, value) in [
            ("predicted_seconds_per_token", "time", file.predicted_seconds_per_token),
            ("predicted_seconds_per_image", "time", file.predicted_seconds_per_image),
            ("predicted_tokens_per_second", "rate", file.predicted_tokens_per_second),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(wrong(field, &format!("is {value}; a {what} is not negative")));
            }
        }
        let limits = StepLimits {
            max_tokens: file.limits.max_tokens,
            max_sequences: file.limits.batch,
            max_images: file.limits.max_images,
            context_len: file.limits.context,
            parcels: 0,
        };
        check_limits(&limits)?;
        let devices = read_devices(&file.devices)?;
        let budgets: Vec<DeviceBudget> = devices
            .iter()
            .map(|(device, file)| DeviceBudget { device: *device, bytes: file.budget_bytes.unwrap_or(0) })
            .collect();
        check_budgets(&budgets)?;
        if !file.tensor_parallel.is_empty() {
            return read_group(file, spec, limits, budgets, &devices);
        }
        let limits = limits_on(limits, &budgets);
        let sizes = Sizes::new(spec, file.weight_dtype, file.activation_dtype, limits);
        let known = |device: Device| devices.contains_key(&device);
        let executes_on = read_stages(&file.stages, &sizes, known)?;
        let residency = read_residency(&file.tensors_off_device, &sizes, &executes_on, known)?;
        let placement = Placement { executes_on, residency, prefill: file.prefill };
        placement.check_prefill(&sizes, known)?;

        let reserve = devices.values().map(|device| device.reserved_bytes).max().unwrap_or(0);
        let plan = Self {
            policy: file.policy,
            model: file.model,
            weight_dtype: file.weight_dtype,
            activation_dtype: file.activation_dtype,
            limits,
            stages: placement.stages(&sizes),
            prefill: placement.prefill,
            placements: placement.tensors(&sizes),
            devices: placement.devices(&sizes, &budgets, reserve),
            links: placement.links(&sizes),
            seconds_per_token: file.predicted_seconds_per_token,
            seconds_per_image: file.predicted_seconds_per_image,
            tokens_per_second: file.predicted_tokens_per_second,
            rates: file.predicted_with,
            notices: file.notices,
            tensor_parallel: Vec::new(),
        };
        if plan.stages.len() != file.stages.len() {
            return Err(wrong("stages", "follow one another on one device; join them"));
        }
        for plan in &plan.devices {
            compare_device(plan, &devices[&plan.device])?;
        }
        Placement::check(&plan.devices)?;
        compare_links(&plan.links, &file.links)?;
        let map: Map<String, Value> =
            plan.device_map().into_iter().map(|(key, device)| (key, device_value(device))).collect();
        if map != file.device_map {
            return Err(wrong("device_map", "does not follow from `stages` and `tensors_off_device`"));
        }
        if plan.placed() != file.placed {
            return Err(wrong("placed", "does not follow from `stages` and `tensors_off_device`"));
        }
        Ok(plan)
    }
}

/// Path of the module that a unit is; the head is `lm_head`.
fn unit_path(unit: Unit) -> String {
    match unit {
        Unit::PatchEmbedding => "model.vision.patch_embedding".to_owned(),
        Unit::VitLayer(layer) => format!("model.vision.transformer.layers.{layer}"),
        Unit::Adapter => "model.vision.linear_proj".to_owned(),
        Unit::Embedding => "model.embed_tokens".to_owned(),
        Unit::DecoderLayer(layer) => format!("model.layers.{layer}"),
        Unit::Head => "lm_head".to_owned(),
    }
}

fn device_value(device: Device) -> Value {
    match device {
        Device::Gpu(number) if device.process() == 0 => number.into(),
        place => place.to_string().into(),
    }
}

fn read_device(value: &Value, field: &str) -> Result<Device, PlanError> {
    Device::deserialize(value).map_err(|error| wrong(field, &error.to_string()))
}

fn device_entry(plan: &DevicePlan) -> (String, Value) {
    let file = DeviceFile {
        budget_bytes: plan.budget_bytes,
        weight_bytes: plan.weight_bytes,
        kv_bytes: plan.kv_bytes,
        workspace_bytes: plan.workspace_bytes,
        staging_bytes: plan.staging_bytes,
        reserved_bytes: plan.reserved_bytes,
        free_bytes: plan.free_bytes(),
    };
    (plan.device.to_string(), serde_json::to_value(file).expect("whole numbers are JSON"))
}

fn read_devices(devices: &Map<String, Value>) -> Result<BTreeMap<Device, DeviceFile>, PlanError> {
    let mut read = BTreeMap::new();
    for (key, value) in devices {
        let field = format!("devices.{key}");
        let device = Device::parse(key)
            .filter(|device| device.to_string() == *key)
            .ok_or_else(|| wrong(&field, "is no device: use a card's number, `cpu` or `disk`"))?;
        let file = DeviceFile::deserialize(value).map_err(|error| wrong(&field, &error.to_string()))?;
        if file.budget_bytes.is_none() != (device == Device::Disk) {
            return Err(wrong(
                &format!("{field}.budget_bytes"),
                "is a number for every device but `disk`, which has none",
            ));
        }
        read.insert(device, file);
    }
    Ok(read)
}

fn read_stages(stages: &[StageFile], sizes: &Sizes, known: impl Fn(Device) -> bool) -> Result<Vec<Device>, PlanError> {
    let paths: Vec<String> = sizes.units.iter().map(|&unit| unit_path(unit)).collect();
    let mut executes_on = Vec::with_capacity(paths.len());
    for (index, stage) in stages.iter().enumerate() {
        let field = format!("stages[{index}]");
        if !stage.device.executes() || !known(stage.device) {
            let problem = format!("is `{}`, which `devices` does not list as one that executes", stage.device);
            return Err(wrong(&format!("{field}.device"), &problem));
        }
        if stage.units.is_empty() {
            return Err(wrong(&format!("{field}.units"), "is empty"));
        }
        for unit in &stage.units {
            let expected = paths.get(executes_on.len());
            if expected != Some(unit) {
                let problem = match (paths.iter().position(|path| path == unit), expected) {
                    (None, _) => format!("names `{unit}`, which is no unit of this model"),
                    (Some(at), _) if at < executes_on.len() => format!("names `{unit}` a second time"),
                    (Some(_), Some(expected)) => format!("names `{unit}` where `{expected}` is next to be executed"),
                    (Some(_), None) => format!("names `{unit}` behind the last unit"),
                };
                return Err(wrong(&format!("{field}.units"), &problem));
            }
            executes_on.push(stage.device);
        }
    }
    match paths.get(executes_on.len()) {
        Some(missing) => Err(wrong("stages", &format!("end before `{missing}`"))),
        None => Ok(executes_on),
    }
}

fn read_residency(
    off_device: &Map<String, Value>, sizes: &Sizes, executes_on: &[Device], known: impl Fn(Device) -> bool,
) -> Result<Vec<Residency>, PlanError> {
    let mut residency = vec![Residency::Device; sizes.inventory.len()];
    let mut num_found = 0;
    for group in &sizes.groups {
        let on = executes_on[group.unit];
        for &tensor in &group.tensors {
            let name = &sizes.inventory[tensor].name;
            let at_home = if on == Device::Cpu { Residency::Host } else { Residency::Device };
            let Some(value) = off_device.get(name) else {
                residency[tensor] = at_home;
                continue;
            };
            num_found += 1;
            let field = format!("tensors_off_device.{name}");
            let rests = read_device(value, &field)?;
            let problem = if !known(rests) {
                "is a device that `devices` does not list"
            } else if rests == on {
                "is the device that executes its unit; leave it out"
            } else if group.group == WeightGroup::Norms && on != Device::Cpu {
                "is elsewhere, but norms rest with their unit"
            } else if matches!(rests, Device::Gpu(_)) && on == Device::Cpu {
                "is a card, but units of the host read host memory or the file"
            } else if matches!(rests, Device::Gpu(_)) && group.phase == Phase::RowLookup {
                "is another card, but rows are looked up on their own card or on the host"
            } else {
                residency[tensor] = match rests {
                    Device::Gpu(_) => Residency::Peer(rests),
                    Device::Cpu => Residency::Host,
                    Device::Disk => Residency::File,
                };
                continue;
            };
            return Err(wrong(&field, problem));
        }
    }
    if num_found < off_device.len() {
        let names: std::collections::HashSet<&str> =
            sizes.inventory.iter().map(|tensor| tensor.name.as_str()).collect();
        let unknown = off_device.keys().find(|name| !names.contains(name.as_str())).map_or("", String::as_str);
        return Err(wrong(&format!("tensors_off_device.{unknown}"), "is no tensor of this model"));
    }
    Ok(residency)
}

impl Placement {
    /// Refuses a card that prefills nothing, or cannot.
    fn check_prefill(&self, sizes: &Sizes, known: impl Fn(Device) -> bool) -> Result<(), PlanError> {
        let Some(Prefill { device, from_rows }) = self.prefill else { return Ok(()) };
        if !matches!(device, Device::Gpu(_)) || !known(device) {
            return Err(wrong("prefill.device", &format!("is `{device}`, which is no card that `devices` lists")));
        }
        if device.process() != Device::Cpu.process() {
            return Err(wrong("prefill.device", &format!("is `{device}`, which is not of the host's process")));
        }
        if from_rows == 0 {
            return Err(wrong("prefill.from_rows", "is 0; a step has at least one row"));
        }
        if (0..sizes.units.len()).all(|unit| self.prefills(sizes, unit).is_none()) {
            return Err(wrong("prefill", "is there, but the host executes no decoder layer"));
        }
        Ok(())
    }
}

/// A plan of cards that compute every layer together: made again from the little that it depends on, and compared.
fn read_group(
    file: PlanFile, spec: &ModelSpec, limits: StepLimits, budgets: Vec<DeviceBudget>,
    devices: &BTreeMap<Device, DeviceFile>,
) -> Result<Plan, PlanError> {
    let request = PlanRequest {
        model: file.model,
        spec: spec.clone(),
        weight_dtype: file.weight_dtype,
        activation_dtype: file.activation_dtype,
        budgets,
        policy: file.policy,
        limits,
        reserve_bytes: 0,
        links: Links::default(),
    };
    let reserve_bytes = devices.values().map(|device| device.reserved_bytes).max().unwrap_or(0);
    let plan = plan_reserving(&request, &file.tensor_parallel, reserve_bytes)?;
    let stages: Vec<(Device, Vec<String>)> = file.stages.into_iter().map(|stage| (stage.device, stage.units)).collect();
    let units = |stage: &StagePlan| stage.units.iter().map(|&unit| unit_path(unit)).collect();
    if plan.stages.iter().map(|stage| (stage.device, units(stage))).collect::<Vec<_>>() != stages {
        return Err(wrong("stages", "are not all units on the first device of `tensor_parallel`"));
    }
    if file.prefill.is_some() {
        return Err(wrong("prefill", "is there, but devices of `tensor_parallel` compute every step"));
    }
    if plan.tensors_off_device() != file.tensors_off_device {
        return Err(wrong("tensors_off_device", "is not what the budgets of `tensor_parallel` leave to other devices"));
    }
    for plan in &plan.devices {
        compare_device(plan, &devices[&plan.device])?;
    }
    compare_links(&plan.links, &file.links)?;
    let map: Map<String, Value> =
        plan.device_map().into_iter().map(|(key, device)| (key, device_value(device))).collect();
    if map != file.device_map || plan.placed() != file.placed {
        return Err(wrong("device_map", "or `placed` does not follow from `stages`"));
    }
    let (seconds_per_token, seconds_per_image) = (file.predicted_seconds_per_token, file.predicted_seconds_per_image);
    Ok(Plan { policy: file.policy, seconds_per_token, seconds_per_image, notices: file.notices, ..plan })
}

fn compare_device(plan: &DevicePlan, file: &DeviceFile) -> Result<(), PlanError> {
    for (name, stated, implied) in [
        ("weight_bytes", file.weight_bytes, plan.weight_bytes),
        ("kv_bytes", file.kv_bytes, plan.kv_bytes),
        ("workspace_bytes", file.workspace_bytes, plan.workspace_bytes),
        ("staging_bytes", file.staging_bytes, plan.staging_bytes),
        ("reserved_bytes", file.reserved_bytes, plan.reserved_bytes),
        ("free_bytes", file.free_bytes.unwrap_or(0), plan.free_bytes().unwrap_or(0)),
    ] {
        if stated != implied {
            let problem = format!("is {stated}, but the rest of the plan implies {implied}");
            return Err(wrong(&format!("devices.{}.{name}", plan.device), &problem));
        }
    }
    Ok(())
}

fn compare_links(links: &[LinkPlan], files: &[LinkFile]) -> Result<(), PlanError> {
    let stated: Vec<LinkPlan> = files
        .iter()
        .map(|file| LinkPlan {
            from: file.from,
            to: file.to,
            bytes_per_token: file.bytes_per_token,
            bytes_per_image: file.bytes_per_image,
        })
        .collect();
    if stated == links { Ok(()) } else { Err(wrong("links", "does not follow from `stages` and `tensors_off_device`")) }
}

fn wrong(field: &str, problem: &str) -> PlanError {
    PlanError::Map { field: format!("`{field}`"), problem: problem.to_owned() }
}
