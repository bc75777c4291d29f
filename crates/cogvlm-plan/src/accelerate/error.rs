//! What upstream refuses, under the name of the exception it raises.

use super::memory::DeviceKey;
use super::version::Version;

/// Why no map comes out. [`AccelerateError::exception`] names the exception that upstream raises in the same case.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AccelerateError {
    /// The release lacks an argument that the request gives.
    #[error("`{argument}` is unknown to accelerate {version}; leave it out, or plan for accelerate 1.15.0")]
    Unsupported {
        /// The argument.
        argument: &'static str,
        /// The release.
        version: Version,
    },
    /// Text that is no memory size.
    #[error("memory size `{text}` is not a {} number followed by GiB, MiB, KiB, GB, MB or KB", if *.zero_allowed { "non-negative" } else { "positive" })]
    MemorySize {
        /// The text.
        text: String,
        /// Whether the release takes a size of 0.
        zero_allowed: bool,
    },
    /// A memory size without end.
    #[error("memory size `{text}` is infinite; give a number, or leave the device's budget to `disk`")]
    InfiniteMemorySize {
        /// The text.
        text: String,
    },
    /// A key of the budgets that is no device.
    #[error("`{key}` is not a device: a budget is for a card (an integer), \"mps\", \"cpu\" or \"disk\"")]
    UnknownDevice {
        /// The key.
        key: String,
    },
    /// A budget that is neither bytes nor text.
    #[error("the budget of `{device}` is {found}, but it has to be a whole number of bytes or text like \"20GiB\"")]
    Budget {
        /// The device.
        device: String,
        /// What stands there.
        found: String,
    },
    /// An element type that does not exist.
    #[error("`{name}` is not an element type; PyTorch's names are meant, like `bfloat16`, or `int4`")]
    UnknownElementType {
        /// What was given.
        name: String,
    },
    /// An element type whose width the release cannot tell.
    #[error("accelerate {version} cannot size elements of type `{name}`")]
    ElementWidth {
        /// The type.
        name: &'static str,
        /// The release.
        version: Version,
    },
    /// A tied tensor whose partner's module is no longer, or not yet, in the queue.
    #[error("`{entry}` shares a tensor with `{partner}`, which upstream does not find among the modules left to place")]
    PartnerNotFound {
        /// The module or tensor that was to be placed.
        entry: String,
        /// The other name of the shared tensor.
        partner: String,
    },
    /// A buffer of the root that does not fit.
    #[error(
        "root buffer `{buffer}` does not fit on `{device}`, which accelerate 0.24.1 cannot handle; raise that budget"
    )]
    RootBuffer {
        /// The buffer.
        buffer: String,
        /// The device.
        device: DeviceKey,
    },
    /// A tied tensor of the root whose group does not fit.
    #[error(
        "root tensor `{tensor}` is tied to `{entry}` and both do not fit on `{device}`, which accelerate 0.24.1 cannot handle"
    )]
    TiedRootTensor {
        /// The root's tensor.
        tensor: String,
        /// The module that shares it.
        entry: String,
        /// The device.
        device: DeviceKey,
    },
    /// A fallback search in fractions of bytes.
    #[error(
        "the fallback search on `{device}` has a limit of {limit} bytes, a fraction in upstream's arithmetic, which it cannot handle"
    )]
    FractionalLimit {
        /// The device.
        device: DeviceKey,
        /// The limit.
        limit: String,
    },
    /// `low_zero` with ids that have gaps.
    #[error("balancing with `low_zero` needs a budget for card {id}: ids have to be 0, 1, 2 and so on")]
    LowZeroIds {
        /// The missing card.
        id: i64,
    },
    /// Budgets that cannot be balanced.
    #[error("budgets with the key `{key}` cannot be balanced; leave it out")]
    NotBalanceable {
        /// The key.
        key: DeviceKey,
    },
    /// Upstream's fallback goes round in circles.
    #[error("the fallback search finds the same modules again and again; upstream does not end here")]
    Endless,
    /// A bound on the work was reached.
    #[error("planning this tree takes more than {limit} steps; it has too many modules, tied tensors or devices")]
    TooMuchWork {
        /// The bound.
        limit: u64,
    },
}

impl AccelerateError {
    /// Name of the Python exception that upstream raises.
    pub const fn exception(&self) -> &'static str {
        match self {
            Self::Unsupported { .. } | Self::Budget { .. } => "TypeError",
            Self::MemorySize { .. } | Self::UnknownDevice { .. } | Self::ElementWidth { .. } => "ValueError",
            Self::InfiniteMemorySize { .. } => "OverflowError",
            Self::UnknownElementType { .. }
            | Self::RootBuffer { .. }
            | Self::TiedRootTensor { .. }
            | Self::FractionalLimit { .. } => "AttributeError",
            Self::PartnerNotFound { .. } => "IndexError",
            Self::LowZeroIds { .. } => "KeyError",
            Self::NotBalanceable { .. } | Self::Endless | Self::TooMuchWork { .. } => "RuntimeError",
        }
    }
}
