//! Without a GPU: what the program says where the driver is missing, old, broken, or short of memory. A small C library
//! takes the driver's place; environment variables tell it how to fail.

mod common;

use std::path::Path;
use std::process::Command;

use common::{Outcome, arg, assert_refusal, repo, write_json};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Functions that do more than return success. The name, the parameters, the body.
const BODIES: [(&str, &str, &str); 18] = [
    ("cuInit", "unsigned flags", "return number(\"FAKE_INIT\", 0);"),
    ("cuDriverGetVersion", "int *version", "*version = number(\"FAKE_VERSION\", 13000); return 0;"),
    ("cuDeviceGetCount", "int *count", "*count = number(\"FAKE_COUNT\", 2); return 0;"),
    ("cuDeviceGet", "int *device, int ordinal", "*device = ordinal; return 0;"),
    (
        "cuDeviceGetName",
        "char *name, int length, int device",
        "const char *known = getenv(\"FAKE_NAME\"); snprintf(name, length, \"%s\", known ? known : \"Fake GPU\"); return 0;",
    ),
    ("cuDeviceGetAttribute", "int *value, int which, int device", "*value = which == 75 ? 8 : 0; return 0;"),
    ("cuDeviceTotalMem_v2", "size_t *bytes, int device", "*bytes = number(\"FAKE_TOTAL\", 80L << 30); return 0;"),
    (
        "cuDevicePrimaryCtxRetain",
        "void **context, int device",
        "*context = (void *)(long)(1 + device);\
         return device == number(\"FAKE_SOUND\", -1) ? 0 : number(\"FAKE_RETAIN\", 0);",
    ),
    (
        "cuMemGetInfo_v2",
        "size_t *free, size_t *total",
        "*free = number(\"FAKE_FREE\", 79L << 30); *total = number(\"FAKE_TOTAL\", 80L << 30); return 0;",
    ),
    // Memory that nobody touches: copies and kernels do nothing, and take a millisecond.
    (
        "cuMemAlloc_v2",
        "unsigned long long *address, size_t bytes",
        "long code = number(\"FAKE_ALLOC\", 2); *address = code ? 0 : (unsigned long long)malloc(bytes); return code;",
    ),
    ("cuMemFree_v2", "unsigned long long address", "free((void *)address); return 0;"),
    ("cuMemHostAlloc", "void **address, size_t bytes", "*address = malloc(bytes); return *address ? 0 : 2;"),
    ("cuMemFreeHost", "void *address", "free(address); return 0;"),
    ("cuEventElapsedTime", "float *ms", "*ms = number(\"FAKE_US\", 1000) / 1000.0f; return 0;"),
    ("cuDeviceCanAccessPeer", "int *can", "*can = number(\"FAKE_PEERS\", 1); return 0;"),
    ("cuModuleGetFunction", "void **function", "*function = (void *)1; return 0;"),
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
    let [found, failure] = [&gpus[1], &gpus[1]["not_measured"]];
    let mut found = found.clone();
    found.as_object_mut().unwrap().remove("not_measured");
    assert_eq!(found, expected);
    // Its driver gives no memory, so there is nothing to measure with; that is said, and is no error.
    assert!(failure.as_str().unwrap().contains("GPU 1 (Fake GPU)"), "{failure}");

    let (cuda, outcome) = doctor(&[("FAKE_RETAIN", "46")]);
    let line = assert_refusal(&outcome, 1, "doctor");
    assert!(line.contains("GPU 0 (Fake GPU)") && outcome.stderr.contains("hint: "), "{}", outcome.stderr);
    assert_eq!((&cuda["usable"], &cuda["devices"][0]["free_bytes"]), (&json!(false), &Value::Null));
    assert!(cuda["devices"][1]["reason"].as_str().unwrap().contains("46"), "{cuda}");
}

/// Every GPU that can be opened is measured, and every pair of them; what cannot be is left out, and said.
#[test]
fn doctor_measures_gpus_and_the_ways_between_them() {
    if !cogvlm_cuda::is_built_in() {
        return;
    }
    let driver = driver_without("");
    let doctor = |variables: &[(&str, &str)], flags: &[&str]| {
        let variables = [&[("FAKE_ALLOC", "0")], variables].concat();
        let outcome = run(driver.path(), &variables, &[&["doctor"], flags].concat());
        assert_eq!(outcome.code, 0, "{}", outcome.stderr);
        outcome.stdout
    };
    let report: Value = serde_json::from_str(&doctor(&[], &["--json"])).unwrap();
    let links = &report["links"];
    assert_eq!(links["measured_on"]["cuda"], "13.0");
    for ordinal in ["0", "1"] {
        let gpu = &links["devices"][ordinal];
        assert_eq!(gpu["name"], "Fake GPU");
        // What is copied and multiplied in a millisecond: 1 GiB read and written, 256 MiB, 2 x 8192^3.
        for (rate, expected) in [
            ("copy_bytes_per_s", 2.0 * f64::from(1 << 30) * 1e3),
            ("from_host_bytes_per_s", f64::from(256 << 20) * 1e3),
            ("to_host_bytes_per_s", f64::from(256 << 20) * 1e3),
            ("product_flops_per_s", 2.0 * 8192.0_f64.powi(3) * 1e3),
        ] {
            let found = gpu[rate].as_f64().unwrap();
            assert!((found / expected - 1.0).abs() < 1e-6, "{rate}: {found} for {expected}");
        }
        assert!(gpu["host_hop_s"].as_f64().unwrap() < 0.1);
    }
    let ways: Vec<_> = links["pairs"].as_array().unwrap().iter().map(|way| [&way["from"], &way["to"]]).collect();
    assert_eq!(ways, [[&json!(0), &json!(1)], [&json!(1), &json!(0)]]);
    assert!(links["pairs"].as_array().unwrap().iter().all(|way| way["peer_access"] == true), "{links}");
    assert!((links["pairs"][0]["bytes_per_s"].as_f64().unwrap() / (f64::from(256 << 20) * 1e3) - 1.0).abs() < 1e-6);

    // A plan takes them as they are written.
    let dir = TempDir::new().unwrap();
    let file = write_json(dir.path(), "links.json", &report);
    let flags = ["plan", "--json", "--max-memory", "0:20GiB,1:20GiB", "--batch", "2", "--links", arg(&file)];
    let plan: Value = serde_json::from_str(&run(driver.path(), &[], &flags).stdout).unwrap();
    assert_eq!(plan["notices"], json!([]));
    assert!(plan["predicted_with"].as_str().unwrap().ends_with("(`0`, `1`)"), "{}", plan["predicted_with"]);

    // GPU 0 in the hands of another process, and no way between GPUs but through the host.
    let report: Value =
        serde_json::from_str(&doctor(&[("FAKE_RETAIN", "46"), ("FAKE_SOUND", "1")], &["--json"])).unwrap();
    let devices = report["links"]["devices"].as_object().unwrap();
    assert_eq!(
        (devices.keys().map(String::as_str).collect::<Vec<_>>(), &report["links"]["pairs"]),
        (vec!["1"], &json!([]))
    );
    assert!(report["cuda"]["devices"][0]["reason"].as_str().unwrap().contains("46"));
    let report: Value = serde_json::from_str(&doctor(&[("FAKE_PEERS", "0")], &["--json"])).unwrap();
    assert_eq!(report["links"]["pairs"][0]["peer_access"], false);

    // A clock that stands still measures nothing.
    let report: Value = serde_json::from_str(&doctor(&[("FAKE_US", "0")], &["--json"])).unwrap();
    assert_eq!(report["links"]["devices"], json!({}));
    assert!(report["cuda"]["devices"][0]["not_measured"].as_str().unwrap().contains("its own clock"), "{report}");

    let text = doctor(&[], &[]);
    for part in ["copies 2147 GB/s", "268.4 GB/s from the host", "0 -> 1    peer access, 268.4 GB/s, a row in "] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let asked = doctor(&[], &["--json", "--backend", "cpu"]);
    assert!(!asked.contains("copy_bytes_per_s"), "GPUs that nobody asks for are not measured: {asked}");
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
        // NCCL may join GPUs of several processes, and takes memory beside the arena.
        let joined = ["--backend", backend, "--max-memory", "0:20GiB,1/0:24GiB"];
        assert_eq!(reserved(broken.path(), &joined), [("0".to_owned(), 1240), ("1/0".to_owned(), 1240)]);
        let by_tcp = [&joined[..], &["--transport", "tcp"]].concat();
        assert_eq!(reserved(broken.path(), &by_tcp), [("0".to_owned(), 600), ("1/0".to_owned(), 600)]);
    }
    let outcome = run(broken.path(), &[], &["plan", "--backend", "cuda"]);
    assert_refusal(&outcome, 1, "plan --backend cuda");
    assert!(outcome.stderr.contains("--max-memory"), "{}", outcome.stderr);
    if cogvlm_cuda::is_built_in() {
        // A GPU of a kind that was measured is known by its name.
        let flags = ["plan", "--json", "--max-memory", "0:60GiB"];
        let rates = |name| {
            let plan: Value = serde_json::from_str(&run(driver.path(), &[("FAKE_NAME", name)], &flags).stdout).unwrap();
            plan["predicted_with"].as_str().unwrap().to_owned()
        };
        assert_eq!(rates("NVIDIA H100 80GB HBM3"), "recorded of an NVIDIA H100 80GB HBM3 (`0`)");
        assert_eq!(rates("NVIDIA Z9"), "assumed of a 24 GB card on PCIe 4.0 (`0`)");
        for backend in ["cuda", "auto"] {
            // One of the two holds everything.
            assert_eq!(reserved(driver.path(), &["--backend", backend]), [("0".to_owned(), 600)]);
        }
    }
}
