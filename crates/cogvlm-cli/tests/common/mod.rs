//! What the tests of the command line share: running the program, reading what it writes.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// A path inside the repository, or where COGVLM_TEST_ROOT says that its files are.
pub(crate) fn repo(path: &str) -> PathBuf {
    let root = std::env::var_os("COGVLM_TEST_ROOT").map(PathBuf::from);
    root.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")).join(path)
}

/// The program: the one that cargo built for the test, or the one that COGVLM_TEST_PROGRAM names.
pub(crate) fn program() -> Command {
    Command::new(std::env::var_os("COGVLM_TEST_PROGRAM").unwrap_or_else(|| env!("CARGO_BIN_EXE_cogvlm-shard").into()))
}

/// What a run printed, and its exit code.
pub(crate) struct Outcome {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Hides the GPUs of this machine: what a test says of `--backend auto` is said of the host.
pub(crate) fn without_gpus(command: &mut Command) -> &mut Command {
    command.env("CUDA_VISIBLE_DEVICES", "")
}

/// Runs the program in the root of the repository, without GPUs.
pub(crate) fn cogvlm(arguments: &[&str]) -> Outcome {
    cogvlm_with_stdin(arguments, "")
}

/// [`cogvlm`], with the GPUs of this machine.
pub(crate) fn cogvlm_with_gpus(arguments: &[&str]) -> Outcome {
    run(&mut program(), arguments, "")
}

/// [`cogvlm`], with something to read.
pub(crate) fn cogvlm_with_stdin(arguments: &[&str], stdin: &str) -> Outcome {
    run(without_gpus(&mut program()), arguments, stdin)
}

fn run(program: &mut Command, arguments: &[&str], stdin: &str) -> Outcome {
    use std::io::Write;
    let mut child = program
        .args(arguments)
        .current_dir(repo(""))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    // A program that refuses its arguments may not read its input.
    drop(child.stdin.take().expect("piped").write_all(stdin.as_bytes()));
    let Output { status, stdout, stderr } = child.wait_with_output().expect("the program ends");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("the program prints UTF-8");
    Outcome { code: status.code().unwrap_or(-1), stdout: text(stdout), stderr: text(stderr) }
}

/// Runs the program, which has to succeed, and reads the JSON object that it prints.
pub(crate) fn cogvlm_json(arguments: &[&str]) -> Value {
    json_of(&cogvlm(arguments), arguments)
}

/// The JSON object that a run printed, which has to have succeeded.
pub(crate) fn json_of(outcome: &Outcome, arguments: &[&str]) -> Value {
    assert_eq!(outcome.code, 0, "{arguments:?}: {}", outcome.stderr);
    serde_json::from_str(&outcome.stdout).unwrap_or_else(|error| panic!("{arguments:?}: {error}: {}", outcome.stdout))
}

/// The program refuses: exit code, one `error:` line, perhaps a `hint:`, no panic. Gives the error line.
pub(crate) fn refusal(arguments: &[&str], code: i32) -> String {
    let outcome = cogvlm(arguments);
    assert_refusal(&outcome, code, &format!("{arguments:?}"))
}

/// See [`refusal`].
pub(crate) fn assert_refusal(outcome: &Outcome, code: i32, what: &str) -> String {
    let Outcome { code: found, stderr, .. } = outcome;
    assert_eq!(*found, code, "{what}: {stderr}");
    assert!(!stderr.contains("panicked"), "{what}: {stderr}");
    let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error:")).collect();
    assert_eq!(errors.len(), 1, "{what}: {stderr}");
    errors[0].to_owned()
}

/// Reads an f32 tensor of a safetensors file: shape and values.
pub(crate) fn read_tensor(path: &Path, name: &str) -> Option<(Vec<usize>, Vec<f32>)> {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let tensor = file.tensor(name).ok()?;
    let values = tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    Some((tensor.shape().to_vec(), values.collect()))
}

/// Names of the tensors of a safetensors file.
pub(crate) fn tensor_names(path: &Path) -> Vec<String> {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
    file.names().into_iter().map(str::to_owned).collect()
}

/// `RMS(found - golden) / RMS(golden)`
pub(crate) fn relative_rms(found: &[f32], golden: &[f32]) -> f64 {
    assert_eq!(found.len(), golden.len());
    let square = |value: f64| value * value;
    let error: f64 = found.iter().zip(golden).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let norm: f64 = golden.iter().map(|b| square(f64::from(*b))).sum();
    (error / norm).sqrt()
}

/// A list of integers in a JSON value.
pub(crate) fn ids(value: &Value) -> Vec<u64> {
    let list = value.as_array().unwrap_or_else(|| panic!("not a list: {value}"));
    list.iter().map(|id| id.as_u64().expect("an id")).collect()
}

/// The tokenizer of the goldens.
pub(crate) const TOKENIZER: &str = "tests/goldens/tokenizer.model";

/// A JSON file of the repository.
pub(crate) fn read_json(path: &str) -> Value {
    let text = std::fs::read_to_string(repo(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Writes a JSON file for the program to read.
pub(crate) fn write_json(dir: &Path, name: &str, value: &Value) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, value.to_string()).expect("a temporary directory can be written");
    path
}

/// A file name as an argument.
pub(crate) fn arg(path: &Path) -> &str {
    path.to_str().expect("names in tests are UTF-8")
}
