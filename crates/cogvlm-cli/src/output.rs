//! Files that are there whole or not at all, and data on stdout.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::error::{CliError, CliResult};
use crate::interrupt::{self, PartialFile};

/// A file to be written when the work is done, opened before it begins: a bad name is found at once, not after an hour.
///
/// The bytes go to `NAME.partial` beside it, which is renamed when it is complete, and removed where it never is.
/// Devices and pipes are written as they are.
pub(crate) struct OutputFile {
    path: PathBuf,
    file: File,
    partial: Option<PartialFile>,
}

impl OutputFile {
    /// Opens what will become `path`.
    pub(crate) fn create(path: &Path) -> CliResult<Self> {
        let failed = |error: io::Error| cannot_write(path, error);
        let names_dir = path.is_dir() || path.as_os_str().as_encoded_bytes().ends_with(b"/");
        let name = path.file_name().filter(|_| !names_dir);
        let name = name.ok_or_else(|| failed(io::ErrorKind::IsADirectory.into()))?;
        if path.exists() && !path.is_file() {
            // Renaming would replace the device, not write to it.
            let file = File::options().write(true).open(path).map_err(failed)?;
            return Ok(Self { path: path.to_owned(), file, partial: None });
        }
        let mut partial_name = name.to_owned();
        partial_name.push(".partial");
        // Through a link, as every other program writes.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let partial = path.with_file_name(partial_name);
        let file = File::create(&partial).map_err(failed)?;
        Ok(Self { path, file, partial: Some(interrupt::remove_on_exit(&partial)) })
    }

    /// Writes all of it.
    pub(crate) fn write(mut self, bytes: &[u8]) -> CliResult {
        let written = self.file.write_all(bytes);
        let complete = match self.partial {
            None => written,
            Some(partial) => written.and_then(|()| self.file.sync_all()).and_then(|()| partial.rename_to(&self.path)),
        };
        complete.map_err(|error| cannot_write(&self.path, error))
    }
}

fn cannot_write(path: &Path, error: io::Error) -> CliError {
    CliError::new(format!("cannot write `{}`: {error}", path.display()))
}

/// Writes to stdout and flushes. A closed pipe ends the program quietly, as users of pipes expect.
pub(crate) fn print(text: &str) -> CliResult {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(|error| {
        if error.kind() == io::ErrorKind::BrokenPipe {
            interrupt::exit_quietly();
        }
        CliError::new(format!("cannot write to stdout: {error}"))
    })
}

/// [`print()`] with a line end.
pub(crate) fn print_line(text: &str) -> CliResult {
    print(&format!("{text}\n"))
}

/// Writes a line to stderr: progress, notices. Nobody minds if it is closed.
pub(crate) fn note(text: &str) {
    drop(writeln!(io::stderr(), "{text}"));
}
