//! From flags to an engine: model, plan, ranks.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cogvlm_backend::RopeMode;
use cogvlm_checkpoint::{ModelSource, SyntheticModel, read_config};
use cogvlm_core::module_tree::Module;
use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{DType, Device, ModelConfig, ModelSpec};
use cogvlm_cpu::{CpuBackend, Threads};
use cogvlm_cuda::CudaBackend;
use cogvlm_device::AnyBackend;
use cogvlm_parallel::TensorParallel;
use cogvlm_pipeline::{Engine, LoadError, Processes, Way, load_plan};
use cogvlm_plan::accelerate::ModuleTree;
use cogvlm_plan::links::Links;
use cogvlm_plan::plan::{
    CUDA_RESERVE_BYTES, DeviceBudget, DevicePlan, NCCL_RESERVE_BYTES, Plan, PlanRequest, Policy,
    VIRTUAL_RANK_RESERVE_BYTES,
};
use cogvlm_plan::{PlanError, plan, plan_tensor_parallel};
use serde::Deserialize;

use crate::args::{BackendArg, ModelArgs, PlacementArgs, RopeArg, TransportArg};
use crate::cluster;
use crate::commands::plan::accelerate_map;
use crate::error::{CliError, CliResult};
use crate::machine::{Machine, is_automatic, on_one_gpu, read_links};
use crate::output::note;
use crate::progress::byte_bar;
use crate::prompt::read_text;

/// A rank: a device, or several that compute every layer together.
pub(crate) type RankBackend = TensorParallel<AnyBackend>;

/// A model that is loaded and answers.
pub(crate) struct Session {
    pub(crate) engine: Engine<RankBackend>,
    pub(crate) plan: Plan,
    /// Rates that it was made with.
    pub(crate) links: Links,
    /// What carries rows between processes.
    pub(crate) ways: Vec<Way>,
    /// Whether numbered devices are GPUs.
    pub(crate) on_gpus: bool,
    pub(crate) source: ModelSource,
    pub(crate) load_time: Duration,
    pub(crate) num_threads: usize,
}

/// The sizes of a model and the element type of its weights: what planning needs.
pub(crate) struct PlannedModel {
    pub(crate) name: String,
    pub(crate) spec: ModelSpec,
    pub(crate) weight_dtype: DType,
}

impl Session {
    /// Plans and loads the model `source`, which `args` name. The plan is shown before the load where `show_plan` says so.
    /// `None` in a process that has worked for process 0 until the end of the run.
    pub(crate) fn open(args: &ModelArgs, source: ModelSource, show_plan: bool) -> CliResult<Option<Self>> {
        match args.backend {
            BackendArg::Cpu => Self::open_on(Machine::Host, args, source, show_plan),
            BackendArg::Cuda => Self::open_on(Machine::gpus()?, args, source, show_plan),
            BackendArg::Auto => {
                let opened = match Machine::gpus() {
                    Ok(machine) => Self::open_on(machine, args, source.clone(), show_plan),
                    Err(error) => {
                        tracing::info!("running on the host: {}", error.message());
                        return Self::open_on(Machine::Host, args, source, show_plan);
                    }
                };
                match opened {
                    Err(error) if error.is_no_gpu() => {
                        // There is a GPU, so whoever runs this may count on it.
                        tracing::warn!("running on the host: {}", error.message());
                        Self::open_on(Machine::Host, args, source, show_plan)
                    }
                    opened => opened,
                }
            }
        }
    }

    fn open_on(
        mut machine: Machine, args: &ModelArgs, source: ModelSource, show_plan: bool,
    ) -> CliResult<Option<Self>> {
        let start = Instant::now();
        let request = plan_request(args, &source, &mut machine)?;
        let plan = make_plan(args, &request, &mut machine)?;
        let processes = cluster::meet(args, &plan, machine.on_gpus())?;
        let process = processes.as_ref().map_or(0, Processes::rank);
        if show_plan && process == 0 {
            note(plan.report(Some(&request)).trim_end());
        }
        for notice in &plan.notices {
            tracing::info!("{notice}");
        }
        let failed = |error: CliError| cluster::fail(processes.as_ref(), error);
        let beside_context = request.reserve_bytes.saturating_sub(CUDA_RESERVE_BYTES);
        machine.check(&plan, process, beside_context).map_err(failed)?;
        let on_gpus = machine.on_gpus();
        let threads = thread_pool(args.threads).map_err(failed)?;
        let num_threads = threads.num_threads();
        let activations = DType::from(args.dtype);
        let open_device = |planned: &DevicePlan| {
            let (device, capacity) = (planned.device, planned.used_bytes() - planned.reserved_bytes);
            let backend = match device.ordinal().filter(|_| on_gpus) {
                Some(ordinal) => CudaBackend::new(device, ordinal, capacity, activations).map(AnyBackend::Cuda),
                None => CpuBackend::new(device, capacity, activations, Arc::clone(&threads)).map(AnyBackend::Cpu),
            };
            backend.map(|backend| (device, backend))
        };
        let make_backend = |leader: &DevicePlan| {
            let members = plan.members_with(leader.device).into_iter().map(open_device);
            RankBackend::new(members.collect::<Result<_, _>>()?, source.spec(), &plan.limits)
        };
        let rope_mode = match args.rope {
            RopeArg::Float32 => RopeMode::Float32,
            RopeArg::Published => RopeMode::Published,
        };
        let bar = byte_bar("loading", source.total_bytes());
        let progress = |done: u64, total: u64| {
            bar.set_length(total);
            bar.set_position(done);
        };
        let spec = source.spec().clone();
        let ranks = load_plan(&plan, &spec, &source, rope_mode, &make_backend, &progress, processes);
        bar.finish_and_clear();
        let ranks = ranks.map_err(load_error)?;
        if process > 0 {
            note(&format!("process {process} is loaded and works for process 0"));
            ranks.serve().map_err(CliError::new)?;
            return Ok(None);
        }
        let (links, ways, load_time) = (request.links, ranks.ways().to_vec(), start.elapsed());
        let engine = Engine::new(spec, plan.limits, ranks);
        Ok(Some(Self { engine, plan, links, ways, on_gpus, source, load_time, num_threads }))
    }

    /// The most that each device has held, as a JSON object.
    pub(crate) fn peak_memory(&self) -> serde_json::Map<String, serde_json::Value> {
        self.engine.memory().into_iter().map(|(device, memory)| (device.to_string(), memory.peak.into())).collect()
    }
}

/// Threads that all virtual ranks share.
fn thread_pool(num_threads: Option<usize>) -> CliResult<Arc<Threads>> {
    if num_threads.is_some_and(|count| count == 0 || count > 1024) {
        return Err(CliError::usage("`--threads` must lie between 1 and 1024"));
    }
    let threads = Threads::new(num_threads.unwrap_or(0));
    threads
        .map(Arc::new)
        .map_err(|error| CliError::new(format!("cannot start the threads of the CPU backend: {error}")))
}

/// A plan that cannot be made, with what would make it fit.
pub(crate) fn plan_error(error: PlanError) -> CliError {
    CliError::with_hint(&error, error.hint())
}

/// A plan that cannot be loaded, with what to do where that is known.
fn load_error(error: LoadError) -> CliError {
    let hint = error.hint();
    let error = match error {
        LoadError::Open(source) => CliError::no_gpu(source),
        error => CliError::new(error),
    };
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

/// Opens `MODEL` for running.
pub(crate) fn open_source(model: &str) -> CliResult<ModelSource> {
    if ModelConfig::built_in(model).is_some() && !Path::new(model).exists() {
        return Err(CliError::new(format!("`{model}` is a configuration without weights"))
            .hint(format!("`{model}@1` has synthetic weights; published weights are given as their directory")));
    }
    Ok(ModelSource::open(model)?)
}

/// Reads the configuration of `MODEL` for planning: weights are not needed.
pub(crate) fn planned_model(model: &str) -> CliResult<PlannedModel> {
    let path = Path::new(model);
    let config = if path.exists() {
        read_config(&if path.is_dir() { path.join("config.json") } else { path.to_owned() })?
    } else if let Some(config) = ModelConfig::built_in(model) {
        config
    } else if model.contains('@') {
        SyntheticModel::parse(model)?.config().clone()
    } else {
        let known: Vec<&str> = cogvlm_core::config::built_in_names().collect();
        return Err(CliError::new(format!("cannot read `{model}`: it does not exist"))
            .hint(format!("give a checkpoint directory, a config.json, or one of {}", known.join(", "))));
    };
    let wrong = |error: &dyn std::fmt::Display| CliError::new(format!("`{model}`: {error}"));
    let spec = config.resolve().map_err(|error| wrong(&error))?;
    let known = [DType::F32, DType::F16, DType::Bf16];
    let weight_dtype = match config.torch_dtype.as_deref() {
        None => DType::Bf16,
        Some(name) => known
            .into_iter()
            .find(|dtype| dtype.torch_name() == name)
            .ok_or_else(|| wrong(&format!("`torch_dtype` is {name}, but weights are float32, float16 or bfloat16")))?,
    };
    Ok(PlannedModel { name: model.to_owned(), spec, weight_dtype })
}

fn plan_request(args: &ModelArgs, source: &ModelSource, machine: &mut Machine) -> CliResult<PlanRequest> {
    let first = source.tensors().first();
    let model = PlannedModel {
        name: args.model.clone(),
        spec: source.spec().clone(),
        weight_dtype: first.map_or(DType::Bf16, |tensor| tensor.dtype),
    };
    if args.device_map.is_some() && is_automatic(&args.placement) {
        // The map says which devices it means.
        let (dtype, links) = (DType::from(args.dtype), machine.links(read_links(&args.placement)?, &[]));
        return request_for(model, &args.placement, dtype, machine.on_gpus(), Vec::new(), links);
    }
    placed_request(model, &args.placement, DType::from(args.dtype), machine)
}

/// What the flags ask the planner for, with the budgets of this machine where they are left to it.
pub(crate) fn placed_request(
    model: PlannedModel, placement: &PlacementArgs, activation_dtype: DType, machine: &mut Machine,
) -> CliResult<PlanRequest> {
    // A file that does not hold is refused before any GPU is opened.
    let links = read_links(placement)?;
    let budgets = machine.budgets(placement)?;
    let links = machine.links(links, &budgets);
    let request = request_for(model, placement, activation_dtype, machine.on_gpus(), budgets, links)?;
    let is_alone = num_together(placement) == 1;
    Ok(if is_alone && is_automatic(placement) { on_one_gpu(request) } else { request })
}

/// Devices that are to compute every layer together.
pub(crate) fn num_together(placement: &PlacementArgs) -> usize {
    placement.tensor_parallel.map_or(1, usize::from)
}

/// The plan of `request` that the flags ask for, by one of our own policies or of devices that compute together.
pub(crate) fn plan_of(request: &PlanRequest, placement: &PlacementArgs) -> Result<Plan, PlanError> {
    match num_together(placement) {
        1 => plan(request),
        num_members => plan_tensor_parallel(request, num_members),
    }
}

/// What is set aside on every card: more where NCCL may join it to those of other processes.
fn reserve_bytes(on_gpus: bool, budgets: &[DeviceBudget], placement: &PlacementArgs) -> u64 {
    let is_joined = budgets.iter().any(|budget| budget.device.process() > 0);
    match (on_gpus, is_joined && placement.transport != TransportArg::Tcp) {
        (false, _) => VIRTUAL_RANK_RESERVE_BYTES,
        (true, false) => CUDA_RESERVE_BYTES,
        (true, true) => CUDA_RESERVE_BYTES + NCCL_RESERVE_BYTES,
    }
}

/// What the flags ask the planner for: on GPUs, which have a context each, or on virtual ranks.
pub(crate) fn request_for(
    model: PlannedModel, placement: &PlacementArgs, activation_dtype: DType, on_gpus: bool, budgets: Vec<DeviceBudget>,
    links: Links,
) -> CliResult<PlanRequest> {
    let PlannedModel { name, spec, weight_dtype } = model;
    let reserve_bytes = reserve_bytes(on_gpus, &budgets, placement);
    let longest = spec.max_position_embeddings;
    let context_len = placement.context.unwrap_or(longest);
    if context_len > longest {
        return Err(CliError::new(format!(
            "`--context {context_len}` exceeds the {longest} tokens that the model was made for"
        )));
    }
    Ok(PlanRequest {
        model: name,
        spec,
        weight_dtype,
        activation_dtype,
        budgets,
        policy: placement.policy.into(),
        limits: StepLimits::new(context_len, placement.batch.unwrap_or(1)),
        reserve_bytes,
        links,
    })
}

fn make_plan(args: &ModelArgs, request: &PlanRequest, machine: &mut Machine) -> CliResult<Plan> {
    let Some(path) = &args.device_map else {
        if request.policy != Policy::Accelerate {
            return plan_of(request, &args.placement).map_err(plan_error);
        }
        let tree = ModuleTree::new(&Module::of_model(&request.spec, request.weight_dtype), &[])?;
        let map = accelerate_map(&tree, &args.placement)?;
        return Plan::from_hugging_face(&map, request).map_err(plan_error);
    };
    let unreadable = |error: &dyn std::fmt::Display| CliError::new(format!("`{}`: {error}", path.display()));
    let text = read_text(path)?;
    let json: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| unreadable(&format!("not JSON: {error}")))?;
    let given = !is_automatic(&args.placement);
    let failed = |error: PlanError| {
        let hint = error.hint();
        let error = CliError::new(format!("`{}`: {error}", path.display()));
        match hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    };
    if json.get("stages").is_some() {
        let plan = Plan::from_json(&text, &request.spec).map_err(failed)?;
        // What was planned, but for what this run asks for otherwise.
        let mut request = PlanRequest { model: plan.model.clone(), ..request.clone() };
        if !given {
            request.budgets = plan.budgets();
            request.reserve_bytes = reserve_bytes(machine.on_gpus(), &request.budgets, &args.placement);
        }
        if args.placement.context.is_none() {
            request.limits = StepLimits::new(plan.limits.context_len, request.limits.max_sequences);
        }
        if args.placement.batch.is_none() {
            request.limits = StepLimits::new(request.limits.context_len, plan.limits.max_sequences);
        }
        return plan.for_request(&request).map_err(failed);
    }
    // A plan of `--policy accelerate` is a device map, with budgets.
    let (map, devices) =
        if json.get("schema").is_some() { (&json["device_map"], json.get("devices")) } else { (&json, None) };
    let mut request = request.clone();
    if !given {
        request.budgets = budgets_of_map(map, devices, machine)?;
        request.reserve_bytes = reserve_bytes(machine.on_gpus(), &request.budgets, &args.placement);
    }
    // Where it stands as it is: keys that stand twice have not been lost.
    let text = if devices.is_some() { map.to_string() } else { text };
    Plan::from_hugging_face(&text, &request).map_err(failed)
}

/// Budgets for the devices of a device map that came without: those in `devices` of a plan, else what is free now.
fn budgets_of_map(
    map: &serde_json::Value, devices: Option<&serde_json::Value>, machine: &mut Machine,
) -> CliResult<Vec<DeviceBudget>> {
    let named = map.as_object().into_iter().flat_map(serde_json::Map::values);
    let named = named.filter_map(|device| Device::deserialize(device).ok());
    // Something has to execute what rests on disk.
    let named: BTreeSet<Device> = named.chain([Device::Cpu]).collect();
    let budget = |device: Device| {
        let planned = devices.and_then(|devices| devices[device.to_string()]["budget_bytes"].as_u64());
        let bytes = planned.map_or_else(|| machine.free_bytes(device), Ok)?;
        Ok(DeviceBudget { device, bytes })
    };
    named.into_iter().map(budget).collect()
}
