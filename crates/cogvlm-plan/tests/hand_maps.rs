//! Device maps that people bring: followed to the letter where that is possible, refused by key where it is not.

mod common;

use cogvlm_core::{Device, Phase, Unit};
use cogvlm_plan::PlanError;
use cogvlm_plan::plan::{Plan, Policy, Residency};
use common::{all_at_home, request, weights_on};
use serde_json::{Map, Value, json};

/// The map that accelerate makes for 2 x 20 GiB.
fn headline_map() -> Map<String, Value> {
    let layers = (0..32).map(|layer| (format!("model.layers.{layer}"), json!(i32::from(layer >= 25))));
    let rest = [("model.embed_tokens", 0), ("model.norm", 1), ("model.vision", 1), ("lm_head", 1)];
    layers.chain(rest.map(|(key, device)| (key.to_owned(), json!(device)))).collect()
}

fn follow(map: &Value, max_memory: &str) -> Result<Plan, PlanError> {
    Plan::from_hugging_face(&map.to_string(), &request(max_memory, Policy::Auto))
}

fn residency(plan: &Plan, tensor: &str) -> (Device, Residency) {
    let placement = plan.placement(tensor).unwrap();
    (placement.executes_on, placement.residency)
}

const GPU0: Device = Device::Gpu(0);
const GPU1: Device = Device::Gpu(1);

#[test]
fn the_published_map_is_followed() {
    let plan = follow(&Value::Object(headline_map()), "0:24GiB,1:24GiB").unwrap();
    assert!(all_at_home(&plan));
    assert_eq!((weights_on(&plan, GPU0), weights_on(&plan, GPU1)), (20_500_073_600, 14_779_301_248));
    let stages: Vec<_> = plan.stages.iter().map(|stage| (stage.device, stage.units.len())).collect();
    assert_eq!(stages, [(GPU1, 65), (GPU0, 26), (GPU1, 8)]);
    assert_eq!(
        plan.device_map().into_iter().map(|(key, device)| (key, json!(device))).collect::<Map<_, _>>(),
        headline_map()
    );
    // What its own budgets do not hold: weights alone fit 20 GiB, KV, workspace and context do not.
    let error = follow(&Value::Object(headline_map()), "0:20GiB,1:20GiB").unwrap_err();
    assert_eq!(error.to_string(), "`0` would hold 20.59 GiB, its budget is 20.00 GiB");
}

#[test]
fn host_and_disk_entries_are_streamed_to_the_first_card() {
    let mut map = headline_map();
    for layer in 20..25 {
        map[&format!("model.layers.{layer}")] = json!("cpu");
    }
    map["model.embed_tokens"] = json!("cpu");
    map["model.vision"] = json!("disk");
    let plan = follow(&Value::Object(map), "0:24GiB,1:24GiB,cpu:16GiB").unwrap();
    let mlp = "model.layers.22.mlp.language_mlp.up_proj.weight";
    assert_eq!(residency(&plan, mlp), (GPU0, Residency::Host));
    assert_eq!(residency(&plan, "model.layers.22.input_layernorm.weight"), (GPU0, Residency::Device));
    assert_eq!(residency(&plan, "model.vision.boi"), (GPU0, Residency::File));
    assert_eq!(residency(&plan, "model.embed_tokens.weight"), (GPU0, Residency::Host));
    let from_host = plan.links.iter().find(|link| (link.from, link.to) == (Device::Cpu, GPU0)).unwrap();
    assert_eq!(from_host.bytes_per_token, 5 * (404_766_720 - 2 * 8192) + 8192);
    assert!(plan.notices.iter().any(|notice| notice.contains("stay with their units")), "{:?}", plan.notices);
    let read_back = Plan::from_json(&plan.to_json(), &request("0:1", Policy::Auto).spec).unwrap();
    assert_eq!(read_back, plan);
}

#[test]
fn without_a_card_the_host_executes() {
    let plan = follow(&json!({"": "cpu"}), "cpu:40GiB").unwrap();
    assert_eq!(plan.stages.len(), 1);
    assert!(
        plan.placements
            .iter()
            .all(|placement| (placement.executes_on, placement.residency) == (Device::Cpu, Residency::Host))
    );
}

#[test]
fn a_unit_spread_over_cards_executes_where_most_of_it_is() {
    let mut map = headline_map();
    map.remove("model.layers.10");
    map.insert("model.layers.10".to_owned(), json!(0));
    map.insert("model.layers.10.mlp".to_owned(), json!(1));
    map.insert("model.layers.10.mlp.language_mlp.down_proj".to_owned(), json!("cpu"));
    let plan = follow(&Value::Object(map), "0:24GiB,1:24GiB,cpu:1GiB").unwrap();
    assert_eq!(residency(&plan, "model.layers.10.mlp.vision_mlp.up_proj.weight"), (GPU1, Residency::Device));
    assert_eq!(residency(&plan, "model.layers.10.self_attn.vision_expert_dense.weight"), (GPU1, Residency::Peer(GPU0)));
    assert_eq!(residency(&plan, "model.layers.10.mlp.language_mlp.down_proj.weight"), (GPU1, Residency::Host));
    assert_eq!(residency(&plan, "model.layers.10.input_layernorm.weight"), (GPU1, Residency::Device));
    assert!(
        plan.notices
            .contains(&"the map spreads decoder layer 10: `1` executes it and streams the rest from `0`".to_owned()),
        "{:?}",
        plan.notices
    );
    // Stages alternate: 0, then layer 10 on 1, then 0 again.
    assert!(plan.stages.iter().any(|stage| stage.units == [Unit::DecoderLayer(10)]));
    let hot: u64 = plan
        .placements
        .iter()
        .filter(|placement| placement.tensor.phase == Phase::EveryToken && placement.residency != Residency::Device)
        .map(|placement| placement.bytes)
        .sum();
    assert_eq!(hot, 100_663_296 + 33_554_432 + 90_177_536);
}

#[test]
fn boi_and_eoi_of_a_cut_tower_stay_with_the_adapter() {
    let mut map = headline_map();
    map.remove("model.vision");
    for (key, device) in [("boi", 0), ("eoi", 0), ("patch_embedding", 0), ("transformer", 0), ("linear_proj", 1)] {
        map.insert(format!("model.vision.{key}"), json!(device));
    }
    let plan = follow(&Value::Object(map), "0:32GiB,1:24GiB").unwrap();
    assert!(all_at_home(&plan));
    assert_eq!(residency(&plan, "model.vision.boi"), (GPU1, Residency::Device));
    assert_eq!(plan.notices, ["16384 B of norms and other vectors stay with their units, whatever the map says"]);
}

#[test]
fn what_cannot_be_followed_is_named() {
    let refused = |change: &dyn Fn(&mut Map<String, Value>)| {
        let mut map = headline_map();
        change(&mut map);
        follow(&Value::Object(map), "0:24GiB,1:24GiB").unwrap_err().to_string()
    };
    let set = |key: &'static str, value: Value| {
        move |map: &mut Map<String, Value>| drop(map.insert(key.to_owned(), value.clone()))
    };
    assert_eq!(refused(&set("model.layers.32", json!(0))), "`model.layers.32`: is no module of this model");
    assert_eq!(refused(&set("model.layer", json!(0))), "`model.layer`: is no module of this model");
    assert_eq!(refused(&set("lm_head", json!(4))), "`lm_head`: is on `4`, which has no budget in `--max-memory`");
    assert_eq!(refused(&set("lm_head", json!("cpu"))), "`lm_head`: is on `cpu`, which has no budget in `--max-memory`");
    assert!(refused(&set("lm_head", json!("mps"))).starts_with("device map: `lm_head`: invalid value: string \"mps\""));
    assert!(refused(&set("lm_head", json!(-1))).starts_with("device map: `lm_head`: invalid value: integer `-1`"));
    assert_eq!(
        refused(&|map| drop(map.remove("model.layers.7"))),
        "`model.layers.7.self_attn.vision_expert_query_key_value.weight`: no key of the device map covers it"
    );
    // `model.layers.1` must not cover layers 10 to 19.
    assert!(refused(&|map| drop(map.remove("model.layers.12"))).starts_with("`model.layers.12.self_attn"));
    let raw = |text: &str| {
        Plan::from_hugging_face(text, &request("0:40GiB", Policy::Auto)).map(|_| ()).unwrap_err().to_string()
    };
    assert_eq!(raw(r#"{"": 0, "lm_head": 0, "lm_head": 0}"#), "`lm_head`: stands twice in the device map");
    assert!(raw("[]").starts_with("device map: invalid type: sequence"));
    assert!(raw("{}").ends_with("no key of the device map covers it"));
}
