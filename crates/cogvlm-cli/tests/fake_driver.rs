//! Without a GPU: what the program says where the driver is missing, old, broken, or short of memory. A small C library
//! takes the driver's place; environment variables tell it how to fail.

mod common;

use std::path::Path;
use std::process::Command;

use common::{Outcome, arg, assert_refusal, repo, write_json};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Functions that do more than return success. The name, the parameters, the body.
const BODIES: [(&str, &str, &str); 12] = [
    ("cuInit", "unsigned flags", "return number(\"FAKE_INIT\", 0);"),
    ("cuDriverGetVersion", "int *version", "*version = number(\"FAKE_VERSION\", 13000); return 0;"),
    ("cuDeviceGetCount", "int *count", "*count = number(\"FAKE_COUNT\", 2); return 0;"),
    ("cuDeviceGet", "int *device, int ordinal", "*device = ordinal; return 0;"),
    ("cuDeviceGetName", "char *name, int length, int device", "snprintf(name, length, \"Fake GPU\"); return 0;"),
    ("cuDeviceGetAttribute", "int *value, int which, int device", "*value = which == 75 ? 8 : 0; return 0;"),
    ("cuDeviceTotalMem_v2", "size_t *bytes, int device", "*bytes = number(\"FAKE_TOTAL\", 80L << 30); return 0;"),
    (
        "cuDevicePrimaryCtxRetain",
        "void **context, int device",
        "*context = (void *)1; return number(\"FAKE_RETAIN\", 0);",
    ),
    (
        "cuMemGetInfo_v2",
        "size_t *free, size_t *total",
        "*free = number(\"FAKE_FREE\", 79L << 30); *total = number(\"FAKE_TOTAL\", 80L << 30); return 0;",
    ),
    ("cuMemAlloc_v2", "unsigned long long *address, size_t bytes", "*address = 0; return number(\"FAKE_ALLOC\", 2);"),
    ("cuGetErrorString", "int code, const char **text", "*text = \"says the fake driver\"; return 0;"),
    ("cuDeviceGetUuid", "char *uuid, int device", "return 1;"),
];

/// The functions that the program needs: as the crate that calls them lists them.
fn symbols() -> Vec<String> {
    let source = std::fs::read_to_string(repo("crates/cogvlm-cuda/src/driver.rs")).unwrap();
    let list = source.split_once("const SYMBOLS").and_then(|(_, rest)| rest.split_once("];"));
    let names = list.expect("driver.rs lists the functions it needs").0.split('"').skip(1).step_by(2);
    names.map(str::to_owned).collect()
}

/// A directory with a driver that has all functions but `missing`.
fn driver_without(missing: &str) -> TempDir {
    let dir = TempDir::new().unwrap();
    let mut code = String::from(
        "#include <stdio.h>\n#include <stdlib.h>\n\
         static long number(const char *name, long usual) {\n\
         \x20   const char *text = getenv(name);\n    return text ? atol(text) : usual;\n}\n",
    );
    for symbol in symbols().iter().filter(|symbol| *symbol != missing) {
        let known = BODIES.iter().find(|(name, ..)| name == symbol);
        let (parameters, body) = known.map_or(("void", "return 0;"), |(_, parameters, body)| (*parameters, *body));
        code += &format!("int {symbol}({parameters}) {{ {body} }}\n");
    }
    let source = dir.path().join("driver.c");
    std::fs::write(&source, code).unwrap();
    let library = dir.path().join("libcuda.so.1");
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", arg(&library), arg(&source)]);
    let output = compiler.output().expect("`cc`, with which Rust links, compiles a stand-in for the driver");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    dir
}

/// Runs the program with the driver in `libraries`.
fn run(libraries: &Path, variables: &[(&str, &str)], arguments: &[&str]) -> Outcome {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cogvlm-shard"));
    command.args(arguments).current_dir(repo("")).env("LD_LIBRARY_PATH", libraries).env_remove("CUDA_VISIBLE_DEVICES");
    let output = command.envs(variables.iter().copied()).output().expect("the program starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("the program prints UTF-8");
    let code = output.status.code().unwrap_or_else(|| panic!("{variables:?}: ended by {}", output.status));
    Outcome { code, stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// What is wrong: a word for it, where the driver is, how it fails, the budgets; parts of the error and of the hint.
struct Case<'a> {
    libraries: &'a Path,
    variables: &'a [(&'a str, &'a str)],
    budgets: &'a str,
    error: &'a [&'a str],
    hint: &'a str,
}

impl Case<'_> {
    /// With `--backend cuda` an error and a hint; with `auto` an answer from the host, and the reason in the log.
    fn check(&self, ids: &Path) {
        let Self { libraries, variables, budgets, error, hint } = *self;
        let generate = |backend, more: &[&str]| {
            let flags = ["generate", "--model", "tiny@1", "--input-ids", arg(ids), "--max-memory", budgets];
            let more = [&["--context", "64", "--max-new-tokens", "2", "--json", "--backend", backend], more].concat();
            run(libraries, variables, &[&flags[..], &more].concat())
        };
        let built_in = cogvlm_cuda::is_built_in();
        let (error, hint) = if built_in { (error, hint) } else { (&["no CUDA kernels"][..], "nvcc") };
        let what = format!("{variables:?} {budgets}");

        let outcome = generate("cuda", &[]);
        let line = assert_refusal(&outcome, 1, &what);
        error.iter().for_each(|part| assert!(line.contains(part), "{what}: no `{part}` in {line}"));
        let hints: Vec<&str> = outcome.stderr.lines().filter(|line| line.starts_with("hint:")).collect();
        assert!(matches!(&hints[..], [line] if line.contains(hint)), "{what}: no `{hint}` in {}", outcome.stderr);
        assert_eq!(outcome.stdout, "", "{what}");

        let outcome = generate("auto", &["--log", "info"]);
        assert_eq!(outcome.code, 0, "{what}: {}", outcome.stderr);
        let reason = outcome.stderr.lines().find(|line| line.contains("running on the host"));
        let reason = reason.unwrap_or_else(|| panic!("{what}: {}", outcome.stderr));
        error.iter().for_each(|part| assert!(reason.contains(part), "{what}: no `{part}` in {reason}"));
        let answer: Value = serde_json::from_str(&outcome.stdout).unwrap();
        assert_eq!(answer["usage"]["completion_tokens"], 2, "{what}");
    }
}

#[test]
fn what_is_wrong_with_the_driver_is_said() {
    let (dir, whole, stub) = (TempDir::new().unwrap(), driver_without(""), driver_without("cuMemGetInfo_v2"));
    let ids = write_json(dir.path(), "ids.json", &json!([5, 6, 7]));
    let no_library = TempDir::new().unwrap();
    std::fs::write(no_library.path().join("libcuda.so.1"), "no library").unwrap();
    let usual = |variables, error, hint| Case { libraries: whole.path(), variables, budgets: "0:2GiB", error, hint };
    let cases = [
        Case { libraries: no_library.path(), ..usual(&[], &["libcuda.so.1"], "install the NVIDIA driver") },
        Case { libraries: stub.path(), ..usual(&[], &["libcuda.so.1", "`cuMemGetInfo_v2`"], "stub") },
        usual(&[("FAKE_INIT", "100")], &["does not start", "100"], "CUDA_VISIBLE_DEVICES"),
        usual(&[("FAKE_INIT", "34")], &["does not start", "34"], "stub"),
        usual(&[("FAKE_INIT", "803")], &["does not start", "803"], "version"),
        usual(&[("FAKE_INIT", "999")], &["does not start", "999"], "nvidia-smi"),
        usual(&[("FAKE_VERSION", "11040")], &["CUDA 11.4"], "update the driver"),
        usual(&[("FAKE_COUNT", "0")], &["shows no GPU"], "nvidia-smi"),
        Case { budgets: "3:2GiB", ..usual(&[], &["no GPU 3", "shows 2"], "doctor") },
        usual(&[("FAKE_RETAIN", "46")], &["GPU 0 (Fake GPU)", "46"], "exclusive"),
        usual(&[("FAKE_RETAIN", "101")], &["GPU 0 (Fake GPU)", "101"], "exclusive"),
        // Enough for arena and scratch, which the backend checks, but not for the room that the plan leaves beside them.
        usual(
            &[("FAKE_FREE", "104857600")],
            &["GPU 0 (Fake GPU) has 100.0 MiB free", "the plan needs"],
            "smaller budget",
        ),
        usual(&[("FAKE_FREE", "52428800")], &["GPU 0 (Fake GPU) has 50.0 MiB free", "needs"], "smaller budget"),
        usual(&[("FAKE_TOTAL", "536870912")], &["GPU 0 (Fake GPU) has 512.0 MiB in all"], "smaller budget"),
        usual(&[("FAKE_ALLOC", "2")], &["GPU 0 (Fake GPU)", "CUDA error 2"], "nvidia-smi"),
    ];
    for case in cases {
        case.check(&ids);
    }
}

/// Without a driver, and, where one is installed that cannot be hidden, without its GPUs.
#[test]
fn a_machine_without_gpus_says_so() {
    let installed = Command::new("ldconfig").arg("-p").output().is_ok_and(|output| {
        let known = String::from_utf8_lossy(&output.stdout).into_owned();
        known.contains("libcuda.so.1")
    });
    let error = if installed { "NVIDIA driver" } else { "the NVIDIA driver's library libcuda.so.1 cannot be loaded" };
    let hint = if installed { "" } else { "--backend cpu" };
    let (dir, empty) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let ids = write_json(dir.path(), "ids.json", &json!([5, 6, 7]));
    let variables = &[("CUDA_VISIBLE_DEVICES", "")];
    Case { libraries: empty.path(), variables, budgets: "0:2GiB", error: &[error], hint }.check(&ids);
}

#[test]
fn doctor_lists_gpus() {
    let driver = driver_without("");
    let doctor = |variables: &[(&str, &str)]| {
        let outcome = run(driver.path(), variables, &["doctor", "--json", "--backend", "cuda"]);
        let cuda: Value = serde_json::from_str::<Value>(&outcome.stdout).unwrap()["cuda"].clone();
        (cuda, outcome)
    };
    let (cuda, outcome) = doctor(&[]);
    if !cogvlm_cuda::is_built_in() {
        assert_refusal(&outcome, 1, "doctor");
        assert_eq!((&cuda["built_in"], &cuda["usable"]), (&json!(false), &json!(false)));
        assert!(cuda["hint"].as_str().unwrap().contains("nvcc"), "{cuda}");
        return;
    }
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    assert_eq!((&cuda["built_in"], &cuda["usable"], &cuda["reason"]), (&json!(true), &json!(true), &Value::Null));
    assert_eq!(cuda["driver_cuda_version"], "13.0");
    let gpus = cuda["devices"].as_array().unwrap();
    assert_eq!(gpus.len(), 2);
    let expected = json!({
        "ordinal": 1, "name": "Fake GPU", "compute_capability": "8.0", "num_multiprocessors": 0,
        "memory_bytes": 80_u64 << 30, "free_bytes": 79_u64 << 30,
    });
    assert_eq!(gpus[1], expected);

    let (cuda, outcome) = doctor(&[("FAKE_RETAIN", "46")]);
    let line = assert_refusal(&outcome, 1, "doctor");
    assert!(line.contains("GPU 0 (Fake GPU)") && outcome.stderr.contains("hint: "), "{}", outcome.stderr);
    assert_eq!((&cuda["usable"], &cuda["devices"][0]["free_bytes"]), (&json!(false), &Value::Null));
    assert!(cuda["devices"][1]["reason"].as_str().unwrap().contains("46"), "{cuda}");
}

/// `plan` needs no GPU where budgets are given; without them it asks the machine.
#[test]
fn plans_are_made_for_the_gpus_that_there_are() {
    let (driver, broken) = (driver_without(""), TempDir::new().unwrap());
    std::fs::write(broken.path().join("libcuda.so.1"), "no library").unwrap();
    let reserved = |libraries: &Path, flags: &[&str]| {
        let outcome = run(libraries, &[], &[&["plan", "--json"], flags].concat());
        assert_eq!(outcome.code, 0, "{flags:?}: {}", outcome.stderr);
        let plan: Value = serde_json::from_str(&outcome.stdout).unwrap();
        let devices = plan["devices"].as_object().unwrap().iter();
        devices
            .map(|(name, device)| (name.clone(), device["reserved_bytes"].as_u64().unwrap() >> 20))
            .collect::<Vec<_>>()
    };
    for backend in ["cuda", "auto"] {
        let given = ["--backend", backend, "--max-memory", "0:20GiB,1:24GiB"];
        assert_eq!(reserved(broken.path(), &given), [("0".to_owned(), 600), ("1".to_owned(), 600)]);
    }
    let outcome = run(broken.path(), &[], &["plan", "--backend", "cuda"]);
    assert_refusal(&outcome, 1, "plan --backend cuda");
    assert!(outcome.stderr.contains("--max-memory"), "{}", outcome.stderr);
    if cogvlm_cuda::is_built_in() {
        for backend in ["cuda", "auto"] {
            // One of the two holds everything.
            assert_eq!(reserved(driver.path(), &["--backend", backend]), [("0".to_owned(), 600)]);
        }
    }
}
