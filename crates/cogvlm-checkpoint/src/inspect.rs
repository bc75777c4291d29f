//! What a checkpoint holds, from its headers alone.

use std::collections::BTreeMap;
use std::path::PathBuf;

use cogvlm_core::{DType, Template};
use serde::Serialize;

use crate::checkpoint::{Checkpoint, Notice};
use crate::table::TensorInfo;

/// A checkpoint that passed every check of [`Checkpoint::open`], summed up.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    /// The directory.
    pub dir: PathBuf,
    /// The model.
    pub config: ConfigSummary,
    /// Tensors.
    pub num_tensors: usize,
    /// Elements of all parameters; `rotary_emb.inv_freq` is a buffer and does not count.
    pub num_parameters: u64,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
    /// Bytes of all files, headers included.
    pub file_bytes: u64,
    /// Per element type, how much is stored in it.
    pub dtypes: BTreeMap<DType, DTypeCount>,
    /// Whether `rotary_emb.inv_freq` is stored.
    pub stores_inv_freq: bool,
    /// The weight files, by name.
    pub files: Vec<FileReport>,
    /// What is legal and still worth knowing.
    pub notices: Vec<Notice>,
}

/// The sizes that tell one model from another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ConfigSummary {
    /// Width of the decoder.
    pub hidden_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Width of the ViT.
    pub vision_hidden_size: usize,
    /// ViT layers.
    pub vision_num_layers: usize,
    /// Side of the input image in pixels.
    pub image_size: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Prompt template used by default.
    pub template: Template,
}

/// Tensors of one kind, and their bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct DTypeCount {
    /// Tensors.
    pub num_tensors: usize,
    /// Their bytes.
    pub tensor_bytes: u64,
}

/// One weight file.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FileReport {
    /// Its name.
    pub name: String,
    /// Its size, header included.
    pub file_bytes: u64,
    /// The tensors in it.
    pub num_tensors: usize,
    /// Their bytes.
    pub tensor_bytes: u64,
}

/// Sums up an open checkpoint. Reads no data.
pub fn inspect(checkpoint: &Checkpoint) -> Inspection {
    let tensors = checkpoint.tensors();
    let mut dtypes: BTreeMap<DType, DTypeCount> = BTreeMap::new();
    for tensor in tensors {
        let count = dtypes.entry(tensor.dtype).or_default();
        count.num_tensors += 1;
        count.tensor_bytes += tensor.num_bytes() as u64;
    }
    let files: Vec<FileReport> = checkpoint.files().iter().map(|file| file_report(checkpoint, file)).collect();
    let is_parameter = |tensor: &&TensorInfo| !tensor.spec.optional;
    let spec = checkpoint.spec();
    Inspection {
        dir: checkpoint.dir().to_owned(),
        config: ConfigSummary {
            hidden_size: spec.hidden_size,
            num_layers: spec.num_layers,
            vision_hidden_size: spec.vision.hidden_size,
            vision_num_layers: spec.vision.num_layers,
            image_size: spec.vision.image_size,
            vocab_size: spec.vocab_size,
            template: spec.template,
        },
        num_tensors: tensors.len(),
        num_parameters: tensors.iter().filter(is_parameter).map(|tensor| tensor.spec.num_elements() as u64).sum(),
        tensor_bytes: checkpoint.table().total_bytes(),
        file_bytes: files.iter().map(|file| file.file_bytes).sum(),
        dtypes,
        stores_inv_freq: tensors.iter().any(|tensor| tensor.spec.optional),
        files,
        notices: checkpoint.notices().to_vec(),
    }
}

fn file_report(checkpoint: &Checkpoint, file: &crate::MappedFile) -> FileReport {
    let in_file = (0..checkpoint.tensors().len())
        .map(|index| checkpoint.tensor_at(index))
        .filter(|tensor| std::ptr::eq(tensor.file(), file));
    let sizes: Vec<u64> = in_file.map(|tensor| tensor.info().num_bytes() as u64).collect();
    let name = file.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
    FileReport { name, file_bytes: file.num_bytes(), num_tensors: sizes.len(), tensor_bytes: sizes.iter().sum() }
}
