//! What can go wrong between processes.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The first process of a run that ended before its time. All others end with this, the same everywhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("process {rank} of {size} (pid {pid} on {host}) {cause}")]
pub struct Failure {
    /// Its rank.
    pub rank: usize,
    /// How many processes the run has.
    pub size: usize,
    /// Its host's name.
    pub host: String,
    /// Its process id there.
    pub pid: u32,
    /// What happened.
    pub cause: Cause,
}

/// How a process failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Cause {
    /// Its control connection was closed without a goodbye.
    Closed {
        /// What the system said, where it was more than that.
        detail: String,
    },
    /// Nothing came from it for too long.
    Silent {
        /// How long it may be silent, in milliseconds: the same at every process, whichever noticed.
        limit_ms: u64,
    },
    /// It said so itself.
    Reported {
        /// In its own words.
        message: String,
    },
    /// What came from it is no message of this program.
    Garbled {
        /// What was wrong.
        detail: String,
    },
    /// A data connection to it broke, though its control connection did not.
    DataLink {
        /// The process that noticed.
        noticed_by: usize,
        /// What was seen.
        detail: String,
    },
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed { detail } if detail.is_empty() => {
                f.write_str("died: its connection closed without a goodbye")
            }
            Self::Closed { detail } => write!(f, "died: its connection closed without a goodbye ({detail})"),
            Self::Silent { limit_ms } => {
                let seconds = *limit_ms as f64 / 1e3;
                write!(f, "has been silent for {seconds:.1} s: it is stopped, starved or cut off from the network")
            }
            Self::Reported { message } => write!(f, "failed: {message}"),
            Self::Garbled { detail } => write!(f, "sent what is no message of this program: {detail}"),
            Self::DataLink { noticed_by, detail } => {
                write!(f, "lost its data connection to process {noticed_by}: {detail}")
            }
        }
    }
}

/// What two processes of a run would do differently.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(deny_unknown_fields)]
#[error(
    "process {} on {} and process {} on {} differ in {part}: {} and {}",
    ranks[0], hosts[0], ranks[1], hosts[1], values[0], values[1]
)]
pub struct ConfigDifference {
    /// The part of the configuration.
    pub part: String,
    /// The two processes.
    pub ranks: [usize; 2],
    /// Their hosts.
    pub hosts: [String; 2],
    /// What each of them has.
    pub values: [String; 2],
}

/// What a call between processes may answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    /// A process of the run failed.
    #[error(transparent)]
    Failed(Arc<Failure>),
    /// The other side has ended its part of the run, and nothing more will come.
    #[error("process {rank} has ended its part of the run and {waiting_for} will not come")]
    Left {
        /// The other side.
        rank: usize,
        /// What the caller waited for.
        waiting_for: &'static str,
    },
    /// Process 0 cannot listen.
    #[error("process 0 cannot listen at {address}: {reason}")]
    Listen {
        /// Where.
        address: String,
        /// What the system said.
        reason: String,
    },
    /// Process 0 was not found.
    #[error("process {rank} of {size} found no process 0 at {address} within {} s: {reason}", timeout.as_secs_f64())]
    NoCoordinator {
        /// Who looked.
        rank: usize,
        /// Of how many.
        size: usize,
        /// Where.
        address: String,
        /// How long.
        timeout: Duration,
        /// What the last attempt met.
        reason: String,
    },
    /// Not everybody came.
    #[error(
        "of {size} processes, {} did not come to {address} within {} s{}",
        ranks(missing), timeout.as_secs_f64(), seen(refused)
    )]
    Missing {
        /// How many processes the run has.
        size: usize,
        /// Who did not come.
        missing: Vec<usize>,
        /// Where they were awaited.
        address: String,
        /// How long.
        timeout: Duration,
        /// Who came and was refused, and why.
        refused: Vec<String>,
    },
    /// Process 0 refused this process.
    #[error("process 0 at {address} refused process {rank}: {reason}")]
    Refused {
        /// Who was refused.
        rank: usize,
        /// Where process 0 listens.
        address: String,
        /// Why.
        reason: String,
    },
    /// Two processes are about to run different things.
    #[error(transparent)]
    ConfigDiffers(Box<ConfigDifference>),
    /// Process 0 gave up before the run began.
    #[error("process 0 at {address} gave up: {reason}")]
    GaveUp {
        /// Where process 0 listened.
        address: String,
        /// Why.
        reason: String,
    },
    /// Nothing came in the time that the caller gave.
    #[error("nothing came from {from} within {} s", timeout.as_secs_f64())]
    Timeout {
        /// Who was awaited.
        from: String,
        /// How long.
        timeout: Duration,
    },
    /// There is no connection to this process.
    #[error("process {rank} has no {kind} connection to process {peer} of {size}")]
    NoPeer {
        /// Who asked.
        rank: usize,
        /// For whom.
        peer: usize,
        /// Of how many.
        size: usize,
        /// `control` or `data`.
        kind: &'static str,
    },
    /// A message is larger than any may be.
    #[error("a message of {num_bytes} bytes to process {peer} is larger than the {max_bytes} bytes that one may have")]
    TooLarge {
        /// For whom.
        peer: usize,
        /// Its size.
        num_bytes: usize,
        /// The most.
        max_bytes: usize,
    },
    /// Two processes disagree about what comes next.
    #[error(
        "process {peer} sent {found_bytes} bytes tagged {found_tag:#x} where process {rank} expected {expected_bytes} \
         bytes tagged {expected_tag:#x}: the two run different plans or versions"
    )]
    Unexpected {
        /// Who received.
        rank: usize,
        /// Who sent.
        peer: usize,
        /// The tag asked for.
        expected_tag: u64,
        /// The bytes asked for.
        expected_bytes: usize,
        /// The tag that came.
        found_tag: u64,
        /// The bytes that came.
        found_bytes: usize,
    },
    /// A connection between two processes could not be made.
    #[error(
        "process {rank} has no data connection to process {peer} ({address}) after {} s: {reason}",
        timeout.as_secs_f64()
    )]
    DataConnect {
        /// Who tried.
        rank: usize,
        /// To reach whom.
        peer: usize,
        /// Where.
        address: String,
        /// How long.
        timeout: Duration,
        /// What the last attempt met.
        reason: String,
    },
    /// The system refused something that has nothing to do with others: a thread, a socket's option.
    #[error("{what}: {reason}")]
    System {
        /// What was asked of it.
        what: String,
        /// What it said.
        reason: String,
    },
    /// A setting cannot be read.
    #[error("{variable} is `{value}`: {problem}")]
    Setting {
        /// The variable.
        variable: &'static str,
        /// How it is set.
        value: String,
        /// What is wrong with it, and what to write.
        problem: String,
    },
}

impl ClusterError {
    /// What to do, where that is known.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Failed(failure) => match &failure.cause {
                Cause::Closed { .. } | Cause::Reported { .. } | Cause::Garbled { .. } => {
                    format!("see what process {} printed on {}", failure.rank, failure.host)
                }
                Cause::Silent { .. } => format!(
                    "see what {} is doing; where it is only slow, raise COGVLM_CLUSTER_SILENCE_S everywhere",
                    failure.host
                ),
                Cause::DataLink { .. } => "see whether the network between the two hosts holds".to_owned(),
            },
            Self::Listen { .. } => {
                "choose another port in COGVLM_COORDINATOR (or MASTER_PORT), or another address with COGVLM_BIND"
                    .to_owned()
            }
            Self::NoCoordinator { address, .. } => format!(
                "see that process 0 runs and that {address} can be reached from here; COGVLM_COORDINATOR names another \
                 address, COGVLM_CLUSTER_TIMEOUT_S waits longer"
            ),
            Self::Missing { .. } => "see what these processes printed, and that they can reach that address; \
                                     COGVLM_CLUSTER_TIMEOUT_S waits longer"
                .to_owned(),
            Self::ConfigDiffers(_) => "start every process with the same program, model and flags".to_owned(),
            Self::DataConnect { .. } => {
                "open the ports between the hosts, or fix them with COGVLM_DATA_PORT; COGVLM_BIND \
                                         chooses the interface"
                    .to_owned()
            }
            _ => return None,
        })
    }

    /// The process at fault, where there is one.
    pub fn rank(&self) -> Option<usize> {
        match self {
            Self::Failed(failure) => Some(failure.rank),
            Self::Left { rank, .. } | Self::Refused { rank, .. } => Some(*rank),
            Self::NoPeer { peer, .. } | Self::DataConnect { peer, .. } | Self::Unexpected { peer, .. } => Some(*peer),
            Self::NoCoordinator { .. } | Self::GaveUp { .. } => Some(0),
            _ => None,
        }
    }

    pub(crate) fn system(what: impl Into<String>, error: &std::io::Error) -> Self {
        Self::System { what: what.into(), reason: error.to_string() }
    }
}

/// `process 3`, `processes 1, 2 and 5`; long lists are cut.
pub(crate) fn ranks(ranks: &[usize]) -> String {
    const SHOWN: usize = 8;
    let names: Vec<String> = ranks.iter().take(SHOWN).map(usize::to_string).collect();
    match &names[..] {
        [] => "none".to_owned(),
        [one] => format!("process {one}"),
        all if ranks.len() > SHOWN => format!("processes {} and {} more", all.join(", "), ranks.len() - SHOWN),
        [first @ .., last] => format!("processes {} and {last}", first.join(", ")),
    }
}

fn seen(refused: &[String]) -> String {
    if refused.is_empty() { String::new() } else { format!("; refused: {}", refused.join("; ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_name_rank_host_and_process() {
        let failure = |cause| Failure { rank: 2, size: 4, host: "node03".to_owned(), pid: 4711, cause };
        let text = failure(Cause::Silent { limit_ms: 4000 }).to_string();
        assert_eq!(
            text,
            "process 2 of 4 (pid 4711 on node03) has been silent for 4.0 s: it is stopped, starved or cut off from the \
             network"
        );
        let text = failure(Cause::Reported { message: "out of memory".to_owned() }).to_string();
        assert_eq!(text, "process 2 of 4 (pid 4711 on node03) failed: out of memory");
        let json = serde_json::to_string(&failure(Cause::Closed { detail: "end of file".to_owned() })).unwrap();
        assert_eq!(
            serde_json::from_str::<Failure>(&json).unwrap().cause,
            Cause::Closed { detail: "end of file".into() }
        );
    }

    #[test]
    fn lists_of_ranks_read_well() {
        for (list, text) in [
            (vec![3], "process 3"),
            (vec![1, 2], "processes 1 and 2"),
            (vec![1, 2, 5], "processes 1, 2 and 5"),
            ((1..20).collect(), "processes 1, 2, 3, 4, 5, 6, 7, 8 and 11 more"),
        ] {
            assert_eq!(ranks(&list), text);
        }
    }
}
