//! GPUs that compute every layer together answer as one does, within what another order of summation may change: two of
//! them where there are, else two members on one.

#[path = "../../cogvlm-pipeline/tests/common/requests.rs"]
mod common;

use std::sync::Arc;

use cogvlm_backend::{BackendError, RopeMode};
use cogvlm_checkpoint::{ModelSource, Monitor, SyntheticModel, write_checkpoint};
use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{DType, Device, Phase};
use cogvlm_cpu::{CpuBackend, Threads};
use cogvlm_cuda::CudaBackend;
use cogvlm_device::AnyBackend;
use cogvlm_parallel::TensorParallel;
use cogvlm_pipeline::{Engine, Event, Request, load_plan};
use cogvlm_plan::links::Links;
use cogvlm_plan::plan::{DeviceBudget, DevicePlan, Plan, PlanRequest, Policy, TensorPlacement};
use cogvlm_plan::{plan, plan_tensor_parallel};

use common::{answers, answers_alone};

type Group = TensorParallel<AnyBackend>;

fn request_for(source: &ModelSource, num_cards: u32, activations: DType) -> PlanRequest {
    let budget = |ordinal| DeviceBudget { device: Device::Gpu(ordinal), bytes: 2 << 30 };
    PlanRequest {
        model: "synthetic".to_owned(),
        spec: source.spec().clone(),
        weight_dtype: DType::Bf16,
        activation_dtype: activations,
        budgets: (0..num_cards).map(budget).collect(),
        policy: Policy::Auto,
        limits: StepLimits::new(1344, 4),
        reserve_bytes: 0,
        links: Links::default(),
    }
}

/// On GPUs, or on virtual ranks of the host.
fn engine(source: &ModelSource, plan: &Plan, num_gpus: Option<u32>) -> Engine<Group> {
    let threads = Arc::new(Threads::new(2).expect("threads can be started"));
    let member = |planned: &DevicePlan| -> Result<(Device, AnyBackend), BackendError> {
        let (device, capacity, activations) = (planned.device, planned.used_bytes(), plan.activation_dtype);
        let backend = match (device, num_gpus) {
            (Device::Gpu(ordinal), Some(num_gpus)) => {
                AnyBackend::Cuda(CudaBackend::new(device, ordinal % num_gpus, capacity, activations)?)
            }
            _ => AnyBackend::Cpu(CpuBackend::new(device, capacity, activations, Arc::clone(&threads))?),
        };
        Ok((device, backend))
    };
    let make = |leader: &DevicePlan| {
        let members = plan.members_with(leader.device).into_iter().map(member).collect::<Result<_, _>>()?;
        TensorParallel::new(members, source.spec(), &plan.limits)
    };
    let ranks = load_plan(plan, source.spec(), source, RopeMode::Float32, &make, &|_, _| (), None);
    Engine::new(source.spec().clone(), plan.limits, ranks.unwrap_or_else(|error| panic!("{error}")))
}

/// Two prompts with an image, two without, one of which is answered at length: its steps are recorded and run again.
fn requests(source: &ModelSource, longest: usize, forced: Option<&[Vec<u32>]>) -> Vec<Request> {
    let cases = [(5, Some(1), 9), (40, None, longest), (0, Some(2), 6), (17, None, 20)];
    let requests = common::requests(source, &cases, forced.is_some()).into_iter().enumerate();
    let with_forced =
        |(index, request): (usize, Request)| Request { forced: forced.map(|tokens| tokens[index].clone()), ..request };
    requests.map(with_forced).collect()
}

/// Root mean square of the difference, relative to that of `expected`.
fn difference(found: &[f32], expected: &[f32]) -> f64 {
    let error: f64 = found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
    (error / expected.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>()).sqrt()
}

/// A plan of two members that are streamed about half of their vision experts from `from`.
fn streaming(request: &PlanRequest, from: Device) -> Plan {
    let whole = plan_tensor_parallel(request, 2).unwrap();
    let is_expert = |placement: &&TensorPlacement| {
        !placement.tensor.unit.is_vision() && placement.tensor.phase == Phase::ImagePrefill
    };
    let experts: u64 = whole.placements.iter().filter(is_expert).map(|placement| placement.bytes).sum();
    let budget =
        |planned: &DevicePlan| DeviceBudget { device: planned.device, bytes: planned.used_bytes() - experts / 4 };
    let mut budgets: Vec<DeviceBudget> = whole.devices.iter().map(budget).collect();
    budgets.push(DeviceBudget { device: from, bytes: experts });
    let plan = plan_tensor_parallel(&PlanRequest { budgets, ..request.clone() }, 2);
    let plan = plan.unwrap_or_else(|error| panic!("{from}: {error}"));
    let rests = |placement: &&TensorPlacement| placement.residency.place(placement.executes_on) == from;
    let streamed: u64 = plan.placements.iter().filter(rests).map(|placement| placement.bytes).sum();
    assert!(streamed > experts / 3 && streamed < experts, "{streamed} of {experts} bytes are streamed");
    plan
}

/// Members that are streamed their parts, made or from files, give the bits of members that hold them.
fn compare_streamed(model: &str, activations: DType, num_gpus: Option<u32>) {
    let made = ModelSource::open(model).unwrap();
    let directory = tempfile::tempdir().unwrap();
    write_checkpoint(&SyntheticModel::parse(model).unwrap(), directory.path(), 40 << 20, &Monitor::silent()).unwrap();
    let files = ModelSource::open(directory.path().to_str().unwrap()).unwrap();
    let request = request_for(&made, 2, activations);
    let mut resident = engine(&made, &plan_tensor_parallel(&request, 2).unwrap(), num_gpus);
    let tokens = answers(&mut resident, requests(&made, 8, None)).0;
    let expected = answers_alone(&mut resident, requests(&made, 8, Some(&tokens)));
    drop(resident);
    for (source, from) in [(&made, Device::Cpu), (&files, Device::Cpu), (&files, Device::Disk)] {
        let plan = streaming(&request, from);
        let mut streamed = engine(source, &plan, num_gpus);
        let name = format!("{model}, {activations}, streamed from {from}");
        for turn in 0..2 {
            let found = answers_alone(&mut streamed, requests(source, 8, Some(&tokens)));
            assert!(found == expected, "{name}, turn {turn}: other bits");
            assert!(answers(&mut streamed, requests(source, 8, None)).0 == tokens, "{name}, turn {turn}");
        }
        for ((device, memory), planned) in streamed.memory().iter().zip(&plan.devices) {
            assert!(memory.peak <= planned.used_bytes(), "{name}: {device} held {memory:?} of {planned:?}");
        }
    }
}

/// Compares a group of two with one device, token by token.
fn compare(model: &str, activations: DType, bound: f64, longest: usize, num_gpus: Option<u32>) {
    let source = ModelSource::open(model).unwrap();
    let alone = plan(&request_for(&source, 1, activations)).unwrap_or_else(|error| panic!("{error}"));
    let together = plan_tensor_parallel(&request_for(&source, 2, activations), 2).unwrap();
    let mut alone = engine(&source, &alone, num_gpus);
    let tokens = answers(&mut alone, requests(&source, longest, None)).0;
    let (_, expected) = answers(&mut alone, requests(&source, longest, Some(&tokens)));
    drop(alone);
    let mut together = engine(&source, &together, num_gpus);
    let (_, found) = answers(&mut together, requests(&source, longest, Some(&tokens)));
    for (request, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert_eq!(found.len(), expected.len());
        for (token, (found, expected)) in found.iter().zip(expected).enumerate() {
            let difference = difference(found, expected);
            assert!(difference <= bound, "{model}, {activations}, request {request}, token {token}: {difference}");
        }
    }
    // As fast as it goes, the host far behind: the same answer every time.
    let first = answers(&mut together, requests(&source, longest, None)).0;
    for turn in 0..2 {
        assert!(answers(&mut together, requests(&source, longest, None)).0 == first, "{model}, turn {turn}");
    }
}

/// A text at length, and images with a word of answer each, which come while it is answered: every step of the text has
/// one row, whoever else is there.
fn compare_beside_prompts(model: &str, activations: DType, num_gpus: Option<u32>) {
    let source = ModelSource::open(model).unwrap();
    let together = plan_tensor_parallel(&request_for(&source, 2, activations), 2).unwrap();
    let mut engine = engine(&source, &together, num_gpus);
    let wanted = || {
        let [first, text, second, _] = <[Request; 4]>::try_from(requests(&source, 60, None)).unwrap();
        let image = |request: Request| Request { max_new_tokens: 1, ..request };
        let all = [text, image(first), image(second)];
        all.map(|request| Request { want_logits: true, ..request })
    };
    let (tokens, logits) = answers_alone(&mut engine, wanted().into());
    for num_between in [2, 9] {
        let (mut order, mut found) = (Vec::new(), vec![(Vec::new(), Vec::new()); 3]);
        let mut requests = wanted().into_iter();
        while !(engine.is_idle() && order.len() == found.len()) {
            if found[0].0.len() >= num_between * order.len()
                && let Some(request) = requests.next()
            {
                order.push(engine.submit(request).unwrap());
            }
            let report = engine.step().unwrap_or_else(|error| panic!("{error}")).expect("the first goes on");
            for event in report.events {
                if let Event::Token { request, id, logits } = event {
                    let index = order.iter().position(|known| *known == request).unwrap();
                    found[index].0.push(id);
                    found[index].1.extend(logits);
                }
            }
        }
        let found: (Vec<Vec<u32>>, Vec<Vec<Vec<f32>>>) = found.into_iter().unzip();
        assert_eq!(found.0, tokens, "{model}, {activations}: other tokens");
        assert!(found.1 == logits, "{model}, {activations}: other bits beside prompts");
    }
}

#[test]
fn virtual_ranks_answer_together() {
    compare("tiny@11", DType::F32, 2e-5, 30, None);
    compare("small@12", DType::Bf16, 3e-2, 8, None);
    compare_streamed("tiny@11", DType::F32, None);
    compare_beside_prompts("tiny@11", DType::F32, None);
}

#[test]
#[ignore = "needs a GPU; two say more; run with `--ignored` where there are some"]
fn gpus_answer_together() {
    let num_gpus = cogvlm_cuda::usable_devices().unwrap_or_else(|error| panic!("{error}")).len() as u32;
    compare("tiny@11", DType::F32, 2e-5, 200, Some(num_gpus));
    compare("small@12", DType::Bf16, 3e-2, 1200, Some(num_gpus));
    compare_streamed("tiny@11", DType::F32, Some(num_gpus));
    compare_streamed("small@12", DType::Bf16, Some(num_gpus));
    compare_beside_prompts("tiny@11", DType::F32, Some(num_gpus));
    compare_beside_prompts("small@12", DType::Bf16, Some(num_gpus));
}
