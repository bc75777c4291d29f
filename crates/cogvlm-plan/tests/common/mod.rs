//! Requests that tests share.
#![allow(dead_code, unreachable_pub, reason = "each test uses a part")]

use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{DType, Device, ModelConfig, ModelSpec};
use cogvlm_plan::links::{HostRates, Links};
use cogvlm_plan::parse_max_memory;
use cogvlm_plan::plan::{CUDA_RESERVE_BYTES, DeviceBudget, Plan, PlanRequest, Policy, Residency};

pub fn spec(name: &str) -> ModelSpec {
    ModelConfig::built_in(name).unwrap().resolve().unwrap()
}

/// A plan of the published model on cards, 2,048 tokens.
pub fn request(max_memory: &str, policy: Policy) -> PlanRequest {
    request_of("cogvlm-chat-17b", parse_max_memory(max_memory).unwrap(), policy, CUDA_RESERVE_BYTES)
}

pub fn request_of(model: &str, budgets: Vec<DeviceBudget>, policy: Policy, reserve_bytes: u64) -> PlanRequest {
    PlanRequest {
        model: model.to_owned(),
        spec: spec(model),
        weight_dtype: DType::Bf16,
        activation_dtype: DType::Bf16,
        budgets,
        policy,
        limits: StepLimits::new(2048, 1),
        reserve_bytes,
        links: Links::default(),
    }
}

/// Assumed rates, but for a host that reads so many bytes per second.
pub fn host_reading(read_bytes_per_s: f64) -> Links {
    let assumed = Links::default();
    let host = HostRates { read_bytes_per_s, ..*assumed.host() };
    assumed.with_host(host)
}

/// Bytes that a decoded token takes over links, hidden states included.
pub fn token_bytes(plan: &Plan) -> u64 {
    plan.links.iter().map(|link| link.bytes_per_token).sum()
}

/// Bytes of weights that a decoded token takes over links, rows of the embedding included.
pub fn streamed_token_bytes(plan: &Plan, spec: &ModelSpec) -> u64 {
    let hops = plan.stages.windows(2).filter(|pair| {
        let unit = pair[1].units[0];
        matches!(unit, cogvlm_core::Unit::DecoderLayer(_) | cogvlm_core::Unit::Head)
    });
    token_bytes(plan) - (hops.count() * spec.hidden_size * plan.activation_dtype.size_bytes()) as u64
}

pub fn weights_on(plan: &Plan, device: Device) -> u64 {
    plan.devices.iter().find(|plan| plan.device == device).map_or(0, |plan| plan.weight_bytes)
}

pub fn all_at_home(plan: &Plan) -> bool {
    plan.placements.iter().all(|placement| placement.residency == Residency::Device)
}
