//! Layers that the host decodes and a card prefills: who computes what, the same bits as without, a KV cache that both
//! use.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cogvlm_backend::HostWeight;
use cogvlm_checkpoint::ModelSource;
use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{DType, Device, TensorSpec, Unit};
use cogvlm_cpu::{CpuBackend, Threads};
use cogvlm_pipeline::{CachedPrefix, Engine, Event, Request, WeightSource};
use cogvlm_plan::plan::{Plan, Policy, Prefill};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};

use common::{Hooked, MIB, answers, engine, engine_of, image, plan_for, prefilled_plan, request, source};

const LIMITS: StepLimits = StepLimits { max_tokens: 64, max_sequences: 3, max_images: 1, context_len: 64, parcels: 0 };

/// Plans in which the host decodes all text, or the first layers.
fn prefilled_plans(source: &ModelSource, activations: DType) -> Vec<Plan> {
    use Device::{Cpu, Gpu};
    let budgets: [&[(Device, u64)]; 5] = [
        &[(Gpu(0), 6 * MIB), (Cpu, 64 * MIB)],
        &[(Gpu(0), 10 * MIB), (Cpu, 64 * MIB)],
        &[(Gpu(0), 10 * MIB + MIB / 4), (Cpu, 64 * MIB)],
        &[(Gpu(0), 2 * MIB), (Gpu(1), 9 * MIB), (Cpu, 64 * MIB)],
        &[(Gpu(0), 9 * MIB), (Gpu(1), MIB), (Cpu, 64 * MIB)],
    ];
    budgets.into_iter().map(|budgets| prefilled_plan(source, budgets, LIMITS, activations)).collect()
}

fn from_rows(plan: &Plan, from_rows: usize) -> Plan {
    let prefill = plan.prefill.map(|prefill| Prefill { from_rows, ..prefill });
    Plan { prefill, ..plan.clone() }
}

fn requests(source: &ModelSource) -> Vec<Request> {
    vec![
        request(source, &[1000, 2000, 3000], Some(image(source, 1)), 5),
        request(source, &[17, 18, 19, 20, 21, 22, 23, 24, 25], None, 7),
        request(source, &[], Some(image(source, 2)), 3),
        request(source, &[5], None, 4),
    ]
}

/// One test at a time: what one of them sees of ranks would be of all that run.
fn alone() -> MutexGuard<'static, ()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn logits_do_not_depend_on_who_prefills() {
    let _alone = alone();
    let source = source();
    for activations in [DType::F32, DType::Bf16] {
        let alone = plan_for(&source, &[(Device::Gpu(0), 64 * MIB)], Policy::Auto, LIMITS, activations);
        let expected = answers(&mut engine(&source, &alone, activations, 2), requests(&source));
        for plan in prefilled_plans(&source, activations) {
            for rows in [1, 6, 65] {
                let plan = from_rows(&plan, rows);
                let mut engine = engine(&source, &plan, activations, 2);
                assert!(answers(&mut engine, requests(&source)) == expected, "{activations}, from {rows} rows on");
                assert_eq!(engine.block_pool().num_free(), engine.block_pool().num_blocks(), "blocks are left over");
                for (device, memory) in engine.memory() {
                    assert!(memory.peak <= memory.capacity, "rank {device}");
                    let planned = plan.devices.iter().find(|planned| planned.device == device).unwrap();
                    let share = memory.peak as f64 / planned.used_bytes() as f64;
                    // What host memory holds of made weights is no rank's.
                    assert!(device == Device::Cpu || share > 0.98, "rank {device} held {share} of what was planned");
                }
            }
        }
    }
}

/// A conversation goes on where the cache lies: what the card wrote there, what the host did.
#[test]
fn turns_of_a_conversation_find_what_either_wrote() {
    let _alone = alone();
    let source = source();
    let conversation = |plan: &Plan| {
        let mut engine = engine(&source, plan, DType::F32, 2);
        let (mut text, mut prefix, mut said) = (vec![5, 6, 7], None, Vec::new());
        for more in [&[40, 41, 42, 43][..], &[50], &[60, 61]] {
            let picture = Some(image(&source, 3));
            let turn = Request { keep_cache: true, prefix, ..request(&source, &text, picture, 5) };
            let (tokens, kept) = turn_of(&mut engine, turn);
            text.extend(tokens.iter().map(|(id, _)| *id).chain(more.iter().copied()));
            (prefix, said) = (kept, [said, tokens].concat());
        }
        said
    };
    let alone = plan_for(&source, &[(Device::Gpu(0), 64 * MIB)], Policy::Auto, LIMITS, DType::F32);
    let expected = conversation(&alone);
    for plan in prefilled_plans(&source, DType::F32) {
        for rows in [1, 4, 65] {
            assert!(conversation(&from_rows(&plan, rows)) == expected, "from {rows} rows on");
        }
    }
}

/// Tokens and logits, and what was kept.
type Turn = (Vec<(u32, Vec<f32>)>, Option<CachedPrefix>);

fn turn_of(engine: &mut Engine<CpuBackend>, request: Request) -> Turn {
    engine.submit(request).unwrap();
    let (mut tokens, mut prefix) = (Vec::new(), None);
    while let Some(report) = engine.step().unwrap() {
        for event in report.events {
            match event {
                Event::Token { id, logits, .. } => tokens.push((id, logits.unwrap())),
                Event::Finished { prefix: kept, .. } => prefix = kept,
            }
        }
    }
    (tokens, prefix)
}

/// Weights in memory, of which one makes the host wait while `is_slow` says so.
struct SlowHost {
    source: ModelSource,
    is_slow: Arc<AtomicBool>,
}

impl WeightSource for SlowHost {
    fn weight(&self, tensor: &TensorSpec) -> Option<HostWeight> {
        let weight = self.source.weight(tensor)?;
        let mut bytes = vec![0; weight.shape().iter().product::<usize>() * weight.dtype().size_bytes()];
        weight.read_into(&mut bytes).unwrap();
        // Before the host takes hold of any cache.
        let is_slow = (tensor.unit == Unit::Embedding).then(|| Arc::clone(&self.is_slow));
        let before = move || {
            let is_host = std::thread::current().name() == Some("rank-cpu");
            if is_host && is_slow.as_ref().is_some_and(|is_slow| is_slow.load(Ordering::Relaxed)) {
                std::thread::sleep(Duration::from_millis(200));
            }
            Ok(())
        };
        Some(Arc::new(Hooked { weight, bytes: Some(bytes), before }))
    }
}

/// Blocks of a request that was stopped go to one that a card prefills, while the host still decodes the first.
#[test]
fn blocks_that_change_hands_are_written_in_order() {
    let _alone = alone();
    let source = source();
    let is_slow = Arc::new(AtomicBool::new(false));
    let plan = from_rows(&prefilled_plans(&source, DType::F32)[0], 10);
    let slow_host = SlowHost { source: source.clone(), is_slow: Arc::clone(&is_slow) };
    let mut engine = engine_of(&slow_host, source.spec(), &plan, DType::F32, 1);
    let long = || request(&source, &[3; 40], None, 2);
    let expected = answers(&mut engine, vec![long()]);
    let short = Request { want_logits: false, ..request(&source, &[17, 18, 19], None, 30) };
    let id = engine.submit(short).unwrap();
    is_slow.store(true, Ordering::Relaxed);
    for _ in 0..3 {
        engine.step().unwrap();
    }
    // The host computes its next token already.
    assert!(engine.stop(id).is_none());
    assert!(answers(&mut engine, vec![long()]) == expected, "what was stopped wrote to blocks of another");
}

/// Stages that ranks ran, and the rows of their steps.
#[derive(Clone, Default)]
struct Stages(Arc<Mutex<Vec<(String, u64)>>>);

#[derive(Default)]
struct StageFields {
    device: String,
    rows: u64,
}

impl Visit for StageFields {
    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "rows" {
            self.rows = value;
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "device" {
            self.device = format!("{value:?}");
        }
    }
}

impl tracing::Subscriber for Stages {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.name() == "stage"
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut fields = StageFields::default();
        span.record(&mut fields);
        self.0.lock().unwrap().push((fields.device, fields.rows));
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &tracing::Event<'_>) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

impl Stages {
    /// Rows of the steps that the host took part in since the last call, and of those that the card did.
    fn take(&self) -> [Vec<u64>; 2] {
        let stages = std::mem::take(&mut *self.0.lock().unwrap());
        ["cpu", "0"].map(|name| stages.iter().filter(|(device, _)| device == name).map(|(_, rows)| *rows).collect())
    }
}

#[test]
fn prompts_are_the_cards_and_decoding_is_the_hosts() {
    let _alone = alone();
    let stages = Stages::default();
    tracing::subscriber::set_global_default(stages.clone()).expect("no other test of this process sets one");
    let source = source();
    let prompt = source.spec().num_vision_tokens() as u64 + 4;
    let [of_all_text, of_some] = [0, 1].map(|index| prefilled_plans(&source, DType::F32).swap_remove(index));
    let run = |plan: &Plan, text: &[u32], picture: bool| {
        let mut engine = engine(&source, plan, DType::F32, 1);
        answers(&mut engine, vec![request(&source, text, picture.then(|| image(&source, 1)), 3)]);
        drop(engine);
        stages.take()
    };
    // The card has the head, and the vision tower in a stage of its own.
    let of_some = from_rows(&of_some, 5);
    assert_eq!(run(&of_some, &[7, 8, 9], true), [vec![1; 2], vec![prompt, 1, 1]]);
    assert_eq!(run(&of_some, &[7, 8, 9, 10], false), [vec![1; 2], vec![5, 1, 1]]);
    assert_eq!(run(&of_some, &[7, 8, 9], false), [vec![4, 1, 1], vec![4, 1, 1]], "too short for the card");
    let [never, always] = [65, 1].map(|rows| from_rows(&of_some, rows));
    assert_eq!(run(&never, &[7, 8, 9], true), [vec![1; 2], vec![prompt, 1, 1]], "an image, however short");
    assert_eq!(run(&always, &[7, 8, 9], false), [vec![1; 2], vec![4, 1, 1]], "single rows are the host's");
    // The host has the head; without a stage for text, decoding passes the card by.
    let of_all_text = from_rows(&of_all_text, 5);
    assert_eq!(run(&of_all_text, &[7, 8, 9], true), [vec![prompt, 1, 1], vec![prompt]]);
    // A host whose activations are of another type has another cache: it computes all by itself.
    let threads = Arc::new(Threads::new(1).unwrap());
    let make = |planned: &cogvlm_plan::plan::DevicePlan| {
        let activations = if planned.device == Device::Cpu { DType::Bf16 } else { DType::F32 };
        CpuBackend::new(planned.device, planned.used_bytes(), activations, Arc::clone(&threads))
    };
    let mode = cogvlm_backend::RopeMode::Float32;
    let ranks = cogvlm_pipeline::load_plan(&of_some, source.spec(), &source, mode, &make, &|_, _| (), None).unwrap();
    let mut engine = Engine::new(source.spec().clone(), of_some.limits, ranks);
    engine.submit(request(&source, &[7, 8, 9, 10], None, 1)).unwrap();
    let error = engine.step().expect_err("rows of one type do not go into buffers of another");
    assert!(error.to_string().contains("receive"), "{error}");
    assert_eq!(stages.take(), [vec![5], vec![5]]);
}
