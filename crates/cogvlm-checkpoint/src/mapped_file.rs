//! One weight file: open, mapped, its header checked.

use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::error::CheckpointError;
use crate::header::{Header, HeaderError, LENGTH_BYTES, MAX_HEADER_BYTES, parse_header};
use crate::layout::open_regular;
use crate::mapping::{Advice, Mapping};

/// A safetensors file, mapped read-only and shared (`MAP_SHARED`), so that all processes of a machine share its pages
/// and CUDA can register them in place.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    file: File,
    mapping: Mapping,
    stamp: Stamp,
}

/// What tells that a file was written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    num_bytes: u64,
    modified_ns: i128,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        let modified_ns = i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
        Self { num_bytes: metadata.len(), modified_ns }
    }
}

impl MappedFile {
    /// Opens and maps the file, and checks its header against its size.
    pub(crate) fn open(path: &Path) -> Result<(Self, Header), CheckpointError> {
        let path_buf = || path.to_owned();
        let io_error = |source| CheckpointError::Io { path: path_buf(), source };
        let (file, metadata) = open_regular(path, "download it")?;
        let stamp = Stamp::of(&metadata);
        let start = read_start(&file, stamp.num_bytes).map_err(io_error)?;
        let header = parse_header(&start, stamp.num_bytes).map_err(|source| match source {
            HeaderError::Foreign(kind) => CheckpointError::Foreign { path: path_buf(), kind },
            source => CheckpointError::Header { path: path_buf(), source },
        })?;
        let mapping = Mapping::new(&file, stamp.num_bytes as usize).map_err(io_error)?;
        Ok((Self { path: path_buf(), file, mapping, stamp }, header))
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size of the file.
    pub fn num_bytes(&self) -> u64 {
        self.stamp.num_bytes
    }

    /// The whole mapped file, header included. It begins at a page boundary.
    pub fn bytes(&self) -> &[u8] {
        self.mapping.bytes()
    }

    /// Reads `dst.len()` bytes at `offset` through the file descriptor: where the file was truncated, that is an error.
    ///
    /// # Errors
    /// [`CheckpointError::Changed`] where the file is shorter than it was, [`CheckpointError::Io`] otherwise.
    pub fn read_at(&self, offset: u64, dst: &mut [u8]) -> Result<(), CheckpointError> {
        self.file.read_exact_at(dst, offset).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => CheckpointError::Changed { path: self.path.clone() },
            _ => CheckpointError::Io { path: self.path.clone(), source },
        })
    }

    /// Tells the kernel how bytes `range` of the file will be used; widened to whole pages.
    ///
    /// # Errors
    /// [`CheckpointError::Io`] where the range lies outside the file or the kernel does not know the advice.
    pub fn advise(&self, range: Range<usize>, advice: Advice) -> Result<(), CheckpointError> {
        let outside = range.start > range.end || range.end > self.bytes().len();
        let result = if outside { Err(io::ErrorKind::InvalidInput.into()) } else { self.mapping.advise(range, advice) };
        result.map_err(|source| CheckpointError::Io { path: self.path.clone(), source })
    }

    /// Checks that size and modification time are those of the moment when the file was opened.
    ///
    /// # Errors
    /// [`CheckpointError::Changed`] where they are not.
    pub fn verify_unchanged(&self) -> Result<(), CheckpointError> {
        let metadata =
            self.file.metadata().map_err(|source| CheckpointError::Io { path: self.path.clone(), source })?;
        if Stamp::of(&metadata) == self.stamp {
            Ok(())
        } else {
            Err(CheckpointError::Changed { path: self.path.clone() })
        }
    }
}

/// Length and header, or the first bytes where the length cannot be right.
fn read_start(file: &File, file_bytes: u64) -> io::Result<Vec<u8>> {
    const ENOUGH_TO_RECOGNISE: u64 = 64;
    let mut length = [0; LENGTH_BYTES as usize];
    if file_bytes < LENGTH_BYTES {
        let mut start = vec![0; file_bytes as usize];
        file.read_exact_at(&mut start, 0)?;
        return Ok(start);
    }
    file.read_exact_at(&mut length, 0)?;
    let header_bytes = u64::from_le_bytes(length);
    let wanted = if header_bytes > MAX_HEADER_BYTES { ENOUGH_TO_RECOGNISE } else { LENGTH_BYTES + header_bytes };
    let mut start = vec![0; wanted.min(file_bytes) as usize];
    file.read_exact_at(&mut start, 0)?;
    Ok(start)
}
