//! Who this process is, of how many, and where process 0 is found: from flags, or from what its launcher set.
//!
//! The launcher nearest to the process counts, since launchers are nested: torchrun in a Slurm step, mpirun in a Slurm
//! job, torchrun in a pod. In order: flags; `COGVLM_RANK`; torchrun; Open MPI; MPICH and Intel MPI; `RANK` and
//! `WORLD_SIZE` set by something else; a Kubernetes indexed job; a Slurm step. Where two of the last three are set and
//! disagree, nothing says which is the nearer one, and that is an error. A variable that is set to nothing is not set.

mod nodelist;

use std::collections::BTreeMap;
use std::fmt;

pub use nodelist::expand;

/// Port of process 0 where nothing else says one.
pub const DEFAULT_PORT: u16 = 29_650;
/// Most processes of a run: far more than the model has units.
pub const MAX_SIZE: usize = 1024;

/// What the environment holds.
pub type Variables = BTreeMap<String, String>;

/// This process's place in the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    /// Its rank, from 0.
    pub rank: usize,
    /// How many processes there are.
    pub size: usize,
    /// Its rank among those on its host, where the launcher says.
    pub local_rank: Option<usize>,
    /// Where process 0 listens; `None` only where there is a single process.
    pub coordinator: Option<Endpoint>,
    /// Tells runs apart that use one address after another; empty where the launcher has no such name.
    pub run: String,
    /// Who said so.
    pub launcher: Launcher,
}

/// A host, by name or address, and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Name, IPv4 address, or IPv6 address without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

/// Who started the processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Launcher {
    /// Nobody: this is the only process.
    Single,
    /// Whoever wrote the flags.
    Flags,
    /// Whoever set `COGVLM_RANK`.
    Cogvlm,
    /// `torchrun`.
    Torchrun,
    /// Something that sets `RANK` and `WORLD_SIZE` as torchrun does.
    RankVariables,
    /// Open MPI's `mpirun`.
    OpenMpi,
    /// `mpiexec` of MPICH or Intel MPI.
    Pmi,
    /// An indexed job of Kubernetes.
    Kubernetes,
    /// Slurm's `srun`.
    Slurm,
}

/// What was given as flags; it comes before every variable.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Explicit {
    /// Rank of this process.
    pub rank: Option<usize>,
    /// How many processes there are.
    pub size: Option<usize>,
    /// Where process 0 listens, `HOST` or `HOST:PORT`.
    pub coordinator: Option<String>,
}

/// Why a process cannot know its place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MembershipError {
    /// A variable has no usable value.
    #[error("{variable} is `{}`, which {problem}", value.escape_debug())]
    Value {
        /// The variable, or flag.
        variable: String,
        /// Its value.
        value: String,
        /// What is wrong.
        problem: String,
    },
    /// Some variables are set, and others that belong to them are not.
    #[error("{present} but {missing} is not set: {advice}")]
    Incomplete {
        /// What is set, with its value.
        present: String,
        /// What is not.
        missing: String,
        /// What to set.
        advice: String,
    },
    /// Variables contradict each other.
    #[error("{a} and {b} contradict each other: {advice}")]
    Contradiction {
        /// One, with its value.
        a: String,
        /// The other, with its value.
        b: String,
        /// What to set.
        advice: String,
    },
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Single => "a single process",
            Self::Flags => "flags",
            Self::Cogvlm => "COGVLM_RANK",
            Self::Torchrun => "torchrun",
            Self::RankVariables => "RANK and WORLD_SIZE",
            Self::OpenMpi => "Open MPI",
            Self::Pmi => "MPICH or Intel MPI",
            Self::Kubernetes => "a Kubernetes indexed job",
            Self::Slurm => "Slurm",
        })
    }
}

impl Endpoint {
    /// Reads `HOST`, `HOST:PORT`, `[IPV6]:PORT`; `what` names it in an error.
    ///
    /// # Errors
    /// Where it is neither.
    pub fn parse(text: &str, default_port: u16, what: &str) -> Result<Self, MembershipError> {
        let wrong = |problem: &str| MembershipError::Value {
            variable: what.to_owned(),
            value: text.to_owned(),
            problem: format!("{problem}: write HOST or HOST:PORT, an IPv6 address in brackets"),
        };
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (host, after) = rest.split_once(']').ok_or_else(|| wrong("has a `[` without `]`"))?;
                let is_address = host.parse::<std::net::Ipv6Addr>().is_ok();
                let port = if after.is_empty() { Some(None) } else { after.strip_prefix(':').map(Some) };
                let port = port.ok_or_else(|| wrong("goes on behind its `]`"))?;
                if !is_address {
                    return Err(wrong("has no IPv6 address in its brackets"));
                }
                (host, port)
            }
            // More than one colon: an IPv6 address without a port.
            None if text.parse::<std::net::Ipv6Addr>().is_ok() => (text, None),
            None => match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            },
        };
        let is_name = |b: u8| b.is_ascii_alphanumeric() || b"-._:%".contains(&b);
        if host.is_empty() || !host.bytes().all(is_name) {
            return Err(wrong("names no host"));
        }
        let port = match port {
            None => default_port,
            Some(port) => parse_port(port).ok_or_else(|| wrong("has a port that is no number from 1 to 65535"))?,
        };
        Ok(Self { host: host.to_owned(), port })
    }
}

fn parse_port(text: &str) -> Option<u16> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|port| is_plain && *port != 0)
}

/// The variables of this process that are text.
pub fn environment() -> Variables {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

/// This process's place, from `explicit` and `variables`. Nothing set is a single process.
///
/// # Errors
/// Where something is set that is incomplete, unreadable or contradictory; the message names it, and what to set.
pub fn membership(explicit: &Explicit, variables: &Variables) -> Result<Membership, MembershipError> {
    let env = Env { variables };
    let Some(place) = env.place(explicit)? else {
        return Ok(Membership {
            rank: 0,
            size: 1,
            local_rank: None,
            coordinator: None,
            run: String::new(),
            launcher: Launcher::Single,
        });
    };
    let Place { launcher, rank, size } = &place;
    for (name, value) in [(&size.name, size.value), (&rank.name, rank.value)] {
        if value > MAX_SIZE {
            let problem = format!("is more than the {MAX_SIZE} processes that a run may have");
            return Err(MembershipError::Value { variable: name.clone(), value: value.to_string(), problem });
        }
    }
    if size.value == 0 {
        let problem = "is not a number of processes".to_owned();
        return Err(MembershipError::Value { variable: size.name.clone(), value: "0".to_owned(), problem });
    }
    if rank.value >= size.value {
        let advice = format!("ranks of {} processes go from 0 to {}", size.value, size.value - 1);
        return Err(MembershipError::Contradiction { a: rank.to_string(), b: size.to_string(), advice });
    }
    let coordinator = if size.value == 1 { None } else { Some(env.coordinator(explicit, &place)?) };
    let local = match launcher {
        Launcher::Torchrun | Launcher::RankVariables => &["LOCAL_RANK"][..],
        Launcher::OpenMpi => &["OMPI_COMM_WORLD_LOCAL_RANK"],
        Launcher::Pmi => &["MPI_LOCALRANKID"],
        Launcher::Slurm => &["SLURM_LOCALID"],
        _ => &[],
    };
    let local_rank = env.number(local)?.map(|number| number.value);
    let run = env.run(*launcher);
    Ok(Membership { rank: rank.value, size: size.value, local_rank, coordinator, run, launcher: *launcher })
}

/// A number and the variable or flag that it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Number {
    name: String,
    value: usize,
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.value)
    }
}

struct Place {
    launcher: Launcher,
    rank: Number,
    size: Number,
}

struct Env<'a> {
    variables: &'a Variables,
}

impl Env<'_> {
    fn get(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(|value| value.trim()).filter(|value| !value.is_empty())
    }

    /// The first of these variables that is set.
    fn number(&self, names: &[&str]) -> Result<Option<Number>, MembershipError> {
        let Some((name, value)) = names.iter().find_map(|name| Some((*name, self.get(name)?))) else { return Ok(None) };
        let is_plain = value.bytes().all(|byte| byte.is_ascii_digit());
        match value.parse() {
            Ok(number) if is_plain => Ok(Some(Number { name: name.to_owned(), value: number })),
            _ => Err(MembershipError::Value {
                variable: name.to_owned(),
                value: value.to_owned(),
                problem: "is not a whole number".to_owned(),
            }),
        }
    }

    /// Rank and size of one launcher: both, neither, or an error that names the one that is missing.
    fn pair(&self, launcher: Launcher, rank: &[&str], size: &[&str]) -> Result<Option<Place>, MembershipError> {
        match (self.number(rank)?, self.number(size)?) {
            (None, None) => Ok(None),
            (Some(rank), Some(size)) => Ok(Some(Place { launcher, rank, size })),
            (Some(one), None) => Err(incomplete(&one, size[0], "number of processes")),
            (None, Some(one)) => Err(incomplete(&one, rank[0], "rank of this process")),
        }
    }

    fn place(&self, explicit: &Explicit) -> Result<Option<Place>, MembershipError> {
        let flag = |name: &str, value: Option<usize>| value.map(|value| Number { name: name.to_owned(), value });
        match (flag("--process-rank", explicit.rank), flag("--num-processes", explicit.size)) {
            (Some(rank), Some(size)) => return Ok(Some(Place { launcher: Launcher::Flags, rank, size })),
            (Some(one), None) => return Err(incomplete(&one, "--num-processes", "number of processes")),
            (None, Some(one)) if one.value != 1 => {
                return Err(incomplete(&one, "--process-rank", "rank of this process"));
            }
            (None, Some(size)) => {
                let rank = Number { name: "--process-rank".to_owned(), value: 0 };
                return Ok(Some(Place { launcher: Launcher::Flags, rank, size }));
            }
            (None, None) => {}
        }
        const OUR_SIZE: &str = "COGVLM_NUM_PROCESSES";
        if self.get("COGVLM_RANK").is_some() {
            return self.pair(Launcher::Cogvlm, &["COGVLM_RANK"], &[OUR_SIZE]);
        }
        let place = self.launcher()?;
        let our_size = self.number(&[OUR_SIZE])?;
        match (place, our_size) {
            (Some(place), Some(ours)) if place.size.value != ours.value => {
                let advice = format!("set {OUR_SIZE} to the processes that were started, or leave it out");
                Err(MembershipError::Contradiction { a: ours.to_string(), b: place.size.to_string(), advice })
            }
            (None, Some(ours)) if ours.value != 1 => Err(incomplete(&ours, "COGVLM_RANK", "rank of this process")),
            (place, _) => Ok(place),
        }
    }

    /// What the nearest launcher set.
    fn launcher(&self) -> Result<Option<Place>, MembershipError> {
        let torch = |launcher| self.pair(launcher, &["RANK"], &["WORLD_SIZE"]);
        if self.get("TORCHELASTIC_RUN_ID").is_some() {
            return torch(Launcher::Torchrun);
        }
        let open_mpi = self.pair(Launcher::OpenMpi, &["OMPI_COMM_WORLD_RANK"], &["OMPI_COMM_WORLD_SIZE"])?;
        let mpi = match open_mpi {
            Some(place) => Some(place),
            None => self.pair(Launcher::Pmi, &["PMI_RANK"], &["PMI_SIZE"])?,
        };
        if mpi.is_some() {
            return Ok(mpi);
        }
        let index = "JOB_COMPLETION_INDEX";
        let our_size = self.number(&["COGVLM_NUM_PROCESSES"])?;
        let kubernetes = match (self.number(&[index])?, &our_size) {
            // Each pod may be a run of its own, whatever its index.
            (Some(rank), Some(size)) if size.value != 1 => {
                Some(Place { launcher: Launcher::Kubernetes, rank, size: size.clone() })
            }
            _ => None,
        };
        let slurm = self.slurm()?;
        let found: Vec<Place> = [torch(Launcher::RankVariables)?, kubernetes, slurm].into_iter().flatten().collect();
        if let [first, others @ ..] = &found[..] {
            for other in others {
                for (a, b) in [(&first.rank, &other.rank), (&first.size, &other.size)] {
                    if a.value != b.value {
                        let advice = "unset those of the launcher that did not start this process, or say it with \
                                      COGVLM_RANK and COGVLM_NUM_PROCESSES";
                        let (a, b) = (a.to_string(), b.to_string());
                        return Err(MembershipError::Contradiction { a, b, advice: advice.to_owned() });
                    }
                }
            }
        } else if let (Some(index), None) = (self.number(&[index])?, our_size) {
            return Err(MembershipError::Incomplete {
                present: format!("{index} is set"),
                missing: "COGVLM_NUM_PROCESSES".to_owned(),
                advice: "set it to the job's completions, or to 1 where each pod is a run of its own".to_owned(),
            });
        }
        Ok(found.into_iter().next())
    }

    /// A step of Slurm. A batch script has SLURM_PROCID and SLURM_NTASKS too, but is one process that `srun` did not
    /// start: it has no variable of a step.
    fn slurm(&self) -> Result<Option<Place>, MembershipError> {
        const STEP: [&str; 5] = [
            "SLURM_STEP_NUM_TASKS",
            "SLURM_STEP_ID",
            "SLURM_STEPID",
            "SLURM_STEP_NODELIST",
            "SLURM_LAUNCH_NODE_IPADDR",
        ];
        let is_step = STEP.iter().any(|name| self.get(name).is_some());
        let Some(rank) = self.number(&["SLURM_PROCID"])? else { return Ok(None) };
        if !is_step && rank.value == 0 {
            return Ok(None);
        }
        let size = self.number(&["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"])?;
        let size = size.ok_or_else(|| incomplete(&rank, "SLURM_NTASKS", "number of processes"))?;
        Ok(Some(Place { launcher: Launcher::Slurm, rank, size }))
    }

    /// Where process 0 is found.
    fn coordinator(&self, explicit: &Explicit, place: &Place) -> Result<Endpoint, MembershipError> {
        if let Some(text) = &explicit.coordinator {
            return Endpoint::parse(text, DEFAULT_PORT, "--coordinator");
        }
        if let Some(text) = self.get("COGVLM_COORDINATOR") {
            return Endpoint::parse(text, DEFAULT_PORT, "COGVLM_COORDINATOR");
        }
        let port = self.port(place.launcher)?;
        if let Some(host) = self.get("MASTER_ADDR") {
            // MASTER_PORT holds the port: an address with one of its own would be two.
            return Endpoint::parse(host, port, "MASTER_ADDR");
        }
        let host = match place.launcher {
            Launcher::Kubernetes => self.first_pod(&place.rank)?,
            Launcher::Slurm => self.first_node()?,
            Launcher::OpenMpi => self.loopback("OMPI_COMM_WORLD_LOCAL_SIZE", place)?,
            Launcher::Pmi => self.loopback("MPI_LOCALNRANKS", place)?,
            _ => None,
        };
        if let Some(host) = host {
            return Endpoint::parse(&host, port, "the host of process 0");
        }
        let (missing, advice) = match place.launcher {
            Launcher::Torchrun | Launcher::RankVariables => {
                ("MASTER_ADDR", "set it to the host of process 0, and MASTER_PORT to a free port there".to_owned())
            }
            Launcher::Kubernetes => (
                "COGVLM_SERVICE",
                "set it to the job's headless service, or COGVLM_COORDINATOR to HOST:PORT of process 0".to_owned(),
            ),
            Launcher::OpenMpi | Launcher::Pmi => (
                "COGVLM_COORDINATOR",
                format!(
                    "set it to HOST:PORT of process 0 (`mpirun -x COGVLM_COORDINATOR=node01:{DEFAULT_PORT}`, \
                         `mpiexec -genv COGVLM_COORDINATOR node01:{DEFAULT_PORT}`)"
                ),
            ),
            _ => ("COGVLM_COORDINATOR", "set it to HOST:PORT of process 0".to_owned()),
        };
        let Place { rank, size, .. } = place;
        Err(MembershipError::Incomplete {
            present: format!("{rank} and {size} are set"),
            missing: missing.to_owned(),
            advice,
        })
    }

    fn port(&self, launcher: Launcher) -> Result<u16, MembershipError> {
        if let Some(text) = self.get("MASTER_PORT") {
            let wrong = |problem: &str| MembershipError::Value {
                variable: "MASTER_PORT".to_owned(),
                value: text.to_owned(),
                problem: problem.to_owned(),
            };
            let port = parse_port(text).ok_or_else(|| wrong("is no port: write a number from 1 to 65535"))?;
            // torchrun's agent listens at that port itself.
            let is_taken =
                self.get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value.eq_ignore_ascii_case("true"));
            if launcher == Launcher::Torchrun && is_taken {
                return port
                    .checked_add(1)
                    .ok_or_else(|| wrong("leaves no port above it for process 0: use a lower one"));
            }
            return Ok(port);
        }
        if launcher != Launcher::Slurm {
            return Ok(DEFAULT_PORT);
        }
        // Steps that share a host get ports of their own, outside the range from which systems hand out ports.
        let job = self.number(&["SLURM_JOB_ID", "SLURM_JOBID"])?.map_or(0, |job| job.value);
        // Steps outside the usual numbering have ids close to 2^32.
        let step = self.number(&["SLURM_STEP_ID", "SLURM_STEPID"])?.map_or(0, |step| step.value);
        Ok(20_000 + (job.wrapping_mul(31).wrapping_add(step) % 10_000) as u16)
    }

    /// The pod with index 0: pods of an indexed job are called `JOB-INDEX`, and resolve under the headless service.
    fn first_pod(&self, rank: &Number) -> Result<Option<String>, MembershipError> {
        let Some(service) = self.get("COGVLM_SERVICE") else { return Ok(None) };
        let present = format!("COGVLM_SERVICE={service} is set");
        let advice = "set COGVLM_COORDINATOR to HOST:PORT of the pod with index 0".to_owned();
        let Some(hostname) = self.get("HOSTNAME") else {
            return Err(MembershipError::Incomplete { present, missing: "HOSTNAME".to_owned(), advice });
        };
        match hostname.strip_suffix(&format!("-{}", rank.value)) {
            Some(job) if !job.is_empty() => Ok(Some(format!("{job}-0.{service}"))),
            _ => Err(MembershipError::Contradiction { a: format!("HOSTNAME={hostname}"), b: rank.to_string(), advice }),
        }
    }

    /// The node of task 0: the step's first. The launching node comes last, since `salloc` starts steps from outside.
    fn first_node(&self) -> Result<Option<String>, MembershipError> {
        for variable in ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"] {
            let Some(list) = self.get(variable) else { continue };
            let wrong = |problem| MembershipError::Value { variable: variable.into(), value: list.into(), problem };
            return Ok(expand(list).map_err(wrong)?.into_iter().next());
        }
        Ok(self.get("SLURM_LAUNCH_NODE_IPADDR").map(str::to_owned))
    }

    /// This host, where all processes run on it.
    fn loopback(&self, local_size: &str, place: &Place) -> Result<Option<String>, MembershipError> {
        let local = self.number(&[local_size])?;
        Ok(local.filter(|local| local.value == place.size.value).map(|_| "127.0.0.1".to_owned()))
    }

    fn run(&self, launcher: Launcher) -> String {
        let variables: &[&str] = match launcher {
            Launcher::Torchrun => &["TORCHELASTIC_RUN_ID"],
            Launcher::Slurm => &["SLURM_JOB_ID", "SLURM_STEP_ID"],
            Launcher::OpenMpi => &["PMIX_NAMESPACE"],
            _ => &[],
        };
        let ours = self.get("COGVLM_RUN_ID").map(str::to_owned);
        ours.unwrap_or_else(|| variables.iter().filter_map(|name| self.get(name)).collect::<Vec<_>>().join("."))
    }
}

fn incomplete(present: &Number, missing: &str, meaning: &str) -> MembershipError {
    MembershipError::Incomplete {
        present: format!("{present} is set"),
        missing: missing.to_owned(),
        advice: format!("set it to the {meaning}, or unset {}", present.name),
    }
}

#[cfg(test)]
mod tests;
