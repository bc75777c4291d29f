//! Runs over several processes: which one this is, and meeting the others.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use cogvlm_backend::DeviceChannel;
use cogvlm_cluster::membership::environment;
use cogvlm_cluster::nccl::Nccl;
use cogvlm_cluster::{ClusterError, Config, Explicit, Options, Watch, join, membership};
use cogvlm_cuda::{ChannelEnd, CudaBackend, NcclChannel};
use cogvlm_device::{AnyBackend, GpuChannel};
use cogvlm_parallel::ChannelOfOne;
use cogvlm_pipeline::{Carrier, OpenChannels, Processes, Way};
use cogvlm_plan::plan::Plan;
use serde_json::{Value, json};

use crate::args::{ModelArgs, TransportArg};
use crate::error::{CliError, CliResult};
use crate::output::note;
use crate::session::RankBackend;

/// Set once other processes have been met.
static HAS_MET: AtomicBool = AtomicBool::new(false);

/// Whether this process has met others of its run.
pub(crate) fn has_met() -> bool {
    HAS_MET.load(Ordering::Relaxed)
}

/// Meets the other processes of the run, where `plan` names devices of theirs; `None` where it does not. `on_gpus` says
/// whether numbered devices are GPUs.
pub(crate) fn meet(args: &ModelArgs, plan: &Plan, on_gpus: bool) -> CliResult<Option<Processes<RankBackend>>> {
    let named = plan.devices.iter().map(|planned| planned.device).max_by_key(|device| device.process());
    let Some(last) = named.filter(|device| device.process() > 0) else {
        return Ok(None);
    };
    let cluster = &args.cluster;
    let explicit =
        Explicit { rank: cluster.process_rank, size: cluster.num_processes, coordinator: cluster.coordinator.clone() };
    let variables = environment();
    let membership = membership(&explicit, &variables).map_err(CliError::new)?;
    if membership.size <= last.process() {
        let (size, needed) = (membership.size, last.process() + 1);
        let message = format!(
            "`--max-memory` names `{last}`, a device of process {}, but the number of processes is {size}",
            last.process()
        );
        let hint = format!(
            "start {needed} processes with these flags, by a launcher, or each with `--process-rank`, `--num-processes {needed}` and `--coordinator`"
        );
        return Err(CliError::new(message).hint(hint));
    }
    let transport = args.placement.transport;
    if transport == TransportArg::Nccl && !on_gpus {
        return Err(CliError::new(
            "`--transport nccl` joins GPUs, but numbered devices are virtual ranks of the host here",
        )
        .hint("leave it out, or run with `--backend cuda`"));
    }
    let config = Config::new()
        .with("plan", places(plan))
        .with("--model", &args.model)
        .with("--dtype", format!("{:?}", args.dtype))
        .with("--rope", format!("{:?}", args.rope))
        .with("--transport", format!("{transport:?}"));
    let options = Options::from_variables(&variables).map_err(cluster_error)?;
    let cluster = join(&membership, &options, &config, &|line| note(line)).map_err(cluster_error)?;
    HAS_MET.store(true, Ordering::Relaxed);
    let processes = Processes::connect(cluster).map_err(cluster_error)?;
    let opener = on_gpus.then(|| Box::new(NcclChannels::default()) as Box<dyn OpenChannels<RankBackend>>);
    Ok(Some(processes.with_channels(transport.into(), opener)))
}

/// Channels of NCCL between GPUs. It is loaded when the first is wanted.
#[derive(Default)]
struct NcclChannels {
    loaded: OnceLock<Result<Arc<Nccl>, String>>,
}

impl NcclChannels {
    fn nccl(&self) -> Result<&Arc<Nccl>, String> {
        let load = || {
            Nccl::load().map_err(|error| match error.hint() {
                Some(hint) => format!("{error}; {hint}"),
                None => error.to_string(),
            })
        };
        self.loaded.get_or_init(load).as_ref().map_err(Clone::clone)
    }
}

impl OpenChannels<RankBackend> for NcclChannels {
    fn name(&self) -> String {
        self.nccl().map_or_else(
            |_| "NCCL".to_owned(),
            |nccl| format!("NCCL {} ({})", nccl.version_text(), nccl.path().display()),
        )
    }

    fn invite(&self, backend: &RankBackend) -> Result<Vec<u8>, String> {
        NcclChannel::invite(gpu_of(backend)?, self.nccl()?).map_err(|error| error.to_string())
    }

    fn accept(&self, backend: &RankBackend, invitation: &[u8]) -> Result<(), String> {
        let gpu = gpu_of(backend)?;
        self.nccl()?;
        NcclChannel::accept(gpu, invitation).map_err(|error| error.to_string())
    }

    fn open(
        &self, backend: &RankBackend, is_sender: bool, invitation: &[u8], watch: &Arc<Watch>,
    ) -> Result<Arc<dyn DeviceChannel<RankBackend>>, String> {
        let end = if is_sender { ChannelEnd::Sender } else { ChannelEnd::Receiver };
        let channel = NcclChannel::open(gpu_of(backend)?, self.nccl()?, end, invitation, watch);
        Ok(Arc::new(ChannelOfOne(GpuChannel(channel.map_err(|error| error.to_string())?))))
    }
}

/// The GPU of a rank that is one.
fn gpu_of(backend: &RankBackend) -> Result<&CudaBackend, String> {
    match backend.members() {
        [AnyBackend::Cuda(gpu)] => Ok(gpu),
        [_] => Err("a rank is on the host".to_owned()),
        _ => Err("a rank is a group of GPUs".to_owned()),
    }
}

/// What carries rows between two ranks, in words.
pub(crate) fn way_text(Way { from, to, carrier }: &Way) -> String {
    match carrier {
        Carrier::Channel(name) => format!("rows from `{from}` to `{to}` by {name}"),
        Carrier::Tcp(reason) => format!("rows from `{from}` to `{to}` by TCP: {reason}"),
    }
}

/// What carries rows between processes, as JSON.
pub(crate) fn ways_json(ways: &[Way]) -> Value {
    let way = |Way { from, to, carrier }: &Way| {
        let (by, detail) = match carrier {
            Carrier::Channel(name) => ("nccl", name),
            Carrier::Tcp(reason) => ("tcp", reason),
        };
        json!({"from": from, "to": to, "by": by, "detail": detail})
    };
    ways.iter().map(way).collect()
}

/// What the processes of a run have to agree on of a plan. Each may expect other times of it, by what it knows of its
/// GPUs.
fn places(plan: &Plan) -> String {
    let plan = Plan { notices: Vec::new(), rates: String::new(), ..plan.clone() };
    Plan { seconds_per_token: 0.0, seconds_per_image: 0.0, tokens_per_second: 0.0, ..plan }.to_json()
}

/// Ends the run for everyone, where there are others, since this process cannot go on.
pub(crate) fn fail(processes: Option<&Processes<RankBackend>>, error: CliError) -> CliError {
    if let Some(processes) = processes {
        processes.fail(error.message());
    }
    error
}

fn cluster_error(error: ClusterError) -> CliError {
    CliError::with_hint(&error, error.hint())
}
