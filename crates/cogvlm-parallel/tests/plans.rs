//! Devices that compute together answer as one does: the same tokens, logits within what another order of summation may
//! change, in no more memory than was planned.

#[path = "../../cogvlm-pipeline/tests/common/requests.rs"]
mod common;

use std::collections::HashMap;
use std::sync::Arc;

use cogvlm_backend::{BackendError, RopeMode};
use cogvlm_checkpoint::ModelSource;
use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{DType, Device};
use cogvlm_cpu::{CpuBackend, Threads};
use cogvlm_parallel::TensorParallel;
use cogvlm_pipeline::{Engine, Event, Request, RequestId, load_plan};
use cogvlm_plan::links::Links;
use cogvlm_plan::plan::{DeviceBudget, DevicePlan, Plan, PlanRequest, Policy};
use cogvlm_plan::{plan, plan_tensor_parallel};

use common::{answers, answers_alone};

const CONTEXT_LEN: usize = 96;

fn request_for(source: &ModelSource, num_cards: u32, activations: DType) -> PlanRequest {
    let budget = |ordinal| DeviceBudget { device: Device::Gpu(ordinal), bytes: 1 << 30 };
    PlanRequest {
        model: "tiny@11".to_owned(),
        spec: source.spec().clone(),
        weight_dtype: DType::Bf16,
        activation_dtype: activations,
        budgets: (0..num_cards).map(budget).collect(),
        policy: Policy::Auto,
        limits: StepLimits::new(CONTEXT_LEN, 3),
        reserve_bytes: 0,
        links: Links::default(),
    }
}

type Group = TensorParallel<CpuBackend>;

/// An engine of `plan`; members have arenas of exactly what is planned.
fn engine(source: &ModelSource, plan: &Plan, activations: DType) -> Engine<Group> {
    let threads = Arc::new(Threads::new(2).unwrap());
    let member = |planned: &DevicePlan| {
        let backend = CpuBackend::new(planned.device, planned.used_bytes(), activations, Arc::clone(&threads))?;
        Ok::<_, BackendError>((planned.device, backend))
    };
    let make = |leader: &DevicePlan| {
        let members = plan.members_with(leader.device).into_iter().map(member).collect::<Result<Vec<_>, _>>()?;
        TensorParallel::new(members, source.spec(), &plan.limits)
    };
    let ranks = load_plan(plan, source.spec(), source, RopeMode::Float32, &make, &|_, _| (), None);
    Engine::new(source.spec().clone(), plan.limits, ranks.unwrap_or_else(|error| panic!("{error}")))
}

fn requests(source: &ModelSource, want_logits: bool) -> Vec<Request> {
    let cases = [(5, Some(1), 9), (23, None, 14), (0, Some(2), 6), (11, None, 12), (3, Some(3), 5)];
    common::requests(source, &cases, want_logits)
}

/// Root mean square of the difference, relative to that of `expected`.
fn difference(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let error = square(&mut found.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    (error / square(&mut expected.iter().map(|value| f64::from(*value)))).sqrt()
}

/// The same requests, fed the tokens that were chosen elsewhere, so that logits can be compared to the end.
fn forced(source: &ModelSource, tokens: &[Vec<u32>]) -> Vec<Request> {
    let requests = requests(source, true).into_iter().zip(tokens);
    requests.map(|(request, tokens)| Request { forced: Some(tokens.clone()), ..request }).collect()
}

#[test]
fn members_answer_as_one_device_does() {
    let source = ModelSource::open("tiny@11").unwrap();
    for (activations, bound) in [(DType::F32, 2e-5), (DType::Bf16, 2e-2)] {
        let alone = plan(&request_for(&source, 1, activations)).unwrap();
        let expected = answers_alone(&mut engine(&source, &alone, activations), requests(&source, true));
        for num_members in [1, 2, 4] {
            let request = request_for(&source, num_members as u32, activations);
            let plan = plan_tensor_parallel(&request, num_members).unwrap_or_else(|error| panic!("{error}"));
            let mut engine = engine(&source, &plan, activations);
            let name = format!("{activations}, {num_members} members");
            let found = answers_alone(&mut engine, forced(&source, &expected.0));
            for (found, expected) in found.1.iter().zip(&expected.1) {
                let difference = difference(&found.concat(), &expected.concat());
                assert!(difference <= bound, "{name}: {difference}");
            }
            if num_members == 1 {
                assert!(found == expected, "{name}: other bits");
            } else if activations == DType::F32 {
                assert!(found.1 != expected.1, "{name}: nothing was summed in another order");
            }
            // As fast as it goes, steps that continue others among them, twice.
            let free = answers(&mut engine, requests(&source, false)).0;
            assert_eq!(answers(&mut engine, requests(&source, false)).0, free, "{name}: another answer");
            if activations == DType::F32 {
                assert_eq!(free, expected.0, "{name}: other tokens");
            }
            let memory = engine.memory();
            assert_eq!(memory.len(), num_members, "{name}");
            for ((device, memory), planned) in memory.iter().zip(&plan.devices) {
                assert_eq!(*device, planned.device);
                assert!(memory.peak <= planned.used_bytes(), "{name}: {device} held more than was planned");
                // What is planned and never loaded: the checkpoint's own RoPE frequencies.
                let slack = (source.spec().num_layers * source.spec().head_dim) as u64;
                assert!(memory.peak + slack >= planned.used_bytes(), "{name}: {device} held {memory:?} of {planned:?}");
            }
        }
    }
}

/// A text at length, and images with a word of answer each, which come while it is answered: every step of the text has
/// one row, whoever else is there.
#[test]
fn prompts_in_the_middle_change_no_bit_of_a_group() {
    let source = ModelSource::open("tiny@11").unwrap();
    let long = |request: Request| Request { max_new_tokens: 60, ..request };
    let short = |request: Request| Request { max_new_tokens: 1, ..request };
    let wanted = || {
        let [first, text, second, _, third] = <[Request; 5]>::try_from(requests(&source, true)).unwrap();
        [long(text), short(first), short(second), short(third)]
    };
    for (activations, num_members) in [(DType::F32, 2), (DType::F32, 4), (DType::Bf16, 2)] {
        let plan = plan_tensor_parallel(&request_for(&source, num_members as u32, activations), num_members);
        let mut engine = engine(&source, &plan.unwrap_or_else(|error| panic!("{error}")), activations);
        let (tokens, logits) = answers_alone(&mut engine, wanted().into());
        let mut order = Vec::new();
        let mut heard: HashMap<RequestId, (Vec<u32>, Vec<f32>)> = HashMap::new();
        let mut requests = wanted().into_iter();
        while !(engine.is_idle() && order.len() == tokens.len()) {
            // One after every fourth token of the first.
            let num_heard = order.first().map_or(0, |first| heard.get(first).map_or(0, |(ids, _)| ids.len()));
            if num_heard >= 4 * order.len()
                && let Some(request) = requests.next()
            {
                order.push(engine.submit(request).unwrap());
            }
            let report = engine.step().unwrap_or_else(|error| panic!("{error}")).expect("the first goes on");
            for event in report.events {
                if let Event::Token { request, id, logits } = event {
                    let (ids, all_logits) = heard.entry(request).or_default();
                    ids.push(id);
                    all_logits.extend(logits.unwrap_or_default());
                }
            }
        }
        for (index, request) in order.iter().enumerate() {
            let (ids, all_logits) = &heard[request];
            let same = *ids == tokens[index] && *all_logits == logits[index].concat();
            assert!(same, "{activations}, {num_members} members, request {index}: other bits");
        }
    }
}

#[test]
fn groups_that_cannot_be_are_refused() {
    let source = ModelSource::open("tiny@11").unwrap();
    let threads = Arc::new(Threads::new(1).unwrap());
    let members = |activations: &[DType]| -> Vec<(Device, CpuBackend)> {
        let backend = |(index, dtype): (usize, &DType)| {
            let device = Device::Gpu(index as u32);
            (device, CpuBackend::new(device, 1 << 24, *dtype, Arc::clone(&threads)).unwrap())
        };
        activations.iter().enumerate().map(backend).collect()
    };
    let limits = StepLimits::new(CONTEXT_LEN, 1);
    let refused = |activations: &[DType]| {
        let error = TensorParallel::new(members(activations), source.spec(), &limits).err();
        error.unwrap_or_else(|| panic!("{activations:?} are no group")).to_string()
    };
    assert_eq!(refused(&[]), "join: 0 devices cannot share 4 query heads evenly");
    assert_eq!(refused(&[DType::F32; 3]), "join: 3 devices cannot share 4 query heads evenly");
    assert!(refused(&[DType::F32, DType::Bf16]).contains("different types"));
}
