//! Small models, plans and requests for the tests of the engine.
#![allow(dead_code, reason = "every test target uses some of it")]

mod requests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use cogvlm_backend::{HostReadError, HostTensor, HostWeight, RopeMode};
use cogvlm_checkpoint::ModelSource;
use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{DType, Device, ModelSpec, TensorSpec};
use cogvlm_cpu::{CpuBackend, Threads};
use cogvlm_pipeline::{Engine, Request, WeightSource, load_plan};
use cogvlm_plan::links::{CardRates, HostRates, Links};
use cogvlm_plan::plan;
use cogvlm_plan::plan::{DeviceBudget, DevicePlan, Plan, PlanRequest, Policy};

#[allow(unused_imports, reason = "every test target uses some of it")]
pub(crate) use requests::{image, request};

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

/// Tokens and logits of every request, in order of submission.
pub(crate) fn answers(engine: &mut Engine<CpuBackend>, wanted: Vec<Request>) -> Vec<Vec<(u32, Vec<f32>)>> {
    let (tokens, logits) = requests::answers(engine, wanted);
    tokens.into_iter().zip(logits).map(|(tokens, logits)| tokens.into_iter().zip(logits).collect()).collect()
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
        let (weight, reads) = (self.source.weight(tensor)?, Arc::clone(&self.reads));
        let name = weight.name().to_owned();
        let before = move || {
            std::thread::sleep(Duration::from_micros(reads.delay_us.load(Ordering::Relaxed)));
            let take = |left: usize| Some(if left == usize::MAX { left } else { left.checked_sub(1)? });
            let taken = reads.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
            taken.map(drop).map_err(|_| HostReadError { tensor: name.clone(), reason: "not now".to_owned() })
        };
        Some(Arc::new(Hooked { weight, bytes: None, before }))
    }
}

/// A weight; `before` is called whenever somebody is about to get its bytes.
pub(crate) struct Hooked<F> {
    pub(crate) weight: HostWeight,
    /// Its bytes, where they lie in memory.
    pub(crate) bytes: Option<Vec<u8>>,
    pub(crate) before: F,
}

impl<F: Fn() -> Result<(), HostReadError> + Send + Sync> HostTensor for Hooked<F> {
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
        let bytes = self.bytes.as_ref()?;
        (self.before)().ok()?;
        Some(bytes)
    }

    fn read_into(&self, destination: &mut [u8]) -> Result<(), HostReadError> {
        (self.before)()?;
        self.weight.read_into(destination)
    }
}
