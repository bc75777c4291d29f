//! Why a checkpoint is refused, or a tensor cannot be read.

use std::io;
use std::path::PathBuf;

use cogvlm_core::ConfigError;

use crate::header::{ForeignFile, HeaderError};
use crate::monitor::Cancelled;

/// Why a checkpoint is refused, or a tensor of a source cannot be read. Names taken from files are shown with control
/// characters escaped, and cut where they are very long.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The operating system refused.
    #[error("cannot read `{}`: {source}", path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// Nothing there, or a file.
    #[error("`{}` is not a directory; give the directory that holds config.json and the .safetensors files", path.display())]
    NotADirectory {
        /// What was given.
        path: PathBuf,
    },
    /// The root of a model in the Hub's cache, above its snapshots.
    #[error("`{}` is the root of a model in a Hub cache; give one of the directories in `{}`", dir.display(), dir.join("snapshots").display())]
    HubCacheRoot {
        /// What was given.
        dir: PathBuf,
    },
    /// A file that has to be there is not.
    #[error("`{}` does not exist; {hint}", path.display())]
    Absent {
        /// The file.
        path: PathBuf,
        /// Why it matters, or what to do.
        hint: String,
    },
    /// A directory, a pipe or a device under the name of a file.
    #[error("`{}` is not a regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A symbolic link to nothing, as an emptied Hub cache leaves.
    #[error("`{}` is a link to `{}`, which does not exist; download the model again", path.display(), target.display())]
    DanglingLink {
        /// The link.
        path: PathBuf,
        /// Where it points.
        target: PathBuf,
    },
    /// Another kind of file under this name.
    #[error("`{}` is {kind}", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: ForeignFile,
    },
    /// A JSON file larger than any of a real checkpoint.
    #[error("`{}` has more than {limit_bytes} bytes; that is no file of a checkpoint", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Most that is read.
        limit_bytes: u64,
    },
    /// A JSON file that is not UTF-8, not JSON, or JSON of another form.
    #[error("`{}` is malformed: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        reason: String,
    },
    /// `config.json` does not describe a CogVLM model.
    #[error("`{}`: {source}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ConfigError,
    },
    /// The configuration has more layers than the files have tensors.
    #[error("{config} describes {num_layers} layers, but the files in `{}` hold only {num_tensors} tensors; download both again from one revision of the model", dir.display())]
    LayerCount {
        /// What describes the model.
        config: String,
        /// Layers of decoder and ViT.
        num_layers: usize,
        /// The checkpoint.
        dir: PathBuf,
        /// Tensors in all its files.
        num_tensors: usize,
    },
    /// No weights at all.
    #[error("`{}` holds no weights: neither model.safetensors nor model.safetensors.index.json{}", dir.display(), listing(found))]
    NoWeights {
        /// The directory.
        dir: PathBuf,
        /// Names of some files in it.
        found: Vec<String>,
    },
    /// PyTorch weights only.
    #[error("`{}` holds PyTorch weights (`{file}`) and no safetensors; convert the checkpoint to safetensors first", dir.display())]
    TorchOnly {
        /// The directory.
        dir: PathBuf,
        /// One of its weight files.
        file: String,
    },
    /// A download, or a `synth`, that did not finish.
    #[error("`{}` is an unfinished file; let its download finish, or start it again", path.display())]
    Unfinished {
        /// The file.
        path: PathBuf,
    },
    /// Shards without an index.
    #[error("`{}` holds shards (`{shard}`) but no model.safetensors.index.json; download the index of the same revision", dir.display())]
    NoIndex {
        /// The directory.
        dir: PathBuf,
        /// One of its shards.
        shard: String,
    },
    /// Both layouts at once.
    #[error("`{}` holds both model.safetensors and model.safetensors.index.json; remove the one that is stale", dir.display())]
    Ambiguous {
        /// The directory.
        dir: PathBuf,
    },
    /// The index names a tensor twice.
    #[error("`{}` lists `{tensor}` twice", index.display())]
    IndexDuplicate {
        /// The index.
        index: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// The index places a tensor outside the directory, or in something that is no safetensors file.
    #[error("`{}` places `{tensor}` in `{target}`; only .safetensors files beside the index are read", index.display())]
    IndexTarget {
        /// The index.
        index: PathBuf,
        /// The tensor.
        tensor: String,
        /// Where the index places it.
        target: String,
    },
    /// A header that does not describe its file.
    #[error("`{}` cannot be used: {source}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: HeaderError,
    },
    /// A tensor is in one file and the index says another.
    #[error("`{tensor}` is in `{}`, but the index places it in `{expected}`; download both again from one revision of the model", path.display())]
    Misplaced {
        /// The tensor.
        tensor: String,
        /// The file that holds it.
        path: PathBuf,
        /// The file that should.
        expected: String,
    },
    /// A tensor is in two files.
    #[error("`{tensor}` is in both `{}` and `{}`; download both again from one revision of the model", first.display(), second.display())]
    TwoFiles {
        /// The tensor.
        tensor: String,
        /// The first file that holds it.
        first: PathBuf,
        /// The second.
        second: PathBuf,
    },
    /// A file holds a tensor that the index does not list.
    #[error("`{}` holds `{tensor}`, which the index does not list; download both again from one revision of the model", path.display())]
    NotIndexed {
        /// The tensor.
        tensor: String,
        /// The file that holds it.
        path: PathBuf,
    },
    /// The index lists a tensor that its file does not hold.
    #[error("the index places `{tensor}` in `{}`, which does not hold it; download both again from one revision of the model", path.display())]
    IndexedAbsent {
        /// The tensor.
        tensor: String,
        /// The file that should hold it.
        path: PathBuf,
    },
    /// The model needs a tensor that no file holds.
    #[error("`{tensor}`{} missing from `{}`; {config} describes a model that has it: download both again from one revision of the model", others(*num_others, " is", " are"), dir.display())]
    Missing {
        /// The first missing tensor in checkpoint order.
        tensor: String,
        /// Further tensors that are missing.
        num_others: usize,
        /// The checkpoint.
        dir: PathBuf,
        /// What describes the model.
        config: String,
    },
    /// A file holds a tensor that the model does not have.
    #[error("`{}` holds `{tensor}`{} not part of the model that {config} describes; is it the configuration of these weights?", path.display(), others(*num_others, ", which is", ", which are"))]
    Unexpected {
        /// The first such tensor.
        tensor: String,
        /// Further tensors of that kind in the checkpoint.
        num_others: usize,
        /// The file that holds it.
        path: PathBuf,
        /// What describes the model.
        config: String,
    },
    /// A tensor has another shape than the configuration implies.
    #[error("`{tensor}` in `{}` is {found:?}, {config} implies {expected:?}; download both again from one revision of the model", path.display())]
    Shape {
        /// The tensor.
        tensor: String,
        /// The file that holds it.
        path: PathBuf,
        /// Its shape there.
        found: Vec<usize>,
        /// The shape that the configuration implies.
        expected: Vec<usize>,
        /// What describes the model.
        config: String,
    },
    /// No tensor of this name in the source.
    #[error("there is no tensor `{tensor}` in this model")]
    UnknownTensor {
        /// The name.
        tensor: String,
    },
    /// The caller's buffer or range does not fit the tensor.
    #[error(
        "elements {first}..{end} of `{tensor}`, which has {num_elements}, do not fit a buffer of {buffer_bytes} bytes"
    )]
    Buffer {
        /// The tensor.
        tensor: String,
        /// First element asked for.
        first: usize,
        /// End of the elements asked for.
        end: usize,
        /// Elements that the tensor has.
        num_elements: usize,
        /// Size of the buffer.
        buffer_bytes: usize,
    },
    /// A file is not what it was when it was opened.
    #[error("`{}` changed while it was in use; start again, and leave the checkpoint alone meanwhile", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// Asked to stop.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

fn others(num_others: usize, one: &str, many: &str) -> String {
    match num_others {
        0 => one.to_owned(),
        1 => format!(" and 1 other tensor{many}"),
        _ => format!(" and {num_others} other tensors{many}"),
    }
}

fn listing(found: &[String]) -> String {
    if found.is_empty() { "; it is empty".to_owned() } else { format!(", only `{}`", found.join("`, `")) }
}

/// A name from a file as it may be printed: on one line, without control characters, not longer than a line or two.
pub(crate) fn printable(name: &str) -> String {
    const MAX_CHARS: usize = 200;
    let escape = |c: char| if c.is_control() { c.escape_default().collect() } else { String::from(c) };
    let mut shown: String = name.chars().take(MAX_CHARS).map(escape).collect();
    if name.chars().nth(MAX_CHARS).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_files_cannot_write_to_the_terminal() {
        assert_eq!(printable("a\n\u{1b}[31mb"), "a\\n\\u{1b}[31mb");
        assert_eq!(printable(&"x".repeat(201)), "x".repeat(200) + "…");
        assert_eq!(printable(&"é".repeat(200)), "é".repeat(200));
    }
}
