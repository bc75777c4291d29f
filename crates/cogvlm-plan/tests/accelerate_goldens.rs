//! Every recorded answer of accelerate 0.24.1 and 1.15.0, computed anew from the module trees.

use std::collections::BTreeSet;
use std::time::Instant;

use cogvlm_core::module_tree::Module;
use cogvlm_core::{DType, ModelConfig};
use cogvlm_plan::accelerate::{Amount, Arguments, DeviceKey, ModuleTree, Size, TreeFile, Version, infer};
use cogvlm_plan::requests::{TreeCache, answer_line};
use serde_json::{Map, Value, json};

const GOLDENS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens");

fn golden(file: &str) -> String {
    std::fs::read_to_string(format!("{GOLDENS}/{file}")).unwrap()
}

/// A line of `plan --requests` for a recorded case over the trees of a file.
fn request(case: &Value, trees: &str, version: &str) -> String {
    let mut fields = case.as_object().unwrap().clone();
    let reference = format!("{trees}:{}", fields["tree"].as_str().unwrap());
    fields.insert("module_tree".into(), reference.into());
    fields.insert("accelerate_version".into(), version.into());
    fields.remove("expect");
    Value::Object(fields).to_string()
}

fn answer(line: &str, trees: &mut TreeCache) -> Value {
    serde_json::from_str(&answer_line(line, trees, &mut |policy, _| panic!("{policy:?} was asked for"))).unwrap()
}

/// What a case says about a version, with the fields that it takes over from the other one.
fn expected(case: &Value, version: &str) -> Map<String, Value> {
    let own = case["expect"][version].as_object().unwrap().clone();
    let mut fields = match own.get("same_as") {
        Some(other) => case["expect"][other.as_str().unwrap()].as_object().unwrap().clone(),
        None => Map::new(),
    };
    fields.extend(own);
    fields.remove("same_as");
    fields
}

/// Every field in which an answer differs from what was recorded. A field that is not recorded has to be absent, but
/// for `placed`, which only some cases carry.
fn differences(expected: &Map<String, Value>, answer: &Value) -> Vec<String> {
    let answer = answer.as_object().unwrap();
    let fields: BTreeSet<&String> = expected.keys().chain(answer.keys()).collect();
    let differs = |field: &&String| {
        let (expected, found) = (expected.get(*field), answer.get(*field));
        match (field.as_str(), expected, found) {
            ("placed", None, Some(_)) => false,
            ("error", Some(expected), Some(found)) => expected["type"] != found["type"] || found["message"] == "",
            ("unsupported", Some(argument), Some(_)) => answer.get("argument") != Some(argument),
            ("argument", None, Some(_)) => false,
            // Objects compare without regard to the order of keys, and 1 is not 1.0, as upstream prints sizes.
            (_, Some(expected), Some(found)) => expected != found,
            _ => true,
        }
    };
    let describe = |field: &String| format!("{field}: {:?} instead of {:?}", answer.get(field), expected.get(field));
    fields.into_iter().filter(differs).map(describe).collect()
}

/// Answers every case for both versions, and lists all differences. Fields named in `unrecorded` are not compared.
fn assert_all_agree(cases: &[Value], trees_file: &str, unrecorded: &[&str]) {
    let mut trees = TreeCache::default();
    let mut wrong = Vec::new();
    for case in cases {
        for version in Version::ALL {
            let mut answer = answer(&request(case, trees_file, version.as_str()), &mut trees);
            unrecorded.iter().for_each(|field| drop(answer.as_object_mut().unwrap().remove(*field)));
            for difference in differences(&expected(case, version.as_str()), &answer) {
                wrong.push(format!("{} {version} {difference}", case["id"]));
            }
        }
    }
    assert!(wrong.is_empty(), "{} differences\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn all_cases_of_both_versions() {
    let cases: Value = serde_json::from_str(&golden("device_maps.json")).unwrap();
    let cases = cases["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 152);
    assert_all_agree(cases, &format!("{GOLDENS}/module_trees.json"), &[]);
}

/// Small random trees and hand-made corners, with what both releases (under torch 2.1.2, on the meta device) said to
/// them: ties within one module, ties of the root, fallback, fractions of bytes, exceptions of every kind.
#[test]
fn random_trees_of_both_versions() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/accelerate_recorded.json");
    let cases: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let cases = cases["cases"].as_array().unwrap();
    assert!(cases.len() > 100);
    assert_all_agree(cases, file, &["uncovered", "upstream_hazards"]);
}

#[test]
fn the_comparison_can_fail() {
    let cases: Value = serde_json::from_str(&golden("device_maps.json")).unwrap();
    let case = &cases["cases"][0];
    let request = request(case, &format!("{GOLDENS}/module_trees.json"), "1.15.0");
    let (expected, found) = (expected(case, "1.15.0"), answer(&request, &mut TreeCache::default()));
    assert_eq!(differences(&expected, &found), [""; 0]);
    for (field, value) in [
        ("/device_map/model.norm", json!(0)),
        ("/device_bytes/0", json!(20_500_073_601_u64)),
        ("/warnings", json!(["one"])),
        ("/device_map", json!({"": 0})),
    ] {
        let mut changed = found.clone();
        let name = field.split('/').nth(1).unwrap();
        match changed.pointer_mut(field) {
            Some(place) => *place = value,
            None => changed[name] = value,
        }
        let wrong = differences(&expected, &changed);
        assert!(wrong.len() == 1 && wrong[0].starts_with(name), "{field}: {wrong:?}");
    }
}

#[test]
fn memory_strings() {
    let goldens: Value = serde_json::from_str(&golden("device_maps.json")).unwrap();
    let strings = goldens["memory_strings"].as_array().unwrap();
    assert_eq!(strings.len(), 25);
    for string in strings {
        let amount = match &string["in"] {
            Value::String(text) => Amount::Text(text.clone()),
            number => Amount::Bytes(Size::from_bytes(number.as_i64().unwrap().into())),
        };
        for version in Version::ALL {
            let found = match amount.file_size(version) {
                Ok(size) => json!(size),
                Err(error) => json!({"error": error.exception()}),
            };
            assert_eq!(found, string[version.as_str()], "{amount:?} {version}");
        }
    }
}

#[test]
fn trees_of_configurations_are_the_recorded_ones() {
    let file = TreeFile::parse(&golden("module_trees.json")).unwrap();
    for (model, name) in [("cogvlm-chat-17b", "cogvlm-v1-bf16"), ("cogvlm2-19b", "cogvlm2-19b-bf16")] {
        let spec = ModelConfig::built_in(model).unwrap().resolve().unwrap();
        assert!(Module::of_model(&spec, DType::Bf16) == file.module(name).unwrap(), "{model} differs from {name}");
        assert!(Module::of_model(&spec, DType::F32) != file.module(name).unwrap());
    }
}

/// The 17B model under budgets in GiB for cards and host memory, published no-split classes.
fn plan_17b(version: Version, cards: &[u64], cpu: u64) -> Value {
    let mut max_memory: Vec<_> = (0..).zip(cards).map(|(id, gib)| json!([id, format!("{gib}GiB")])).collect();
    max_memory.push(json!(["cpu", format!("{cpu}GiB")]));
    let request = json!({
        "model": "cogvlm-chat-17b", "accelerate_version": version.as_str(), "max_memory": max_memory,
        "no_split": ["CogVLMDecoderLayer", "TransformerLayer"],
    });
    answer(&request.to_string(), &mut TreeCache::default())
}

#[test]
fn the_headline_leaves_the_cpu_empty() {
    for version in Version::ALL {
        let answer = plan_17b(version, &[20, 20], 16);
        let mut map = Map::new();
        map.insert("model.embed_tokens".into(), 0.into());
        map.extend((0..25).map(|layer| (format!("model.layers.{layer}"), 0.into())));
        map.extend((25..32).map(|layer| (format!("model.layers.{layer}"), 1.into())));
        map.extend(["model.norm", "model.vision", "lm_head"].map(|rest| (rest.into(), 1.into())));
        assert_eq!(map.len(), 36);
        assert_eq!(answer["device_map"], Value::Object(map));
        assert_eq!(answer["device_bytes"], json!({"0": 20_500_073_600_u64, "1": 14_779_301_248_u64}));
    }
}

#[test]
fn a_single_card_needs_the_whole_model_to_the_byte() {
    let total = 35_279_374_848_u64;
    for (budget, bytes) in
        [(total, json!({"0": total})), (total - 1, json!({"0": total - 352_321_536, "disk": 352_321_536}))]
    {
        let request = json!({
            "model": "cogvlm-chat-17b", "max_memory": [[0, budget]], "no_split": ["CogVLMDecoderLayer", "TransformerLayer"],
        });
        assert_eq!(answer(&request.to_string(), &mut TreeCache::default())["device_bytes"], bytes);
    }
}

/// Cards and host memory in GiB; decoder layers on each card and on the CPU; bytes on the CPU in units of 10 MB; bytes
/// that accelerate's hooks copy from there for each decoded token.
type OffloadRow = (&'static [u64], u64, &'static [usize], usize, u64, u64);

#[test]
fn offload_in_numbers() {
    // A decoder layer without its buffer, `lm_head`, the final norm.
    let (layer, head, norm) = (809_517_056, 262_144_000, 8192);
    let rows: [OffloadRow; 11] = [
        (&[20, 20], 16, &[25, 7], 0, 0, 0),
        (&[16, 16], 16, &[19, 13], 0, 259, head),
        (&[12, 12], 16, &[14, 15], 3, 1154, 3 * layer + head + norm),
        (&[8, 8], 24, &[9, 10], 13, 1964, 13 * layer + head + norm),
        (&[24], 16, &[30], 2, 1073, 2 * layer + head + norm),
        (&[20], 30, &[25], 7, 1478, 5_928_771_584),
        (&[20], 16, &[25], 7, 1478, 5_928_771_584),
        (&[16], 32, &[19], 13, 1964, 13 * layer + head + norm),
        (&[12], 24, &[14], 18, 2368, 18 * layer + head + norm),
        (&[10], 40, &[11], 21, 2611, 21 * layer + head + norm),
        (&[8], 40, &[9], 23, 2773, 23 * layer + head + norm),
    ];
    for (cards, cpu, layers_on_cards, layers_on_cpu, cpu_10_mb, per_token) in rows {
        for version in Version::ALL {
            let answer = plan_17b(version, cards, cpu);
            let map = answer["device_map"].as_object().unwrap();
            let on = |device: &Value, prefix: &str| {
                map.iter().filter(|(key, found)| key.starts_with(prefix) && *found == device).count()
            };
            let layers: Vec<_> = (0..cards.len()).map(|card| on(&json!(card), "model.layers.")).collect();
            let on_cpu = on(&json!("cpu"), "model.layers.");
            assert_eq!((layers.as_slice(), on_cpu), (layers_on_cards, layers_on_cpu), "{cards:?}");
            let cpu_bytes = answer["device_bytes"]["cpu"].as_u64().unwrap_or(0);
            assert_eq!((cpu_bytes + 5_000_000) / 10_000_000, cpu_10_mb, "{cards:?}");
            let copied = on_cpu as u64 * layer
                + on(&json!("cpu"), "lm_head") as u64 * head
                + on(&json!("cpu"), "model.norm") as u64 * norm;
            assert_eq!(copied, per_token, "{cards:?}");
        }
    }
}

#[test]
fn the_17b_model_is_planned_in_milliseconds() {
    let spec = ModelConfig::built_in("cogvlm-chat-17b").unwrap().resolve().unwrap();
    let tree = ModuleTree::new(&Module::of_model(&spec, DType::Bf16), &[]).unwrap();
    let gib = |gib: i128| Amount::Bytes(Size::from_bytes(gib << 30));
    let arguments = Arguments {
        max_memory: vec![(DeviceKey::Gpu(0), gib(12)), (DeviceKey::Gpu(1), gib(12)), (DeviceKey::Cpu, gib(16))],
        no_split: vec!["CogVLMDecoderLayer".to_owned(), "TransformerLayer".to_owned()],
        ..Arguments::default()
    };
    // The best of a few, since other tests run beside this one.
    let time = |_| {
        let start = Instant::now();
        assert_eq!(infer(&tree, &arguments).unwrap().device_bytes.len(), 3);
        start.elapsed()
    };
    let best = (0..20).map(time).min().unwrap();
    assert!(best.as_millis() < 10, "{best:?}");
}
