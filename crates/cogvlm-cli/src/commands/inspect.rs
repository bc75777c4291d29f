//! `inspect`: what a checkpoint holds, and whether it is whole.

use cogvlm_checkpoint::{Checkpoint, ModelSource, Monitor, Progress, hash_files, hash_tensors, inspect};
use cogvlm_core::memory::format_bytes;
use serde_json::json;

use crate::args::InspectArgs;
use crate::error::CliResult;
use crate::interrupt::CANCELLED;
use crate::output::print_line;
use crate::progress::byte_bar;

pub(crate) fn run(args: &InspectArgs) -> CliResult {
    let checkpoint = Checkpoint::open(&args.dir)?;
    let report = inspect(&checkpoint);
    let hashes = if args.hash {
        let bar = byte_bar("hashing", 0);
        let on_progress = |progress: Progress| {
            bar.set_length(progress.total_bytes);
            bar.set_position(progress.done_bytes);
        };
        let monitor = Monitor { on_progress: &on_progress, cancel: &CANCELLED };
        // A file is hashed from its beginning to its end; tensors fill the cores that files leave idle.
        let source = ModelSource::Checkpoint(checkpoint.clone());
        let (files, tensors) = rayon::join(|| hash_files(&checkpoint, &monitor), || hash_tensors(&source, &monitor));
        bar.finish_and_clear();
        Some((files?, tensors?))
    } else {
        None
    };
    if args.json {
        let mut object = json!(report);
        if let Some((files, tensors)) = &hashes {
            object["file_hashes"] = json!(files);
            object["tensor_hashes"] = json!(tensors);
        }
        return print_line(&object.to_string());
    }
    let config = &report.config;
    let mut lines = vec![
        format!("{}: complete", report.dir.display()),
        format!(
            "  model     {} decoder layers of {}, {} ViT layers of {}, {} px, vocabulary {}, template {}",
            config.num_layers,
            config.hidden_size,
            config.vision_num_layers,
            config.vision_hidden_size,
            config.image_size,
            config.vocab_size,
            config.template
        ),
        format!(
            "  weights   {} tensors, {} parameters, {}",
            report.num_tensors,
            report.num_parameters,
            format_bytes(report.tensor_bytes)
        ),
        format!(
            "  inv_freq  {}",
            if report.stores_inv_freq { "stored, and used" } else { "not stored: computed by the formula" }
        ),
    ];
    for (dtype, count) in &report.dtypes {
        lines.push(format!("  {dtype:<8}  {} tensors, {}", count.num_tensors, format_bytes(count.tensor_bytes)));
    }
    for file in &report.files {
        lines.push(format!("  {}  {} tensors, {}", file.name, file.num_tensors, format_bytes(file.file_bytes)));
    }
    for notice in &report.notices {
        lines.push(format!("  note: {notice}"));
    }
    if let Some((files, tensors)) = &hashes {
        for file in files {
            lines.push(format!("{}  {}", file.sha256, file.path.display()));
        }
        lines.push(format!("{}  all tensors", tensors.combined));
    }
    print_line(&lines.join("\n"))
}
