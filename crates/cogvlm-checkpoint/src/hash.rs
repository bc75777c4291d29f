//! SHA-256 of weights.

use std::path::PathBuf;

use rayon::prelude::*;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::checkpoint::Checkpoint;
use crate::error::CheckpointError;
use crate::monitor::{Meter, Monitor};
use crate::source::{ModelSource, Piece, pieces};

/// Bytes read and hashed at a time: milliseconds of work between two looks at the cancel flag.
const CHUNK_BYTES: usize = 2 << 20;
/// Bytes that [`digest`] reads ahead of its hash.
const BATCH_BYTES: usize = 32 << 20;

/// SHA-256 of a file: what `sha256sum` prints, and what the Hub shows for a large file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileHash {
    /// The file.
    pub path: PathBuf,
    /// Its size.
    pub num_bytes: u64,
    /// In hexadecimal.
    pub sha256: String,
}

/// SHA-256 of a tensor's stored bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TensorHash {
    /// The tensor.
    pub name: String,
    /// In hexadecimal.
    pub sha256: String,
}

/// The hashes of all tensors, and one hash of those: equal for two sources iff all tensors are, however they are cut into
/// files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TensorHashes {
    /// In checkpoint order.
    pub tensors: Vec<TensorHash>,
    /// SHA-256 over a line `SHA256  NAME` for each tensor in checkpoint order: what `sha256sum` makes of that list.
    pub combined: String,
}

/// Hashes every file of a checkpoint, several at once.
///
/// # Errors
/// [`CheckpointError::Changed`], [`CheckpointError::Io`], [`CheckpointError::Cancelled`].
pub fn hash_files(checkpoint: &Checkpoint, monitor: &Monitor<'_>) -> Result<Vec<FileHash>, CheckpointError> {
    let meter = Meter::new(monitor, checkpoint.files().iter().map(|file| file.num_bytes()).sum());
    let hash_file = |file: &crate::MappedFile| {
        let mut hasher = Sha256::new();
        let mut chunk = vec![0; CHUNK_BYTES];
        for offset in (0..file.num_bytes()).step_by(CHUNK_BYTES) {
            meter.check()?;
            let chunk = &mut chunk[..CHUNK_BYTES.min((file.num_bytes() - offset) as usize)];
            file.read_at(offset, chunk)?;
            hasher.update(&chunk);
            meter.advance(chunk.len());
        }
        file.verify_unchanged()?;
        Ok(FileHash { path: file.path().to_owned(), num_bytes: file.num_bytes(), sha256: hex(hasher) })
    };
    checkpoint.files().par_iter().with_max_len(1).map(hash_file).collect()
}

/// Hashes every tensor, as many at once as there are cores: the fast way to compare two models.
///
/// # Errors
/// As [`hash_files`].
pub fn hash_tensors(source: &ModelSource, monitor: &Monitor<'_>) -> Result<TensorHashes, CheckpointError> {
    let meter = Meter::new(monitor, source.total_bytes());
    let hash_tensor = |index: usize| {
        let info = &source.tensors()[index];
        let mut hasher = Sha256::new();
        let mut chunk = vec![0; CHUNK_BYTES.min(info.num_bytes())];
        for piece in pieces(std::slice::from_ref(info), CHUNK_BYTES) {
            meter.check()?;
            let chunk = &mut chunk[..piece.num_bytes];
            source.read_elements(index, piece.elements, chunk)?;
            hasher.update(&chunk);
            meter.advance(chunk.len());
        }
        Ok(TensorHash { name: info.spec.name.clone(), sha256: hex(hasher) })
    };
    let indices = (0..source.tensors().len()).into_par_iter().with_max_len(1);
    let tensors: Vec<TensorHash> = indices.map(hash_tensor).collect::<Result<_, CheckpointError>>()?;
    source.verify_unchanged()?;
    let mut combined = Sha256::new();
    for TensorHash { name, sha256 } in &tensors {
        combined.update(format!("{sha256}  {name}\n"));
    }
    Ok(TensorHashes { tensors, combined: hex(combined) })
}

/// The digest of a model: SHA-256 over, for every tensor in checkpoint order, its name, a newline and its stored bytes.
/// One stream, so one core hashes (with SHA instructions 1.5 to 2 GB/s) while the others read or make what comes next.
///
/// # Errors
/// As [`hash_files`].
pub fn digest(source: &ModelSource, monitor: &Monitor<'_>) -> Result<String, CheckpointError> {
    let meter = Meter::new(monitor, source.total_bytes());
    let mut batches = Batches { pieces: pieces(source.tensors(), CHUNK_BYTES).collect(), next: 0 };
    let mut hasher = Sha256::new();
    let mut current = Batch::default();
    let mut ahead = Batch::default();
    current.fill(batches.take(), source, &meter)?;
    while !current.pieces.is_empty() {
        let next = batches.take();
        let (filled, ()) =
            rayon::join(|| ahead.fill(next, source, &meter), || current.hash(source, &mut hasher, &meter));
        filled?;
        std::mem::swap(&mut current, &mut ahead);
    }
    source.verify_unchanged()?;
    Ok(hex(hasher))
}

struct Batches {
    pieces: Vec<Piece>,
    next: usize,
}

impl Batches {
    /// The next pieces, together not above [`BATCH_BYTES`]; none at the end.
    fn take(&mut self) -> Vec<Piece> {
        let rest = &self.pieces[self.next..];
        let end_bytes = rest.iter().scan(0, |sum, piece| {
            *sum += piece.num_bytes;
            Some(*sum)
        });
        let taken = rest[..end_bytes.take_while(|&bytes| bytes <= BATCH_BYTES).count()].to_vec();
        self.next += taken.len();
        taken
    }
}

#[derive(Default)]
struct Batch {
    pieces: Vec<Piece>,
    bytes: Vec<u8>,
}

impl Batch {
    fn fill(&mut self, pieces: Vec<Piece>, source: &ModelSource, meter: &Meter<'_>) -> Result<(), CheckpointError> {
        self.bytes.resize(pieces.iter().map(|piece| piece.num_bytes).sum(), 0);
        let mut rest = self.bytes.as_mut_slice();
        let mut targets = Vec::with_capacity(pieces.len());
        for piece in &pieces {
            let (target, next) = rest.split_at_mut(piece.num_bytes);
            targets.push((piece, target));
            rest = next;
        }
        let read = |(piece, target): (&Piece, &mut [u8])| {
            meter.check()?;
            source.read_elements(piece.tensor, piece.elements.clone(), target)
        };
        targets.into_par_iter().with_max_len(1).try_for_each(read)?;
        self.pieces = pieces;
        Ok(())
    }

    fn hash(&self, source: &ModelSource, hasher: &mut Sha256, meter: &Meter<'_>) {
        let mut rest = self.bytes.as_slice();
        for piece in &self.pieces {
            if piece.elements.start == 0 {
                hasher.update(&source.tensors()[piece.tensor].spec.name);
                hasher.update("\n");
            }
            let (bytes, next) = rest.split_at(piece.num_bytes);
            hasher.update(bytes);
            meter.advance(bytes.len());
            rest = next;
        }
    }
}

fn hex(hasher: Sha256) -> String {
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
