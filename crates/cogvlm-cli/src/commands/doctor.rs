//! `doctor`: what this machine has, what is missing, what to do.

use cogvlm_backend::BackendError;
use cogvlm_core::DType;
use cogvlm_core::memory::format_bytes;
use cogvlm_cpu::{Isa, ceiling};
use cogvlm_cuda::ceiling as gpu;
use cogvlm_cuda::{Context, CudaError, DeviceInfo};
use cogvlm_plan::links::{CardRates, HostRates, Links, MeasuredOn, PeerRates};
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
    let host = HostRates {
        read_bytes_per_s: read,
        f32_flops_per_s: flops[0],
        bf16_flops_per_s: flops[1],
        disk_bytes_per_s: None,
    };
    let cuda = Cuda::look(args.backend != BackendArg::Cpu);
    let links = cuda.links(host);
    if args.json {
        let object = json!({
            "schema": "cogvlm-shard.doctor/2",
            "host": {
                "threads": threads, "isa": isa.to_string(), "memory_bytes": total, "available_bytes": available,
                "read_bytes_per_s": read, "f32_flops_per_s": flops[0], "bf16_flops_per_s": flops[1],
            },
            "cuda": cuda.json(),
            "links": links.to_json(),
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
    /// Of GPUs that were measured, in both directions.
    pairs: Vec<Pair>,
    /// Why nothing can run on a GPU, where that is so.
    refusal: Option<CudaError>,
}

/// A GPU, its free and total bytes where it can be opened, and its rates where it was measured.
struct Gpu {
    info: DeviceInfo,
    memory: Result<(u64, u64), CudaError>,
    rates: Option<Result<gpu::Ceilings, BackendError>>,
}

/// What was measured between two GPUs.
struct Pair {
    from: u32,
    to: u32,
    rates: Result<gpu::PeerCeilings, BackendError>,
}

impl Cuda {
    /// Looks at the GPUs that there are, and measures them where that is wanted.
    fn look(measures: bool) -> Self {
        let module = std::fs::read_to_string("/proc/driver/nvidia/version").ok();
        let module = module.as_deref().and_then(|text| text.lines().next()).map(str::to_owned);
        let found = cogvlm_cuda::usable_devices();
        let no_device = found.as_ref().err().cloned();
        // Kept open until all is measured: opening a GPU takes longer than measuring it.
        let mut open = Vec::new();
        let mut look = |info: DeviceInfo| {
            let memory = Context::open(info.ordinal).and_then(|context| {
                let memory = context.memory();
                open.push(context);
                memory
            });
            let rates = (measures && memory.is_ok()).then(|| {
                note(&format!("measuring GPU {}: a few seconds", info.ordinal));
                gpu::measure(info.ordinal)
            });
            Gpu { info, memory, rates }
        };
        let gpus: Vec<Gpu> = found.into_iter().flatten().map(&mut look).collect();
        let measured: Vec<u32> =
            gpus.iter().filter(|gpu| matches!(gpu.rates, Some(Ok(_)))).map(|gpu| gpu.info.ordinal).collect();
        let ways = measured.iter().flat_map(|&from| measured.iter().map(move |&to| (from, to)));
        let measure = |(from, to): (u32, u32)| Pair { from, to, rates: gpu::measure_pair(from, to) };
        let pairs = ways.filter(|(from, to)| from != to).map(measure).collect();
        let any_opens = gpus.iter().any(|gpu| gpu.memory.is_ok());
        let first_refusal = gpus.iter().find_map(|gpu| gpu.memory.as_ref().err().cloned());
        let refusal = no_device.or(first_refusal.filter(|_| !any_opens));
        let version = cogvlm_cuda::driver_version().ok();
        Self { module, device_files: nvidia_devices(), version, gpus, pairs, refusal }
    }

    /// What was measured, for `--links`.
    fn links(&self, host: HostRates) -> Links {
        let machine = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned();
        let machine = if machine.is_empty() { "this machine".to_owned() } else { machine };
        // `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  ...`
        let is_version =
            |word: &&str| word.contains('.') && word.bytes().all(|byte| byte == b'.' || byte.is_ascii_digit());
        let driver =
            self.module.as_deref().and_then(|line| line.split_whitespace().find(is_version)).map(str::to_owned);
        let cuda = self.version.map(|(major, minor)| format!("{major}.{minor}"));
        let mut links = Links::measured(MeasuredOn { machine, driver, cuda }, host);
        for Gpu { info, rates, .. } in &self.gpus {
            if let Some(Ok(rates)) = rates {
                links = links.with_card(info.ordinal, &info.name, card_rates(rates));
            }
        }
        for Pair { from, to, rates } in &self.pairs {
            if let Ok(rates) = rates {
                links = links.with_pair(*from, *to, peer_rates(rates));
            }
        }
        links
    }

    fn json(&self) -> Value {
        let gpu = |Gpu { info, memory, rates }: &Gpu| {
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
            if let Some(Err(error)) = rates {
                object["not_measured"] = json!(error.to_string());
            }
            object
        };
        let failed = self.pairs.iter().filter_map(|pair| Some((pair, pair.rates.as_ref().err()?)));
        let failed: Vec<Value> = failed
            .map(|(Pair { from, to, .. }, error)| json!({"from": from, "to": to, "reason": error.to_string()}))
            .collect();
        json!({
            "built_in": cogvlm_cuda::is_built_in(),
            "usable": self.refusal.is_none(),
            "reason": self.refusal.as_ref().map(CudaError::to_string),
            "hint": self.refusal.as_ref().and_then(CudaError::hint),
            "driver": self.module,
            "driver_cuda_version": self.version.map(|(major, minor)| format!("{major}.{minor}")),
            "device_files": self.device_files,
            "devices": self.gpus.iter().map(gpu).collect::<Vec<_>>(),
            "pairs_not_measured": failed,
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
        for Gpu { info, memory, rates } in &self.gpus {
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
            match rates {
                Some(Ok(rates)) => lines.push(format!(
                    "          copies {:.0} GB/s, multiplies {:.0} TFLOP/s by {}; \
                     {:.1} GB/s from the host, {:.1} to it, a row in {:.0} us (measured now)",
                    rates.copy_bytes_per_s / 1e9,
                    rates.gemm_flops_per_s / 1e12,
                    rates.gemm_by,
                    rates.link_bytes_per_s / 1e9,
                    rates.to_host_bytes_per_s / 1e9,
                    rates.host_hop_s * 1e6
                )),
                Some(Err(error)) => lines.push(format!("          not measured: {error}")),
                None => {}
            }
        }
        lines.extend(self.pairs.iter().map(|Pair { from, to, rates }| match rates {
            Ok(rates) => format!(
                "{from} -> {to:<4} {}, {:.1} GB/s, a row in {:.0} us (measured now)",
                if rates.peer_access { "peer access" } else { "through the host" },
                rates.bytes_per_s / 1e9,
                rates.hop_s * 1e6
            ),
            Err(error) => format!("{from} -> {to:<4} not measured: {error}"),
        }));
        if let Some(hint) = self.refusal.as_ref().and_then(CudaError::hint) {
            lines.push(format!("          to do: {hint}"));
        }
        lines.join("\n")
    }
}

/// What was measured of a GPU, as predictions take it.
pub(crate) fn card_rates(measured: &gpu::Ceilings) -> CardRates {
    CardRates {
        copy_bytes_per_s: measured.copy_bytes_per_s,
        product_flops_per_s: measured.gemm_flops_per_s,
        from_host_bytes_per_s: measured.link_bytes_per_s,
        to_host_bytes_per_s: measured.to_host_bytes_per_s,
        host_hop_s: measured.host_hop_s,
    }
}

/// What was measured between two GPUs, as predictions take it.
pub(crate) fn peer_rates(measured: &gpu::PeerCeilings) -> PeerRates {
    let gpu::PeerCeilings { peer_access, bytes_per_s, hop_s } = *measured;
    PeerRates { peer_access, bytes_per_s, hop_s }
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
