//! Compiles the kernels and reads what the assembler says of them.
//!
//! crates/cogvlm-cuda/build.rs compiles `kernels/*.cu` and knows where nvcc is; this has cargo run it, and reads the logs
//! beside the fat binaries.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What came of it.
pub(crate) enum Outcome {
    /// This build has no kernels: why.
    Skipped(String),
    /// What is wrong, one line each.
    Checked(Vec<String>),
}

/// One kernel or function on one architecture.
#[derive(Debug, PartialEq, Eq)]
struct Usage {
    /// The file's name without `.cu`.
    module: String,
    kernel: String,
    architecture: String,
    registers: u32,
    /// Bytes of static shared memory.
    shared: u32,
    stack: u32,
    spill_stores: u32,
    spill_loads: u32,
}

/// A line `// spills allowed: KERNEL ARCH BYTES reason` of a kernel's file.
#[derive(Debug, PartialEq, Eq)]
struct Allowance {
    kernel: String,
    architecture: String,
    bytes: u32,
}

/// Compiles every kernel for every architecture and looks for spills that nobody asked for; prints all kernels as a
/// table where asked.
pub(crate) fn check(root: &Path, with_table: bool) -> Outcome {
    match build(root).and_then(|out| look(root, &out, with_table)) {
        Ok(outcome) => outcome,
        Err(error) => Outcome::Checked(vec![error]),
    }
}

/// Has cargo run build.rs; gives the directory where it writes.
fn build(root: &Path) -> Result<PathBuf, String> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root).args(["check", "--quiet", "--package", "cogvlm-cuda", "--message-format=json"]);
    let output = command.stderr(Stdio::inherit()).output();
    let output = output.map_err(|error| format!("cargo cannot be run: {error}"))?;
    let messages = String::from_utf8_lossy(&output.stdout).into_owned();
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let is_success = output.status.success();
    let mut out_dir = None;
    for message in messages {
        let is_ours = message["package_id"].as_str().is_some_and(|id| id.contains("cogvlm-cuda"));
        if is_ours && message["reason"] == "build-script-executed" {
            out_dir = message["out_dir"].as_str().map(PathBuf::from);
        }
        // Warnings are for clippy.
        if let (false, Some(text)) = (is_success, message["message"]["rendered"].as_str()) {
            eprint!("{text}");
        }
    }
    match out_dir {
        _ if !is_success => Err("`cargo check --package cogvlm-cuda` failed".to_owned()),
        Some(out_dir) => Ok(out_dir),
        None => Err("cargo does not say where crates/cogvlm-cuda/build.rs writes".to_owned()),
    }
}

fn look(root: &Path, out: &Path, with_table: bool) -> Result<Outcome, String> {
    let read = |path: &Path| std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()));
    if !read(&out.join("modules.rs"))?.contains("include_bytes!") {
        let is_off = std::env::var("COGVLM_CUDA").is_ok_and(|setting| setting == "off");
        let reason = if is_off { "COGVLM_CUDA=off" } else { "no nvcc was found; docs/cuda.md says how to get one" };
        return Ok(Outcome::Skipped(reason.to_owned()));
    }
    let mut sources: Vec<PathBuf> = std::fs::read_dir(root.join("kernels"))
        .map_err(|error| format!("kernels: {error}"))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "cu"))
        .collect();
    sources.sort();
    let (mut usages, mut failures) = (Vec::new(), Vec::new());
    for source in &sources {
        let module = source.file_stem().and_then(|name| name.to_str()).ok_or("a kernel's name is not UTF-8")?;
        let log = read(&out.join(format!("{module}.ptxas")))?;
        let found = parse_log(module, &log);
        if found.is_empty() {
            failures.push(format!("kernels/{module}.cu: the assembler's log names no kernel"));
        }
        for line in log.lines().filter(|line| line.contains("warning") || line.contains("Performance Loss")) {
            failures.push(format!("kernels/{module}.cu: {}", line.trim()));
        }
        failures.extend(unasked(module, &found, &allowances(module, &read(source)?)?));
        usages.extend(found);
    }
    if with_table {
        print_table(&usages);
    }
    let mut architectures: Vec<&str> = Vec::new();
    for usage in &usages {
        if !architectures.contains(&&*usage.architecture) {
            architectures.push(&usage.architecture);
        }
    }
    println!("kernels: {} files, {} kernels on {}", sources.len(), usages.len(), architectures.join(", "));
    Ok(Outcome::Checked(failures))
}

/// The log of `nvcc -Xptxas=-v`.
fn parse_log(module: &str, log: &str) -> Vec<Usage> {
    let number_before = |line: &str, what: &str| {
        let (before, _) = line.split_once(what)?;
        before.trim_end().rsplit(' ').next()?.parse::<u32>().ok()
    };
    let mut architecture = "";
    let mut usages: Vec<Usage> = Vec::new();
    for line in log.lines() {
        if let Some((_, after)) = line.split_once("Compiling entry function '") {
            architecture = after.split("for 'sm_").nth(1).and_then(|rest| rest.split('\'').next()).unwrap_or("");
        } else if let Some((_, name)) = line.split_once("Function properties for ") {
            let (module, kernel) = (module.to_owned(), name.trim().to_owned());
            let architecture = architecture.to_owned();
            let (registers, shared, stack, spill_stores, spill_loads) = (0, 0, 0, 0, 0);
            usages.push(Usage { module, kernel, architecture, registers, shared, stack, spill_stores, spill_loads });
        } else if let Some(usage) = usages.last_mut() {
            if let Some(stack) = number_before(line, " bytes stack frame") {
                usage.stack = stack;
                usage.spill_stores = number_before(line, " bytes spill stores").unwrap_or(0);
                usage.spill_loads = number_before(line, " bytes spill loads").unwrap_or(0);
            }
            if let Some(registers) = number_before(line, " registers") {
                usage.registers = registers;
                usage.shared = number_before(line, " bytes smem").unwrap_or(0);
            }
        }
    }
    usages
}

fn allowances(module: &str, source: &str) -> Result<Vec<Allowance>, String> {
    let lines = source.lines().filter_map(|line| line.strip_prefix("// spills allowed: "));
    lines
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                [kernel, architecture, bytes, _, ..] if bytes.parse::<u32>().is_ok() => Ok(Allowance {
                    kernel: kernel.to_owned(),
                    architecture: architecture.to_owned(),
                    bytes: bytes.parse().unwrap_or_default(),
                }),
                _ => Err(format!("kernels/{module}.cu: `spills allowed: {line}` is not KERNEL ARCH BYTES reason")),
            }
        })
        .collect()
}

/// Stack frames and spills beyond what the file allows, and allowances for kernels that there are not.
fn unasked(module: &str, usages: &[Usage], allowances: &[Allowance]) -> Vec<String> {
    let mut failures = Vec::new();
    for Usage { kernel, architecture, stack, spill_stores, spill_loads, .. } in usages {
        let allowed = allowances
            .iter()
            .filter(|allowed| allowed.kernel == *kernel && allowed.architecture == *architecture)
            .map(|allowed| allowed.bytes)
            .max()
            .unwrap_or(0);
        if stack.max(spill_stores).max(spill_loads) > &allowed {
            failures.push(format!(
                "kernels/{module}.cu: `{kernel}` on {architecture} has {stack} bytes of stack, spills {spill_stores} and \
                 loads {spill_loads}; {allowed} are allowed"
            ));
        }
    }
    let is_compiled = |architecture: &str| usages.iter().any(|usage| usage.architecture == architecture);
    for Allowance { kernel, architecture, .. } in allowances {
        let exists = usages.iter().any(|usage| usage.kernel == *kernel && usage.architecture == *architecture);
        if is_compiled(architecture) && !exists {
            failures.push(format!(
                "kernels/{module}.cu: allows spills of `{kernel}` on {architecture}, which is not there"
            ));
        }
    }
    failures
}

fn print_table(usages: &[Usage]) {
    let width = usages.iter().map(|usage| usage.kernel.len()).max().unwrap_or(0).max("kernel".len());
    let heads =
        format!("{:>5}  {:>9}  {:>6}  {:>5}  {:>6}  {:>5}", "arch", "registers", "shared", "stack", "stores", "loads");
    let mut table = format!("{:width$}  {heads}\n", "kernel");
    for Usage { kernel, architecture, registers, shared, stack, spill_stores, spill_loads, .. } in usages {
        let numbers = format!("{registers:>9}  {shared:>6}  {stack:>5}  {spill_stores:>6}  {spill_loads:>5}");
        table += &format!("{kernel:width$}  {architecture:>5}  {numbers}\n");
    }
    // Who reads only its beginning has closed the pipe.
    let _ = std::io::stdout().write_all(table.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 88 registers, used 1 barriers, 32768 bytes smem, 1256 bytes cmem[0], 8 bytes cmem[2]
ptxas info    : Compile time = 62.500 ms
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
    16 bytes stack frame, 20 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
ptxas info    : Function properties for called_by_it
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
";

    #[test]
    fn logs_are_read() {
        let found = parse_log("file", LOG);
        let numbers: Vec<_> = found
            .iter()
            .map(|usage| (&*usage.kernel, &*usage.architecture, usage.registers, usage.shared, usage.stack))
            .collect();
        assert_eq!(
            numbers,
            [("first", "80", 88, 32768, 0), ("second", "90a", 255, 0, 16), ("called_by_it", "90a", 0, 0, 8)]
        );
        assert_eq!((found[1].spill_stores, found[1].spill_loads), (20, 28));
    }

    #[test]
    fn spills_are_asked_for() {
        let found = parse_log("file", LOG);
        assert_eq!(unasked("file", &found, &[]).len(), 2, "the kernel and what it calls");
        let allowed = |text: &str| allowances("file", text).expect("well written");
        let asked = "// spills allowed: second 90a 28 outside of its loop\n// spills allowed: called_by_it 90a 8 why\n";
        assert_eq!(unasked("file", &found, &allowed(asked)), [""; 0]);
        let too_little = asked.replace("28", "27");
        assert_eq!(unasked("file", &found, &allowed(&too_little)).len(), 1);
        let of_another = asked.replace("second 90a", "second 80");
        assert_eq!(unasked("file", &found, &allowed(&of_another)).len(), 2, "one spills, one is not there");
        let elsewhere = format!("{asked}// spills allowed: second 120 28 for an architecture that was not compiled\n");
        assert_eq!(unasked("file", &found, &allowed(&elsewhere)), [""; 0]);
        assert!(allowances("file", "// spills allowed: second 90a 28\n").is_err(), "a reason is given");
    }
}
