//! What holds for every request: device-map.md 15.9. Cases are drawn from a fixed seed, so that a failure stays.

mod common;

use std::collections::HashSet;

use cogvlm_core::memory::MIB;
use cogvlm_core::workspace::{StepLimits, kv_bytes_per_layer, workspace_bytes};
use cogvlm_core::{DType, Device, Phase, Unit, WeightGroup, tensor_inventory};
use cogvlm_plan::links::{CardRates, HostRates, Links, PeerRates};
use cogvlm_plan::plan::{DeviceBudget, Plan, PlanRequest, Policy, Residency, STAGING_ALIGN, STAGING_SLOTS};
use cogvlm_plan::{PlanError, plan};
use common::{host_reading, request_of, streamed_token_bytes, token_bytes};
use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestCaseError};

/// `PROPTEST_CASES=5000` draws as many other cases instead.
fn config(cases: u32) -> ProptestConfig {
    let chosen = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if std::env::var_os("PROPTEST_CASES").is_some() {
        return chosen;
    }
    ProptestConfig { cases, rng_seed: RngSeed::Fixed(17), ..chosen }
}

/// A model, and a budget in MiB that is about what its weights take.
fn models() -> impl Strategy<Value = (&'static str, u64)> {
    prop_oneof![
        4 => Just(("cogvlm-chat-17b", 33_700)),
        1 => Just(("cogvlm2-19b", 37_200)),
        2 => Just(("small", 120)),
        1 => Just(("deep", 47)),
        1 => Just(("tiny", 20)),
    ]
}

/// Requests around the edge between what fits and what does not, and some far from it.
fn requests() -> impl Strategy<Value = PlanRequest> {
    let cards = prop::collection::vec((1_u64..1200, 0_u32..3), 0..5);
    let host = prop::option::of(1_u64..1500);
    let policies = prop::sample::select(vec![Policy::Auto, Policy::Balanced, Policy::Latency, Policy::Throughput]);
    let limits = (1_usize..4096, 1_usize..9);
    let rest = (any::<bool>(), any::<bool>(), any::<bool>());
    (models(), cards, host, policies, limits, rest).prop_map(|((model, mib), cards, host, policy, limits, rest)| {
        let (disk, slow_host, f32_activations) = rest;
        let part = |permille: u64| permille * mib * MIB / 1000;
        let mut ordinal = 0;
        let mut budgets: Vec<DeviceBudget> = Vec::new();
        for (permille, gap) in cards {
            budgets.push(DeviceBudget { device: Device::Gpu(ordinal), bytes: part(permille) });
            ordinal += 1 + gap;
        }
        budgets.extend(host.map(|permille| DeviceBudget { device: Device::Cpu, bytes: part(permille) }));
        budgets.extend(disk.then_some(DeviceBudget { device: Device::Disk, bytes: 0 }));
        let reserve = if mib > 1000 { 600 * MIB } else { 0 };
        let mut request = request_of(model, budgets, policy, reserve);
        request.limits = StepLimits::new(limits.0, limits.1);
        if mib < 1000 {
            request.limits.context_len = request.limits.context_len.min(64);
            request.limits.max_tokens = 64;
        }
        if slow_host {
            request.links = host_reading(1e7);
        }
        if f32_activations {
            request.activation_dtype = DType::F32;
        }
        request
    })
}

/// Rates of a machine, however odd: any that a file may have, of some cards and some ways between them.
fn links() -> impl Strategy<Value = Links> {
    let rate = || (0.0..20.9_f64).prop_map(|digits| 10_f64.powf(digits));
    let card = (rate(), rate(), rate(), rate(), 0.0..1.0_f64);
    let pair = (0_u32..4, 0_u32..4, rate(), 0.0..1.0_f64);
    let (cards, pairs) = (prop::collection::vec(card, 0..4), prop::collection::vec(pair, 0..4));
    ((rate(), rate(), rate()), cards, pairs, any::<bool>()).prop_map(|(host, cards, pairs, virtual_ranks)| {
        let (read_bytes_per_s, f32_flops_per_s, bf16_flops_per_s) = host;
        let host = HostRates { read_bytes_per_s, f32_flops_per_s, bf16_flops_per_s, disk_bytes_per_s: None };
        let mut links = Links::default().with_host(host);
        for (ordinal, (copy, product, from_host, to_host, host_hop_s)) in cards.into_iter().enumerate() {
            let rates = CardRates {
                copy_bytes_per_s: copy,
                product_flops_per_s: product,
                from_host_bytes_per_s: from_host,
                to_host_bytes_per_s: to_host,
                host_hop_s,
            };
            links = links.with_card(ordinal as u32, "card", rates);
        }
        for (from, to, bytes_per_s, hop_s) in pairs {
            links = links.with_pair(from, to, PeerRates { peer_access: true, bytes_per_s, hop_s });
        }
        if virtual_ranks { links.with_virtual_ranks() } else { links }
    })
}

/// Computes everything that a plan says about memory again, from the sizes of tensors alone.
fn check_memory(plan: &Plan, request: &PlanRequest) -> Result<(), TestCaseError> {
    let inventory = tensor_inventory(&request.spec);
    prop_assert_eq!(plan.placements.len(), inventory.len());
    let names: HashSet<&str> = plan.placements.iter().map(|placement| placement.tensor.name.as_str()).collect();
    prop_assert_eq!(names.len(), inventory.len(), "a tensor is placed twice");
    prop_assert!(inventory.iter().all(|tensor| names.contains(tensor.name.as_str())));

    let units: Vec<Unit> = plan.stages.iter().flat_map(|stage| stage.units.clone()).collect();
    prop_assert_eq!(units, Unit::execution_order(&request.spec));
    prop_assert!(plan.stages.windows(2).all(|pair| pair[0].device != pair[1].device));
    if let Some(stages) = plan.prefill_stages() {
        let units: Vec<Unit> = stages.iter().flat_map(|stage| stage.units.clone()).collect();
        prop_assert_eq!(units, Unit::execution_order(&request.spec));
        prop_assert!(stages.windows(2).all(|pair| pair[0].device != pair[1].device));
        let layers = stages.iter().filter(|stage| stage.device == Device::Cpu).flat_map(|stage| &stage.units);
        prop_assert!(layers.into_iter().all(|unit| *unit == Unit::Head), "the host prefills");
    }

    let kv = kv_bytes_per_layer(&request.spec, &request.limits, request.activation_dtype);
    let weight_bytes: u64 = plan.placements.iter().map(|placement| placement.bytes).sum();
    for budget in &request.budgets {
        let device = budget.device;
        let of = |stage: &&cogvlm_plan::plan::StagePlan| stage.device == device;
        let own: Vec<Unit> = plan.stages.iter().filter(of).flat_map(|stage| stage.units.clone()).collect();
        let rests = |residency: Residency, on: Device| match residency {
            Residency::Device => on == device,
            Residency::Peer(peer) => peer == device,
            Residency::Host => device == Device::Cpu,
            Residency::File => device == Device::Disk,
        };
        let (mut held, mut norms) = (0, 0);
        let mut slots: Vec<(Unit, WeightGroup, u64)> = Vec::new();
        for placement in &plan.placements {
            let tensor = &placement.tensor;
            let bytes = tensor.num_elements() as u64 * request.weight_dtype.size_bytes() as u64;
            held += if rests(placement.residency, placement.executes_on) { bytes } else { 0 };
            let prefilled = plan.prefills(placement.executes_on, tensor.unit) == Some(device);
            if prefilled && tensor.group == WeightGroup::Norms {
                norms += bytes;
            }
            let streamed = (placement.executes_on == device || prefilled)
                && device != Device::Cpu
                && placement.residency != Residency::Device
                && tensor.phase != Phase::RowLookup;
            if streamed && !(prefilled && tensor.group == WeightGroup::Norms) {
                prop_assert!(tensor.group != WeightGroup::Norms, "norms are streamed");
                let bytes = bytes.next_multiple_of(STAGING_ALIGN);
                match slots.iter_mut().find(|(unit, group, _)| (*unit, *group) == (tensor.unit, tensor.group)) {
                    Some((.., slot)) => *slot += bytes,
                    None => slots.push((tensor.unit, tensor.group, bytes)),
                }
            }
            if placement.executes_on == Device::Cpu {
                prop_assert!(matches!(placement.residency, Residency::Host | Residency::File));
            }
            if tensor.phase == Phase::EveryToken {
                prop_assert!(placement.residency != Residency::File, "hot weights rest in the file");
            }
        }
        let layers = own.iter().filter(|unit| matches!(unit, Unit::DecoderLayer(_))).count() as u64;
        let work = workspace_bytes(&request.spec, &plan.executed_on(device), &plan.limits, request.activation_dtype);
        let staging = STAGING_SLOTS as u64 * slots.iter().map(|(.., slot)| *slot).max().unwrap_or(0) + norms;
        let used = held + layers * kv + work + staging;
        let stated = plan.devices.iter().find(|plan| plan.device == device);
        let reserve = stated.map_or(0, |plan| plan.reserved_bytes);
        if matches!(device, Device::Gpu(_)) && used > 0 {
            // What the driver keeps for registered pages is a part of what may rest off the cards.
            let most = (weight_bytes + request.spec.num_layers as u64 * kv) / 384 + MIB;
            let most = if request.reserve_bytes > 0 { most } else { 0 };
            prop_assert!((request.reserve_bytes..=request.reserve_bytes + most).contains(&reserve));
        } else {
            prop_assert_eq!(reserve, 0);
        }
        let used = used + reserve;
        prop_assert_eq!(stated.map(|plan| plan.used_bytes()), Some(used), "{}", device);
        prop_assert!(device == Device::Disk || used <= budget.bytes, "{} holds {} of {}", device, used, budget.bytes);
    }
    Ok(())
}

fn planned(request: &PlanRequest) -> Result<Option<Plan>, TestCaseError> {
    match plan(request) {
        Ok(plan) => Ok(Some(plan)),
        Err(PlanError::DoesNotFit { .. } | PlanError::NoDevice) => Ok(None),
        Err(error) => Err(TestCaseError::fail(error.to_string())),
    }
}

proptest! {
    #![proptest_config(config(100))]

    #[test]
    fn every_tensor_is_placed_once_and_no_budget_is_exceeded(request in requests()) {
        if let Some(plan) = planned(&request)? {
            check_memory(&plan, &request)?;
        }
    }

    #[test]
    fn plans_survive_json_and_repeat_to_the_byte(request in requests(), links in links()) {
        let request = PlanRequest { links, ..request };
        if let Some(first) = planned(&request)? {
            let text = first.to_json();
            let read = Plan::from_json(&text, &request.spec).map_err(|error| TestCaseError::fail(error.to_string()))?;
            prop_assert_eq!(&read, &first);
            let mut shuffled = request.clone();
            shuffled.budgets.reverse();
            prop_assert_eq!(plan(&shuffled).unwrap().to_json(), text);
        }
    }

    #[test]
    fn cards_that_hold_the_hot_weights_stream_none(request in requests()) {
        if let Some(plan) = planned(&request)? {
            let num_cards = request.budgets.iter().filter(|budget| matches!(budget.device, Device::Gpu(_))).count() as u64;
            let bytes = |keep: fn(Phase) -> bool| -> u64 {
                plan.placements.iter().filter(|placement| keep(placement.tensor.phase)).map(|placement| placement.bytes).sum()
            };
            let hot = bytes(|phase| phase == Phase::EveryToken);
            let all_units = Unit::execution_order(&request.spec);
            let work = workspace_bytes(&request.spec, &all_units, &plan.limits, request.activation_dtype);
            let kv = kv_bytes_per_layer(&request.spec, &request.limits, request.activation_dtype);
            // Any group in both slots, and the embedding where it cannot rest elsewhere.
            let table = bytes(|phase| phase == Phase::RowLookup);
            let group = request.spec.hidden_size.max(request.spec.vision.hidden_size) * request.spec.intermediate_size * 2 * 4;
            let head = hot / 2;
            let fixed = work + 4 * (group as u64 + head.min(table)) + request.reserve_bytes + (64 << 20) + table;
            let grain = (hot - table) / request.spec.num_layers as u64 + kv;
            let cards = request.budgets.iter().filter(|budget| matches!(budget.device, Device::Gpu(_)));
            let room: u64 = cards.map(|budget| budget.bytes.saturating_sub(fixed)).sum();
            if room >= hot + kv * request.spec.num_layers as u64 + num_cards * (grain + table) {
                prop_assert!(streamed_token_bytes(&plan, &request.spec) <= 2 * request.spec.hidden_size as u64);
            }
        }
    }
}

proptest! {
    #![proptest_config(config(120))]

    #[test]
    fn more_memory_never_hurts(
        request in requests(), which in any::<prop::sample::Index>(), more in 1_u64..600, streams in any::<bool>(),
    ) {
        let mut request = request;
        // With a host that is never worth computing on, bytes on the links are all there is to compare; otherwise time.
        request.links = if streams { host_reading(1e3) } else { Links::default() };
        let executing: Vec<usize> =
            (0..request.budgets.len()).filter(|&index| request.budgets[index].device.executes()).collect();
        if executing.is_empty() {
            return Ok(());
        }
        let mut richer = request.clone();
        let budget = &mut richer.budgets[executing[which.index(executing.len())]];
        budget.bytes += budget.bytes * more / 200 + MIB;
        if let Some(before) = planned(&request)? {
            let after = planned(&richer)?;
            prop_assert!(after.is_some(), "more memory made it impossible: {:?}", richer.budgets);
            let after = after.unwrap();
            let row = 2 * request.spec.hidden_size as u64;
            let host_executes = |plan: &Plan| plan.stages.iter().any(|stage| stage.device == Device::Cpu);
            if !host_executes(&before) && !host_executes(&after) {
                // Whether rows of the embedding are looked up on the host may change.
                let bytes = [&before, &after].map(|plan| streamed_token_bytes(plan, &request.spec));
                prop_assert!(bytes[1] <= bytes[0] + row, "{} B per token became {}", bytes[0], bytes[1]);
            }
            let hops = (request.budgets.len() + 2) as f64 * (request.links.pair(0, 1).hop_s + row as f64 * 2.0 / 20e9);
            if !streams && request.limits.max_sequences == 1 {
                prop_assert!(
                    after.seconds_per_token <= before.seconds_per_token + hops,
                    "{} s per token became {}", before.seconds_per_token, after.seconds_per_token
                );
            }
        }
    }

    #[test]
    fn names_of_equal_cards_do_not_matter(
        request in requests(), permille in 200_u64..1200, num_cards in 1_u32..5, shift in 1_u32..100,
    ) {
        let mut request = request;
        let bytes = request.budgets.iter().map(|budget| budget.bytes).max().unwrap_or(MIB) * permille / 1000 + 1;
        request.budgets.retain(|budget| !matches!(budget.device, Device::Gpu(_)));
        let mut relabelled = request.clone();
        for card in 0..num_cards {
            request.budgets.push(DeviceBudget { device: Device::Gpu(card), bytes });
            relabelled.budgets.insert(0, DeviceBudget { device: Device::Gpu(card * 3 + shift), bytes });
        }
        let (one, other) = (planned(&request)?, planned(&relabelled)?);
        prop_assert_eq!(one.is_some(), other.is_some());
        if let (Some(one), Some(other)) = (one, other) {
            let name = |device: Device| match device {
                Device::Gpu(ordinal) => Device::Gpu(ordinal * 3 + shift),
                place => place,
            };
            let stages: Vec<_> = one.stages.iter().map(|stage| (name(stage.device), stage.units.clone())).collect();
            let others: Vec<_> = other.stages.iter().map(|stage| (stage.device, stage.units.clone())).collect();
            prop_assert_eq!(stages, others);
            let place = |placement: &cogvlm_plan::plan::TensorPlacement| placement.residency.place(placement.executes_on);
            let places: Vec<_> = one.placements.iter().map(|placement| name(place(placement))).collect();
            prop_assert_eq!(places, other.placements.iter().map(place).collect::<Vec<_>>());
            prop_assert_eq!(token_bytes(&one), token_bytes(&other));
            prop_assert_eq!(one.seconds_per_image, other.seconds_per_image);
        }
    }

    #[test]
    fn nothing_panics(
        budgets in prop::collection::vec((0_u32..12, prop_oneof![any::<u64>(), 0_u64..1 << 36]), 0..7),
        context in prop_oneof![any::<usize>(), 0_usize..5000, Just(1 << 20)],
        batch in prop_oneof![any::<usize>(), 0_usize..100, Just(1 << 12)],
        images in prop_oneof![any::<usize>(), 0_usize..4, Just(1 << 12)],
        max_tokens in prop_oneof![any::<usize>(), 1_usize..5000, Just(1 << 20)],
        reserve in prop_oneof![any::<u64>(), 0_u64..1 << 30],
    ) {
        let device = |key: u32| match key {
            10 => Device::Cpu,
            11 => Device::Disk,
            ordinal => Device::Gpu(ordinal),
        };
        let budgets = budgets.into_iter().map(|(key, bytes)| DeviceBudget { device: device(key), bytes }).collect();
        let mut request = request_of("small", budgets, Policy::Auto, reserve);
        request.limits = StepLimits { max_tokens, max_sequences: batch, max_images: images, context_len: context, parcels: 0 };
        if let Ok(plan) = plan(&request) {
            prop_assert!(!plan.report(None).is_empty());
        }
    }
}
