//! `bench --kernels`: every operation of the model at its sizes on one GPU, without weights.

use cogvlm_core::ModelSpec;
use cogvlm_cuda::bench::{CONTEXT_LEN, KernelTiming, NUM_DECODED, kernel_table};
use cogvlm_cuda::{DeviceInfo, KernelPath, usable_devices};
use serde_json::{Value, json};

use super::ceilings::Ceilings;
use crate::args::{BackendArg, BenchArgs, KernelPathArg};
use crate::error::{CliError, CliResult};
use crate::machine::cuda_error;
use crate::output::{note, print_line};
use crate::session::planned_model;

/// Operations per byte above which arithmetic limits a GPU, where its ceilings are not known: about an H100's.
const BALANCE: f64 = 250.0;

pub(super) fn run(args: &BenchArgs) -> CliResult {
    if args.model.backend == BackendArg::Cpu {
        return Err(CliError::usage("`--kernels` times what a GPU runs, so `--backend cpu` has nothing to time"));
    }
    let model = planned_model(&args.model.model)?;
    check_len(&model.spec, args.prompt_tokens)?;
    let gpu = usable_devices().map_err(cuda_error)?.swap_remove(0);
    note(&format!("measuring GPU {}", gpu.ordinal));
    let ceilings = Ceilings::of_gpu(gpu.ordinal);
    note("timing every operation");
    let path = match args.path {
        KernelPathArg::Hopper => KernelPath::Hopper,
        KernelPathArg::Portable => KernelPath::Portable,
    };
    let (path, timings) = kernel_table(&model.spec, args.prompt_tokens, gpu.ordinal, path)?;
    let table = Table { model: &model.name, num_text: args.prompt_tokens, gpu: &gpu, path, ceilings, timings };
    print_line(&if args.json { table.json().to_string() } else { table.text() })
}

/// Refuses prompts that are longer than the operations are timed for.
fn check_len(spec: &ModelSpec, num_text: usize) -> CliResult {
    // BOS, and what a decoded token finds before it.
    let beside = 1 + spec.num_vision_tokens() + NUM_DECODED;
    if num_text == 0 || num_text.saturating_add(beside) > CONTEXT_LEN {
        let most = CONTEXT_LEN.saturating_sub(beside);
        return Err(CliError::new(format!("`--kernels` times prompts of 1 to {most} text tokens beside an image"))
            .hint("ask for another number with `--prompt-tokens`"));
    }
    Ok(())
}

struct Table<'a> {
    model: &'a str,
    num_text: usize,
    gpu: &'a DeviceInfo,
    path: KernelPath,
    ceilings: Option<Ceilings>,
    timings: Vec<KernelTiming>,
}

/// What limits an operation: that of whose ceiling it reaches the larger share.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Bound {
    Arithmetic,
    Memory,
}

/// What limits an operation, and the share of that ceiling that it reaches.
fn bound(timing: &KernelTiming, ceilings: Option<&Ceilings>) -> (Bound, Option<f64>) {
    let Some(ceilings) = ceilings else {
        return (if timing.flops > BALANCE * timing.bytes { Bound::Arithmetic } else { Bound::Memory }, None);
    };
    let of_arithmetic = timing.flops / timing.seconds / ceilings.flops_per_s;
    let of_memory = timing.bytes / timing.seconds / ceilings.bytes_per_s;
    if of_arithmetic > of_memory { (Bound::Arithmetic, Some(of_arithmetic)) } else { (Bound::Memory, Some(of_memory)) }
}

impl Table<'_> {
    /// Which kernels ran.
    fn path(&self) -> &'static str {
        match self.path {
            KernelPath::Hopper => "hopper",
            KernelPath::Portable => "portable",
            KernelPath::Generic => "generic",
        }
    }

    fn json(&self) -> Value {
        let ceilings = self.ceilings.as_ref();
        let operation = |timing: &KernelTiming| {
            let (bound, share) = bound(timing, ceilings);
            json!({
                "name": timing.name, "us": timing.seconds * 1e6, "flops": timing.flops, "bytes": timing.bytes,
                "flops_per_s": timing.flops / timing.seconds, "bytes_per_s": timing.bytes / timing.seconds,
                "bound": if bound == Bound::Arithmetic { "arithmetic" } else { "memory" },
                "share_of_ceiling": share, "library_us": timing.library_seconds.map(|seconds| seconds * 1e6),
            })
        };
        json!({
            "schema": "cogvlm-shard.bench-kernels/1",
            "model": self.model,
            "text_tokens": self.num_text,
            "gpu": {"ordinal": self.gpu.ordinal, "name": self.gpu.name},
            "path": self.path(),
            "ceiling": ceilings.map(Ceilings::json),
            "kernels": self.timings.iter().map(operation).collect::<Vec<_>>(),
        })
    }

    fn text(&self) -> String {
        let mut lines = vec![
            format!(
                "{} on GPU {} ({}), {} kernels, an image and {} text tokens, medians",
                self.model,
                self.gpu.ordinal,
                self.gpu.name,
                self.path(),
                self.num_text
            ),
            format!("  {:<42} {:>10} {:>15} {:>7} {:>12}", "operation", "us", "rate", "share", "cuBLASLt us"),
        ];
        lines.extend(self.timings.iter().map(|timing| {
            let (bound, share) = bound(timing, self.ceilings.as_ref());
            let rate = match bound {
                Bound::Arithmetic => format!("{:.1} TFLOP/s", timing.flops / timing.seconds / 1e12),
                Bound::Memory => format!("{:.1} GB/s", timing.bytes / timing.seconds / 1e9),
            };
            let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
            let share = or_dash(share.map(|share| format!("{:.0} %", 100.0 * share)));
            let library = or_dash(timing.library_seconds.map(|seconds| format!("{:.1}", seconds * 1e6)));
            format!("  {:<42} {:>10.1} {rate:>15} {share:>7} {library:>12}", timing.name, timing.seconds * 1e6)
        }));
        lines.extend(self.ceilings.as_ref().map(Ceilings::text));
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::super::ceilings::example;
    use super::*;
    use cogvlm_core::ModelConfig;

    fn timing(name: &str, flops: f64, bytes: f64, library_seconds: Option<f64>) -> KernelTiming {
        KernelTiming { name: name.to_owned(), seconds: 1e-3, flops, bytes, library_seconds }
    }

    fn gpu() -> DeviceInfo {
        DeviceInfo {
            ordinal: 0,
            name: "H100".to_owned(),
            total_bytes: 80 << 30,
            compute_capability: (9, 0),
            num_multiprocessors: 132,
            shared_bytes: 228 << 10,
        }
    }

    fn table(gpu: &DeviceInfo, ceilings: Option<Ceilings>) -> Table<'_> {
        // Ceilings: 600 TFLOP/s and 3000 GB/s, so 600e9 operations or 3e9 bytes in a millisecond.
        let timings = vec![
            timing("product", 300e9, 0.3e9, Some(2e-3)),
            timing("norm", 0.0, 1.5e9, None),
            timing("idle", 0.0, 0.0, None),
        ];
        Table { model: "tiny", num_text: 32, gpu, path: KernelPath::Hopper, ceilings, timings }
    }

    #[test]
    fn the_larger_share_names_the_bound() {
        let gpu = gpu();
        let table = table(&gpu, Some(example()));
        let ceilings = table.ceilings.as_ref();
        assert_eq!(bound(&table.timings[0], ceilings), (Bound::Arithmetic, Some(0.5)));
        assert_eq!(bound(&table.timings[1], ceilings), (Bound::Memory, Some(0.5)));
        assert_eq!(bound(&timing("few rows", 6e9, 2.4e9, None), ceilings), (Bound::Memory, Some(0.8)));
        let text = table.text();
        let columns = |row: usize| text.lines().nth(row + 2).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(columns(0), "product 1000.0 300.0 TFLOP/s 50 % 2000.0");
        assert_eq!(columns(1), "norm 1000.0 1500.0 GB/s 50 % -");
        assert!(text.contains("hopper kernels") && text.contains("by cuBLASLt"), "{text}");
        let json = table.json();
        assert_eq!(
            (&json["kernels"][0]["bound"], &json["kernels"][0]["library_us"]),
            (&json!("arithmetic"), &json!(2000.0))
        );
        assert_eq!((&json["kernels"][1]["bound"], &json["kernels"][1]["library_us"]), (&json!("memory"), &Value::Null));
    }

    #[test]
    fn without_ceilings_there_are_rates_and_no_shares() {
        let gpu = gpu();
        let table = table(&gpu, None);
        assert_eq!(bound(&table.timings[0], None), (Bound::Arithmetic, None));
        assert_eq!(bound(&table.timings[1], None), (Bound::Memory, None));
        let text = table.text();
        assert!(text.contains("300.0 TFLOP/s") && !text.contains(" %"), "{text}");
        assert_eq!(table.json()["ceiling"], Value::Null);
    }

    #[test]
    fn the_path_is_the_one_that_ran() {
        let gpu = gpu();
        for (path, name) in [(KernelPath::Hopper, "hopper"), (KernelPath::Portable, "portable")] {
            let table = Table { path, ..table(&gpu, None) };
            assert_eq!(table.json()["path"], name);
            assert!(table.text().contains(&format!("{name} kernels")), "{}", table.text());
        }
    }

    #[test]
    fn prompts_longer_than_the_timed_context_are_refused() {
        let spec = ModelConfig::built_in("cogvlm-chat-17b").unwrap().resolve().unwrap();
        // 1,227 tokens of the image, BOS, and 32 that follow.
        assert!(check_len(&spec, 788).is_ok());
        for wrong in [0, 789, usize::MAX] {
            let error = check_len(&spec, wrong).unwrap_err();
            assert!(error.message().contains("1 to 788"), "{}", error.message());
        }
    }
}
