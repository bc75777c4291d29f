//! `cogvlm-shard`: plans, loads and runs CogVLM on several devices.
#![forbid(unsafe_code)]

mod answer;
mod args;
mod cluster;
mod commands;
mod error;
mod interrupt;
mod machine;
mod output;
mod progress;
mod prompt;
mod session;
mod stdin;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::filter::LevelFilter;

use crate::args::{Cli, Command};
use crate::error::{CliError, CliResult};

fn main() -> ExitCode {
    // Where this fails there is no /proc to ask for threads; whoever loads NCCL says so.
    drop(cogvlm_cluster::nccl::prepare_environment());
    let cli = Cli::parse();
    interrupt::install();
    let code = match run(cli) {
        Ok(()) => 0,
        Err(_) if interrupt::requested() => {
            output::note("interrupted");
            interrupt::EXIT_CODE
        }
        Err(error) => {
            // Nothing can be done where even stderr is closed.
            drop(std::io::stderr().write_all(error.render().as_bytes()));
            error.exit_code()
        }
    };
    if cluster::has_met() {
        // Threads of NCCL may still wait for other processes.
        drop(std::io::stdout().flush());
        cogvlm_cluster::end_process(code.into());
    }
    ExitCode::from(code)
}

fn run(cli: Cli) -> CliResult {
    start_logging(&cli.log)?;
    if !matches!(cli.command, Command::Plan(_) | Command::Tokenize(_) | Command::Preprocess(_)) {
        start_threads()?;
    }
    match &cli.command {
        Command::Plan(args) => commands::plan::run(args),
        Command::Inspect(args) => commands::inspect::run(args),
        Command::Synth(args) => commands::synth::run(args),
        Command::Generate(args) => commands::generate::run(args),
        Command::Chat(args) => commands::chat::run(args),
        Command::Tokenize(args) => commands::tokenize::run(args),
        Command::Preprocess(args) => commands::preprocess::run(args),
        Command::Bench(args) => commands::bench::run(args),
        Command::Doctor(args) => commands::doctor::run(args),
        Command::Demo => commands::demo::run(),
    }
}

/// Starts the threads that reading, hashing and making weights share. Left alone, they start when they are first needed,
/// and a machine that has no more threads to give is a panic.
fn start_threads() -> CliResult {
    let started = rayon::ThreadPoolBuilder::new().build_global();
    started.map_err(|error| CliError::new(format!("cannot start the threads that read weights: {error}")))
}

fn start_logging(level: &str) -> CliResult {
    let level: LevelFilter = level.parse().map_err(|_| {
        CliError::usage(format!("`--log {level}` is no level")).hint("one of error, warn, info, debug, trace")
    })?;
    let colour = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).with_ansi(colour).init();
    Ok(())
}
