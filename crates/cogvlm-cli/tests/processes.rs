//! Runs over several processes: the same bits as in one, and an end for all when one fails.

mod common;

use std::io::Read;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use common::{TOKENIZER, cogvlm, program, refusal, repo, without_gpus};
use tempfile::TempDir;

/// How long the others may go on after one has died.
const PATIENCE: Duration = Duration::from_secs(5);

fn generate(flags: &[&str]) -> Vec<String> {
    let image = repo("tests/goldens/images/rgb.png");
    let fixed = [
        "generate",
        "--backend",
        "cpu",
        "--tokenizer",
        TOKENIZER,
        "--ignore-eos",
        "--threads",
        "1",
        "--prompt",
        "Hello",
    ];
    let fixed = fixed.iter().chain(flags).map(|flag| (*flag).to_owned());
    fixed.chain(["--image".to_owned(), image.to_str().unwrap().to_owned()]).collect()
}

/// An address that nobody listens at now.
fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

/// Processes of one run. Those that are left are killed at the end.
struct Run(Vec<Child>);

impl Drop for Run {
    fn drop(&mut self) {
        for child in &mut self.0 {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

impl Run {
    /// Starts a process for each of `flags`.
    fn start(flags: &[Vec<String>]) -> Self {
        let (size, address) = (flags.len().to_string(), free_address());
        let start = |(rank, flags): (usize, &Vec<String>)| {
            without_gpus(&mut program())
                .current_dir(repo(""))
                .args(flags)
                .args(["--process-rank", &rank.to_string(), "--num-processes", &size, "--coordinator", &address])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        };
        Self(flags.iter().enumerate().map(start).collect())
    }

    /// Waits for process `rank`; gives how it ended, and what it said on stderr.
    fn wait(&mut self, rank: usize, patience: Duration) -> (ExitStatus, String) {
        let start = Instant::now();
        let child = &mut self.0[rank];
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                let mut text = String::new();
                child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
                return (status, text);
            }
            assert!(start.elapsed() < patience, "process {rank} does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until process `rank` has written something to stdout: its answer has begun.
    fn await_answer(&mut self, rank: usize) {
        let mut first = [0];
        assert_eq!(self.0[rank].stdout.as_mut().unwrap().read(&mut first).unwrap(), 1);
    }

    fn kill(&mut self, rank: usize) {
        self.0[rank].kill().unwrap();
    }
}

fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

#[test]
fn several_processes_give_the_bits_of_one() {
    let dir = TempDir::new().unwrap();
    let file = |name: &str| dir.path().join(name);
    let model = ["--model", "tiny@11", "--max-new-tokens", "7", "--context", "256"];
    for (name, alone, together, policy) in [
        ("two", "0:16MiB,1:16MiB", "0/0:16MiB,1/0:16MiB", "balanced"),
        ("three", "0:14MiB,1:14MiB,2:14MiB", "2/0:14MiB,0/0:14MiB,1/0:14MiB", "throughput"),
        ("streamed", "0:8MiB,1:12MiB,cpu:64MiB", "0/0:8MiB,1/3:12MiB,cpu:64MiB", "throughput"),
        ("elsewhere", "0:64MiB,1:32MiB", "1/0:64MiB,0/0:9MiB", "latency"),
    ] {
        let [one, many] = ["one", "many"].map(|kind| file(&format!("{name}-{kind}")));
        let flags = |budgets: &str, out: &Path| {
            let out = ["--max-memory", budgets, "--policy", policy, "--logits-out", out.to_str().unwrap()];
            generate(&[&model[..], &out].concat())
        };
        let outcome = cogvlm(&flags(alone, &one).iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(outcome.code, 0, "{name}: {}", outcome.stderr);
        let num_processes = if name == "three" { 3 } else { 2 };
        let mut run = Run::start(&vec![flags(together, &many); num_processes]);
        for rank in 0..num_processes {
            let (status, stderr) = run.wait(rank, Duration::from_secs(60));
            assert!(status.success(), "{name}, process {rank}: {stderr}");
        }
        assert!(bytes(&one) == bytes(&many), "{name}: other logits");
        std::fs::remove_file(&many).unwrap();
    }
}

#[test]
fn when_one_dies_all_end_and_name_it() {
    // A long answer, of which only the beginning is waited for.
    let flags = generate(&[
        "--model",
        "tiny@11",
        "--max-new-tokens",
        "2000",
        "--context",
        "2048",
        "--policy",
        "balanced",
        "--max-memory",
    ]);
    let budgets = "0/0:700MiB,1/0:700MiB,2/0:700MiB";
    let image = flags.len() - 2;
    let flags: Vec<String> = [&flags[..image], &[budgets.to_owned()], &flags[image..]].concat();
    for victim in [1, 0] {
        let mut run = Run::start(&vec![flags.clone(); 3]);
        run.await_answer(0);
        run.kill(victim);
        for rank in (0..3).filter(|rank| *rank != victim) {
            let (status, stderr) = run.wait(rank, PATIENCE);
            assert_eq!(status.code(), Some(1), "process {rank}: {stderr}");
            let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error:")).collect();
            assert_eq!(errors.len(), 1, "process {rank}: {stderr}");
            assert!(errors[0].contains(&format!("process {victim} ")), "process {rank}: {stderr}");
        }
    }
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let flags = |budgets: &str, context: &str| {
        generate(&["--model", "tiny@11", "--max-new-tokens", "2", "--context", context, "--max-memory", budgets])
    };
    // Two plans.
    let mut run = Run::start(&[flags("0/0:16MiB,1/0:16MiB", "256"), flags("0/0:16MiB,1/0:16MiB", "128")]);
    for rank in 0..2 {
        let (status, stderr) = run.wait(rank, Duration::from_secs(30));
        assert_eq!(status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("plan"), "process {rank}: {stderr}");
    }
    // Too few processes.
    let mut run = Run::start(&[flags("0/0:16MiB,3/0:16MiB", "256")]);
    let (status, stderr) = run.wait(0, Duration::from_secs(30));
    assert_eq!(status.code(), Some(1));
    assert!(stderr.contains("`3/0`, a device of process 3") && stderr.contains("start 4 processes"), "{stderr}");
    // Nobody said anything about processes.
    let alone = flags("0/0:16MiB,1/0:16MiB", "256");
    let message = refusal(&alone.iter().map(String::as_str).collect::<Vec<_>>(), 1);
    assert!(message.contains("`1/0`"), "{message}");
    // One that cannot load tells the others why.
    let mut wrong = flags("0/0:16MiB,1/0:16MiB", "256");
    let threads = wrong.iter().position(|flag| flag == "--threads").unwrap() + 1;
    wrong[threads] = "2000".to_owned();
    let mut run = Run::start(&[flags("0/0:16MiB,1/0:16MiB", "256"), wrong]);
    for rank in 0..2 {
        let (status, stderr) = run.wait(rank, Duration::from_secs(30));
        assert!(!status.success());
        assert!(stderr.contains("--threads"), "process {rank}: {stderr}");
    }
}
