//! `--tensor-parallel`: devices that compute every layer together, here virtual ranks.

mod common;

use common::{TOKENIZER, arg, cogvlm, cogvlm_json, ids, refusal, write_json};
use serde_json::{Value, json};
use tempfile::TempDir;

const BUDGETS: &str = "0:100MiB,1:100MiB,2:100MiB,3:100MiB";
const IMAGE: &str = "tests/goldens/tiny/caption.png";

fn answer(flags: &[&str]) -> Value {
    let fixed = ["generate", "--model", "tiny@11", "--backend", "cpu", "--dtype", "f32", "--context", "192"];
    let question = ["--threads", "2", "--tokenizer", TOKENIZER, "--prompt", "What is it?", "--max-new-tokens", "12"];
    cogvlm_json(&[&fixed[..], &question, &["--json", "--max-memory", BUDGETS], flags].concat())
}

#[test]
fn the_answer_is_that_of_one_device() {
    for image in [&["--image", IMAGE][..], &[]] {
        let expected = ids(&answer(image)["output_ids"]);
        for members in ["1", "2", "4"] {
            let found = answer(&[image, &["--tensor-parallel", members]].concat());
            assert_eq!(ids(&found["output_ids"]), expected, "{members} members");
            let held = found["memory"].as_object().unwrap();
            if members != "1" {
                assert_eq!(held.len().to_string(), members, "{held:?}");
            }
        }
    }
}

#[test]
fn the_plan_names_its_members() {
    let flags = ["plan", "tiny", "--backend", "cpu", "--max-memory", BUDGETS, "--tensor-parallel", "2"];
    let plan = cogvlm_json(&[&flags[..], &["--json"]].concat());
    assert_eq!(plan["tensor_parallel"], json!([0, 1]));
    assert!(plan["devices"]["1"]["weight_bytes"].as_u64() < plan["devices"]["0"]["weight_bytes"].as_u64());
    assert_eq!(plan["devices"]["2"]["weight_bytes"], 0);
    let report = cogvlm(&flags).stdout;
    assert!(report.contains("tensor parallel: `0`, `1` compute every layer together"), "{report}");
    assert!(!report.contains("<- this plan"), "other policies stand beside it:\n{report}");
    let alone = ["plan", "tiny", "--backend", "cpu", "--max-memory", BUDGETS, "--json"];
    assert!(cogvlm_json(&alone).get("tensor_parallel").is_none());
    // And is followed.
    let dir = TempDir::new().unwrap();
    let file = write_json(dir.path(), "plan.json", &plan);
    let run = ["generate", "--model", "tiny@11", "--backend", "cpu", "--tokenizer", TOKENIZER, "--prompt", "x"];
    let found = cogvlm_json(&[&run[..], &["--json", "--max-new-tokens", "2", "--device-map", arg(&file)]].concat());
    assert_eq!(found["memory"].as_object().unwrap().len(), 2, "{found}");
}

#[test]
fn groups_that_cannot_be_are_refused() {
    let plan = |flags: &[&str], code: i32| refusal(&[&["plan", "tiny", "--backend", "cpu"], flags].concat(), code);
    let text = plan(&["--max-memory", "0:100MiB,cpu:1GiB", "--tensor-parallel", "2"], 1);
    assert!(text.contains("needs 2 numbered devices, `--max-memory` names 1"), "{text}");
    let text = plan(&["--max-memory", BUDGETS, "--tensor-parallel", "3"], 1);
    assert!(text.contains("3 devices cannot share 4 query heads evenly"), "{text}");
    let text = plan(&["--max-memory", "0:100MiB,1:2MiB", "--tensor-parallel", "2"], 1);
    assert!(text.contains("`1` would hold") && text.contains("its budget is 2.0 MiB"), "{text}");
    plan(&["--max-memory", BUDGETS, "--tensor-parallel", "0"], 2);
    plan(&["--max-memory", BUDGETS, "--tensor-parallel", "2", "--policy", "balanced"], 2);
}
