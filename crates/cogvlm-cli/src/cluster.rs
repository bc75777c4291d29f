//! Runs over several processes: which one this is, and meeting the others.

use cogvlm_cluster::membership::environment;
use cogvlm_cluster::{ClusterError, Config, Explicit, Options, join, membership};
use cogvlm_pipeline::Processes;
use cogvlm_plan::plan::Plan;

use crate::args::ModelArgs;
use crate::error::{CliError, CliResult};
use crate::output::note;

/// Meets the other processes of the run, where `plan` names devices of theirs; `None` where it does not.
pub(crate) fn meet(args: &ModelArgs, plan: &Plan) -> CliResult<Option<Processes>> {
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
    let config = Config::new()
        .with("plan", places(plan))
        .with("--model", &args.model)
        .with("--dtype", format!("{:?}", args.dtype))
        .with("--rope", format!("{:?}", args.rope));
    let options = Options::from_variables(&variables).map_err(cluster_error)?;
    let cluster = join(&membership, &options, &config, &|line| note(line)).map_err(cluster_error)?;
    Ok(Some(Processes::connect(cluster).map_err(cluster_error)?))
}

/// What the processes of a run have to agree on of a plan. Each may expect other times of it, by what it knows of its
/// GPUs.
fn places(plan: &Plan) -> String {
    let plan = Plan { notices: Vec::new(), rates: String::new(), ..plan.clone() };
    Plan { seconds_per_token: 0.0, seconds_per_image: 0.0, tokens_per_second: 0.0, ..plan }.to_json()
}

/// Ends the run for everyone, where there are others, since this process cannot go on.
pub(crate) fn fail(processes: Option<&Processes>, error: CliError) -> CliError {
    if let Some(processes) = processes {
        processes.fail(error.message());
    }
    error
}

fn cluster_error(error: ClusterError) -> CliError {
    CliError::with_hint(&error, error.hint())
}
