//! Ctrl-C: commands end within a second, and nothing half-written stays behind.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Set once the user wants the program to end.
pub(crate) static CANCELLED: AtomicBool = AtomicBool::new(false);

/// Files to remove if the program ends now.
static PARTIAL: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// How long commands have to end by themselves after Ctrl-C.
const GRACE: Duration = Duration::from_millis(600);

/// Installs the handler: it sets [`CANCELLED`], waits a little, then removes partial files and ends the process with
/// 130, as shells expect of an interrupted program.
pub(crate) fn install() {
    let handler = || {
        if !CANCELLED.swap(true, Ordering::SeqCst) {
            std::thread::spawn(|| {
                std::thread::sleep(GRACE);
                remove_partial();
                crate::output::note("interrupted");
                end(130);
            });
        }
    };
    // Without a handler Ctrl-C still ends the process; only partial files may stay.
    drop(ctrlc::set_handler(handler));
}

/// Registers a file for removal on Ctrl-C until the guard is dropped.
pub(crate) fn remove_on_exit(path: &Path) -> PartialFile {
    PARTIAL.lock().unwrap_or_else(PoisonError::into_inner).push(path.to_owned());
    PartialFile(path.to_owned())
}

/// See [`remove_on_exit`].
pub(crate) struct PartialFile(PathBuf);

impl Drop for PartialFile {
    fn drop(&mut self) {
        PARTIAL.lock().unwrap_or_else(PoisonError::into_inner).retain(|path| *path != self.0);
    }
}

/// Ends the program when its reader has gone away.
pub(crate) fn exit_quietly() -> ! {
    remove_partial();
    end(0)
}

fn remove_partial() {
    for path in PARTIAL.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        drop(std::fs::remove_file(path));
    }
}

#[expect(clippy::exit, reason = "the main thread may be deep in a computation that nothing else ends in time")]
fn end(code: i32) -> ! {
    std::process::exit(code)
}
