//! The report, word for word.

mod common;

use cogvlm_plan::plan;
use cogvlm_plan::plan::{Plan, Policy};
use common::request;

fn report(max_memory: &str, policy: Policy) -> String {
    let request = request(max_memory, policy);
    let text = plan(&request).unwrap().report(Some(&request));
    for line in text.lines() {
        assert!(line.chars().count() <= 100 && line.trim_end() == line, "{line:?}");
    }
    text
}

#[test]
fn two_cards_of_20_gib() {
    insta::assert_snapshot!(report("0:20GiB,1:20GiB,cpu:16GiB", Policy::Balanced));
    insta::assert_snapshot!("two_cards_of_20_gib_latency", report("0:20GiB,1:20GiB,cpu:16GiB", Policy::Latency));
}

#[test]
fn one_card_of_16_gib() {
    insta::assert_snapshot!(report("0:16GiB,cpu:32GiB", Policy::Auto));
}

#[test]
fn one_card_of_20_gib() {
    insta::assert_snapshot!(report("0:20GiB,cpu:30GiB", Policy::Auto));
}

#[test]
fn two_cards_of_12_gib() {
    insta::assert_snapshot!(report("0:12GiB,1:12GiB,cpu:16GiB", Policy::Balanced));
}

#[test]
fn one_card_of_10_gib_leaves_layers_to_the_host() {
    insta::assert_snapshot!(report("0:10GiB,cpu:40GiB", Policy::Auto));
}

#[test]
fn refused() {
    let error = plan(&request("0:16GiB,1:16GiB", Policy::Balanced)).unwrap_err();
    insta::assert_snapshot!(format!("error: {error}\nhint: {}", error.hint().unwrap()));
}

#[test]
fn a_map_by_hand_has_no_search_behind_it() {
    let request = request("0:24GiB,cpu:40GiB", Policy::Auto);
    let map =
        r#"{"model.vision": "cpu", "model.embed_tokens": 0, "model.layers": "cpu", "model.norm": 0, "lm_head": 0}"#;
    insta::assert_snapshot!(Plan::from_hugging_face(map, &request).unwrap().report(Some(&request)));
}
