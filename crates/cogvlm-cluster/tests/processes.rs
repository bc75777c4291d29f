//! Real processes over loopback: they meet, work, and end together when one of them dies, stalls or fails.

mod common;

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use cogvlm_cluster::membership::Variables;
use cogvlm_cluster::{ClusterError, Config, Control, Explicit, Options, TcpWire, Wire, join, membership};
use common::{Process, free_port, place, say, soon};

/// Longest that any process may live on after one of them failed: the promise is 5 s, of which 1.5 s are for noticing
/// silence where tests ask for that.
const ENDS_WITHIN: Duration = Duration::from_secs(5);
const SIZE: usize = 4;
const ROWS: usize = 64 * 1024;

// ── a process of a test ─────────────────────────────────────────────────────────────────────────────────────────────

/// Runs what `TEST_JOB` says and prints how it ended.
#[test]
#[ignore = "is a process of the other tests"]
fn process() {
    let variables: Variables = cogvlm_cluster::membership::environment();
    let Some(job) = variables.get("TEST_JOB") else { return };
    match run(job, &variables) {
        Ok(()) => say("end: well"),
        Err(error) => say(&format!("end: {error}")),
    }
}

fn run(job: &str, variables: &Variables) -> Result<(), ClusterError> {
    let place = membership(&Explicit::default(), variables).expect("the test sets a place");
    let options = Options { progress_interval: Duration::from_millis(300), ..Options::from_variables(variables)? };
    let config =
        Config::new().with("model", "tiny@11").with("plan", variables.get("TEST_PLAN").map_or("", |plan| plan));
    let cluster = join(&place, &options, &config, &|line| say(&format!("progress: {line}")))?;
    let peers: Vec<usize> = (0..place.size).filter(|peer| *peer != place.rank).collect();
    let (control, wire) = cluster.connect(&peers)?;
    say("ready");
    if job == "fail" || job == "drop" {
        std::thread::sleep(Duration::from_millis(500));
    }
    let ended = match job {
        "ring" => ring(&control, &wire),
        "wait" => wait(&control, &wire),
        "both" => both(&control, &wire),
        "flood" => flood(&control, &wire),
        "fail" if place.rank == 1 => Err(control.fail("no room for layer 7")),
        "fail" => wait(&control, &wire),
        "drop" if place.rank == 1 => return Ok(()),
        "drop" => wait(&control, &wire),
        "left" => left(&control, &wire),
        "early" if place.rank == 1 => control.leave(),
        "early" => wait(&control, &wire),
        "order" => order(&control, &wire),
        other => panic!("no job is called {other}"),
    };
    let start = Instant::now();
    drop(control);
    drop(wire);
    assert!(start.elapsed() < Duration::from_secs(3), "ending took {:?}", start.elapsed());
    ended
}

/// A token goes round 1,000 times, by way of everyone; process 0 says on the control connection what it should be.
fn ring(control: &Control, wire: &TcpWire) -> Result<(), ClusterError> {
    let (rank, size) = (control.rank(), control.size());
    assert_eq!(control.share(7, b"0123456789")?, b"0123456789");
    let (next, previous) = ((rank + 1) % size, (rank + size - 1) % size);
    let mut token = [0_u8; 8];
    for turn in 0..1000 {
        if rank == 0 {
            wire.send(next, turn, &token)?;
        }
        wire.recv(previous, turn, &mut token)?;
        token = (u64::from_le_bytes(token) + 1).to_le_bytes();
        if rank != 0 {
            wire.send(next, turn, &token)?;
        }
    }
    if rank == 0 {
        assert_eq!(u64::from_le_bytes(token), 1000 * size as u64);
        for _ in 1..size {
            let message = control.recv_any(Some(Duration::from_secs(10)))?;
            assert_eq!((message.code, message.payload.len()), (9, 3_000_000 + message.from));
            assert!(message.payload.iter().all(|byte| usize::from(*byte) == message.from));
        }
    } else {
        // The size of an image's pixels.
        control.send(0, 9, &vec![rank as u8; 3_000_000 + rank])?;
    }
    control.leave()
}

/// Everyone waits for somebody: process 0 for a message, the last for rows of 0, the others for rows of their
/// neighbours.
fn wait(control: &Control, wire: &TcpWire) -> Result<(), ClusterError> {
    let mut rows = vec![0; ROWS];
    match control.rank() {
        0 => control.recv_any(None).map(|_| ()),
        rank if rank + 1 == control.size() => wire.recv(0, 1, &mut rows),
        rank => wire.recv(rank + 1, 1, &mut rows),
    }
}

/// All send to all before any receives: 8 MB each, more than any socket holds.
fn both(control: &Control, wire: &TcpWire) -> Result<(), ClusterError> {
    let (rank, size) = (control.rank(), control.size());
    let others = || (0..size).filter(|peer| *peer != rank);
    let mut rows = vec![0; 8 << 20];
    for peer in others() {
        rows.fill((16 * rank + peer) as u8);
        wire.send(peer, 5, &rows)?;
    }
    for peer in others() {
        wire.recv(peer, 5, &mut rows)?;
        assert!(rows.iter().all(|byte| usize::from(*byte) == 16 * peer + rank));
    }
    control.leave()
}

/// Process 1 sends more than anyone keeps, so that it waits; nobody takes it.
fn flood(control: &Control, wire: &TcpWire) -> Result<(), ClusterError> {
    let rows = vec![1; 64 << 20];
    if control.rank() != 1 {
        return wait(control, wire);
    }
    for tag in 0..1000 {
        wire.send(0, tag, &rows)?;
        say(&format!("sent: {tag}"));
    }
    control.leave()
}

/// Process 1 leaves after its last rows; others want more of it.
fn left(control: &Control, wire: &TcpWire) -> Result<(), ClusterError> {
    let has_left =
        |result: Result<(), ClusterError>| assert!(matches!(result, Err(ClusterError::Left { rank: 1, .. })));
    match control.rank() {
        0 => {
            assert_eq!(control.recv(1, None)?.payload, b"last");
            has_left(control.recv(1, None).map(|_| ()));
            has_left(control.send(1, 0, b"more"));
        }
        1 => {
            wire.send(2, 1, &[7; ROWS])?;
            control.send(0, 1, b"last")?;
        }
        2 => {
            let mut rows = [0; ROWS];
            wire.recv(1, 1, &mut rows)?;
            assert_eq!(rows, [7; ROWS]);
            has_left(wire.recv(1, 2, &mut rows));
            has_left(wire.send(1, 2, &rows));
        }
        _ => {}
    }
    control.leave()
}

/// Rows that are not those expected.
fn order(control: &Control, wire: &TcpWire) -> Result<(), ClusterError> {
    if control.rank() == 1 {
        wire.send(0, 4, &[1, 2, 3])?;
        assert_eq!(control.recv(0, None)?.code, 8);
    }
    if control.rank() == 0 {
        let wrong = |result: Result<(), ClusterError>| result.unwrap_err().to_string();
        let text = wrong(wire.recv(1, 3, &mut [0; 3]));
        assert!(
            text.starts_with("process 1 sent 3 bytes tagged 0x4 where process 0 expected 3 bytes tagged 0x3"),
            "{text}"
        );
        let text = wrong(wire.recv(1, 4, &mut [0; 2]));
        assert!(text.contains("expected 2 bytes tagged 0x4"), "{text}");
        let mut rows = [0; 3];
        wire.recv(1, 4, &mut rows)?;
        assert_eq!(rows, [1, 2, 3]);
        assert!(matches!(wire.recv(0, 0, &mut rows), Err(ClusterError::NoPeer { .. })));
        assert!(matches!(wire.send(9, 0, &rows), Err(ClusterError::NoPeer { .. })));
        let timeout = control.recv(1, Some(Duration::from_millis(10)));
        assert!(matches!(timeout, Err(ClusterError::Timeout { .. })));
        control.send(1, 8, b"go on")?;
    }
    control.leave()
}

// ── the tests ───────────────────────────────────────────────────────────────────────────────────────────────────────

fn start_all(job: &str, more: &[(&'static str, &str)]) -> Vec<Process> {
    let port = free_port();
    let start = |rank| {
        let mut variables = place(rank, SIZE, port);
        variables.extend(more.iter().map(|(name, value)| (*name, (*value).to_owned())));
        Process::start(job, &variables)
    };
    (0..SIZE).map(start).collect()
}

/// All but `gone` end in time with one and the same message, which begins as given.
fn assert_all_end(processes: &mut [Process], gone: Option<usize>, begins: &str) {
    let deadline = Instant::now() + ENDS_WITHIN;
    let others = processes.iter_mut().enumerate().filter(|(rank, _)| Some(*rank) != gone);
    let ends: Vec<String> = others.map(|(_, process)| process.end(deadline)).collect();
    assert!(ends[0].starts_with(begins), "{}", ends[0]);
    assert!(ends.iter().all(|end| *end == ends[0]), "{ends:#?}");
}

fn name_of(process: &Process, rank: usize) -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    format!("process {rank} of {SIZE} (pid {} on {})", process.child.id(), host.trim())
}

#[test]
fn a_token_goes_round_a_thousand_times() {
    for process in &mut start_all("ring", &[]) {
        assert_eq!(process.end(soon(20)), "well");
    }
}

#[test]
fn all_may_send_before_any_receives() {
    for process in &mut start_all("both", &[]) {
        assert_eq!(process.end(soon(20)), "well");
    }
}

#[test]
fn rows_have_to_be_those_that_are_expected() {
    for process in &mut start_all("order", &[]) {
        assert_eq!(process.end(soon(20)), "well");
    }
}

#[test]
fn a_killed_process_ends_all_others() {
    for killed in [2, 0] {
        let mut processes = start_all("wait", &[]);
        processes.iter().for_each(|process| process.wait_for("# ready"));
        // Everyone is waiting by then.
        std::thread::sleep(Duration::from_millis(200));
        processes[killed].child.kill().unwrap();
        let begins = format!("{} died: its connection closed without a goodbye", name_of(&processes[killed], killed));
        assert_all_end(&mut processes, Some(killed), &begins);
    }
}

#[test]
fn a_stopped_process_ends_all_others() {
    for stopped in [2, 0] {
        let mut processes = start_all("wait", &[("COGVLM_CLUSTER_SILENCE_S", "1.5")]);
        processes.iter().for_each(|process| process.wait_for("# ready"));
        processes[stopped].signal("-STOP");
        let begins = format!("{} has been silent for 1.5 s", name_of(&processes[stopped], stopped));
        assert_all_end(&mut processes, Some(stopped), &begins);
        // Let go on, it learns what became of the run: it was the silent one.
        processes[stopped].signal("-CONT");
        let end = processes[stopped].end(soon(5));
        assert!(end.starts_with(&begins), "{end}");
    }
}

#[test]
fn a_process_that_does_not_take_rows_holds_nobody_up_when_one_dies() {
    let mut processes = start_all("flood", &[]);
    // 256 MiB wait at process 0, and what the system holds.
    processes[1].wait_for("# sent: 3");
    std::thread::sleep(Duration::from_millis(300));
    assert!(!processes[1].output().contains("# sent: 8"), "backpressure: {}", processes[1].output());
    processes[3].child.kill().unwrap();
    let begins = format!("{} died", name_of(&processes[3], 3));
    assert_all_end(&mut processes, Some(3), &begins);
}

#[test]
fn a_process_that_gives_up_says_why_to_all() {
    let mut processes = start_all("fail", &[]);
    processes.iter().for_each(|process| process.wait_for("# ready"));
    let begins = format!("{} failed: no room for layer 7", name_of(&processes[1], 1));
    assert_all_end(&mut processes, None, &begins);

    let mut processes = start_all("drop", &[]);
    processes.iter().for_each(|process| process.wait_for("# ready"));
    let begins = format!("{} failed: it ended before the run was over", name_of(&processes[1], 1));
    assert_all_end(&mut processes, Some(1), &begins);
    assert_eq!(processes[1].end(soon(5)), "well");
}

#[test]
fn who_has_left_is_not_waited_for() {
    for process in &mut start_all("left", &[]) {
        assert_eq!(process.end(soon(10)), "well");
    }
}

#[test]
fn who_has_left_does_not_hide_a_failure() {
    let mut processes = start_all("early", &[]);
    // Process 0 waits for process 1 among others; process 2 for rows of 3, which waits for rows of 0.
    processes.iter().for_each(|process| process.wait_for("# ready"));
    std::thread::sleep(Duration::from_millis(300));
    processes[3].child.kill().unwrap();
    let begins = format!("{} died", name_of(&processes[3], 3));
    assert_all_end(&mut processes, Some(3), &begins);
}

#[test]
fn processes_that_would_run_different_things_do_not_begin() {
    let port = free_port();
    let start = |rank: usize, plan: &str| {
        let mut variables = place(rank, 3, port);
        variables.push(("TEST_PLAN", plan.to_owned()));
        Process::start("ring", &variables)
    };
    let mut processes = vec![start(0, "abc"), start(1, "abc")];
    processes[1].wait_for("# progress: process 1 of 3 is at 127.0.0.1");
    processes.push(start(2, "abd"));
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let host = host.trim();
    let expected = format!("process 0 on {host} and process 2 on {host} differ in plan: abc and abd");
    assert_all_end(&mut processes, None, &expected);
}

#[test]
fn strangers_are_refused_and_disturb_nobody() {
    let port = free_port();
    let variables = |rank: usize, size: usize| place(rank, size, port);
    let mut zero = Process::start("order", &variables(0, 2));
    zero.wait_for("# progress: waiting at 127.0.0.1");
    let connect = || TcpStream::connect(("127.0.0.1", port)).unwrap();
    // Silent ones, slow ones, web clients, noise, a frame of absurd size.
    let _silent: Vec<TcpStream> = (0..20).map(|_| connect()).collect();
    let mut slow = connect();
    slow.write_all(b"CGVf").unwrap();
    connect().write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").unwrap();
    connect().write_all(&[0xA5; 70_000]).unwrap_or_default();
    let mut huge = b"CGVf\x01\0\x01\0".to_vec();
    huge.extend([0; 16]);
    huge.extend([0xFF; 8]);
    connect().write_all(&huge).unwrap();
    // Processes of ours that do not belong.
    let other_size = Process::start("order", &variables(1, 3)).end(soon(10));
    assert!(other_size.contains("refused process 1: it is one of 3 processes, and process 0 one of 2"), "{other_size}");
    let mut other_run = variables(1, 2);
    other_run.push(("COGVLM_RUN_ID", "yesterday".to_owned()));
    let other_run = Process::start("order", &other_run).end(soon(10));
    assert!(other_run.contains("refused process 1: it belongs to run `yesterday`"), "{other_run}");
    let mut one = Process::start("order", &variables(1, 2));
    assert_eq!((zero.end(soon(10)), one.end(soon(10))), ("well".to_owned(), "well".to_owned()));
}

#[test]
fn a_rank_is_given_once() {
    let port = free_port();
    let mut zero = Process::start("order", &place(0, 3, port));
    zero.wait_for("# progress: waiting at 127.0.0.1");
    let mut first = Process::start("order", &place(1, 3, port));
    first.wait_for("# progress: process 1 of 3 is at");
    let second = Process::start("order", &place(1, 3, port)).end(soon(10));
    let pid = first.child.id();
    assert!(second.contains(&format!("there is another process 1 (pid {pid} on ")), "{second}");
    // One that died before the run began may come again.
    first.child.kill().unwrap();
    first.child.wait().unwrap();
    let mut again = Process::start("order", &place(1, 3, port));
    let mut two = Process::start("order", &place(2, 3, port));
    for process in [&mut zero, &mut again, &mut two] {
        assert_eq!(process.end(soon(10)), "well");
    }
}

#[test]
fn who_does_not_come_is_named() {
    let port = free_port();
    let short = |rank: usize, seconds: &str| {
        let mut variables = place(rank, 3, port);
        variables.retain(|(name, _)| *name != "COGVLM_CLUSTER_TIMEOUT_S");
        variables.push(("COGVLM_CLUSTER_TIMEOUT_S", seconds.to_owned()));
        Process::start("order", &variables)
    };
    let alone = short(1, "1").end(soon(5));
    let begins = format!("process 1 of 3 found no process 0 at 127.0.0.1:{port} within 1 s: ");
    assert!(alone.starts_with(&begins) && alone.contains("refused"), "{alone}");
    let (mut zero, mut one) = (short(0, "2"), short(1, "10"));
    zero.wait_for(&format!("# progress: waiting at 127.0.0.1:{port} for process"));
    let missing = format!("of 3 processes, process 2 did not come to 127.0.0.1:{port} within 2 s");
    assert_eq!(zero.end(soon(5)), missing);
    assert_eq!(one.end(soon(5)), format!("process 0 at 127.0.0.1:{port} gave up: {missing}"));
}

// ── with what clusters have ─────────────────────────────────────────────────────────────────────────────────────────

/// Two processes that a launcher starts find each other by what it sets.
fn assert_launches(launcher: &[&str], variables: &[(&str, String)]) {
    let mut all = Process::start_by(launcher, "ring", variables);
    all.end(soon(60));
    let output = all.output();
    assert_eq!(output.matches("# end: well").count(), 2, "{output}");
}

#[test]
#[ignore = "needs Open MPI's mpirun"]
fn started_by_open_mpi() {
    assert_launches(&["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"], &[]);
    let coordinator = format!("127.0.0.1:{}", free_port());
    let launcher = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", "-x", "COGVLM_COORDINATOR"];
    assert_launches(&launcher, &[("COGVLM_COORDINATOR", coordinator)]);
}

#[test]
#[ignore = "needs mpiexec.hydra of MPICH or Intel MPI"]
fn started_by_mpich() {
    assert_launches(&["mpiexec.hydra", "-n", "2"], &[]);
}

#[test]
#[ignore = "needs srun and two nodes that resolve"]
fn started_by_slurm() {
    assert_launches(&["srun", "-N2", "-n2"], &[]);
}

/// Two network namespaces, as two hosts, joined by a cable.
struct TwoHosts([String; 2]);

impl TwoHosts {
    fn new() -> Self {
        let names = [0, 1].map(|host| format!("cogvlm{}h{host}", std::process::id() % 100_000));
        let hosts = Self(names);
        let [a, b] = &hosts.0;
        for name in [a, b] {
            run_ip(&format!("netns add {name}"));
            run_ip(&format!("-n {name} link set lo up"));
        }
        run_ip(&format!("link add veth0 netns {a} type veth peer name veth0 netns {b}"));
        for (host, name) in [a, b].into_iter().enumerate() {
            run_ip(&format!("-n {name} addr add 10.77.0.{}/24 dev veth0", host + 1));
            run_ip(&format!("-n {name} link set veth0 up"));
        }
        hosts
    }

    fn start(&self, host: usize, job: &str, more: &[(&'static str, &str)]) -> Process {
        let mut variables = place(host, 2, 29_650);
        variables.retain(|(name, _)| *name != "MASTER_ADDR");
        variables.push(("MASTER_ADDR", "10.77.0.1".to_owned()));
        variables.extend(more.iter().map(|(name, value)| (*name, (*value).to_owned())));
        Process::start_by(&["ip", "netns", "exec", &self.0[host]], job, &variables)
    }
}

impl Drop for TwoHosts {
    fn drop(&mut self) {
        for name in &self.0 {
            drop(std::process::Command::new("ip").args(["netns", "del", name]).status());
        }
    }
}

fn run_ip(words: &str) {
    let status = std::process::Command::new("ip").args(words.split(' ')).status().unwrap();
    assert!(status.success(), "ip {words}");
}

#[test]
#[ignore = "needs root, to make network namespaces"]
fn two_hosts_work_and_notice_a_pulled_cable() {
    let hosts = TwoHosts::new();
    for process in &mut [0, 1].map(|host| hosts.start(host, "ring", &[])) {
        assert_eq!(process.end(soon(20)), "well");
    }
    let mut both = [0, 1].map(|host| hosts.start(host, "wait", &[("COGVLM_CLUSTER_SILENCE_S", "1.5")]));
    both.iter().for_each(|process| process.wait_for("# ready"));
    run_ip(&format!("-n {} link set veth0 down", hosts.0[1]));
    // Neither can tell the other what it sees.
    let deadline = soon(5);
    for (host, process) in both.iter_mut().enumerate() {
        let end = process.end(deadline);
        assert!(end.starts_with(&format!("process {} of 2", 1 - host)) && end.contains("has been silent"), "{end}");
    }
}
