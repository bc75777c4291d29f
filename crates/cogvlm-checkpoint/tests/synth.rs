//! Synthetic models, written, opened and hashed.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use cogvlm_checkpoint::{
    Checkpoint, DEFAULT_MAX_SHARD_BYTES, ModelSource, Monitor, Progress, SyntheticModel, digest, hash_files,
    hash_tensors, write_checkpoint,
};
use sha2::{Digest, Sha256};

/// A model of a few kilobytes.
const NANO: &str = r#"{
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 16,
    "vision_config": {
        "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1, "num_heads": 2, "image_size": 28,
        "patch_size": 14, "in_channels": 3, "num_positions": 5, "layer_norm_eps": 1e-6
    }
}"#;

fn synthetic(model: &str) -> ModelSource {
    ModelSource::open(model).unwrap()
}

fn nano(seed: u64) -> SyntheticModel {
    SyntheticModel::from_config_json("nano", NANO, seed).unwrap()
}

fn write(model: &SyntheticModel, dir: &Path, max_shard_bytes: u64) -> Result<cogvlm_checkpoint::Written, String> {
    write_checkpoint(model, dir, max_shard_bytes, &Monitor::silent()).map_err(|error| error.to_string())
}

fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn read_all(source: &ModelSource) -> HashMap<String, Vec<u8>> {
    let read = |info: &cogvlm_checkpoint::TensorInfo| {
        let mut bytes = vec![0; info.num_bytes()];
        source.read_into(&info.spec.name, &mut bytes).unwrap();
        (info.spec.name.clone(), bytes)
    };
    source.tensors().iter().map(read).collect()
}

#[test]
fn digests_are_the_specified_ones() {
    for (model, expected) in [
        ("tiny@11", "f0df3b8de6d3b1cde936f60b112e8a3569a1943c75c28c94a02288db23277e9d"),
        ("small@12", "05b8af8b6a2d48825856f36cb4c1f81cf5da1e9304fb3ada613cbe2448677f50"),
        ("deep@0xd", "ca485308da03f33eb4f627dd1f2368573a0aed6c8a0734f53e65aebe4ff6cce5"),
    ] {
        assert_eq!(digest(&synthetic(model), &Monitor::silent()).unwrap(), expected, "{model}");
    }
}

#[test]
fn whole_tensors_of_the_17b_model_are_the_specified_ones() {
    let source = synthetic("cogvlm-chat-17b@1");
    for (tensor, expected) in [
        (
            "model.vision.transformer.layers.62.mlp.fc1.weight",
            "c19df6ceaa7ad33e7687949aa1bd910cd1b26bad62eca4d349f74248d0d517d0",
        ),
        (
            "model.layers.31.mlp.language_mlp.gate_proj.weight",
            "24a03308f8760414b82c8aa222a42a63c55b6b7d963a3a228f4fabb146c7f451",
        ),
        ("lm_head.weight", "ead3b55935f8cad8c7c6c9453291b1f3889d236b13ebc64b0cf1194f8ee66de6"),
    ] {
        let mut bytes = vec![0; source.info(tensor).unwrap().num_bytes()];
        source.read_into(tensor, &mut bytes).unwrap();
        let sha256: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(sha256, expected, "{tensor}");
    }
}

#[test]
fn a_written_model_reads_back_as_it_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let model = SyntheticModel::parse("tiny@11").unwrap();
    for (layout, max_shard_bytes, num_files) in [("one", DEFAULT_MAX_SHARD_BYTES, 1), ("many", 1_000_000, 7)] {
        let out = dir.path().join(layout);
        let written = write(&model, &out, max_shard_bytes).unwrap();
        assert_eq!((written.files.len(), written.tensor_bytes, written.already_there), (num_files, 20_238_272, false));
        let checkpoint = Checkpoint::open(&out).unwrap();
        assert_eq!(checkpoint.notices(), []);
        assert_eq!(checkpoint.config(), model.config());
        let config: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(out.join("config.json")).unwrap()).unwrap();
        let built_in: serde_json::Value =
            serde_json::from_str(cogvlm_core::config::built_in_json("tiny").unwrap()).unwrap();
        assert_eq!(config, built_in);
        let source = ModelSource::open(out.to_str().unwrap()).unwrap();
        let made = read_all(&synthetic("tiny@11"));
        let read = read_all(&source);
        assert!(made == read, "{layout}");
        for (name, bytes) in &made {
            assert!(checkpoint.tensor(name).unwrap().bytes() == bytes, "{name} mapped");
            assert!(source.mapped(name).unwrap().bytes() == bytes, "{name} mapped");
        }
        assert_eq!(
            digest(&source, &Monitor::silent()).unwrap(),
            digest(&synthetic("tiny@11"), &Monitor::silent()).unwrap()
        );
    }
    // Another implementation of the format reads the same.
    let bytes = fs::read(dir.path().join("one/model.safetensors")).unwrap();
    let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let made = read_all(&synthetic("tiny@11"));
    assert_eq!(read.len(), made.len());
    assert!(made.iter().all(|(name, bytes)| read.tensor(name).unwrap().data() == bytes));
}

#[test]
fn the_json_files_are_the_specified_ones() {
    let dir = tempfile::tempdir().unwrap();
    write(&nano(3), dir.path(), 1).unwrap();
    let json = |name: &str| -> serde_json::Value {
        serde_json::from_str(&fs::read_to_string(dir.path().join(name)).unwrap()).unwrap()
    };
    assert_eq!(fs::read_to_string(dir.path().join("config.json")).unwrap(), NANO);
    assert_eq!(
        json("generation_config.json"),
        serde_json::json!({
            "_from_model_config": true, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "transformers_version": "4.35.0"
        })
    );
    let index = json("model.safetensors.index.json");
    assert_eq!(
        index["metadata"]["total_size"],
        nano(3).tensors().iter().map(|tensor| tensor.num_bytes()).sum::<usize>()
    );
    let names: Vec<_> = index["weight_map"].as_object().unwrap().keys().cloned().collect();
    assert!(names.is_sorted());
    assert_eq!(names.len(), nano(3).tensors().len());
    // With a limit below every tensor, each has a file of its own.
    assert_eq!(index["weight_map"]["model.embed_tokens.weight"], "model-00001-of-00053.safetensors");
    assert_eq!(index["weight_map"]["lm_head.weight"], "model-00053-of-00053.safetensors");
}

#[test]
fn a_full_directory_is_refused_unless_it_holds_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let shard_bytes = 2_000;
    write(&nano(3), &out, shard_bytes).unwrap();
    let before = listing(&out);
    assert!(write(&nano(3), &out, shard_bytes).unwrap().already_there);
    let refused = |model: &SyntheticModel, shard_bytes| {
        let message = write(model, &out, shard_bytes).unwrap_err();
        let prefix = format!("`{}` is not empty and is not the checkpoint to write: ", out.display());
        let reason = message.strip_prefix(&prefix).and_then(|rest| rest.strip_suffix("; choose another directory"));
        reason.unwrap_or_else(|| panic!("{message}")).to_owned()
    };
    assert_eq!(refused(&nano(4), shard_bytes), "`model.embed_tokens.weight` differs");
    assert_eq!(refused(&nano(3), 2 * shard_bytes), "`model.safetensors.index.json` differs");
    assert_eq!(
        refused(&SyntheticModel::parse("tiny@3").unwrap(), shard_bytes),
        "`model.safetensors.index.json` differs"
    );
    let last = out.join(before.iter().rfind(|name| name.ends_with(".safetensors")).unwrap());
    let mut bytes = fs::read(&last).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&last, bytes).unwrap();
    assert_eq!(refused(&nano(3), shard_bytes), "`lm_head.weight` differs");
    fs::remove_file(&last).unwrap();
    assert!(refused(&nano(3), shard_bytes).starts_with("it has no `model-"));
    let other = dir.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("thesis.tex"), "do not lose me").unwrap();
    let message = write(&nano(3), &other, shard_bytes).unwrap_err();
    assert!(message.contains("it has no `model.safetensors.index.json`"), "{message}");
    assert_eq!(listing(&other), ["thesis.tex"]);
}

#[test]
fn a_cancelled_or_failed_write_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let model = SyntheticModel::parse("tiny@11").unwrap();
    let cancel = AtomicBool::new(false);
    let partial_seen = AtomicBool::new(false);
    let on_progress = |Progress { done_bytes, total_bytes }| {
        assert!(done_bytes <= total_bytes);
        partial_seen.fetch_or(out.join("model.safetensors.partial").exists(), Ordering::Relaxed);
        cancel.store(true, Ordering::Relaxed);
    };
    let monitor = Monitor { on_progress: &on_progress, cancel: &cancel };
    let error = write_checkpoint(&model, &out, DEFAULT_MAX_SHARD_BYTES, &monitor).unwrap_err();
    assert_eq!(error.to_string(), "cancelled");
    assert!(partial_seen.load(Ordering::Relaxed));
    assert!(!out.exists());
    // A directory that was there before stays; what an interrupted run left in it is no obstacle.
    fs::create_dir(&out).unwrap();
    fs::write(out.join("model.safetensors.partial"), "half a file, and longer than the new one? no matter").unwrap();
    assert!(write_checkpoint(&model, &out, DEFAULT_MAX_SHARD_BYTES, &monitor).is_err());
    assert!(listing(&out).is_empty());
    fs::write(out.join("model.safetensors.partial"), "half a file").unwrap();
    write(&model, &out, DEFAULT_MAX_SHARD_BYTES).unwrap();
    assert_eq!(listing(&out), ["config.json", "generation_config.json", "model.safetensors"]);
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(
        write(&model, &file, DEFAULT_MAX_SHARD_BYTES)
            .unwrap_err()
            .starts_with(&format!("cannot write `{}`", file.display()))
    );
}

#[test]
fn two_processes_do_not_write_the_same_files() {
    let dir = tempfile::tempdir().unwrap();
    let partial = dir.path().join("model.safetensors.partial");
    fs::write(&partial, "the other's data").unwrap();
    let other = fs::File::open(&partial).unwrap();
    other.lock().unwrap();
    let message = write(&nano(3), dir.path(), DEFAULT_MAX_SHARD_BYTES).unwrap_err();
    let expected = "is being written by another process; wait for it, or choose another directory";
    assert_eq!(message, format!("`{}` {expected}", partial.display()));
    assert_eq!(fs::read_to_string(&partial).unwrap(), "the other's data");
}

#[test]
fn progress_ends_at_the_total() {
    let last = Mutex::new(Progress { done_bytes: 0, total_bytes: 0 });
    let on_progress = |progress: Progress| {
        let mut last = last.lock().unwrap();
        if progress.done_bytes > last.done_bytes {
            *last = progress;
        }
    };
    let monitor = Monitor { on_progress: &on_progress, cancel: &AtomicBool::new(false) };
    let whole = Progress { done_bytes: 20_238_272, total_bytes: 20_238_272 };
    let take = || std::mem::replace(&mut *last.lock().unwrap(), Progress { done_bytes: 0, total_bytes: 0 });
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(&SyntheticModel::parse("tiny@1").unwrap(), dir.path(), 5_000_000, &monitor).unwrap();
    assert_eq!(take(), whole);
    let source = ModelSource::open(dir.path().to_str().unwrap()).unwrap();
    digest(&source, &monitor).unwrap();
    assert_eq!(take(), whole);
    hash_tensors(&source, &monitor).unwrap();
    assert_eq!(take(), whole);
    let ModelSource::Checkpoint(checkpoint) = &source else { panic!("a directory was opened") };
    hash_files(checkpoint, &monitor).unwrap();
    let progress = take();
    assert_eq!(progress.done_bytes, progress.total_bytes);
    monitor.cancel.store(true, Ordering::Relaxed);
    for result in [digest(&source, &monitor), hash_tensors(&source, &monitor).map(|hashes| hashes.combined)] {
        assert_eq!(result.unwrap_err().to_string(), "cancelled");
    }
    assert_eq!(hash_files(checkpoint, &monitor).unwrap_err().to_string(), "cancelled");
}

#[test]
fn hashes_are_what_sha256sum_prints() {
    let dir = tempfile::tempdir().unwrap();
    write(&nano(3), dir.path(), 2_000).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let hex = |bytes: &[u8]| -> String { Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect() };
    let files = hash_files(&checkpoint, &Monitor::silent()).unwrap();
    assert_eq!(files.len(), checkpoint.files().len());
    assert!(files.len() > 1);
    for file in &files {
        assert_eq!(file.sha256, hex(&fs::read(&file.path).unwrap()));
    }
    let source = ModelSource::Checkpoint(checkpoint.clone());
    let hashes = hash_tensors(&source, &Monitor::silent()).unwrap();
    let mut list = String::new();
    for (hash, info) in hashes.tensors.iter().zip(checkpoint.tensors()) {
        assert_eq!(hash.name, info.spec.name);
        assert_eq!(hash.sha256, hex(checkpoint.tensor(&hash.name).unwrap().bytes()));
        list += &format!("{}  {}\n", hash.sha256, hash.name);
    }
    assert_eq!(hashes.tensors.len(), checkpoint.tensors().len());
    assert_eq!(hashes.combined, hex(list.as_bytes()));
    let made = hash_tensors(&ModelSource::Synthetic(nano(3).into()), &Monitor::silent()).unwrap();
    assert_eq!(made, hashes);
    let other = hash_tensors(&ModelSource::Synthetic(nano(4).into()), &Monitor::silent()).unwrap();
    assert_ne!(other.combined, hashes.combined);
}

#[test]
fn names_and_seeds_are_checked() {
    let refused = |model: &str| SyntheticModel::parse(model).unwrap_err().to_string();
    assert_eq!(
        refused("tiny"),
        "`tiny` names a configuration, which has no weights; `tiny@1` has the synthetic weights of seed 1"
    );
    assert_eq!(ModelSource::open("tiny").unwrap_err().to_string(), refused("tiny"));
    assert_eq!(
        refused("tiny@-1"),
        "`-1` in `tiny@-1` is not a seed; give a number from 0 to 18446744073709551615, in decimal or as 0x…"
    );
    assert_eq!(
        refused("huge@1"),
        "there is no built-in configuration `huge`; there are `tiny`, `small`, `deep`, `cogvlm-chat-17b`, \
         `cogvlm-base-490-17b`, `cogvlm-base-224-17b`, `cogvlm2-19b`"
    );
    assert_eq!(
        refused("cogvlm2-19b@1"),
        "`cogvlm2-19b` is a CogVLM2 model, for which no synthetic weights are defined; it can be planned only"
    );
    assert_eq!(refused("cogvlm2-19b"), refused("cogvlm2-19b@1"));
    for (key, value, message) in [
        (
            "\"num_hidden_layers\": 2",
            "\"num_hidden_layers\": 16000000",
            "`vast`: `num_hidden_layers` is 16000000, but it must lie between 1 and 256",
        ),
        (
            "\"hidden_size\": 8,",
            "\"hidden_size\": -8,",
            "`vast`: not a usable CogVLM configuration: invalid value: \
             integer `-8`, expected usize at line 2 column 21",
        ),
    ] {
        let json = NANO.replacen(key, value, 1);
        assert_ne!(json, NANO);
        assert_eq!(SyntheticModel::from_config_json("vast", &json, 1).unwrap_err().to_string(), message);
    }
    let patches = NANO.replace("\"image_size\": 28", "\"image_size\": 16384").replace("14,", "16384,");
    let vast = patches
        .replace("\"num_positions\": 5", "\"num_positions\": 2")
        .replace("\"hidden_size\": 4", "\"hidden_size\": 131072");
    assert_eq!(
        SyntheticModel::from_config_json("vast", &vast, 1).unwrap_err().to_string(),
        "`vast` describes a model with a tensor of more than 2^40 elements; no machine could hold it"
    );
    assert_eq!(SyntheticModel::parse("tiny@18446744073709551615").unwrap().seed(), u64::MAX);
    assert_eq!(
        ModelSource::open("no/such/dir@1").unwrap_err().to_string(),
        "`no/such/dir@1` is not a directory; give the directory that holds config.json and the .safetensors files"
    );
}

#[test]
fn reads_fit_their_tensor() {
    let source = ModelSource::Synthetic(nano(3).into());
    let refused = |result: Result<(), cogvlm_checkpoint::CheckpointError>| result.unwrap_err().to_string();
    let name = "model.embed_tokens.weight";
    let fit = "of `model.embed_tokens.weight`, which has 128, do not fit a buffer of";
    assert_eq!(refused(source.read_into(name, &mut [0; 255])), format!("elements 0..128 {fit} 255 bytes"));
    assert_eq!(
        refused(source.read_range_into(name, 127..129, &mut [0; 4])),
        format!("elements 127..129 {fit} 4 bytes")
    );
    let backwards = std::ops::Range { start: 2, end: 1 };
    assert_eq!(refused(source.read_range_into(name, backwards, &mut [])), format!("elements 2..1 {fit} 0 bytes"));
    assert_eq!(refused(source.read_into("lm_head", &mut [])), "there is no tensor `lm_head` in this model");
    assert!(source.get("lm_head").is_none());
    assert!(source.mapped(name).is_none());
    let mut whole = vec![0; 256];
    source.read_into(name, &mut whole).unwrap();
    let mut part = vec![0; 20];
    source.read_range_into(name, 70..80, &mut part).unwrap();
    assert_eq!(part, whole[140..160]);
}
