//! Predicted times beside those that were measured (docs/benchmarks), and what rates do to plans.

mod common;

use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{DType, Device};
use cogvlm_plan::links::{CardRates, HostRates, Links, MeasuredOn, PeerRates};
use cogvlm_plan::plan::{Plan, PlanRequest, Policy};
use cogvlm_plan::{Prediction, plan, plan_tensor_parallel};
use common::{all_at_home, request, request_of};

/// What a prediction may be off.
const WITHIN: f64 = 0.15;

fn near(predicted: f64, measured: f64) -> bool {
    (predicted / measured - 1.0).abs() <= WITHIN
}

/// The H100 of docs/benchmarks/2026-11-22-h100, as its runs measured it.
const H100: CardRates = CardRates {
    copy_bytes_per_s: 2.98e12,
    product_flops_per_s: 775e12,
    from_host_bytes_per_s: 54.5e9,
    to_host_bytes_per_s: 54.5e9,
    host_hop_s: 20e-6,
};

/// The 16 cores of docs/benchmarks/2026-11-21-16-cores-17b.
const CORES_16: HostRates = HostRates {
    read_bytes_per_s: 133e9,
    f32_flops_per_s: 1.217e12,
    bf16_flops_per_s: 0.696e12,
    disk_bytes_per_s: None,
};

fn on_h100(rates: CardRates) -> Prediction {
    let request = request("0:79GiB", Policy::Auto);
    plan(&request).unwrap().prediction(&request.spec, &Links::default().with_card(0, "H100", rates))
}

/// The largest deviation of predictions from what was measured, as a share; and of what.
fn worst(times: &[(&'static str, f64, f64)]) -> (f64, &'static str) {
    let off = times.iter().map(|(what, predicted, measured)| ((predicted / measured - 1.0).abs(), *what));
    off.max_by(|(a, _), (b, _)| a.total_cmp(b)).unwrap()
}

/// Predicted and measured seconds of everything that was measured on the H100, all weights resident.
fn h100_times(rates: CardRates) -> Vec<(&'static str, f64, f64)> {
    let predicted = on_h100(rates);
    let step = |sequences, context_len| predicted.decode_step_s(sequences, context_len);
    vec![
        ("decode 1", step(1, 1300.0), 4.80e-3),
        ("decode 2", step(2, 1300.0), 5.01e-3),
        ("decode 4", step(4, 1300.0), 5.46e-3),
        ("decode 8", step(8, 1300.0), 6.40e-3),
        ("decode 16", step(16, 1300.0), 8.17e-3),
        ("decode 1, short", step(1, 100.0), 4.52e-3),
        ("decode 8, short", step(8, 100.0), 4.74e-3),
        ("decode 16, short", step(16, 100.0), 4.89e-3),
        ("prefill with an image", predicted.prefill_s(true, 33), 55.0e-3),
        ("of which the tower", predicted.prefill_s(true, 0) - decoder_of(&predicted), 25.3e-3),
        ("prefill of 33 tokens", predicted.prefill_s(false, 33), 7.3e-3),
    ]
}

/// Seconds of the decoder in the prefill of an image without text: what as many tokens of text take.
fn decoder_of(predicted: &Prediction) -> f64 {
    predicted.prefill_s(false, 1227)
}

#[test]
fn an_h100_is_predicted() {
    let times = h100_times(H100);
    let (off, what) = worst(&times);
    assert!(off <= WITHIN, "{what} is off by {off}: {times:?}");
    // Rates of another machine are noticed, but not those of a link over which nothing goes.
    let wrong_copy = CardRates { copy_bytes_per_s: 1.25 * H100.copy_bytes_per_s, ..H100 };
    assert!(worst(&h100_times(wrong_copy)).0 > WITHIN);
    let wrong_product = CardRates { product_flops_per_s: 1.4 * H100.product_flops_per_s, ..H100 };
    assert!(worst(&h100_times(wrong_product)).0 > WITHIN);
    let other_link = CardRates { from_host_bytes_per_s: 1e9, ..H100 };
    assert_eq!(h100_times(other_link), times);
}

/// Without `--links`, the driver's name of the card does.
#[test]
fn a_card_that_is_known_by_name_is_predicted() {
    let mut request = request("0:79GiB", Policy::Auto);
    request.links = Links::default().with_card_name(0, "NVIDIA H100 80GB HBM3").with_card_name(1, "Fake GPU");
    let known = plan(&request).unwrap();
    // The plan is for a context that is full: 1,024 MiB of KV cache.
    assert!((5.0e-3..5.8e-3).contains(&known.seconds_per_token), "{}", known.seconds_per_token);
    assert!(near(known.seconds_per_image, 55.0e-3), "{}", known.seconds_per_image);
    assert_eq!(known.rates, "recorded of an NVIDIA H100 80GB HBM3 (`0`)");
    assert_eq!(request.links.card(1), Links::default().card(1));
    request.links = Links::default();
    let unknown = plan(&request).unwrap();
    assert!(unknown.seconds_per_token > 3.0 * known.seconds_per_token, "a 24 GB card is slower");
    assert_eq!(unknown.rates, "assumed of a 24 GB card on PCIe 4.0 (`0`)");
}

fn on_host(model: &str, host: HostRates, activations: DType) -> Prediction {
    let budgets = cogvlm_plan::parse_max_memory("cpu:60GiB").unwrap();
    let mut request = request_of(model, budgets, Policy::Auto, 0);
    request.activation_dtype = activations;
    plan(&request).unwrap().prediction(&request.spec, &Links::default().with_host(host))
}

/// docs/benchmarks/2026-11-21-16-cores-17b and 2026-11-21-epyc-2-cores.
#[test]
fn hosts_are_predicted() {
    let full = [DType::F32, DType::Bf16].map(|dtype| on_host("cogvlm-chat-17b", CORES_16, dtype));
    let two_cores =
        HostRates { read_bytes_per_s: 30.3e9, f32_flops_per_s: 202e9, bf16_flops_per_s: 365e9, disk_bytes_per_s: None };
    let small = [DType::F32, DType::Bf16].map(|dtype| on_host("small", two_cores, dtype));
    let times = [
        ("17b f32, decode with an image", full[0].decode_step_s(1, 1280.0), 0.147),
        ("17b f32, decode of text", full[0].decode_step_s(1, 60.0), 0.127),
        ("17b bf16, decode with an image", full[1].decode_step_s(1, 1280.0), 0.134),
        ("17b bf16, decode of text", full[1].decode_step_s(1, 60.0), 0.121),
        ("17b f32, prefill", full[0].prefill_s(true, 33), 22.3),
        ("small f32, prefill", small[0].prefill_s(true, 33), 0.429),
        ("small bf16, prefill", small[1].prefill_s(true, 33), 0.288),
    ];
    let (off, what) = worst(&times);
    assert!(off <= WITHIN, "{what} is off by {off}: {times:?}");
    let slow = HostRates { read_bytes_per_s: 0.75 * CORES_16.read_bytes_per_s, ..CORES_16 };
    let decode = on_host("cogvlm-chat-17b", slow, DType::Bf16).decode_step_s(1, 60.0);
    assert!(!near(decode, 0.121), "a host that reads a quarter less is not told apart");
}

/// Virtual ranks are the host, whatever their numbers; where things go does not change.
#[test]
fn virtual_ranks_take_the_time_of_the_host() {
    let mut cards = request("0:20GiB,1:20GiB,cpu:16GiB", Policy::Balanced);
    cards.links = Links::default().with_host(CORES_16);
    let mut ranks = cards.clone();
    ranks.links = ranks.links.with_virtual_ranks();
    let (cards, ranks) = (plan(&cards).unwrap(), plan(&ranks).unwrap());
    assert_eq!((&cards.placements, &cards.stages), (&ranks.placements, &ranks.stages));
    let alone = on_host("cogvlm-chat-17b", CORES_16, DType::Bf16);
    assert!(
        (ranks.seconds_per_token / alone.decode_step_s(1, 2048.0) - 1.0).abs() < 0.01,
        "{}",
        ranks.seconds_per_token
    );
    assert_eq!(ranks.rates, "measured on this machine (`0`, `1`)");
    assert!(cards.seconds_per_token < 0.5 * ranks.seconds_per_token);
}

/// A request for one card of `gib` with a link of so many bytes per second.
fn streaming(gib: u64, link: f64) -> PlanRequest {
    let mut request = request(&format!("0:{gib}GiB,cpu:40GiB"), Policy::Auto);
    request.links = Links::default().with_card(0, "H100", CardRates { from_host_bytes_per_s: link, ..H100 });
    request
}

fn bytes_per_image(plan: &Plan) -> f64 {
    plan.links.iter().find(|link| link.from == Device::Cpu).unwrap().bytes_per_image as f64
}

/// Streamed weights: the longer of copying and computing, and what the first copies take before anything computes.
#[test]
fn copies_hide_behind_computing_or_the_other_way_round() {
    let all_resident = on_h100(H100).prefill_s(true, 33);
    // A link that is bound to be the longer part.
    let slow = plan(&streaming(20, 20e9)).unwrap();
    let copying = bytes_per_image(&slow) / 20e9;
    assert!(copying > 10.0 * all_resident);
    assert!((copying..copying + all_resident).contains(&slow.seconds_per_image), "{}", slow.seconds_per_image);
    // A link that is as good as none: computing remains.
    let fast = plan(&streaming(20, 1e15)).unwrap();
    assert!((fast.seconds_per_image / all_resident - 1.0).abs() < 0.01, "{}", fast.seconds_per_image);
    // In between neither hides all of the other.
    let even = plan(&streaming(20, 300e9)).unwrap();
    let copying = bytes_per_image(&even) / 300e9;
    let longer = copying.max(all_resident);
    assert!(
        (longer..copying + all_resident).contains(&even.seconds_per_image),
        "{} of {copying} and {all_resident}",
        even.seconds_per_image
    );
    assert!(
        (slow.seconds_per_token / on_h100(H100).decode_step_s(1, 2048.0) - 1.0).abs() < 0.01,
        "decoding streams rows"
    );
}

fn two_cards(hop_s: f64) -> Links {
    let pair = PeerRates { peer_access: true, bytes_per_s: 375e9, hop_s };
    let links = Links::default().with_card(0, "one", H100).with_card(1, "other", H100);
    links.with_pair(0, 1, pair).with_pair(1, 0, pair)
}

/// A hop costs what was measured between its two cards.
#[test]
fn hops_are_charged_by_pair() {
    let mut request = request("0:20GiB,1:20GiB,cpu:16GiB", Policy::Throughput);
    request.links = two_cards(10e-6);
    let near = plan(&request).unwrap();
    request.links = two_cards(1010e-6);
    let far = plan(&request).unwrap();
    assert_eq!(near.stages, far.stages);
    assert!((far.seconds_per_token - near.seconds_per_token - 1e-3).abs() < 1e-9, "one hop per token");
    let hops = (far.stages.len() - 1) as f64;
    assert!((far.seconds_per_image - near.seconds_per_image - hops * 1e-3).abs() < 1e-9, "{hops} hops per image");
}

/// Two stages, so many sequences in two groups: each card reads its weights once for each group.
#[test]
fn throughput_is_that_of_groups_that_take_turns() {
    let mut request = request("0:20GiB,1:20GiB,cpu:16GiB", Policy::Auto);
    request.limits = StepLimits::new(1024, 8);
    request.links = two_cards(10e-6);
    let plan = plan(&request).unwrap();
    assert_eq!(plan.policy, Policy::Throughput);
    let prediction = plan.prediction(&request.spec, &request.links);
    assert_eq!(prediction.text_ranks(), [Device::Gpu(0), Device::Gpu(1)]);
    assert_eq!(plan.tokens_per_second, prediction.tokens_per_s(8, 1024.0));
    // Stages of 16 layers, the head with the second: half of a step of four sequences, and a bit, twice.
    let of_four = prediction.decode_step_s(4, 1024.0);
    let round = 8.0 / plan.tokens_per_second;
    assert!((of_four..1.1 * of_four).contains(&round), "{round} s for a round, {of_four} s for a step of four");
    // A relay of all eight through both stages reads the caches of all twice as long.
    assert!(prediction.decode_step_s(8, 1024.0) > round);
    // One sequence cannot take turns with itself.
    assert!((prediction.tokens_per_s(1, 1024.0) * prediction.decode_step_s(1, 1024.0) - 1.0).abs() < 1e-12);
}

/// The promises of the policies: decoding without a hop, or stages of equal time.
#[test]
fn policies_are_choices() {
    let place = |policy, links: &Links| {
        let mut request = request("0:24GiB,1:24GiB,cpu:16GiB", policy);
        request.links = links.clone();
        request.limits = StepLimits::new(1024, 8);
        (plan(&request).unwrap(), request)
    };
    let text_units = |plan: &Plan, card| {
        let stages = plan.stages.iter().filter(|stage| stage.device == Device::Gpu(card));
        stages.flat_map(|stage| &stage.units).filter(|unit| !unit.is_vision()).count()
    };
    let links = two_cards(10e-6);
    let (latency, request) = place(Policy::Latency, &links);
    assert_eq!(latency.prediction(&request.spec, &links).text_ranks(), [Device::Gpu(0)]);
    assert!(latency.links.iter().all(|link| link.bytes_per_token == 0), "{:?}", latency.links);
    let (throughput, _) = place(Policy::Throughput, &links);
    assert!(all_at_home(&throughput));
    assert_eq!([0, 1].map(|card| text_units(&throughput, card)), [17, 17], "a table or a head, and 16 layers each");
    assert!(throughput.tokens_per_second > latency.tokens_per_second);
    assert!(throughput.seconds_per_token > latency.seconds_per_token);
    // A card of half the speed decodes half as many layers.
    let slow = CardRates { copy_bytes_per_s: H100.copy_bytes_per_s / 2.0, ..H100 };
    let (uneven, _) = place(Policy::Throughput, &links.with_card(1, "slow", slow));
    let [fast, slow] = [0, 1].map(|card| text_units(&uneven, card));
    assert!((21..=23).contains(&fast) && fast + slow == 34, "{fast} and {slow}");
}

#[test]
fn rates_survive_json() {
    let on = MeasuredOn { machine: "box".to_owned(), driver: Some("580".to_owned()), cuda: None };
    let pair = PeerRates { peer_access: false, bytes_per_s: 37e9, hop_s: 2e-5 };
    let links = Links::measured(on, CORES_16).with_card(0, "a", H100).with_card(3, "b", H100).with_pair(0, 3, pair);
    assert_eq!(Links::from_json(&links.to_json().to_string()).as_ref(), Ok(&links));
    let inside = serde_json::json!({"schema": "doctor", "links": links.to_json()}).to_string();
    assert_eq!(Links::from_json(&inside), Ok(links.clone()));
    // The other way of a pair counts where there is none of its own.
    assert_eq!(links.pair(3, 0), &pair);
    assert_eq!(links.pair(0, 1), Links::default().pair(0, 1));
    // What a plan's devices lack is said.
    let mut request = request("0:20GiB,1:20GiB", Policy::Throughput);
    request.links = links;
    let plan = plan(&request).unwrap();
    assert_eq!(plan.rates, "measured on box (`0`); assumed of a 24 GB card on PCIe 4.0 (`1`)");
    assert_eq!(
        plan.notices,
        [
            "there are no measured rates of `1`: those of a 24 GB card are assumed",
            "there are no measured rates between `0` and `1`: 20 GB/s through the host are assumed"
        ]
    );
    assert!(plan.report(Some(&request)).contains("`--links FILE`"));
}

#[test]
fn devices_of_other_processes_have_rates_too() {
    let [zero, one] = ["0", "1/0"].map(|name| Device::parse(name).unwrap());
    let Device::Gpu(other) = one else { panic!("{one:?}") };
    let network = PeerRates { peer_access: false, bytes_per_s: 9e9, hop_s: 3e-4 };
    let links = Links::measured(MeasuredOn::default(), CORES_16).with_card(0, "a", H100).with_card(other, "b", H100);
    let links = links.with_pair(0, other, network);
    let json = links.to_json();
    assert!(json["devices"]["1/0"].is_object() && json["pairs"][0]["to"] == "1/0", "{json}");
    assert_eq!(Links::from_json(&json.to_string()), Ok(links.clone()));
    // A slow way between the two makes a token take longer.
    let seconds = |hop_s: f64| {
        let mut request = request("0/0:20GiB,1/0:20GiB", Policy::Balanced);
        request.links = links.clone().with_pair(0, other, PeerRates { hop_s, ..network });
        let plan = plan(&request).unwrap();
        assert!([zero, one].iter().all(|device| plan.uses(*device)) && plan.notices.is_empty(), "{:?}", plan.notices);
        plan.seconds_per_token
    };
    let slower = seconds(3e-4) - seconds(1e-4);
    assert!(slower > 1.9e-4, "{slower}");
}

#[test]
fn files_that_do_not_hold_are_refused_by_field() {
    use serde_json::{Value, json};
    let pair = PeerRates { peer_access: true, bytes_per_s: 37e9, hop_s: 2e-5 };
    let links = Links::measured(MeasuredOn::default(), CORES_16).with_card(0, "a", H100).with_card(1, "b", H100);
    let whole = links.with_pair(0, 1, pair).with_pair(1, 0, pair).to_json();
    let refused = |place: &str, value: Option<Value>| {
        let mut changed = whole.clone();
        let (parent, key) = place.rsplit_once('/').unwrap();
        let parent = changed.pointer_mut(parent).unwrap();
        match (parent, value) {
            (Value::Array(list), Some(value)) => list[key.parse::<usize>().unwrap()] = value,
            (Value::Object(object), Some(value)) => drop(object.insert(key.to_owned(), value)),
            (Value::Object(object), None) => drop(object.shift_remove(key)),
            _ => panic!("{place}"),
        }
        Links::from_json(&changed.to_string()).unwrap_err().to_string()
    };
    for (place, value, expected) in [
        ("/schema", Some(json!("cogvlm-shard.links/2")), "`schema` is \"cogvlm-shard.links/2\"; this program reads"),
        ("/schema", None, "`schema` is missing"),
        ("/measured_on/machine", None, "`measured_on.machine` is missing"),
        ("/measured_on/driver", Some(json!(580)), "`measured_on.driver` is 580, which is no text"),
        ("/host/read_bytes_per_s", Some(json!(0)), "`host.read_bytes_per_s` is 0; it lies between 1 and"),
        ("/host/f32_flops_per_s", Some(json!(null)), "`host.f32_flops_per_s` is null, which is no number"),
        ("/host/disk_bytes_per_s", Some(json!(-1.0)), "`host.disk_bytes_per_s` is -1; it lies between 1 and"),
        ("/host/cores", Some(json!(1)), "`host.cores` is no field of this file"),
        ("/devices/0/copy_bytes_per_s", Some(json!(-5)), "`devices.0.copy_bytes_per_s` is -5; it lies between 1 and"),
        (
            "/devices/1/product_flops_per_s",
            Some(json!("NaN")),
            "`devices.1.product_flops_per_s` is \"NaN\", which is no number",
        ),
        ("/devices/1/to_host_bytes_per_s", Some(json!(1e300)), "`devices.1.to_host_bytes_per_s` is 1"),
        ("/devices/1/host_hop_s", Some(json!(60)), "`devices.1.host_hop_s` is 60; it lies between 0 and 60"),
        ("/devices/1/from_host_bytes_per_s", None, "`devices.1.from_host_bytes_per_s` is missing"),
        ("/devices/1/speed", Some(json!(1)), "`devices.1.speed` is no field of this file"),
        ("/devices/cpu", Some(json!({})), "`devices.cpu` is no GPU's number"),
        ("/devices/01", Some(json!({})), "`devices.01` is no GPU's number"),
        ("/devices/1024", Some(json!({})), "`devices.1024` is no GPU's number, such as 0, or \"1/0\" for GPU 0 of"),
        ("/devices/7", Some(json!(3)), "`devices.7` is no JSON object"),
        ("/devices", Some(json!([])), "`devices` is no JSON object"),
        ("/devices/0", None, "`pairs[0].from` is 0, which `devices` does not list"),
        ("/pairs", Some(json!({})), "`pairs` is no list"),
        ("/pairs/1/to", Some(json!(-1)), "`pairs[1].to` is -1, which is no GPU's number"),
        ("/pairs/1/to", Some(json!(1)), "`pairs[1].to` is 1: the way from 1 is itself"),
        (
            "/pairs/1",
            Some(whole["pairs"][0].clone()),
            "`pairs[1].to` is 1: the way from 0 is itself, or stands here twice",
        ),
        ("/pairs/0/peer_access", Some(json!("yes")), "`pairs[0].peer_access` is neither true nor false"),
        ("/pairs/0/hop_s", Some(json!(-1e-6)), "`pairs[0].hop_s` is -0.000001; it lies between 0 and 60"),
        ("/more", Some(json!(1)), "`more` is no field of this file"),
    ] {
        let message = refused(place, value);
        assert!(message.starts_with(expected), "{message}\nexpected {expected}");
    }
    for (text, expected) in [
        ("", "`links` EOF"),
        ("[]", "`links` is no JSON object"),
        ("{\"links\": 3}", "`links` is no JSON object"),
        ("{\"host\": {}}", "`schema` is missing"),
    ] {
        let message = Links::from_json(text).unwrap_err().to_string();
        assert!(message.starts_with(expected), "{text}: {message}");
    }
    assert!(Links::from_json(&whole.to_string()).is_ok(), "the file itself is whole");
}

/// One of the two H200 of docs/benchmarks/2026-11-22-two-h200.
const H200: CardRates = CardRates {
    copy_bytes_per_s: 4.19e12,
    product_flops_per_s: 806e12,
    from_host_bytes_per_s: 55.3e9,
    to_host_bytes_per_s: 55.2e9,
    host_hop_s: 15e-6,
};

#[test]
fn two_h200_that_compute_together_are_predicted() {
    let peers = PeerRates { peer_access: true, bytes_per_s: 390e9, hop_s: 16e-6 };
    let request = request("0:135GiB,1:135GiB", Policy::Auto);
    let plan = plan_tensor_parallel(&request, 2).unwrap();
    let predicted = |rates: CardRates| {
        let links = Links::default().with_card(0, "H200", rates).with_card(1, "H200", rates);
        let predicted = plan.prediction(&request.spec, &links.with_pair(0, 1, peers).with_pair(1, 0, peers));
        let step = |sequences| predicted.decode_step_s(sequences, 1300.0);
        [
            ("decode 1", step(1), 2.17e-3),
            ("decode 8", step(8), 2.77e-3),
            ("decode 16", step(16), 3.52e-3),
            ("prefill with an image", predicted.prefill_s(true, 33), 47.6e-3),
        ]
    };
    let (off, what) = worst(&predicted(H200));
    assert!(off <= WITHIN, "{what} is off by {off}: {:?}", predicted(H200));
    // As one card alone would be predicted, or with cards of half the rate.
    let half = CardRates { copy_bytes_per_s: 2.1e12, product_flops_per_s: 403e12, ..H200 };
    assert!(worst(&predicted(half)).0 > WITHIN);
}
