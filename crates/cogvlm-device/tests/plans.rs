//! Every plan of GPUs gives the same bits: one GPU, several, weights streamed from host memory, from a file, from another
//! GPU, cuts wherever a map makes them. Where there are fewer GPUs than ranks, ranks share them.

#[path = "../../cogvlm-pipeline/tests/common/requests.rs"]
mod common;

use std::collections::HashMap;
use std::sync::Arc;

use cogvlm_backend::RopeMode;
use cogvlm_checkpoint::{ModelSource, Monitor, SyntheticModel, write_checkpoint};
use cogvlm_core::memory::MIB;
use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{DType, Device, Unit};
use cogvlm_cpu::{CpuBackend, Threads};
use cogvlm_cuda::CudaBackend;
use cogvlm_device::AnyBackend;
use cogvlm_pipeline::{Engine, Event, Request, RequestId, load_plan};
use cogvlm_plan::links::{HostRates, Links};
use cogvlm_plan::plan;
use cogvlm_plan::plan::{DeviceBudget, DevicePlan, Plan, PlanRequest, Policy, Residency};

use common::{answers, answers_alone};

fn request_for(source: &ModelSource, budgets: &[(Device, u64)], policy: Policy) -> PlanRequest {
    let budgets = budgets.iter().map(|&(device, mib)| DeviceBudget { device, bytes: mib * MIB }).collect();
    PlanRequest {
        model: "small@12".to_owned(),
        spec: source.spec().clone(),
        weight_dtype: DType::Bf16,
        activation_dtype: DType::Bf16,
        budgets,
        policy,
        limits: StepLimits::new(1344, 4),
        reserve_bytes: 0,
        links: Links::default(),
    }
}

fn engine(source: &ModelSource, plan: &Plan) -> Engine<AnyBackend> {
    let num_gpus = cogvlm_cuda::usable_devices().unwrap_or_else(|error| panic!("{error}")).len() as u32;
    engine_on(source, plan, num_gpus)
}

fn engine_on(source: &ModelSource, plan: &Plan, num_gpus: u32) -> Engine<AnyBackend> {
    let threads = Arc::new(Threads::new(2).expect("threads can be started"));
    let make = |planned: &DevicePlan| {
        let capacity = planned.used_bytes() - planned.reserved_bytes;
        Ok(match planned.device {
            Device::Gpu(ordinal) => {
                AnyBackend::Cuda(CudaBackend::new(planned.device, ordinal % num_gpus, capacity, DType::Bf16)?)
            }
            _ => AnyBackend::Cpu(CpuBackend::new(planned.device, capacity, DType::Bf16, Arc::clone(&threads))?),
        })
    };
    let ranks = load_plan(plan, source.spec(), source, RopeMode::Float32, &make, &|_, _| (), None);
    Engine::new(source.spec().clone(), plan.limits, ranks.unwrap_or_else(|error| panic!("{error}")))
}

fn requests(source: &ModelSource, want_logits: bool) -> Vec<Request> {
    let cases = [(5, Some(1), 9), (40, None, 14), (0, Some(2), 6), (17, None, 20), (3, Some(3), 5)];
    common::requests(source, &cases, want_logits)
}

type Case = (&'static str, Weights, &'static [(Device, u64)], Policy);

/// Where the weights of a case come from.
#[derive(Clone, Copy)]
enum Weights {
    Made,
    Files,
}

/// Budgets in MiB.
const CASES: &[Case] = {
    use Device::{Cpu, Disk, Gpu};
    use Weights::{Files, Made};
    &[
        ("one GPU", Made, &[(Gpu(0), 400)], Policy::Auto),
        ("one GPU, from files", Files, &[(Gpu(0), 400)], Policy::Auto),
        ("two GPUs", Made, &[(Gpu(0), 150), (Gpu(1), 150)], Policy::Balanced),
        ("three GPUs", Files, &[(Gpu(0), 110), (Gpu(1), 110), (Gpu(2), 110)], Policy::Throughput),
        ("hot on one, cold on the other", Made, &[(Gpu(0), 130), (Gpu(1), 130)], Policy::Latency),
        ("parts on the other", Made, &[(Gpu(0), 110), (Gpu(1), 110)], Policy::Latency),
        ("one GPU and host memory", Made, &[(Gpu(0), 130), (Cpu, 200)], Policy::Latency),
        ("one GPU and host memory, from files", Files, &[(Gpu(0), 130), (Cpu, 200)], Policy::Latency),
        ("two GPUs and host memory", Files, &[(Gpu(0), 75), (Gpu(1), 80), (Cpu, 200)], Policy::Throughput),
        ("one GPU and the file", Files, &[(Gpu(0), 130), (Disk, 0)], Policy::Latency),
    ]
};

#[test]
fn weights_rest_everywhere_and_gpus_compute() {
    let made = ModelSource::open("small@12").unwrap();
    let longest =
        requests(&made, false).iter().map(|request| request.layout.input_ids.len() + request.max_new_tokens).max();
    assert!(longest.unwrap() <= request_for(&made, &[], Policy::Auto).limits.context_len);
    let (mut at_peers, mut in_host_memory, mut in_files) = (false, false, false);
    for (name, _, budgets, policy) in CASES {
        let plan = plan(&request_for(&made, budgets, *policy)).unwrap_or_else(|error| panic!("{name}: {error}"));
        for placement in plan.placements.iter().filter(|placement| placement.tensor.unit != Unit::Embedding) {
            at_peers |= matches!(placement.residency, Residency::Peer(_));
            in_host_memory |= placement.residency == Residency::Host;
            in_files |= placement.residency == Residency::File;
        }
        assert!(plan.stages.iter().all(|stage| stage.device != Device::Cpu), "{name}: the host computes otherwise");
        let num_ranks = budgets.iter().filter(|(device, _)| matches!(device, Device::Gpu(_))).count();
        let used = plan.devices.iter().filter(|planned| plan.uses(planned.device));
        assert_eq!(used.filter(|planned| matches!(planned.device, Device::Gpu(_))).count(), num_ranks, "{name}");
    }
    assert!(at_peers && in_host_memory && in_files, "{at_peers} {in_host_memory} {in_files}");
}

#[test]
#[ignore = "needs a GPU; more than one says more; run with `--ignored` where there are some"]
fn logits_do_not_depend_on_the_plan() {
    let made = ModelSource::open("small@12").unwrap();
    let directory = tempfile::tempdir().unwrap();
    write_checkpoint(&SyntheticModel::parse("small@12").unwrap(), directory.path(), 40 << 20, &Monitor::silent())
        .unwrap();
    let files = ModelSource::open(directory.path().to_str().unwrap()).unwrap();
    let mut expected = None;
    for (name, weights, budgets, policy) in CASES {
        let source = if matches!(weights, Weights::Made) { &made } else { &files };
        let plan = plan(&request_for(source, budgets, *policy)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut engine = engine(source, &plan);
        // With logits, step by step; then all at once and as fast as it goes, twice.
        let first = answers_alone(&mut engine, requests(source, true));
        let (tokens, logits) = expected.get_or_insert_with(|| first.clone());
        assert!(first.1 == *logits, "{name}: other logits, {:?} in place of {tokens:?}", first.0);
        for turn in 0..2 {
            assert_eq!(answers(&mut engine, requests(source, false)).0, *tokens, "{name}, turn {turn}");
        }
    }
}

/// A text at length, and images with a word of answer each, which come while it is answered: every step of the text has
/// one row, whoever else is there. Gives how many tokens of the text came during prompts.
fn expect_same_bits_beside_prompts(engine: &mut Engine<AnyBackend>, source: &ModelSource, name: &str) -> usize {
    let limited = |mut request: Request, num_new| {
        request.max_new_tokens = num_new;
        request
    };
    let wanted = || {
        let mut all = requests(source, true);
        let images = [4, 2, 0].map(|index| limited(all.swap_remove(index), 1));
        let text = all.swap_remove(0);
        std::iter::once(limited(text, 100)).chain(images)
    };
    assert!(wanted().enumerate().all(|(index, request)| request.image.is_some() == (index > 0)));
    let alone = answers_alone(engine, wanted().collect());
    let (mut order, mut heard) = (Vec::new(), HashMap::<RequestId, (Vec<u32>, Vec<Vec<f32>>)>::new());
    let (mut requests, mut num_during) = (wanted(), 0);
    while !(engine.is_idle() && order.len() == alone.0.len()) {
        // One after every twentieth token of the first.
        let num_heard = order.first().map_or(0, |first| heard.get(first).map_or(0, |(ids, _)| ids.len()));
        if num_heard >= 20 * order.len()
            && let Some(request) = requests.next()
        {
            order.push(engine.submit(request).unwrap());
        }
        let report = engine.step().unwrap_or_else(|error| panic!("{name}: {error}")).expect("the first goes on");
        for event in report.events {
            if let Event::Token { request, id, logits } = event {
                num_during += usize::from(order[1..].iter().any(|image| !heard.contains_key(image)));
                let (ids, all_logits) = heard.entry(request).or_default();
                ids.push(id);
                all_logits.extend(logits);
            }
        }
    }
    for (index, request) in order.iter().enumerate() {
        let (ids, logits) = &heard[request];
        assert_eq!(*ids, alone.0[index], "{name}: other tokens of request {index}");
        assert!(*logits == alone.1[index], "{name}: other logits of request {index}");
    }
    num_during
}

#[test]
#[ignore = "needs a GPU; more than one says more; run with `--ignored` where there are some"]
fn prompts_in_the_middle_change_no_bit() {
    let made = ModelSource::open("small@12").unwrap();
    for (name, weights, budgets, policy) in CASES {
        if matches!(weights, Weights::Files) {
            continue;
        }
        let plan = plan(&request_for(&made, budgets, *policy)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let num_during = expect_same_bits_beside_prompts(&mut engine(&made, &plan), &made, name);
        // One token of the text, and the image's, would come of each anyway.
        assert!(num_during > 6, "{name}: the text got {num_during} tokens during three prompts");
    }
}

#[test]
fn virtual_ranks_give_the_same_bits_beside_prompts() {
    let source = ModelSource::open("small@12").unwrap();
    let plan = plan(&request_for(&source, &[(Device::Cpu, 1024)], Policy::Auto)).unwrap();
    let num_during = expect_same_bits_beside_prompts(&mut engine_on(&source, &plan, 0), &source, "the host");
    assert!(num_during > 6, "the text got {num_during} tokens during three prompts");
}

/// A plan in which the host decodes the first layers of text and a GPU prefills them; budgets in MiB.
fn prefilled_plan(source: &ModelSource) -> Plan {
    let links = Links::default();
    // The host reads much faster than the link copies, and computes much slower than the GPU.
    let host = HostRates { read_bytes_per_s: 400e9, f32_flops_per_s: 1e11, bf16_flops_per_s: 1e11, ..*links.host() };
    let request = request_for(source, &[(Device::Gpu(0), 100), (Device::Cpu, 400)], Policy::Auto);
    let plan = plan(&PlanRequest { links: links.with_host(host), ..request }).unwrap_or_else(|error| panic!("{error}"));
    let on_host = plan.stages.iter().filter(|stage| stage.device == Device::Cpu);
    let layers = on_host.flat_map(|stage| &stage.units).filter(|unit| matches!(unit, Unit::DecoderLayer(_))).count();
    assert!(plan.prefill.is_some() && layers > 0, "{}", plan.report(None));
    plan
}

#[test]
fn a_gpu_prefills_what_the_host_decodes() {
    let plan = prefilled_plan(&ModelSource::open("small@12").unwrap());
    let stages = plan.prefill_stages().unwrap();
    assert!(stages.iter().all(|stage| stage.device != Device::Cpu), "{stages:?}");
}

/// Relative distance of `found` from `expected`.
fn distance(found: &[f32], expected: &[f32]) -> f64 {
    let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|value| f64::from(value).powi(2)).sum::<f64>();
    let differences = squares(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    (differences / squares(&mut expected.iter().copied())).sqrt()
}

/// The arithmetic of the host rounds elsewhere than that of GPUs: logits of the same tokens, and not their bits.
#[test]
#[ignore = "needs a GPU; run with `--ignored` where there is one"]
fn a_gpu_and_the_host_share_a_cache() {
    /// Two ways to round to bf16 in every operation of a few layers.
    const ROUNDING: f64 = 0.03;
    let made = ModelSource::open("small@12").unwrap();
    let one_gpu = plan(&request_for(&made, &[(Device::Gpu(0), 400)], Policy::Auto)).unwrap();
    let (tokens, expected) = answers(&mut engine(&made, &one_gpu), requests(&made, true));
    let forced = |tokens: &[Vec<u32>]| -> Vec<Request> {
        let with = |(request, tokens): (Request, &Vec<u32>)| Request { forced: Some(tokens.clone()), ..request };
        requests(&made, true).into_iter().zip(tokens).map(with).collect()
    };
    let prefilled = prefilled_plan(&made);
    let from_rows = |from_rows: usize| {
        let prefill = prefilled.prefill.map(|prefill| cogvlm_plan::plan::Prefill { from_rows, ..prefill });
        Plan { prefill, ..prefilled.clone() }
    };
    let plans = [
        ("the GPU prefills all", from_rows(1)),
        ("the GPU prefills what it is planned to", prefilled.clone()),
        ("the host prefills", Plan { prefill: None, ..prefilled.clone() }),
    ];
    for (name, plan) in plans {
        let mut engine = engine(&made, &plan);
        for turn in 0..2 {
            let (_, logits) = answers(&mut engine, forced(&tokens));
            for (index, (found, expected)) in logits.iter().zip(&expected).enumerate() {
                let distance = distance(&found.concat(), &expected.concat());
                assert!(distance < ROUNDING, "{name}, turn {turn}, request {index}: {distance}");
            }
            // The bound can say no: these are logits of one prompt after another.
            let other = distance(&logits[0][0], &expected[1][0]);
            assert!(other > 3.0 * ROUNDING, "{other}");
        }
        for (device, memory) in engine.memory() {
            assert!(memory.peak <= memory.capacity, "{name}: rank {device}");
        }
    }
}
