//! Small models, plans and requests for the tests of the engine.
#![allow(dead_code, reason = "every test target uses some of it")]

use std::sync::Arc;

use cogvlm_backend::{RopeMode, SamplingParams};
use cogvlm_checkpoint::ModelSource;
use cogvlm_core::tokens::TokenLayout;
use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{DType, Device, ModelSpec};
use cogvlm_cpu::{CpuBackend, Threads};
use cogvlm_pipeline::{Engine, Event, Image, Request, RequestId, WeightSource, load_plan};
use cogvlm_plan::links::{CardRates, HostRates, Links};
use cogvlm_plan::plan;
use cogvlm_plan::plan::{DeviceBudget, DevicePlan, Plan, PlanRequest, Policy};

pub(crate) const MIB: u64 = 1 << 20;

pub(crate) fn source() -> ModelSource {
    ModelSource::open("tiny@11").unwrap()
}

pub(crate) fn plan_for(
    source: &ModelSource, budgets: &[(Device, u64)], policy: Policy, limits: StepLimits, activations: DType,
) -> Plan {
    plan_on(Links::default(), source, budgets, policy, limits, activations)
}

/// A plan for a host that reads much faster than it computes, and than the links copy: it decodes what the cards do not
/// hold, and a card prefills that.
pub(crate) fn prefilled_plan(
    source: &ModelSource, budgets: &[(Device, u64)], limits: StepLimits, activations: DType,
) -> Plan {
    let links = Links::default();
    let host = HostRates { read_bytes_per_s: 4e12, f32_flops_per_s: 4e9, bf16_flops_per_s: 4e9, ..*links.host() };
    let card = CardRates { from_host_bytes_per_s: 3e8, ..*links.card(0) };
    let links = links.with_host(host).with_card(0, "a card", card).with_card(1, "a card", card);
    let plan = plan_on(links, source, budgets, Policy::Auto, limits, activations);
    assert!(plan.prefill.is_some(), "the host computes prompts: {budgets:?}");
    plan
}

fn plan_on(
    links: Links, source: &ModelSource, budgets: &[(Device, u64)], policy: Policy, limits: StepLimits,
    activations: DType,
) -> Plan {
    let budgets = budgets.iter().map(|&(device, bytes)| DeviceBudget { device, bytes }).collect();
    plan(&PlanRequest {
        model: "tiny@11".to_owned(),
        spec: source.spec().clone(),
        weight_dtype: DType::Bf16,
        activation_dtype: activations,
        budgets,
        policy,
        limits,
        reserve_bytes: 0,
        links,
    })
    .unwrap_or_else(|error| panic!("{error}"))
}

pub(crate) fn engine(source: &ModelSource, plan: &Plan, activations: DType, num_threads: usize) -> Engine<CpuBackend> {
    engine_of(source, source.spec(), plan, activations, num_threads)
}

pub(crate) fn engine_of(
    source: &dyn WeightSource, spec: &ModelSpec, plan: &Plan, activations: DType, num_threads: usize,
) -> Engine<CpuBackend> {
    let threads = Arc::new(Threads::new(num_threads).unwrap());
    let make = |device: &DevicePlan| {
        let capacity = device.used_bytes() - device.reserved_bytes;
        CpuBackend::new(device.device, capacity, activations, Arc::clone(&threads))
    };
    let ranks = load_plan(plan, spec, source, RopeMode::Float32, &make, &|_, _| (), None).unwrap();
    Engine::new(spec.clone(), plan.limits, ranks)
}

pub(crate) fn image(source: &ModelSource, seed: usize) -> Image {
    let size = source.spec().vision.image_size;
    Image { pixels: (0..3 * size * size).map(|index| ((index * 37 + seed) % 101) as f32 / 50.0 - 1.0).collect() }
}

pub(crate) fn request(source: &ModelSource, text: &[u32], image: Option<Image>, num_new: usize) -> Request {
    Request {
        layout: TokenLayout::new(source.spec(), image.is_some(), text),
        image,
        params: SamplingParams::default(),
        max_new_tokens: num_new,
        ignore_eos: true,
        forced: None,
        want_logits: true,
        capture: false,
        prefix: None,
        keep_cache: false,
    }
}

/// Tokens and logits of every request, in order of submission.
pub(crate) fn answers(engine: &mut Engine<CpuBackend>, requests: Vec<Request>) -> Vec<Vec<(u32, Vec<f32>)>> {
    let order: Vec<RequestId> = requests.into_iter().map(|request| engine.submit(request).unwrap()).collect();
    let mut answers = vec![Vec::new(); order.len()];
    while let Some(report) = engine.step().unwrap() {
        for event in report.events {
            if let Event::Token { request, id, logits } = event {
                let index = order.iter().position(|known| *known == request).unwrap();
                answers[index].push((id, logits.unwrap_or_default()));
            }
        }
    }
    answers
}
