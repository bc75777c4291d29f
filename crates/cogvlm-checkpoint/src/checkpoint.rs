//! A directory in Hugging Face layout, checked against its configuration.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cogvlm_core::{DType, ModelConfig, ModelSpec, TensorSpec, tensor_inventory};
use rayon::prelude::*;
use serde::Serialize;

use crate::error::{CheckpointError, printable};
use crate::header::{Header, HeaderTensor};
use crate::layout::{CONFIG, Index, Layout, read_json};
use crate::mapped_file::MappedFile;
use crate::mapping::Advice;
use crate::table::{TensorInfo, TensorTable};

/// Reads the `config.json` at `path`, which need not stand beside weights.
///
/// # Errors
/// Where there is no regular file of a sensible size, or where it is not the configuration of a CogVLM model.
pub fn read_config(path: &Path) -> Result<ModelConfig, CheckpointError> {
    let text = read_json(path, "it is part of every checkpoint in Hugging Face layout: download it")?;
    ModelConfig::from_json(&text).map_err(|source| CheckpointError::Config { path: path.to_owned(), source })
}

/// An open checkpoint: every header is checked, every tensor of the model is there once, with the right shape and a
/// type that can be read, and every file is mapped. Clones share the mappings.
#[derive(Debug, Clone)]
pub struct Checkpoint(Arc<Opened>);

#[derive(Debug)]
struct Opened {
    dir: PathBuf,
    config: ModelConfig,
    spec: ModelSpec,
    table: TensorTable,
    /// For each tensor of the table, its file and the bytes of that file.
    places: Vec<Place>,
    files: Vec<MappedFile>,
    notices: Vec<Notice>,
}

#[derive(Debug, Clone)]
struct Place {
    file: usize,
    range: Range<usize>,
}

/// Something about a checkpoint that is legal and still worth knowing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "notice")]
pub enum Notice {
    /// The checkpoint has no `rotary_emb.inv_freq`; the frequencies follow from the formula.
    NoInvFreq,
    /// `metadata.total_size` of the index is not the size of the tensors.
    TotalSize {
        /// What the index says.
        stated_bytes: u64,
        /// The size of all tensors.
        found_bytes: u64,
    },
    /// A .safetensors file in the directory that the model does not use.
    UnusedFile {
        /// Its name.
        file: String,
    },
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoInvFreq => {
                f.write_str("no `rotary_emb.inv_freq` is stored; RoPE frequencies follow from the formula")
            }
            Self::TotalSize { stated_bytes, found_bytes } => {
                write!(f, "the index states {stated_bytes} bytes of tensors, the files hold {found_bytes}")
            }
            Self::UnusedFile { file } => write!(f, "`{file}` is not part of the model"),
        }
    }
}

impl Checkpoint {
    /// Opens the checkpoint in `dir`: `config.json`, and `model.safetensors` or `model.safetensors.index.json` with its
    /// shards. Files may be links, as in the Hub's cache. Reads headers only.
    ///
    /// # Errors
    /// Whatever keeps the files from being, completely and unambiguously, the model that `config.json` describes.
    /// Tensors that the model does not have are an error; `rotary_emb.inv_freq` may be absent from all layers.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let layout = Layout::of_dir(dir)?;
        let path = dir.join(CONFIG);
        let config = read_config(&path)?;
        Self::open_layout(dir, layout, config, CONFIG, path)
    }

    /// Opens the weights in `dir` as the model that `config` describes; a `config.json` in `dir` is not read.
    /// `described_by` says in error messages where `config` came from.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_with_config(dir: &Path, config: ModelConfig, described_by: &str) -> Result<Self, CheckpointError> {
        Self::open_layout(dir, Layout::of_dir(dir)?, config, described_by, PathBuf::from(described_by))
    }

    fn open_layout(
        dir: &Path, layout: Layout, config: ModelConfig, described_by: &str, config_path: PathBuf,
    ) -> Result<Self, CheckpointError> {
        let spec = config.resolve().map_err(|source| CheckpointError::Config { path: config_path, source })?;
        let opened = layout.files.par_iter().map(|name| MappedFile::open(&dir.join(name)));
        let (files, headers): (Vec<_>, Vec<_>) = opened.collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
        let stored = Stored::of_headers(&files, headers)?;
        if let Some(index) = &layout.index {
            stored.check_index(&files, &layout.files, index)?;
        }
        let (table, places) = stored.check_model(dir, described_by, &files, &spec)?;
        let notices = notices(&layout, &spec, &table);
        Ok(Self(Arc::new(Opened { dir: dir.to_owned(), config, spec, table, places, files, notices })))
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.0.config
    }

    /// The sizes of the model.
    pub fn spec(&self) -> &ModelSpec {
        &self.0.spec
    }

    /// Every tensor, in the order of [`tensor_inventory`].
    pub fn tensors(&self) -> &[TensorInfo] {
        self.0.table.all()
    }

    /// The weight files, by name.
    pub fn files(&self) -> &[MappedFile] {
        &self.0.files
    }

    /// What is worth knowing about this checkpoint.
    pub fn notices(&self) -> &[Notice] {
        &self.0.notices
    }

    /// The tensor called `name`, mapped.
    ///
    /// # Errors
    /// [`CheckpointError::UnknownTensor`].
    pub fn tensor(&self, name: &str) -> Result<MappedTensor, CheckpointError> {
        self.0.table.index_of(name).map(|index| self.tensor_at(index))
    }

    /// Checks that no file changed since it was opened; call it before and after copying weights.
    ///
    /// # Errors
    /// [`CheckpointError::Changed`] with the file.
    pub fn verify_unchanged(&self) -> Result<(), CheckpointError> {
        self.0.files.iter().try_for_each(MappedFile::verify_unchanged)
    }

    pub(crate) fn table(&self) -> &TensorTable {
        &self.0.table
    }

    /// Tensor `index` of the table.
    pub(crate) fn tensor_at(&self, index: usize) -> MappedTensor {
        MappedTensor { checkpoint: Arc::clone(&self.0), index }
    }
}

/// A tensor in a mapped file. Clones are cheap and keep the mapping alive.
#[derive(Debug, Clone)]
pub struct MappedTensor {
    checkpoint: Arc<Opened>,
    index: usize,
}

impl MappedTensor {
    /// What it is.
    pub fn info(&self) -> &TensorInfo {
        &self.checkpoint.table.all()[self.index]
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.info().spec.name
    }

    /// Its element type.
    pub fn dtype(&self) -> DType {
        self.info().dtype
    }

    /// Its shape.
    pub fn shape(&self) -> &[usize] {
        &self.info().spec.shape
    }

    /// Its data: little-endian, row-major, at no particular alignment.
    pub fn bytes(&self) -> &[u8] {
        &self.file().bytes()[self.file_range()]
    }

    /// The file that holds it.
    pub fn file(&self) -> &MappedFile {
        &self.checkpoint.files[self.place().file]
    }

    /// The bytes of [`MappedTensor::file`] that hold it.
    pub fn file_range(&self) -> Range<usize> {
        self.place().range.clone()
    }

    /// Tells the kernel how its pages will be used; pages shared with neighbours are included.
    ///
    /// # Errors
    /// As [`MappedFile::advise`].
    pub fn advise(&self, advice: Advice) -> Result<(), CheckpointError> {
        self.file().advise(self.file_range(), advice)
    }

    fn place(&self) -> &Place {
        &self.checkpoint.places[self.index]
    }
}

/// Every tensor of the files with the file that holds it, in the order of files and data.
struct Stored {
    tensors: Vec<(usize, HeaderTensor)>,
    by_name: HashMap<String, usize>,
}

impl Stored {
    fn of_headers(files: &[MappedFile], headers: Vec<Header>) -> Result<Self, CheckpointError> {
        let mut stored = Self { tensors: Vec::new(), by_name: HashMap::new() };
        let tensors = headers
            .into_iter()
            .enumerate()
            .flat_map(|(file, header)| header.tensors.into_iter().map(move |tensor| (file, tensor)));
        for (file, tensor) in tensors {
            if let Some(first) = stored.by_name.insert(tensor.name.clone(), stored.tensors.len()) {
                let path = |file: usize| files[file].path().to_owned();
                let (first, second) = (path(stored.tensors[first].0), path(file));
                return Err(CheckpointError::TwoFiles { tensor: printable(&tensor.name), first, second });
            }
            stored.tensors.push((file, tensor));
        }
        Ok(stored)
    }

    fn check_index(&self, files: &[MappedFile], names: &[String], index: &Index) -> Result<(), CheckpointError> {
        let indexed: HashMap<&str, &str> =
            index.weight_map.iter().map(|(tensor, file)| (tensor.as_str(), file.as_str())).collect();
        for (file, HeaderTensor { name, .. }) in &self.tensors {
            let (tensor, path) = (|| printable(name), || files[*file].path().to_owned());
            match indexed.get(name.as_str()) {
                None => return Err(CheckpointError::NotIndexed { tensor: tensor(), path: path() }),
                Some(&expected) if expected != names[*file] => {
                    return Err(CheckpointError::Misplaced {
                        tensor: tensor(),
                        path: path(),
                        expected: printable(expected),
                    });
                }
                Some(_) => {}
            }
        }
        let absent = index.weight_map.iter().find(|(tensor, _)| !self.by_name.contains_key(tensor));
        absent.map_or(Ok(()), |(tensor, file)| {
            let holder =
                names.iter().position(|name| name == file).expect("the layout lists every file that the index names");
            Err(CheckpointError::IndexedAbsent { tensor: printable(tensor), path: files[holder].path().to_owned() })
        })
    }

    /// Matches the stored tensors with those that the model has.
    fn check_model(
        self, dir: &Path, config: &str, files: &[MappedFile], spec: &ModelSpec,
    ) -> Result<(TensorTable, Vec<Place>), CheckpointError> {
        let config = || config.to_owned();
        let (num_layers, num_tensors) = (spec.num_layers + spec.vision.num_layers, self.tensors.len());
        if num_layers > num_tensors {
            // Said before the list of expected tensors is made: a hostile configuration could make that list huge.
            return Err(CheckpointError::LayerCount { config: config(), num_layers, dir: dir.to_owned(), num_tensors });
        }
        let expected = tensor_inventory(spec);
        self.check_names(dir, config, files, &expected)?;
        let mut tensors = Vec::with_capacity(expected.len());
        let mut places = Vec::with_capacity(expected.len());
        for spec in expected {
            let Some(&index) = self.by_name.get(&spec.name) else { continue };
            let (file, HeaderTensor { dtype, shape, file_range, .. }) = &self.tensors[index];
            if *shape != spec.shape {
                let path = files[*file].path().to_owned();
                let (found, expected) = (shape.clone(), spec.shape);
                return Err(CheckpointError::Shape { tensor: spec.name, path, found, expected, config: config() });
            }
            places.push(Place { file: *file, range: file_range.start as usize..file_range.end as usize });
            tensors.push(TensorInfo { spec, dtype: *dtype });
        }
        Ok((TensorTable::new(tensors), places))
    }

    /// Checks that every tensor of the model is stored, and no other. Optional ones are there in all layers or in none.
    fn check_names(
        &self, dir: &Path, config: impl Fn() -> String, files: &[MappedFile], expected: &[TensorSpec],
    ) -> Result<(), CheckpointError> {
        let known: HashSet<&str> = expected.iter().map(|tensor| tensor.name.as_str()).collect();
        let mut unexpected = self.tensors.iter().filter(|(_, tensor)| !known.contains(tensor.name.as_str()));
        if let Some((file, tensor)) = unexpected.next() {
            let (tensor, path) = (printable(&tensor.name), files[*file].path().to_owned());
            return Err(CheckpointError::Unexpected { tensor, num_others: unexpected.count(), path, config: config() });
        }
        let stored = |tensor: &&TensorSpec| self.by_name.contains_key(&tensor.name);
        let stores_optional = expected.iter().filter(|tensor| tensor.optional).any(|tensor| stored(&tensor));
        let mut missing = expected.iter().filter(|tensor| !stored(tensor) && (stores_optional || !tensor.optional));
        missing.next().map_or(Ok(()), |first| {
            let (tensor, num_others) = (first.name.clone(), missing.count());
            Err(CheckpointError::Missing { tensor, num_others, dir: dir.to_owned(), config: config() })
        })
    }
}

fn notices(layout: &Layout, spec: &ModelSpec, table: &TensorTable) -> Vec<Notice> {
    let mut notices = Vec::new();
    if spec.num_layers > 0 && !table.all().iter().any(|tensor| tensor.spec.optional) {
        notices.push(Notice::NoInvFreq);
    }
    let found_bytes = table.total_bytes();
    if let Some(stated_bytes) =
        layout.index.as_ref().and_then(|index| index.total_size).filter(|&stated| stated != found_bytes)
    {
        notices.push(Notice::TotalSize { stated_bytes, found_bytes });
    }
    notices.extend(layout.unused.iter().map(|file| Notice::UnusedFile { file: printable(file) }));
    notices
}
