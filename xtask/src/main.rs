//! Development tasks. `cargo xtask tidy` is everything that has to hold before a change lands, beside the tests.
#![forbid(unsafe_code)]
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command-line tool")]

mod bundle;
mod kernels;
mod licences;
mod source_rules;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["tidy"] => tidy(),
        ["kernels", ref flags @ ..] if flags.iter().all(|flag| ["--table", "--require"].contains(flag)) => {
            kernels(flags.contains(&"--table"), flags.contains(&"--require"))
        }
        ["bundle"] => bundle::make(&root(), None),
        ["bundle", "--out", out] => bundle::make(&root(), Some(Path::new(out))),
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

const USAGE: &str = "\
usage: cargo xtask tidy                            formatting, lints, licences, documentation, kernels, our own rules
       cargo xtask kernels [--table] [--require]   compile the kernels, refuse spills that nobody asked for; --table
                                                   lists them all, --require fails where there is no nvcc
       cargo xtask bundle [--out DIR]              what tests a GPU on a machine without Rust (docs/gpu-testing.md)";

fn kernels(with_table: bool, is_required: bool) -> ExitCode {
    let failures = match kernels::check(&root(), with_table) {
        kernels::Outcome::Checked(failures) => failures,
        kernels::Outcome::Skipped(reason) if is_required => vec![format!("not compiled: {reason}")],
        kernels::Outcome::Skipped(reason) => {
            println!("kernels: skipped: {reason}");
            return ExitCode::SUCCESS;
        }
    };
    for failure in &failures {
        eprintln!("kernels: {failure}");
    }
    if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn tidy() -> ExitCode {
    let root = root();
    let cargo = |arguments: &str, rustdoc_flags: &str| {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.current_dir(&root).args(arguments.split_whitespace()).env("RUSTDOCFLAGS", rustdoc_flags);
        run(arguments, &mut command)
    };
    let mut failures: Vec<String> = [
        cargo("fmt --all --check", ""),
        cargo("clippy --quiet --workspace --all-targets -- -D warnings", ""),
        cargo("doc --quiet --workspace --no-deps --document-private-items", "-D warnings"),
    ]
    .into_iter()
    .filter_map(Result::err)
    .collect();
    match kernels::check(&root, false) {
        kernels::Outcome::Checked(found) => failures.extend(found),
        kernels::Outcome::Skipped(reason) => println!("tidy: kernels skipped: {reason}"),
    }
    failures.extend(licences::check(&root));
    failures.extend(source_rules::check(&root));
    for failure in &failures {
        eprintln!("tidy: {failure}");
    }
    if failures.is_empty() {
        println!("tidy: all well");
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn run(name: &str, command: &mut Command) -> Result<(), String> {
    println!("tidy: cargo {name}");
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("`cargo {name}` failed: {status}")),
        Err(error) => Err(format!("`cargo {name}` cannot be run: {error}")),
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map(Path::to_owned)
        .expect("xtask lies in the root of the repository")
}
