//! Checkpoints as downloads, disks and people break them: each is refused, with a message that names file and tensor
//! and says what to do.

use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;

use cogvlm_checkpoint::{Advice, Checkpoint, ModelSource, Monitor, Notice, SyntheticModel, inspect, write_checkpoint};
use cogvlm_core::{DType, ModelConfig};
use serde_json::{Value, json};

/// A model of a few kilobytes.
const NANO: &str = r#"{
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 16,
    "vision_config": {
        "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1, "num_heads": 2, "image_size": 28,
        "patch_size": 14, "in_channels": 3, "num_positions": 5, "layer_norm_eps": 1e-6
    }
}"#;
const ONE_FILE: u64 = u64::MAX;
const THREE_FILES: u64 = 5_000;
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const FIRST: &str = "model-00001-of-00003.safetensors";
const SECOND: &str = "model-00002-of-00003.safetensors";
const REVISION: &str = "download both again from one revision of the model";

fn write_nano(dir: &Path, max_shard_bytes: u64) {
    let model = SyntheticModel::from_config_json("nano", NANO, 3).unwrap();
    write_checkpoint(&model, dir, max_shard_bytes, &Monitor::silent()).unwrap();
}

/// Opens a checkpoint after `break_it` had its way with it, and expects `message`, with `DIR` for its directory.
fn check(max_shard_bytes: u64, break_it: impl FnOnce(&Path), message: &str) {
    let dir = tempfile::tempdir().unwrap();
    write_nano(dir.path(), max_shard_bytes);
    Checkpoint::open(dir.path()).expect("the checkpoint is whole before it is broken");
    break_it(dir.path());
    assert_eq!(refusal(dir.path()), message);
}

fn refusal(dir: &Path) -> String {
    let message = Checkpoint::open(dir).expect_err("a broken checkpoint must be refused").to_string();
    assert!(!message.contains('\n'), "{message}");
    message.replace(dir.to_str().unwrap(), "DIR")
}

/// Header text and data of a safetensors file.
fn split(path: &Path) -> (String, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (String::from_utf8(bytes[8..8 + length].to_vec()).unwrap(), bytes[8 + length..].to_vec())
}

fn join(path: &Path, header: &str, data: &[u8]) {
    fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()).unwrap();
}

fn edit_text(path: &Path, edit: impl FnOnce(String) -> String) {
    let (header, data) = split(path);
    join(path, &edit(header), &data);
}

/// Edits header and data of a weight file.
fn edit(path: &Path, edit: impl FnOnce(&mut Value, &mut Vec<u8>)) {
    let (header, mut data) = split(path);
    let mut header = serde_json::from_str(&header).unwrap();
    edit(&mut header, &mut data);
    join(path, &header.to_string(), &data);
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut json = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    edit(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

/// Takes the tensor called `name` out of a file, entry and data, and returns both.
fn take(path: &Path, name: &str) -> (Value, Vec<u8>) {
    let mut taken = None;
    edit(path, |header, data| {
        let entry = header.as_object_mut().unwrap().shift_remove(name).unwrap();
        let [begin, end] = [0, 1].map(|index| entry["data_offsets"][index].as_u64().unwrap());
        let bytes = data.drain(begin as usize..end as usize).collect();
        for (_, other) in header.as_object_mut().unwrap().iter_mut().filter(|(name, _)| *name != "__metadata__") {
            for index in [0, 1] {
                let offset = other["data_offsets"][index].as_u64().unwrap();
                other["data_offsets"][index] = json!(if offset >= end { offset - (end - begin) } else { offset });
            }
        }
        taken = Some((entry, bytes));
    });
    taken.unwrap()
}

/// Appends a tensor to a file.
fn put(path: &Path, name: &str, dtype: &str, shape: Value, bytes: &[u8]) {
    edit(path, |header, data| {
        let begin = data.len();
        data.extend_from_slice(bytes);
        header[name] = json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, data.len()]});
    });
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const QKV: &str = "model.layers.0.self_attn.vision_expert_query_key_value.weight";
const NORM: &str = "model.norm.weight";

// ---------------------------------------------------------------- directories

#[test]
fn nothing_there() {
    let dir = tempfile::tempdir().unwrap();
    let hint = "give the directory that holds config.json and the .safetensors files";
    let absent = dir.path().join("absent");
    assert_eq!(refusal(&absent), format!("`DIR` is not a directory; {hint}"));
    fs::write(&absent, "").unwrap();
    assert_eq!(refusal(&absent), format!("`DIR` is not a directory; {hint}"));
    let no_weights = "`DIR` holds no weights: neither model.safetensors nor model.safetensors.index.json";
    let empty = dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    assert_eq!(refusal(&empty), format!("{no_weights}; it is empty"));
    fs::write(empty.join("README.md"), "").unwrap();
    fs::write(empty.join("config.json"), NANO).unwrap();
    assert_eq!(refusal(&empty), format!("{no_weights}, only `README.md`, `config.json`"));
}

#[test]
fn weights_of_another_format_only() {
    for file in ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt"] {
        let only_torch = |dir: &Path| fs::rename(dir.join(WEIGHTS), dir.join(file)).unwrap();
        let message = format!(
            "`DIR` holds PyTorch weights (`{file}`) and no safetensors; convert the checkpoint to safetensors first"
        );
        check(ONE_FILE, only_torch, &message);
    }
}

#[test]
fn unfinished_downloads() {
    let unfinished =
        |name: &str| format!("`DIR/{name}` is an unfinished file; let its download finish, or start it again");
    let whole = |dir: &Path| fs::rename(dir.join(WEIGHTS), dir.join("model.safetensors.incomplete")).unwrap();
    check(ONE_FILE, whole, &unfinished("model.safetensors.incomplete"));
    let synth = |dir: &Path| fs::rename(dir.join(WEIGHTS), dir.join("model.safetensors.partial")).unwrap();
    check(ONE_FILE, synth, &unfinished("model.safetensors.partial"));
    let shard = format!("{SECOND}.incomplete");
    check(THREE_FILES, |dir| fs::rename(dir.join(SECOND), dir.join(&shard)).unwrap(), &unfinished(&shard));
    let message =
        format!("`DIR/{SECOND}` does not exist; the index names 3 files, of which 1 are absent: download them");
    check(THREE_FILES, |dir| fs::remove_file(dir.join(SECOND)).unwrap(), &message);
    let message = format!(
        "`DIR` holds shards (`{FIRST}`) but no model.safetensors.index.json; download the index of the same revision"
    );
    check(THREE_FILES, |dir| fs::remove_file(dir.join(INDEX)).unwrap(), &message);
    let message =
        "`DIR/config.json` does not exist; it is part of every checkpoint in Hugging Face layout: download it";
    check(ONE_FILE, |dir| fs::remove_file(dir.join("config.json")).unwrap(), message);
}

#[test]
fn single_file_and_index_at_once() {
    let message = "`DIR` holds both model.safetensors and model.safetensors.index.json; remove the one that is stale";
    check(THREE_FILES, |dir| fs::write(dir.join(WEIGHTS), "").unwrap(), message);
}

#[test]
fn the_root_of_a_hub_cache() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("snapshots/4df3")).unwrap();
    assert_eq!(
        refusal(dir.path()),
        "`DIR` is the root of a model in a Hub cache; give one of the directories in `DIR/snapshots`"
    );
}

#[test]
fn a_hub_snapshot_of_links_opens() {
    let cache = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (cache.path().join("blobs"), cache.path().join("snapshots/4df3"));
    write_nano(&blobs, THREE_FILES);
    fs::create_dir_all(&snapshot).unwrap();
    for (number, entry) in fs::read_dir(&blobs).unwrap().map(Result::unwrap).enumerate() {
        fs::rename(entry.path(), blobs.join(number.to_string())).unwrap();
        symlink(Path::new("../../blobs").join(number.to_string()), snapshot.join(entry.file_name())).unwrap();
    }
    let linked_dir = cache.path().join("main");
    symlink(&snapshot, &linked_dir).unwrap();
    for dir in [&snapshot, &linked_dir] {
        let checkpoint = Checkpoint::open(dir).unwrap();
        assert_eq!((checkpoint.files().len(), checkpoint.tensors().len()), (3, 53));
    }
    let blob = fs::read_link(snapshot.join(SECOND)).unwrap();
    fs::remove_file(snapshot.join(&blob)).unwrap();
    let message =
        format!("`DIR/{SECOND}` is a link to `{}`, which does not exist; download the model again", blob.display());
    assert_eq!(refusal(&snapshot), message);
}

#[test]
fn things_that_are_no_files() {
    for name in [WEIGHTS, "config.json"] {
        let replace = |dir: &Path| {
            fs::remove_file(dir.join(name)).unwrap();
            fs::create_dir(dir.join(name)).unwrap();
        };
        check(ONE_FILE, replace, &format!("`DIR/{name}` is not a regular file"));
    }
    let endless = |dir: &Path| {
        fs::remove_file(dir.join(WEIGHTS)).unwrap();
        symlink("/dev/zero", dir.join(WEIGHTS)).unwrap();
    };
    check(ONE_FILE, endless, "`DIR/model.safetensors` is not a regular file");
}

#[test]
fn files_that_the_system_does_not_open() {
    // A loop of links: unlike permissions, that stops every user.
    let unreadable = |dir: &Path| {
        fs::remove_file(dir.join(WEIGHTS)).unwrap();
        symlink(WEIGHTS, dir.join(WEIGHTS)).unwrap();
    };
    check(ONE_FILE, unreadable, "cannot read `DIR/model.safetensors`: Too many levels of symbolic links (os error 40)");
}

// ---------------------------------------------------------------- other files under the right name

#[test]
fn foreign_files() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 4938985248\n";
    let lfs = "is a Git LFS pointer instead of the file itself; run `git lfs pull` in its directory";
    let torch = "is a PyTorch pickle, not safetensors; convert the checkpoint to safetensors first";
    let page = "is a web page, as a failed download leaves it; download the file again";
    let gguf = "is a GGUF file, not safetensors; download the model in Hugging Face layout";
    for (start, message) in [
        (pointer.as_bytes(), lfs),
        (b"PK\x03\x04\x14\x00\x08\x08 archive/data.pkl", torch),
        (b"\x80\x02}q\x00(X\x0c\x00\x00\x00", torch),
        (b"<!DOCTYPE html><html><title>404</title></html>", page),
        (b"\n <html><title>404</title></html>", page),
        (b"GGUF\x03\x00\x00\x00\x23\x01", gguf),
    ] {
        check(ONE_FILE, |dir| fs::write(dir.join(WEIGHTS), start).unwrap(), &format!("`DIR/{WEIGHTS}` {message}"));
        check(THREE_FILES, |dir| fs::write(dir.join(SECOND), start).unwrap(), &format!("`DIR/{SECOND}` {message}"));
    }
    for name in ["config.json", INDEX] {
        check(THREE_FILES, |dir| fs::write(dir.join(name), pointer).unwrap(), &format!("`DIR/{name}` {lfs}"));
    }
}

// ---------------------------------------------------------------- config.json

#[test]
fn configurations() {
    let set = |text: &'static str| move |dir: &Path| fs::write(dir.join("config.json"), text).unwrap();
    let prefix = "`DIR/config.json`: not a usable CogVLM configuration:";
    check(ONE_FILE, set(""), &format!("{prefix} EOF while parsing a value at line 1 column 0"));
    check(
        ONE_FILE,
        set("{\"hidden_size\": 8}"),
        &format!("{prefix} missing field `intermediate_size` at line 1 column 18"),
    );
    check(
        ONE_FILE,
        set("{\"hidden_size\": 8, \"hidden_size\": 9}"),
        &format!("{prefix} duplicate field `hidden_size` at line 1 column 32"),
    );
    let binary = |dir: &Path| fs::write(dir.join("config.json"), b"{\"a\": \"\xff\"}").unwrap();
    check(ONE_FILE, binary, "`DIR/config.json` is malformed: not UTF-8 (byte 7)");
    let heads = |dir: &Path| edit_json(&dir.join("config.json"), |config| config["num_attention_heads"] = json!(3));
    check(
        ONE_FILE,
        heads,
        "`DIR/config.json`: `num_attention_heads` is 3, but hidden_size 8 must divide into heads of an even size",
    );
    let deep = |dir: &Path| edit_json(&dir.join("config.json"), |config| config["num_hidden_layers"] = json!(200));
    let message = "config.json describes 201 layers, but the files in `DIR` hold only 53 tensors";
    check(ONE_FILE, deep, &format!("{message}; {REVISION}"));
}

#[test]
fn a_configuration_can_be_given() {
    let dir = tempfile::tempdir().unwrap();
    write_nano(dir.path(), ONE_FILE);
    fs::remove_file(dir.path().join("config.json")).unwrap();
    let config = ModelConfig::from_json(NANO).unwrap();
    assert_eq!(Checkpoint::open_with_config(dir.path(), config.clone(), "nano.json").unwrap().tensors().len(), 53);
    let wider = ModelConfig { intermediate_size: 16, ..config };
    let message = Checkpoint::open_with_config(dir.path(), wider, "wide.json").unwrap_err().to_string();
    let tensor = "model.layers.0.mlp.language_mlp.gate_proj.weight";
    let path = dir.path().join(WEIGHTS);
    assert_eq!(
        message,
        format!("`{tensor}` in `{}` is [12, 8], wide.json implies [16, 8]; {REVISION}", path.display())
    );
}

// ---------------------------------------------------------------- headers

/// Breaks `model.safetensors`, and expects a message about its header.
fn check_header(break_it: impl FnOnce(&Path), message: &str) {
    check(ONE_FILE, |dir| break_it(&dir.join(WEIGHTS)), &format!("`DIR/model.safetensors` cannot be used: {message}"));
}

#[test]
fn lengths_that_cannot_be() {
    let truncate =
        |len: u64| move |path: &Path| fs::OpenOptions::new().write(true).open(path).unwrap().set_len(len).unwrap();
    check_header(truncate(0), "it ends after 0 bytes, before its header; download it again");
    check_header(truncate(7), "it ends after 7 bytes, before its header; download it again");
    let dir = tempfile::tempdir().unwrap();
    write_nano(dir.path(), ONE_FILE);
    let (header, data) = split(&dir.path().join(WEIGHTS));
    let (header_bytes, file_bytes) = (header.len(), 8 + header.len() + data.len());
    let incomplete = format!("it declares a header of {header_bytes} bytes, and 92 follow; the download is incomplete");
    check_header(truncate(100), &incomplete);
    let one_less = file_bytes as u64 - 1;
    let truncated =
        format!("its data ends at byte {file_bytes} of the file, which has {one_less}; the download is incomplete");
    check_header(truncate(one_less), &truncated);
    let longer = file_bytes as u64 + 1;
    let trailing = format!(
        "its data ends at byte {file_bytes} of the file, which has {longer}; the bytes after it belong to no tensor"
    );
    check_header(truncate(longer), &trailing);
    let set_length = |length: u64| {
        move |path: &Path| {
            fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(&length.to_le_bytes(), 0).unwrap();
        }
    };
    let rest = file_bytes - 8;
    check_header(
        set_length(100_000_000),
        &format!("it declares a header of 100000000 bytes, and {rest} follow; the download is incomplete"),
    );
    let limit = "above the format's limit of 100000000; it is damaged, or no safetensors file";
    check_header(set_length(100_000_001), &format!("it declares a header of 100000001 bytes, {limit}"));
    check_header(set_length(u64::MAX), &format!("it declares a header of {} bytes, {limit}", u64::MAX));
}

#[test]
fn headers_that_are_no_json() {
    let set = |text: &'static str| move |path: &Path| join(path, text, b"");
    check_header(set(""), "its header is malformed: EOF while parsing a value at line 1 column 0");
    check_header(set("{\"a\": "), "its header is malformed: EOF while parsing a value at line 1 column 6");
    check_header(set("{} {}"), "its header is malformed: trailing characters at line 1 column 4");
    check_header(
        set("[1, 2]"),
        "its header is malformed: invalid type: sequence, expected an object with an entry for each tensor at line 1 column 0",
    );
    let nested = |path: &Path| join(path, &format!("{{\"a\": {}", "[".repeat(100_000)), b"");
    let no_object =
        "its header is malformed: invalid type: sequence, expected an object with `dtype`, `shape` and `data_offsets`";
    check_header(nested, &format!("{no_object} at line 1 column 6"));
    check_header(set("{\"a\": [\"BF16\", [0], [0, 0]]}"), &format!("{no_object} at line 1 column 6"));
    let binary = |path: &Path| {
        let (header, data) = split(path);
        let header = [&header.as_bytes()[..20], b"\xc3\x28", &header.as_bytes()[22..]].concat();
        fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_slice(), &data].concat()).unwrap();
    };
    check_header(binary, "its header is not UTF-8 (byte 20); it is damaged, or no safetensors file");
}

#[test]
fn entries_that_are_malformed() {
    let set = |key: &'static str, value: Value| move |path: &Path| edit(path, |header, _| header[NORM][key] = value);
    let malformed = |break_it: Box<dyn FnOnce(&Path)>, part: &str| {
        let dir = tempfile::tempdir().unwrap();
        write_nano(dir.path(), ONE_FILE);
        break_it(&dir.path().join(WEIGHTS));
        let message = refusal(dir.path());
        let prefix =
            format!("`DIR/model.safetensors` cannot be used: its header is malformed: {part} at line 1 column ");
        assert!(message.starts_with(&prefix), "{message}");
    };
    malformed(Box::new(set("shape", json!([-8]))), "invalid value: integer `-8`, expected usize");
    malformed(Box::new(set("shape", json!([8.5]))), "invalid type: floating point `8.5`, expected usize");
    malformed(Box::new(set("data_offsets", json!([1]))), "invalid length 1, expected a tuple of size 2");
    malformed(Box::new(set("data_offsets", json!([1, 2, 3]))), "trailing characters");
    malformed(
        Box::new(set("scale", json!(1))),
        "unknown field `scale`, expected one of `dtype`, `shape`, `data_offsets`",
    );
    let no_dtype = |path: &Path| edit(path, |header, _| drop(header[NORM].as_object_mut().unwrap().remove("dtype")));
    malformed(Box::new(no_dtype), "missing field `dtype`");
    let twice = |path: &Path| edit_text(path, |text| text.replacen("\"dtype\":", "\"dtype\":\"F32\",\"dtype\":", 1));
    malformed(Box::new(twice), "duplicate field `dtype`");
}

#[test]
fn duplicate_keys() {
    let again = |name: &'static str| {
        move |path: &Path| {
            edit_text(path, |text| {
                let entry = serde_json::from_str::<Value>(&text).unwrap()[name].to_string();
                text.replacen('{', &format!("{{\"{name}\":{entry},"), 1)
            });
        }
    };
    let undefined = "which of the two counts is undefined";
    check_header(again(NORM), &format!("its header lists `{NORM}` twice; {undefined}"));
    check_header(again("__metadata__"), &format!("its header lists `__metadata__` twice; {undefined}"));
    let in_metadata = |path: &Path| {
        edit_text(path, |text| text.replace("{\"format\":\"pt\"}", "{\"format\":\"pt\",\"format\":\"np\"}"))
    };
    check_header(in_metadata, &format!("its header lists `format` twice; {undefined}"));
    // The same key, spelt with an escape.
    let escaped = |path: &Path| {
        edit_text(path, |text| {
            let entry = serde_json::from_str::<Value>(&text).unwrap()[NORM].to_string();
            text.replacen('{', &format!("{{\"\\u006dodel.norm.weight\":{entry},"), 1)
        });
    };
    check_header(escaped, &format!("its header lists `{NORM}` twice; {undefined}"));
}

#[test]
fn element_types() {
    let hint = "only BF16, F16 and F32 can be read: use an unquantised checkpoint";
    for dtype in ["U8", "I8", "F8_E4M3", "F64", "bf16", ""] {
        let set = |path: &Path| edit(path, |header, _| header[NORM]["dtype"] = json!(dtype));
        check_header(set, &format!("`{NORM}` is stored as {dtype}; {hint}"));
    }
    let hostile = |path: &Path| edit(path, |header, _| header[NORM]["dtype"] = json!("\u{1b}]0;owned\u{7}\n"));
    check_header(hostile, &format!("`{NORM}` is stored as \\u{{1b}}]0;owned\\u{{7}}\\n; {hint}"));
}

#[test]
fn offsets_and_sizes() {
    let set = |name: &'static str, key: &'static str, value: Value| {
        move |path: &Path| edit(path, |header, _| header[name][key] = value)
    };
    // The embedding is bytes 0..256, the vision QKV of layer 0 256..640.
    let size = |offsets: &str| format!("`{QKV}` [24, 8] of bf16 takes 384 bytes, but its offsets are {offsets}");
    check_header(set(QKV, "data_offsets", json!([256, 642])), &size("256..642"));
    check_header(set(QKV, "data_offsets", json!([640, 256])), &size("640..256"));
    check_header(set(QKV, "data_offsets", json!([0, u64::MAX])), &size("0..18446744073709551615"));
    check_header(
        set(QKV, "dtype", json!("F32")),
        &format!("`{QKV}` [24, 8] of f32 takes 768 bytes, but its offsets are 256..640"),
    );
    check_header(
        set(QKV, "shape", json!([24, 9])),
        &format!("`{QKV}` [24, 9] of bf16 takes 432 bytes, but its offsets are 256..640"),
    );
    let huge = json!([1_u64 << 40, 1_u64 << 40]);
    check_header(
        set(QKV, "shape", huge),
        &format!("`{QKV}` has shape [1099511627776, 1099511627776], larger than any file"),
    );
    let overlap = format!("`{QKV}` begins at byte 254 of the data, inside `{EMBEDDING}`, which ends at 256");
    check_header(set(QKV, "data_offsets", json!([254, 638])), &overlap);
    let gap = format!(
        "`{QKV}` begins at byte 258 of the data, but the data before it ends at 256: the bytes between belong to no tensor"
    );
    let shift = |path: &Path| {
        edit(path, |header, data| {
            for (_, entry) in header
                .as_object_mut()
                .unwrap()
                .iter_mut()
                .filter(|(name, _)| *name != "__metadata__" && *name != EMBEDDING)
            {
                for index in [0, 1] {
                    entry["data_offsets"][index] = json!(entry["data_offsets"][index].as_u64().unwrap() + 2);
                }
            }
            data.splice(256..256, [0, 0]);
        });
    };
    check_header(shift, &gap);
    let same_bytes = format!("`{EMBEDDING}` begins at byte 0 of the data, inside `lm_head.weight`, which ends at 256");
    let alias = |path: &Path| {
        take(path, "lm_head.weight");
        edit(path, |header, _| {
            let entry = header[EMBEDDING].clone();
            header.as_object_mut().unwrap().shift_insert(0, "lm_head.weight".into(), entry);
        });
    };
    check_header(alias, &same_bytes);
    let beyond = |path: &Path| {
        edit(path, |header, _| header["lm_head.weight"]["data_offsets"] = json!([1_u64 << 62, (1_u64 << 62) + 256]))
    };
    let dir = tempfile::tempdir().unwrap();
    write_nano(dir.path(), ONE_FILE);
    let data_bytes = split(&dir.path().join(WEIGHTS)).1.len();
    let gap = format!("but the data before it ends at {}: the bytes between belong to no tensor", data_bytes - 256);
    check_header(beyond, &format!("`lm_head.weight` begins at byte {} of the data, {gap}", 1_u64 << 62));
}

// ---------------------------------------------------------------- index

#[test]
fn indices() {
    let set = |text: &'static str| move |dir: &Path| fs::write(dir.join(INDEX), text).unwrap();
    let malformed = |rest: &str| format!("`DIR/{INDEX}` is malformed: {rest}");
    check(THREE_FILES, set("{"), &malformed("EOF while parsing an object at line 1 column 1"));
    check(THREE_FILES, set("{\"metadata\": {}}"), &malformed("missing field `weight_map` at line 1 column 16"));
    check(
        THREE_FILES,
        set("{\"weight_map\": {\"a\": 1}}"),
        &malformed("invalid type: integer `1`, expected a string at line 1 column 22"),
    );
    let binary = |dir: &Path| fs::write(dir.join(INDEX), b"\xff\xfe{\x00").unwrap();
    check(THREE_FILES, binary, &malformed("not UTF-8 (byte 0)"));
    let twice = format!("{{\"weight_map\": {{\"{NORM}\": \"{FIRST}\", \"{NORM}\": \"{SECOND}\"}}}}");
    check(
        THREE_FILES,
        |dir| fs::write(dir.join(INDEX), twice).unwrap(),
        &format!("`DIR/{INDEX}` lists `{NORM}` twice"),
    );
    check(
        THREE_FILES,
        set("{\"weight_map\": {}}"),
        "config.json describes 3 layers, but the files in `DIR` hold only 0 tensors; \
         download both again from one revision of the model",
    );
}

#[test]
fn indices_that_lead_elsewhere() {
    for target in [
        "../model.safetensors",
        "/etc/passwd",
        "/tmp/model.safetensors",
        "..\\model.safetensors",
        "C:model.safetensors",
        "..",
        "",
        "sub/model.safetensors",
        "pytorch_model-00001-of-00002.bin",
    ] {
        let set = |dir: &Path| edit_json(&dir.join(INDEX), |index| index["weight_map"][NORM] = json!(target));
        let message =
            format!("`DIR/{INDEX}` places `{NORM}` in `{target}`; only .safetensors files beside the index are read");
        check(THREE_FILES, set, &message);
    }
}

#[test]
fn index_and_files_that_disagree() {
    let elsewhere = |dir: &Path| edit_json(&dir.join(INDEX), |index| index["weight_map"][EMBEDDING] = json!(SECOND));
    let message = format!("`{EMBEDDING}` is in `DIR/{FIRST}`, but the index places it in `{SECOND}`; {REVISION}");
    check(THREE_FILES, elsewhere, &message);
    let twice = |dir: &Path| put(&dir.join(SECOND), EMBEDDING, "BF16", json!([16, 8]), &[0; 256]);
    let message = format!("`{EMBEDDING}` is in both `DIR/{FIRST}` and `DIR/{SECOND}`; {REVISION}");
    check(THREE_FILES, twice, &message);
    let unlisted = |dir: &Path| {
        edit_json(&dir.join(INDEX), |index| drop(index["weight_map"].as_object_mut().unwrap().remove(EMBEDDING)));
    };
    let message = format!("`DIR/{FIRST}` holds `{EMBEDDING}`, which the index does not list; {REVISION}");
    check(THREE_FILES, unlisted, &message);
    let gone = |dir: &Path| drop(take(&dir.join(FIRST), EMBEDDING));
    let message = format!("the index places `{EMBEDDING}` in `DIR/{FIRST}`, which does not hold it; {REVISION}");
    check(THREE_FILES, gone, &message);
    let absent = |dir: &Path| {
        edit_json(&dir.join(INDEX), |index| index["weight_map"][EMBEDDING] = json!("model-00009-of-00009.safetensors"));
    };
    let message = "`DIR/model-00009-of-00009.safetensors` does not exist; the index names 4 files, of which 1 are absent: download them";
    check(THREE_FILES, absent, message);
}

// ---------------------------------------------------------------- tensors

#[test]
fn tensors_that_are_missing() {
    let both = "config.json describes a model that has it";
    let one = |dir: &Path| drop(take(&dir.join(WEIGHTS), NORM));
    check(ONE_FILE, one, &format!("`{NORM}` is missing from `DIR`; {both}: {REVISION}"));
    let two = |dir: &Path| [QKV, NORM].into_iter().for_each(|name| drop(take(&dir.join(WEIGHTS), name)));
    check(ONE_FILE, two, &format!("`{QKV}` and 1 other tensor are missing from `DIR`; {both}: {REVISION}"));
    let three = |dir: &Path| [QKV, NORM, EMBEDDING].into_iter().for_each(|name| drop(take(&dir.join(WEIGHTS), name)));
    check(ONE_FILE, three, &format!("`{EMBEDDING}` and 2 other tensors are missing from `DIR`; {both}: {REVISION}"));
    // Without inv_freq in all layers is fine, in one layer it is not.
    let inv_freq = "model.layers.1.self_attn.rotary_emb.inv_freq";
    let half = |dir: &Path| drop(take(&dir.join(WEIGHTS), inv_freq));
    check(ONE_FILE, half, &format!("`{inv_freq}` is missing from `DIR`; {both}: {REVISION}"));
}

#[test]
fn tensors_that_are_too_many() {
    let question = "not part of the model that config.json describes; is it the configuration of these weights?";
    let bias = "model.layers.0.self_attn.language_expert_dense.bias";
    let one = |dir: &Path| put(&dir.join(WEIGHTS), bias, "BF16", json!([8]), &[0; 16]);
    check(ONE_FILE, one, &format!("`DIR/{WEIGHTS}` holds `{bias}`, which is {question}"));
    let two = |dir: &Path| {
        one(dir);
        put(&dir.join(WEIGHTS), "\u{1b}[2J", "BF16", json!([0]), &[]);
    };
    check(ONE_FILE, two, &format!("`DIR/{WEIGHTS}` holds `{bias}` and 1 other tensor, which are {question}"));
    let hostile = |dir: &Path| put(&dir.join(WEIGHTS), "\u{1b}[2J", "BF16", json!([0]), &[]);
    check(ONE_FILE, hostile, &format!("`DIR/{WEIGHTS}` holds `\\u{{1b}}[2J`, which is {question}"));
}

#[test]
fn tensors_of_another_shape() {
    let set = |name: &'static str, shape: Value| {
        move |dir: &Path| edit(&dir.join(WEIGHTS), |header, _| header[name]["shape"] = shape)
    };
    let message = |name: &str, found: &str, expected: &str| {
        format!("`{name}` in `DIR/{WEIGHTS}` is {found}, config.json implies {expected}; {REVISION}")
    };
    check(ONE_FILE, set(QKV, json!([8, 24])), &message(QKV, "[8, 24]", "[24, 8]"));
    check(ONE_FILE, set(QKV, json!([192])), &message(QKV, "[192]", "[24, 8]"));
    check(ONE_FILE, set("model.vision.boi", json!([8])), &message("model.vision.boi", "[8]", "[1, 1, 8]"));
}

// ---------------------------------------------------------------- what is legal

#[test]
fn other_types_and_orders_open() {
    let dir = tempfile::tempdir().unwrap();
    write_nano(dir.path(), ONE_FILE);
    let path = dir.path().join(WEIGHTS);
    let f16: Vec<u8> = (0..16).collect();
    let f32: Vec<u8> = (0..32).collect();
    // Taken out and put back at the end: data in another order than the model's.
    take(&path, NORM);
    put(&path, NORM, "F16", json!([8]), &f16);
    take(&path, "model.vision.linear_proj.norm1.bias");
    put(&path, "model.vision.linear_proj.norm1.bias", "F32", json!([8]), &f32);
    let source = ModelSource::open(dir.path().to_str().unwrap()).unwrap();
    for (name, dtype, expected) in [(NORM, DType::F16, &f16), ("model.vision.linear_proj.norm1.bias", DType::F32, &f32)]
    {
        let info = source.info(name).unwrap();
        assert_eq!((info.dtype, info.num_bytes()), (dtype, expected.len()));
        let mut bytes = vec![0; expected.len()];
        source.read_into(name, &mut bytes).unwrap();
        assert_eq!(bytes, *expected);
        let mapped = source.mapped(name).unwrap();
        assert_eq!(
            (mapped.name(), mapped.dtype(), mapped.shape(), mapped.bytes()),
            (name, dtype, &[8][..], expected.as_slice())
        );
        let size = dtype.size_bytes();
        source.read_range_into(name, 3..5, &mut bytes[..2 * size]).unwrap();
        assert_eq!(bytes[..2 * size], expected[3 * size..5 * size]);
    }
    let ModelSource::Checkpoint(checkpoint) = source else { panic!("a directory was opened") };
    let report = inspect(&checkpoint);
    assert_eq!((report.num_tensors, report.stores_inv_freq, report.files.len()), (53, true, 1));
    assert_eq!(report.dtypes[&DType::F16].tensor_bytes, 16);
    assert_eq!(report.dtypes[&DType::F32].tensor_bytes, 32);
    assert_eq!(report.dtypes[&DType::Bf16].num_tensors, 51);
    assert_eq!(report.file_bytes, fs::metadata(&path).unwrap().len());
    assert_eq!(report.files[0].tensor_bytes, report.tensor_bytes);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["dtypes"]["f16"]["num_tensors"], 1);
}

#[test]
fn legal_oddities_are_noticed() {
    let dir = tempfile::tempdir().unwrap();
    write_nano(dir.path(), THREE_FILES);
    let whole = inspect(&Checkpoint::open(dir.path()).unwrap());
    for layer in 0..2 {
        let name = format!("model.layers.{layer}.self_attn.rotary_emb.inv_freq");
        edit_json(&dir.path().join(INDEX), |index| {
            let file = index["weight_map"].as_object_mut().unwrap().remove(&name).unwrap();
            take(&dir.path().join(file.as_str().unwrap()), &name);
        });
    }
    fs::write(dir.path().join("consolidated.safetensors"), "never opened").unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let report = inspect(&checkpoint);
    assert!(!report.stores_inv_freq);
    assert_eq!((report.num_tensors, report.num_parameters), (51, whole.num_parameters));
    // Two layers, two frequencies of two bytes each.
    let total_size = Notice::TotalSize { stated_bytes: whole.tensor_bytes, found_bytes: whole.tensor_bytes - 8 };
    let unused = Notice::UnusedFile { file: "consolidated.safetensors".into() };
    assert_eq!(report.notices, [Notice::NoInvFreq, total_size, unused]);
    let name = "model.layers.0.self_attn.rotary_emb.inv_freq";
    assert_eq!(checkpoint.tensor(name).unwrap_err().to_string(), format!("there is no tensor `{name}` in this model"));
}

#[test]
fn files_that_change_while_open() {
    let dir = tempfile::tempdir().unwrap();
    write_nano(dir.path(), ONE_FILE);
    let path = dir.path().join(WEIGHTS);
    let source = ModelSource::open(dir.path().to_str().unwrap()).unwrap();
    let mut bytes = [0; 256];
    source.read_into(EMBEDDING, &mut bytes).unwrap();
    source.verify_unchanged().unwrap();
    let changed = format!(
        "`{}` changed while it was in use; start again, and leave the checkpoint alone meanwhile",
        path.display()
    );
    // Replaced by another file: the open one is still whole.
    fs::copy(&path, dir.path().join("copy")).unwrap();
    fs::rename(dir.path().join("copy"), &path).unwrap();
    source.verify_unchanged().unwrap();
    let source = ModelSource::open(dir.path().to_str().unwrap()).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    assert_eq!(source.verify_unchanged().unwrap_err().to_string(), changed);
    assert_eq!(source.read_into(EMBEDDING, &mut bytes).unwrap_err().to_string(), changed);
    let source = ModelSource::open(dir.path().to_str().unwrap()).unwrap();
    file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    assert_eq!(source.verify_unchanged().unwrap_err().to_string(), changed);
    assert_eq!(source.read_into("lm_head.weight", &mut bytes).unwrap_err().to_string(), changed);
}

#[test]
fn advice_leaves_the_bytes_alone() {
    let dir = tempfile::tempdir().unwrap();
    write_nano(dir.path(), ONE_FILE);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let tensor = checkpoint.tensor(QKV).unwrap();
    let before = tensor.bytes().to_vec();
    assert!(before.iter().any(|&byte| byte != 0));
    for advice in [Advice::Sequential, Advice::WillNeed, Advice::DontNeed] {
        tensor.advise(advice).unwrap();
        assert_eq!(tensor.bytes(), before, "{advice:?}");
    }
    let len = tensor.file().bytes().len();
    tensor.file().advise(0..len, Advice::DontNeed).unwrap();
    assert_eq!(tensor.bytes(), before);
    assert!(tensor.file().advise(0..len + 1, Advice::WillNeed).is_err());
    // The mapping outlives the checkpoint that made it.
    drop(checkpoint);
    let clone = tensor.clone();
    drop(tensor);
    assert_eq!(clone.bytes(), before);
    assert_eq!(fs::read(clone.file().path()).unwrap()[clone.file_range()], before);
}
