//! Why CUDA cannot be used.

use cogvlm_backend::BackendError;
use cogvlm_core::Device;

/// Why CUDA cannot be used at all, or a device cannot be opened.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CudaError {
    /// The executable holds no kernels.
    #[error("this build has no CUDA kernels, since no nvcc was found when it was made")]
    NotBuiltIn,
    /// The driver's library cannot be loaded.
    #[error("the NVIDIA driver's library libcuda.so.1 cannot be loaded: {reason}")]
    NoDriver {
        /// What the loader said.
        reason: String,
    },
    /// The library is there, but lacks a function.
    #[error("{library} has no `{symbol}`: it is not a driver, or one that is too old")]
    NotADriver {
        /// The library.
        library: String,
        /// The function.
        symbol: String,
    },
    /// The driver is too old for the kernels.
    #[error("the NVIDIA driver supports CUDA {found}, but the kernels of this build need {needed}")]
    DriverTooOld {
        /// What it supports.
        found: String,
        /// What is needed.
        needed: String,
    },
    /// The driver does not start.
    #[error("the NVIDIA driver does not start: {reason}")]
    Init {
        /// What the driver said.
        reason: String,
        /// Its code.
        code: u32,
    },
    /// There is no device.
    #[error("the NVIDIA driver shows no GPU ({visible})")]
    NoDevices {
        /// How CUDA_VISIBLE_DEVICES is set.
        visible: String,
    },
    /// There is no such device.
    #[error("there is no GPU {ordinal}: the NVIDIA driver shows {count} ({visible})")]
    NoDevice {
        /// The number asked for.
        ordinal: u32,
        /// Devices that there are.
        count: usize,
        /// How CUDA_VISIBLE_DEVICES is set.
        visible: String,
    },
    /// The device cannot be opened.
    #[error("GPU {ordinal} ({name}) cannot be opened: {reason}")]
    Open {
        /// The device.
        ordinal: u32,
        /// Its name.
        name: String,
        /// What the driver said.
        reason: String,
        /// Its code.
        code: u32,
    },
    /// The device has less memory free than the plan needs.
    #[error(
        "GPU {ordinal} ({name}) has {} free, but the plan needs {} on it",
        cogvlm_core::memory::format_bytes(*free), cogvlm_core::memory::format_bytes(*needed)
    )]
    TooLittleMemory {
        /// The device.
        ordinal: u32,
        /// Its name.
        name: String,
        /// Bytes free now.
        free: u64,
        /// Bytes that the plan needs, arena and reserve.
        needed: u64,
    },
    /// The plan exceeds the device's memory.
    #[error(
        "GPU {ordinal} ({name}) has {} in all, but the plan needs {} on it",
        cogvlm_core::memory::format_bytes(*total), cogvlm_core::memory::format_bytes(*needed)
    )]
    TooSmall {
        /// The device.
        ordinal: u32,
        /// Its name.
        name: String,
        /// Bytes that it has.
        total: u64,
        /// Bytes that the plan needs, arena and reserve.
        needed: u64,
    },
    /// The driver does not give the memory that the plan needs, though there seemed to be enough.
    #[error("GPU {ordinal} ({name}) does not give the plan its memory: {reason}")]
    Allocation {
        /// The device.
        ordinal: u32,
        /// Its name.
        name: String,
        /// What was to be allocated, and what the driver said.
        reason: String,
    },
}

impl CudaError {
    /// What to do about it.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::NotBuiltIn => {
                "install CUDA's nvcc or `pip install nvidia-cuda-nvcc` and build again (docs/cuda.md), or run with \
                 `--backend cpu`"
            }
            Self::NoDriver { .. } => "install the NVIDIA driver, or run with `--backend cpu`",
            Self::NotADriver { .. } => {
                "remove CUDA's stub library from LD_LIBRARY_PATH so that the driver's own is found, or update the driver"
            }
            Self::DriverTooOld { .. } => {
                "update the driver, or build with an older nvcc (docs/cuda.md names the driver for each)"
            }
            Self::Init { code: 100, .. } | Self::NoDevices { .. } => {
                "no GPU is visible: see `nvidia-smi` and CUDA_VISIBLE_DEVICES"
            }
            Self::Init { code: 34, .. } => "CUDA's stub library stands before the driver's in LD_LIBRARY_PATH",
            Self::Init { code: 803, .. } => {
                "library and kernel module of the driver differ in version: finish the driver's update (reboot, or reload \
                 the module); in a container, mount the host's libraries"
            }
            Self::Init { .. } => "see whether `nvidia-smi` works and what the kernel log says",
            Self::NoDevice { .. } => "name a device that `cogvlm-shard doctor` lists",
            Self::Open { code: 101 | 201 | 46, .. } => {
                "another process holds it in exclusive mode: see `nvidia-smi`, or use another GPU"
            }
            Self::Open { .. } => "see `nvidia-smi` for what else uses it",
            Self::TooSmall { .. } => "give it a smaller budget with `--max-memory`, and others the rest",
            Self::TooLittleMemory { .. } | Self::Allocation { .. } => {
                "end what else uses the GPU (see `nvidia-smi`), or give it a smaller budget with `--max-memory`"
            }
        })
    }

    /// As an error of the device.
    pub(crate) fn on(&self, device: Device) -> BackendError {
        BackendError::Open { device, reason: self.to_string(), hint: self.hint() }
    }
}
