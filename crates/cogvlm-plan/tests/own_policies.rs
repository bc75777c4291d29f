//! What our own policies promise, on the published model and on models small enough to try every cut.

mod common;

use std::ops::Range;
use std::time::{Duration, Instant};

use cogvlm_core::memory::GIB;
use cogvlm_core::workspace::{StepLimits, kv_bytes_per_layer, workspace_bytes};
use cogvlm_core::{DType, Device, Phase, Unit, tensor_inventory};
use cogvlm_plan::links::{HostRates, Links};
use cogvlm_plan::plan::{DeviceBudget, Plan, PlanRequest, Policy, Prefill, Residency};
use cogvlm_plan::{Change, PlanError, plan};
use common::{all_at_home, host_reading, request, request_of, streamed_token_bytes, token_bytes, weights_on};

const POLICIES: [Policy; 4] = [Policy::Auto, Policy::Balanced, Policy::Latency, Policy::Throughput];
/// Weights of the published model that every token reads, 32 `inv_freq` of 128 B included.
const HOT_BYTES: u64 = 13_214_687_232 + 32 * 128;
/// `up_proj` and `gate_proj` of one expert, the largest group of a layer.
const LARGEST_MATRIX: u64 = 2 * 11_008 * 4096 * 2;
const LAYER_HOT_BYTES: u64 = 404_750_336;

fn layers_on(plan: &Plan, device: Device, is_layer: fn(&Unit) -> bool) -> usize {
    let stages = plan.stages.iter().filter(|stage| stage.device == device);
    stages.flat_map(|stage| &stage.units).filter(|unit| is_layer(unit)).count()
}

fn decoder_layers_on(plan: &Plan, device: Device) -> usize {
    layers_on(plan, device, |unit| matches!(unit, Unit::DecoderLayer(_)))
}

/// Rates with which nothing is worth computing on the host.
fn slow_host() -> Links {
    host_reading(1e8)
}

/// A host of 16 cores that reads more than twice of what a link copies.
fn host_of_a_server() -> Links {
    let links = Links::default().with_card_name(0, "NVIDIA H100 80GB HBM3");
    let host = HostRates { read_bytes_per_s: 135e9, bf16_flops_per_s: 1e12, ..*links.host() };
    links.with_host(host)
}

#[test]
fn two_cards_are_balanced_in_room_and_in_work() {
    for policy in [Policy::Balanced, Policy::Throughput] {
        let plan = plan(&request("0:20GiB,1:20GiB,cpu:16GiB", policy)).unwrap();
        assert!(all_at_home(&plan), "{policy:?}");
        assert_eq!([Device::Gpu(0), Device::Gpu(1)].map(|card| decoder_layers_on(&plan, card)), [16, 16]);
        // 32 and 31 ViT layers, give or take one.
        let vit = layers_on(&plan, Device::Gpu(0), |unit| matches!(unit, Unit::VitLayer(_)));
        assert!((31..=33).contains(&vit), "{vit} ViT layers on card 0");
        assert_eq!(weights_on(&plan, Device::Cpu), 0);
        for device in &plan.devices[..2] {
            // 3.0 GiB without reserve and workspace, as weights and KV of the best cut leave them, to within a ViT layer.
            let without = device.free_bytes().unwrap() + device.workspace_bytes + device.reserved_bytes;
            assert!(without > 3 * GIB - 136_000_000, "{policy:?}: {without} B free on {}", device.device);
        }
        // The relay of one sequence: one hop of a hidden state.
        assert_eq!(token_bytes(&plan), 8192);
    }
}

#[test]
fn latency_keeps_everything_hot_on_one_card() {
    let plan = plan(&request("0:20GiB,1:20GiB,cpu:16GiB", Policy::Latency)).unwrap();
    assert_eq!(token_bytes(&plan), 0);
    let hot = plan.placements.iter().filter(|placement| placement.tensor.phase == Phase::EveryToken);
    for placement in hot {
        assert_eq!((placement.executes_on, placement.residency), (Device::Gpu(0), Residency::Device));
    }
    // What does not fit beside it rests on the other card, not on the host.
    assert_eq!(weights_on(&plan, Device::Cpu), 0);
    assert!(plan.placements.iter().any(|placement| placement.residency == Residency::Peer(Device::Gpu(1))));
    // A card that holds everything does everything.
    let roomy = cogvlm_plan::plan(&request("0:80GiB,1:80GiB", Policy::Latency)).unwrap();
    assert_eq!(roomy.stages.len(), 1);
    assert!(all_at_home(&roomy));
}

#[test]
fn auto_chooses_by_batch() {
    let mut one = request("0:20GiB,1:20GiB", Policy::Auto);
    assert_eq!(plan(&one).unwrap().policy, Policy::Latency);
    one.limits = StepLimits::new(1024, 4);
    assert_eq!(plan(&one).unwrap().policy, Policy::Throughput);
}

/// Room for weights on all cards, as the plan itself accounts for the rest.
fn capacity(plan: &Plan) -> u64 {
    let cards = plan.devices.iter().filter(|device| matches!(device.device, Device::Gpu(_)));
    let room = cards.map(|device| {
        let rest = device.kv_bytes + device.workspace_bytes + device.staging_bytes + device.reserved_bytes;
        device.budget_bytes.unwrap() - rest
    });
    room.sum()
}

#[test]
fn decoding_streams_what_the_cards_cannot_hold_and_no_more() {
    for (cards, host) in [
        ("0:20GiB,1:20GiB", 16),
        ("0:16GiB,1:16GiB", 16),
        ("0:12GiB,1:12GiB", 16),
        ("0:8GiB,1:8GiB", 24),
        ("0:24GiB", 16),
        ("0:20GiB", 30),
        ("0:20GiB", 17),
        ("0:16GiB", 32),
        ("0:12GiB", 24),
        ("0:10GiB", 40),
        ("0:8GiB", 40),
        ("0:4GiB,1:4GiB,2:4GiB", 40),
    ] {
        for policy in POLICIES {
            let mut request = request(&format!("{cards},cpu:{host}GiB"), policy);
            request.links = slow_host();
            let plan = plan(&request).unwrap_or_else(|error| panic!("{cards} {policy:?}: {error}"));
            let num_cards = cards.split(',').count() as u64;
            let streamed = streamed_token_bytes(&plan, &request.spec);
            let (room, case) = (capacity(&plan), format!("{cards} {policy:?}: {streamed} B per token"));
            if room >= HOT_BYTES + (num_cards - 1) * LAYER_HOT_BYTES {
                assert!(streamed <= 8192, "{case}");
            } else {
                let least = HOT_BYTES.saturating_sub(room) + 8192;
                assert!((least..least + num_cards * LARGEST_MATRIX).contains(&streamed), "{case}, {least} at least");
            }
        }
    }
}

#[test]
fn a_card_streams_only_what_it_cannot_hold_of_an_image_prefill() {
    for (card, host) in [(24, 16), (20, 30), (16, 32)] {
        let plan = plan(&request(&format!("0:{card}GiB,cpu:{host}GiB"), Policy::Auto)).unwrap();
        let cold = 12_952_010_752 + 8_850_528_768_u64;
        let least = HOT_BYTES + cold - capacity(&plan);
        // Rows of the embedding travel with them.
        let streamed = plan.links[0].bytes_per_image - 33 * 8192;
        assert!((least..least + LARGEST_MATRIX).contains(&streamed), "{card} GiB: {streamed} B, {least} at least");
    }
}

#[test]
fn hot_overflow_goes_where_it_is_faster() {
    let layers_on_host = |max_memory: &str, links: Links, (context, batch): (usize, usize)| {
        let mut request = request(max_memory, Policy::Auto);
        (request.links, request.limits) = (links, StepLimits::new(context, batch));
        let plan = plan(&request).unwrap();
        (decoder_layers_on(&plan, Device::Cpu), streamed_token_bytes(&plan, &request.spec))
    };
    // 40 GB/s of host memory against 20 GB/s of link.
    let (few, _) = layers_on_host("0:12GiB,cpu:40GiB", Links::default(), (2048, 1));
    let (more, _) = layers_on_host("0:8GiB,cpu:40GiB", Links::default(), (2048, 1));
    assert!(0 < few && few < more, "{few} layers with 12 GiB, {more} with 8 GiB");
    let (none, streamed) = layers_on_host("0:12GiB,cpu:40GiB", slow_host(), (2048, 1));
    assert!(none == 0 && streamed > GIB, "{none} layers on a slow host, {streamed} B streamed");
    // Three links one after the other are as slow as one.
    let (layers, streamed) = layers_on_host("0:4GiB,1:4GiB,2:4GiB,cpu:40GiB", Links::default(), (2048, 1));
    assert!(layers > 0 && streamed < 3 * LARGEST_MATRIX, "{layers} layers on the host, {streamed} B streamed");
    // Same KV cache, another batch: 64 sequences take the host 26 ms of arithmetic for a layer whose weights, and the
    // KV cache that would leave the card with it, stream in 24 ms; 16 sequences take it 12 ms of reading.
    let (computed, _) = layers_on_host("0:12GiB,cpu:40GiB", Links::default(), (256, 16));
    let (none, streamed) = layers_on_host("0:12GiB,cpu:40GiB", Links::default(), (64, 64));
    assert!(computed > 0, "nothing is computed on the host");
    assert!(none == 0 && streamed > GIB, "{none} layers on the host, {streamed} B streamed");
}

/// What the host decodes, a card prefills, from as many tokens of text on as it is faster with.
#[test]
fn prompts_of_the_host_go_to_a_card() {
    let planned_for = |max_memory, links| PlanRequest { links, ..request(max_memory, Policy::Auto) };
    let request = planned_for("0:8GiB,cpu:40GiB", host_of_a_server());
    let by_card = plan(&request).unwrap();
    let prefill = by_card.prefill.expect("a card computes prompts sooner");
    let by_host = Plan { prefill: None, ..by_card.clone() };
    let prediction = |plan: &Plan| plan.prediction(&request.spec, &request.links);
    let [image_s, by_host_image_s] = [&by_card, &by_host].map(|plan| prediction(plan).prefill_s(true, 33));
    assert!(image_s < 0.2 * by_host_image_s, "an image takes {image_s} s in place of {by_host_image_s}");
    assert_eq!(image_s, by_card.seconds_per_image);
    // Below, steps go the host's way; there and above, the card's.
    let always = Plan { prefill: Some(Prefill { from_rows: 1, ..prefill }), ..by_card.clone() };
    let rows = prefill.from_rows;
    let text_s = |plan: &Plan| [rows - 1, rows].map(|text| prediction(plan).prefill_s(false, text));
    let (found, of_card, of_host) = (text_s(&by_card), text_s(&always), text_s(&by_host));
    assert!(of_card[0] >= of_host[0] && of_card[1] < of_host[1], "{of_card:?} {of_host:?}");
    assert_eq!(found, [of_host[0], of_card[1]]);
    // The host has the KV cache of its layers, the card a place for a group of them in each slot of its ring.
    let kv = kv_bytes_per_layer(&request.spec, &request.limits, request.activation_dtype);
    let on_host = decoder_layers_on(&by_card, Device::Cpu) as u64;
    let [card, host] = [0, 1].map(|index| by_card.devices[index]);
    assert_eq!([card.kv_bytes, host.kv_bytes], [(32 - on_host) * kv, on_host * kv]);
    let norms = on_host * (2 * 4096 * 2 + 128);
    assert_eq!(card.staging_bytes, 2 * LARGEST_MATRIX + norms);
    let stages = by_card.prefill_stages().unwrap();
    assert_eq!(stages.len(), 1, "{stages:?}");
    // Nothing is left to a card where the host does nothing, or is faster.
    for (max_memory, links) in [
        ("0:8GiB,cpu:40GiB", slow_host()),
        ("0:16GiB,cpu:40GiB", host_of_a_server()),
        ("cpu:40GiB", host_of_a_server()),
    ] {
        assert!(plan(&planned_for(max_memory, links)).unwrap().prefill.is_none(), "{max_memory}");
    }
    let host = HostRates { bf16_flops_per_s: 1e15, ..*host_of_a_server().host() };
    let fast_host = planned_for("0:8GiB,cpu:40GiB", host_of_a_server().with_host(host));
    assert!(plan(&fast_host).unwrap().prefill.is_none(), "a host that computes as much as a card");
}

#[test]
fn layers_of_the_host_rest_in_host_memory() {
    let plan = plan(&request("0:12GiB,cpu:24GiB", Policy::Auto)).unwrap();
    let on_host = plan.placements.iter().filter(|placement| placement.executes_on == Device::Cpu);
    assert!(on_host.clone().count() > 0);
    assert!(on_host.clone().all(|placement| placement.residency == Residency::Host));
    let host = plan.devices.iter().find(|device| device.device == Device::Cpu).unwrap();
    assert!(host.kv_bytes > 0 && host.workspace_bytes > 0 && host.staging_bytes == 0);
}

#[test]
fn without_cards_the_host_executes_everything() {
    for policy in POLICIES {
        let plan = plan(&request("cpu:40GiB", policy)).unwrap();
        assert_eq!(plan.stages.len(), 1);
        assert_eq!(weights_on(&plan, Device::Cpu), 35_279_374_848);
        assert!(plan.links.is_empty());
    }
    // Cards too small for anything change nothing.
    let plan = plan(&request("0:700MiB,cpu:40GiB", Policy::Auto)).unwrap();
    assert_eq!(weights_on(&plan, Device::Cpu), 35_279_374_848);
    assert!(plan.notices.iter().any(|notice| notice == "`0` is not used"), "{:?}", plan.notices);
}

#[test]
fn the_file_is_used_only_where_it_is_named_and_never_for_hot_weights() {
    assert!(matches!(plan(&request("0:20GiB", Policy::Auto)), Err(PlanError::DoesNotFit { .. })));
    let on_disk = plan(&request("0:20GiB,disk", Policy::Auto)).unwrap();
    let in_file = on_disk.placements.iter().filter(|placement| placement.residency == Residency::File);
    assert!(in_file.clone().count() > 0);
    assert!(in_file.clone().all(|placement| placement.tensor.phase != Phase::EveryToken));
    assert!(matches!(plan(&request("0:12GiB,disk", Policy::Auto)), Err(PlanError::DoesNotFit { .. })));
    // Host memory comes first, and what the cards hold does not go there.
    let both = plan(&request("0:20GiB,cpu:8GiB,disk", Policy::Auto)).unwrap();
    assert!(weights_on(&both, Device::Cpu) > 8 * GIB - LARGEST_MATRIX);
    assert!(plan(&request("0:40GiB,cpu:8GiB,disk", Policy::Auto)).is_ok_and(|plan| all_at_home(&plan)));
}

#[test]
fn refusals_say_what_would_do() {
    for (max_memory, context, batch) in [
        ("0:12GiB", 2048, 1),
        ("0:14GiB,1:14GiB", 2048, 1),
        ("cpu:20GiB", 2048, 1),
        ("0:37GiB", 4096, 4),
        ("0:8GiB,cpu:10GiB", 2048, 1),
    ] {
        let mut refused = request(max_memory, Policy::Auto);
        refused.limits = StepLimits::new(context, batch);
        let error = plan(&refused).unwrap_err();
        let PlanError::DoesNotFit { device, budget_bytes, needed_bytes, changes, .. } = &error else {
            panic!("{max_memory}: {error}");
        };
        assert!(needed_bytes > budget_bytes && !changes.is_empty(), "{error}");
        assert!(changes.contains(&Change::Raise(*device, *needed_bytes)), "{error}");
        for change in changes {
            let (mut does, mut less) = (refused.clone(), refused.clone());
            match *change {
                Change::Raise(device, bytes) | Change::Add(device, bytes) => {
                    for (request, bytes) in [(&mut does, bytes), (&mut less, bytes - GIB / 10 - 1)] {
                        request.budgets.retain(|budget| budget.device != device);
                        request.budgets.push(DeviceBudget { device, bytes });
                    }
                }
                Change::Context(tokens) => {
                    does.limits = StepLimits::new(tokens, batch);
                    less.limits = StepLimits::new(tokens + 128, batch);
                }
                Change::Batch(sequences) => {
                    does.limits.max_sequences = sequences;
                    less.limits.max_sequences = sequences + 1;
                }
            }
            assert!(plan(&does).is_ok(), "{max_memory}: {change} does not do");
            assert!(plan(&less).is_err(), "{max_memory}: less than {change} does");
        }
    }
    let error = plan(&request("0:12GiB", Policy::Auto)).unwrap_err();
    assert_eq!(error.to_string(), "cogvlm-chat-17b does not fit: `0` offers 12.00 GiB, it would need 34.70 GiB");
    assert_eq!(error.hint().unwrap(), "raise `0` to 34.7GiB, or add `cpu:23.2GiB`");
}

#[test]
fn impossible_requests_are_refused_by_name() {
    let sound = request("0:40GiB", Policy::Auto);
    let refusal = |change: &dyn Fn(&mut PlanRequest)| {
        let mut request = sound.clone();
        change(&mut request);
        plan(&request).unwrap_err().to_string()
    };
    let budget = |device, bytes| DeviceBudget { device, bytes };
    assert_eq!(
        refusal(&|request| request.budgets.clear()),
        "`--max-memory` names no device that executes: list a card or `cpu`"
    );
    assert_eq!(
        refusal(&|request| request.budgets = vec![budget(Device::Disk, 1)]),
        "`--max-memory` names no device that executes: list a card or `cpu`"
    );
    assert_eq!(refusal(&|request| request.budgets.push(budget(Device::Gpu(0), 5))), "`--max-memory` names `0` twice");
    assert_eq!(
        refusal(&|request| request.budgets.push(budget(Device::Gpu(1), 0))),
        "the budget of `1` is 0: give it memory or leave it out"
    );
    assert_eq!(
        refusal(&|request| request.limits.context_len = 0),
        "`--context` is 0; it must lie between 1 and 1048576"
    );
    assert_eq!(
        refusal(&|request| request.limits.context_len = usize::MAX),
        format!("`--context` is {}; it must lie between 1 and 1048576", usize::MAX)
    );
    assert_eq!(refusal(&|request| request.limits.max_sequences = 0), "`--batch` is 0; it must lie between 1 and 4096");
    assert_eq!(
        refusal(&|request| request.policy = Policy::Accelerate),
        "policy `accelerate` makes a device map, not a plan: make the map first, then a plan of it"
    );
}

/// Every way to cut `num_units` into `num_parts` runs, some of which may be empty.
fn cuts(num_units: usize, num_parts: usize) -> Vec<Vec<Range<usize>>> {
    fn extend(
        start: usize, end: usize, parts: usize, prefix: &mut Vec<Range<usize>>, all: &mut Vec<Vec<Range<usize>>>,
    ) {
        if parts == 1 {
            prefix.push(start..end);
            all.push(prefix.clone());
            prefix.pop();
            return;
        }
        for cut in start..=end {
            prefix.push(start..cut);
            extend(cut, end, parts - 1, prefix, all);
            prefix.pop();
        }
    }
    let mut all = Vec::new();
    extend(0, num_units, num_parts, &mut Vec::new(), &mut all);
    all
}

#[test]
fn balance_is_within_one_layer_of_the_best_of_all_cuts() {
    const MIB: u64 = 1 << 20;
    let cases: [(&str, &[u64]); 9] = [
        ("tiny", &[1000, 1000]),
        ("tiny", &[1000, 1000, 1000]),
        ("tiny", &[1000, 60, 90]),
        ("small", &[1000, 1000]),
        ("small", &[1000, 1000, 1000]),
        ("small", &[1000; 4]),
        ("small", &[1000, 200]),
        ("small", &[150, 300, 180]),
        ("deep", &[1000, 1000]),
    ];
    for (model, budgets) in cases {
        let num_cards = budgets.len();
        let device = |card: usize| Device::Gpu(u32::try_from(card).unwrap());
        let budgets: Vec<u64> = budgets.iter().map(|mib| mib * MIB).collect();
        let cards = budgets.iter().enumerate().map(|(card, &bytes)| DeviceBudget { device: device(card), bytes });
        let request = |policy| request_of(model, cards.clone().collect(), policy, 0);
        let balanced = request(Policy::Balanced);
        let spec = &balanced.spec;
        let inventory = tensor_inventory(spec);
        let units = Unit::execution_order(spec);
        let bytes_of = |unit: Unit, keep: fn(Phase) -> bool| -> u64 {
            let tensors = inventory.iter().filter(|tensor| tensor.unit == unit && keep(tensor.phase));
            tensors.map(|tensor| 2 * tensor.num_elements() as u64).sum()
        };
        let kv = kv_bytes_per_layer(spec, &balanced.limits, DType::Bf16);
        let kv_of = |unit: Unit| if matches!(unit, Unit::DecoderLayer(_)) { kv } else { 0 };
        let held: Vec<u64> = units.iter().map(|&unit| bytes_of(unit, |_| true) + kv_of(unit)).collect();
        let read: Vec<u64> =
            units.iter().map(|&unit| bytes_of(unit, |phase| phase == Phase::EveryToken) + kv_of(unit)).collect();
        let num_vision = units.iter().filter(|unit| unit.is_vision()).count();

        let (mut most_free, mut least_read) = (0, u64::MAX);
        for text in cuts(units.len() - num_vision, num_cards) {
            let text: Vec<_> = text.iter().map(|run| num_vision + run.start..num_vision + run.end).collect();
            let slowest = text.iter().map(|run| read[run.clone()].iter().sum()).max().unwrap();
            for vision in cuts(num_vision, num_cards) {
                let free = text.iter().zip(&vision).zip(&budgets).map(|((text, vision), budget)| {
                    let own: Vec<Unit> = units[vision.clone()].iter().chain(&units[text.clone()]).copied().collect();
                    let work = workspace_bytes(spec, &own, &balanced.limits, DType::Bf16);
                    let held: u64 = held[vision.clone()].iter().chain(&held[text.clone()]).sum();
                    // A card that is not used does not count.
                    if own.is_empty() { Some(u64::MAX) } else { budget.checked_sub(held + work) }
                });
                if let Some(free) = free.collect::<Option<Vec<u64>>>() {
                    most_free = free.into_iter().min().unwrap().max(most_free);
                    least_read = least_read.min(slowest);
                }
            }
        }

        let even = plan(&balanced).unwrap();
        assert!(all_at_home(&even), "{model} on {budgets:?}");
        let used = even.devices.iter().filter(|device| device.used_bytes() > 0);
        let free = used.map(|device| device.free_bytes().unwrap()).min().unwrap();
        assert!(free <= most_free, "{model}: the test misses cuts");
        // Room is evened out to 4 MiB.
        let grain = held.iter().max().unwrap() + 4 * MIB;
        assert!(free + grain >= most_free, "{model} on {budgets:?}: {free} B stay free, {most_free} B could");

        let fast = plan(&request(Policy::Throughput)).unwrap();
        let slowest = (0..num_cards).map(|card| {
            let stages = fast.stages.iter().filter(|stage| stage.device == device(card));
            let own = stages.flat_map(|stage| &stage.units);
            own.map(|own| read[units.iter().position(|unit| unit == own).unwrap()]).sum::<u64>()
        });
        assert_eq!(slowest.max().unwrap(), least_read, "{model} on {budgets:?}");
    }
}

#[test]
fn other_models_are_planned_too() {
    for model in ["cogvlm-base-224-17b", "cogvlm2-19b"] {
        for policy in POLICIES {
            let budgets = cogvlm_plan::parse_max_memory("0:16GiB,1:16GiB,cpu:30GiB").unwrap();
            let request = request_of(model, budgets, policy, 600 << 20);
            assert!(streamed_token_bytes(&plan(&request).unwrap(), &request.spec) <= 8192, "{model} {policy:?}");
        }
    }
}

#[test]
fn planning_is_quick() {
    let allowed = if cfg!(debug_assertions) { Duration::from_millis(500) } else { Duration::from_millis(10) };
    let cards: Vec<String> = (0..8).map(|card| format!("{card}:{}GiB", 6 + card)).collect();
    let small: Vec<String> = (0..8).map(|card| format!("{card}:3GiB")).collect();
    let headline = "0:20GiB,1:20GiB,cpu:16GiB".to_owned();
    for max_memory in [cards.join(","), cards.join(",") + ",cpu:64GiB", small.join(",") + ",cpu:64GiB", headline] {
        for policy in POLICIES {
            let request = request(&max_memory, policy);
            // The fastest of many: other tests run at the same time.
            let fastest = (0..20).map(|_| {
                let start = Instant::now();
                plan(&request).unwrap();
                start.elapsed()
            });
            let fastest = fastest.min().unwrap();
            assert!(fastest < allowed, "{max_memory} {policy:?}: {fastest:?}");
        }
    }
}
