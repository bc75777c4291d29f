//! One door to weights, whether they lie in files or are made where they are needed.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use cogvlm_core::{ModelConfig, ModelSpec};
use rayon::prelude::*;

use crate::checkpoint::{Checkpoint, MappedTensor};
use crate::error::CheckpointError;
use crate::synth::{Rule, SynthError, SyntheticModel};
use crate::table::{TensorInfo, TensorTable};

/// Bytes that one thread reads at a time in [`ModelSource::read_into`].
const CHUNK_BYTES: usize = 4 << 20;

/// A model's configuration and weights. Clones are cheap.
#[derive(Debug, Clone)]
pub enum ModelSource {
    /// Files.
    Checkpoint(Checkpoint),
    /// Synthetic weights, made on demand.
    Synthetic(Arc<SyntheticModel>),
}

/// Why a `MODEL` argument cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// As a directory.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// As `NAME@SEED`.
    #[error(transparent)]
    Synthetic(#[from] SynthError),
}

impl ModelSource {
    /// Opens what a user calls `MODEL`: `NAME@SEED` where NAME is a built-in configuration or a `.json` file with one,
    /// else a directory. (A directory of such a name is opened as `./NAME@SEED`.)
    ///
    /// # Errors
    /// As [`SyntheticModel::parse`] and [`Checkpoint::open`].
    pub fn open(model: &str) -> Result<Self, SourceError> {
        let name = model.rsplit_once('@').map_or(model, |(name, _)| name);
        let path = Path::new(model);
        let names_config = ModelConfig::built_in(name).is_some() || name.ends_with(".json");
        let misspelt = !path.exists() && model.contains('@') && !model.contains('/');
        if misspelt || names_config && (model.contains('@') || !path.exists()) {
            return Ok(Self::Synthetic(Arc::new(SyntheticModel::parse(model)?)));
        }
        Ok(Self::Checkpoint(Checkpoint::open(path)?))
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.config(),
            Self::Synthetic(model) => model.config(),
        }
    }

    /// The sizes of the model.
    pub fn spec(&self) -> &ModelSpec {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.spec(),
            Self::Synthetic(model) => model.spec(),
        }
    }

    /// Every tensor, in checkpoint order; `rotary_emb.inv_freq` is left out where a checkpoint does not store it.
    pub fn tensors(&self) -> &[TensorInfo] {
        self.table().all()
    }

    /// What the tensor called `name` is, or `None` where the model stores no such tensor.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.table().index_of(name).ok().map(|index| &self.tensors()[index])
    }

    /// What the tensor called `name` is.
    ///
    /// # Errors
    /// [`CheckpointError::UnknownTensor`].
    pub fn info(&self, name: &str) -> Result<&TensorInfo, CheckpointError> {
        self.table().index_of(name).map(|index| &self.tensors()[index])
    }

    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.table().total_bytes()
    }

    /// The tensor's bytes where they lie in a mapped file; `None` where they have to be made, or the name is unknown.
    pub fn mapped(&self, name: &str) -> Option<MappedTensor> {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.tensor(name).ok(),
            Self::Synthetic(_) => None,
        }
    }

    /// How the tensor's elements are made; `None` where they lie in a file, or the name is unknown.
    pub fn rule(&self, name: &str) -> Option<&Rule> {
        match self {
            Self::Checkpoint(_) => None,
            Self::Synthetic(model) => self.table().index_of(name).ok().map(|index| model.rule(index)),
        }
    }

    /// Writes the whole tensor to `dst`, in its stored type, on all threads of the current rayon pool.
    ///
    /// # Errors
    /// [`CheckpointError::Buffer`] where `dst` has not the tensor's size, [`CheckpointError::Changed`] where the file
    /// was written to since it was opened, [`CheckpointError::UnknownTensor`], [`CheckpointError::Io`]; `dst` then
    /// holds anything.
    pub fn read_into(&self, name: &str, dst: &mut [u8]) -> Result<(), CheckpointError> {
        let index = self.table().index_of(name)?;
        let info = &self.tensors()[index];
        check_range(info, &(0..info.spec.num_elements()), dst)?;
        let chunk_elements = CHUNK_BYTES / info.dtype.size_bytes();
        dst.par_chunks_mut(CHUNK_BYTES).enumerate().try_for_each(|(chunk, dst)| {
            let first = chunk * chunk_elements;
            self.read_elements(index, first..first + dst.len() / info.dtype.size_bytes(), dst)
        })?;
        self.verify_file(index)
    }

    /// Writes elements `elements` (flat, row-major) of the tensor to `dst`, in its stored type, on this thread.
    ///
    /// # Errors
    /// As [`ModelSource::read_into`].
    pub fn read_range_into(&self, name: &str, elements: Range<usize>, dst: &mut [u8]) -> Result<(), CheckpointError> {
        let index = self.table().index_of(name)?;
        check_range(&self.tensors()[index], &elements, dst)?;
        self.read_elements(index, elements, dst)?;
        self.verify_file(index)
    }

    /// Checks that no file changed since it was opened.
    ///
    /// # Errors
    /// [`CheckpointError::Changed`] with the file.
    pub fn verify_unchanged(&self) -> Result<(), CheckpointError> {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.verify_unchanged(),
            Self::Synthetic(_) => Ok(()),
        }
    }

    fn table(&self) -> &TensorTable {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.table(),
            Self::Synthetic(model) => model.table(),
        }
    }

    /// Elements of tensor `index` of the table; the range fits tensor and `dst`.
    pub(crate) fn read_elements(
        &self, index: usize, elements: Range<usize>, dst: &mut [u8],
    ) -> Result<(), CheckpointError> {
        match self {
            Self::Checkpoint(checkpoint) => {
                let tensor = checkpoint.tensor_at(index);
                let offset = tensor.file_range().start + elements.start * tensor.dtype().size_bytes();
                tensor.file().read_at(offset as u64, dst)
            }
            Self::Synthetic(model) => {
                model.fill(index, elements, dst);
                Ok(())
            }
        }
    }

    fn verify_file(&self, index: usize) -> Result<(), CheckpointError> {
        match self {
            Self::Checkpoint(checkpoint) => checkpoint.tensor_at(index).file().verify_unchanged(),
            Self::Synthetic(_) => Ok(()),
        }
    }
}

fn check_range(info: &TensorInfo, elements: &Range<usize>, dst: &[u8]) -> Result<(), CheckpointError> {
    let num_elements = info.spec.num_elements();
    let inside = elements.start <= elements.end && elements.end <= num_elements;
    if inside && elements.len() * info.dtype.size_bytes() == dst.len() {
        return Ok(());
    }
    let tensor = info.spec.name.clone();
    Err(CheckpointError::Buffer {
        tensor,
        first: elements.start,
        end: elements.end,
        num_elements,
        buffer_bytes: dst.len(),
    })
}

/// Some elements of one tensor.
#[derive(Debug, Clone)]
pub(crate) struct Piece {
    /// Index in [`ModelSource::tensors`].
    pub(crate) tensor: usize,
    pub(crate) elements: Range<usize>,
    pub(crate) num_bytes: usize,
}

/// Cuts tensors into pieces of at most `max_bytes`, in order. An empty tensor is one empty piece.
pub(crate) fn pieces(tensors: &[TensorInfo], max_bytes: usize) -> impl Iterator<Item = Piece> {
    tensors.iter().enumerate().flat_map(move |(tensor, info)| {
        let size = info.dtype.size_bytes();
        let num_elements = info.spec.num_elements();
        let step = max_bytes / size;
        (0..num_elements.div_ceil(step).max(1)).map(move |piece| {
            let elements = piece * step..num_elements.min((piece + 1) * step);
            Piece { tensor, num_bytes: elements.len() * size, elements }
        })
    })
}
