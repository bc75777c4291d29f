//! Rules of our own over the files that git tracks.

use std::path::Path;
use std::process::Command;

/// Longest source file, tests apart; a longer one wants a table of contents, and contents are files.
const MAX_SOURCE_LINES: usize = 700;

/// What is wrong, one line each.
pub(crate) fn check(root: &Path) -> Vec<String> {
    println!("tidy: rules of our own");
    let files = match tracked_files(root) {
        Ok(files) => files,
        Err(error) => return vec![format!("git cannot list the files: {error}")],
    };
    let mut failures = Vec::new();
    for file in &files {
        let is_text =
            ["rs", "md", "toml", "py", "cu", "cuh", "yml"].iter().any(|ending| file.ends_with(&format!(".{ending}")));
        let Ok(text) = std::fs::read_to_string(root.join(file)) else { continue };
        if is_text {
            failures.extend(text_rules(file, &text));
        }
        if file.ends_with(".rs") {
            failures.extend(source_rules(file, &text));
        }
        if file.starts_with("kernels/") && (file.ends_with(".cu") || file.ends_with(".cuh")) {
            failures.extend(kernel_rules(file, &text));
        }
        if file.ends_with(".md") {
            failures.extend(dead_links(root, file, &text));
        }
    }
    failures.extend(kernels_without_wrapper(root, &files));
    failures
}

fn tracked_files(root: &Path) -> Result<Vec<String>, String> {
    let output =
        Command::new("git").current_dir(root).args(["ls-files"]).output().map_err(|error| error.to_string())?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}

fn text_rules(file: &str, text: &str) -> Vec<String> {
    let mut failures = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.ends_with([' ', '\t']) && !file.ends_with(".md") {
            failures.push(format!("{file}:{}: white space at the end of the line", number + 1));
        }
    }
    if !text.is_empty() && !text.ends_with('\n') {
        failures.push(format!("{file}: no line end at the end of the file"));
    }
    failures
}

fn source_rules(file: &str, text: &str) -> Vec<String> {
    let mut failures = Vec::new();
    let num_lines = text.lines().count();
    if num_lines > MAX_SOURCE_LINES && !file.contains("/tests/") {
        failures.push(format!("{file}: {num_lines} lines, more than {MAX_SOURCE_LINES}; split it by concern"));
    }
    // Put together so that this file does not break its own rules.
    for word in [concat!("todo", "!("), concat!("unimplemented", "!("), concat!("FIX", "ME")] {
        if text.contains(word) {
            failures.push(format!("{file}: `{word}` marks something unfinished"));
        }
    }
    let is_crate_root = file.ends_with("src/lib.rs") || file.ends_with("src/main.rs");
    let forbids = ["#![forbid(unsafe_code)]", "#![deny(unsafe_code)]"].iter().any(|attribute| text.contains(attribute));
    if is_crate_root && !file.starts_with("crates/cogvlm-cuda/") && !forbids {
        failures.push(format!("{file}: a crate forbids unsafe code, or denies it and waives it module by module"));
    }
    failures
}

/// A kernel opens with its contract, and needs no header that not every nvcc comes with.
fn kernel_rules(file: &str, text: &str) -> Vec<String> {
    let mut failures = Vec::new();
    let contract: String = text.lines().take_while(|line| line.starts_with("//")).collect();
    for word in ["launch", "wrapper"] {
        if file.ends_with(".cu") && !contract.contains(word) {
            failures.push(format!("{file}: the comment that it opens with does not name its `{word}`"));
        }
    }
    let includes = text.lines().filter_map(|line| line.trim_start().strip_prefix("#include"));
    for header in includes.map(str::trim).filter(|header| header.starts_with("<cuda") || header.starts_with("\"cuda")) {
        failures.push(format!("{file}: includes {header}; kernels include no headers of CUDA"));
    }
    failures
}

/// Links of a Markdown file to files that do not exist.
fn dead_links(root: &Path, file: &str, text: &str) -> Vec<String> {
    let mut failures = Vec::new();
    let dir = root.join(file).parent().map(Path::to_owned).unwrap_or_default();
    for after in text.split("](").skip(1) {
        let target = after.split(')').next().unwrap_or_default();
        let path = target.split('#').next().unwrap_or_default();
        if !path.is_empty() && !path.contains("://") && !path.starts_with("mailto:") && !dir.join(path).exists() {
            failures.push(format!("{file}: links to `{target}`, which does not exist"));
        }
    }
    failures
}

/// Every kernel has a typed wrapper of its name, which has an oracle and a conformance case by construction.
fn kernels_without_wrapper(root: &Path, files: &[String]) -> Vec<String> {
    let kernels = files.iter().filter_map(|file| file.strip_prefix("kernels/")?.strip_suffix(".cu"));
    kernels
        .filter(|name| !root.join(format!("crates/cogvlm-cuda/src/ops/{name}.rs")).exists())
        .map(|name| format!("kernels/{name}.cu has no wrapper crates/cogvlm-cuda/src/ops/{name}.rs"))
        .collect()
}
