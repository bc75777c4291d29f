//! Every command beside `plan` and `generate`: what it prints, what it writes, how it ends.

mod common;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{
    TOKENIZER, arg, assert_refusal, cogvlm, cogvlm_json, cogvlm_with_stdin, read_json, refusal, repo, write_json,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Runs `tokenize` over lines of JSON; one line comes back for each.
fn tokenize(flags: &[&str], lines: &[Value]) -> Vec<Value> {
    let input: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let outcome = cogvlm_with_stdin(&[&["tokenize", "--tokenizer", TOKENIZER], flags].concat(), &input);
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
    let answers: Vec<Value> = outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers.len(), lines.len());
    answers
}

#[test]
fn tokenize_agrees_with_every_golden_case() {
    let goldens = read_json("tests/goldens/tokenizer_cases.json");
    let cases = goldens["cases"].as_array().unwrap();
    let column = |cases: &[Value], key: &str| cases.iter().map(|case| case[key].clone()).collect::<Vec<_>>();
    assert_eq!(cases.len(), 300);
    assert_eq!(tokenize(&[], &column(cases, "text")), column(cases, "ids"));
    let decode = [cases.as_slice(), goldens["decode_cases"].as_array().unwrap()].concat();
    assert_eq!(decode.len(), 400);
    assert_eq!(tokenize(&["--decode"], &column(&decode, "ids")), column(&decode, "decoded"));
    let without_special = column(&decode, "decoded_skip_special");
    assert_eq!(tokenize(&["--decode", "--skip-special"], &column(&decode, "ids")), without_special);
    assert_ne!(column(&decode, "decoded"), without_special);
}

#[test]
fn tokenize_takes_special_tokens_for_text_where_told() {
    let texts = [json!("a</s>b<s>"), json!("nothing special")];
    let (special, plain) = (tokenize(&[], &texts), tokenize(&["--plain"], &texts));
    let has = |ids: &Value, id: u64| ids.as_array().unwrap().contains(&json!(id));
    assert!(has(&special[0], 1) && has(&special[0], 2));
    assert!(!has(&plain[0], 1) && !has(&plain[0], 2));
    assert_eq!(special[1], plain[1]);
    assert_eq!(tokenize(&["--decode", "--skip-special"], &plain), texts);
}

/// One line in, one line out: a program at the other end of both pipes may wait for each answer.
#[test]
fn tokenize_answers_line_by_line() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_cogvlm-shard"))
        .args(["tokenize", "--tokenizer", TOKENIZER])
        .current_dir(repo(""))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let (sender, answers) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines() {
            drop(sender.send(line.unwrap()));
        }
    });
    for text in ["\"one\"\n", "\"two\"\n"] {
        stdin.write_all(text.as_bytes()).unwrap();
        let answer = answers.recv_timeout(Duration::from_secs(20)).expect("an answer while stdin is open");
        assert!(answer.starts_with('[') && answer.ends_with(']'), "{answer}");
    }
    drop(stdin);
    assert!(child.wait().unwrap().success());
}

#[test]
fn tokenize_says_which_line_is_wrong() {
    for (flags, input, line) in [
        (&[][..], "\"a\"\n7\n", "line 2"),
        (&["--decode"], "[1]\n\n[99999]\n", "line 3"),
        (&["--decode"], "\"a\"\n", "line 1"),
    ] {
        let outcome = cogvlm_with_stdin(&[&["tokenize", "--tokenizer", TOKENIZER], flags].concat(), input);
        let error = assert_refusal(&outcome, 1, input);
        assert!(error.contains(line), "{error}");
    }
    assert!(refusal(&["tokenize", "--tokenizer", "nowhere.model"], 1).contains("nowhere.model"));
    refusal(&["tokenize"], 2);
    refusal(&["tokenize", "--tokenizer", TOKENIZER, "--skip-special"], 2);
}

/// The data of the one tensor of a safetensors file.
fn tensor_data(path: &Path, name: &str) -> (Vec<usize>, Vec<u8>) {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.names(), [name]);
    let tensor = file.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), safetensors::Dtype::F32);
    (tensor.shape().to_vec(), tensor.data().to_vec())
}

#[test]
fn preprocess_gives_the_golden_pixels() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("pixels.safetensors");
    let mut count = 0;
    for (set, size) in [("tiny", "56"), ("small", "490"), ("extra/odd", "42"), ("extra/image224", "224")] {
        for entry in std::fs::read_dir(repo(&format!("tests/goldens/{set}"))).unwrap() {
            let file = entry.unwrap().path();
            if file.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let case: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
            let image = &case["image"];
            let Some(name) = image["decoded_file"].as_str().or(image["file"].as_str()) else { continue };
            let picture = file.with_file_name(name);
            let outcome = cogvlm(&["preprocess", "--image", arg(&picture), "--size", size, "--out", arg(&out)]);
            assert_eq!((outcome.code, &*outcome.stdout, &*outcome.stderr), (0, "", ""), "{}", picture.display());
            let side: usize = size.parse().unwrap();
            let (shape, data) = tensor_data(&out, "pixel_values");
            assert_eq!(shape, [3, side, side]);
            assert_eq!(sha256(&data), image["pixels"]["sha256"].as_str().unwrap(), "{}", file.display());
            count += 1;
        }
    }
    assert!(count >= 18, "{count}");
    let bad = |image: &str, size: &str, code| {
        refusal(
            &["preprocess", "--image", image, "--size", size, "--out", arg(&dir.path().join("no.safetensors"))],
            code,
        )
    };
    assert!(bad("nowhere.png", "56", 1).contains("nowhere.png"));
    assert!(bad("tests/goldens/README.md", "56", 1).contains("README.md"));
    bad("tests/data/photo.jpg", "0", 2);
    let error = refusal(
        &["preprocess", "--image", "tests/data/photo.jpg", "--size", "8", "--out", "/nowhere/a.safetensors"],
        1,
    );
    assert!(error.contains("/nowhere/a.safetensors"), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else was written");
}

#[test]
fn synth_digests_are_the_recorded_ones() {
    for (model, digest) in [
        ("tiny@11", "f0df3b8de6d3b1cde936f60b112e8a3569a1943c75c28c94a02288db23277e9d"),
        ("small@12", "05b8af8b6a2d48825856f36cb4c1f81cf5da1e9304fb3ada613cbe2448677f50"),
        ("deep@13", "ca485308da03f33eb4f627dd1f2368573a0aed6c8a0734f53e65aebe4ff6cce5"),
        (
            "tests/goldens/extra/image224/config.json@21",
            "566210d29ee06b4a9ce5550d8dad9beb037785d406c2e0806c2cfaa838f2aa97",
        ),
        ("tests/goldens/extra/odd/config.json@23", "effc590c69dad5978c6421000ead8d7d50ed505112430bc8ba922e3c04df5e03"),
    ] {
        let outcome = cogvlm(&["synth", model, "--digest"]);
        assert_eq!((outcome.code, outcome.stdout, &*outcome.stderr), (0, format!("{digest}\n"), ""), "{model}");
    }
    for (model, word) in
        [("tiny", "tiny"), ("tiny@x", "tiny@x"), ("huge@1", "huge"), ("nowhere.json@1", "nowhere.json")]
    {
        let error = refusal(&["synth", model, "--digest"], 1);
        assert!(error.contains(word), "{error}");
    }
    refusal(&["synth", "tiny@11"], 2);
}

/// Names and bytes of all files of a directory.
fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&path).unwrap()))
        .collect();
    files.sort();
    files
}

/// SHA-256 over name, line end and data of every tensor of a directory's files, in the order of the files.
fn digest_of(dir: &Path) -> String {
    let mut hasher = Sha256::new();
    for (name, bytes) in files(dir).iter().filter(|(name, _)| name.ends_with(".safetensors")) {
        let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
        let mut tensors = file.tensors();
        let start = bytes.as_ptr();
        tensors.sort_by_key(|(_, tensor)| tensor.data().as_ptr() as usize - start as usize);
        assert!(!tensors.is_empty(), "{name}");
        for (name, tensor) in tensors {
            hasher.update(format!("{name}\n"));
            hasher.update(tensor.data());
        }
    }
    hex(&hasher.finalize())
}

#[test]
fn synth_writes_checkpoints_that_inspect_calls_complete() {
    let dir = TempDir::new().unwrap();
    let (whole, sharded) = (dir.path().join("whole"), dir.path().join("sharded/below"));
    let synth = |out: &Path, flags: &[&str]| cogvlm(&[&["synth", "tiny@11", "--out", arg(out)], flags].concat());
    let outcome = synth(&whole, &[]);
    assert_eq!((outcome.code, &*outcome.stdout), (0, ""), "{}", outcome.stderr);
    let names = |dir: &Path| files(dir).into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    assert_eq!(names(&whole), ["config.json", "generation_config.json", "model.safetensors"]);

    let digest = "f0df3b8de6d3b1cde936f60b112e8a3569a1943c75c28c94a02288db23277e9d";
    let outcome = synth(&sharded, &["--max-shard-size", "1MB", "--digest"]);
    assert_eq!((outcome.code, outcome.stdout), (0, format!("{digest}\n")));
    assert_eq!((digest_of(&whole).as_str(), digest_of(&sharded).as_str()), (digest, digest));
    // Each tensor of more than a megabyte has a file of its own; no file holds more otherwise.
    let index: Value =
        serde_json::from_str(&std::fs::read_to_string(sharded.join("model.safetensors.index.json")).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], 20_238_272);
    let shards: Vec<_> = files(&sharded).into_iter().filter(|(name, _)| name.ends_with(".safetensors")).collect();
    assert!(shards.len() > 5, "{}", shards.len());
    for (name, bytes) in &shards {
        let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        assert!(bytes.len() - 8 - header <= 1_000_000 || file.len() == 1, "{name}");
        assert_eq!(header % 8, 0, "{name}");
        for tensor in file.names() {
            assert_eq!(index["weight_map"][tensor], json!(name), "{tensor}");
        }
    }
    // The embedding begins with the recorded values.
    let first = &shards[0].1;
    let file = safetensors::SafeTensors::deserialize(first).unwrap();
    let embedding = file.tensor("model.embed_tokens.weight").unwrap();
    assert_eq!(hex(&embedding.data()[..8]), "4d3d213c8b3d6cbd");

    let config: Value = serde_json::from_str(&std::fs::read_to_string(whole.join("config.json")).unwrap()).unwrap();
    assert_eq!((&config["hidden_size"], &config["vision_config"]["hidden_size"]), (&json!(128), &json!(64)));
    let mut lists = BTreeSet::new();
    for (dir, num_files) in [(&whole, 1), (&sharded, shards.len())] {
        let report = cogvlm_json(&["inspect", arg(dir), "--json", "--hash"]);
        assert_eq!((&report["num_parameters"], &report["tensor_bytes"]), (&json!(10_119_072), &json!(20_238_272)));
        assert_eq!(report["files"].as_array().unwrap().len(), num_files);
        // One hash of the list of all tensors' hashes, whatever files they are in.
        let tensors = report["tensor_hashes"]["tensors"].as_array().unwrap().iter();
        let word = |tensor: &Value, key: &str| tensor[key].as_str().unwrap().to_owned();
        let list: String = tensors.map(|it| format!("{}  {}\n", word(it, "sha256"), word(it, "name"))).collect();
        assert_eq!(report["tensor_hashes"]["combined"], sha256(list.as_bytes()));
        lists.insert(list);
        for file in report["file_hashes"].as_array().unwrap() {
            let path = Path::new(file["path"].as_str().unwrap());
            assert_eq!(file["sha256"], sha256(&std::fs::read(path).unwrap()), "{}", path.display());
        }
        let outcome = cogvlm(&["inspect", arg(dir)]);
        assert_eq!((outcome.code, &*outcome.stderr), (0, ""));
        assert!(outcome.stdout.contains("complete") && outcome.stdout.contains("10119072"), "{}", outcome.stdout);
    }
    assert_eq!(lists.len(), 1);
    // Twice is once; another model does not go where one is.
    let before = files(&sharded);
    let outcome = synth(&sharded, &["--max-shard-size", "1MB"]);
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    assert!(outcome.stderr.contains("already"), "{}", outcome.stderr);
    assert_refusal(&synth(&sharded, &[]), 1, "other shards in the same place");
    let outcome = cogvlm(&["synth", "tiny@12", "--out", arg(&whole)]);
    let error = assert_refusal(&outcome, 1, "another seed");
    assert!(error.contains(arg(&whole)), "{error}");
    assert!(files(&sharded) == before && digest_of(&whole) == digest);
    refusal(&["synth", "tiny@11", "--out", arg(&dir.path().join("x")), "--max-shard-size", "many"], 1);
    assert!(!dir.path().join("x").exists());
}

#[test]
fn synth_takes_a_configuration_file() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("odd");
    let outcome = cogvlm(&["synth", "tests/goldens/extra/odd/config.json@23", "--out", arg(&out)]);
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    assert_eq!(digest_of(&out), "effc590c69dad5978c6421000ead8d7d50ed505112430bc8ba922e3c04df5e03");
    let (written, given) =
        (std::fs::read(out.join("config.json")).unwrap(), read_json("tests/goldens/extra/odd/config.json"));
    assert_eq!(serde_json::from_slice::<Value>(&written).unwrap()["hidden_size"], given["hidden_size"]);
}

#[test]
fn inspect_names_what_is_missing() {
    let dir = TempDir::new().unwrap();
    let model = dir.path().join("model");
    assert_eq!(cogvlm(&["synth", "tiny@11", "--out", arg(&model), "--max-shard-size", "1MB"]).code, 0);
    let shard = files(&model).into_iter().map(|(name, _)| name).find(|name| name.starts_with("model-00003")).unwrap();
    std::fs::remove_file(model.join(&shard)).unwrap();
    for flags in [&[][..], &["--json"], &["--hash"]] {
        let outcome = cogvlm(&[&["inspect", arg(&model)], flags].concat());
        assert!(assert_refusal(&outcome, 1, "a shard is gone").contains(&shard), "{}", outcome.stderr);
        assert_eq!(outcome.stdout, "");
    }
    assert!(refusal(&["inspect", "/nowhere/model"], 1).contains("/nowhere/model"));
}

/// Ctrl-C: the program is gone within a second, and what it was writing is gone with it.
#[test]
fn an_interrupted_synth_leaves_nothing() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("model");
    // 35 GB: it cannot have ended by itself.
    let mut child = Command::new(env!("CARGO_BIN_EXE_cogvlm-shard"))
        .args(["synth", "cogvlm-chat-17b@1", "--out", arg(&out)])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while std::fs::read_dir(&out).map_or(0, Iterator::count) == 0 {
        assert!(start.elapsed() < Duration::from_secs(20), "nothing is written");
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(100));
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let start = Instant::now();
    let status = child.wait().unwrap();
    // A second on a machine of its own; other tests run beside this one.
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    assert!(!status.success());
    assert!(!out.exists() || files(&out).is_empty(), "{:?}", std::fs::read_dir(&out).unwrap().collect::<Vec<_>>());
}

#[test]
fn doctor_describes_the_machine_and_gives_rates_to_plan() {
    let report = cogvlm_json(&["doctor", "--json"]);
    assert_eq!(report["schema"], "cogvlm-shard.doctor/2");
    let host = &report["host"];
    for key in ["threads", "memory_bytes", "available_bytes"] {
        assert!(host[key].as_u64().unwrap() > 0, "{key}");
    }
    assert!(host["available_bytes"].as_u64() <= host["memory_bytes"].as_u64());
    for key in ["read_bytes_per_s", "f32_flops_per_s", "bf16_flops_per_s"] {
        assert!(host[key].as_f64().unwrap() > 1e6, "{key}");
    }
    assert!(report["cuda"]["built_in"].is_boolean() && report["cuda"]["device_files"].is_array());
    let dir = TempDir::new().unwrap();
    let file = write_json(dir.path(), "machine.json", &report);
    let plan = cogvlm_json(&["plan", "--json", "--max-memory", "cpu:48GiB", "--links", arg(&file)]);
    let links = &report["links"];
    assert_eq!(
        (&links["schema"], &links["devices"], &links["pairs"]),
        (&json!("cogvlm-shard.links/1"), &json!({}), &json!([]))
    );
    assert_eq!(links["host"]["read_bytes_per_s"], host["read_bytes_per_s"]);
    let machine = links["measured_on"]["machine"].as_str().unwrap();
    assert_eq!(plan["predicted_with"], format!("measured on {machine} (`cpu`)"));
    // Decoding on the host reads the hot weights once per token, at the rate measured.
    let least = 13.2e9 / host["read_bytes_per_s"].as_f64().unwrap();
    assert!(plan["predicted_seconds_per_token"].as_f64().unwrap() >= least);

    let outcome = cogvlm(&["doctor", "--backend", "cuda"]);
    assert_refusal(&outcome, 1, "doctor --backend cuda");
    assert!(outcome.stderr.contains("hint: "), "{}", outcome.stderr);
    for word in ["host", "memory", "cpu", "cuda"] {
        assert!(outcome.stdout.contains(word), "{}", outcome.stdout);
    }
}

#[test]
fn demo_plans_and_answers() {
    let outcome = cogvlm(&["demo"]);
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    // The answer alone is data: one line, 24 tokens long.
    assert_eq!(outcome.stdout.lines().count(), 1, "{}", outcome.stdout);
    assert!(outcome.stdout.len() > 24);
    for word in ["synthetic", "mean nothing", "device", "budget", "cpu -> 0", "answer:", "tokens/s"] {
        assert!(outcome.stderr.contains(word), "{word}: {}", outcome.stderr);
    }
    // The plan shown is the one that the command shown gives.
    let command = outcome.stderr.lines().find_map(|line| line.strip_prefix("$ cogvlm-shard ")).unwrap();
    let plan = cogvlm(&command.split(' ').collect::<Vec<_>>());
    assert_eq!(plan.code, 0, "{}", plan.stderr);
    let table: Vec<&str> = plan.stdout.lines().take_while(|line| !line.starts_with("predicted")).collect();
    assert!(table.len() > 5 && outcome.stderr.contains(&table.join("\n")), "{}\n{}", plan.stdout, outcome.stderr);
}

#[test]
fn bench_measures_every_part() {
    let flags =
        ["bench", "--model", "tiny@11", "--backend", "cpu", "--context", "64", "--repeats", "2", "--batch", "2"];
    let flags = [&flags[..], &["--prompt-tokens", "8", "--new-tokens", "8"]].concat();
    let report = cogvlm_json(&[&flags[..], &["--json"]].concat());
    assert_eq!(report["schema"], "cogvlm-shard.bench/2");
    for (key, value) in
        [("model", json!("tiny@11")), ("dtype", json!("bf16")), ("batch", json!(2)), ("repeats", json!(2))]
    {
        assert_eq!(report[key], value, "{key}");
    }
    // BOS, 16 patches with boi and eoi, 8 words.
    assert_eq!(report["prompt_tokens"], 1 + 18 + 8);
    let number =
        |place: &str| report.pointer(place).and_then(Value::as_f64).unwrap_or_else(|| panic!("{place} in {report}"));
    for place in [
        "/load/ms",
        "/load/weight_bytes",
        "/ttft/ms",
        "/vision/ms",
        "/prefill/ms",
        "/prefill/tokens_per_s",
        "/prefill/flops_per_s",
        "/prefill/share_of_ceiling",
        "/decode/0/ms_per_step",
        "/decode/0/tokens_per_s",
        "/decode/0/bytes_per_s",
        "/decode/0/share_of_ceiling",
        "/decode/1/speedup",
        "/decode/1/prefill_ms",
        "/predicted/decode_ms",
        "/predicted/image_ms",
        "/predicted/prefill_ms",
        "/predicted/decode/1/ms_per_step",
        "/predicted/decode/1/tokens_per_s",
        "/predicted_by_measured_rates/decode_ms",
        "/predicted_by_measured_rates/image_ms",
        "/predicted_by_measured_rates/decode/1/ms_per_step",
        "/ceiling/read_bytes_per_s",
        "/ceiling/flops_per_s",
        "/memory/cpu/planned_bytes",
        "/memory/cpu/peak_bytes",
        "/memory/cpu/arena_bytes",
        "/memory/cpu/share_of_plan",
    ] {
        assert!(number(place) > 0.0, "{place}");
    }
    assert!(number("/load/to_first_token_ms") > number("/load/ms"));
    assert!(number("/predicted/decode_deviation_percent") > -100.0);
    assert_eq!(report["predicted"]["rates"], "assumed of a desktop host (`cpu`)");
    assert_eq!(report["predicted_by_measured_rates"]["rates"], "measured in this run");
    // One sequence comes first; weights are used where they are mapped.
    let sequences: Vec<_> = report["decode"].as_array().unwrap().iter().map(|decode| &decode["sequences"]).collect();
    assert_eq!((sequences, number("/decode/0/speedup")), (vec![&json!(1), &json!(2)], 1.0));
    assert_eq!((&report["load"]["copied_bytes"], &report["load"]["bytes_per_s"]), (&json!(0), &Value::Null));

    let text = cogvlm(&[&flags[..], &["--text-only", "--dtype", "f32"]].concat());
    assert_eq!(text.code, 0, "{}", text.stderr);
    let words = ["tiny@11 in f32 on cpu", "9 prompt tokens", "load", "cold start", "prefill", "decode 1", "decode 2"];
    for word in [&words[..], &["tokens/s", "predicted", "measured", "1 GiB read by all cores", "rank cpu"]].concat() {
        assert!(text.stdout.contains(word), "{word}: {}", text.stdout);
    }
    let error = refusal(&["bench", "--model", "tiny@11", "--context", "32"], 1);
    assert!(error.contains("context"), "{error}");
    refusal(&["bench", "--model", "tiny@11", "--repeats", "0"], 2);
}

/// Several numbers of sequences after one load, on two virtual ranks that weights are copied to.
#[test]
fn bench_decodes_as_many_sequences_as_are_named() {
    let scratch = TempDir::new().unwrap();
    let budgets = ["--backend", "cpu", "--max-memory", "0:1GiB,1:1GiB,cpu:1GiB", "--context", "64", "--batch", "4"];
    let plan = cogvlm_json(&[&["plan", "tiny", "--policy", "balanced", "--json"], &budgets[..]].concat());
    let plan = write_json(scratch.path(), "plan.json", &plan);
    let flags = ["bench", "--model", "tiny@1", "--backend", "cpu", "--device-map", arg(&plan), "--repeats", "1"];
    let flags = [&flags[..], &["--prompt-tokens", "4", "--new-tokens", "4", "--sequences"]].concat();
    let report = cogvlm_json(&[&flags[..], &["4,3", "--json"]].concat());
    let decode = report["decode"].as_array().unwrap();
    let column = |key: &str| decode.iter().map(|decode| decode[key].as_f64().expect(key)).collect::<Vec<_>>();
    assert_eq!(column("sequences"), [1.0, 3.0, 4.0]);
    for ((tokens_per_s, step_ms), (sequences, speedup)) in
        column("tokens_per_s").iter().zip(column("ms_per_step")).zip(column("sequences").iter().zip(column("speedup")))
    {
        let expected = sequences / step_ms * 1e3;
        assert!((tokens_per_s / expected - 1.0).abs() < 1e-9, "{decode:?}");
        assert!((speedup / (expected / column("tokens_per_s")[0]) - 1.0).abs() < 1e-9, "{decode:?}");
    }
    // Each sequence adds its KV cache to what a step reads.
    let bytes: Vec<f64> =
        column("bytes_per_s").iter().zip(column("ms_per_step")).map(|(rate, ms)| rate * ms / 1e3).collect();
    let of_one = (bytes[2] - bytes[1]) / bytes[0];
    assert!(of_one > 0.0 && ((bytes[1] - bytes[0]) / bytes[0] / of_one - 2.0).abs() < 1e-6, "{bytes:?}");
    let copied = |key: &str| report["load"][key].as_f64().unwrap_or_else(|| panic!("{key} in {report}"));
    assert!(copied("copied_bytes") > 0.0 && copied("bytes_per_s") > 0.0);
    assert_eq!(report["load"]["share_of_ceiling"], Value::Null, "the host has no link");

    // Beyond the batch: that of the plan, and that of the flags before anything is loaded.
    let raise = |outcome: &common::Outcome| {
        let error = assert_refusal(outcome, 1, "too many sequences");
        assert!(error.contains("`--sequences 5`") && outcome.stderr.contains("raise `--batch` to 5"), "{error}");
    };
    raise(&cogvlm(&[&flags[..], &["2,5"]].concat()));
    raise(&cogvlm(&["bench", "--model", "nowhere", "--batch", "4", "--sequences", "5"]));
    let error = refusal(&["bench", "--model", "tiny@1", "--sequences", "0,1"], 2);
    assert!(error.contains("--sequences"), "{error}");
}

#[test]
fn bench_times_kernels_on_a_gpu_alone() {
    // The name of a configuration is enough, and there is no GPU here.
    let outcome = cogvlm(&["bench", "--model", "cogvlm-chat-17b", "--kernels"]);
    let error = assert_refusal(&outcome, 1, "bench --kernels");
    assert!(error.contains("CUDA") || error.contains("NVIDIA driver"), "{error}");
    let long = ["bench", "--model", "tiny", "--kernels", "--prompt-tokens", "18446744073709551615"];
    assert!(refusal(&long, 1).contains("text tokens"));
    for (flags, part) in [
        (&["--kernels", "--backend", "cpu"][..], "--backend cpu"),
        (&["--kernels", "--sequences", "1"], "--sequences"),
        (&["--kernels", "--text-only"], "--text-only"),
        (&["--path", "portable"], "--kernels"),
    ] {
        let outcome = cogvlm(&[&["bench", "--model", "tiny@1"], flags].concat());
        assert_refusal(&outcome, 2, part);
        assert!(outcome.stderr.contains(part), "{}", outcome.stderr);
    }
}

/// Every command and flag of the contract, and nothing on stderr.
#[test]
fn help_names_every_flag() {
    let placement = ["--max-memory", "--policy", "--context", "--batch", "--backend", "--dtype"];
    let model = ["--model", "--device-map"];
    let sampling =
        ["--max-new-tokens", "--temperature", "--top-k", "--top-p", "--repetition-penalty", "--seed", "--stop"];
    let plan = ["--accelerate-version", "--no-split", "--balanced-memory", "--module-tree", "--requests", "--json"];
    let generate = [
        "--prompt",
        "--image",
        "--template",
        "--history",
        "--json",
        "--logits-out",
        "--ignore-eos",
        "--force-ids",
        "--input-ids",
        "--tokenizer",
    ];
    let commands: &[(&str, &[&[&str]])] = &[
        ("plan", &[&placement, &plan, &["--links"]]),
        ("inspect", &[&["--hash", "--json"]]),
        ("synth", &[&["--out", "--max-shard-size", "--digest"]]),
        ("generate", &[&placement, &model, &sampling, &generate]),
        ("chat", &[&placement, &model, &sampling, &["--image", "--tokenizer", "--template"]]),
        ("bench", &[&placement, &model, &["--sequences", "--kernels", "--json"]]),
        ("doctor", &[&["--backend", "--json"]]),
        ("demo", &[]),
        ("tokenize", &[&["--tokenizer", "--decode"]]),
        ("preprocess", &[&["--image", "--size", "--out"]]),
    ];
    let overview = cogvlm(&["--help"]).stdout;
    for (command, flags) in commands {
        assert!(overview.contains(&format!("\n  {command} ")), "{command}: {overview}");
        let help = cogvlm(&[command, "--help"]);
        assert_eq!((help.code, &*help.stderr), (0, ""), "{command}");
        for flag in flags.iter().copied().flatten() {
            let listed = help.stdout.lines().any(|line| line.split_whitespace().next() == Some(flag));
            assert!(listed, "`{command} --help` does not list {flag}:\n{}", help.stdout);
        }
    }
    for later in ["caption", "serve"] {
        assert!(!overview.contains(later), "{overview}");
        refusal(&[later], 2);
    }
    let version = cogvlm(&["--version"]);
    assert_eq!((version.code, version.stdout), (0, format!("cogvlm-shard {}\n", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn wrong_usage_is_2_and_a_refusal_is_1() {
    let tiny = ["generate", "--model", "tiny@11", "--tokenizer", TOKENIZER];
    for flags in [
        &["--frobnicate"][..],
        &["frobnicate"],
        &["plan", "a", "b"],
        &["plan", "--policy", "fastest"],
        &["plan", "--context", "many"],
        &["plan", "--batch", "-1"],
        &["generate", "--prompt", "x"],
        &["generate", "--model", "tiny@11"],
        &["generate", "--model", "tiny@11", "--prompt", "x", "--input-ids", "y.json"],
        &["chat"],
        &["inspect"],
        &["synth"],
        &["preprocess", "--image", "x"],
        &["doctor", "--backend", "tpu"],
        &["--log", "loud", "demo"],
    ] {
        let outcome = cogvlm(flags);
        assert_refusal(&outcome, 2, &format!("{flags:?}"));
        assert_eq!(outcome.stdout, "", "{flags:?}");
    }
    for flags in [
        &["--prompt", "x", "--temperature", "-1"][..],
        &["--prompt", "x", "--top-p", "1.5"],
        &["--prompt", "x", "--repetition-penalty", "0"],
        &["--prompt", "x", "--max-new-tokens", "0"],
        &["--prompt", "x", "--stop", ""],
        &["--prompt", "x", "--threads", "0"],
        &["--prompt", "x", "--device-map", "x.json", "--policy", "latency"],
    ] {
        refusal(&[&tiny[..], flags].concat(), 2);
    }
    for (flags, word) in [
        (&["plan", "--max-memory", "0:lots"][..], "0:lots"),
        (&["plan", "--max-memory", "tpu:1GiB"], "tpu:1GiB"),
        (&["plan", "--max-memory", "0:1GiB,0:2GiB"], "0:2GiB"),
        (&["plan", "--max-memory", "disk:1GiB"], "--max-memory"),
        (&["plan", "--max-memory", "0:40GiB", "--context", "100000"], "--context"),
        (&["plan", "--max-memory", "0:40GiB", "--context", "0"], "--context"),
        (&["plan", "--max-memory", "0:40GiB", "--batch", "0"], "--batch"),
        (&["plan", "no-such-model", "--max-memory", "0:40GiB"], "no-such-model"),
        (&["generate", "--model", "tiny", "--prompt", "x"], "`tiny`"),
        (&["generate", "--model", "nowhere@1", "--prompt", "x"], "nowhere"),
        (&["generate", "--model", "tiny@11", "--prompt", "x"], "tokenizer"),
        (&["generate", "--model", "tiny@11", "--input-ids", "nowhere.json"], "nowhere.json"),
    ] {
        let outcome = cogvlm(flags);
        let error = assert_refusal(&outcome, 1, &format!("{flags:?}"));
        assert!(error.contains(word), "{error}");
        assert_eq!(outcome.stdout, "", "{flags:?}");
    }
}

/// What is logged goes to stderr without colours, and data stays clean.
#[test]
fn logs_are_plain_text_on_stderr() {
    let flags = ["--log", "debug", "generate", "--model", "tiny@11", "--prompt", "x", "--tokenizer", TOKENIZER];
    let outcome = cogvlm(&[&flags[..], &["--context", "64", "--max-new-tokens", "2", "--json"]].concat());
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    assert!(outcome.stderr.contains("num_rows"), "{}", outcome.stderr);
    assert!(!outcome.stderr.contains('\u{1b}'), "{:?}", outcome.stderr);
    serde_json::from_str::<Value>(&outcome.stdout).unwrap();
}
