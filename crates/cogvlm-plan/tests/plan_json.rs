//! Plans as JSON: the documented shape, and everything that reading refuses.

mod common;

use cogvlm_core::memory::GIB;
use cogvlm_plan::plan::{Plan, Policy};
use cogvlm_plan::{PLAN_SCHEMA, plan};
use common::{request, spec};
use serde_json::{Value, json};

fn written(max_memory: &str, policy: Policy) -> Value {
    serde_json::from_str(&plan(&request(max_memory, policy)).unwrap().to_json()).unwrap()
}

#[test]
fn the_headline_has_the_documented_shape() {
    let value = written("0:20GiB,1:20GiB,cpu:16GiB", Policy::Balanced);
    assert_eq!(value["schema"], PLAN_SCHEMA);
    assert_eq!(value["policy"], "balanced");
    assert_eq!(value["model"], "cogvlm-chat-17b");
    let map = value["device_map"].as_object().unwrap();
    // The tower is cut: its own tensors and every layer have a key, as have all decoder layers.
    assert_eq!(map["model.layers.15"], 0);
    assert_eq!(map["model.layers.16"], 1);
    assert_eq!(map["model.vision.boi"], 1);
    assert_eq!(map["model.vision.patch_embedding"], 0);
    assert_eq!(map["lm_head"], 1);
    assert_eq!(
        map.len(),
        32 + 63 + ["embed_tokens", "norm", "boi", "eoi", "patch_embedding", "linear_proj", "lm_head"].len()
    );
    assert_eq!(value["placed"][0], json!(["model.embed_tokens", 0]));
    let card = &value["devices"]["0"];
    assert_eq!(card["budget_bytes"], 20 * GIB);
    let parts = ["weight_bytes", "kv_bytes", "workspace_bytes", "staging_bytes", "reserved_bytes", "free_bytes"];
    assert_eq!(parts.iter().map(|part| card[part].as_u64().unwrap()).sum::<u64>(), 20 * GIB);
    assert_eq!(value["tensors_off_device"], json!({}));
    assert_eq!(value["links"][0]["bytes_per_token"], 8192);
}

#[test]
fn maps_are_cleaned_to_the_topmost_module() {
    assert_eq!(written("0:80GiB", Policy::Auto)["device_map"], json!({"": 0}));
    // Everything executes on card 0; the map says where weights rest.
    let map = written("0:20GiB,cpu:30GiB", Policy::Auto)["device_map"].clone();
    assert_eq!(map["model.embed_tokens"], "cpu");
    assert_eq!(map["model.layers.31.mlp.vision_mlp"], "cpu");
    assert_eq!(map["model.layers.31.mlp.language_mlp"], 0);
    assert_eq!(map["model.vision.linear_proj"], 0);
    let text = written("0:20GiB,disk", Policy::Auto);
    assert_eq!(text["devices"]["disk"]["budget_bytes"], Value::Null);
    assert_eq!(text["tensors_off_device"]["model.embed_tokens.weight"], "disk");
}

#[test]
fn cleaning_agrees_with_accelerate() {
    use cogvlm_core::{DType, module_tree::Module};
    use cogvlm_plan::accelerate::{Arguments, ModuleTree, infer, parse_max_memory};
    let tree = ModuleTree::new(&Module::of_model(&spec("cogvlm-chat-17b"), DType::Bf16), &[]).unwrap();
    for max_memory in ["0:20GiB,1:20GiB,cpu:16GiB", "0:16GiB,1:16GiB,cpu:40GiB", "0:9GiB,cpu:40GiB", "0:80GiB"] {
        let no_split = ["CogVLMDecoderLayer", "TransformerLayer"].map(str::to_owned).to_vec();
        let arguments =
            Arguments { max_memory: parse_max_memory(max_memory).unwrap(), no_split, ..Arguments::default() };
        let theirs = infer(&tree, &arguments).unwrap();
        let map: serde_json::Map<String, Value> =
            theirs.device_map.iter().map(|(key, device)| ((*key).to_owned(), json!(device))).collect();
        // A plan that follows their map, in which weights rest where the map says, cleans to the same map.
        let mut follower = request("0:60GiB,1:60GiB,cpu:60GiB,disk", Policy::Auto);
        follower.limits.context_len = 64;
        let plan = Plan::from_hugging_face(&Value::Object(map.clone()).to_string(), &follower).unwrap();
        let ours: serde_json::Map<String, Value> =
            plan.device_map().into_iter().map(|(key, device)| (key, json!(device))).collect();
        if plan.notices.iter().all(|notice| !notice.contains("stay with their units")) {
            assert_eq!(ours, map, "{max_memory}");
        } else {
            assert!(max_memory.contains("cpu:40"), "{max_memory}: {:?}", plan.notices);
        }
    }
}

#[test]
fn who_prefills_for_the_host_survives() {
    let request = request("0:12GiB,cpu:24GiB", Policy::Auto);
    let plan = plan(&request).unwrap();
    let value: Value = serde_json::from_str(&plan.to_json()).unwrap();
    let from_rows = plan.prefill.expect("the host decodes layers").from_rows;
    assert_eq!(value["prefill"], json!({"device": 0, "from_rows": from_rows}));
    assert_eq!(Plan::from_json(&plan.to_json(), &request.spec).unwrap(), plan);
    // Another run of it, and one whose budgets lack the card.
    assert_eq!(plan.for_request(&request).unwrap(), plan);
    let mut without = request.clone();
    without.budgets.remove(0);
    assert!(plan.for_request(&without).unwrap_err().to_string().contains("is on `0`, which has no budget"));
    // Plans that have none say nothing.
    assert!(written("0:80GiB", Policy::Auto).get("prefill").is_none());
}

/// What reading says of the headline plan, or of one that streams, after `change`.
fn refusal(max_memory: &str, change: impl FnOnce(&mut Value)) -> String {
    let mut value = written(max_memory, Policy::Balanced);
    change(&mut value);
    match Plan::from_json(&value.to_string(), &spec("cogvlm-chat-17b")) {
        Ok(_) => panic!("the changed plan was accepted"),
        Err(error) => error.to_string(),
    }
}

type Case = (&'static str, Box<dyn FnOnce(&mut Value)>, &'static str);

#[test]
fn what_does_not_hold_is_named() {
    let headline = "0:20GiB,1:20GiB,cpu:16GiB";
    let cases: Vec<Case> = vec![
        (
            headline,
            Box::new(|plan| plan["schema"] = json!("other/2")),
            "`schema`: is `other/2`; this program reads `cogvlm-shard.plan/1`",
        ),
        (
            headline,
            Box::new(|plan| plan["schema"] = json!(1)),
            "`schema`: is missing; a plan says `cogvlm-shard.plan/1`",
        ),
        (headline, Box::new(|plan| plan["extra"] = json!(1)), "`plan`: unknown field `extra`"),
        (
            headline,
            Box::new(|plan| drop(plan.as_object_mut().unwrap().remove("stages"))),
            "`plan`: missing field `stages`",
        ),
        (
            headline,
            Box::new(|plan| plan["policy"] = json!("auto")),
            "`policy`: is `auto`; a plan names the policy that made it",
        ),
        (headline, Box::new(|plan| plan["policy"] = json!("best")), "`plan`: unknown variant `best`"),
        (
            headline,
            Box::new(|plan| plan["limits"]["batch"] = json!(0)),
            "`--batch` is 0; it must lie between 1 and 4096",
        ),
        (headline, Box::new(|plan| plan["limits"]["context"] = json!(-1)), "`plan`: invalid value: integer `-1`"),
        (
            headline,
            Box::new(|plan| plan["limits"]["context"] = json!(4096)),
            "`devices.0.kv_bytes`: is 536870912, but the rest of the plan implies 1073741824",
        ),
        (
            headline,
            Box::new(|plan| plan["predicted_seconds_per_token"] = json!(-1.0)),
            "`predicted_seconds_per_token`: is -1; a time is not negative",
        ),
        (
            headline,
            Box::new(|plan| plan["stages"][0]["device"] = json!(7)),
            "`stages[0].device`: is `7`, which `devices` does not list as one that executes",
        ),
        (
            headline,
            Box::new(|plan| plan["stages"][0]["device"] = json!("disk")),
            "`stages[0].device`: is `disk`, which `devices` does not list as one that executes",
        ),
        (headline, Box::new(|plan| plan["stages"][3]["units"] = json!([])), "`stages[3].units`: is empty"),
        (
            headline,
            Box::new(|plan| drop(plan["stages"][3]["units"].as_array_mut().unwrap().pop())),
            "`stages`: end before `lm_head`",
        ),
        (
            headline,
            Box::new(|plan| plan["stages"][2]["units"][1] = json!("model.embed_tokens")),
            "`stages[2].units`: names `model.embed_tokens` a second time",
        ),
        (
            headline,
            Box::new(|plan| plan["stages"][2]["units"][1] = json!("model.layers.32")),
            "`stages[2].units`: names `model.layers.32`, which is no unit of this model",
        ),
        (
            headline,
            Box::new(|plan| plan["stages"].as_array_mut().unwrap().swap(1, 2)),
            "`stages[1].units`: names `model.embed_tokens` where `model.vision.transformer.layers.33` is next to be executed",
        ),
        (
            headline,
            Box::new(|plan| plan["stages"][1]["device"] = json!(0)),
            "`stages`: follow one another on one device; join them",
        ),
        (headline, Box::new(|plan| plan["devices"]["gpu"] = json!({})), "`devices.gpu`: is no device"),
        (headline, Box::new(|plan| plan["devices"]["01"] = json!({})), "`devices.01`: is no device"),
        (
            headline,
            Box::new(|plan| plan["devices"]["1"]["budget_bytes"] = json!(null)),
            "`devices.1.budget_bytes`: is a number for every device but `disk`",
        ),
        (
            headline,
            Box::new(|plan| plan["devices"]["1"]["kv_bytes"] = json!(-5)),
            "`devices.1`: invalid value: integer `-5`",
        ),
        (
            headline,
            Box::new(|plan| plan["devices"]["1"]["weight_bytes"] = json!(5)),
            "`devices.1.weight_bytes`: is 5, but the rest of the plan implies",
        ),
        (
            headline,
            Box::new(|plan| plan["devices"]["0"]["reserved_bytes"] = json!(5)),
            "`devices.0.reserved_bytes`: is 5, but the rest of the plan implies 674234368",
        ),
        (
            headline,
            Box::new(|plan| {
                plan["devices"]["1"]["budget_bytes"] = json!(10 * GIB);
                plan["devices"]["1"]["free_bytes"] = json!(0);
            }),
            "`1` would hold 17.72 GiB, its budget is 10.00 GiB",
        ),
        (
            headline,
            Box::new(|plan| plan["tensors_off_device"] = json!({"model.layers.5.mlp.gate.weight": "cpu"})),
            "`tensors_off_device.model.layers.5.mlp.gate.weight`: is no tensor of this model",
        ),
        (
            headline,
            Box::new(|plan| plan["tensors_off_device"] = json!({"model.norm.weight": "cpu"})),
            "`tensors_off_device.model.norm.weight`: is elsewhere, but norms rest with their unit",
        ),
        (
            headline,
            Box::new(|plan| plan["tensors_off_device"] = json!({"lm_head.weight": 1})),
            "`tensors_off_device.lm_head.weight`: is the device that executes its unit; leave it out",
        ),
        (
            headline,
            Box::new(|plan| plan["tensors_off_device"] = json!({"lm_head.weight": "disk"})),
            "`tensors_off_device.lm_head.weight`: is a device that `devices` does not list",
        ),
        (
            headline,
            Box::new(|plan| plan["tensors_off_device"] = json!({"lm_head.weight": true})),
            "`tensors_off_device.lm_head.weight`: invalid type: boolean `true`",
        ),
        (
            headline,
            Box::new(|plan| plan["tensors_off_device"] = json!({"model.embed_tokens.weight": 1})),
            "`tensors_off_device.model.embed_tokens.weight`: is another card, but rows are looked up",
        ),
        (
            headline,
            Box::new(|plan| plan["links"] = json!([])),
            "`links`: does not follow from `stages` and `tensors_off_device`",
        ),
        (headline, Box::new(|plan| plan["device_map"][""] = json!(0)), "`device_map`: does not follow"),
        (headline, Box::new(|plan| plan["placed"] = json!([])), "`placed`: does not follow"),
        (
            "0:12GiB,cpu:24GiB",
            Box::new(|plan| plan["tensors_off_device"]["model.layers.0.mlp.language_mlp.up_proj.weight"] = json!(0)),
            "`tensors_off_device.model.layers.0.mlp.language_mlp.up_proj.weight`: is a card, but units of the host",
        ),
        (
            "0:12GiB,cpu:24GiB",
            Box::new(|plan| plan["prefill"]["device"] = json!("cpu")),
            "`prefill.device`: is `cpu`, which is no card that `devices` lists",
        ),
        (
            "0:12GiB,cpu:24GiB",
            Box::new(|plan| plan["prefill"]["device"] = json!(1)),
            "`prefill.device`: is `1`, which is no card that `devices` lists",
        ),
        (
            "0:12GiB,cpu:24GiB",
            Box::new(|plan| plan["prefill"]["from_rows"] = json!(0)),
            "`prefill.from_rows`: is 0; a step has at least one row",
        ),
        ("0:12GiB,cpu:24GiB", Box::new(|plan| plan["prefill"]["to"] = json!(0)), "`plan`: unknown field `to`"),
        (
            "0:12GiB,cpu:24GiB",
            Box::new(|plan| drop(plan.as_object_mut().unwrap().remove("prefill"))),
            "`devices.0.staging_bytes`: is ",
        ),
        (
            headline,
            Box::new(|plan| plan["prefill"] = json!({"device": 0, "from_rows": 1})),
            "`prefill`: is there, but the host executes no decoder layer",
        ),
    ];
    for (max_memory, change, expected) in cases {
        let message = refusal(max_memory, change);
        assert!(message.starts_with(expected), "{message}\nexpected {expected}");
    }
    let other = written(headline, Policy::Balanced).to_string();
    assert_eq!(
        Plan::from_json(&other, &spec("small")).unwrap_err().to_string(),
        "`stages[0].units`: names `model.vision.transformer.layers.3`, which is no unit of this model"
    );
    assert!(Plan::from_json("{", &spec("small")).unwrap_err().to_string().starts_with("`plan`: EOF"));
}
