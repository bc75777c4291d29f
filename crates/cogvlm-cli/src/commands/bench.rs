//! `bench`: how fast a plan runs, each figure beside what the hardware could do, measured in the same run.

use std::time::{Duration, Instant};

use cogvlm_backend::SamplingParams;
use cogvlm_core::memory::format_bytes;
use cogvlm_core::tokens::TokenLayout;
use cogvlm_core::{DType, Device, Expert, ModelSpec, Phase, TensorSpec, Unit, WeightGroup, tensor_inventory};
use cogvlm_cpu::ceiling;
use cogvlm_pipeline::{Event, Image, Request, StepKind};
use serde_json::{Map, Value, json};

use crate::args::BenchArgs;
use crate::error::{CliError, CliResult};
use crate::output::{note, print_line};
use crate::session::{Session, open_source};

/// Times of one repetition.
struct Run {
    /// From the first request to the first token of any.
    first_token: Duration,
    vision: Duration,
    prefill: Duration,
    decode: Duration,
    num_decode_steps: usize,
}

pub(crate) fn run(args: &BenchArgs) -> CliResult {
    if args.repeats == 0 || args.new_tokens < 2 {
        return Err(CliError::usage("`bench` needs `--repeats` of at least 1 and `--new-tokens` of at least 2"));
    }
    let mut session = Session::open(&args.model, open_source(&args.model.model)?, false)?;
    let spec = session.engine.spec().clone();
    // Counted before it is made: any number can be asked for.
    let num_vision_tokens = if args.text_only { 0 } else { spec.num_vision_tokens() };
    let num_prompt = args.prompt_tokens.saturating_add(1 + num_vision_tokens);
    if num_prompt.saturating_add(args.new_tokens) > session.plan.limits.context_len {
        return Err(CliError::new(format!(
            "a prompt of {num_prompt} tokens and {} new ones exceed the context of {}",
            args.new_tokens, session.plan.limits.context_len
        ))
        .hint("raise `--context`, or ask for fewer with `--prompt-tokens` and `--new-tokens`"));
    }
    let layout = prompt(&spec, args);
    note("warming up");
    repetition(&mut session, &layout, args)?;
    let mut runs = Vec::new();
    for index in 0..args.repeats {
        note(&format!("repetition {} of {}", index + 1, args.repeats));
        runs.push(repetition(&mut session, &layout, args)?);
    }
    let memory = memory(&session);
    note("measuring the machine");
    let ceilings = Ceilings::of(&session, DType::from(args.model.dtype));
    report(args, &session, &spec, num_prompt, &runs, &memory, ceilings)
}

/// What the hardware could do at most, measured in the same run.
#[derive(Clone, Copy)]
struct Ceilings {
    /// What one device reads from its memory.
    read_bytes_per_s: f64,
    /// Its matrix arithmetic in the type of the activations.
    flops_per_s: f64,
    /// What reaches it from host memory; `None` for the host.
    link_bytes_per_s: Option<f64>,
}

impl Ceilings {
    /// Of the first device that executes decoder layers. `None` where nothing measures it yet.
    fn of(session: &Session, activations: DType) -> Option<Self> {
        let decodes = |unit: &Unit| matches!(unit, Unit::DecoderLayer(_));
        let stage = session.plan.stages.iter().find(|stage| stage.units.iter().any(decodes));
        match stage.map(|stage| stage.device) {
            Some(Device::Gpu(ordinal)) if session.on_gpus => Self::of_gpu(ordinal, activations),
            _ => Some(Self::of_host(activations)),
        }
    }

    fn of_host(activations: DType) -> Self {
        Self {
            read_bytes_per_s: ceiling::read_bytes_per_s(),
            flops_per_s: ceiling::flops_per_s(activations),
            link_bytes_per_s: None,
        }
    }

    fn of_gpu(_ordinal: u32, _activations: DType) -> Option<Self> {
        None
    }
}

/// What a device was given, and what it held.
struct DeviceMemory {
    device: Device,
    /// What the plan says, reserve included.
    planned_bytes: u64,
    /// The most that its arena held.
    peak_bytes: u64,
    /// What its arena may hold.
    arena_bytes: u64,
    /// What the driver says is in use on the GPU, by whomever.
    driver_used_bytes: Option<u64>,
}

fn memory(session: &Session) -> Vec<DeviceMemory> {
    let of_device = |(device, memory): (Device, cogvlm_backend::MemoryUse)| {
        let planned = session.plan.devices.iter().find(|planned| planned.device == device);
        let driver_used_bytes = match device {
            Device::Gpu(ordinal) if session.on_gpus => {
                let memory = cogvlm_cuda::Context::open(ordinal).and_then(|context| context.memory());
                memory.ok().map(|(free, total)| total - free)
            }
            _ => None,
        };
        DeviceMemory {
            device,
            planned_bytes: planned.map_or(0, |planned| planned.used_bytes()),
            peak_bytes: memory.peak,
            arena_bytes: memory.capacity,
            driver_used_bytes,
        }
    };
    session.engine.memory().into_iter().map(of_device).collect()
}

impl DeviceMemory {
    /// What the device holds as a share of what was planned: by the driver's account, else by the arena's.
    fn share_of_plan(&self) -> f64 {
        self.driver_used_bytes.unwrap_or(self.peak_bytes) as f64 / (self.planned_bytes as f64).max(1.0)
    }

    fn json(&self) -> Value {
        json!({
            "planned_bytes": self.planned_bytes, "peak_bytes": self.peak_bytes, "arena_bytes": self.arena_bytes,
            "driver_used_bytes": self.driver_used_bytes, "share_of_plan": self.share_of_plan(),
        })
    }

    fn text(&self) -> String {
        let driver = self.driver_used_bytes.map(|used| format!(", {} in use for the driver", format_bytes(used)));
        format!(
            "  rank {}: arena at most {} of {}{}; planned {}, of which {:.1} %",
            self.device,
            format_bytes(self.peak_bytes),
            format_bytes(self.arena_bytes),
            driver.unwrap_or_default(),
            format_bytes(self.planned_bytes),
            100.0 * self.share_of_plan()
        )
    }
}

/// BOS, the image's tokens, and ids spread over the vocabulary.
fn prompt(spec: &ModelSpec, args: &BenchArgs) -> TokenLayout {
    let first = 3.min(spec.vocab_size - 1);
    let text: Vec<u32> =
        (0..args.prompt_tokens).map(|index| (first + index * 7919 % (spec.vocab_size - first)) as u32).collect();
    TokenLayout::new(spec, !args.text_only, &text)
}

/// Answers the prompt once per sequence of the batch, all at once.
fn repetition(session: &mut Session, layout: &TokenLayout, args: &BenchArgs) -> CliResult<Run> {
    let vision = &session.engine.spec().vision;
    let num_values = vision.num_channels * vision.image_size * vision.image_size;
    let image = Image { pixels: (0..num_values).map(|index| (index % 509) as f32 / 254.5 - 1.0).collect() };
    let start = Instant::now();
    for _ in 0..session.plan.limits.max_sequences {
        session.engine.submit(Request {
            layout: layout.clone(),
            image: (!args.text_only).then(|| image.clone()),
            params: SamplingParams::default(),
            max_new_tokens: args.new_tokens,
            ignore_eos: true,
            forced: None,
            want_logits: false,
            capture: false,
            prefix: None,
            keep_cache: false,
        })?;
    }
    let mut run = Run {
        first_token: Duration::ZERO,
        vision: Duration::ZERO,
        prefill: Duration::ZERO,
        decode: Duration::ZERO,
        num_decode_steps: 0,
    };
    while let Some(report) = session.engine.step()? {
        if run.first_token.is_zero() && report.events.iter().any(|event| matches!(event, Event::Token { .. })) {
            run.first_token = start.elapsed();
        }
        match report.kind {
            StepKind::Prefill => {
                run.vision += report.vision_time;
                run.prefill += report.elapsed;
            }
            StepKind::Decode => {
                run.decode += report.elapsed;
                run.num_decode_steps += 1;
            }
        }
    }
    Ok(run)
}

fn report(
    args: &BenchArgs, session: &Session, spec: &ModelSpec, num_prompt: usize, runs: &[Run], memory: &[DeviceMemory],
    ceilings: Option<Ceilings>,
) -> CliResult {
    let batch = session.plan.limits.max_sequences;
    let work = Work::of(spec, num_prompt, !args.text_only);
    let weight_bytes = session.source.total_bytes();
    let activation_bytes = DType::from(args.model.dtype).size_bytes();
    let context = num_prompt as f64 + args.new_tokens as f64 / 2.0;
    let kv_bytes = context * (spec.num_layers * spec.kv_elements_per_token() * activation_bytes) as f64;
    let decode_bytes = work.hot_bytes as f64 + batch as f64 * kv_bytes;

    let load_s = session.load_time.as_secs_f64();
    let first_token_s = median(runs.iter().map(|run| run.first_token.as_secs_f64()));
    let vision_s = median(runs.iter().map(|run| run.vision.as_secs_f64() / batch as f64));
    let prefill_s = median(runs.iter().map(|run| run.prefill.as_secs_f64() / batch as f64));
    let step_s = median(runs.iter().map(|run| run.decode.as_secs_f64() / run.num_decode_steps.max(1) as f64));
    let prefill_rate = work.prefill_flops / prefill_s;
    let decode_rate = decode_bytes / step_s;
    let prefill_share = ceilings.map(|ceilings| prefill_rate / ceilings.flops_per_s);
    let decode_share = ceilings.map(|ceilings| decode_rate / ceilings.read_bytes_per_s);
    if args.json {
        let memory: Map<String, Value> =
            memory.iter().map(|memory| (memory.device.to_string(), memory.json())).collect();
        let object: Value = json!({
            "schema": "cogvlm-shard.bench/1",
            "model": args.model.model,
            "dtype": DType::from(args.model.dtype).to_string(),
            "backend": if session.on_gpus { "cuda" } else { "cpu" },
            "threads": session.num_threads,
            "prompt_tokens": num_prompt,
            "batch": batch,
            "repeats": runs.len(),
            "load": {"ms": load_s * 1e3, "weight_bytes": weight_bytes},
            "ttft": {"ms": first_token_s * 1e3},
            "vision": {"ms": vision_s * 1e3, "flops_per_s": work.vision_flops / vision_s.max(1e-12)},
            "prefill": {"ms": prefill_s * 1e3, "tokens_per_s": num_prompt as f64 / prefill_s, "flops_per_s": prefill_rate, "share_of_ceiling": prefill_share},
            "decode": {"ms_per_step": step_s * 1e3, "tokens_per_s": batch as f64 / step_s, "bytes_per_s": decode_rate, "share_of_ceiling": decode_share},
            "predicted": {"decode_ms": session.plan.seconds_per_token * 1e3, "image_ms": session.plan.seconds_per_image * 1e3},
            "ceiling": ceilings.map(|ceilings| json!({
                "read_bytes_per_s": ceilings.read_bytes_per_s, "flops_per_s": ceilings.flops_per_s,
                "link_bytes_per_s": ceilings.link_bytes_per_s,
            })),
            "memory": memory,
        });
        return print_line(&object.to_string());
    }
    let of_ceiling = |share: Option<f64>, ceiling: Option<f64>| match (share, ceiling) {
        (Some(share), Some(ceiling)) => format!(" = {:3.0} % of {:.1} measured", 100.0 * share, ceiling / 1e9),
        _ => String::new(),
    };
    let mut lines = vec![
        format!(
            "{} in {}, {num_prompt} prompt tokens, batch {batch}, medians of {}",
            args.model.model,
            DType::from(args.model.dtype),
            runs.len()
        ),
        format!("  load      {:9.1} ms   {} of weights placed", load_s * 1e3, format_bytes(weight_bytes)),
        format!("  ttft      {:9.1} ms   from the request to the first token", first_token_s * 1e3),
        format!("  vision    {:9.1} ms   of the prefill", vision_s * 1e3),
        format!(
            "  prefill   {:9.1} ms   {:8.1} tokens/s  {:8.1} GFLOP/s{}",
            prefill_s * 1e3,
            num_prompt as f64 / prefill_s,
            prefill_rate / 1e9,
            of_ceiling(prefill_share, ceilings.map(|ceilings| ceilings.flops_per_s))
        ),
        format!(
            "  decode    {:9.2} ms   {:8.1} tokens/s  {:8.2} GB/s{}",
            step_s * 1e3,
            batch as f64 / step_s,
            decode_rate / 1e9,
            of_ceiling(decode_share, ceilings.map(|ceilings| ceilings.read_bytes_per_s))
        ),
    ];
    if let Some(link) = ceilings.and_then(|ceilings| ceilings.link_bytes_per_s) {
        lines.push(format!("  link      {:9.1} GB/s from host memory, measured", link / 1e9));
    }
    lines.extend(memory.iter().map(DeviceMemory::text));
    print_line(&lines.join("\n"))
}

/// What the model has to do, counted from its tensors.
struct Work {
    /// Bytes of the weights that every decoded token reads.
    hot_bytes: u64,
    vision_flops: f64,
    prefill_flops: f64,
}

impl Work {
    fn of(spec: &ModelSpec, num_prompt: usize, has_image: bool) -> Self {
        let vision = &spec.vision;
        let vision_rows = if has_image { spec.num_vision_tokens() - 1 } else { 0 };
        let images = usize::from(has_image);
        let rows = |tensor: &TensorSpec| match (tensor.unit, tensor.group) {
            (Unit::PatchEmbedding | Unit::Adapter, _) => images * vision.num_patches(),
            (Unit::VitLayer(_), _) => images * vision.num_tokens(),
            (Unit::Embedding, _) => 0,
            (Unit::Head, _) => 1,
            (Unit::DecoderLayer(_), WeightGroup::Norms | WeightGroup::Whole) => 0,
            (Unit::DecoderLayer(_), group) => {
                let (WeightGroup::Qkv(expert)
                | WeightGroup::Dense(expert)
                | WeightGroup::GateUp(expert)
                | WeightGroup::Down(expert)) = group
                else {
                    return 0;
                };
                if expert == Expert::Vision { vision_rows } else { num_prompt - vision_rows }
            }
        };
        let mut work = Self { hot_bytes: 0, vision_flops: 0.0, prefill_flops: 0.0 };
        for tensor in tensor_inventory(spec) {
            // A position embedding is added, not multiplied.
            let is_matrix =
                tensor.shape.len() > 1 && tensor.shape[0] > 1 && !tensor.name.ends_with("position_embedding.weight");
            let flops = if is_matrix { 2.0 * tensor.num_elements() as f64 * rows(&tensor) as f64 } else { 0.0 };
            work.prefill_flops += flops;
            if tensor.unit.is_vision() {
                work.vision_flops += flops;
            }
            if tensor.phase == Phase::EveryToken {
                work.hot_bytes += tensor.num_elements() as u64 * 2;
            }
        }
        let attention = |layers: usize, width: usize, pairs: f64| layers as f64 * 4.0 * width as f64 * pairs;
        let vit = attention(vision.num_layers, vision.hidden_size, (images * vision.num_tokens().pow(2)) as f64);
        let causal = (num_prompt * (num_prompt + 1)) as f64 / 2.0;
        work.vision_flops += vit;
        work.prefill_flops += vit + attention(spec.num_layers, spec.num_heads * spec.head_dim, causal);
        work
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cogvlm_core::ModelConfig;

    #[test]
    fn work_of_the_17b_model_is_what_its_sizes_imply() {
        let spec = ModelConfig::built_in("cogvlm-chat-17b").unwrap().resolve().unwrap();
        let work = Work::of(&spec, 1260, true);
        assert_eq!(work.hot_bytes, 13_214_687_232 + 4096);
        // About 27.5 TFLOP for an image and 32 tokens, of which the ViT's matrices are 11.2 with its attention.
        assert!((work.prefill_flops / 27.5e12 - 1.0).abs() < 0.03, "{}", work.prefill_flops);
        assert!(work.vision_flops < 0.5 * work.prefill_flops);
    }

    #[test]
    fn medians() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), 2.5);
    }
}
