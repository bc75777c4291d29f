//! Models from files: every layout, element type and alignment gives what `NAME@SEED` gives, and mapped weights are used
//! where they lie.

mod common;

use std::collections::HashMap;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{
    TOKENIZER, arg, cogvlm, cogvlm_json, ids, read_json, read_tensor, relative_rms, repo, without_gpus, write_json,
};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Relative RMS that two right f32 implementations stay within, as in tests/goldens/README.md.
const F32_BOUND: f64 = 2e-5;

/// A tensor in memory.
#[derive(Clone)]
struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

/// The tensors of all safetensors files of a directory.
fn read_tensors(dir: &Path) -> HashMap<String, Tensor> {
    let mut tensors = HashMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let bytes = std::fs::read(&path).unwrap();
            for (name, view) in safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors() {
                let tensor = Tensor { dtype: view.dtype(), shape: view.shape().to_vec(), data: view.data().to_vec() };
                tensors.insert(name, tensor);
            }
        }
    }
    tensors
}

/// Writes one `model.safetensors`, and the configuration of `like`, perhaps changed.
fn write_single(dir: &Path, tensors: &HashMap<String, Tensor>, like: &Path, change: impl Fn(&mut Value)) {
    std::fs::create_dir_all(dir).unwrap();
    let views = tensors
        .iter()
        .map(|(name, tensor)| (name, TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.data).unwrap()));
    let bytes = safetensors::serialize(views.collect::<HashMap<_, _>>(), None).unwrap();
    std::fs::write(dir.join("model.safetensors"), bytes).unwrap();
    let text = std::fs::read_to_string(like.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    change(&mut config);
    write_json(dir, "config.json", &config);
}

fn synth(model: &str, out: &Path, flags: &[&str]) {
    let outcome = cogvlm(&[&["synth", model, "--out", arg(out)], flags].concat());
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
}

/// A golden case asked of `model`: its logits file's bytes and its JSON.
fn ask(case: &str, model: &str, flags: &[&str]) -> (Vec<u8>, Value) {
    let golden = read_json(&format!("tests/goldens/{case}.json"));
    let out = TempDir::new().unwrap();
    let logits = out.path().join("logits.safetensors");
    let image = repo(&format!("tests/goldens/{case}.json")).with_file_name(golden["image"]["file"].as_str().unwrap());
    let (query, template) = (golden["query"].as_str().unwrap(), golden["template"].as_str().unwrap());
    let fixed = [
        "generate",
        "--json",
        "--ignore-eos",
        "--max-new-tokens",
        "8",
        "--backend",
        "cpu",
        "--context",
        "512",
        "--tokenizer",
        TOKENIZER,
        "--model",
        model,
        "--prompt",
        query,
        "--template",
        template,
        "--image",
        arg(&image),
        "--logits-out",
        arg(&logits),
    ];
    let found = cogvlm_json(&[&fixed[..], flags].concat());
    assert_eq!(found["input_ids"], golden["input_ids"]);
    (std::fs::read(&logits).unwrap(), found)
}

/// How far the first logits of a file are from those recorded of a case.
fn distance(case: &str, logits: &[u8]) -> f64 {
    let file = safetensors::SafeTensors::deserialize(logits).unwrap();
    let data = file.tensor("logits").unwrap().data().chunks_exact(4);
    let found: Vec<f32> = data.take(32000).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let (_, golden) = read_tensor(&repo(&format!("tests/goldens/{case}.safetensors")), "logits").unwrap();
    relative_rms(&found, &golden)
}

/// Asks the golden case in f32: within the bound of what is recorded, and the same tokens.
fn check_golden(case: &str, model: &Path, flags: &[&str]) {
    let (logits, found) = ask(case, arg(model), &[&["--dtype", "f32"], flags].concat());
    let error = distance(case, &logits);
    assert!(error <= F32_BOUND, "{}: off by {error:e}", model.display());
    let golden = ids(&read_json(&format!("tests/goldens/{case}.json"))["greedy"]["tokens"]);
    assert_eq!(ids(&found["output_ids"]), golden[..8], "{}", model.display());
}

const CASE: &str = "tiny/caption";

/// The budgets under which a model is tried: in place, copied to virtual ranks, streamed.
const WAYS: [&[&str]; 3] =
    [&["--max-memory", "cpu:1GiB"], &["--max-memory", "0:64MiB,1:64MiB"], &["--max-memory", "0:15MiB,cpu:64MiB,disk"]];

/// Asks `model` in every way and both types of arithmetic: the bits that `NAME@SEED` gives.
fn check_same_bits(model: &Path) {
    for dtype in ["f32", "bf16"] {
        let expected = ask(CASE, "tiny@11", &["--dtype", dtype]).0;
        for way in WAYS {
            let found = ask(CASE, arg(model), &[&["--dtype", dtype], way].concat()).0;
            assert!(found == expected, "{} {dtype} {way:?}: other logits", model.display());
        }
    }
    check_golden(CASE, model, &[]);
}

#[test]
fn shards_give_the_bits_of_the_synthetic_model() {
    let dir = TempDir::new().unwrap();
    let model = dir.path().join("shards");
    synth("tiny@11", &model, &["--max-shard-size", "1MB"]);
    assert!(model.join("model.safetensors.index.json").exists());
    check_same_bits(&model);
    // A tokenizer next to the model is found there.
    std::fs::copy(repo(TOKENIZER), model.join("tokenizer.model")).unwrap();
    let flags = ["generate", "--model", arg(&model), "--prompt", "What is it?", "--max-new-tokens", "3", "--json"];
    assert_eq!(cogvlm_json(&flags)["prompt"], "Question: What is it? Answer:");
}

#[test]
fn one_file_written_by_another_library() {
    let dir = TempDir::new().unwrap();
    let (model, single) = (dir.path().join("shards"), dir.path().join("single"));
    synth("tiny@11", &model, &["--max-shard-size", "3MB"]);
    let tensors = read_tensors(&model);
    write_single(&single, &tensors, &model, |_| ());
    check_same_bits(&single);
    // Another tensor's bytes do show.
    let mut wrong = tensors.clone();
    let (gate, up) =
        ["gate_proj", "up_proj"].map(|name| format!("model.layers.2.mlp.language_mlp.{name}.weight")).into();
    let other = wrong[&up].clone();
    wrong.insert(gate, other);
    let swapped = dir.path().join("swapped");
    write_single(&swapped, &wrong, &model, |_| ());
    let (logits, _) = ask(CASE, arg(&swapped), &["--dtype", "f32"]);
    assert!(distance(CASE, &logits) > 10.0 * F32_BOUND);
}

/// The layout of the Hub's cache: `snapshots/REVISION` holds links into `blobs`.
#[test]
fn a_snapshot_of_the_hub_cache() {
    let dir = TempDir::new().unwrap();
    let repository = dir.path().join("models--synthetic--tiny");
    let (blobs, snapshot) = (repository.join("blobs"), repository.join("snapshots/0123abcd"));
    let made = dir.path().join("made");
    synth("tiny@11", &made, &["--max-shard-size", "3MB"]);
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::create_dir_all(&snapshot).unwrap();
    for (index, entry) in std::fs::read_dir(&made).unwrap().enumerate() {
        let entry = entry.unwrap();
        let blob = format!("{index:064x}");
        std::fs::rename(entry.path(), blobs.join(&blob)).unwrap();
        symlink(Path::new("../../blobs").join(&blob), snapshot.join(entry.file_name())).unwrap();
    }
    assert_eq!(cogvlm(&["inspect", arg(&snapshot)]).code, 0);
    check_same_bits(&snapshot);
}

/// Data that begins at an odd byte of the file, which the format allows.
#[test]
fn misaligned_data() {
    let dir = TempDir::new().unwrap();
    let made = dir.path().join("made");
    synth("tiny@11", &made, &[]);
    let bytes = std::fs::read(made.join("model.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for shift in [1, 2] {
        let model = dir.path().join(format!("shifted_by_{shift}"));
        std::fs::create_dir(&model).unwrap();
        let mut shifted = ((header + shift) as u64).to_le_bytes().to_vec();
        shifted.extend(&bytes[8..8 + header]);
        shifted.extend(std::iter::repeat_n(b' ', shift));
        shifted.extend(&bytes[8 + header..]);
        std::fs::write(model.join("model.safetensors"), shifted).unwrap();
        std::fs::copy(made.join("config.json"), model.join("config.json")).unwrap();
        check_same_bits(&model);
    }
}

/// Tensors of bf16 values in another element type.
fn converted(tensors: &HashMap<String, Tensor>, dtype: Dtype) -> HashMap<String, Tensor> {
    let convert = |tensor: &Tensor| {
        let values = tensor.data.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32());
        let data = match dtype {
            Dtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
            _ => values.flat_map(|value| half::f16::from_f32(value).to_le_bytes()).collect(),
        };
        Tensor { dtype, shape: tensor.shape.clone(), data }
    };
    tensors.iter().map(|(name, tensor)| (name.clone(), convert(tensor))).collect()
}

/// f32 holds bf16 values as they are; f16 rounds those below 2^-14 only, far below what the bound sees.
#[test]
fn files_of_other_element_types() {
    let dir = TempDir::new().unwrap();
    let made = dir.path().join("made");
    synth("tiny@11", &made, &[]);
    let tensors = read_tensors(&made);
    for (name, dtype) in [("float32", Dtype::F32), ("float16", Dtype::F16)] {
        let model = dir.path().join(name);
        write_single(&model, &converted(&tensors, dtype), &made, |config| config["torch_dtype"] = json!(name));
        for way in [WAYS[0], &["--max-memory", "0:64MiB,1:64MiB"], &["--max-memory", "0:32MiB,cpu:64MiB,disk"]] {
            check_golden(CASE, &model, way);
        }
        // A plan counts the bytes of the files, and is followed.
        let plan = cogvlm_json(&["plan", arg(&model), "--backend", "cpu", "--json", "--max-memory", "0:64MiB"]);
        let size = if dtype == Dtype::F32 { 4 } else { 2 };
        assert_eq!(plan["devices"]["0"]["weight_bytes"], 10_119_136 * size);
        let file = write_json(dir.path(), "plan.json", &plan);
        check_golden(CASE, &model, &["--device-map", arg(&file)]);
    }
    // Plans for bf16 weights do not hold for files of f32: what is there counts.
    let plan = cogvlm_json(&["plan", "tiny", "--backend", "cpu", "--json", "--max-memory", "0:32MiB"]);
    let file = write_json(dir.path(), "plan.json", &plan);
    let flags = ["--input-ids", arg(&write_json(dir.path(), "ids.json", &json!([5]))), "--device-map", arg(&file)]
        .map(str::to_owned);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let error =
        common::refusal(&[&["generate", "--model", arg(&dir.path().join("float32"))], flags.as_slice()].concat(), 1);
    assert!(error.contains("`0`") && error.contains("budget"), "{error}");
}

/// Where frequencies are not stored, the formula gives them: another answer than the stored, rounded ones.
#[test]
fn a_checkpoint_without_inv_freq() {
    let case = "extra/one_head/no_inv_freq";
    let dir = TempDir::new().unwrap();
    let (made, without) = (dir.path().join("made"), dir.path().join("without"));
    synth(&format!("{}@22", arg(&repo("tests/goldens/extra/one_head/config.json"))), &made, &[]);
    let mut tensors = read_tensors(&made);
    let before = tensors.len();
    tensors.retain(|name, _| !name.ends_with("inv_freq"));
    assert!(tensors.len() < before);
    write_single(&without, &tensors, &made, |_| ());
    for way in [WAYS[0], WAYS[1]] {
        check_golden(case, &without, way);
    }
    let (stored, _) = ask(case, arg(&made), &["--dtype", "f32"]);
    let error = distance(case, &stored);
    // Recorded: at least 4.6e-5 on the cases that the mistake can touch.
    assert!(error > 2.0 * F32_BOUND, "stored frequencies give the same: {error:e}");
    let report = cogvlm(&["inspect", arg(&without)]);
    assert!(report.code == 0 && report.stdout.contains("computed by the formula"), "{}", report.stdout);
}

/// What rests on disk is used where it lies: a rank that holds no byte of the weights, and the host without a budget.
#[test]
fn weights_can_stay_in_the_file() {
    let dir = TempDir::new().unwrap();
    let model = dir.path().join("model");
    synth("tiny@11", &model, &["--max-shard-size", "3MB"]);
    let expected = ask(CASE, "tiny@11", &["--dtype", "f32"]).0;
    for (map, budgets) in [
        (json!({"": "disk"}), "cpu:16MiB"),
        (json!({"": "disk", "lm_head": 0}), "0:32MiB,cpu:4MiB"),
        (json!({"": "cpu", "model.vision": "disk"}), "cpu:64MiB"),
    ] {
        let file = write_json(dir.path(), "map.json", &map);
        let flags = ["--dtype", "f32", "--device-map", arg(&file), "--max-memory", budgets];
        assert!(ask(CASE, arg(&model), &flags).0 == expected, "{map}");
    }
    // A synthetic model has no file: it is told so.
    let file = write_json(dir.path(), "map.json", &json!({"": "disk"}));
    let ids = write_json(dir.path(), "ids.json", &json!([5]));
    let flags = ["generate", "--model", "tiny@11", "--input-ids", arg(&ids), "--device-map", arg(&file)];
    let error = common::refusal(&flags, 1);
    assert!(error.contains("synth") && error.contains("cpu"), "{error}");
}

/// 4 decoder layers of 1024: about 340 MB of weights, and next to no activations.
fn write_wide_config(dir: &Path) -> PathBuf {
    let mut config = read_json("tests/goldens/extra/odd/config.json");
    for (key, value) in [
        ("hidden_size", 1024),
        ("intermediate_size", 2816),
        ("num_hidden_layers", 4),
        ("num_attention_heads", 8),
        ("num_key_value_heads", 8),
    ] {
        if config.get(key).is_some() {
            config[key] = json!(value);
        }
    }
    write_json(dir, "wide.json", &config)
}

/// The most anonymous memory that a process held while it ran, in bytes: what it copied, not what it mapped.
fn peak_anonymous_bytes(child: &mut Child) -> u64 {
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait().unwrap().is_none() {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        peak = peak.max(kib.unwrap_or(0) * 1024);
        std::thread::sleep(Duration::from_millis(2));
    }
    peak
}

#[test]
fn the_host_rank_copies_no_weight() {
    let dir = TempDir::new().unwrap();
    let model = dir.path().join("wide");
    synth(&format!("{}@3", arg(&write_wide_config(dir.path()))), &model, &[]);
    let ids = write_json(dir.path(), "ids.json", &json!([5, 6, 7]));
    let run = |budgets: &str| {
        let mut child = without_gpus(&mut Command::new(env!("CARGO_BIN_EXE_cogvlm-shard")))
            .args(["generate", "--json", "--model", arg(&model), "--input-ids", arg(&ids), "--max-memory", budgets])
            .args(["--context", "64", "--max-new-tokens", "20", "--ignore-eos", "--threads", "2"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let peak = peak_anonymous_bytes(&mut child);
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{budgets}");
        (peak, serde_json::from_slice::<Value>(&output.stdout).unwrap()["output_ids"].clone())
    };
    let plan = |budgets: &str| {
        cogvlm_json(&["plan", arg(&model), "--json", "--backend", "cpu", "--context", "64", "--max-memory", budgets])
    };
    let of = |plan: &Value, device: &str, key: &str| plan["devices"][device][key].as_u64().unwrap();
    let host = plan("cpu:2GiB");
    let weights = of(&host, "cpu", "weight_bytes");
    assert!(weights > 300_000_000, "{weights}");
    // Workspace and cache as planned; stacks, heap and tables of the program itself; scratch of two threads.
    let fixed = 8 << 20;
    let bound = of(&host, "cpu", "kv_bytes") + of(&host, "cpu", "workspace_bytes") + fixed;
    assert!(bound < weights / 6, "{bound} of {weights}");
    let (in_place, said) = run("cpu:2GiB");
    assert!(in_place > 1 << 20, "nothing was measured");
    assert!(in_place <= bound, "{in_place} bytes are anonymous, {bound} are allowed");
    // A numbered rank copies, as a card does, and the bound says so.
    let (copied, same) = run("0:2GiB");
    assert!(copied >= weights && copied > bound, "{copied}");
    assert_eq!(said, same);
}
