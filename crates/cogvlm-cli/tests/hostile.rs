//! Broken and hostile input, as it comes from downloads, disks, scripts and people: every one is refused in a line that
//! names the culprit, within seconds, in little memory, and leaves nothing half-written.

mod common;

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Outcome, arg, assert_refusal, repo, without_gpus};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A model of a few kilobytes.
const NANO: &str = r#"{
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 16,
    "max_position_embeddings": 64,
    "vision_config": {
        "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1, "num_heads": 2, "image_size": 28,
        "patch_size": 14, "in_channels": 3, "num_positions": 5, "layer_norm_eps": 1e-6
    }
}"#;
const TOKENIZER: &str = "tests/goldens/tokenizer.model";
/// Nothing that is refused may take longer, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// Address space in KiB: far above what a refusal needs, far below what a bomb asks for.
const MEMORY_KIB: usize = 6 << 20;

/// A directory for one test; `DIR` in arguments and messages is its name.
struct Scratch(TempDir);

impl Scratch {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> &Self {
        fs::write(self.path(name), bytes).unwrap();
        self
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let arguments = arguments.iter().map(|argument| argument.replace("DIR", arg(self.0.path())));
        // A limit that needs no library: the shell sets it and becomes the program.
        let mut command = Command::new("sh");
        command.args([
            "-c",
            &format!("ulimit -v {MEMORY_KIB}; exec \"$0\" \"$@\""),
            env!("CARGO_BIN_EXE_cogvlm-shard"),
        ]);
        without_gpus(&mut command).args(arguments).current_dir(repo(""));
        command
    }

    fn run(&self, arguments: &[&str], stdin: &[u8]) -> Outcome {
        let mut command = self.command(arguments);
        let (stdout, stderr) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let (stdout, stderr) = (stdout.path().join("stdout"), stderr.path().join("stderr"));
        command.stdin(Stdio::piped()).stdout(fs::File::create(&stdout).unwrap());
        let mut child = command.stderr(fs::File::create(&stderr).unwrap()).spawn().unwrap();
        let mut pipe = child.stdin.take().unwrap();
        let stdin = stdin.to_owned();
        // A program that refuses its arguments may not read its input.
        let writer = std::thread::spawn(move || drop(pipe.write_all(&stdin)));
        let code = wait(&mut child, PATIENCE).unwrap_or_else(|| panic!("{arguments:?} does not end"));
        writer.join().unwrap();
        let text = |path: &Path| {
            let text = String::from_utf8(fs::read(path).unwrap()).expect("the program prints UTF-8");
            text.replace(arg(self.0.path()), "DIR")
        };
        Outcome { code, stdout: text(&stdout), stderr: text(&stderr) }
    }

    /// The program refuses `arguments` with an error line that contains `part`, and leaves the directory as it was.
    fn refuses(&self, arguments: &[&str], code: i32, part: &str) {
        self.refuses_input(arguments, b"", code, part);
    }

    fn refuses_input(&self, arguments: &[&str], stdin: &[u8], code: i32, part: &str) {
        let before = self.listing();
        let outcome = self.run(arguments, stdin);
        let line = assert_refusal(&outcome, code, &format!("{arguments:?}"));
        // A wrong usage may list flags below.
        let said = if code == 2 { &outcome.stderr } else { &line };
        assert!(said.contains(part), "{arguments:?}\n   says: {said}\nwithout: {part}");
        // Usage, errors and hints are short whatever the input is.
        assert!(outcome.stderr.len() < 4000, "{arguments:?}: {} bytes of messages", outcome.stderr.len());
        assert_eq!(self.listing(), before, "{arguments:?} left something behind");
    }

    fn listing(&self) -> Vec<String> {
        let mut names = Vec::new();
        let mut dirs = vec![self.0.path().to_owned()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(&dir).unwrap() {
                let path = entry.unwrap().path();
                names.push(arg(&path).to_owned());
                if path.is_dir() && !path.is_symlink() {
                    dirs.push(path);
                }
            }
        }
        names.sort();
        names
    }
}

/// Exit code, once the program ends in time; else it is killed.
fn wait(child: &mut Child, patience: Duration) -> Option<i32> {
    let start = Instant::now();
    while start.elapsed() < patience {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status.code().unwrap_or(-1));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    None
}

/// The arguments of `text`, split at blanks.
fn words(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}

fn edited(json: &str, pointer: &str, value: Value) -> String {
    let mut json: Value = serde_json::from_str(json).unwrap();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    let parent = json.pointer_mut(parent).unwrap().as_object_mut().unwrap();
    if value.is_null() {
        parent.remove(key);
    } else {
        parent.insert(key.to_owned(), value);
    }
    json.to_string()
}

/// A whole checkpoint of [`NANO`] in `DIR/model`.
fn checkpoint(max_shard_size: &str) -> Scratch {
    let scratch = Scratch::new();
    scratch.write("nano.json", NANO);
    let arguments = ["synth", "DIR/nano.json@3", "--out", "DIR/model", "--max-shard-size", max_shard_size];
    let outcome = scratch.run(&arguments, b"");
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    let outcome = scratch.run(&["inspect", "DIR/model"], b"");
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    scratch
}

/// Header and data of a safetensors file.
fn split(path: &Path) -> (Value, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + length]).unwrap(), bytes[8 + length..].to_vec())
}

fn join(path: &Path, header: &str, data: &[u8]) {
    fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()).unwrap();
}

/// What a clone without Git LFS holds in place of a file.
const LFS_POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

fn edit_header(path: &Path, edit: fn(&mut Value)) {
    let (mut header, data) = split(path);
    edit(&mut header);
    join(path, &header.to_string(), &data);
}

fn cut(path: &Path, num_bytes: u64) {
    fs::File::options().write(true).open(path).unwrap().set_len(num_bytes).unwrap();
}

fn link(path: &Path, target: &str) {
    fs::remove_file(path).unwrap();
    symlink(target, path).unwrap();
}

/// Breaks a weight file.
type Break = fn(&Path);

#[test]
fn broken_weight_files() {
    const NORM: &str = "model.norm.weight";
    const UNUSABLE: &str = "`DIR/model/model.safetensors` cannot be used";
    let cases: [(Break, &str); 25] = [
        (|path| fs::remove_file(path).unwrap(), "holds no weights"),
        (|path| fs::write(path, "").unwrap(), "`DIR/model/model.safetensors`"),
        (|path| fs::write(path, "1234567").unwrap(), "`DIR/model/model.safetensors`"),
        (|path| cut(path, 200), UNUSABLE),
        (|path| cut(path, fs::metadata(path).unwrap().len() - 1), UNUSABLE),
        (|path| fs::File::options().append(true).open(path).unwrap().write_all(b"more").unwrap(), UNUSABLE),
        (|path| fs::write(path, [0xff; 64]).unwrap(), "`DIR/model/model.safetensors`"),
        (|path| join(path, "{\"a\": {\"dtype\": \"BF16\"", b""), UNUSABLE),
        (|path| join(path, &"[".repeat(1 << 20), b""), "`DIR/model/model.safetensors`"),
        (|path| fs::write(path, LFS_POINTER).unwrap(), "`DIR/model/model.safetensors` is a Git LFS pointer"),
        (|path| fs::write(path, "<!DOCTYPE html><html>").unwrap(), "`DIR/model/model.safetensors`"),
        (
            |path| {
                fs::remove_file(path).unwrap();
                fs::create_dir(path).unwrap();
            },
            "`DIR/model/model.safetensors` is not a regular file",
        ),
        (|path| link(path, "../../blobs/0123"), "is a link to `../../blobs/0123`, which does not exist"),
        (|path| link(path, WEIGHTS), "`DIR/model/model.safetensors`"),
        (|path| link(path, "/dev/zero"), "`DIR/model/model.safetensors` is not a regular file"),
        (|path| edit_header(path, |header| _ = header.as_object_mut().unwrap().remove(NORM)), UNUSABLE),
        (
            |path| {
                edit_header(path, |header| {
                    let norm = header.as_object_mut().unwrap().remove(NORM).unwrap();
                    header["model.norm.bias"] = norm;
                });
            },
            "`model.norm.bias`",
        ),
        (|path| edit_header(path, |header| header[NORM]["shape"] = json!([2, 4])), "`model.norm.weight`"),
        (|path| edit_header(path, |header| header[NORM]["shape"] = json!([-8])), "`DIR/model/model.safetensors`"),
        (
            |path| edit_header(path, |header| header[NORM]["shape"] = json!([1_u64 << 40, 1_u64 << 40])),
            "`model.norm.weight`",
        ),
        (|path| edit_header(path, |header| header[NORM]["dtype"] = json!("I8")), "`model.norm.weight`"),
        (|path| edit_header(path, |header| header[NORM]["dtype"] = json!("WORD")), "`DIR/model/model.safetensors`"),
        (
            |path| {
                edit_header(path, |header| {
                    header[NORM]["data_offsets"] = header["lm_head.weight"]["data_offsets"].clone();
                });
            },
            UNUSABLE,
        ),
        (|path| edit_header(path, |header| header[NORM]["data_offsets"] = json!([u64::MAX - 8, u64::MAX])), UNUSABLE),
        (
            |path| {
                let (header, data) = split(path);
                let twice = header.to_string().replacen('{', &format!("{{\"{NORM}\":{},", header[NORM]), 1);
                join(path, &twice, &data);
            },
            "`model.norm.weight`",
        ),
    ];
    for (break_it, part) in cases {
        let scratch = checkpoint("5GB");
        break_it(&scratch.path("model").join(WEIGHTS));
        scratch.refuses(&["inspect", "DIR/model"], 1, part);
        scratch.refuses(&["generate", "--model", "DIR/model", "--prompt", "a", "--tokenizer", TOKENIZER], 1, part);
    }
}

#[test]
fn broken_directories() {
    let scratch = checkpoint("5KB");
    let index: Value = serde_json::from_slice(&fs::read(scratch.path("model").join(INDEX)).unwrap()).unwrap();
    let first = index["weight_map"]["lm_head.weight"].as_str().unwrap().to_owned();
    let set_index = |json: Value| _ = scratch.write(&format!("model/{INDEX}"), json.to_string());
    let refuses = |part: &str| scratch.refuses(&["inspect", "DIR/model"], 1, part);
    for target in ["../model.safetensors", "/etc/passwd", "model.bin", "..", "a\u{0}.safetensors", "C:\\x.safetensors"]
    {
        let mut index = index.clone();
        index["weight_map"]["lm_head.weight"] = json!(target);
        set_index(index);
        refuses("only .safetensors files beside the index are read");
    }
    let mut renamed = index.clone();
    renamed["weight_map"]["lm_head.weight"] = json!("other.safetensors");
    set_index(renamed);
    refuses("`DIR/model/other.safetensors` does not exist");
    let mut extra = index.clone();
    extra["weight_map"]["one.more"] = json!(first);
    set_index(extra);
    refuses("`one.more`");
    set_index(json!({"weight_map": 3}));
    refuses("`DIR/model/model.safetensors.index.json` is malformed");
    scratch.write(&format!("model/{INDEX}"), "{\"weight_map\":".repeat(100_000));
    refuses("`DIR/model/model.safetensors.index.json` is malformed");
    set_index(index.clone());
    fs::rename(scratch.path("model").join(&first), scratch.path("aside")).unwrap();
    refuses(&format!("`DIR/model/{first}` does not exist"));
    scratch.write(&format!("model/{first}.incomplete"), "half");
    refuses("is an unfinished file");
    fs::remove_file(scratch.path(&format!("model/{first}.incomplete"))).unwrap();
    fs::copy(scratch.path("nano.json"), scratch.path("model").join(&first)).unwrap();
    refuses(&format!("`DIR/model/{first}`"));
    fs::rename(scratch.path("aside"), scratch.path("model").join(&first)).unwrap();
    scratch.write("model/model.safetensors", "");
    refuses("holds both model.safetensors and model.safetensors.index.json");
    fs::remove_file(scratch.path("model/model.safetensors")).unwrap();
    fs::rename(scratch.path("model").join(INDEX), scratch.path("aside")).unwrap();
    refuses("no model.safetensors.index.json");

    let scratch = Scratch::new();
    for dir in ["empty", "torch", "cache/snapshots/0a1b"] {
        fs::create_dir_all(scratch.path(dir)).unwrap();
    }
    scratch.write("torch/pytorch_model.bin", "x").write("file", "x");
    for (dir, part) in [
        ("DIR/empty", "it is empty"),
        ("DIR/torch", "PyTorch weights (`pytorch_model.bin`)"),
        ("DIR/cache", "`DIR/cache` is the root of a model in a Hub cache"),
        ("DIR/file", "`DIR/file` is not a directory"),
        ("DIR/none", "`DIR/none`"),
        ("DIR/file/deeper", "`DIR/file/deeper`"),
        ("/dev/zero", "`/dev/zero` is not a directory"),
        ("DIR/line\nbreak", "`DIR/line break`"),
    ] {
        scratch.refuses(&["inspect", dir], 1, part);
        scratch.refuses(&["generate", "--model", dir, "--prompt", "a", "--tokenizer", TOKENIZER], 1, part);
    }
}

#[test]
fn broken_configurations() {
    let many = 1_u64 << 24;
    for (pointer, value, part) in [
        ("/vocab_size", Value::Null, "missing field `vocab_size`"),
        ("/vision_config", Value::Null, "missing field `vision_config`"),
        ("/vision_config", json!([1]), "not a usable CogVLM configuration"),
        ("/hidden_size", json!("wide"), "invalid type: string \"wide\""),
        ("/hidden_size", json!(1e300), "floating point"),
        ("/hidden_size", json!(-8), "integer `-8`"),
        ("/hidden_size", json!(0), "`hidden_size` is 0"),
        ("/hidden_size", json!(many), "`hidden_size` is 16777216"),
        ("/num_hidden_layers", json!(many), "`num_hidden_layers` is 16777216"),
        ("/vision_config/num_hidden_layers", json!(many), "`vision_config.num_hidden_layers` is 16777216"),
        ("/intermediate_size", json!(u64::MAX), "`intermediate_size` is 18446744073709551615"),
        ("/vocab_size", json!(many), "`vocab_size` is 16777216"),
        ("/max_position_embeddings", json!(0), "`max_position_embeddings` is 0"),
        ("/num_attention_heads", json!(3), "`num_attention_heads` is 3"),
        ("/num_attention_heads", json!(8), "`num_attention_heads` is 8"),
        ("/num_multi_query_heads", json!(0), "`num_multi_query_heads` is 0"),
        ("/vision_config/num_heads", json!(3), "`vision_config.num_heads` is 3"),
        ("/vision_config/patch_size", json!(13), "multiple of patch_size 13"),
        ("/vision_config/num_positions", json!(6), "`vision_config.num_positions` is 6"),
        ("/vision_config/in_channels", json!(4), "`vision_config.in_channels` is 4"),
        ("/vision_config/image_size", json!(1_u64 << 40), "`vision_config.image_size`"),
        ("/vision_config/hidden_act", json!("relu"), "`vision_config.hidden_act` is relu"),
        ("/hidden_act", json!("gelu"), "`hidden_act` is gelu"),
        ("/rms_norm_eps", json!(0.0), "`rms_norm_eps` is 0"),
        ("/rms_norm_eps", json!(1e-300), "`rms_norm_eps`"),
        ("/rms_norm_eps", json!(1e300), "`rms_norm_eps`"),
        ("/tie_word_embeddings", json!(true), "`tie_word_embeddings` is true"),
        ("/bos_token_id", json!(16), "`bos_token_id` is 16"),
        ("/eos_token_id", json!([2, 3]), "not a usable CogVLM configuration"),
        ("/template_version", json!("alpaca"), "unknown variant `alpaca`"),
    ] {
        let scratch = Scratch::new();
        scratch.write("config.json", edited(NANO, pointer, value));
        for arguments in [
            "plan DIR/config.json --max-memory cpu:1GiB",
            "plan DIR --max-memory 0:1GiB --policy accelerate",
            "synth DIR/config.json@1 --out DIR/out",
            "generate --model DIR/config.json@1 --tokenizer tests/goldens/tokenizer.model --prompt a",
        ] {
            scratch.refuses(&words(arguments), 1, part);
        }
        let outcome = scratch.run(&words("plan DIR --max-memory cpu:1GiB"), b"");
        assert!(outcome.stderr.contains("DIR"), "{}", outcome.stderr);
    }
    let scratch = Scratch::new();
    let plan = words("plan DIR/config.json --max-memory cpu:1GiB");
    for (text, part) in [
        ("", "`DIR/config.json`"),
        ("[]", "`DIR/config.json`"),
        ("{\"hidden_size\": 8, \"hidden_size\": 8}", "duplicate field `hidden_size`"),
        ("\u{feff}{}", "`DIR/config.json`"),
        (LFS_POINTER, "Git LFS pointer"),
    ] {
        scratch.write("config.json", text).refuses(&plan, 1, part);
    }
    scratch.write("config.json", "{\"a\":".repeat(1_000_000)).refuses(&plan, 1, "`DIR/config.json`");
    scratch.write("config.json", b"{\"a\": \"\xff\"}").refuses(&plan, 1, "not UTF-8");
    scratch.write("config.json", edited(NANO, "/torch_dtype", json!("int4")));
    scratch.refuses(&plan, 1, "`torch_dtype` is int4");
    scratch.refuses(&words("plan /dev/zero --max-memory cpu:1GiB"), 1, "`/dev/zero` is not a regular file");
    for (model, part) in [
        ("tiny@", "`` in `tiny@` is not a seed"),
        ("tiny@-1", "`-1` in `tiny@-1` is not a seed"),
        ("tiny@18446744073709551616", "is not a seed"),
        ("huge@1", "no built-in configuration `huge`"),
        ("@1", "no built-in configuration ``"),
        ("DIR/none.json@1", "`DIR/none.json` does not exist"),
        ("cogvlm2-19b@1", "`cogvlm2-19b` is a CogVLM2 model"),
    ] {
        scratch.refuses(&["synth", model, "--digest"], 1, part);
        scratch.refuses(&["plan", model, "--max-memory", "cpu:1GiB"], 1, part);
        scratch.refuses(&["bench", "--model", model], 1, part);
    }
    scratch.refuses(&words("plan nowhere --max-memory cpu:1GiB"), 1, "`nowhere`");
    scratch.refuses(&words("generate --model tiny --prompt a"), 1, "`tiny` is a configuration without weights");
}

/// The deepest model that is taken is still planned at once.
#[test]
fn deep_models_are_planned_in_time() {
    let scratch = Scratch::new();
    let deep = edited(&edited(NANO, "/num_hidden_layers", json!(256)), "/vision_config/num_hidden_layers", json!(256));
    scratch.write("config.json", deep);
    for budgets in ["cpu:1GiB", "0:700KiB,1:700KiB,2:700KiB,cpu:1GiB", "0:1KiB,1:1KiB"] {
        for policy in ["latency", "throughput", "balanced", "accelerate"] {
            let budgets = budgets.replace("KiB", "000");
            let outcome = scratch.run(&["plan", "DIR", "--max-memory", &budgets, "--policy", policy], b"");
            assert!(outcome.code <= 1 && !outcome.stderr.contains("panicked"), "{policy}: {}", outcome.stderr);
        }
    }
}

#[test]
fn broken_tokenizers() {
    let scratch = Scratch::new();
    let whole = fs::read(repo(TOKENIZER)).unwrap();
    fs::create_dir(scratch.path("empty")).unwrap();
    fs::create_dir(scratch.path("named")).unwrap();
    scratch
        .write("empty.model", "")
        .write("cut.model", &whole[..whole.len() / 2])
        .write("noise.model", [0xff; 1000])
        .write("pointer.model", LFS_POINTER)
        .write("empty.json", "{}")
        .write("deep.json", "[".repeat(1_000_000))
        .write("cut.json", "{\"version\": \"1.0\", \"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0")
        .write("named/tokenizer.model", &whole)
        .write("named/tokenizer_config.json", "{\"bos_token\": \"<|begin|>\"}");
    for (file, part) in [
        ("DIR/none", "`DIR/none`"),
        ("DIR/empty", "`DIR/empty` holds neither `tokenizer.model` nor `tokenizer.json`"),
        ("DIR/empty.model", "`DIR/empty.model` is not a SentencePiece model"),
        ("DIR/cut.model", "`DIR/cut.model`"),
        ("DIR/noise.model", "`DIR/noise.model` is not a SentencePiece model"),
        ("DIR/pointer.model", "`DIR/pointer.model`"),
        ("DIR/empty.json", "`DIR/empty.json`"),
        ("DIR/deep.json", "`DIR/deep.json`"),
        ("DIR/cut.json", "`DIR/cut.json`"),
        ("DIR/named", "`bos_token` `<|begin|>`"),
        ("/dev/zero", "`/dev/zero`"),
    ] {
        scratch.refuses_input(&["tokenize", "--tokenizer", file], b"\"a\"\n", 1, part);
        scratch.refuses(&["generate", "--model", "tiny@1", "--prompt", "a", "--tokenizer", file], 1, part);
    }
    scratch.refuses(&words("generate --model tiny@1 --prompt a"), 1, "`tiny@1` has no tokenizer");
    scratch.refuses(&words("tokenize"), 2, "--tokenizer");
    let encode = ["tokenize", "--tokenizer", TOKENIZER];
    let decode = ["tokenize", "--tokenizer", TOKENIZER, "--decode"];
    for (arguments, input, part) in [
        (&encode[..], "\"a\"\nb\n".as_bytes(), "line 2 of stdin: not a JSON string"),
        (&encode, b"\"\\ud800\"\n", "line 1 of stdin"),
        (&encode, b"\"\xff\"\n", "line 1 of stdin"),
        (&encode, b"[1]\n", "line 1 of stdin: not a JSON string"),
        (&decode, b"[1, 2]\n[-1]\n", "line 2 of stdin: not a JSON list of ids"),
        (&decode, b"[4294967295]\n", "line 1 of stdin: token id 4294967295"),
        (&decode, b"[1.5]\n", "line 1 of stdin"),
    ] {
        scratch.refuses_input(arguments, input, 1, part);
    }
    // A line that never ends is not collected for ever.
    scratch.refuses_input(&encode, &vec![b'"'; (64 << 20) + 2], 1, "line 1 of stdin: it is longer than 64 MiB");
}

/// A PNG that says it is `side` x `side` pixels and holds none of them.
fn bomb(side: u32) -> Vec<u8> {
    let mut header = b"IHDR".to_vec();
    header.extend([side.to_be_bytes(), side.to_be_bytes()].concat());
    header.extend([8, 2, 0, 0, 0]);
    let crc = header.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 * (crc & 1)))
    });
    [b"\x89PNG\r\n\x1a\n\0\0\0\x0d".as_slice(), &header, &(!crc).to_be_bytes()].concat()
}

#[test]
fn broken_images() {
    let scratch = Scratch::new();
    let photo = fs::read(repo("tests/data/photo.jpg")).unwrap();
    let png = fs::read(repo("tests/goldens/tiny/caption.png")).unwrap();
    scratch
        .write("empty.png", "")
        .write("text.png", "not a picture")
        .write("cut.jpg", &photo[..photo.len() / 3])
        .write("head.jpg", &photo[..3])
        .write("cut.png", &png[..png.len() - 100])
        .write("huge.png", bomb(2_000_000_000))
        .write("large.png", bomb(16_000))
        .write("none.png", bomb(0))
        .write("pointer.jpg", LFS_POINTER);
    for (file, part) in [
        ("DIR/missing.png", "cannot read `DIR/missing.png`"),
        ("DIR", "cannot read `DIR`"),
        ("DIR/empty.png", "`DIR/empty.png` is neither PNG"),
        ("DIR/text.png", "`DIR/text.png` is neither PNG"),
        ("DIR/pointer.jpg", "`DIR/pointer.jpg` is neither PNG"),
        ("DIR/cut.jpg", "`DIR/cut.jpg` is a JPEG that is cut short or damaged"),
        ("DIR/head.jpg", "`DIR/head.jpg`"),
        ("DIR/cut.png", "`DIR/cut.png` is a PNG that is cut short or damaged"),
        ("DIR/huge.png", "`DIR/huge.png`"),
        ("DIR/large.png", "`DIR/large.png`"),
        ("DIR/none.png", "`DIR/none.png`"),
        ("/dev/zero", "`/dev/zero` is longer than"),
        ("", "--image"),
    ] {
        let code = if file.is_empty() { 2 } else { 1 };
        let out = "DIR/out.safetensors";
        scratch.refuses(&["preprocess", "--image", file, "--size", "28", "--out", out], code, part);
        let generate = ["generate", "--model", "tiny@1", "--prompt", "a", "--tokenizer", TOKENIZER, "--image", file];
        scratch.refuses(&[&generate[..], &["--logits-out", out]].concat(), code, part);
    }
    for size in ["0", "-1", "16385", "4294967296", "x"] {
        let size = format!("--size={size}");
        scratch.refuses(&["preprocess", "--image", "DIR/cut.png", &size, "--out", "DIR/o"], 2, "--size");
    }
}

#[test]
fn broken_device_maps_and_plans() {
    let scratch = Scratch::new();
    let plan = |model: &str, budgets: &str| {
        let outcome = scratch.run(&["plan", model, "--max-memory", budgets, "--context", "128", "--json"], b"");
        assert_eq!(outcome.code, 0, "{}", outcome.stderr);
        outcome.stdout
    };
    let budgets = "0:612MiB,1:612MiB,cpu:64MiB";
    let tiny = plan("tiny", budgets);
    let deep = "[".repeat(200_000);
    let edit = |pointer: &str, value: Value| edited(&tiny, pointer, value);
    let cases: Vec<(String, &str)> = vec![
        (String::new(), "not JSON"),
        ("{".to_owned(), "not JSON"),
        (deep, "recursion limit"),
        ("[]".to_owned(), "`DIR/map.json`"),
        ("\"cpu\"".to_owned(), "`DIR/map.json`"),
        ("{}".to_owned(), "`DIR/map.json`"),
        ("{\"\": null}".to_owned(), "`DIR/map.json`"),
        ("{\"\": {\"\": 0}}".to_owned(), "`DIR/map.json`"),
        ("{\"\": \"gpu\"}".to_owned(), "gpu"),
        ("{\"\": -1}".to_owned(), "-1"),
        ("{\"\": 1.5}".to_owned(), "1.5"),
        ("{\"\": \"meta\"}".to_owned(), "meta"),
        ("{\"\": 0, \"\": 1}".to_owned(), "twice"),
        ("{\"\": 7}".to_owned(), "`7`"),
        ("{\"model\": 0}".to_owned(), "lm_head"),
        ("{\"\": 0, \"model.layers.99\": 1}".to_owned(), "model.layers.99"),
        ("{\"\": 0, \"model.layers.0.\": 1}".to_owned(), "model.layers.0."),
        (plan("small", "0:700MiB,1:700MiB,cpu:640MiB"), "`DIR/map.json`"),
        (edit("/schema", json!("cogvlm-shard.plan/2")), "cogvlm-shard.plan/2"),
        (edit("/surprise", json!(1)), "surprise"),
        (edit("/stages", json!([])), "stages"),
        (edit("/stages/0/units", json!([])), "stages[0].units"),
        (edit("/stages/0/device", json!("disk")), "stages[0].device"),
        (edit("/devices/0/weight_bytes", json!(1)), "devices.0.weight_bytes"),
        (edit("/devices/0/kv_bytes", json!(-1)), "devices.0"),
        (edit("/devices/0/budget_bytes", json!(1)), "devices.0"),
        (edit("/devices/0/reserved_bytes", json!(u64::MAX)), "`DIR/map.json`"),
        (edit("/limits/context", json!(1_u64 << 60)), "--context"),
        (edit("/limits/batch", json!(0)), "--batch"),
        (edit("/tensors_off_device/lm_head.weight", json!("cpu")), "devices.1.weight_bytes"),
        (edit("/tensors_off_device/nothing", json!("cpu")), "nothing"),
        (edit("/device_map/lm_head", json!(2)), "device_map"),
        (edit("/predicted_seconds_per_token", json!(-1.0)), "predicted_seconds_per_token"),
        (edit("/links", json!([{}])), "missing field `from`"),
        (edit("/links", json!([])), "links"),
    ];
    let run = format!("generate --model tiny@1 --prompt a --tokenizer {TOKENIZER} --device-map DIR/map.json");
    let run = format!("{run} --max-memory {budgets} --context 128 --backend cpu");
    for (text, part) in cases {
        scratch.write("map.json", &text);
        scratch.refuses(&words(&run), 1, part);
    }
    // What was planned fits, and runs.
    scratch.write("map.json", &tiny);
    let outcome = scratch.run(&words(&format!("{run} --max-new-tokens 1")), b"");
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    for (file, part) in [("/dev/zero", "`/dev/zero`"), ("DIR", "`DIR`"), ("DIR/none", "`DIR/none`")] {
        scratch.refuses(&words(&run.replace("DIR/map.json", file)), 1, part);
    }
    // A map that names the host only needs no card, and no more memory than is there.
    scratch.write("map.json", "{\"\": \"cpu\"}");
    scratch.refuses(&words(&run.replace("cpu:64MiB", "cpu:1MiB")), 1, "`cpu` would hold");
}

#[test]
fn impossible_flags() {
    let scratch = Scratch::new();
    let generate = format!("generate --model tiny@1 --tokenizer {TOKENIZER} --prompt a");
    for (flags, code, part) in [
        ("--temperature nan", 2, "--temperature"),
        ("--temperature inf", 2, "--temperature"),
        ("--temperature -1", 2, "--temperature"),
        ("--temperature 1e99", 2, "--temperature"),
        ("--temperature warm", 2, "--temperature"),
        ("--top-p 1.1", 2, "--top-p"),
        ("--top-p nan", 2, "--top-p"),
        ("--top-p -0.5", 2, "--top-p"),
        ("--top-k=-1", 2, "--top-k"),
        ("--repetition-penalty 0", 2, "--repetition-penalty"),
        ("--repetition-penalty nan", 2, "--repetition-penalty"),
        ("--repetition-penalty -2", 2, "--repetition-penalty"),
        ("--seed=-1", 2, "--seed"),
        ("--max-new-tokens 0", 2, "--max-new-tokens"),
        ("--max-new-tokens 99999999999999999999", 2, "--max-new-tokens"),
        ("--threads 0", 2, "--threads"),
        ("--threads 1000000", 2, "--threads"),
        ("--threads=-1", 2, "--threads"),
        ("--batch 0", 1, "--batch"),
        ("--batch 1000000000", 1, "--batch"),
        ("--context 0", 1, "--context"),
        ("--context 1000000000", 1, "--context"),
        ("--context 1", 1, "room for 1 per sequence"),
        ("--dtype int8", 2, "--dtype"),
        ("--backend tpu", 2, "--backend"),
        ("--template alpaca", 2, "--template"),
        ("--rope none", 2, "--rope"),
        ("--log a=b=c", 2, "--log"),
        ("--input-ids x.json", 2, "--input-ids"),
        ("--prompts x.jsonl --json", 2, "--prompts"),
        ("--prompt b", 2, "--prompt"),
        ("--device-map x --policy latency", 2, "--policy"),
        ("--force-ids x --max-new-tokens 2", 2, "--max-new-tokens"),
        ("--stop=", 2, "--stop"),
        ("--no-such-flag", 2, "--no-such-flag"),
        ("--max-memory=", 1, "`` in `--max-memory` is empty"),
        ("--max-memory 0", 1, "`0` in `--max-memory`"),
        ("--max-memory 0:", 1, "`0:` in `--max-memory`"),
        ("--max-memory 0:0", 1, "`0:0` in `--max-memory`"),
        ("--max-memory 0:-1GiB", 1, "`0:-1GiB` in `--max-memory`"),
        ("--max-memory 0:nanGiB", 1, "`0:nanGiB` in `--max-memory`"),
        ("--max-memory 0:1e400GiB", 1, "`0:1e400GiB` in `--max-memory`"),
        ("--max-memory 0:99999999999999999999", 1, "more bytes than can be counted"),
        ("--max-memory 4294967296:1GiB", 1, "`4294967296:1GiB` in `--max-memory`"),
        ("--max-memory 0:1GiB,0:1GiB", 1, "second budget"),
        ("--max-memory disk", 1, "--max-memory"),
        ("--max-memory cpu:1MiB", 1, "does not fit"),
        ("--max-memory cpu:1", 1, "does not fit"),
    ] {
        let arguments = format!("{generate} {flags}");
        scratch.refuses(&words(&arguments), code, part);
    }
    for (arguments, part) in [
        ("generate --prompt a", "--model"),
        ("generate --model tiny@1", "--prompt"),
        ("generate --model tiny@1 --prompts x", "--json"),
        ("synth tiny@1", "--out"),
        ("bench --model tiny@1 --repeats 0", "--repeats"),
        ("bench --model tiny@1 --new-tokens 0", "--new-tokens"),
        ("bench --model tiny@1 --repeats 18446744073709551616", "--repeats"),
        ("plan tiny --module-tree x --max-memory 0:1", "--module-tree"),
        ("plan tiny --policy accelerate", "--max-memory"),
        ("plan tiny --policy accelerate --max-memory 0:1GiB --dtype float3", "--dtype float3"),
        ("plan tiny --policy accelerate --max-memory 0:1GiB --accelerate-version 2", "--accelerate-version 2"),
        ("plann", "plann"),
        ("tokenize --plain --decode --tokenizer x", "--plain"),
        ("inspect", "<DIR>"),
    ] {
        scratch.refuses(&words(arguments), 2, part);
    }
    for (arguments, part) in [
        ("synth tiny@1 --digest --max-shard-size 0", "`0` is not a size"),
        ("synth tiny@1 --digest --max-shard-size 5PB", "`5PB` is not a size"),
        ("synth tiny@1 --digest --max-shard-size nanGB", "is not a size"),
        ("bench --model tiny@1 --new-tokens 1000000", "exceed the context"),
        ("bench --model tiny@1 --prompt-tokens 18446744073709551615", "context"),
        ("bench --model tiny@1 --prompt-tokens 10000000000", "context"),
        ("bench --model tiny@1 --new-tokens 18446744073709551615", "context"),
    ] {
        scratch.refuses(&words(arguments), 1, part);
    }
}

#[test]
fn broken_question_files() {
    let scratch = Scratch::new();
    let generate = format!("generate --model tiny@1 --tokenizer {TOKENIZER} --max-new-tokens 1");
    let ids = "generate --model tiny@1 --max-new-tokens 1";
    let deep = "[".repeat(1_000_000);
    let long_prompt = format!("{{\"prompt\": \"{}\"}}", "word ".repeat(1_000_000));
    let cases: Vec<(&str, &str, &[u8], &str)> = vec![
        (&generate, "--prompt a --history", b"", "`DIR/file` is not a list of [question, answer] pairs"),
        (&generate, "--prompt a --history", b"{}", "`DIR/file` is not a list of [question, answer] pairs"),
        (&generate, "--prompt a --history", b"[[\"q\"]]", "`DIR/file`"),
        (&generate, "--prompt a --history", b"[[\"q\", \"a\", \"b\"]]", "`DIR/file`"),
        (&generate, "--prompt a --history", b"[[1, 2]]", "`DIR/file`"),
        (&generate, "--prompt a --history", b"\xff\xfe", "`DIR/file`: it is not UTF-8"),
        (&generate, "--prompt a --history", deep.as_bytes(), "`DIR/file`"),
        (ids, "--input-ids", b"", "`DIR/file`"),
        (ids, "--input-ids", b"[1.5]", "`DIR/file`"),
        (ids, "--input-ids", b"[-1]", "`DIR/file`"),
        (ids, "--input-ids", b"[32000]", "token id 32000"),
        (ids, "--input-ids", b"[4294967296]", "`DIR/file`"),
        (ids, "--input-ids", b"{\"ids\": [1]}", "`DIR/file`"),
        (ids, "--input-ids", b"{\"input_ids\": {\"input_ids\": [1]}}", "`DIR/file`"),
        (ids, "--image tests/goldens/tiny/caption.png --input-ids", b"[1, 5, 6]", "placeholders"),
        (ids, "--input-ids", deep.as_bytes(), "`DIR/file`"),
        (&generate, "--prompt a --force-ids", b"[]", "--force-ids"),
        (&generate, "--prompt a --force-ids", b"[99999]", "token id 99999"),
        (&generate, "--prompt a --force-ids", b"\"1\"", "`DIR/file`"),
        (&generate, "--json --prompts", b"", "`DIR/file` holds no question"),
        (&generate, "--json --prompts", b"\n\n", "`DIR/file` holds no question"),
        (&generate, "--json --prompts", b"{\"prompt\": \"a\"}\n{\"promt\": \"a\"}\n", "line 2 of `DIR/file`"),
        (&generate, "--json --prompts", b"{\"prompt\": \"a\", \"image\": \"none.png\"}", "line 1 of `DIR/file`"),
        (&generate, "--json --prompts", b"{\"prompt\": \"a\", \"template\": \"x\"}", "line 1 of `DIR/file`"),
        (&generate, "--json --prompts", b"{\"prompt\": null}", "line 1 of `DIR/file`"),
        (&generate, "--json --prompts", deep.as_bytes(), "line 1 of `DIR/file`"),
        (&generate, "--json --prompts", long_prompt.as_bytes(), "tokens"),
    ];
    for (command, flag, bytes, part) in cases {
        let arguments = format!("{command} {flag} DIR/file");
        let arguments =
            if flag.contains("--force-ids") { arguments.replace("--max-new-tokens 1", "") } else { arguments };
        scratch.write("file", bytes).refuses(&words(&arguments), 1, part);
    }
    for flag in ["--prompt a --history", "--input-ids", "--json --prompts", "--prompt a --force-ids"] {
        for (file, part) in [("/dev/zero", "`/dev/zero`"), ("DIR", "`DIR`"), ("DIR/none", "`DIR/none`")] {
            let arguments = format!("{} {flag} {file}", generate.replace("--max-new-tokens 1", ""));
            scratch.refuses(&words(&arguments), 1, part);
        }
    }
    let long = vec![b'9'; (64 << 20) + 2];
    scratch.write("file", &long);
    scratch.refuses(&words(&format!("{ids} --input-ids DIR/file")), 1, "`DIR/file`: it is longer than 64 MiB");
}

#[test]
fn broken_rates_trees_and_requests() {
    let scratch = Scratch::new();
    let plan = "plan tiny --max-memory cpu:1GiB --links DIR/file";
    for text in ["", "[]", "{\"links\": 3}", "{\"host_bytes_per_s\": 0}", "{\"surprise\": 1}", &"[".repeat(1_000_000)] {
        scratch.write("file", text).refuses(&words(plan), 1, "`DIR/file`");
    }
    scratch.refuses(&words(&plan.replace("DIR/file", "/dev/zero")), 1, "/dev/zero");
    let outcome = scratch.run(&words("doctor --json"), b"");
    if outcome.code == 0 {
        let doctor: Value = serde_json::from_str(&outcome.stdout).unwrap();
        for (key, value) in
            [("read_bytes_per_s", json!(0)), ("disk_bytes_per_s", json!(-1)), ("f32_flops_per_s", json!(1e300))]
        {
            scratch.write("file", edited(&doctor["links"].to_string(), &format!("/host/{key}"), value));
            scratch.refuses(&words(plan), 1, &format!("`DIR/file`: `host.{key}` is "));
        }
    }
    let tree = "plan --policy accelerate --max-memory 0:1GiB --module-tree DIR/file";
    let one = r#"{"schema": "module-trees/1", "trees": {"t": {"root": {"class": "A", "repeat": 99999999999, "item": {"class": "B"}}}}}"#;
    for (text, part) in [
        ("", "not a file of module trees"),
        ("{\"schema\": \"module-trees/2\", \"trees\": {}}", "module-trees/2"),
        ("{\"schema\": \"module-trees/1\", \"trees\": {}}", "file"),
        (one, "more than 1048576"),
        (&"[".repeat(1_000_000), "not a file of module trees"),
    ] {
        scratch.write("file", text).refuses(&words(tree), 1, part);
    }
    scratch.refuses(&words(&format!("{tree}:u").replace("DIR/file", "tests/goldens/module_trees.json")), 1, "`u`");
    scratch.refuses(&words(&tree.replace("DIR/file", "/dev/zero")), 1, "/dev/zero");

    // Requests are answered, whatever they are: one line for each.
    let mut lines: Vec<Vec<u8>> =
        ["nonsense", "[]", "{}", "{\"model\": \"none\", \"max_memory\": []}"].map(Vec::from).into();
    lines.extend([b"\xff\xfe".to_vec(), "[".repeat(1_000_000).into_bytes(), vec![b'1'; (64 << 20) + 1]]);
    lines.push(b"{\"model\": \"tiny\", \"max_memory\": [[0, \"1GiB\"]]}".to_vec());
    let outcome = scratch.run(&["plan", "--requests"], &lines.join(&b'\n'));
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
    let answers: Vec<Value> = outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers.len(), lines.len());
    assert!(answers[..lines.len() - 1].iter().all(|answer| answer["error"]["type"].is_string()), "{answers:?}");
    assert_eq!(answers[lines.len() - 1]["device_map"], json!({"": 0}));
}

#[test]
fn places_that_cannot_be_written() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("dir")).unwrap();
    scratch.write("file", "x");
    let generate = format!("generate --model tiny@1 --tokenizer {TOKENIZER} --prompt a --max-new-tokens 1");
    let preprocess = "preprocess --image tests/goldens/tiny/caption.png --size 28";
    for (flag, place, part) in [
        ("--logits-out", "DIR/none/out", "cannot write `DIR/none/out`"),
        ("--logits-out", "DIR/dir", "cannot write `DIR/dir`"),
        ("--logits-out", "DIR/new/", "cannot write `DIR/new/`"),
        ("--logits-out", "DIR/file/out", "cannot write `DIR/file/out`"),
        ("--logits-out", "/proc/none", "cannot write `/proc/none`"),
        ("--logits-out", "/dev/full", "cannot write `/dev/full`: No space left"),
        ("--logits-out", "..", "cannot write `..`"),
        ("--hidden-states-out", "DIR/none/out", "cannot write `DIR/none/out`"),
        ("--hidden-states-out", "/dev/full", "cannot write `/dev/full`"),
        ("--out", "DIR/none/out", "cannot write `DIR/none/out`"),
        ("--out", "DIR/dir", "cannot write `DIR/dir`"),
        ("--out", "/dev/full", "cannot write `/dev/full`"),
    ] {
        let command = if flag == "--out" { preprocess } else { &generate };
        scratch.refuses(&words(&format!("{command} {flag} {place}")), 1, part);
    }
    let both = format!("{generate} --logits-out DIR/same --hidden-states-out DIR/same");
    scratch.refuses(&words(&both), 2, "--hidden-states-out");
    for (place, part) in [
        ("DIR/file", "`DIR/file"),
        ("DIR/file/deeper", "`DIR/file/deeper"),
        ("/proc/none", "`/proc/none"),
        ("DIR", "`DIR` is not empty"),
    ] {
        scratch.refuses(&["synth", "tiny@1", "--out", place], 1, part);
    }
    // Devices are written to, not replaced; links are written through.
    let out = scratch.path("target");
    symlink(&out, scratch.path("link")).unwrap();
    fs::write(&out, "old").unwrap();
    for place in ["/dev/null", "DIR/link"] {
        assert_eq!(scratch.run(&words(&format!("{generate} --logits-out {place}")), b"").code, 0);
    }
    use std::os::unix::fs::FileTypeExt;
    assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    assert!(fs::metadata("/dev/full").unwrap().file_type().is_char_device());
    assert!(scratch.path("link").is_symlink());
    assert_eq!(common::tensor_names(&out), ["logits"]);
}

/// What is printed into nothing ends the program: quietly where the reader has gone, with an error where the disk is full.
#[test]
fn stdout_that_cannot_be_written() {
    let scratch = Scratch::new();
    let generate =
        format!("generate --model tiny@1 --tokenizer {TOKENIZER} --prompt a --max-new-tokens 40 --ignore-eos");
    let commands = [
        "plan cogvlm-chat-17b --max-memory 0:24GiB,cpu:64GiB",
        "plan cogvlm-chat-17b --max-memory 0:24GiB,cpu:64GiB --json",
        "synth tiny@1 --digest",
        "--help",
        "--version",
        &generate,
    ];
    for command in commands {
        let mut child = scratch.command(&words(command)).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let code = wait(&mut child, PATIENCE).unwrap();
        let stderr = std::io::read_to_string(child.stderr.take().unwrap()).unwrap();
        assert!(code == 0 && !stderr.contains("panicked") && !stderr.contains("error"), "{command}: {code} {stderr}");

        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let mut child = scratch.command(&words(command)).stdout(full).stderr(Stdio::piped()).spawn().unwrap();
        let code = wait(&mut child, PATIENCE).unwrap();
        let stderr = std::io::read_to_string(child.stderr.take().unwrap()).unwrap();
        assert!(!stderr.contains("panicked"), "{command}: {stderr}");
        if !command.starts_with("--") {
            assert!(code == 1 && stderr.contains("cannot write to stdout"), "{command}: {code} {stderr}");
        }
    }
}

/// Interrupts a command after `delay`: it ends within a second, with 130, and the directory is as it was.
fn interrupt(scratch: &Scratch, arguments: &str, delay: Duration) {
    let before = scratch.listing();
    let mut command = scratch.command(&words(arguments));
    // `exec` keeps the process id, so the signal reaches the program itself. Its input stays open, as a terminal does.
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(delay);
    assert!(child.try_wait().unwrap().is_none(), "{arguments} has ended before it could be interrupted");
    let start = Instant::now();
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let code = wait(&mut child, PATIENCE).unwrap_or_else(|| panic!("{arguments} does not end"));
    let elapsed = start.elapsed();
    let stderr = std::io::read_to_string(child.stderr.take().unwrap()).unwrap();
    assert_eq!(code, 130, "{arguments}: {stderr}");
    assert!(!stderr.contains("panicked"), "{arguments}: {stderr}");
    // One second is promised; a machine that does other things besides gets another.
    assert!(elapsed < Duration::from_secs(2), "{arguments} took {elapsed:?}");
    assert_eq!(scratch.listing(), before, "{arguments} left something behind");
}

#[test]
fn interrupted() {
    let scratch = Scratch::new();
    // 16 GB of weights, and minutes of work, whatever is done with them.
    let config = repo("configs/models/cogvlm-chat-17b.json");
    let large = edited(&fs::read_to_string(config).unwrap(), "/num_hidden_layers", json!(12));
    scratch.write("large.json", large);
    let second = Duration::from_secs(1);
    interrupt(&scratch, "synth DIR/large.json@1 --out DIR/model --max-shard-size 1GB", second);
    interrupt(&scratch, "synth DIR/large.json@1 --out DIR/deeper/model", second);
    interrupt(&scratch, "synth DIR/large.json@1 --digest", second);
    // While it loads. Its weights are only made where they are used, so this needs no memory for them.
    let load = "generate --model DIR/large.json@1 --max-memory 0:3GiB,cpu:40GiB --context 256";
    scratch.write("ids.json", "[1, 5, 6]");
    interrupt(&scratch, &format!("{load} --input-ids DIR/ids.json --logits-out DIR/logits.safetensors"), second);
    // While it computes the prompt, while it decodes.
    let tiny = edited(&fs::read_to_string(repo("configs/models/tiny.json")).unwrap(), "/num_hidden_layers", json!(200));
    scratch.write("tiny.json", tiny);
    let decode =
        "--model DIR/tiny.json@1 --input-ids DIR/ids.json --ignore-eos --logits-out DIR/l --hidden-states-out DIR/h";
    interrupt(&scratch, &format!("generate {decode}"), 2 * second);
    // While it waits for a question.
    interrupt(&scratch, &format!("chat --model tiny@1 --tokenizer {TOKENIZER}"), second);
    interrupt(&scratch, &format!("tokenize --tokenizer {TOKENIZER}"), second);
    interrupt(&scratch, "plan --requests", second);
    interrupt(&scratch, "bench --model DIR/tiny.json@1 --repeats 1000", second);
}

/// What was there before stays as it was when the new one fails.
#[test]
fn old_files_survive() {
    let scratch = Scratch::new();
    scratch.write("out", "precious");
    let arguments = ["preprocess", "--image", "DIR/none.png", "--size", "28", "--out", "DIR/out"];
    scratch.refuses(&arguments, 1, "DIR/none.png");
    let arguments =
        format!("generate --model tiny@1 --tokenizer {TOKENIZER} --prompt a --context 1 --logits-out DIR/out");
    scratch.refuses(&words(&arguments), 1, "the prompt has 10 tokens");
    assert_eq!(fs::read_to_string(scratch.path("out")).unwrap(), "precious");
}

/// Names that people give to directories, an environment without anything, a working directory that is gone.
#[test]
fn odd_places() {
    let scratch = Scratch::new();
    let dir = "DIR/ü b\n$(c)'\"/m@2";
    let tokenizer = repo(TOKENIZER);
    let succeeds = |command: &mut Command| {
        let output = command.env_clear().output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && !stderr.contains("error"), "{command:?}: {stderr}");
    };
    succeeds(&mut scratch.command(&["synth", "tiny@1", "--out", dir]));
    let path = scratch.path("ü b\n$(c)'\"/m@2");
    fs::copy(tokenizer, path.join("tokenizer.model")).unwrap();
    let generate = ["generate", "--model", dir, "--prompt", "a", "--max-new-tokens", "1"];
    succeeds(&mut scratch.command(&["inspect", dir]));
    succeeds(&mut scratch.command(&["plan", dir, "--max-memory", "cpu:1GiB"]));
    succeeds(&mut scratch.command(&["plan", dir, "--max-memory", "0:1GiB", "--policy", "accelerate"]));
    succeeds(&mut scratch.command(&generate));
    fs::remove_file(path.join("config.json")).unwrap();
    scratch.refuses(&generate, 1, "`DIR/ü b $(c)'\"/m@2/config.json` does not exist");

    let gone = scratch.path("gone");
    fs::create_dir(&gone).unwrap();
    let in_gone = format!(
        "cd '{0}' && rmdir '{0}' && exec '{1}' plan tiny --max-memory cpu:1GiB",
        arg(&gone),
        env!("CARGO_BIN_EXE_cogvlm-shard")
    );
    succeeds(Command::new("/bin/sh").args(["-c", &in_gone]));
}
