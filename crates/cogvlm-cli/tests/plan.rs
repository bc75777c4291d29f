//! `plan` as scripts use it, and plans and device maps followed by `generate`.

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cogvlm_core::{DType, ModelConfig, tensor_inventory};
use common::{
    TOKENIZER, arg, assert_refusal, cogvlm, cogvlm_json, cogvlm_with_stdin, read_json, refusal, repo, write_json,
};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

const HEADLINE: &str = "0:20GiB,1:20GiB,cpu:16GiB";
const TREES: &str = "tests/goldens/module_trees.json";

/// Everything that a user sees of a run.
fn seen(arguments: &[&str]) -> String {
    let outcome = cogvlm(arguments);
    let command = arguments.join(" ");
    format!("$ {command}\n{}--- stderr\n{}--- exit code {}\n", outcome.stdout, outcome.stderr, outcome.code)
}

#[test]
fn what_a_user_sees() {
    let cases: &[(&str, &[&str])] = &[
        ("headline", &["--max-memory", HEADLINE]),
        ("headline_batch", &["--max-memory", HEADLINE, "--batch", "8", "--context", "1536"]),
        ("headline_balanced", &["--max-memory", HEADLINE, "--policy", "balanced"]),
        ("headline_accelerate", &["--max-memory", HEADLINE, "--policy", "accelerate"]),
        ("one_card_and_host", &["--max-memory", "0:16GiB,cpu:32GiB"]),
        ("one_card_and_disk", &["--max-memory", "0:16GiB,cpu:4GiB,disk"]),
        ("four_cards", &["--max-memory", "0:12GiB,1:12GiB,2:12GiB,3:12GiB"]),
        ("host_alone", &["--max-memory", "cpu:48GiB"]),
        ("too_small", &["--max-memory", "0:8GiB"]),
        ("too_small_with_host", &["--max-memory", "0:8GiB,1:8GiB,cpu:4GiB"]),
        ("accelerate_cuts_the_vit", &["--max-memory", "0:16GiB,1:16GiB,cpu:8GiB", "--policy", "accelerate"]),
        ("virtual_ranks", &["small@12", "--max-memory", "0:70MiB,1:70MiB,cpu:256MiB", "--backend", "cpu"]),
    ];
    for (name, flags) in cases {
        insta::assert_snapshot!(*name, seen(&[&["plan"], *flags].concat()));
    }
}

fn plan_json(flags: &[&str]) -> Value {
    cogvlm_json(&[&["plan", "--json"], flags].concat())
}

/// Checks every key that the contract names; gives the map and its devices for further checks.
fn check_schema(plan: &Value) {
    assert_eq!(plan["schema"], "cogvlm-shard.plan/1");
    assert!(plan["policy"].is_string() && plan["model"].is_string());
    let is_device = |device: &Value| device.is_u64() || device == "cpu" || device == "disk";
    let map = plan["device_map"].as_object().unwrap();
    assert!(!map.is_empty() && map.values().all(is_device), "{map:?}");
    for entry in plan["placed"].as_array().unwrap() {
        let [path, device] = entry.as_array().unwrap().as_slice() else { panic!("no pair: {entry}") };
        assert!(path.is_string() && is_device(device), "{entry}");
        assert_eq!(covering(map, path.as_str().unwrap()), Some(device), "`device_map` and `placed` differ");
    }
    for (device, entry) in plan["devices"].as_object().unwrap() {
        assert!(device.parse::<u32>().is_ok() || device == "cpu" || device == "disk", "{device}");
        let keys: BTreeSet<&str> = entry.as_object().unwrap().keys().map(String::as_str).collect();
        let parts = ["weight_bytes", "kv_bytes", "workspace_bytes", "staging_bytes", "reserved_bytes"];
        assert!(keys.is_superset(&BTreeSet::from(parts)) && keys.contains("budget_bytes"), "{keys:?}");
        let used: i64 = parts.iter().map(|part| entry[part].as_i64().unwrap()).sum();
        match entry["budget_bytes"].as_i64() {
            Some(budget) => assert_eq!(used + entry["free_bytes"].as_i64().unwrap(), budget, "{device}"),
            None => assert!(device == "disk" && entry["free_bytes"].is_null(), "{device}"),
        }
    }
    for (tensor, device) in plan["tensors_off_device"].as_object().unwrap() {
        assert!(is_device(device), "{tensor}");
    }
    for link in plan["links"].as_array().unwrap() {
        assert!(is_device(&link["from"]) && is_device(&link["to"]), "{link}");
        assert!(link["bytes_per_token"].is_u64() && link["bytes_per_image"].is_u64(), "{link}");
    }
    assert!(plan["notices"].as_array().unwrap().iter().all(Value::is_string));
}

/// The device of the longest key that leads to `path`.
fn covering<'a>(map: &'a Map<String, Value>, path: &str) -> Option<&'a Value> {
    let mut path = path;
    loop {
        match (map.get(path), path.rfind('.')) {
            (Some(device), _) => return Some(device),
            (None, Some(dot)) => path = &path[..dot],
            (None, None) => return map.get(""),
        }
    }
}

/// Tensors of the 17B model: name and bytes in bf16, in the order of the checkpoint.
fn inventory_17b() -> Vec<(String, u64)> {
    let spec = ModelConfig::built_in("cogvlm-chat-17b").unwrap().resolve().unwrap();
    let size = DType::Bf16.size_bytes() as u64;
    tensor_inventory(&spec).iter().map(|tensor| (tensor.name.clone(), tensor.num_elements() as u64 * size)).collect()
}

/// Whatever the budgets: the schema holds, every tensor has one place, weights are counted where the map puts them.
#[test]
fn json_has_every_key_and_adds_up() {
    let inventory = inventory_17b();
    let mut num_off_device = 0;
    for flags in [
        &["--max-memory", HEADLINE][..],
        &["--max-memory", "0:16GiB,cpu:32GiB"],
        &["--max-memory", "0:8GiB,1:8GiB,cpu:40GiB", "--policy", "throughput"],
        &["--max-memory", "0:24GiB,1:12GiB,2:8GiB", "--policy", "balanced", "--batch", "4"],
        &["--max-memory", "0:12GiB,cpu:4GiB,disk:1000GB"],
        &["--max-memory", "0:42949672960", "--context", "512"],
        &["--max-memory", "cpu:51539607552"],
    ] {
        let plan = plan_json(flags);
        check_schema(&plan);
        let map = plan["device_map"].as_object().unwrap();
        let mut weights: Map<String, Value> = Map::new();
        for (tensor, bytes) in &inventory {
            let device = covering(map, tensor).unwrap_or_else(|| panic!("no key covers {tensor}"));
            let device = device.as_str().map_or_else(|| device.to_string(), str::to_owned);
            let sum = weights.get(&device).and_then(Value::as_u64).unwrap_or(0);
            weights.insert(device, (sum + bytes).into());
        }
        for (device, entry) in plan["devices"].as_object().unwrap() {
            assert_eq!(entry["weight_bytes"], *weights.get(device).unwrap_or(&json!(0)), "{flags:?} {device}");
        }
        // Placed in order: tensors of the first entry come first in the checkpoint, and so on.
        let first_tensor = |entry: &Value| {
            let path = entry[0].as_str().unwrap();
            let leads =
                |name: &str| name.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
            inventory.iter().position(|(name, _)| leads(name)).unwrap_or_else(|| panic!("{path} holds no tensor"))
        };
        let order: Vec<usize> = plan["placed"].as_array().unwrap().iter().map(first_tensor).collect();
        assert!(order.is_sorted_by(|a, b| a < b), "{flags:?}: {order:?}");
        let off_device = plan["tensors_off_device"].as_object().unwrap();
        num_off_device += off_device.len();
        let bytes = |name: &String| inventory.iter().find(|(tensor, _)| tensor == name).map(|(_, bytes)| *bytes);
        for (tensor, device) in off_device {
            assert_eq!(covering(map, tensor), Some(device));
            assert!(bytes(tensor).is_some(), "{tensor}");
        }
    }
    assert!(num_off_device > 100, "only {num_off_device} tensors rested off their device in all cases");
}

#[test]
fn the_same_request_gives_the_same_bytes() {
    let flags = ["plan", "--json", "--max-memory", "0:8GiB,1:8GiB,cpu:40GiB"];
    assert_eq!(cogvlm(&flags).stdout, cogvlm(&flags).stdout);
}

fn device_map_cases() -> Vec<Value> {
    let cases = read_json("tests/goldens/device_maps.json")["cases"].as_array().unwrap().clone();
    assert_eq!(cases.len(), 152);
    cases
}

/// What a case says about a version, with the fields that it takes over from the other one.
fn expected(case: &Value, version: &str) -> Map<String, Value> {
    let own = case["expect"][version].as_object().unwrap();
    let mut fields = match own.get("same_as").and_then(Value::as_str) {
        Some(other) => case["expect"][other].as_object().unwrap().clone(),
        None => Map::new(),
    };
    fields.extend(own.clone());
    fields.remove("same_as");
    fields
}

/// The first field of an answer that is not as recorded.
fn difference(expected: &Map<String, Value>, answer: &Value) -> Option<String> {
    let differs = |(field, expected): &(&String, &Value)| match field.as_str() {
        "error" => expected["type"] != answer["error"]["type"] || !answer["error"]["message"].is_string(),
        "unsupported" => answer["unsupported"] != true,
        _ => answer[field] != **expected,
    };
    let (field, expected) = expected.iter().find(differs)?;
    Some(format!("{field}: {} instead of {expected}", answer[field]))
}

#[test]
fn the_headline_under_accelerate() {
    let cases = device_map_cases();
    let headline = cases.iter().find(|case| case["id"] == "d000-headline").unwrap();
    for version in ["0.24.1", "1.15.0"] {
        let plan = plan_json(&["--max-memory", HEADLINE, "--policy", "accelerate", "--accelerate-version", version]);
        check_schema(&plan);
        let golden = expected(headline, version);
        for field in ["device_map", "placed"] {
            assert_eq!(plan[field], golden[field], "{field}");
        }
        for (device, bytes) in golden["device_bytes"].as_object().unwrap() {
            assert_eq!(plan["devices"][device]["weight_bytes"], *bytes);
        }
        assert_eq!(plan["policy"], "accelerate");
    }
}

/// 152 cases under two releases, through one process, with lines between them that are no requests.
#[test]
fn every_recorded_device_map_through_requests() {
    let cases = device_map_cases();
    let mut lines = Vec::new();
    let mut golden: Vec<(String, Map<String, Value>)> = Vec::new();
    for case in &cases {
        for version in ["0.24.1", "1.15.0"] {
            let mut request = case.as_object().unwrap().clone();
            let tree = request.remove("tree").unwrap();
            for key in ["expect", "id", "group", "note"] {
                request.remove(key);
            }
            request.insert("module_tree".into(), format!("{TREES}:{}", tree.as_str().unwrap()).into());
            request.insert("accelerate_version".into(), version.into());
            lines.push(Value::Object(request).to_string());
            golden.push((format!("{} {version}", case["id"]), expected(case, version)));
        }
        if golden.len() == 100 {
            for (bad, exception) in [("{\"max_memory\": [[0, ", "ValueError"), ("7", "TypeError"), ("{}", "TypeError")]
            {
                lines.push(bad.to_owned());
                let error = json!({"error": {"type": exception}});
                golden.push((bad.to_owned(), error.as_object().unwrap().clone()));
            }
        }
    }
    let outcome = cogvlm_with_stdin(&["plan", "--requests"], &lines.join("\n"));
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
    let answers: Vec<Value> = outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers.len(), 2 * 152 + 3);
    let wrong = golden.iter().zip(&answers).filter_map(|((name, golden), answer)| {
        // An answer to a request that was not refused is no refusal.
        let refused = answer.get("error").is_some() != golden.contains_key("error");
        let unsupported = answer.get("unsupported").is_some() != golden.contains_key("unsupported");
        let other = (refused || unsupported).then(|| answer.to_string());
        Some(format!("{name}: {}", other.or_else(|| difference(golden, answer))?))
    });
    let wrong: Vec<String> = wrong.collect();
    assert!(wrong.is_empty(), "{} differ\n{}", wrong.len(), wrong.join("\n"));
    // The comparison can fail: each answer against the case after the next.
    let shifted =
        golden.iter().skip(2).zip(&answers).filter(|((_, golden), answer)| difference(golden, answer).is_some());
    assert!(shifted.count() > 200);
}

/// The same cases as flags, where flags can say them.
#[test]
fn flags_of_the_accelerate_policy() {
    let mut seen = BTreeSet::new();
    for case in device_map_cases() {
        let group = case["group"].as_str().unwrap();
        let wanted = ["headline", "no-split", "dtype", "balanced", "keys", "tiny"].contains(&group);
        let has_other_options = ["special_dtypes", "offload_buffers", "fallback_allocation", "clean_result"]
            .iter()
            .any(|option| case.get(option).is_some());
        let budgets = case["max_memory"].as_array().unwrap();
        let has_flag_keys = budgets.iter().all(|entry| entry[0].is_u64() || entry[0] == "cpu" || entry[0] == "disk");
        if !wanted || has_other_options || case["low_zero"] == true || !has_flag_keys || budgets.is_empty() {
            continue;
        }
        let word = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let budgets: Vec<String> =
            budgets.iter().map(|entry| format!("{}:{}", word(&entry[0]), word(&entry[1]))).collect();
        let budgets = budgets.join(",");
        let no_split = match &case["no_split"] {
            Value::Array(classes) => classes.iter().map(word).collect::<Vec<_>>().join(","),
            Value::String(class) => class.clone(),
            _ => String::new(),
        };
        let tree = format!("{TREES}:{}", case["tree"].as_str().unwrap());
        let mut flags =
            vec!["--policy", "accelerate", "--module-tree", &tree, "--max-memory", &budgets, "--no-split", &no_split];
        if let Some(dtype) = case["dtype"].as_str() {
            flags.extend(["--dtype", dtype]);
        }
        if case["fn"] == "balanced" {
            flags.push("--balanced-memory");
        }
        let version = if seen.len() % 2 == 0 { "0.24.1" } else { "1.15.0" };
        flags.extend(["--accelerate-version", version]);
        let golden = expected(&case, version);
        if golden.contains_key("error") {
            refusal(&[&["plan", "--json"], flags.as_slice()].concat(), 1);
        } else {
            let plan = plan_json(&flags);
            assert_eq!(plan["device_map"], golden["device_map"], "{}", case["id"]);
            for (device, bytes) in golden["device_bytes"].as_object().unwrap() {
                assert_eq!(plan["devices"][device]["weight_bytes"], *bytes, "{} {device}", case["id"]);
            }
        }
        seen.insert(case["id"].to_string());
    }
    assert!(seen.len() >= 28, "{}", seen.len());
}

#[test]
fn requests_under_own_policies_are_plans() {
    let requests = [
        json!({"policy": "balanced", "max_memory": [[0, "20GiB"], [1, "20GiB"], ["cpu", "16GiB"]]}),
        json!({"policy": "throughput", "model": "cogvlm-base-224-17b", "max_memory": [[0, 21_474_836_480_u64], [1, "24GB"]], "context": 1024, "batch": 4}),
        json!({"policy": "latency", "max_memory": [[0, "8GiB"]]}),
        json!({"policy": "auto", "max_memory": [["cpu", "48GiB"]], "model": "cogvlm2-19b"}),
        json!({"policy": "fastest", "max_memory": [[0, "40GiB"]]}),
        json!({"policy": "balanced", "model": "no-such-model", "max_memory": [[0, "40GiB"]]}),
        json!({"policy": "balanced", "max_memory": [["tpu", "40GiB"]]}),
        json!({"policy": "balanced", "module_tree": format!("{TREES}:mini-bf16"), "max_memory": [[0, "40GiB"]]}),
        json!({
            "model": "cogvlm-chat-17b", "max_memory": [[0, "20GiB"], [1, "20GiB"]],
            "no_split": ["CogVLMDecoderLayer", "TransformerLayer"],
        }),
    ];
    let lines: Vec<String> = requests.iter().map(Value::to_string).collect();
    let outcome = cogvlm_with_stdin(&["plan", "--requests"], &lines.join("\n"));
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    let answers: Vec<Value> = outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers.len(), requests.len());
    assert_eq!(answers[0], plan_json(&["--policy", "balanced", "--max-memory", HEADLINE]));
    let flags = ["cogvlm-base-224-17b", "--policy", "throughput", "--max-memory", "0:21474836480,1:24GB"];
    assert_eq!(answers[1], plan_json(&[&flags[..], &["--context", "1024", "--batch", "4"]].concat()));
    assert_eq!(answers[3], plan_json(&["cogvlm2-19b", "--max-memory", "cpu:48GiB"]));
    for (index, word) in [(2, "does not fit"), (4, "fastest"), (5, "no-such-model"), (6, "tpu"), (7, "module_tree")] {
        let message = answers[index]["error"]["message"].as_str().unwrap_or_else(|| panic!("{}", answers[index]));
        assert!(message.contains(word), "{message}");
    }
    assert_eq!(answers[8]["device_bytes"]["1"], 14_779_301_248_u64);
}

/// What `doctor --json` would write of a machine with one GPU.
fn links_of_one_gpu(host_link: f64) -> Value {
    json!({
        "schema": "cogvlm-shard.links/1",
        "measured_on": {"machine": "box", "driver": "580.95.05", "cuda": "13.0"},
        "host": {"read_bytes_per_s": 40e9, "f32_flops_per_s": 1e12, "bf16_flops_per_s": 1e12, "disk_bytes_per_s": null},
        "devices": {
            "0": {
                "name": "some GPU", "copy_bytes_per_s": 800e9, "product_flops_per_s": 50e12,
                "from_host_bytes_per_s": host_link, "to_host_bytes_per_s": host_link, "host_hop_s": 20e-6,
            },
        },
        "pairs": [],
    })
}

/// Rates of a machine: `--links` changes predictions and, where it is worth it, places.
#[test]
fn links_set_the_rates() {
    let dir = TempDir::new().unwrap();
    let planned = |name: &str, value: &Value| {
        let file = write_json(dir.path(), name, value);
        plan_json(&["--max-memory", "0:16GiB,cpu:32GiB", "--links", arg(&file)])
    };
    let seconds = |plan: &Value| plan["predicted_seconds_per_image"].as_f64().unwrap();
    let slow = planned("slow.json", &links_of_one_gpu(1e9));
    // By itself, or as `doctor` writes it.
    let fast = planned("fast.json", &json!({"schema": "cogvlm-shard.doctor/2", "links": links_of_one_gpu(50e9)}));
    // 19.99 GB travel to the card for every image.
    assert!(seconds(&slow) > 19.0 && seconds(&fast) < 1.5, "{} {}", seconds(&slow), seconds(&fast));
    assert_eq!(slow["predicted_with"], "measured on box (`0`, `cpu`)");
    for (bad, words) in [
        (json!({"rates": {"device_bytes_per_s": 1.0}}), ["`schema` is missing", "bad.json"]),
        (links_of_one_gpu(0.0), ["`devices.0.from_host_bytes_per_s` is 0", "bad.json"]),
        (json!({"links": links_of_one_gpu(-1.0)}), ["`links.devices.0.from_host_bytes_per_s` is -1", "bad.json"]),
        (json!([1, 2]), ["is no JSON object", "bad.json"]),
    ] {
        let file = write_json(dir.path(), "bad.json", &bad);
        let outcome = cogvlm(&["plan", "--max-memory", HEADLINE, "--links", arg(&file)]);
        let error = assert_refusal(&outcome, 1, "bad rates");
        words.iter().for_each(|word| assert!(error.contains(word), "{error}"));
        assert!(outcome.stderr.contains("hint: `cogvlm-shard doctor --json"), "{}", outcome.stderr);
    }
    let error = refusal(&["plan", "--max-memory", HEADLINE, "--links", "/nowhere/links.json"], 1);
    assert!(error.contains("/nowhere/links.json"), "{error}");
    let accelerate = ["plan", "--max-memory", HEADLINE, "--policy", "accelerate", "--links", "/nowhere/links.json"];
    assert!(refusal(&accelerate, 2).contains("`--links`"));
}

/// A device that the file says nothing of has assumed rates, which is said.
#[test]
fn devices_that_the_links_lack_are_named() {
    let dir = TempDir::new().unwrap();
    let file = write_json(dir.path(), "links.json", &links_of_one_gpu(20e9));
    let flags = ["--max-memory", HEADLINE, "--batch", "2", "--links", arg(&file)];
    let notices = plan_json(&flags)["notices"].to_string();
    assert!(notices.contains("no measured rates of `1`") && notices.contains("between `0` and `1`"), "{notices}");
    let text = cogvlm(&[&["plan"], &flags[..]].concat()).stdout;
    assert!(text.contains("rates:     measured on box (`0`); assumed of a 24 GB card on PCIe 4.0 (`1`)"), "{text}");
}

/// Wherever a plan is made, `--links` is taken, and refused where it does not hold.
#[test]
fn links_are_for_all_that_run() {
    let dir = TempDir::new().unwrap();
    let ids = write_json(dir.path(), "ids.json", &json!([5, 6, 7]));
    let good = write_json(dir.path(), "good.json", &links_of_one_gpu(20e9));
    let bad = write_json(dir.path(), "bad.json", &links_of_one_gpu(-20e9));
    let shared = ["--model", "tiny@1", "--backend", "cpu", "--max-memory", "cpu:1GiB", "--context", "64", "--links"];
    let generate = |links: &Path| {
        let more = ["--input-ids", arg(&ids), "--max-new-tokens", "1", "--json"];
        cogvlm(&[&["generate"], &shared[..], &[arg(links)], &more[..]].concat())
    };
    assert_eq!(generate(&good).code, 0);
    assert!(assert_refusal(&generate(&bad), 1, "generate").contains("`devices.0.from_host_bytes_per_s`"));
    for command in ["chat", "bench"] {
        let outcome = cogvlm(
            &[
                &[command],
                &shared[..],
                &[arg(&bad)],
                &["--tokenizer", TOKENIZER][..if command == "chat" { 2 } else { 0 }],
            ]
            .concat(),
        );
        assert!(assert_refusal(&outcome, 1, command).contains("`devices.0.from_host_bytes_per_s`"));
    }
    // A plan that is read back is predicted anew, with these rates.
    let plan = plan_json(&["tiny", "--max-memory", "0:1GiB"]);
    let plan = write_json(dir.path(), "plan.json", &plan);
    let bench = |more: &[&str]| {
        let flags = ["bench", "--model", "tiny@1", "--backend", "cpu", "--device-map", arg(&plan), "--repeats", "1"];
        let report = cogvlm_json(&[&flags[..], &["--new-tokens", "2", "--json"], more].concat());
        report["predicted"]["rates"].as_str().unwrap().to_owned()
    };
    assert_eq!(bench(&["--links", arg(&good)]), "measured on box (`0`)");
    assert_eq!(bench(&[]), "assumed of a desktop host (`0`)");
}

/// `[(device, budget)]` of `--max-memory`, changed as a hint says.
fn apply(flags: &[String], change: &str) -> Vec<String> {
    let quoted: Vec<&str> = change.split('`').collect();
    let mut flags = flags.to_vec();
    let set = |flags: &mut Vec<String>, flag: &str, value: &str| match flags.iter().position(|known| known == flag) {
        Some(at) => flags[at + 1] = value.to_owned(),
        None => flags.extend([flag.to_owned(), value.to_owned()]),
    };
    let budgets = |flags: &[String]| flags[flags.iter().position(|flag| flag == "--max-memory").unwrap() + 1].clone();
    if let Some(to) = change.strip_prefix("raise `").and_then(|rest| rest.split_once("` to ")) {
        let raised: Vec<String> =
            budgets(&flags)
                .split(',')
                .map(|entry| {
                    if entry.split(':').next() == Some(to.0) { format!("{}:{}", to.0, to.1) } else { entry.to_owned() }
                })
                .collect();
        set(&mut flags, "--max-memory", &raised.join(","));
    } else if change.starts_with("add `") {
        let added = format!("{},{}", budgets(&flags), quoted[1]);
        set(&mut flags, "--max-memory", &added);
    } else {
        let (flag, value) = quoted[1].split_once(' ').unwrap_or_else(|| panic!("no change: {change}"));
        set(&mut flags, flag, value);
    }
    flags
}

/// What a refusal proposes does, each alternative alone; a little less does not.
#[test]
fn hints_of_refused_plans_work() {
    let cases: &[&[&str]] = &[
        &["--max-memory", "0:8GiB"],
        &["--max-memory", "0:8GiB,1:8GiB,cpu:4GiB"],
        &["--max-memory", "0:20GiB,1:20GiB", "--batch", "16"],
        &["--max-memory", "cpu:16GiB"],
        &["--max-memory", "1:2GiB,cpu:20GiB", "--batch", "4"],
        &["small", "--backend", "cpu", "--max-memory", "0:20MiB,1:30MiB"],
        &["tiny", "--backend", "cpu", "--max-memory", "0:1MiB,cpu:4MiB", "--context", "2048"],
    ];
    let mut kinds = BTreeSet::new();
    for flags in cases {
        let flags: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        let run = |flags: &[String]| {
            let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
            cogvlm(&[&["plan", "--json"], flags.as_slice()].concat())
        };
        let outcome = run(&flags);
        assert_refusal(&outcome, 1, &format!("{flags:?}"));
        assert_eq!(outcome.stdout, "");
        let hint = outcome.stderr.lines().find_map(|line| line.strip_prefix("hint: ")).expect("a hint");
        for change in hint.split(", or ") {
            let changed = apply(&flags, change);
            let outcome = run(&changed);
            assert_eq!(outcome.code, 0, "{flags:?}: `{change}` does not do: {}", outcome.stderr);
            check_schema(&serde_json::from_str(&outcome.stdout).unwrap());
            kinds.insert(
                change.split('`').next().unwrap().to_owned() + if change.starts_with('`') { "flag" } else { "" },
            );
            let less = less_of(change);
            assert_eq!(run(&apply(&flags, &less)).code, 1, "{flags:?}: `{less}` does as well as `{change}`");
        }
    }
    assert_eq!(kinds, ["add ", "flag", "raise "].map(str::to_owned).into());
}

/// A change that is smaller by the grain of hints.
fn less_of(change: &str) -> String {
    let digits = |text: &str| text.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect::<String>();
    for (mark, sign) in [("to ", -1.0), (":", -1.0), ("--context ", 128.0), ("--batch ", 1.0)] {
        let Some(at) = change.find(mark).map(|at| at + mark.len()) else { continue };
        let number = digits(&change[at..]);
        let rest = &change[at + number.len()..];
        let grain = if rest.starts_with("GiB") { sign * 0.1 } else { sign };
        let less = number.parse::<f64>().unwrap() + grain;
        let less = if rest.starts_with("GiB") { format!("{less:.1}") } else { format!("{less:.0}") };
        return format!("{}{less}{rest}", &change[..at]);
    }
    panic!("no number in `{change}`")
}

#[test]
fn flags_that_a_policy_does_not_read_are_refused() {
    let at = ["plan", "--max-memory", "0:40GiB"];
    for (flags, word) in [
        (&["--accelerate-version", "1.15.0"][..], "--accelerate-version"),
        (&["--no-split", "A"], "--no-split"),
        (&["--balanced-memory"], "--balanced-memory"),
        (&["--module-tree", "tests/goldens/module_trees.json:mini-bf16"], "--module-tree"),
        (&["--dtype", "int8"], "--dtype int8"),
        (&["--policy", "accelerate", "--accelerate-version", "0.25"], "--accelerate-version 0.25"),
        (&["--policy", "accelerate", "--dtype", "f33"], "--dtype f33"),
    ] {
        let error = refusal(&[&at[..], flags].concat(), 2);
        assert!(error.contains(word), "{error}");
    }
    let error = refusal(&["plan", "--policy", "accelerate"], 2);
    assert!(error.contains("--max-memory"), "{error}");
}

#[test]
fn the_17b_model_is_planned_in_a_moment() {
    let time = |flags: &[&str]| {
        let start = Instant::now();
        assert_eq!(cogvlm(&[&["plan", "--json"], flags].concat()).code, 0);
        start.elapsed()
    };
    for flags in [&["--max-memory", HEADLINE][..], &["--max-memory", "0:8GiB,1:8GiB,cpu:40GiB"]] {
        // The best of a few, since other tests run beside this one.
        let best = (0..5).map(|_| time(flags)).min().unwrap();
        assert!(best < Duration::from_secs(1), "{flags:?}: {best:?}");
    }
}

/// A request to a small model whose logits are written to a file; one directory for all its runs.
struct Model {
    dir: TempDir,
    dtype: &'static str,
    flags: Vec<&'static str>,
}

impl Model {
    fn tiny(dtype: &'static str) -> Self {
        let flags = vec!["--model", "tiny@11", "--image", "tests/goldens/tiny/caption.png"];
        Self { dir: TempDir::new().unwrap(), dtype, flags }
    }

    /// The logits file's bytes, and the devices that held something.
    fn logits(&self, flags: &[&str]) -> (Vec<u8>, BTreeSet<String>) {
        let file = self.dir.path().join("logits.safetensors");
        let common = [
            "generate",
            "--json",
            "--backend",
            "cpu",
            "--prompt",
            "What is it?",
            "--tokenizer",
            TOKENIZER,
            "--dtype",
            self.dtype,
            "--max-new-tokens",
            "5",
            "--ignore-eos",
            "--logits-out",
            arg(&file),
        ];
        let answer = cogvlm_json(&[&common[..], &self.flags, flags].concat());
        assert_eq!(answer["usage"]["completion_tokens"], 5);
        let held = answer["memory"].as_object().unwrap().iter().filter(|(_, peak)| peak.as_u64().unwrap() > 0);
        let held = held.map(|(device, _)| device.clone()).collect();
        (std::fs::read(&file).unwrap(), held)
    }

    fn write(&self, name: &str, value: &Value) -> PathBuf {
        write_json(self.dir.path(), name, value)
    }
}

fn devices(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// `plan --json > plan.json`, then `generate --device-map plan.json`: the bits of a run without a map.
#[test]
fn generate_follows_plans() {
    for dtype in ["f32", "bf16"] {
        let model = Model::tiny(dtype);
        let (expected, held) = model.logits(&["--context", "64"]);
        assert_eq!(held, devices(&["cpu"]));
        for (policy, budgets, ranks) in [
            ("latency", "0:14MiB,cpu:64MiB", &["0"][..]),
            ("latency", "0:15MiB,1:15MiB", &["0", "1"]),
            ("balanced", "0:16MiB,1:16MiB", &["0", "1"]),
            ("throughput", "0:4MiB,1:13MiB,cpu:64MiB", &["0", "1"]),
            ("accelerate", "0:18MiB,1:20MiB,cpu:16MiB", &["0", "1"]),
        ] {
            let plan = plan_json(&[
                "tiny@11",
                "--backend",
                "cpu",
                "--policy",
                policy,
                "--max-memory",
                budgets,
                "--context",
                "64",
            ]);
            let file = model.write("plan.json", &plan);
            // Activations in f32 take more room than the plan's: budgets that leave some.
            let roomy = "0:40MiB,1:40MiB,cpu:64MiB";
            let (logits, held) = model.logits(&["--device-map", arg(&file), "--max-memory", roomy, "--context", "64"]);
            assert!(logits == expected, "{policy} {dtype}: other logits");
            assert!(held.is_superset(&devices(ranks)), "{policy}: {held:?}");
            if dtype == "bf16" && policy != "accelerate" {
                // Its own budgets and context are those of the run.
                let (logits, same) = model.logits(&["--device-map", arg(&file)]);
                assert!(logits == expected && same == held, "{policy}");
            }
        }
    }
}

/// A plan that `plan` made for cards, taken over by virtual ranks, in both types of arithmetic.
#[test]
fn a_plan_for_cards_runs_on_virtual_ranks() {
    for dtype in ["f32", "bf16"] {
        let model = Model::tiny(dtype);
        let plan = plan_json(&["tiny", "--policy", "balanced", "--max-memory", "0:640MiB,1:640MiB", "--context", "64"]);
        let file = model.write("plan.json", &plan);
        let (logits, held) = model.logits(&["--device-map", arg(&file)]);
        assert!(logits == model.logits(&["--context", "64"]).0, "{dtype}");
        assert_eq!(held, devices(&["0", "1"]));
        // What the run asks for counts, not what was planned.
        let (longer, _) = model.logits(&["--device-map", arg(&file), "--context", "128"]);
        assert!(longer == logits);
        let flags = ["--model", "tiny@11", "--prompt", "x", "--tokenizer", TOKENIZER, "--backend", "cpu"];
        let error = refusal(
            &[&["generate", "--device-map", arg(&file), "--max-memory", "0:4MiB,1:4MiB"], &flags[..]].concat(),
            1,
        );
        assert!(error.contains("plan.json") && error.contains("budget"), "{error}");
    }
}

/// The tensors' places as one would write them by hand, or as accelerate leaves them.
fn hand_written_maps() -> Vec<(&'static str, Value, &'static [&'static str])> {
    let whole_text = json!({
        "model.embed_tokens": 0, "model.layers": 0, "model.norm": 0, "lm_head": 0,
    });
    let with = |base: &Value, changes: Value| {
        let mut map = base.as_object().unwrap().clone();
        map.extend(changes.as_object().unwrap().clone());
        Value::Object(map)
    };
    let by_layer = json!({
        "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 0, "model.layers.2": 1, "model.layers.3": 1,
        "model.norm": 1, "lm_head": 1, "model.vision": 1,
    });
    let without = |base: &Value, key: &str| {
        let mut map = base.as_object().unwrap().clone();
        map.remove(key);
        Value::Object(map)
    };
    vec![
        ("all on one card", json!({"": 0}), &["0"]),
        ("all on the host", json!({"": "cpu"}), &["cpu"]),
        ("relay by layers", by_layer.clone(), &["0", "1"]),
        (
            "the ViT is cut, boi and eoi on the earlier card",
            with(
                &whole_text,
                json!({
                    "model.vision.boi": 0, "model.vision.eoi": 0, "model.vision.patch_embedding": 0,
                    "model.vision.transformer.layers.0": 0, "model.vision.transformer.layers.1": 1,
                    "model.vision.transformer.layers.2": 1, "model.vision.linear_proj": 1,
                }),
            ),
            &["0", "1"],
        ),
        (
            "boi and eoi apart",
            with(
                &by_layer,
                json!({"model.vision": 1, "model.vision.boi": 0, "model.vision.eoi": 1, "model.vision.linear_proj": 0}),
            ),
            &["0", "1"],
        ),
        (
            "a decoder layer and a ViT layer are split",
            with(
                &without(&by_layer, "model.layers.1"),
                json!({
                    "model.layers.1.self_attn": 0, "model.layers.1.mlp": 1, "model.layers.1.input_layernorm": 0,
                    "model.layers.1.post_attention_layernorm": 1,
                    "model.vision.transformer.layers.1.attention": 0, "model.vision.transformer.layers.1": 1,
                }),
            ),
            &["0", "1"],
        ),
        (
            "host and file behind a card",
            with(
                &by_layer,
                json!({"model.layers.1": "cpu", "model.layers.3": "disk", "model.vision": "cpu", "lm_head": "disk"}),
            ),
            &["0", "1"],
        ),
        (
            "the embedding on the host, one expert in the file",
            with(
                &whole_text,
                json!({"model.embed_tokens": "cpu", "model.layers.2.mlp.vision_mlp": "disk", "model.vision": 1}),
            ),
            &["0", "1"],
        ),
        (
            "one tensor alone",
            with(&by_layer, json!({"model.layers.0.mlp.language_mlp.up_proj.weight": 1})),
            &["0", "1"],
        ),
    ]
}

#[test]
fn generate_follows_hugging_face_maps() {
    for dtype in ["f32", "bf16"] {
        let model = Model::tiny(dtype);
        let (expected, _) = model.logits(&["--context", "64"]);
        for (index, (name, map, ranks)) in hand_written_maps().iter().enumerate() {
            let file = model.write("map.json", map);
            // With and without budgets: a map alone is enough.
            let budgets = ["--max-memory", "0:64MiB,1:64MiB,cpu:64MiB"];
            let budgets = if index % 2 == 0 { &budgets[..] } else { &[] };
            let (logits, held) = model.logits(&[&["--device-map", arg(&file), "--context", "64"], budgets].concat());
            assert!(logits == expected, "{name}, {dtype}: other logits");
            assert!(held.is_superset(&devices(ranks)), "{name}: {held:?}");
        }
    }
    // The comparison can fail: the two types of arithmetic give different files.
    let f32 = Model::tiny("f32").logits(&["--context", "64"]).0;
    assert!(f32 != Model::tiny("bf16").logits(&["--context", "64"]).0);
}

/// The published sizes of heads and of the image, once: layers over two ranks, the ViT on the host and streamed.
#[test]
fn a_larger_model_follows_a_map() {
    let model = Model { flags: vec!["--model", "small@12"], ..Model::tiny("bf16") };
    let map = json!({
        "model.embed_tokens": "cpu", "model.layers.0": 0, "model.layers.1": "cpu", "model.layers.2": 1,
        "model.norm": 1, "lm_head": 1, "model.vision": "disk",
    });
    let file = model.write("map.json", &map);
    let (logits, held) = model.logits(&["--device-map", arg(&file), "--context", "64"]);
    assert!(logits == model.logits(&["--context", "64"]).0);
    assert!(held.is_superset(&devices(&["0", "1"])), "{held:?}");
}

#[test]
fn maps_that_cannot_be_followed_are_refused() {
    let dir = TempDir::new().unwrap();
    let generate = |file: &Path, flags: &[&str]| {
        let common = [
            "generate",
            "--model",
            "tiny@11",
            "--backend",
            "cpu",
            "--context",
            "64",
            "--prompt",
            "x",
            "--tokenizer",
            TOKENIZER,
            "--max-new-tokens",
            "2",
            "--device-map",
            arg(file),
        ];
        cogvlm(&[&common[..], flags].concat())
    };
    let file = dir.path().join("map.json");
    for (text, word) in [
        ("{\"\": 0, \"model.layers.9\": 0}", "`model.layers.9`"),
        ("{\"model\": 0}", "`lm_head.weight`"),
        ("{\"\": 0, \"lm_head\": 0, \"lm_head\": 1}", "`lm_head`"),
        ("{\"\": \"tpu\"}", "tpu"),
        ("[]", "map.json"),
        ("{\"schema\": \"cogvlm-shard.plan/2\", \"device_map\": {}}", "plan/2"),
        ("{", "map.json"),
    ] {
        std::fs::write(&file, text).unwrap();
        let error = assert_refusal(&generate(&file, &[]), 1, text);
        assert!(error.contains(word) && error.contains("map.json"), "{error}");
    }
    std::fs::write(&file, "{\"\": 0}").unwrap();
    let error = assert_refusal(&generate(&file, &["--max-memory", "1:1GiB"]), 1, "no budget");
    assert!(error.contains("`0`"), "{error}");
    let outcome = generate(&file, &["--max-memory", "0:1MiB"]);
    assert_refusal(&outcome, 1, "over budget");
    let hint = outcome.stderr.lines().find_map(|line| line.strip_prefix("hint: raise `0` to ")).expect("a hint");
    assert_eq!(generate(&file, &["--max-memory", &format!("0:{hint}")]).code, 0, "{hint}");
    // A plan of another model, and one that was changed by hand.
    let mut plan = plan_json(&["small", "--max-memory", "0:1GiB", "--context", "64"]);
    std::fs::write(&file, plan.to_string()).unwrap();
    assert_refusal(&generate(&file, &[]), 1, "another model's plan");
    plan = plan_json(&["tiny", "--max-memory", "0:1GiB", "--context", "64"]);
    plan["devices"]["0"]["weight_bytes"] = json!(1);
    std::fs::write(&file, plan.to_string()).unwrap();
    let error = assert_refusal(&generate(&file, &[]), 1, "a changed plan");
    assert!(error.contains("devices.0"), "{error}");
    assert!(!repo("logits.safetensors").exists());
}
