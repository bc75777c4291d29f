//! Where the weights come from: a checkpoint on disk, mapped and checked before a byte of it is used, or a synthetic
//! model that is made tensor by tensor.
//!
//! | to | use |
//! |---|---|
//! | open `DIR` or `NAME@SEED` and read tensors from it | [`ModelSource`] |
//! | open a directory in Hugging Face layout, map its tensors | [`Checkpoint`], [`MappedTensor`] |
//! | make a synthetic model, or write it as a checkpoint | [`SyntheticModel`], [`write_checkpoint`] |
//! | tell what a checkpoint holds | [`inspect()`] |
//! | hash weights | [`hash_files`], [`hash_tensors`], [`digest`] |
//! | read a safetensors header | [`parse_header`] |
//!
//! ```
//! use cogvlm_checkpoint::ModelSource;
//!
//! let model = ModelSource::open("tiny@11")?;
//! let norm = model.info("model.norm.weight")?;
//! assert_eq!((norm.spec.shape.as_slice(), norm.num_bytes()), (&[128][..], 256));
//! let mut bytes = vec![0; norm.num_bytes()];
//! model.read_into("model.norm.weight", &mut bytes)?;
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```
//!
//! # The one invariant that code cannot check
//! A checkpoint is mapped, so nobody may rewrite or truncate its files while it is open: the bytes of a
//! [`MappedTensor`] would change under their reader, and reading past the new end of a file ends the process with
//! `SIGBUS`. Replacing a file (writing another one and renaming it) is harmless. Whoever copies weights calls
//! [`Checkpoint::verify_unchanged`] before and after, and gets an error that names the file; [`ModelSource::read_into`]
//! does so itself, and reads through the file descriptor, where a truncated file is an error and not a signal.
#![deny(unsafe_code)]

mod checkpoint;
mod error;
mod hash;
mod header;
mod inspect;
mod layout;
mod mapped_file;
#[expect(unsafe_code, reason = "mapping a file and dropping its pages have no safe interface")]
mod mapping;
mod monitor;
mod source;
mod synth;
mod table;

pub use checkpoint::{Checkpoint, MappedTensor, Notice, read_config};
pub use error::CheckpointError;
pub use hash::{FileHash, TensorHash, TensorHashes, digest, hash_files, hash_tensors};
pub use header::{ForeignFile, Header, HeaderError, HeaderTensor, parse_header};
pub use inspect::{ConfigSummary, DTypeCount, FileReport, Inspection, inspect};
pub use mapped_file::MappedFile;
pub use mapping::Advice;
pub use monitor::{Cancelled, Monitor, Progress};
pub use source::{ModelSource, SourceError};
pub use synth::{
    DEFAULT_MAX_SHARD_BYTES, Rule, SynthError, SyntheticModel, Written, parse_shard_size, write_checkpoint,
};
pub use table::TensorInfo;
