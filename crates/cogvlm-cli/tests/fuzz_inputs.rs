//! What the fuzz targets were begun with, and what they found: every file of tests/hostile/fuzz through the same checks.

mod common;

#[path = "../../../fuzz/checks/device_map.rs"]
mod device_map;
#[path = "../../../fuzz/checks/header.rs"]
mod header;
#[path = "../../../fuzz/checks/image.rs"]
mod image;
#[path = "../../../fuzz/checks/tokenizer.rs"]
mod tokenizer;

use std::time::{Duration, Instant};

/// Feeds all inputs of `target` to `check`. None of them may take long: a slow input is a finding too.
fn feed(target: &str, dirs: &[&str], check: fn(&[u8])) {
    let mut num_inputs = 0;
    for dir in dirs {
        for entry in std::fs::read_dir(common::repo(dir)).unwrap() {
            let path = entry.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            let start = Instant::now();
            std::panic::catch_unwind(|| check(&bytes)).unwrap_or_else(|_| panic!("broken by {}", path.display()));
            assert!(start.elapsed() < Duration::from_secs(20), "{} took {:?}", path.display(), start.elapsed());
            num_inputs += 1;
        }
    }
    assert!(num_inputs >= 5, "{target} has only {num_inputs} inputs");
}

#[test]
fn headers() {
    feed("header", &["tests/hostile/fuzz/header"], header::check);
}

#[test]
fn device_maps() {
    feed("device_map", &["tests/hostile/fuzz/device_map"], device_map::check);
}

#[test]
fn tokenizers() {
    feed("tokenizer", &["tests/hostile/fuzz/tokenizer"], tokenizer::check);
}

#[test]
fn images() {
    feed("image", &["tests/hostile/fuzz/image", "tests/goldens/images"], image::check);
}
