//! How the processes of a run meet: process 0 listens, the others come, and when all are there everyone learns of all.
//!
//! Whoever comes introduces itself with a hello. Strangers, processes of other runs or versions, and second processes
//! of a rank are refused without disturbing the others; processes that would run something else end the run before it
//! begins.

mod come;
mod greet;
mod host;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub(crate) use greet::{Greeting, accept_greetings, read_frame_before, wait_readable};

use crate::addresses::{host_name, listen_data, random_token};
use crate::control::Control;
use crate::data::TcpWire;
use crate::error::{ClusterError, ConfigDifference};
use crate::membership::{Membership, Variables};

/// Version of what goes over connections.
pub(crate) const PROTOCOL: u16 = 1;

/// How processes meet, and how long they wait for each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// How long all processes may take to come.
    pub timeout: Duration,
    /// How long a process may be silent before it counts as stalled; the same at all processes.
    pub silence: Duration,
    /// Time between lines that say who is missing.
    pub progress_interval: Duration,
    /// How long a connection may take to introduce itself.
    pub hello_timeout: Duration,
    /// The address to listen at, instead of the one that is chosen.
    pub bind: Option<IpAddr>,
    /// Process `r` awaits data connections at this port plus `r`; 0 lets the system choose.
    pub data_port: u16,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(300),
            silence: Duration::from_secs(4),
            progress_interval: Duration::from_secs(5),
            hello_timeout: Duration::from_secs(3),
            bind: None,
            data_port: 0,
        }
    }
}

impl Options {
    /// The defaults, with `COGVLM_CLUSTER_TIMEOUT_S`, `COGVLM_CLUSTER_SILENCE_S`, `COGVLM_BIND` and `COGVLM_DATA_PORT`
    /// where they are set.
    ///
    /// # Errors
    /// Where one of them cannot be read.
    pub fn from_variables(variables: &Variables) -> Result<Self, ClusterError> {
        let mut options = Self::default();
        let get = |variable: &'static str| {
            let value = variables.get(variable).map(|value| value.trim()).filter(|value| !value.is_empty())?;
            Some((variable, value))
        };
        let wrong = |(variable, value): (&'static str, &str), problem: &str| ClusterError::Setting {
            variable,
            value: value.to_owned(),
            problem: problem.to_owned(),
        };
        let seconds = |setting: (&'static str, &str), least: f64| {
            let seconds: f64 = setting.1.parse().unwrap_or(f64::NAN);
            let problem = format!("write seconds from {least} to 86400");
            if (least..=86_400.0).contains(&seconds) {
                Ok(Duration::from_secs_f64(seconds))
            } else {
                Err(wrong(setting, &problem))
            }
        };
        if let Some(setting) = get("COGVLM_CLUSTER_TIMEOUT_S") {
            options.timeout = seconds(setting, 1.0)?;
        }
        if let Some(setting) = get("COGVLM_CLUSTER_SILENCE_S") {
            options.silence = seconds(setting, 0.5)?;
        }
        if let Some(setting) = get("COGVLM_BIND") {
            let address =
                setting.1.parse().map_err(|_| wrong(setting, "write an IPv4 or IPv6 address of this host"))?;
            options.bind = Some(address);
        }
        if let Some(setting) = get("COGVLM_DATA_PORT") {
            let port = setting.1.parse().map_err(|_| wrong(setting, "write a port from 1 to 65535, or 0 for any"))?;
            options.data_port = port;
        }
        Ok(options)
    }
}

/// What has to be the same at all processes: names, and for each a value or a digest of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config(BTreeMap<String, String>);

impl Config {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a part: a short text as it is, longer ones and bytes by their digest.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        const MAX_SHOWN: usize = 128;
        let bytes = value.as_ref();
        let is_shown = bytes.len() <= MAX_SHOWN && bytes.iter().all(|byte| byte.is_ascii_graphic() || *byte == b' ');
        let text = if is_shown {
            String::from_utf8_lossy(bytes).into_owned()
        } else {
            format!("{} bytes with checksum {:016x}", bytes.len(), fingerprint(bytes))
        };
        self.0.insert(name.to_owned(), text);
        self
    }

    /// The first part that differs: its name, and both values.
    pub(crate) fn difference(&self, other: &Self) -> Option<(String, String, String)> {
        let names: std::collections::BTreeSet<&String> = self.0.keys().chain(other.0.keys()).collect();
        let value = |config: &Self, name: &String| config.0.get(name).map_or("nothing", String::as_str).to_owned();
        let differs = |name: &&String| self.0.get(*name) != other.0.get(*name);
        let name = names.into_iter().find(differs)?;
        Some((name.clone(), value(self, name), value(other, name)))
    }
}

/// 64-bit FNV-1a: tells accidental differences; a caller who wants more gives a digest.
fn fingerprint(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// A process of the run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Its rank.
    pub rank: usize,
    /// Its host's name.
    pub host: String,
    /// Its process id there.
    pub pid: u32,
    /// Where it awaits data connections, as process 0 sees it.
    pub(crate) data: SocketAddr,
}

/// How a process introduces itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Hello {
    version: String,
    rank: usize,
    size: usize,
    run: String,
    host: String,
    pid: u32,
    data_port: u16,
    config: Config,
}

/// Everybody.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Roster {
    members: Vec<Member>,
    /// What data connections of this run show.
    token: String,
}

/// Why the run does not begin.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub(crate) enum GiveUp {
    Differs(Box<ConfigDifference>),
    Other(String),
}

impl GiveUp {
    pub(crate) fn error(self, address: &str) -> ClusterError {
        match self {
            Self::Differs(difference) => ClusterError::ConfigDiffers(difference),
            Self::Other(reason) => ClusterError::GaveUp { address: address.to_owned(), reason },
        }
    }
}

/// This process's connections.
pub struct Cluster {
    /// To process 0, or at process 0 to all others.
    pub control: Control,
    /// Where others are awaited, and what they have to show; `None` where there are none.
    listener: Option<TcpListener>,
    token: String,
    options: Options,
}

impl Cluster {
    /// Connects to each of `peers`, which do the same with this process at the same time, for rows in both directions.
    /// All processes call this once; the port for data connections is closed afterwards.
    ///
    /// # Errors
    /// Where a process failed, or a peer is not there in time.
    pub fn connect(self, peers: &[usize]) -> Result<(Control, TcpWire), ClusterError> {
        let Self { control, listener, token, options } = self;
        let wire = TcpWire::connect(&control, listener, &token, peers, &options)?;
        Ok((control, wire))
    }
}

/// Meets the other processes of the run. `progress` is told in a line who is missing, every few seconds. With a single
/// process there is nobody to meet, and no port is opened.
///
/// # Errors
/// Where process 0 or others do not come in time, this process is refused, or processes would run different things.
pub fn join(
    membership: &Membership, options: &Options, config: &Config, progress: &dyn Fn(&str),
) -> Result<Cluster, ClusterError> {
    let silence = format!("{} s", options.silence.as_secs_f64());
    let config = config.clone().with("COGVLM_CLUSTER_SILENCE_S", silence);
    let Membership { rank, size, run, .. } = membership;
    let mut hello = Hello {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        rank: *rank,
        size: *size,
        run: run.clone(),
        host: host_name(),
        pid: std::process::id(),
        data_port: 0,
        config,
    };
    let Some(coordinator) = membership.coordinator.as_ref().filter(|_| *size > 1) else {
        let Hello { host, pid, .. } = hello;
        let member = Member { rank: 0, host, pid, data: SocketAddr::from(([127, 0, 0, 1], 0)) };
        let control = Control::start(0, vec![member], BTreeMap::new(), options.silence)?;
        return Ok(Cluster { control, listener: None, token: random_token(), options: options.clone() });
    };
    let deadline = Instant::now() + options.timeout;
    let port = |rank: usize| match options.data_port {
        0 => Ok(0),
        base => u16::try_from(usize::from(base) + rank).map_err(|_| ClusterError::Setting {
            variable: "COGVLM_DATA_PORT",
            value: base.to_string(),
            problem: format!("process {rank} would listen at this port plus {rank}, which is no port"),
        }),
    };
    let data_port = port(*rank)?;
    let open = |own: IpAddr| listen_data(coordinator, options.bind, own, data_port);
    let met = if *rank == 0 {
        host::host(coordinator, options, deadline, &mut hello, &open, progress)?
    } else {
        come::come(coordinator, options, deadline, &mut hello, &open, progress)?
    };
    let Met { streams, roster: Roster { members, token }, listener } = met;
    let control = Control::start(*rank, members, streams, options.silence)?;
    Ok(Cluster { control, listener: Some(listener), token, options: options.clone() })
}

/// What meeting gives.
struct Met {
    streams: BTreeMap<usize, std::net::TcpStream>,
    roster: Roster,
    listener: TcpListener,
}

/// Opens the port for data connections, given how this process sees itself.
type OpenData<'a> = &'a dyn Fn(IpAddr) -> Result<TcpListener, ClusterError>;

fn port_of(listener: &TcpListener) -> Result<u16, ClusterError> {
    let address = listener.local_addr().map_err(|error| ClusterError::system("cannot ask for a port", &error))?;
    Ok(address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(pairs: &[(&str, &str)]) -> Variables {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn settings_are_read_or_refused() {
        assert_eq!(Options::from_variables(&Variables::new()).unwrap(), Options::default());
        let set = variables(&[
            ("COGVLM_CLUSTER_TIMEOUT_S", "10"),
            ("COGVLM_CLUSTER_SILENCE_S", "0.5"),
            ("COGVLM_BIND", "::1"),
            ("COGVLM_DATA_PORT", "7000"),
        ]);
        let options = Options::from_variables(&set).unwrap();
        assert_eq!((options.timeout, options.silence), (Duration::from_secs(10), Duration::from_millis(500)));
        assert_eq!((options.bind, options.data_port), (Some("::1".parse().unwrap()), 7000));
        for (name, value) in [
            ("COGVLM_CLUSTER_TIMEOUT_S", "0"),
            ("COGVLM_CLUSTER_TIMEOUT_S", "inf"),
            ("COGVLM_CLUSTER_SILENCE_S", "NaN"),
            ("COGVLM_CLUSTER_SILENCE_S", "4s"),
            ("COGVLM_BIND", "node1"),
            ("COGVLM_DATA_PORT", "65536"),
        ] {
            let error = Options::from_variables(&variables(&[(name, value)])).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{name} is `{value}`: write ")), "{error}");
        }
    }

    #[test]
    fn configs_tell_what_differs() {
        let config = Config::new().with("model", "tiny@11").with("plan", [0_u8; 500]);
        assert_eq!(config.difference(&config.clone()), None);
        let other = config.clone().with("model", "tiny@12");
        assert_eq!(config.difference(&other), Some(("model".into(), "tiny@11".into(), "tiny@12".into())));
        let other = config.clone().with("plan", [1_u8; 500]);
        let (part, a, b) = config.difference(&other).unwrap();
        assert!(part == "plan" && a.starts_with("500 bytes with checksum") && a != b, "{a} {b}");
        let more = config.clone().with("dtype", "bf16");
        assert_eq!(config.difference(&more), Some(("dtype".into(), "nothing".into(), "bf16".into())));
    }

    #[test]
    fn a_single_process_meets_nobody() {
        let membership = crate::membership(&crate::Explicit::default(), &Variables::new()).unwrap();
        let cluster = join(&membership, &Options::default(), &Config::new(), &|_| ()).unwrap();
        assert_eq!((cluster.control.rank(), cluster.control.size()), (0, 1));
        let (control, _wire) = cluster.connect(&[]).unwrap();
        assert_eq!(control.share(1, b"id").unwrap(), b"id");
        assert!(matches!(control.send(1, 0, b""), Err(ClusterError::NoPeer { peer: 1, .. })));
        assert!(matches!(control.recv_any(None), Err(ClusterError::NoPeer { .. })));
        control.leave().unwrap();
    }
}
