//! Small models, plans and requests for the tests of the engine.
#![allow(dead_code, reason = "every test target uses some of it")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use cogvlm_backend::{HostReadError, HostTensor, HostWeight, RopeMode, SamplingParams};
use cogvlm_checkpoint::ModelSource;
use cogvlm_core::tokens::TokenLayout;
use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{DType, Device, ModelSpec, TensorSpec};
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
    let request = PlanRequest { links, ..plan_request(source, budgets, policy, limits, activations) };
    plan(&request).unwrap_or_else(|error| panic!("{error}"))
}

pub(crate) fn plan_request(
    source: &ModelSource, budgets: &[(Device, u64)], policy: Policy, limits: StepLimits, activations: DType,
) -> PlanRequest {
    let budgets = budgets.iter().map(|&(device, bytes)| DeviceBudget { device, bytes }).collect();
    PlanRequest {
        model: "tiny@11".to_owned(),
        spec: source.spec().clone(),
        weight_dtype: DType::Bf16,
        activation_dtype: activations,
        budgets,
        policy,
        limits,
        reserve_bytes: 0,
        links: Links::default(),
    }
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

/// A source whose weights are read slowly, or cannot be read any more, when a test says so.
pub(crate) struct Watched {
    pub(crate) source: ModelSource,
    reads: Arc<Reads>,
}

struct Reads {
    delay_us: AtomicU64,
    /// How many tensors can still be read.
    left: AtomicUsize,
}

struct WatchedTensor {
    weight: HostWeight,
    reads: Arc<Reads>,
}

impl Watched {
    pub(crate) fn new(source: ModelSource) -> Self {
        let reads = Reads { delay_us: AtomicU64::new(0), left: AtomicUsize::new(usize::MAX) };
        Self { source, reads: Arc::new(reads) }
    }

    /// Every tensor takes as long from now on.
    pub(crate) fn delay(&self, delay: Duration) {
        self.reads.delay_us.store(delay.as_micros() as u64, Ordering::Relaxed);
    }

    /// Only so many tensors can be read from now on.
    pub(crate) fn fail_after(&self, left: usize) {
        self.reads.left.store(left, Ordering::Relaxed);
    }

    pub(crate) fn recover(&self) {
        self.fail_after(usize::MAX);
    }
}

impl WeightSource for Watched {
    fn weight(&self, tensor: &TensorSpec) -> Option<HostWeight> {
        let weight = self.source.weight(tensor)?;
        Some(Arc::new(WatchedTensor { weight, reads: Arc::clone(&self.reads) }))
    }
}

impl HostTensor for WatchedTensor {
    fn name(&self) -> &str {
        self.weight.name()
    }

    fn dtype(&self) -> DType {
        self.weight.dtype()
    }

    fn shape(&self) -> &[usize] {
        self.weight.shape()
    }

    fn mapped(&self) -> Option<&[u8]> {
        None
    }

    fn read_into(&self, destination: &mut [u8]) -> Result<(), HostReadError> {
        std::thread::sleep(Duration::from_micros(self.reads.delay_us.load(Ordering::Relaxed)));
        let take = |left: usize| Some(if left == usize::MAX { left } else { left.checked_sub(1)? });
        if self.reads.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_err() {
            return Err(HostReadError { tensor: self.name().to_owned(), reason: "not now".to_owned() });
        }
        self.weight.read_into(destination)
    }
}
