//! `generate` and `chat`: sampling, where answers end, what is fed, what is kept between turns.

mod common;

use std::collections::BTreeSet;
use std::path::PathBuf;

use common::{
    TOKENIZER, arg, assert_refusal, cogvlm, cogvlm_json, cogvlm_with_stdin, ids, read_tensor, refusal, write_json,
};
use serde_json::{Value, json};
use tempfile::TempDir;

const TINY: [&str; 10] =
    ["generate", "--model", "tiny@11", "--backend", "cpu", "--dtype", "f32", "--context", "192", "--threads"];
const IMAGE: &str = "tests/goldens/tiny/caption.png";

/// `generate` on `tiny@11` in f32.
fn tiny<'a>(flags: &[&'a str]) -> Vec<&'a str> {
    [&TINY[..], &["2"], flags].concat()
}

fn answer(flags: &[&str]) -> Value {
    cogvlm_json(&[&tiny(flags)[..], &["--json", "--tokenizer", TOKENIZER]].concat())
}

fn question(flags: &[&str]) -> Value {
    answer(&[&["--prompt", "What is it?", "--max-new-tokens", "12"], flags].concat())
}

fn text(answer: &Value) -> &str {
    answer["text"].as_str().unwrap_or_else(|| panic!("no text: {answer}"))
}

/// Texts of the first tokens, one more each: `texts[n]` is what `n` tokens say.
fn growing_texts(ids: &[u64]) -> Vec<String> {
    let lines: String = (0..=ids.len()).map(|len| format!("{}\n", json!(ids[..len]))).collect();
    let outcome = cogvlm_with_stdin(&["tokenize", "--tokenizer", TOKENIZER, "--decode", "--skip-special"], &lines);
    outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn the_answer_has_every_key() {
    let found = question(&["--image", IMAGE]);
    let keys: Vec<&str> = found.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(
        keys,
        [
            "prompt",
            "input_ids",
            "token_type_ids",
            "position_ids",
            "output_ids",
            "text",
            "finish_reason",
            "usage",
            "timings",
            "memory"
        ]
    );
    let num_prompt = ids(&found["input_ids"]).len();
    assert_eq!((ids(&found["token_type_ids"]).len(), ids(&found["position_ids"]).len()), (num_prompt, num_prompt));
    assert_eq!(found["usage"], json!({"prompt_tokens": num_prompt, "completion_tokens": 12}));
    assert_eq!((ids(&found["output_ids"]).len(), &found["finish_reason"]), (12, &json!("length")));
    let timing = |key: &str| found["timings"][key].as_f64().unwrap_or_else(|| panic!("{key}: {found}"));
    for key in ["load_ms", "vision_ms", "prefill_ms", "ttft_ms", "decode_ms_per_token", "decode_tokens_per_s"] {
        assert!(timing(key) > 0.0, "{key}");
    }
    assert!(timing("vision_ms") <= timing("prefill_ms") && timing("prefill_ms") <= timing("ttft_ms"));
    assert!((timing("decode_ms_per_token") * timing("decode_tokens_per_s") - 1e3).abs() < 1e-6);
    let memory = found["memory"].as_object().unwrap();
    assert!(memory.len() == 1 && memory["cpu"].as_u64().unwrap() > 20_000_000, "{memory:?}");
}

#[test]
fn a_stream_is_the_text_of_the_json() {
    for flags in [&["--prompt", "What is it?"][..], &["--prompt", "Größe 数?", "--image", IMAGE, "--temperature", "2"]]
    {
        let flags = [flags, &["--max-new-tokens", "24"]].concat();
        let outcome = cogvlm(&[&tiny(&flags)[..], &["--tokenizer", TOKENIZER]].concat());
        assert_eq!((outcome.code, &*outcome.stderr), (0, ""));
        assert_eq!(outcome.stdout, format!("{}\n", text(&answer(&flags))));
    }
}

#[test]
fn greedy_unless_told_otherwise() {
    let greedy = question(&[])["output_ids"].clone();
    assert_eq!(ids(&greedy).len(), 12);
    for flags in [
        &["--seed", "5"][..],
        &["--temperature", "0", "--seed", "6"],
        &["--temperature", "3", "--top-k", "1"],
        &["--temperature", "3", "--top-p", "0"],
        &["--temperature", "1", "--top-p", "0.00001", "--seed", "9"],
        &["--ignore-eos"],
        &["--repetition-penalty", "1"],
    ] {
        assert_eq!(question(flags)["output_ids"], greedy, "{flags:?}");
    }
}

#[test]
fn draws_follow_their_seed() {
    let warm = ["--temperature", "2"];
    let draw = |seed: &str| question(&[&warm[..], &["--seed", seed]].concat())["output_ids"].clone();
    let first = draw("1");
    assert_eq!(draw("1"), first);
    assert_eq!(question(&warm)["output_ids"], draw("0"), "0 is the seed unless told otherwise");
    let others: BTreeSet<String> = ["1", "2", "3", "18446744073709551615"].map(|seed| draw(seed).to_string()).into();
    assert_eq!(others.len(), 4);
    // Few are left to draw from: every token is one of the two best, where it was chosen.
    let dir = TempDir::new().unwrap();
    let logits = dir.path().join("logits.safetensors");
    let flags = ["--temperature", "50", "--top-k", "2", "--seed", "4", "--logits-out", arg(&logits)];
    let drawn = ids(&question(&flags)["output_ids"]);
    let (shape, values) = read_tensor(&logits, "logits").unwrap();
    assert_eq!(shape, [12, 32000]);
    let ranks: Vec<usize> = values
        .chunks(32000)
        .zip(&drawn)
        .map(|(row, id)| row.iter().filter(|logit| **logit > row[*id as usize]).count())
        .collect();
    assert!(ranks.iter().all(|rank| *rank < 2) && ranks.contains(&0) && ranks.contains(&1), "{ranks:?}");
}

#[test]
fn a_penalty_keeps_tokens_from_coming_again() {
    let dir = TempDir::new().unwrap();
    let run = |ids: &[u64], flags: &[&str]| {
        let file = write_json(dir.path(), "ids.json", &json!(ids));
        let fixed = ["--input-ids", arg(&file), "--max-new-tokens", "40", "--ignore-eos"];
        self::ids(&answer(&[&fixed[..], flags].concat())["output_ids"])
    };
    // What would be said anyhow stands in the prompt already.
    let text = [1000, 2000, 3000];
    let asked = [&run(&text, &[])[..1], &text].concat();
    let free = run(&asked, &[]);
    assert_eq!(free[0], asked[0], "this test needs an answer that repeats its prompt");
    // The least logits are about -7, the best about 12: a factor of a hundred puts every token seen behind all others.
    let said = run(&asked, &["--repetition-penalty", "100"]);
    let seen: BTreeSet<u64> = [&asked[..], &said].concat().into_iter().collect();
    assert_eq!(seen.len(), asked.len() + said.len());
}

/// An answer ends before a stop text, also where several tokens make it up, and the stream shows nothing of it.
#[test]
fn a_stop_text_ends_the_answer_before_it() {
    let whole = question(&[]);
    let (all, tokens) = (text(&whole), ids(&whole["output_ids"]));
    let texts = growing_texts(&tokens);
    assert_eq!(texts[12], all);
    let mut across = 0;
    for at in [1, 3, 5, 8] {
        // Two characters on each side of where token `at` begins.
        let boundary = texts[at].len();
        let Some((before, after)) =
            all.split_at_checked(boundary).filter(|(before, _)| all.starts_with(*before) && texts[at] == *before)
        else {
            continue;
        };
        let start = before.char_indices().rev().take(2).last().map_or(0, |(start, _)| start);
        let end = boundary + after.char_indices().nth(2).map_or(after.len(), |(end, _)| end);
        let stop = &all[start..end];
        let expected = &all[..all.find(stop).unwrap()];
        let found = question(&["--stop", stop]);
        assert_eq!(text(&found), expected, "{stop:?}");
        assert_eq!(found["finish_reason"], "stop");
        let num = found["usage"]["completion_tokens"].as_u64().unwrap() as usize;
        assert!(num <= at + 2 && texts[num].contains(stop) && !texts[num - 1].contains(stop), "{num} tokens");
        let stream = cogvlm(&tiny(&[
            "--prompt",
            "What is it?",
            "--max-new-tokens",
            "12",
            "--tokenizer",
            TOKENIZER,
            "--stop",
            stop,
        ]));
        assert_eq!(stream.stdout, format!("{expected}\n"), "{stop:?}");
        across += usize::from(expected.len() > texts[at - 1].len() || num > 1);
    }
    assert!(across >= 2, "{across}");
    // Of several the first that comes; one that never comes changes nothing.
    let words: Vec<&str> = [4, 7].map(|at| texts[at].strip_prefix(&*texts[at - 1]).unwrap()).into();
    let first = words.iter().filter_map(|word| all.find(word)).min().unwrap();
    let found = question(&["--stop", words[1], "--stop", words[0], "--stop", "never said"]);
    assert_eq!(text(&found), &all[..first]);
    let found = question(&["--stop", "never said"]);
    assert_eq!((text(&found), &found["finish_reason"]), (all, &json!("length")));
}

/// The weights of `tiny@1` say `</s>` two tokens after this prompt.
#[test]
fn the_end_of_sequence_token_ends_the_answer() {
    let dir = TempDir::new().unwrap();
    let file = write_json(dir.path(), "ids.json", &json!([1000, 25398]));
    let fixed = ["generate", "--model", "tiny@1", "--dtype", "f32", "--context", "64", "--input-ids", arg(&file)];
    let run = |flags: &[&str]| cogvlm(&[&fixed[..], &["--tokenizer", TOKENIZER], flags].concat());
    let read = |flags: &[&str]| serde_json::from_str::<Value>(&run(&[flags, &["--json"]].concat()).stdout).unwrap();
    let found = read(&["--max-new-tokens", "9"]);
    let said = ids(&found["output_ids"]);
    assert_eq!(said.last(), Some(&2), "this test needs an answer that ends: {said:?}");
    assert!((2..9).contains(&said.len()) && !said[..said.len() - 1].contains(&2));
    assert_eq!(found["finish_reason"], "stop");
    assert_eq!(found["usage"]["completion_tokens"], said.len());
    // It is no part of the text.
    assert_eq!(text(&found), growing_texts(&said[..said.len() - 1]).last().unwrap());
    assert_eq!(run(&["--max-new-tokens", "9"]).stdout, format!("{}\n", text(&found)));
    let on = read(&["--max-new-tokens", "9", "--ignore-eos"]);
    assert_eq!((ids(&on["output_ids"]).len(), &on["finish_reason"]), (9, &json!("length")));
    assert_eq!(ids(&on["output_ids"])[..said.len()], said);
    // With no token to spare it is said, and still an end.
    let exact = read(&["--max-new-tokens", &said.len().to_string()]);
    assert_eq!((&exact["output_ids"], &exact["finish_reason"]), (&found["output_ids"], &json!("stop")));
    // Forced tokens decide for themselves what comes.
    let forced = write_json(dir.path(), "forced.json", &json!([2, 2, 5]));
    let on = read(&["--force-ids", arg(&forced)]);
    assert_eq!((ids(&on["output_ids"]).len(), &on["finish_reason"]), (3, &json!("length")));
}

#[test]
fn an_answer_ends_where_the_context_does() {
    let dir = TempDir::new().unwrap();
    let file = write_json(dir.path(), "ids.json", &json!((100..120).collect::<Vec<_>>()));
    let run = |context: &str, flags: &[&str]| {
        let flags =
            [&["--model", "tiny@11", "--context", context, "--input-ids", arg(&file), "--ignore-eos"], flags].concat();
        cogvlm(&[&["generate", "--json"], flags.as_slice()].concat())
    };
    for flags in [&[][..], &["--max-new-tokens", "1000"]] {
        let outcome = run("32", flags);
        let found: Value = serde_json::from_str(&outcome.stdout).unwrap();
        assert_eq!((&found["usage"]["prompt_tokens"], &found["finish_reason"]), (&json!(21), &json!("length")));
        let num = found["usage"]["completion_tokens"].as_u64().unwrap();
        // The last one is chosen from the row of the 32nd token, and has no row of its own.
        assert!(num == 11 || num == 12, "{flags:?}: {num}");
        assert!(found["text"].is_null() && found["prompt"].is_null(), "no tokenizer was given");
    }
    let outcome = run("16", &["--max-new-tokens", "1"]);
    let error = assert_refusal(&outcome, 1, "a prompt of 21 tokens in a context of 16");
    assert!(error.contains("21") && error.contains("16"), "{error}");
    assert!(outcome.stderr.contains("hint: ") && outcome.stderr.contains("--context"), "{}", outcome.stderr);
    assert_eq!(run("21", &["--max-new-tokens", "1"]).code, 0);
    // Without a tokenizer ids are streamed, with spaces between.
    let stream = cogvlm(&["generate", "--model", "tiny@11", "--context", "32", "--input-ids", arg(&file)]);
    let found: Value = serde_json::from_str(&run("32", &[]).stdout).unwrap();
    let streamed: Vec<u64> = stream.stdout.split_whitespace().map(|id| id.parse().unwrap()).collect();
    assert_eq!(streamed, ids(&found["output_ids"]));
}

#[test]
fn templates_and_history_make_the_prompt() {
    let dir = TempDir::new().unwrap();
    let history = write_json(dir.path(), "history.json", &json!([["Where?", "Here."], ["When?", "Now."]]));
    let prompt = |flags: &[&str]| {
        let found = answer(&[&["--prompt", "Why?", "--max-new-tokens", "1"], flags].concat());
        found["prompt"].as_str().unwrap().to_owned()
    };
    assert_eq!(prompt(&[]), "Question: Why? Answer:");
    assert_eq!(prompt(&["--template", "vqa"]), "Question: Why? Short answer:");
    assert_eq!(prompt(&["--template", "base"]), "Why?");
    assert_eq!(
        prompt(&["--history", arg(&history)]),
        "Question: Where? Answer: Here.\nQuestion: When? Answer: Now.\nQuestion: Why? Answer:"
    );
    assert_eq!(
        prompt(&["--history", arg(&history), "--template", "vqa"]),
        "Question: Where? Short answer: Here.\nQuestion: When? Short answer: Now.\nQuestion: Why? Short answer:"
    );
    // What the configuration says where nothing is said.
    let config = cogvlm_json(&[
        "generate",
        "--model",
        "tests/goldens/extra/image224/config.json@21",
        "--prompt",
        "Why?",
        "--max-new-tokens",
        "1",
        "--json",
        "--tokenizer",
        TOKENIZER,
        "--context",
        "300",
    ]);
    assert_eq!(config["prompt"], "Why?");
    let bad = write_json(dir.path(), "bad.json", &json!([["only a question"]]));
    let error = refusal(&tiny(&["--prompt", "x", "--tokenizer", TOKENIZER, "--history", arg(&bad)]), 1);
    assert!(error.contains("bad.json"), "{error}");
}

/// Many prompts in one run, mixed images and none: each is answered as if alone, in order, whatever the batch.
#[test]
fn many_prompts_are_answered_as_each_alone() {
    let dir = TempDir::new().unwrap();
    for name in ["caption.png", "history.png"] {
        std::fs::copy(common::repo("tests/goldens/tiny").join(name), dir.path().join(name)).unwrap();
    }
    let lines = [
        json!({"prompt": "Describe this image.", "image": "caption.png"}),
        json!({"prompt": "Is it late?"}),
        json!({"prompt": "How many?", "image": "history.png", "template": "vqa"}),
        json!({"prompt": "And now?", "history": [["Is it late?", "No."]]}),
        json!({"prompt": "", "image": "caption.png"}),
        json!({"prompt": "A longer question about nothing in particular, which goes on for a while.", "template": "base"}),
        json!({"prompt": "Describe this image.", "image": "history.png"}),
    ];
    let file = dir.path().join("prompts.jsonl");
    let text: String = lines.iter().map(|line| format!("{line}\n\n")).collect();
    std::fs::write(&file, text).unwrap();
    let alone: Vec<Value> = lines
        .iter()
        .map(|line| {
            let string = |key: &str| line[key].as_str().map(str::to_owned);
            let image = string("image").map(|name| arg(&dir.path().join(name)).to_owned());
            let history = line.get("history").map(|history| write_json(dir.path(), "history.json", history));
            let template = string("template").unwrap_or("chat".to_owned());
            let prompt = string("prompt").unwrap();
            let mut flags = vec!["--prompt", &prompt, "--template", &template, "--max-new-tokens", "10"];
            flags.extend(image.iter().flat_map(|image| ["--image", image.as_str()]));
            flags.extend(history.iter().flat_map(|history| ["--history", arg(history)]));
            answer(&flags)
        })
        .collect();
    for batch in ["1", "3", "8"] {
        let flags = ["--prompts", arg(&file), "--batch", batch, "--json", "--max-new-tokens", "10"];
        let outcome = cogvlm(&tiny(&[&flags[..], &["--tokenizer", TOKENIZER]].concat()));
        assert_eq!(outcome.code, 0, "{}", outcome.stderr);
        let answers: Vec<Value> = outcome.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(answers.len(), lines.len());
        for (found, alone) in answers.iter().zip(&alone) {
            for key in ["prompt", "input_ids", "token_type_ids", "position_ids", "output_ids", "text", "finish_reason"]
            {
                assert_eq!(found[key], alone[key], "{key}, batch {batch}");
            }
        }
    }
    for (bad, word) in [
        ("{\"prompt\": \"a\"}\n{\"prompt\": 7}\n", "line 2"),
        ("{\"prompt\": \"a\"}\n\n{\"prompt\": \"b\", \"image\": \"nowhere.png\"}\n", "line 3"),
        ("{\"question\": \"a\"}\n", "question"),
        ("\n", "prompts.jsonl"),
    ] {
        std::fs::write(&file, bad).unwrap();
        let error = refusal(&tiny(&["--prompts", arg(&file), "--json", "--tokenizer", TOKENIZER]), 1);
        assert!(error.contains(word), "{error}");
    }
}

/// Prompts go another way through the ranks than tokens do, and nothing else is another.
#[test]
fn a_card_prefills_what_the_host_decodes() {
    let dir = TempDir::new().unwrap();
    // A host that reads fast and computes slowly, beside a card at a slow link.
    let host =
        json!({"read_bytes_per_s": 4e12, "f32_flops_per_s": 4e9, "bf16_flops_per_s": 4e9, "disk_bytes_per_s": null});
    let card = json!({"name": "a card", "copy_bytes_per_s": 8e11, "product_flops_per_s": 5e13,
        "from_host_bytes_per_s": 3e8, "to_host_bytes_per_s": 2e10, "host_hop_s": 2e-5});
    let links = json!({"schema": "cogvlm-shard.links/1", "measured_on": {"machine": "desk", "driver": null, "cuda": null},
        "host": host, "devices": {"0": card}, "pairs": []});
    let links = write_json(dir.path(), "links.json", &links);
    let placement = ["--max-memory", "0:11MiB,cpu:64MiB", "--links", arg(&links)];
    let plan = ["plan", "tiny@11", "--backend", "cpu", "--dtype", "f32", "--context", "192", "--json"];
    let plan = cogvlm_json(&[&plan[..], &placement].concat());
    assert_eq!(plan["prefill"]["device"], 0, "{plan}");
    let file = write_json(dir.path(), "plan.json", &plan);
    for flags in [&["--image", IMAGE][..], &["--template", "base"], &["--image", IMAGE, "--template", "vqa"]] {
        let expected = question(flags);
        let by_plan = ["--device-map", arg(&file)];
        for placement in [&placement[..], &by_plan] {
            let found = question(&[flags, placement].concat());
            for key in ["input_ids", "output_ids", "text", "finish_reason"] {
                assert_eq!(found[key], expected[key], "{key} with {flags:?} {placement:?}");
            }
            for (device, peak) in found["memory"].as_object().expect("peaks of arenas") {
                let budget = plan["devices"][device]["budget_bytes"].as_u64().unwrap();
                assert!(peak.as_u64().unwrap() <= budget, "{device}: {peak} of {budget}");
            }
        }
    }
    let (expected, _) = chat(&["--image", IMAGE], "What is it?\nWhy is that so, and since when?\n");
    let (found, _) =
        chat(&[&["--image", IMAGE][..], &placement].concat(), "What is it?\nWhy is that so, and since when?\n");
    assert_eq!(found, expected);
}

/// Teacher forcing with an answer's own tokens is that answer.
#[test]
fn forced_with_its_own_tokens_an_answer_is_itself() {
    let dir = TempDir::new().unwrap();
    let (free, forced) = (dir.path().join("free.safetensors"), dir.path().join("forced.safetensors"));
    for dtype in ["f32", "bf16"] {
        let flags = [
            "generate",
            "--model",
            "tiny@11",
            "--json",
            "--tokenizer",
            TOKENIZER,
            "--context",
            "64",
            "--image",
            IMAGE,
            "--prompt",
            "Describe this image.",
            "--dtype",
            dtype,
        ];
        let first = cogvlm_json(
            &[&flags[..], &["--max-new-tokens", "10", "--ignore-eos", "--logits-out", arg(&free)]].concat(),
        );
        let file = write_json(dir.path(), "forced.json", &first["output_ids"]);
        let force = |file: &PathBuf| {
            cogvlm_json(&[&flags[..], &["--force-ids", arg(file), "--logits-out", arg(&forced)]].concat())
        };
        let second = force(&file);
        assert_eq!(second["output_ids"], first["output_ids"], "{dtype}");
        assert_eq!(std::fs::read(&free).unwrap(), std::fs::read(&forced).unwrap(), "{dtype}");
        // Other tokens fed: the first choice stands, later ones are made in another context.
        let mut other = ids(&first["output_ids"]);
        other[0] = 77;
        let third = force(&write_json(dir.path(), "other.json", &json!(other)));
        let (_, free_rows) = read_tensor(&free, "logits").unwrap();
        let (shape, rows) = read_tensor(&forced, "logits").unwrap();
        assert_eq!(shape, [10, 32000]);
        assert_eq!(third["output_ids"][0], first["output_ids"][0]);
        assert!(rows[..32000] == free_rows[..32000] && rows[32000..64000] != free_rows[32000..64000], "{dtype}");
    }
    for (bad, word) in [(json!([]), "empty"), (json!([40_000]), "40000"), (json!("x"), "bad.json")] {
        let file = write_json(dir.path(), "bad.json", &bad);
        let error = refusal(&tiny(&["--prompt", "x", "--tokenizer", TOKENIZER, "--force-ids", arg(&file)]), 1);
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn ids_in_place_of_a_prompt() {
    let dir = TempDir::new().unwrap();
    for image in [&[][..], &["--image", IMAGE]] {
        let asked = question(image);
        let input = ids(&asked["input_ids"]);
        let num_placeholders = if image.is_empty() { 0 } else { 18 };
        let text_ids = &input[1 + num_placeholders..];
        for (name, value) in [
            ("the whole input", json!(input)),
            ("the text alone", json!(text_ids)),
            ("an object", json!({"input_ids": text_ids})),
        ] {
            let file = write_json(dir.path(), "ids.json", &value);
            let found = answer(&[&["--input-ids", arg(&file), "--max-new-tokens", "12"], image].concat());
            for key in ["input_ids", "token_type_ids", "position_ids", "output_ids", "text"] {
                assert_eq!(found[key], asked[key], "{name}: {key}");
            }
        }
    }
    for (bad, word) in [
        (json!([5, 32_000]), "32000"),
        (json!([1, 5, 6]), "placeholders"),
        (json!({"ids": [5]}), "bad.json"),
        (json!([-1]), "bad.json"),
    ] {
        let file = write_json(dir.path(), "bad.json", &bad);
        let error = refusal(&tiny(&["--input-ids", arg(&file), "--image", IMAGE]), 1);
        assert!(error.contains(word), "{error}");
    }
}

/// Runs `chat` on `tiny@11` with questions on stdin; gives what it said and logged.
fn chat(flags: &[&str], lines: &str) -> (String, String) {
    let fixed = [
        "chat",
        "--model",
        "tiny@11",
        "--dtype",
        "f32",
        "--tokenizer",
        TOKENIZER,
        "--context",
        "256",
        "--max-new-tokens",
        "8",
    ];
    let outcome = cogvlm_with_stdin(&[&fixed[..], flags].concat(), lines);
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    (outcome.stdout, outcome.stderr)
}

/// The answer to `query` after `history`, which it joins.
fn next_turn(history: &mut Vec<[String; 2]>, query: &str, flags: &[&str]) -> String {
    let dir = TempDir::new().unwrap();
    let file = write_json(dir.path(), "history.json", &json!(history));
    let fixed = ["--prompt", query, "--history", arg(&file), "--max-new-tokens", "8", "--context", "256"];
    let fixed = [&["generate", "--model", "tiny@11", "--dtype", "f32", "--json", "--tokenizer", TOKENIZER], &fixed[..]];
    let found = cogvlm_json(&[&fixed.concat(), flags].concat());
    history.push([query.to_owned(), text(&found).trim_start().to_owned()]);
    format!("{}\n", text(&found))
}

#[test]
fn a_conversation_is_generate_with_history() {
    for flags in [&["--image", IMAGE][..], &[], &["--template", "vqa"]] {
        let mut history = Vec::new();
        let turns = ["What is it?", "And what colour?", "Why?"];
        let expected: String = turns.iter().map(|query| next_turn(&mut history, query, flags)).collect();
        let (said, logged) = chat(flags, "What is it?\n\nAnd what colour?\nWhy?\n");
        assert_eq!(said, expected, "{flags:?}");
        assert_eq!(logged, "", "nobody watches");
    }
}

#[test]
fn a_conversation_can_be_begun_anew() {
    let once = |image: &[&str]| next_turn(&mut Vec::new(), "What is it?", image);
    let (about_nothing, about_caption) = (once(&[]), once(&["--image", IMAGE]));
    let other = "tests/goldens/tiny/history.png";
    let about_other = once(&["--image", other]);
    assert!(about_nothing != about_caption && about_caption != about_other);
    let (said, _) = chat(&["--image", IMAGE], "What is it?\n/reset\nWhat is it?\n/exit\nWhat is it?\n");
    assert_eq!(said, about_caption.repeat(2));
    let lines = format!("What is it?\n/image {other}\nWhat is it?\n/image {IMAGE}\nWhat is it?\n");
    assert_eq!(chat(&[], &lines).0, about_nothing + &about_other + &about_caption);
    // A script that fails says so and ends.
    let flags = ["chat", "--model", "tiny@11", "--tokenizer", TOKENIZER, "--context", "64", "--max-new-tokens", "4"];
    for (lines, word) in [("/image nowhere.png\nWhat?\n", "nowhere.png"), ("/image\n", "/image")] {
        let outcome = cogvlm_with_stdin(&flags, lines);
        let error = assert_refusal(&outcome, 1, lines);
        assert!(error.contains(word) && outcome.stdout.is_empty(), "{error}");
    }
    let outcome = cogvlm_with_stdin(&flags, &format!("{}\n", "word ".repeat(100)));
    assert_refusal(&outcome, 1, "too long");
    assert!(outcome.stderr.contains("/reset"), "{}", outcome.stderr);
}

/// Rows of every prefill that a run logged.
fn prefill_rows(logged: &str) -> Vec<usize> {
    let steps = logged.lines().filter(|line| line.contains("kind=Prefill"));
    let rows = steps.map(|line| line.split("num_rows=").nth(1).unwrap().split(' ').next().unwrap());
    rows.map(|rows| rows.parse().unwrap()).collect()
}

/// Only what is new is computed: not the image, not what was said before.
#[test]
fn the_cache_is_kept_between_turns() {
    let turns = ["What is it?", "And what colour?", "Why?"];
    let lines = turns.map(|turn| format!("{turn}\n")).concat();
    let (said, logged) = chat(&["--image", IMAGE, "--log", "debug"], &lines);
    let rows = prefill_rows(&logged);
    let mut history = Vec::new();
    let whole: Vec<usize> = turns
        .iter()
        .zip(said.lines())
        .map(|(query, answer)| {
            let dir = TempDir::new().unwrap();
            let file = write_json(dir.path(), "history.json", &json!(history));
            let flags = ["--prompt", query, "--history", arg(&file), "--image", IMAGE, "--max-new-tokens", "1"];
            history.push([(*query).to_owned(), answer.trim_start().to_owned()]);
            ids(&self::answer(&flags)["input_ids"]).len()
        })
        .collect();
    assert_eq!((rows.len(), rows[0]), (3, whole[0]));
    for turn in [1, 2] {
        // At least the image and the first question are not computed again.
        assert!(rows[turn] + whole[0] <= whole[turn], "{rows:?} of {whole:?}");
    }
    // After `/reset` everything is new.
    let (_, logged) = chat(&["--image", IMAGE, "--log", "debug"], "What is it?\n/reset\nWhat is it?\n");
    assert_eq!(prefill_rows(&logged), [whole[0]; 2]);
}

/// A turn that a stop text ended leaves a cache that ends where the text that was heard does.
#[test]
fn a_conversation_goes_on_after_a_stop_text() {
    let whole = next_turn(&mut Vec::new(), "What is it?", &[]);
    let middle = whole.char_indices().nth(whole.chars().count() / 2).unwrap().0;
    let stop: String = whole[middle..].chars().take(2).collect();
    let mut history = Vec::new();
    let flags = ["--stop", &stop];
    let expected: String =
        ["What is it?", "Really?", "Why?"].iter().map(|query| next_turn(&mut history, query, &flags)).collect();
    assert!(history[0][1].len() < whole.trim().len());
    assert_eq!(chat(&flags, "What is it?\nReally?\nWhy?\n").0, expected);
}
