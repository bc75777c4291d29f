//! Reading a file that is expected to be small, without trusting its size.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Why [`read`] gave up.
pub(crate) enum ReadError {
    Io(io::Error),
    /// The file is longer than the limit.
    TooLong,
}

/// The bytes of `file`, at most `limit_bytes` of them. Neither a wrong size in the directory entry nor an endless
/// device file makes it read further.
pub(crate) fn read(file: &Path, limit_bytes: u64) -> Result<Vec<u8>, ReadError> {
    let mut bytes = Vec::new();
    let read = File::open(file).and_then(|opened| opened.take(limit_bytes + 1).read_to_end(&mut bytes));
    match read {
        Ok(num_read) if num_read as u64 > limit_bytes => Err(ReadError::TooLong),
        Ok(_) => Ok(bytes),
        Err(error) => Err(ReadError::Io(error)),
    }
}
