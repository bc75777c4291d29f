//! Devices that compute together answer as one does: the same tokens, logits within what another order of summation may
//! change, in no more memory than was planned.

use std::sync::Arc;

use cogvlm_backend::{BackendError, RopeMode, SamplingParams};
use cogvlm_checkpoint::ModelSource;
use cogvlm_core::tokens::TokenLayout;
use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{DType, Device};
use cogvlm_cpu::{CpuBackend, Threads};
use cogvlm_parallel::TensorParallel;
use cogvlm_pipeline::{Engine, Event, Image, Request, RequestId, load_plan};
use cogvlm_plan::links::Links;
use cogvlm_plan::plan::{DeviceBudget, DevicePlan, Plan, PlanRequest, Policy};
use cogvlm_plan::{plan, plan_tensor_parallel};

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
    let size = source.spec().vision.image_size;
    let image = |seed: usize| Image {
        pixels: (0..3 * size * size).map(|index| ((index * 37 + seed) % 101) as f32 / 50.0 - 1.0).collect(),
    };
    let cases =
        [(5, Some(image(1)), 9), (23, None, 14), (0, Some(image(2)), 6), (11, None, 12), (3, Some(image(3)), 5)];
    let request = |(num_text, image, max_new_tokens): (u32, Option<Image>, usize)| Request {
        layout: TokenLayout::new(
            source.spec(),
            image.is_some(),
            &(0..num_text).map(|index| index * 97 + 5).collect::<Vec<_>>(),
        ),
        image,
        params: SamplingParams::default(),
        max_new_tokens,
        ignore_eos: true,
        forced: None,
        want_logits,
        capture: false,
        prefix: None,
        keep_cache: false,
    };
    cases.map(request).into()
}

/// Tokens of every request, and all logits.
fn answers(engine: &mut Engine<Group>, requests: Vec<Request>) -> (Vec<Vec<u32>>, Vec<Vec<f32>>) {
    let order: Vec<RequestId> = requests.into_iter().map(|request| engine.submit(request).unwrap()).collect();
    let (mut tokens, mut all_logits) = (vec![Vec::new(); order.len()], vec![Vec::new(); order.len()]);
    while let Some(report) = engine.step().unwrap_or_else(|error| panic!("{error}")) {
        for event in report.events {
            if let Event::Token { request, id, logits } = event {
                let index = order.iter().position(|known| *known == request).unwrap();
                tokens[index].push(id);
                all_logits[index].extend(logits.unwrap_or_default());
            }
        }
    }
    (tokens, all_logits)
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
        let expected = answers(&mut engine(&source, &alone, activations), requests(&source, true));
        for num_members in [1, 2, 4] {
            let request = request_for(&source, num_members as u32, activations);
            let plan = plan_tensor_parallel(&request, num_members).unwrap_or_else(|error| panic!("{error}"));
            let mut engine = engine(&source, &plan, activations);
            let name = format!("{activations}, {num_members} members");
            let found = answers(&mut engine, forced(&source, &expected.0));
            for (found, expected) in found.1.iter().zip(&expected.1) {
                let difference = difference(found, expected);
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
