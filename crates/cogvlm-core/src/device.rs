//! Where weights rest and units run, in the words of a device map.

use std::fmt;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A place of a device map: a GPU (or a virtual rank of the CPU backend), host memory, or the mapped file.
///
/// The order is that of filling: cards by ordinal, then host memory, then disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Device {
    /// `cuda:N` on the CUDA backend, virtual rank `N` on the CPU backend.
    Gpu(u32),
    /// Host memory.
    Cpu,
    /// The mapped checkpoint file, read when needed.
    Disk,
}

impl Device {
    /// Whether units can be executed here: everywhere but on disk.
    pub const fn executes(self) -> bool {
        !matches!(self, Self::Disk)
    }

    /// Reads `0`, `cuda:0`, `cpu` or `disk`. `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "cpu" => Some(Self::Cpu),
            "disk" => Some(Self::Disk),
            _ => {
                let digits = text.strip_prefix("cuda:").unwrap_or(text);
                let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
                if plain { digits.parse().ok().map(Self::Gpu) } else { None }
            }
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gpu(ordinal) => write!(f, "{ordinal}"),
            Self::Cpu => f.write_str("cpu"),
            Self::Disk => f.write_str("disk"),
        }
    }
}

/// As Hugging Face writes device maps: cards as integers, the rest as strings.
impl Serialize for Device {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Gpu(ordinal) => serializer.serialize_u32(*ordinal),
            Self::Cpu => serializer.serialize_str("cpu"),
            Self::Disk => serializer.serialize_str("disk"),
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
