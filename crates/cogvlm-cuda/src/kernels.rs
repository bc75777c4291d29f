//! The embedded kernels.

// `MODULES`: name and fat binary of every `kernels/NAME.cu`.
include!(concat!(env!("OUT_DIR"), "/modules.rs"));

/// The least CUDA version whose drivers load the embedded machine code, as the driver numbers it: 13.0's compiler makes
/// code for drivers from 13.0 on, 12's for those of 12.
pub(crate) const CUDA_VERSION: i32 = 12040;

/// Whether kernels were compiled into this executable.
pub fn is_built_in() -> bool {
    !MODULES.is_empty()
}
