//! `doctor`: what this machine has, what is missing, what to do.

use cogvlm_core::DType;
use cogvlm_core::memory::format_bytes;
use cogvlm_cpu::{Isa, ceiling};
use cogvlm_cuda::{Context, CudaError, DeviceInfo};
use cogvlm_plan::plan::Rates;
use serde_json::{Value, json};

use crate::args::{BackendArg, DoctorArgs};
use crate::error::CliResult;
use crate::machine::{available_memory, cuda_error, meminfo};
use crate::output::{note, print_line};

pub(crate) fn run(args: &DoctorArgs) -> CliResult {
    let total = meminfo("MemTotal:")?;
    let available = available_memory()?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let isa = Isa::best();
    note("measuring the host: a few seconds");
    let read = ceiling::read_bytes_per_s();
    let flops = [DType::F32, DType::Bf16].map(ceiling::flops_per_s);
    let cuda = Cuda::look();
    let rates = Rates { host_bytes_per_s: read, host_flops_per_s: flops[1], ..Rates::default() };
    if args.json {
        let object = json!({
            "schema": "cogvlm-shard.doctor/1",
            "host": {
                "threads": threads, "isa": isa.to_string(), "memory_bytes": total, "available_bytes": available,
                "read_bytes_per_s": read, "f32_flops_per_s": flops[0], "bf16_flops_per_s": flops[1],
            },
            "cuda": cuda.json(),
            "rates": rates,
            "measured_rates": ["host_bytes_per_s", "host_flops_per_s"],
        });
        print_line(&object.to_string())?;
    } else {
        print_line(&format!(
            "host      {threads} threads, {isa}, {} of memory, {} available\n          \
             reads {:.1} GB/s, computes {:.0} GFLOP/s in f32, {:.0} in bf16 (measured now)\n\
             cpu       ready: `--backend cpu` runs here",
            format_bytes(total),
            format_bytes(available),
            read / 1e9,
            flops[0] / 1e9,
            flops[1] / 1e9
        ))?;
        print_line(&cuda.text())?;
    }
    match cuda.refusal {
        Some(error) if args.backend == BackendArg::Cuda => Err(cuda_error(error)),
        _ => Ok(()),
    }
}

/// What there is for `--backend cuda`.
struct Cuda {
    /// What the kernel's driver module says of itself, which needs no library.
    module: Option<String>,
    device_files: Vec<String>,
    /// CUDA version of the driver, where it starts.
    version: Option<(u32, u32)>,
    gpus: Vec<Gpu>,
    /// Why nothing can run on a GPU, where that is so.
    refusal: Option<CudaError>,
}

/// A GPU, and its free and total bytes where it can be opened.
struct Gpu {
    info: DeviceInfo,
    memory: Result<(u64, u64), CudaError>,
}

impl Cuda {
    fn look() -> Self {
        let module = std::fs::read_to_string("/proc/driver/nvidia/version").ok();
        let module = module.as_deref().and_then(|text| text.lines().next()).map(str::to_owned);
        let found = cogvlm_cuda::usable_devices();
        let no_device = found.as_ref().err().cloned();
        let look = |info: DeviceInfo| {
            let memory = Context::open(info.ordinal).and_then(|context| context.memory());
            Gpu { info, memory }
        };
        let gpus: Vec<Gpu> = found.into_iter().flatten().map(look).collect();
        let any_opens = gpus.iter().any(|gpu| gpu.memory.is_ok());
        let first_refusal = gpus.iter().find_map(|gpu| gpu.memory.as_ref().err().cloned());
        let refusal = no_device.or(first_refusal.filter(|_| !any_opens));
        let version = cogvlm_cuda::driver_version().ok();
        Self { module, device_files: nvidia_devices(), version, gpus, refusal }
    }

    fn json(&self) -> Value {
        let gpu = |Gpu { info, memory }: &Gpu| {
            let (major, minor) = info.compute_capability;
            let mut object = json!({
                "ordinal": info.ordinal, "name": info.name, "compute_capability": format!("{major}.{minor}"),
                "num_multiprocessors": info.num_multiprocessors, "memory_bytes": info.total_bytes,
                "free_bytes": memory.as_ref().ok().map(|(free, _)| free),
            });
            if let Err(error) = memory {
                object["reason"] = json!(error.to_string());
                object["hint"] = json!(error.hint());
            }
            object
        };
        json!({
            "built_in": cogvlm_cuda::is_built_in(),
            "usable": self.refusal.is_none(),
            "reason": self.refusal.as_ref().map(CudaError::to_string),
            "hint": self.refusal.as_ref().and_then(CudaError::hint),
            "driver": self.module,
            "driver_cuda_version": self.version.map(|(major, minor)| format!("{major}.{minor}")),
            "device_files": self.device_files,
            "devices": self.gpus.iter().map(gpu).collect::<Vec<_>>(),
        })
    }

    fn text(&self) -> String {
        let kernels = if cogvlm_cuda::is_built_in() { "kernels built in" } else { "no kernels in this build" };
        let driver = match (&self.module, self.version) {
            (_, Some((major, minor))) => format!("the driver starts and supports CUDA {major}.{minor}"),
            (Some(module), None) => format!("driver module: {module}"),
            (None, None) if !cogvlm_cuda::is_built_in() => "a driver was not looked for".to_owned(),
            (None, None) => format!("no driver answers, {} device file(s)", self.device_files.len()),
        };
        let state = match &self.refusal {
            None => "ready: `--backend cuda` runs here".to_owned(),
            Some(error) => error.to_string(),
        };
        let mut lines = vec![format!("cuda      {state}"), format!("          {kernels}; {driver}")];
        for Gpu { info, memory } in &self.gpus {
            let (major, minor) = info.compute_capability;
            let free = match memory {
                Ok((free, _)) => format!("{} free", format_bytes(*free)),
                Err(error) => error.to_string(),
            };
            lines.push(format!(
                "gpu {:<5} {}, compute capability {major}.{minor}, {} multiprocessors, {} of memory, {free}",
                info.ordinal,
                info.name,
                info.num_multiprocessors,
                format_bytes(info.total_bytes)
            ));
        }
        if let Some(hint) = self.refusal.as_ref().and_then(CudaError::hint) {
            lines.push(format!("          to do: {hint}"));
        }
        lines.join("\n")
    }
}

/// `/dev/nvidiaN`.
fn nvidia_devices() -> Vec<String> {
    let entries = std::fs::read_dir("/dev").into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let is_device = |name: &String| {
        name.strip_prefix("nvidia")
            .is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()))
    };
    let mut devices: Vec<String> = names.filter(is_device).map(|name| format!("/dev/{name}")).collect();
    devices.sort();
    devices
}
