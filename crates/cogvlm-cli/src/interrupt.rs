//! Ctrl-C: commands end within a second, and nothing half-written stays behind.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cogvlm_cluster::end_process;

/// Set once the user wants the program to end.
pub(crate) static CANCELLED: AtomicBool = AtomicBool::new(false);

/// Files to remove if the program ends now.
static PARTIAL: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// What shells expect of an interrupted program.
pub(crate) const EXIT_CODE: u8 = 130;

/// How long commands have to end by themselves after Ctrl-C.
const GRACE: Duration = Duration::from_millis(600);

/// Installs the handler: it sets [`CANCELLED`], waits a little, then removes partial files and ends the process with
/// [`EXIT_CODE`].
pub(crate) fn install() {
    let handler = || {
        if !CANCELLED.swap(true, Ordering::SeqCst) {
            let end_now = || {
                remove_partial();
                crate::output::note("interrupted");
                end(EXIT_CODE.into());
            };
            let end_soon = move || {
                std::thread::sleep(GRACE);
                end_now();
            };
            if std::thread::Builder::new().spawn(end_soon).is_err() {
                end_now();
            }
        }
    };
    // Without a handler Ctrl-C still ends the process; only partial files may stay.
    drop(ctrlc::set_handler(handler));
}

/// Whether the user wants the program to end.
pub(crate) fn requested() -> bool {
    CANCELLED.load(Ordering::SeqCst)
}

/// Registers a file for removal: on Ctrl-C, and when the guard is dropped before it is renamed.
pub(crate) fn remove_on_exit(path: &Path) -> PartialFile {
    partial_files().push(path.to_owned());
    PartialFile(path.to_owned())
}

/// See [`remove_on_exit`].
pub(crate) struct PartialFile(PathBuf);

impl PartialFile {
    /// The file is complete: gives it its name.
    pub(crate) fn rename_to(self, path: &Path) -> std::io::Result<()> {
        std::fs::rename(&self.0, path)
    }
}

impl Drop for PartialFile {
    fn drop(&mut self) {
        let mut files = partial_files();
        files.retain(|path| *path != self.0);
        // Absent where it has been renamed.
        drop(std::fs::remove_file(&self.0));
    }
}

fn partial_files() -> MutexGuard<'static, Vec<PathBuf>> {
    PARTIAL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends the program when its reader has gone away.
pub(crate) fn exit_quietly() -> ! {
    remove_partial();
    end(0)
}

fn remove_partial() {
    for path in partial_files().drain(..) {
        drop(std::fs::remove_file(path));
    }
}

/// The main thread may be deep in a computation that nothing else ends in time, and libraries with it.
fn end(code: i32) -> ! {
    end_process(code)
}
