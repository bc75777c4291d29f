use proptest::prelude::*;

use super::*;

/// Variables as `NAME=value` words.
fn variables(text: &str) -> Variables {
    let pair = |word: &str| word.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
    text.split_whitespace().filter_map(pair).collect()
}

fn of(text: &str) -> Result<Membership, MembershipError> {
    membership(&Explicit::default(), &variables(text))
}

/// Rank, size, where process 0 is, launcher.
fn check(text: &str, expected: (usize, usize, &str, Launcher)) {
    let found = of(text).unwrap_or_else(|error| panic!("{text}: {error}"));
    let coordinator = found.coordinator.map_or(String::new(), |endpoint| endpoint.to_string());
    assert_eq!((found.rank, found.size, &coordinator[..], found.launcher), expected, "{text}");
}

#[test]
fn nothing_set_is_a_single_process() {
    check("", (0, 1, "", Launcher::Single));
    check("PATH=/bin MASTER_ADDR=node1 MASTER_PORT=1234 RANK= WORLD_SIZE=", (0, 1, "", Launcher::Single));
    check("COGVLM_NUM_PROCESSES=1", (0, 1, "", Launcher::Single));
}

#[test]
fn torchrun() {
    let text = "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 MASTER_ADDR=node1 MASTER_PORT=29500 TORCHELASTIC_RUN_ID=none";
    check(text, (3, 4, "node1:29500", Launcher::Torchrun));
    assert_eq!(of(text).unwrap().local_rank, Some(1));
    assert_eq!(of(text).unwrap().run, "none");
    // Its agent holds MASTER_PORT.
    let agent = format!("{text} TORCHELASTIC_USE_AGENT_STORE=True");
    check(&agent, (3, 4, "node1:29501", Launcher::Torchrun));
    // One torchrun for each node of a Slurm step: the inner one counts.
    let nested = format!("{text} SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=n[1-2]");
    check(&nested, (3, 4, "node1:29500", Launcher::Torchrun));
    check("RANK=0 WORLD_SIZE=2 MASTER_ADDR=fd00::1", (0, 2, "[fd00::1]:29650", Launcher::RankVariables));
}

#[test]
fn slurm() {
    let step = "SLURM_PROCID=1 SLURM_NTASKS=4 SLURM_JOB_ID=77 SLURM_STEP_ID=0 SLURM_LOCALID=0";
    let nodes = format!("{step} SLURM_STEP_NODELIST=node[03,05-06] SLURM_LAUNCH_NODE_IPADDR=10.0.0.9");
    check(&nodes, (1, 4, "node03:22387", Launcher::Slurm));
    assert_eq!(of(&nodes).unwrap().run, "77.0");
    check(&format!("{step} SLURM_LAUNCH_NODE_IPADDR=10.0.0.9"), (1, 4, "10.0.0.9:22387", Launcher::Slurm));
    // A step may have fewer tasks than the job.
    let smaller = format!("{nodes} SLURM_STEP_NUM_TASKS=2");
    check(&smaller, (1, 2, "node03:22387", Launcher::Slurm));
    check(&format!("{nodes} MASTER_ADDR=other MASTER_PORT=999"), (1, 4, "other:999", Launcher::Slurm));
    // The next step of the same job has a port of its own.
    check(&nodes.replace("STEP_ID=0", "STEP_ID=1"), (1, 4, "node03:22388", Launcher::Slurm));
    // A batch script is not a step, whatever it inherits.
    let script = "SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_JOB_ID=77 SLURM_JOB_NODELIST=node[1-4] SLURM_NPROCS=4";
    check(script, (0, 1, "", Launcher::Single));
}

#[test]
fn mpi() {
    let open = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2";
    check(&format!("{open} COGVLM_COORDINATOR=node1:5000"), (1, 2, "node1:5000", Launcher::OpenMpi));
    check(&format!("{open} MASTER_ADDR=node1"), (1, 2, "node1:29650", Launcher::OpenMpi));
    check(&format!("{open} OMPI_COMM_WORLD_LOCAL_SIZE=2"), (1, 2, "127.0.0.1:29650", Launcher::OpenMpi));
    // Daemons of mpirun are a Slurm step of their own, whose variables their children inherit.
    let nested = format!("{open} MASTER_ADDR=n SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_ID=0");
    check(&nested, (1, 2, "n:29650", Launcher::OpenMpi));
    check("PMI_RANK=0 PMI_SIZE=2 MPI_LOCALNRANKS=2", (0, 2, "127.0.0.1:29650", Launcher::Pmi));
    let error = of(&format!("{open} OMPI_COMM_WORLD_LOCAL_SIZE=1")).unwrap_err().to_string();
    assert!(error.contains("COGVLM_COORDINATOR is not set") && error.contains("mpirun -x"), "{error}");
}

#[test]
fn kubernetes() {
    let pod = "JOB_COMPLETION_INDEX=2 COGVLM_NUM_PROCESSES=3 HOSTNAME=cogvlm-2";
    check(&format!("{pod} COGVLM_SERVICE=cogvlm-net"), (2, 3, "cogvlm-0.cogvlm-net:29650", Launcher::Kubernetes));
    check(&format!("{pod} COGVLM_COORDINATOR=a.b:1"), (2, 3, "a.b:1", Launcher::Kubernetes));
    check("JOB_COMPLETION_INDEX=7 COGVLM_NUM_PROCESSES=1", (0, 1, "", Launcher::Single));
}

#[test]
fn flags_come_first() {
    let explicit =
        |rank, size, coordinator: Option<&str>| Explicit { rank, size, coordinator: coordinator.map(str::to_owned) };
    let env = variables("RANK=0 WORLD_SIZE=9 MASTER_ADDR=other COGVLM_RANK=5 COGVLM_NUM_PROCESSES=6");
    let found = membership(&explicit(Some(1), Some(2), Some("[::1]:77")), &env).unwrap();
    assert_eq!((found.rank, found.size, found.launcher), (1, 2, Launcher::Flags));
    assert_eq!(found.coordinator, Some(Endpoint { host: "::1".to_owned(), port: 77 }));
    let found = membership(&explicit(None, None, Some("here")), &env).unwrap();
    assert_eq!((found.rank, found.size, found.launcher), (5, 6, Launcher::Cogvlm));
    assert_eq!(found.coordinator.unwrap().to_string(), "here:29650");
    assert_eq!(membership(&explicit(None, Some(1), None), &env).unwrap().size, 1);
    assert!(membership(&explicit(Some(1), None, None), &env).is_err());
    assert!(membership(&explicit(None, Some(2), None), &env).is_err());
}

#[test]
fn what_is_incomplete_or_contradictory_is_named() {
    for (text, message) in [
        ("RANK=1", "RANK=1 is set but WORLD_SIZE is not set: set it to the number of processes, or unset RANK"),
        (
            "WORLD_SIZE=2",
            "WORLD_SIZE=2 is set but RANK is not set: set it to the rank of this process, or unset WORLD_SIZE",
        ),
        (
            "RANK=1 WORLD_SIZE=2",
            "RANK=1 and WORLD_SIZE=2 are set but MASTER_ADDR is not set: set it to the host of process 0, and \
             MASTER_PORT to a free port there",
        ),
        ("RANK=2 WORLD_SIZE=2", "RANK=2 and WORLD_SIZE=2 contradict each other: ranks of 2 processes go from 0 to 1"),
        ("RANK=x WORLD_SIZE=2", "RANK is `x`, which is not a whole number"),
        ("RANK=+1 WORLD_SIZE=2", "RANK is `+1`, which is not a whole number"),
        ("RANK=0 WORLD_SIZE=0", "WORLD_SIZE is `0`, which is not a number of processes"),
        ("RANK=0 WORLD_SIZE=4096", "WORLD_SIZE is `4096`, which is more than the 1024 processes that a run may have"),
        (
            "RANK=1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=70000",
            "MASTER_PORT is `70000`, which is no port: write a number from 1 to 65535",
        ),
        (
            "RANK=1 WORLD_SIZE=2 JOB_COMPLETION_INDEX=0 COGVLM_NUM_PROCESSES=2",
            "RANK=1 and JOB_COMPLETION_INDEX=0 contradict each other: unset those of the launcher that did not start \
             this process, or say it with COGVLM_RANK and COGVLM_NUM_PROCESSES",
        ),
        (
            "RANK=1 WORLD_SIZE=2 SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=3",
            "WORLD_SIZE=2 and SLURM_STEP_NUM_TASKS=3 contradict each other: unset those of the launcher that did not \
             start this process, or say it with COGVLM_RANK and COGVLM_NUM_PROCESSES",
        ),
        (
            "JOB_COMPLETION_INDEX=1",
            "JOB_COMPLETION_INDEX=1 is set but COGVLM_NUM_PROCESSES is not set: set it to the job's completions, or to \
             1 where each pod is a run of its own",
        ),
        (
            "JOB_COMPLETION_INDEX=1 COGVLM_NUM_PROCESSES=2",
            "JOB_COMPLETION_INDEX=1 and COGVLM_NUM_PROCESSES=2 are set but COGVLM_SERVICE is not set: set it to the \
             job's headless service, or COGVLM_COORDINATOR to HOST:PORT of process 0",
        ),
        (
            "JOB_COMPLETION_INDEX=1 COGVLM_NUM_PROCESSES=2 COGVLM_SERVICE=s HOSTNAME=pod-xyz",
            "HOSTNAME=pod-xyz and JOB_COMPLETION_INDEX=1 contradict each other: set COGVLM_COORDINATOR to HOST:PORT of \
             the pod with index 0",
        ),
        (
            "SLURM_PROCID=1",
            "SLURM_PROCID=1 is set but SLURM_NTASKS is not set: set it to the number of processes, or unset \
             SLURM_PROCID",
        ),
        (
            "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=a[3-1]",
            "SLURM_STEP_NODELIST is `a[3-1]`, which has the range `3-1`, which runs backwards",
        ),
        (
            "COGVLM_NUM_PROCESSES=2",
            "COGVLM_NUM_PROCESSES=2 is set but COGVLM_RANK is not set: set it to the rank of this process, or unset \
             COGVLM_NUM_PROCESSES",
        ),
        (
            "RANK=0 WORLD_SIZE=2 MASTER_ADDR=a COGVLM_NUM_PROCESSES=3",
            "COGVLM_NUM_PROCESSES=3 and WORLD_SIZE=2 contradict each other: set COGVLM_NUM_PROCESSES to the processes \
             that were started, or leave it out",
        ),
        (
            "COGVLM_RANK=0 COGVLM_NUM_PROCESSES=2 COGVLM_COORDINATOR=a:b:c",
            "COGVLM_COORDINATOR is `a:b:c`, which has a port that is no number from 1 to 65535: write HOST or \
             HOST:PORT, an IPv6 address in brackets",
        ),
    ] {
        assert_eq!(of(text).map_err(|error| error.to_string()), Err(message.to_owned()), "{text}");
    }
}

#[test]
fn endpoints() {
    for (text, shown) in [
        ("a", "a:5"),
        ("a.b-c:80", "a.b-c:80"),
        ("10.0.0.1:1", "10.0.0.1:1"),
        ("fd00::1", "[fd00::1]:5"),
        ("[fd00::1]", "[fd00::1]:5"),
        ("[fd00::1]:80", "[fd00::1]:80"),
    ] {
        let endpoint = Endpoint::parse(text, 5, "it").unwrap();
        assert_eq!(endpoint.to_string(), shown);
        assert_eq!(Endpoint::parse(shown, 6, "it").unwrap(), endpoint);
    }
    for text in ["", ":80", "a:", "a:0", "a:+1", "a:65536", "[a]:1", "[::1", "[::1]1", "a b", "a/b", "http://a"] {
        assert!(Endpoint::parse(text, 5, "it").is_err(), "{text} was accepted");
    }
}

const NAMES: [&str; 24] = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_LAUNCH_NODE_IPADDR",
    "SLURM_JOB_ID",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "PMI_RANK",
    "PMI_SIZE",
    "JOB_COMPLETION_INDEX",
    "COGVLM_NUM_PROCESSES",
    "COGVLM_SERVICE",
    "COGVLM_COORDINATOR",
    "COGVLM_RANK",
    "HOSTNAME",
];

fn any_variables() -> impl Strategy<Value = Variables> {
    let value = prop_oneof![
        4 => (0_usize..5).prop_map(|number| number.to_string()),
        1 => Just("node[01-03]".to_owned()),
        1 => Just("node1".to_owned()),
        1 => Just("job-1".to_owned()),
        1 => ".{0,12}",
    ];
    proptest::collection::btree_map(proptest::sample::select(&NAMES[..]).prop_map(str::to_owned), value, 0..NAMES.len())
}

proptest! {
    /// Whatever is set: an answer that holds together, or an error that names a variable.
    #[test]
    fn any_environment_is_answered(variables in any_variables()) {
        match membership(&Explicit::default(), &variables) {
            Ok(found) => {
                prop_assert!(found.rank < found.size && found.size <= MAX_SIZE);
                prop_assert_eq!(found.coordinator.is_some(), found.size > 1);
                prop_assert!(found.launcher != Launcher::Single || found.size == 1);
            }
            Err(error) => {
                let text = error.to_string();
                let names_one = NAMES.iter().any(|name| text.contains(name)) || text.contains("the host of process 0");
                prop_assert!(names_one, "{}", text);
            }
        }
    }

    /// All processes of one launch agree about size, place of process 0 and name of the run, and have all the ranks.
    #[test]
    fn processes_of_one_launch_agree(size in 2_usize..20, kind in 0..5, job in 0_u32..u32::MAX) {
        let places: Vec<Membership> = (0..size).map(|rank| {
            of(&match kind {
                0 => format!("RANK={rank} WORLD_SIZE={size} MASTER_ADDR=a MASTER_PORT=123 TORCHELASTIC_RUN_ID=x"),
                1 => format!("SLURM_PROCID={rank} SLURM_NTASKS={size} SLURM_STEP_NODELIST=n[1-{size}] \
                              SLURM_JOB_ID={job} SLURM_STEP_ID=4294967293"),
                2 => format!("OMPI_COMM_WORLD_RANK={rank} OMPI_COMM_WORLD_SIZE={size} MASTER_ADDR=a"),
                3 => format!("PMI_RANK={rank} PMI_SIZE={size} COGVLM_COORDINATOR=a"),
                _ => format!("JOB_COMPLETION_INDEX={rank} COGVLM_NUM_PROCESSES={size} COGVLM_SERVICE=s \
                              HOSTNAME=j-{rank}"),
            }).unwrap()
        }).collect();
        for (rank, place) in places.iter().enumerate() {
            prop_assert_eq!(place.rank, rank);
            let first = &places[0];
            prop_assert_eq!((&place.coordinator, &place.run, place.size), (&first.coordinator, &first.run, size));
        }
    }
}
