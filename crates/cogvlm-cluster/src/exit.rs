//! The end of a process that may be in the middle of anything.

use std::ffi::c_int;

unsafe extern "C" {
    safe fn _exit(code: c_int) -> !;
}

/// Ends the process at once. What libraries would still do at an orderly end is left out: those whose threads are at work,
/// as NCCL's are, may crash when their data is taken away under them. What was written and not flushed is lost.
pub fn end_process(code: i32) -> ! {
    _exit(code)
}
