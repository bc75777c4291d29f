//! `synth`: synthetic checkpoints.

use std::sync::Arc;

use cogvlm_checkpoint::{ModelSource, Monitor, Progress, SyntheticModel, digest, parse_shard_size, write_checkpoint};
use cogvlm_core::memory::format_bytes;

use crate::args::SynthArgs;
use crate::error::CliResult;
use crate::interrupt::CANCELLED;
use crate::output::{note, print_line};
use crate::progress::byte_bar;

pub(crate) fn run(args: &SynthArgs) -> CliResult {
    let model = SyntheticModel::parse(&args.model)?;
    let max_shard_bytes = parse_shard_size(&args.max_shard_size)?;
    let watched = |title: &'static str, job: &mut dyn FnMut(&Monitor<'_>) -> CliResult| {
        let bar = byte_bar(title, 0);
        let on_progress = |progress: Progress| {
            bar.set_length(progress.total_bytes);
            bar.set_position(progress.done_bytes);
        };
        let result = job(&Monitor { on_progress: &on_progress, cancel: &CANCELLED });
        bar.finish_and_clear();
        result
    };
    if let Some(dir) = &args.out {
        watched("writing", &mut |monitor| {
            let written = write_checkpoint(&model, dir, max_shard_bytes, monitor)?;
            let what = if written.already_there { "already there, byte for byte:" } else { "wrote" };
            let size = format_bytes(written.tensor_bytes);
            note(&format!("{what} {size} of weights in {} file(s) in `{}`", written.files.len(), dir.display()));
            Ok(())
        })?;
    }
    if args.digest {
        let source = ModelSource::Synthetic(Arc::new(model));
        watched("hashing", &mut |monitor| print_line(&digest(&source, monitor)?))?;
    }
    Ok(())
}
