//! Runs over several processes: the same bits as in one, and an end for all when one fails.

mod common;

use std::io::Read;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use common::{TOKENIZER, cogvlm, program, refusal, repo, without_gpus};
use serde_json::Value;
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
    /// Starts a process for each of `flags`, which sees no GPU.
    fn start(flags: &[Vec<String>]) -> Self {
        Self::start_by(flags, &|| {
            let mut program = program();
            without_gpus(&mut program);
            program
        })
    }

    fn start_by(flags: &[Vec<String>], program: &dyn Fn() -> Command) -> Self {
        let (size, address) = (flags.len().to_string(), free_address());
        let start = |(rank, flags): (usize, &Vec<String>)| {
            program()
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

/// What the only line on stdout of process 0 says of `transport`, when all have ended well.
fn transport_of(run: &mut Run, patience: Duration) -> Vec<Value> {
    for rank in 0..run.0.len() {
        let (status, stderr) = run.wait(rank, patience);
        assert!(status.success(), "process {rank}: {stderr}");
    }
    let mut text = String::new();
    run.0[0].stdout.take().unwrap().read_to_string(&mut text).unwrap();
    let report: Value = serde_json::from_str(&text).unwrap();
    report["transport"].as_array().expect("what carried rows is said").clone()
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

#[test]
fn what_carries_rows_is_said_and_chosen() {
    let flags = |transport: &str| {
        let fixed = ["--model", "tiny@11", "--max-new-tokens", "2", "--context", "256", "--policy", "balanced"];
        let budgets = ["--max-memory", "0/0:16MiB,1/0:16MiB"];
        generate(&[&fixed[..], &budgets, &["--json", "--transport", transport]].concat())
    };
    for (transport, reason) in [("auto", "is a virtual rank, not a GPU"), ("tcp", "that is what was asked for")] {
        let mut run = Run::start(&vec![flags(transport); 2]);
        let ways = transport_of(&mut run, Duration::from_secs(60));
        assert!(!ways.is_empty(), "{transport}");
        for way in ways {
            assert_eq!(way["by"], "tcp", "{transport}");
            let detail = way["detail"].as_str().unwrap();
            assert!(detail.contains(reason), "{transport}: {detail}");
        }
    }
    // Virtual ranks have no NCCL, and processes have to agree.
    let mut run = Run::start(&vec![flags("nccl"); 2]);
    for rank in 0..2 {
        let (status, stderr) = run.wait(rank, Duration::from_secs(30));
        assert_eq!(status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("error: `--transport nccl` joins GPUs"), "{stderr}");
    }
    let mut run = Run::start(&[flags("auto"), flags("tcp")]);
    for rank in 0..2 {
        let (status, stderr) = run.wait(rank, Duration::from_secs(30));
        assert_eq!(status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("--transport"), "process {rank}: {stderr}");
    }
}

/// Flags for GPUs, with an image and a long enough answer that steps are recorded and replayed.
fn on_gpus(flags: &[&str]) -> Vec<String> {
    let fixed = ["--model", "small@12", "--backend", "cuda", "--context", "1536", "--policy", "balanced"];
    let flags = generate(&[&fixed[..], flags].concat());
    // `generate` names the backend of the host first.
    let at = flags.iter().position(|flag| flag == "--backend").unwrap();
    [&flags[..at], &flags[at + 2..]].concat()
}

/// The logits of one process on `alone`, and of two by each of `transports` on `together`, are the same bits; `by` is what
/// carries the rows.
fn check_gpus(alone: &str, together: &str, transports: &[(&str, &str)]) {
    let dir = TempDir::new().unwrap();
    let file = |name: &str| dir.path().join(name);
    let flags = |budgets: &str, transport: &str, out: &Path| {
        let out = out.to_str().unwrap();
        let flags = ["--json", "--max-new-tokens", "24", "--max-memory", budgets, "--transport", transport];
        on_gpus(&[&flags[..], &["--logits-out", out]].concat())
    };
    let one = file("one");
    let output = program().current_dir(repo("")).args(flags(alone, "auto", &one)).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for (transport, by) in transports {
        let many = file(transport);
        let mut run = Run::start_by(&vec![flags(together, transport, &many); 2], &program);
        let ways = transport_of(&mut run, Duration::from_secs(100));
        assert!(!ways.is_empty() && ways.iter().all(|way| way["by"] == *by), "{transport}: {ways:?}");
        assert!(bytes(&one) == bytes(&many), "{transport}: other logits, by {ways:?}");
    }
}

#[test]
#[ignore = "needs a GPU"]
fn two_processes_on_one_gpu_join_by_tcp() {
    check_gpus("0:8GiB", "0/0:6GiB,1/0:6GiB", &[("auto", "tcp"), ("tcp", "tcp")]);
}

#[test]
#[ignore = "needs a GPU, another one, and NCCL"]
fn two_gpus_of_two_processes_join_by_nccl() {
    check_gpus("0:6GiB,1:6GiB", "0/0:6GiB,1/1:6GiB", &[("nccl", "nccl"), ("auto", "nccl"), ("tcp", "tcp")]);
}

#[test]
#[ignore = "needs a GPU, another one, and NCCL"]
fn two_gpus_are_released_when_a_process_dies() {
    let budgets = "0/0:6GiB,1/1:6GiB";
    let flags = ["--max-new-tokens", "1400", "--transport", "nccl", "--max-memory", budgets];
    for victim in [1, 0] {
        // A text only question leaves the context for a long answer.
        let flags = on_gpus(&flags);
        let image = flags.len() - 2;
        let mut run = Run::start_by(&vec![flags[..image].to_vec(); 2], &program);
        run.await_answer(0);
        run.kill(victim);
        let (status, stderr) = run.wait(1 - victim, PATIENCE);
        assert_eq!(status.code(), Some(1), "{stderr}");
        assert!(stderr.contains(&format!("process {victim} ")), "{stderr}");
    }
}
