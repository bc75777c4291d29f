//! Processes of a test: the test's own executable, started again to run the test called `process`.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A line that survives however the process ends.
pub fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n# {line}").and_then(|()| out.flush()).expect("the test reads what its processes print");
}

/// A process that was started, and all that it prints.
pub struct Process {
    pub child: Child,
    output: std::sync::Arc<std::sync::Mutex<String>>,
    reader: Option<std::thread::JoinHandle<()>>,
}

impl Process {
    pub fn start(job: &str, variables: &[(&str, String)]) -> Self {
        Self::start_by(&[], job, variables)
    }

    /// Started by another program, which may start several.
    pub fn start_by(launcher: &[&str], job: &str, variables: &[(&str, String)]) -> Self {
        Self::spawn(launcher, job, variables, Stdio::null())
    }

    /// One whose stderr is shown.
    pub fn start_loud(job: &str, variables: &[(&str, String)]) -> Self {
        Self::spawn(&[], job, variables, Stdio::inherit())
    }

    fn spawn(launcher: &[&str], job: &str, variables: &[(&str, String)], stderr: Stdio) -> Self {
        let own = std::env::current_exe().unwrap().into_os_string();
        let mut words = launcher.iter().map(std::ffi::OsString::from).chain([own]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words).args(["process", "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
        // Whatever runs the tests may itself be a process of something.
        const PREFIXES: [&str; 9] = [
            "RANK",
            "WORLD_SIZE",
            "SLURM_",
            "OMPI_COMM",
            "PMI",
            "COGVLM_",
            "MASTER_",
            "JOB_COMPLETION",
            "TORCHELASTIC",
        ];
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy().into_owned();
            if PREFIXES.iter().any(|prefix| text.starts_with(prefix)) && text != "SLURM_CONF" {
                command.env_remove(name);
            }
        }
        command.env("TEST_JOB", job).envs(variables.iter().map(|(name, value)| (name, value)));
        let mut child = command.stdout(Stdio::piped()).stderr(stderr).spawn().unwrap();
        let output = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
        let (mut stdout, shared) = (child.stdout.take().unwrap(), std::sync::Arc::clone(&output));
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = stdout.read(&mut buffer) {
                shared.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..count]));
            }
        });
        Self { child, output, reader: Some(reader) }
    }

    pub fn output(&self) -> String {
        self.output.lock().unwrap().clone()
    }

    pub fn wait_for(&self, words: &str) {
        let start = Instant::now();
        while !self.output().contains(words) {
            assert!(start.elapsed() < Duration::from_secs(20), "no `{words}` in {}", self.output());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// How it ended, which is before `deadline`.
    pub fn end(&mut self, deadline: Instant) -> String {
        while self.child.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "still running: {}", self.output());
            std::thread::sleep(Duration::from_millis(5));
        }
        self.reader.take().unwrap().join().unwrap();
        let output = self.output();
        let end = output.lines().filter_map(|line| line.strip_prefix("# end: ")).next_back();
        end.unwrap_or_else(|| panic!("it ended without a word: {output}")).to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

pub fn place(rank: usize, size: usize, port: u16) -> Vec<(&'static str, String)> {
    vec![
        ("RANK", rank.to_string()),
        ("WORLD_SIZE", size.to_string()),
        ("MASTER_ADDR", "127.0.0.1".to_owned()),
        ("MASTER_PORT", port.to_string()),
        ("COGVLM_CLUSTER_TIMEOUT_S", "15".to_owned()),
    ]
}

pub fn soon(seconds: u64) -> Instant {
    Instant::now() + Duration::from_secs(seconds)
}
