//! Every golden case, through `generate`: same prompt, ids, types, positions, hidden states, logits, tokens, text. On
//! the host, and as ignored tests on a GPU.

mod common;

use std::path::{Path, PathBuf};

use common::{Outcome, arg, cogvlm, cogvlm_with_gpus, ids, json_of, read_tensor, relative_rms, repo, tensor_names};
use serde_json::Value;
use tempfile::TempDir;

/// Where a case runs.
#[derive(Clone, Copy)]
struct Target {
    /// `--backend`, and what it may use.
    arguments: &'static [&'static str],
    run: fn(&[&str]) -> Outcome,
    /// Relative RMS of an f32 answer.
    f32_bound: f64,
}

/// Two right f32 implementations differ by 1e-6 to 2e-6, the smallest mistake known on these cases (the tanh form of
/// gelu, in `odd/long`) by 1.7e-5.
const CPU: Target = Target { arguments: &["--backend", "cpu"], run: cogvlm, f32_bound: 5e-6 };
/// One GPU, within what ARCHITECTURE.md promises of every backend.
const GPU: Target =
    Target { arguments: &["--backend", "cuda", "--max-memory", "0:8GiB"], run: cogvlm_with_gpus, f32_bound: 2e-5 };
/// All memory of all GPUs.
const GPUS: Target = Target { arguments: &["--backend", "cuda"], ..GPU };
/// bf16 may be this much worse than the reference in bf16.
const BF16_FACTOR: f64 = 1.25;

/// One recorded case.
struct Golden {
    file: PathBuf,
    json: Value,
    target: Target,
}

impl Golden {
    fn open(name: &str, target: Target) -> Self {
        let file = repo(&format!("tests/goldens/{name}.json"));
        let json = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
        Self { file, json, target }
    }

    fn tensors(&self) -> PathBuf {
        self.file.with_extension("safetensors")
    }

    fn beside(&self, name: &str) -> String {
        arg(&self.file.with_file_name(name)).to_owned()
    }

    /// Runs the program there, which has to succeed, and reads the JSON object that it prints.
    fn run(&self, arguments: &[String]) -> Value {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        json_of(&(self.target.run)(&arguments), &arguments)
    }

    /// `NAME@SEED`, of a built-in configuration or of the file beside the case.
    fn model(&self) -> String {
        let config = self.json["config"].as_str().unwrap();
        let config = if config.ends_with(".json") { self.beside(config) } else { config.to_owned() };
        format!("{config}@{}", self.json["seed"])
    }

    /// The request as arguments. JPEGs are given as their decoded pixels, since decoders differ by a level or two.
    fn arguments(&self, model: &str, dir: &Path) -> Vec<String> {
        let text = |key: &str| self.json[key].as_str().unwrap().to_owned();
        let mut arguments: Vec<String> =
            ["generate", "--json", "--ignore-eos", "--tokenizer", "tests/goldens/tokenizer.model"]
                .map(str::to_owned)
                .into();
        arguments.extend(self.target.arguments.iter().map(|argument| (*argument).to_owned()));
        arguments.extend([
            "--model".to_owned(),
            model.to_owned(),
            "--prompt".to_owned(),
            text("query"),
            "--template".to_owned(),
            text("template"),
        ]);
        if self.json["history"].as_array().is_some_and(|turns| !turns.is_empty()) {
            let file = dir.join("history.json");
            std::fs::write(&file, self.json["history"].to_string()).unwrap();
            arguments.extend(["--history".to_owned(), arg(&file).to_owned()]);
        }
        if let Some(file) = self.json["image"]["decoded_file"].as_str().or(self.json["image"]["file"].as_str()) {
            arguments.extend(["--image".to_owned(), self.beside(file)]);
        }
        arguments
    }

    fn check_f32(&self) {
        let dir = TempDir::new().unwrap();
        let (logits, states) = (dir.path().join("logits.safetensors"), dir.path().join("states.safetensors"));
        let mut arguments = self.arguments(&self.model(), dir.path());
        arguments.extend(
            [
                "--dtype",
                "f32",
                "--max-new-tokens",
                "32",
                "--logits-out",
                arg(&logits),
                "--hidden-states-out",
                arg(&states),
            ]
            .map(str::to_owned),
        );
        let found = self.run(&arguments);
        self.check_inputs(&found);
        self.check_hidden_states(&states);
        let (shape, values) = read_tensor(&logits, "logits").unwrap();
        assert_eq!(shape, [32, 32000]);
        let (_, golden) = read_tensor(&self.tensors(), "logits").unwrap();
        let error = relative_rms(&values[..32000], &golden);
        let bound = self.target.f32_bound;
        assert!(error <= bound, "logits are off by {error:e}");
        let greedy = &self.json["greedy"];
        assert_eq!(found["output_ids"], greedy["tokens"]);
        assert_eq!(found["text"], greedy["text_skip_special"]);
        for (step, row) in values.chunks(32000).enumerate() {
            let best = greedy["top5_ids"][step]
                .as_array()
                .unwrap()
                .iter()
                .zip(greedy["top5_logits"][step].as_array().unwrap());
            for (id, logit) in best {
                let found = f64::from(row[id.as_u64().unwrap() as usize]);
                // The best logits are about 10; recorded with six decimals.
                assert!((found - logit.as_f64().unwrap()).abs() < 20.0 * bound, "step {step}: {found} for {logit}");
            }
        }
        assert_eq!(found["finish_reason"], "length");
        assert_eq!(found["usage"]["completion_tokens"], 32);
    }

    fn check_inputs(&self, found: &Value) {
        for key in ["prompt", "input_ids", "token_type_ids", "position_ids"] {
            assert_eq!(found[key], self.json[key], "{key}");
        }
    }

    /// Where the case stores a tensor, all of it; else its first and last sixteen values and its moments.
    fn check_hidden_states(&self, states: &Path) {
        let bound = self.target.f32_bound;
        let stats = self.json["stats"].as_object().unwrap();
        let stored = tensor_names(&self.tensors());
        assert!(!stats.is_empty());
        for (name, stats) in stats {
            let (shape, found) = read_tensor(states, name).unwrap_or_else(|| panic!("`{name}` is missing"));
            if name == "llm.norm" {
                // Only the row that logits are wanted of is normalised.
                let golden = numbers(&stats["last16"]);
                close(&found[found.len() - 16..], &golden, name, bound);
                continue;
            }
            assert_eq!(shape.iter().map(|size| *size as u64).collect::<Vec<_>>(), ids(&stats["shape"]), "{name}");
            if stored.contains(name) {
                let error = relative_rms(&found, &read_tensor(&self.tensors(), name).unwrap().1);
                assert!(error <= bound, "`{name}` is off by {error:e}");
            }
            close(&found[..16], &numbers(&stats["first16"]), name, bound);
            close(&found[found.len() - 16..], &numbers(&stats["last16"]), name, bound);
            let mean = found.iter().map(|value| f64::from(*value)).sum::<f64>() / found.len() as f64;
            let variance =
                found.iter().map(|value| (f64::from(*value) - mean).powi(2)).sum::<f64>() / found.len() as f64;
            let std = stats["std"].as_f64().unwrap();
            assert!((variance.sqrt() / std - 1.0).abs() < bound, "standard deviation of `{name}`");
            assert!((mean - stats["mean"].as_f64().unwrap()).abs() < bound * std, "mean of `{name}`");
        }
    }

    /// In bf16, fed with the golden tokens: no further from the f32 answer than the reference in bf16.
    fn check_bf16(&self, rope: &str) {
        let reference = &self.json["bf16"][if rope == "published" { "model" } else { "f32" }];
        let allowed = BF16_FACTOR * reference["logits_rel_rms_error"].as_f64().unwrap();
        // Tokens are decided where the margin is above twice the error of the reference.
        let undecided = 2.0 * reference["logits_max_abs_error"].as_f64().unwrap();
        let (error, _) = self.check_forced(&self.model(), ["bf16", rope], allowed, undecided);
        // bf16 is no f32: the flag does something.
        assert!(error > self.target.f32_bound, "logits are only off by {error:e}");
    }

    /// Fed with the golden tokens: the first logits are off by `allowed` at most, and tokens are the golden ones where
    /// the margin is `undecided` or more. Gives how far the logits are off.
    fn check_forced(&self, model: &str, [dtype, rope]: [&str; 2], allowed: f64, undecided: f64) -> (f64, Vec<f32>) {
        let dir = TempDir::new().unwrap();
        let (logits, forced) = (dir.path().join("logits.safetensors"), dir.path().join("forced.json"));
        std::fs::write(&forced, self.json["greedy"]["tokens"].to_string()).unwrap();
        let mut arguments = self.arguments(model, dir.path());
        arguments.retain(|argument| argument != "--ignore-eos");
        arguments.extend(
            ["--dtype", dtype, "--rope", rope, "--force-ids", arg(&forced), "--logits-out", arg(&logits)]
                .map(str::to_owned),
        );
        let found = self.run(&arguments);
        self.check_inputs(&found);
        let (_, values) = read_tensor(&logits, "logits").unwrap();
        let (_, golden) = read_tensor(&self.tensors(), "logits").unwrap();
        let error = relative_rms(&values[..32000], &golden);
        assert!(error <= allowed, "logits are off by {error:e}, allowed are {allowed:e}");
        let (tokens, margins) = (ids(&self.json["greedy"]["tokens"]), numbers(&self.json["greedy"]["margin"]));
        for (step, (found, golden)) in ids(&found["output_ids"]).iter().zip(&tokens).enumerate() {
            assert!(
                found == golden || f64::from(margins[step]) < undecided,
                "step {step} chose {found}, golden {golden}, margin {}",
                margins[step]
            );
        }
        (error, values)
    }
}

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
}

fn close(found: &[f32], golden: &[f32], name: &str, bound: f64) {
    let error = relative_rms(found, golden);
    // Sixteen values of a tensor may be smaller than the rest of it, which sets the scale of errors.
    assert!(error <= 20.0 * bound, "sixteen values of `{name}` are off by {error:e}");
}

macro_rules! golden_cases {
    ($($test:ident: $name:literal,)*) => {
        const NAMES: &[&str] = &[$($name),*];
        $(mod $test {
            use super::{CPU, GPU, Golden};
            #[test]
            fn f32() {
                Golden::open($name, CPU).check_f32();
            }
            #[test]
            fn bf16() {
                Golden::open($name, CPU).check_bf16("float32");
            }
            #[test]
            fn bf16_published_rope() {
                Golden::open($name, CPU).check_bf16("published");
            }
            #[test]
            #[ignore = "needs a GPU"]
            fn gpu_f32() {
                Golden::open($name, GPU).check_f32();
            }
            #[test]
            #[ignore = "needs a GPU"]
            fn gpu_bf16() {
                Golden::open($name, GPU).check_bf16("float32");
            }
            #[test]
            #[ignore = "needs a GPU"]
            fn gpu_bf16_published_rope() {
                Golden::open($name, GPU).check_bf16("published");
            }
        })*
    };
}

golden_cases! {
    tiny_alpha_wide: "tiny/alpha_wide",
    tiny_caption: "tiny/caption",
    tiny_empty_query: "tiny/empty_query",
    tiny_exact_size: "tiny/exact_size",
    tiny_grey_tall: "tiny/grey_tall",
    tiny_history: "tiny/history",
    tiny_long: "tiny/long",
    tiny_palette_box: "tiny/palette_box",
    tiny_text_only: "tiny/text_only",
    tiny_vqa: "tiny/vqa",
    tiny_vqa_history: "tiny/vqa_history",
    small_alpha_wide: "small/alpha_wide",
    small_caption: "small/caption",
    small_grey_tall: "small/grey_tall",
    small_grounding: "small/grounding",
    small_history: "small/history",
    small_text_only: "small/text_only",
    small_vqa: "small/vqa",
    image224_caption: "extra/image224/caption",
    image224_vqa_history: "extra/image224/vqa_history",
    one_head_caption: "extra/one_head/caption",
    one_head_long_text: "extra/one_head/long_text",
    odd_caption: "extra/odd/caption",
    odd_grey_tall: "extra/odd/grey_tall",
    odd_long: "extra/odd/long",
    odd_text_only: "extra/odd/text_only",
    deep_caption: "extra/deep/caption",
}

/// Cases that other tests check: batches below, `no_inv_freq` in tests/checkpoints.rs.
const ELSEWHERE: &[&str] = &["tiny/batch", "extra/odd/batch", "extra/one_head/no_inv_freq"];

#[test]
fn every_case_is_listed() {
    for set in ["tiny", "small", "extra/image224", "extra/one_head", "extra/odd", "extra/deep"] {
        for entry in std::fs::read_dir(repo(&format!("tests/goldens/{set}"))).unwrap() {
            let file = entry.unwrap().file_name().into_string().unwrap();
            let Some(case) = file.strip_suffix(".json").filter(|case| *case != "config") else { continue };
            let name = format!("{set}/{case}");
            assert!(NAMES.contains(&&*name) || ELSEWHERE.contains(&&*name), "{name} is not tested");
        }
    }
}

/// The full model, in the directory that COGVLM_TEST_17B names.
mod full_size {
    use super::{GPUS, Golden};

    /// In f32 and in bf16.
    fn check(name: &str) {
        let golden = Golden::open(&format!("17b/{name}"), GPUS);
        let model = std::env::var("COGVLM_TEST_17B").expect("COGVLM_TEST_17B names the directory of the model");
        let bound = golden.target.f32_bound;
        // The best logits are about 10.
        golden.check_forced(&model, ["f32", "float32"], bound, 40.0 * bound);
        let reference = &golden.json["bf16"]["f32"];
        let allowed = super::BF16_FACTOR * reference["logits_rel_rms_error"].as_f64().unwrap();
        let undecided = 2.0 * reference["logits_max_abs_error"].as_f64().unwrap();
        let [first, again] = [0, 1].map(|_| golden.check_forced(&model, ["bf16", "float32"], allowed, undecided).1);
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert!(bits(&first) == bits(&again), "two runs give different bits");
    }

    macro_rules! full_size_cases {
        ($($name:ident)*) => {
            $(#[test]
            #[ignore = "needs a GPU, and the full model in the directory that COGVLM_TEST_17B names"]
            fn $name() {
                check(stringify!($name));
            })*
        };
    }

    full_size_cases! { caption history long text_only vqa }
}

/// Rows of different lengths, with and without images, computed together: each as it is recorded, where the reference
/// padded them on the left. Padding shifts positions, which changes rounding only.
fn check_batch(target: Target, name: &str, images: &[Option<&str>], batch: &str) {
    let golden = Golden::open(name, target);
    let dir = TempDir::new().unwrap();
    let lines = dir.path().join("prompts.jsonl");
    let rows = golden.json["rows"].as_array().unwrap();
    let text: String = rows
        .iter()
        .zip(images)
        .map(|(row, image)| {
            let mut line =
                serde_json::json!({"prompt": row["query"], "template": row["template"], "history": row["history"]});
            if let Some(image) = image {
                line["image"] = golden.beside(image).into();
            }
            format!("{line}\n")
        })
        .collect();
    std::fs::write(&lines, text).unwrap();
    let model = golden.model();
    let arguments = [
        "generate",
        "--json",
        "--dtype",
        "f32",
        "--ignore-eos",
        "--max-new-tokens",
        "32",
        "--context",
        "512",
        "--tokenizer",
        "tests/goldens/tokenizer.model",
        "--model",
        &model,
        "--batch",
        batch,
        "--prompts",
        arg(&lines),
    ];
    let outcome = (target.run)(&[&arguments, target.arguments].concat());
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    let answers: Vec<Value> = outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers.len(), rows.len());
    for (row, answer) in answers.iter().enumerate() {
        assert_eq!(answer["output_ids"], golden.json["greedy_tokens"][row], "row {row}");
        let unpadded: Vec<u64> = ids(&golden.json["input_ids"][row])
            .into_iter()
            .zip(ids(&golden.json["attention_mask"][row]))
            .filter_map(|(id, kept)| (kept == 1).then_some(id))
            .collect();
        assert_eq!(ids(&answer["input_ids"]), unpadded, "row {row}");
    }
}

/// Images of the rows of `tiny/batch`.
const TINY_IMAGES: [Option<&str>; 4] = [Some("caption.png"), Some("history.png"), None, Some("vqa_history.png")];

#[test]
fn tiny_batch_all_at_once() {
    check_batch(CPU, "tiny/batch", &TINY_IMAGES, "4");
}

#[test]
fn tiny_batch_two_at_a_time() {
    check_batch(CPU, "tiny/batch", &TINY_IMAGES, "2");
}

#[test]
#[ignore = "needs a GPU"]
fn gpu_f32_tiny_batch_all_at_once() {
    check_batch(GPU, "tiny/batch", &TINY_IMAGES, "4");
}

#[test]
#[ignore = "needs a GPU"]
fn gpu_f32_tiny_batch_two_at_a_time() {
    check_batch(GPU, "tiny/batch", &TINY_IMAGES, "2");
}

fn check_odd_batch(target: Target) {
    let golden = Golden::open("extra/odd/batch", target);
    let files: Vec<Option<String>> = golden.json["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["image_file"].as_str().map(str::to_owned))
        .collect();
    let files: Vec<Option<&str>> = files.iter().map(Option::as_deref).collect();
    check_batch(target, "extra/odd/batch", &files, "3");
}

#[test]
fn odd_batch() {
    check_odd_batch(CPU);
}

#[test]
#[ignore = "needs a GPU"]
fn gpu_f32_odd_batch() {
    check_odd_batch(GPU);
}
