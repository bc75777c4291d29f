//! `doctor`: what this machine has, what is missing, what to do.

use cogvlm_core::DType;
use cogvlm_core::memory::format_bytes;
use cogvlm_cpu::{Isa, ceiling};
use cogvlm_plan::plan::Rates;
use serde_json::json;

use crate::args::{BackendArg, DoctorArgs};
use crate::error::CliResult;
use crate::output::{note, print_line};
use crate::session::{available_memory, meminfo, no_cuda};

pub(crate) fn run(args: &DoctorArgs) -> CliResult {
    let total = meminfo("MemTotal:")?;
    let available = available_memory()?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let isa = Isa::best();
    note("measuring the host: a few seconds");
    let read = ceiling::read_bytes_per_s();
    let flops = [DType::F32, DType::Bf16].map(ceiling::flops_per_s);
    let gpus = nvidia_devices();
    let driver = std::fs::read_to_string("/proc/driver/nvidia/version").ok();
    let driver = driver.as_deref().and_then(|text| text.lines().next()).map(str::to_owned);
    let rates = Rates { host_bytes_per_s: read, host_flops_per_s: flops[1], ..Rates::default() };
    if args.json {
        let object = json!({
            "schema": "cogvlm-shard.doctor/1",
            "host": {
                "threads": threads, "isa": isa.to_string(), "memory_bytes": total, "available_bytes": available,
                "read_bytes_per_s": read, "f32_flops_per_s": flops[0], "bf16_flops_per_s": flops[1],
            },
            "cuda": {"built_in": false, "driver": driver, "device_files": gpus},
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
        let cuda = match (&driver, gpus.len()) {
            (_, 0) => "no NVIDIA device on this machine; this build has no CUDA backend".to_owned(),
            (Some(driver), count) => format!("{count} device(s), driver: {driver}; this build has no CUDA backend"),
            (None, count) => format!("{count} device file(s), but no driver answers; this build has no CUDA backend"),
        };
        print_line(&format!("cuda      {cuda}"))?;
    }
    if args.backend == BackendArg::Cuda { Err(no_cuda()) } else { Ok(()) }
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
