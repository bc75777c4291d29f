//! Where weights rest and units run, in the words of a device map.

use std::fmt;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A place of a device map: a GPU (or a virtual rank of the CPU backend), host memory, or the mapped file.
///
/// The order is that of filling: cards by ordinal, then host memory, then disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Device {
    /// `cuda:N` on the CUDA backend, virtual rank `N` on the CPU backend. Those of process `p` of a run begin at
    /// `p * DEVICES_PER_PROCESS`, and are written `p/N`.
    Gpu(u32),
    /// Host memory.
    Cpu,
    /// The mapped checkpoint file, read when needed.
    Disk,
}

/// Numbers that the devices of one process may have.
pub const DEVICES_PER_PROCESS: u32 = 1 << 10;

impl Device {
    /// The process of the run whose device it is. Host memory and files are those of whoever uses them; units of the host
    /// are computed by process 0.
    pub const fn process(self) -> usize {
        match self {
            Self::Gpu(number) => (number / DEVICES_PER_PROCESS) as usize,
            Self::Cpu | Self::Disk => 0,
        }
    }

    /// What the process itself calls its GPU.
    pub const fn ordinal(self) -> Option<u32> {
        match self {
            Self::Gpu(number) => Some(number % DEVICES_PER_PROCESS),
            Self::Cpu | Self::Disk => None,
        }
    }

    /// Whether units can be executed here: everywhere but on disk.
    pub const fn executes(self) -> bool {
        !matches!(self, Self::Disk)
    }

    /// Reads `0`, `cuda:0`, `cpu` or `disk`, or `1/0` for GPU 0 of process 1. `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let number = |digits: &str| -> Option<u32> {
            let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
            if plain { digits.parse().ok() } else { None }
        };
        match text {
            "cpu" => Some(Self::Cpu),
            "disk" => Some(Self::Disk),
            _ => match text.split_once('/') {
                None => number(text.strip_prefix("cuda:").unwrap_or(text)).map(Self::Gpu),
                Some((process, ordinal)) => {
                    let ordinal = number(ordinal).filter(|ordinal| *ordinal < DEVICES_PER_PROCESS)?;
                    number(process)?.checked_mul(DEVICES_PER_PROCESS)?.checked_add(ordinal).map(Self::Gpu)
                }
            },
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gpu(number) => match self.process() {
                0 => write!(f, "{number}"),
                process => write!(f, "{process}/{}", number % DEVICES_PER_PROCESS),
            },
            Self::Cpu => f.write_str("cpu"),
            Self::Disk => f.write_str("disk"),
        }
    }
}

/// As Hugging Face writes device maps: cards of the only process as integers, the rest as strings.
impl Serialize for Device {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Gpu(number) if self.process() == 0 => serializer.serialize_u32(*number),
            place => serializer.collect_str(place),
        }
    }
}

impl<'de> Deserialize<'de> for Device {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct DeviceVisitor;
        impl Visitor<'_> for DeviceVisitor {
            type Value = Device;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a GPU ordinal, \"cuda:N\", \"cpu\" or \"disk\"")
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Device, E> {
                u32::try_from(value)
                    .map(Device::Gpu)
                    .map_err(|_| E::invalid_value(de::Unexpected::Unsigned(value), &self))
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Device, E> {
                u32::try_from(value)
                    .map(Device::Gpu)
                    .map_err(|_| E::invalid_value(de::Unexpected::Signed(value), &self))
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<Device, E> {
                Device::parse(value).ok_or_else(|| E::invalid_value(de::Unexpected::Str(value), &self))
            }
        }
        deserializer.deserialize_any(DeviceVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_of_other_processes_are_named_by_both() {
        for (text, process, ordinal) in [("0", 0, 0), ("7", 0, 7), ("1/0", 1, 0), ("12/3", 12, 3)] {
            let device = Device::parse(text).unwrap();
            assert_eq!((device.process(), device.ordinal()), (process, Some(ordinal)), "{text}");
            assert_eq!(device.to_string(), text);
            let json = serde_json::to_string(&device).unwrap();
            assert_eq!(serde_json::from_str::<Device>(&json).unwrap(), device, "{json}");
        }
        assert_eq!(Device::parse("0/5"), Some(Device::Gpu(5)));
        for bad in ["1/", "/1", "1/1024", "4194304/0", "1/cpu", "1/-1", "1/0/0", "a/0"] {
            assert_eq!(Device::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn devices_survive_json_in_hugging_face_form() {
        for (device, text) in [(Device::Gpu(3), "3"), (Device::Cpu, "\"cpu\""), (Device::Disk, "\"disk\"")] {
            assert_eq!(serde_json::to_string(&device).unwrap(), text);
            assert_eq!(serde_json::from_str::<Device>(text).unwrap(), device);
        }
        assert_eq!(serde_json::from_str::<Device>("\"cuda:1\"").unwrap(), Device::Gpu(1));
        for bad in ["-1", "\"cuda:\"", "\"gpu\"", "\"+1\"", "1.5", "null", "99999999999"] {
            assert!(serde_json::from_str::<Device>(bad).is_err(), "{bad} was accepted");
        }
    }
}
