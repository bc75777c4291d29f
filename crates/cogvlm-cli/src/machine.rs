//! What there is to run on: GPUs, the host, and the memory of both.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use cogvlm_core::Device;
use cogvlm_core::memory::{MIB, format_bytes};
use cogvlm_cuda::{Context, CudaError};
use cogvlm_plan::links::Links;
use cogvlm_plan::plan::{DeviceBudget, DevicePlan, Plan, PlanRequest, Policy, Residency};
use cogvlm_plan::{parse_max_memory, plan};

use crate::args::{BackendArg, PlacementArgs};
use crate::error::{CliError, CliResult};
use crate::prompt::read_text;

/// What a GPU needs beside the context, which is open when its free memory is looked at, and the arena: scratch memory,
/// kernels, recordings. A part of the plan's reserve.
const CUDA_BESIDE_CONTEXT_BYTES: u64 = 100 * MIB;

/// The devices that a plan's numbers mean.
pub(crate) enum Machine {
    /// Numbers are virtual ranks on the host.
    Host,
    /// Numbers are GPUs. Those that were looked at stay open, so that a rank need not open them again.
    Gpus(BTreeMap<u32, Context>),
}

impl Machine {
    /// For running with `--backend cuda`: there has to be a GPU.
    pub(crate) fn gpus() -> CliResult<Self> {
        cogvlm_cuda::usable_devices().map_err(cuda_error)?;
        Ok(Self::Gpus(BTreeMap::new()))
    }

    /// For planning, which needs no GPU where budgets are given.
    pub(crate) fn planned(backend: BackendArg, placement: &PlacementArgs) -> Self {
        let asks_machine = is_automatic(placement);
        match backend {
            BackendArg::Cpu => Self::Host,
            BackendArg::Auto if asks_machine && cogvlm_cuda::usable_devices().is_err() => Self::Host,
            BackendArg::Auto | BackendArg::Cuda => Self::Gpus(BTreeMap::new()),
        }
    }

    /// Whether numbered devices are GPUs.
    pub(crate) fn on_gpus(&self) -> bool {
        matches!(self, Self::Gpus(_))
    }

    /// Rates for a plan on `budgets`: `links` of a file or assumed ones, and what is recorded of GPUs of the names that
    /// the driver gives.
    pub(crate) fn links(&self, links: Links, budgets: &[DeviceBudget]) -> Links {
        // All processes of a run make the same plan, whatever each of them sees.
        let is_alone = budgets.iter().all(|budget| budget.device.process() == 0);
        match self {
            Self::Host => links.with_virtual_ranks(),
            // Asking for names opens no GPU. Without a driver the plan is for another machine.
            Self::Gpus(_) if is_alone => {
                let found = cogvlm_cuda::devices().into_iter().flatten();
                found.fold(links, |links, gpu| links.with_card_name(gpu.ordinal, &gpu.name))
            }
            Self::Gpus(_) => links,
        }
    }

    /// The budgets of `--max-memory`, or what is free now.
    pub(crate) fn budgets(&mut self, placement: &PlacementArgs) -> CliResult<Vec<DeviceBudget>> {
        match placement.max_memory.as_deref() {
            None | Some("auto") => self.free_budgets(),
            Some(text) => Ok(parse_max_memory(text)?),
        }
    }

    /// What is free now: on every GPU that can be opened, and on the host.
    fn free_budgets(&mut self) -> CliResult<Vec<DeviceBudget>> {
        let mut budgets = Vec::new();
        if let Self::Gpus(_) = self {
            let hint = "or plan without a GPU: `--max-memory 0:20GiB,cpu:16GiB`";
            let found = cogvlm_cuda::usable_devices().map_err(|error| {
                let hint = error.hint().map_or_else(|| hint.to_owned(), |first| format!("{first}; {hint}"));
                cuda_error(error).hint(hint)
            })?;
            let mut refusal = None;
            for info in found {
                match self.free_bytes(Device::Gpu(info.ordinal)) {
                    Ok(bytes) => budgets.push(DeviceBudget { device: Device::Gpu(info.ordinal), bytes }),
                    Err(error) => {
                        tracing::warn!("{}; planning without it", error.message());
                        refusal.get_or_insert(error);
                    }
                }
            }
            if let (true, Some(error)) = (budgets.is_empty(), refusal) {
                return Err(error);
            }
        }
        budgets.push(DeviceBudget { device: Device::Cpu, bytes: self.free_bytes(Device::Cpu)? });
        for DeviceBudget { device, bytes } in &budgets {
            tracing::info!("memory free on `{device}` now: {}", format_bytes(*bytes));
        }
        Ok(budgets)
    }

    /// Bytes free now for a device: on the GPU, or on the host.
    pub(crate) fn free_bytes(&mut self, device: Device) -> CliResult<u64> {
        match (self, device) {
            (Self::Gpus(open), device) if let Some(ordinal) = device.ordinal() => {
                let (free, _) = opened(open, ordinal).and_then(Context::memory).map_err(cuda_error)?;
                Ok(free)
            }
            _ => available_memory(),
        }
    }

    /// Opens every GPU that `plan` uses in process `process` and compares its memory with what the plan needs there,
    /// before anything is loaded. `beside_bytes` of every reserve are for neither context nor arena.
    pub(crate) fn check(&mut self, plan: &Plan, process: usize, beside_bytes: u64) -> CliResult {
        let Self::Gpus(open) = self else { return Ok(()) };
        let is_used = |planned: &&DevicePlan| plan.occupies(planned.device) && planned.device.process() == process;
        let mut used = Vec::new();
        for planned in plan.devices.iter().filter(is_used) {
            let Some(ordinal) = planned.device.ordinal() else { continue };
            used.push(ordinal);
            let context = opened(open, ordinal).map_err(cuda_error)?;
            let (free, total) = context.memory().map_err(cuda_error)?;
            let (name, needed) = (context.info().name.clone(), planned.used_bytes());
            if needed > total {
                return Err(cuda_error(CudaError::TooSmall { ordinal, name, total, needed }));
            }
            // Most of the reserve is the context, which is open.
            let beside_context = planned.reserved_bytes.min(CUDA_BESIDE_CONTEXT_BYTES + beside_bytes);
            let needed = needed - planned.reserved_bytes + beside_context;
            if needed > free {
                return Err(cuda_error(CudaError::TooLittleMemory { ordinal, name, free, needed }));
            }
        }
        open.retain(|ordinal, _| used.contains(ordinal));
        Ok(())
    }
}

/// GPU `ordinal`, opened where it is not yet.
fn opened(open: &mut BTreeMap<u32, Context>, ordinal: u32) -> Result<&Context, CudaError> {
    Ok(match open.entry(ordinal) {
        Entry::Occupied(entry) => entry.into_mut(),
        Entry::Vacant(entry) => entry.insert(Context::open(ordinal)?),
    })
}

/// Rates of `--links`, alone or in what `doctor --json` writes; assumed ones without it.
pub(crate) fn read_links(placement: &PlacementArgs) -> CliResult<Links> {
    let Some(path) = &placement.links else { return Ok(Links::default()) };
    let text = read_text(path)?;
    Links::from_json(&text).map_err(|error| {
        CliError::new(format!("`{}`: {error}", path.display()))
            .hint(format!("`cogvlm-shard doctor --json > {}` measures this machine", path.display()))
    })
}

/// Whether `--max-memory` leaves the budgets to the machine.
pub(crate) fn is_automatic(placement: &PlacementArgs) -> bool {
    placement.max_memory.as_deref().is_none_or(|text| text == "auto")
}

/// With budgets and policy left to the program: the first GPU that holds everything is used alone.
pub(crate) fn on_one_gpu(request: PlanRequest) -> PlanRequest {
    let gpus = request.budgets.iter().filter(|budget| matches!(budget.device, Device::Gpu(_)));
    let mut alone = gpus.map(|budget| PlanRequest { budgets: vec![*budget], ..request.clone() });
    let holds_all = |request: &PlanRequest| {
        let all_resident =
            |plan: Plan| plan.placements.iter().all(|placement| placement.residency == Residency::Device);
        plan(request).is_ok_and(all_resident)
    };
    let found = if request.policy == Policy::Auto { alone.find(holds_all) } else { None };
    found.unwrap_or(request)
}

/// CUDA cannot be used.
pub(crate) fn cuda_error(error: CudaError) -> CliError {
    let message = CliError::no_gpu(&error);
    match error.hint() {
        Some(hint) => message.hint(hint),
        None => message,
    }
}

/// Bytes of host memory that are free or can be freed without swapping.
pub(crate) fn available_memory() -> CliResult<u64> {
    meminfo("MemAvailable:")
}

/// A line of /proc/meminfo, in bytes.
pub(crate) fn meminfo(key: &str) -> CliResult<u64> {
    let unreadable = |reason: &str| {
        CliError::new(format!("cannot tell how much memory this machine has: {reason}"))
            .hint("give `--max-memory cpu:SIZE`")
    };
    let text =
        std::fs::read_to_string("/proc/meminfo").map_err(|error| unreadable(&format!("/proc/meminfo: {error}")))?;
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    Ok(kib.ok_or_else(|| unreadable("/proc/meminfo has no such line"))? * 1024)
}

#[cfg(test)]
mod tests {
    use cogvlm_core::DType;
    use cogvlm_core::memory::GIB;

    use super::*;
    use crate::session::{planned_model, request_for};

    fn devices_used(gib: &[u64], policy: Policy, batch: usize) -> Vec<Device> {
        let budgets = gib.iter().enumerate();
        let budgets =
            budgets.map(|(ordinal, gib)| DeviceBudget { device: Device::Gpu(ordinal as u32), bytes: gib * GIB });
        let host = DeviceBudget { device: Device::Cpu, bytes: 64 * GIB };
        let placement = PlacementArgs { batch: Some(batch), ..PlacementArgs::default() };
        let model = planned_model("cogvlm-chat-17b").unwrap();
        let budgets = budgets.chain([host]).collect();
        let request = request_for(model, &placement, DType::Bf16, true, budgets, Links::default()).unwrap();
        let plan = plan(&on_one_gpu(PlanRequest { policy, ..request })).unwrap();
        plan.devices.iter().map(|planned| planned.device).filter(|device| plan.uses(*device)).collect()
    }

    #[test]
    fn a_gpu_that_holds_everything_is_used_alone() {
        use Device::Gpu;
        for batch in [1, 4] {
            assert_eq!(devices_used(&[79, 79], Policy::Auto, batch), [Gpu(0)]);
            assert_eq!(devices_used(&[20, 79, 139], Policy::Auto, batch), [Gpu(1)]);
        }
        assert!(devices_used(&[24, 24], Policy::Auto, 1).len() > 1, "neither holds everything");
        assert!(devices_used(&[79, 79], Policy::Balanced, 1).len() > 1, "asked to use all");
    }
}
