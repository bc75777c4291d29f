//! Puts together what tests a GPU on a machine without Rust: docs/gpu-testing.md.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use serde_json::Value;

/// Most bytes of a bundle: it has to travel.
const MAX_BYTES: u64 = 60_000_000;
/// How tests say that they are for a bundle.
const MARK: &str = "ignore = \"needs a GPU";
/// The target of tests that stand in a library's source, and what their executable is called after.
const LIBRARY: &str = "lib";
/// What of the repository they read.
const DATA: &str = "tests/goldens";
const SCRIPT: &str = include_str!("bundle/run.sh");

pub(crate) fn make(root: &Path, out: Option<&Path>) -> ExitCode {
    match try_make(root, out) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bundle: {error}");
            ExitCode::FAILURE
        }
    }
}

fn try_make(root: &Path, out: Option<&Path>) -> Result<(), String> {
    let built = build(root, &gpu_tests(root)?)?;
    // Beside `release` in the target directory, where no other is named.
    let default = built.program.ancestors().nth(2).map(|target| target.join("bundle"));
    let out = out.map(Path::to_owned).or(default).ok_or("cargo's target directory has no parent")?;
    empty(&out)?;
    strip(&built.program, &out.join("cogvlm-shard"))?;
    for (name, executable) in &built.tests {
        strip(executable, &out.join("tests").join(name))?;
    }
    for file in lines_of(Command::new("git").current_dir(root).args(["ls-files", DATA]))? {
        copy(&root.join(&file), &out.join("data").join(&file))?;
    }
    let script = out.join("run.sh");
    std::fs::write(&script, SCRIPT).map_err(|error| format!("{}: {error}", script.display()))?;
    make_executable(&script)?;
    let version = lines_of(Command::new("git").current_dir(root).args(["describe", "--always", "--dirty"]))?;
    let version = format!("{}\n", version.concat());
    std::fs::write(out.join("version.txt"), version).map_err(|error| format!("{}: {error}", out.display()))?;
    let bytes = size(&out)?;
    println!(
        "bundle: {}: {:.1} MB, {} test executables; `run.sh` there runs them",
        out.display(),
        bytes as f64 / 1e6,
        built.tests.len()
    );
    if bytes > MAX_BYTES {
        return Err(format!("{bytes} bytes are more than {MAX_BYTES}"));
    }
    Ok(())
}

/// Package and target of all that has tests for a GPU: test files by their names, and libraries as [`LIBRARY`].
fn gpu_tests(root: &Path) -> Result<Vec<(String, String)>, String> {
    let mut found = BTreeSet::new();
    for file in lines_of(Command::new("git").current_dir(root).args(["ls-files", "crates/*.rs"]))? {
        let parts: Vec<&str> = file.split('/').collect();
        let (package, target) = match parts[..] {
            [_, package, "tests", name] => (package, name.trim_end_matches(".rs")),
            [_, package, "src", ..] => (package, LIBRARY),
            _ => continue,
        };
        let text = std::fs::read_to_string(root.join(&file)).map_err(|error| format!("{file}: {error}"))?;
        if text.lines().any(|line| line.contains(MARK) && !line.trim_start().starts_with("//")) {
            found.insert((package.to_owned(), target.to_owned()));
        }
    }
    if found.is_empty() { Err(format!("no test says `{MARK}`")) } else { Ok(found.into_iter().collect()) }
}

struct Built {
    program: PathBuf,
    /// `PACKAGE-TEST` and where it lies.
    tests: Vec<(String, PathBuf)>,
}

fn build(root: &Path, tests: &[(String, String)]) -> Result<Built, String> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root).env("COGVLM_CUDA", "require");
    command.args(["test", "--release", "--no-run", "--message-format=json-render-diagnostics"]);
    for (package, test) in tests {
        command.args(["--package", package]);
        if test == LIBRARY {
            command.arg("--lib")
        } else {
            command.args(["--test", test])
        };
    }
    // The program itself; its package's tests would have it built too.
    command.args(["--package", "cogvlm-cli", "--bin", "cogvlm-shard"]);
    let output = command.stderr(Stdio::inherit()).output();
    let output = output.map_err(|error| format!("cargo cannot be run: {error}"))?;
    if !output.status.success() {
        return Err("the release build failed".to_owned());
    }
    let (mut program, mut executables) = (None, Vec::new());
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Ok(message) = serde_json::from_str::<Value>(line) else { continue };
        let Some(executable) = message["executable"].as_str().map(PathBuf::from) else { continue };
        let target = message["target"]["name"].as_str().unwrap_or_default();
        let kind = message["target"]["kind"][0].as_str().unwrap_or_default();
        let is_test = message["profile"]["test"] == true;
        if kind == "bin" && !is_test && target == "cogvlm-shard" {
            program = Some(executable);
        } else if is_test && (kind == "test" || kind == "lib") {
            let package = package_name(message["manifest_path"].as_str().unwrap_or_default());
            let target = if kind == "lib" { LIBRARY } else { target };
            // Asking for a test by name gives every package's test of that name, and so it is with libraries.
            if tests.contains(&(package.clone(), target.to_owned())) {
                executables.push((format!("{package}-{target}"), executable));
            }
        }
    }
    let program = program.ok_or("cargo did not build `cogvlm-shard`")?;
    if executables.len() != tests.len() {
        return Err(format!("cargo built {} of {} test executables", executables.len(), tests.len()));
    }
    executables.sort();
    Ok(Built { program, tests: executables })
}

/// The package of `.../PACKAGE/Cargo.toml`: crates lie in directories of their names.
fn package_name(manifest: &str) -> String {
    let folder = Path::new(manifest).parent().and_then(Path::file_name);
    folder.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Makes `out` an empty directory, if it is a bundle or empty now.
fn empty(out: &Path) -> Result<(), String> {
    let failed = |error: std::io::Error| format!("{}: {error}", out.display());
    if out.exists() {
        let is_empty = std::fs::read_dir(out).map_err(failed)?.next().is_none();
        if !is_empty && !out.join("version.txt").exists() {
            return Err(format!("{} has other things in it than a bundle", out.display()));
        }
        std::fs::remove_dir_all(out).map_err(failed)?;
    }
    std::fs::create_dir_all(out.join("tests")).map_err(failed)
}

/// Copies an executable without its symbols.
fn strip(from: &Path, to: &Path) -> Result<(), String> {
    let status = Command::new("strip").arg("-o").arg(to).arg(from).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("`strip {}` failed: {status}", from.display())),
        Err(error) => Err(format!("`strip` of binutils cannot be run: {error}")),
    }
}

fn copy(from: &Path, to: &Path) -> Result<(), String> {
    let folder = to.parent().ok_or_else(|| format!("{} is in no directory", to.display()))?;
    std::fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    std::fs::copy(from, to).map_err(|error| format!("{}: {error}", from.display()))?;
    Ok(())
}

fn make_executable(file: &Path) -> Result<(), String> {
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(file, mode).map_err(|error| format!("{}: {error}", file.display()))
}

/// Bytes of all files under `folder`.
fn size(folder: &Path) -> Result<u64, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    let mut total = 0;
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let metadata = entry.metadata().map_err(failed)?;
        total += if metadata.is_dir() { size(&entry.path())? } else { metadata.len() };
    }
    Ok(total)
}

fn lines_of(command: &mut Command) -> Result<Vec<String>, String> {
    let output = command.output().map_err(|error| format!("git cannot be run: {error}"))?;
    if !output.status.success() {
        return Err(format!("git failed: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
}
