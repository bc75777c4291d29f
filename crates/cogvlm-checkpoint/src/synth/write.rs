//! Writes a synthetic model as a checkpoint in Hugging Face layout.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::{SynthError, SyntheticModel};
use crate::layout::{CONFIG, INDEX, SINGLE};
use crate::monitor::{Meter, Monitor};
use crate::source::{Piece, pieces};
use crate::table::TensorInfo;

/// Most bytes of data in one file, unless told otherwise.
pub const DEFAULT_MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// Bytes that are made and written at a time: they fit the second-level cache between the two.
const CHUNK_BYTES: usize = 1 << 20;
/// Bytes of a file after which it is flushed. Without that the kernel hoards gigabytes, and a cancelled job would wait
/// for all of them to reach the disk.
const FLUSH_BYTES: u64 = 64 << 20;

/// What [`write_checkpoint`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The weight files.
    pub files: Vec<PathBuf>,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
    /// The directory held this very checkpoint already; it was compared, byte for byte, and nothing was written.
    pub already_there: bool,
}

/// A size as `--max-shard-size` takes it: bytes, or a number with `KB`, `MB` or `GB` (powers of 1000).
///
/// # Errors
/// [`SynthError::ShardSize`] for anything else, and for 0.
pub fn parse_shard_size(text: &str) -> Result<u64, SynthError> {
    let upper = text.trim().to_ascii_uppercase();
    let units = [("GB", 1e9), ("MB", 1e6), ("KB", 1e3)];
    let scaled =
        units.iter().find_map(|(unit, scale)| Some(upper.strip_suffix(unit)?.trim().parse::<f64>().ok()? * scale));
    let bytes =
        upper.parse().ok().or_else(|| scaled.filter(|bytes| (1.0..1e18).contains(bytes)).map(|bytes| bytes as u64));
    bytes.filter(|&bytes| bytes > 0).ok_or_else(|| SynthError::ShardSize { text: text.to_owned() })
}

/// Writes `model` to `dir`: `config.json`, `generation_config.json` and shards of at most `max_shard_bytes` of data (a
/// larger tensor has a file of its own), with an index where there is more than one. Weights are made and written on all
/// threads of the current rayon pool. Files have the ending `.partial` until all of them are complete and on disk.
///
/// # Errors
/// [`SynthError::NotEmpty`] where `dir` holds anything but this very checkpoint; [`SynthError::Busy`],
/// [`SynthError::Io`], [`SynthError::Cancelled`]. Nothing written remains then.
pub fn write_checkpoint(
    model: &SyntheticModel, dir: &Path, max_shard_bytes: u64, monitor: &Monitor<'_>,
) -> Result<Written, SynthError> {
    let output = Output::plan(model, max_shard_bytes);
    let meter = Meter::new(monitor, model.table().total_bytes());
    let already_there = match foreign_entry(dir, &output)? {
        Some(_) => {
            output.compare(model, dir, &meter)?;
            true
        }
        None => {
            output.write(model, dir, &meter)?;
            false
        }
    };
    let files = output.shards.iter().map(|shard| dir.join(&shard.name)).collect();
    Ok(Written { files, tensor_bytes: model.table().total_bytes(), already_there })
}

/// Everything that will lie in the directory.
struct Output {
    shards: Vec<Shard>,
    /// Name and text; `config.json` comes last, so that an interrupted rename leaves no complete checkpoint.
    texts: Vec<(&'static str, String)>,
}

struct Shard {
    name: String,
    /// Length and header.
    start: Vec<u8>,
    file_bytes: u64,
    /// Indices of its tensors in the model's table.
    tensors: Range<usize>,
    /// Where each of them begins in the file.
    offsets: Vec<u64>,
}

impl Output {
    fn plan(model: &SyntheticModel, max_shard_bytes: u64) -> Self {
        let ranges = cut_into_shards(model.tensors(), max_shard_bytes);
        let count = ranges.len();
        let name = |index: usize| match count {
            1 => SINGLE.to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        let shards: Vec<Shard> = ranges
            .into_iter()
            .enumerate()
            .map(|(index, tensors)| Shard::plan(name(index), model.tensors(), tensors))
            .collect();
        let mut texts = Vec::new();
        if count > 1 {
            texts.push((INDEX, index_json(model, &shards)));
        }
        texts.push(("generation_config.json", generation_config_json(model)));
        texts.push((CONFIG, model.config_json().to_owned()));
        Self { shards, texts }
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.shards.iter().map(|shard| shard.name.as_str()).chain(self.texts.iter().map(|(name, _)| *name))
    }

    fn write(&self, model: &SyntheticModel, dir: &Path, meter: &Meter<'_>) -> Result<(), SynthError> {
        let mut unfinished = Unfinished::create_dir(dir)?;
        let shards: Vec<(&Shard, PartialFile)> = self
            .shards
            .iter()
            .map(|shard| Ok((shard, unfinished.create(dir, &shard.name, shard.file_bytes)?)))
            .collect::<Result<_, SynthError>>()?;
        for (shard, file) in &shards {
            file.write_at(0, &shard.start)?;
        }
        let work: Vec<(usize, Piece)> = self.work(model).collect();
        let make_and_write = |chunk: &mut Vec<u8>, (shard, piece): &(usize, Piece)| {
            meter.check()?;
            chunk.resize(piece.num_bytes, 0);
            model.fill(piece.tensor, piece.elements.clone(), chunk);
            let (shard, file) = &shards[*shard];
            file.write_at(shard.offset_of(piece), chunk)?;
            meter.advance(chunk.len());
            Ok::<_, SynthError>(())
        };
        work.par_iter().try_for_each_init(Vec::new, make_and_write)?;
        for (name, text) in &self.texts {
            let file = unfinished.create(dir, name, text.len() as u64)?;
            file.write_at(0, text.as_bytes())?;
            file.flush()?;
        }
        shards.par_iter().try_for_each(|(_, file)| {
            meter.check()?;
            file.flush()
        })?;
        meter.check()?;
        unfinished.finish(dir, self.names())
    }

    /// Checks that `dir` holds exactly what would be written.
    fn compare(&self, model: &SyntheticModel, dir: &Path, meter: &Meter<'_>) -> Result<(), SynthError> {
        let not_empty = |reason: String| SynthError::NotEmpty { dir: dir.to_owned(), reason };
        for (name, text) in &self.texts {
            match fs::read_to_string(dir.join(name)) {
                Ok(found) if serde_json::from_str::<Value>(&found).ok() == serde_json::from_str(text).ok() => {}
                Ok(_) => return Err(not_empty(format!("`{name}` differs"))),
                Err(_) => return Err(not_empty(format!("it has no `{name}`"))),
            }
        }
        let open = |shard: &Shard| {
            let file =
                File::open(dir.join(&shard.name)).map_err(|_| not_empty(format!("it has no `{}`", shard.name)))?;
            let mut start = vec![0; shard.start.len()];
            let length = file.metadata().map(|metadata| metadata.len()).unwrap_or_default();
            if length != shard.file_bytes || file.read_exact_at(&mut start, 0).is_err() || start != shard.start {
                return Err(not_empty(format!("`{}` holds other tensors", shard.name)));
            }
            Ok(file)
        };
        let files = self.shards.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let work: Vec<(usize, Piece)> = self.work(model).collect();
        work.par_iter().try_for_each_init(Default::default, |(made, found): &mut (Vec<u8>, Vec<u8>), (shard, piece)| {
            meter.check()?;
            made.resize(piece.num_bytes, 0);
            found.resize(piece.num_bytes, 0);
            model.fill(piece.tensor, piece.elements.clone(), made);
            let offset = self.shards[*shard].offset_of(piece);
            if files[*shard].read_exact_at(found, offset).is_err() || made != found {
                return Err(not_empty(format!("`{}` differs", model.tensors()[piece.tensor].spec.name)));
            }
            meter.advance(made.len());
            Ok(())
        })
    }

    /// Every piece of every tensor, with the shard that it goes to.
    fn work(&self, model: &SyntheticModel) -> impl Iterator<Item = (usize, Piece)> {
        let shard_of = |tensor: usize| self.shards.partition_point(|shard| shard.tensors.end <= tensor);
        pieces(model.tensors(), CHUNK_BYTES).map(move |piece| (shard_of(piece.tensor), piece))
    }
}

/// Takes tensors in order, and starts a new file where the next one would push a file that is not empty over the limit.
fn cut_into_shards(tensors: &[TensorInfo], max_shard_bytes: u64) -> Vec<Range<usize>> {
    let mut shards = Vec::new();
    let (mut start, mut shard_bytes) = (0, 0);
    for (index, tensor) in tensors.iter().enumerate() {
        let bytes = tensor.num_bytes() as u64;
        if index > start && shard_bytes + bytes > max_shard_bytes {
            shards.push(start..index);
            (start, shard_bytes) = (index, 0);
        }
        shard_bytes += bytes;
    }
    shards.push(start..tensors.len());
    shards
}

impl Shard {
    fn plan(name: String, tensors: &[TensorInfo], range: Range<usize>) -> Self {
        let mut header = Map::new();
        header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
        let mut offsets = Vec::with_capacity(range.len());
        let mut end = 0;
        for tensor in &tensors[range.clone()] {
            let begin = end;
            end = begin + tensor.num_bytes() as u64;
            offsets.push(begin);
            let (dtype, shape) = (tensor.dtype.safetensors_name(), &tensor.spec.shape);
            header.insert(
                tensor.spec.name.clone(),
                json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}),
            );
        }
        let mut text = Value::Object(header).to_string();
        let padding = text.len().next_multiple_of(8) - text.len();
        text.extend(std::iter::repeat_n(' ', padding));
        let start = [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
        let data_start = start.len() as u64;
        offsets.iter_mut().for_each(|offset| *offset += data_start);
        Self { name, start, file_bytes: data_start + end, tensors: range, offsets }
    }

    fn offset_of(&self, piece: &Piece) -> u64 {
        let bytes_per_element = 2;
        self.offsets[piece.tensor - self.tensors.start] + bytes_per_element * piece.elements.start as u64
    }
}

fn index_json(model: &SyntheticModel, shards: &[Shard]) -> String {
    let in_shard = |shard: &Shard| {
        model.tensors()[shard.tensors.clone()].iter().map(|tensor| tensor.spec.name.clone()).collect::<Vec<_>>()
    };
    let weight_map: BTreeMap<String, &str> = shards
        .iter()
        .flat_map(|shard| in_shard(shard).into_iter().map(|tensor| (tensor, shard.name.as_str())))
        .collect();
    pretty(&json!({"metadata": {"total_size": model.table().total_bytes()}, "weight_map": weight_map}))
}

fn generation_config_json(model: &SyntheticModel) -> String {
    let config: Value = serde_json::from_str(model.config_json()).expect("parsed when the model was made");
    let spec = model.spec();
    pretty(&json!({
        "_from_model_config": true,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": spec.eos_token_id,
        "pad_token_id": spec.pad_token_id,
        "transformers_version": config.get("transformers_version").and_then(Value::as_str).unwrap_or("4.35.0"),
    }))
}

fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).expect("a JSON value has string keys only")
}

fn cannot_write(path: &Path) -> impl Fn(io::Error) -> SynthError {
    move |source| SynthError::Io { path: path.to_owned(), source }
}

fn partial_name(name: &str) -> String {
    format!("{name}.partial")
}

/// A name in `dir` that no interrupted run of the same job left there; `None` where `dir` is empty or absent.
fn foreign_entry(dir: &Path, output: &Output) -> Result<Option<String>, SynthError> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries.map_err(cannot_write(dir))?,
    };
    let ours: Vec<String> = output.names().map(partial_name).collect();
    for entry in entries {
        let name = entry.map_err(cannot_write(dir))?.file_name().to_string_lossy().into_owned();
        if !ours.contains(&name) {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// A file that is written from many threads under its `.partial` name.
struct PartialFile {
    path: PathBuf,
    file: File,
    written_bytes: AtomicU64,
}

impl PartialFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), SynthError> {
        self.file.write_all_at(bytes, offset).map_err(cannot_write(&self.path))?;
        let before = self.written_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let crossed = before / FLUSH_BYTES != (before + bytes.len() as u64) / FLUSH_BYTES;
        if crossed { self.flush() } else { Ok(()) }
    }

    fn flush(&self) -> Result<(), SynthError> {
        self.file.sync_all().map_err(cannot_write(&self.path))
    }
}

/// What has been created so far; removed on drop unless [`Unfinished::finish`] succeeds.
struct Unfinished {
    /// Deepest first.
    created_dirs: Vec<PathBuf>,
    files: Vec<PathBuf>,
}

impl Unfinished {
    fn create_dir(dir: &Path) -> Result<Self, SynthError> {
        let is_absent = |dir: &&Path| !dir.as_os_str().is_empty() && !dir.exists();
        let created_dirs = dir.ancestors().take_while(is_absent).map(Path::to_owned).collect();
        let unfinished = Self { created_dirs, files: Vec::new() };
        fs::create_dir_all(dir).map_err(cannot_write(dir))?;
        Ok(unfinished)
    }

    fn create(&mut self, dir: &Path, name: &str, file_bytes: u64) -> Result<PartialFile, SynthError> {
        let path = dir.join(partial_name(name));
        // Locked before it is truncated, and only then ours to remove: another process may be writing it.
        let file = File::options().write(true).create(true).truncate(false).open(&path).map_err(cannot_write(&path))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => return Err(SynthError::Busy { path }),
            // Some network file systems know no locks.
            Ok(()) | Err(TryLockError::Error(_)) => self.files.push(path.clone()),
        }
        file.set_len(0).and_then(|()| file.set_len(file_bytes)).map_err(cannot_write(&path))?;
        Ok(PartialFile { path, file, written_bytes: AtomicU64::new(0) })
    }

    fn finish<'a>(mut self, dir: &Path, names: impl Iterator<Item = &'a str>) -> Result<(), SynthError> {
        for (name, path) in names.zip(&mut self.files) {
            let complete = dir.join(name);
            fs::rename(&*path, &complete).map_err(cannot_write(&complete))?;
            *path = complete;
        }
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(cannot_write(dir))?;
        self.files.clear();
        self.created_dirs.clear();
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Called because something failed already; that is the error the caller hears about.
        for path in &self.files {
            let _ = fs::remove_file(path);
        }
        for dir in &self.created_dirs {
            let _ = fs::remove_dir(dir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_decimal() {
        for (text, bytes) in [("5GB", 5_000_000_000), ("1.5mb", 1_500_000), ("20 KB", 20_000), ("123", 123)] {
            assert_eq!(parse_shard_size(text).unwrap(), bytes, "{text}");
        }
        for text in ["", "0", "0GB", "-1", "GB", "5GiB", "nan GB", "1e30GB", "5 potatoes"] {
            let message = parse_shard_size(text).unwrap_err().to_string();
            assert_eq!(message, format!("`{text}` is not a size; write bytes, or a number with KB, MB or GB, as 5GB"));
        }
    }

    #[test]
    fn the_17b_model_takes_eight_shards() {
        let model = SyntheticModel::built_in("cogvlm-chat-17b", 1).unwrap();
        let output = Output::plan(&model, DEFAULT_MAX_SHARD_BYTES);
        let data_bytes: Vec<u64> =
            output.shards.iter().map(|shard| shard.file_bytes - shard.start.len() as u64).collect();
        let specified = [
            4_938_875_648,
            4_947_280_640,
            4_947_297_024,
            4_991_320_832,
            4_991_320_960,
            4_970_117_248,
            4_960_485_888,
            532_676_608,
        ];
        assert_eq!(data_bytes, specified);
        assert!(output.shards.iter().all(|shard| shard.start.len() % 8 == 0));
        assert_eq!(output.shards[2].name, "model-00003-of-00008.safetensors");
    }
}
