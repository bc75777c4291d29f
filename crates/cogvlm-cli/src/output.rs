//! Files that are there whole or not at all, and data on stdout.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::error::{CliError, CliResult};
use crate::interrupt;

/// Writes `bytes` to `path` through a file beside it that is renamed when it is complete.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> CliResult {
    let failed = |error: io::Error| CliError::new(format!("cannot write `{}`: {error}", path.display()));
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let guard = interrupt::remove_on_exit(&partial);
    let written = File::create(&partial).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    let renamed = written.and_then(|()| std::fs::rename(&partial, path));
    if renamed.is_err() {
        drop(std::fs::remove_file(&partial));
    }
    drop(guard);
    renamed.map_err(failed)
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
