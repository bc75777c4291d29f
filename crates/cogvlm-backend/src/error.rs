//! What can go wrong on a device.

use cogvlm_core::Device;
use cogvlm_core::memory::format_bytes;

/// Why the bytes of a weight could not be had from the host.
#[derive(Debug, thiserror::Error)]
#[error("cannot read `{tensor}`: {reason}")]
pub struct HostReadError {
    /// The tensor.
    pub tensor: String,
    /// What happened, with the file's name.
    pub reason: String,
}

/// Why a backend refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The device's arena is too small for a buffer.
    #[error(
        "{what} needs {} on device {device}, whose arena has {} of {} left",
        format_bytes(*requested), format_bytes(capacity - in_use), format_bytes(*capacity)
    )]
    OutOfMemory {
        /// The device.
        device: Device,
        /// What was to be allocated.
        what: String,
        /// Bytes asked for.
        requested: u64,
        /// Bytes taken already.
        in_use: u64,
        /// Size of the arena.
        capacity: u64,
    },
    /// Shapes of an operation's arguments do not fit together: a mistake of the caller.
    #[error("{op}: {argument} is {found:?}, the other arguments imply {expected}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The argument.
        argument: &'static str,
        /// Its shape.
        found: Vec<usize>,
        /// What would fit.
        expected: String,
    },
    /// The operation cannot be done on this device with these arguments.
    #[error("{op}: {reason}")]
    Unsupported {
        /// The operation.
        op: &'static str,
        /// Why.
        reason: String,
    },
    /// A weight could not be read from the host.
    #[error(transparent)]
    Host(#[from] HostReadError),
    /// The device cannot be used at all.
    #[error("{reason}")]
    Open {
        /// The device.
        device: Device,
        /// Why, with the device's name.
        reason: String,
        /// What to do about it.
        hint: Option<&'static str>,
    },
    /// The device or its driver failed.
    #[error("device {device}: {reason}")]
    Device {
        /// The device.
        device: Device,
        /// What it said.
        reason: String,
    },
}

impl BackendError {
    /// What to do, where that is known.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Open { hint, .. } => *hint,
            _ => None,
        }
    }
}
