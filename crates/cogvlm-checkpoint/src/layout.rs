//! Which files of a directory hold a model's configuration and weights.

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{CheckpointError, printable};
use crate::header::{ForeignFile, Pairs};

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// The index of a 17B checkpoint has 100 kB; headers may have 100 MB.
const MAX_JSON_BYTES: u64 = 100_000_000;

/// The weight files of a directory.
#[derive(Debug)]
pub(crate) struct Layout {
    /// Names of the files, sorted, each a plain file name.
    pub(crate) files: Vec<String>,
    /// What the index says, where there is one.
    pub(crate) index: Option<Index>,
    /// Names of .safetensors files that are not part of the model.
    pub(crate) unused: Vec<String>,
}

/// `model.safetensors.index.json`.
#[derive(Debug)]
pub(crate) struct Index {
    /// Tensor and file name, in the order of the index; tensors are unique.
    pub(crate) weight_map: Vec<(String, String)>,
    /// `metadata.total_size`.
    pub(crate) total_size: Option<u64>,
}

impl Layout {
    pub(crate) fn of_dir(dir: &Path) -> Result<Self, CheckpointError> {
        let names = list(dir)?;
        let holds = |name: &str| names.iter().any(|held| held == name);
        let (files, index) = match (holds(SINGLE), holds(INDEX)) {
            (true, true) => return Err(CheckpointError::Ambiguous { dir: dir.to_owned() }),
            (true, false) => (vec![SINGLE.to_owned()], None),
            (false, true) => {
                let index = Index::read(&dir.join(INDEX))?;
                let files: BTreeSet<String> = index.weight_map.iter().map(|(_, file)| file.clone()).collect();
                let files: Vec<String> = files.into_iter().collect();
                check_present(dir, &names, &files)?;
                (files, Some(index))
            }
            (false, false) => return Err(no_weights(dir, &names)),
        };
        let unused = names.into_iter().filter(|name| name.ends_with(".safetensors") && !files.contains(name)).collect();
        Ok(Self { files, index, unused })
    }
}

/// Sorted names of what lies in `dir`; names that are not UTF-8 cannot be ours and are left out.
fn list(dir: &Path) -> Result<Vec<String>, CheckpointError> {
    if !dir.is_dir() {
        return Err(CheckpointError::NotADirectory { path: dir.to_owned() });
    }
    let io_error = |source| CheckpointError::Io { path: dir.to_owned(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(io_error)? {
        names.extend(entry.map_err(io_error)?.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

fn check_present(dir: &Path, names: &[String], files: &[String]) -> Result<(), CheckpointError> {
    let absent: Vec<&String> = files.iter().filter(|file| names.binary_search(file).is_err()).collect();
    let Some(first) = absent.first() else { return Ok(()) };
    if let Some(path) = unfinished(dir, names) {
        return Err(CheckpointError::Unfinished { path });
    }
    let hint = format!("the index names {} files, of which {} are absent: download them", files.len(), absent.len());
    Err(CheckpointError::Absent { path: dir.join(first), hint })
}

fn unfinished(dir: &Path, names: &[String]) -> Option<PathBuf> {
    let marks = [".incomplete", ".partial", ".part", ".crdownload", ".aria2"];
    names
        .iter()
        .find(|name| name.contains(".safetensors") && marks.iter().any(|mark| name.ends_with(mark)))
        .map(|name| dir.join(name))
}

/// The most helpful reason why `dir`, which holds `names`, has no safetensors weights.
fn no_weights(dir: &Path, names: &[String]) -> CheckpointError {
    let dir = dir.to_owned();
    let ending =
        |endings: &[&str]| names.iter().find(|name| endings.iter().any(|ending| name.ends_with(ending))).cloned();
    if let Some(path) = unfinished(&dir, names) {
        return CheckpointError::Unfinished { path };
    }
    if dir.join("snapshots").is_dir() {
        return CheckpointError::HubCacheRoot { dir };
    }
    if let Some(shard) = names.iter().find(|name| name.starts_with("model-") && name.ends_with(".safetensors")) {
        return CheckpointError::NoIndex { dir, shard: printable(shard) };
    }
    if let Some(file) = ending(&[".bin", ".bin.index.json", ".pt", ".pth", ".ckpt"]) {
        return CheckpointError::TorchOnly { dir, file: printable(&file) };
    }
    CheckpointError::NoWeights { dir, found: names.iter().take(5).map(|name| printable(name)).collect() }
}

#[derive(Deserialize)]
struct RawIndex {
    metadata: Option<RawMetadata>,
    weight_map: Pairs<String>,
}

#[derive(Deserialize)]
struct RawMetadata {
    /// Some tools write it as a float.
    total_size: Option<f64>,
}

impl Index {
    fn read(path: &Path) -> Result<Self, CheckpointError> {
        let text = read_json(path, "")?;
        let malformed = |error: serde_json::Error| CheckpointError::Json {
            path: path.to_owned(),
            reason: printable(&error.to_string()),
        };
        let RawIndex { metadata, weight_map: Pairs(weight_map) } = serde_json::from_str(&text).map_err(malformed)?;
        let mut seen = HashSet::with_capacity(weight_map.len());
        for (tensor, target) in &weight_map {
            let tensor_name = || printable(tensor);
            if !seen.insert(tensor) {
                return Err(CheckpointError::IndexDuplicate { index: path.to_owned(), tensor: tensor_name() });
            }
            // A name without separators cannot lead out of the directory; `..` does not end in .safetensors.
            if target.contains(['/', '\\', ':', '\0']) || !target.ends_with(".safetensors") {
                let target = printable(target);
                return Err(CheckpointError::IndexTarget { index: path.to_owned(), tensor: tensor_name(), target });
            }
        }
        Ok(Self { weight_map, total_size: metadata.and_then(|metadata| metadata.total_size).map(|size| size as u64) })
    }
}

/// Reads a JSON file of a checkpoint as text. `hint` is for the case that it is absent.
pub(crate) fn read_json(path: &Path, hint: &str) -> Result<String, CheckpointError> {
    let (file, _) = open_regular(path, hint)?;
    let mut bytes = Vec::new();
    let read = file.take(MAX_JSON_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(|source| CheckpointError::Io { path: path.to_owned(), source })?;
    if bytes.len() as u64 > MAX_JSON_BYTES {
        return Err(CheckpointError::TooLarge { path: path.to_owned(), limit_bytes: MAX_JSON_BYTES });
    }
    if let Some(kind) = ForeignFile::recognise(&bytes) {
        return Err(CheckpointError::Foreign { path: path.to_owned(), kind });
    }
    let not_utf8 = |error: std::string::FromUtf8Error| CheckpointError::Json {
        path: path.to_owned(),
        reason: format!("not UTF-8 (byte {})", error.utf8_error().valid_up_to()),
    };
    String::from_utf8(bytes).map_err(not_utf8)
}

/// Opens a regular file, following links; anything else would block or make no sense.
pub(crate) fn open_regular(path: &Path, hint: &str) -> Result<(File, fs::Metadata), CheckpointError> {
    let path_buf = || path.to_owned();
    let io_error = |source| CheckpointError::Io { path: path_buf(), source };
    let metadata = fs::metadata(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => match fs::read_link(path) {
            Ok(target) => CheckpointError::DanglingLink { path: path_buf(), target },
            Err(_) => CheckpointError::Absent { path: path_buf(), hint: hint.to_owned() },
        },
        _ => io_error(source),
    })?;
    if !metadata.is_file() {
        return Err(CheckpointError::NotAFile { path: path_buf() });
    }
    let file = File::open(path).map_err(io_error)?;
    let metadata = file.metadata().map_err(io_error)?;
    Ok((file, metadata))
}
