//! Budgets: memory strings, devices, and the order in which devices are filled.

use std::fmt;

use serde::{Serialize, Serializer};

use super::error::AccelerateError;
use super::size::Size;
use super::version::Version;

/// A device in upstream's terms: a key of `max_memory` and a value of a device map. The order is that of filling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DeviceKey {
    /// A card by its id. Upstream takes any integer, and only logs a line for cards that do not exist.
    Gpu(i64),
    /// Apple's GPU.
    Mps,
    /// Host memory.
    Cpu,
    /// The offload folder; unlimited.
    Disk,
}

impl DeviceKey {
    /// Reads one of the words `mps`, `cpu`, `disk`.
    ///
    /// # Errors
    /// [`AccelerateError::UnknownDevice`] for any other text, digits included: a card's key is an integer.
    pub fn from_word(word: &str) -> Result<Self, AccelerateError> {
        match word {
            "mps" => Ok(Self::Mps),
            "cpu" => Ok(Self::Cpu),
            "disk" => Ok(Self::Disk),
            _ => Err(AccelerateError::UnknownDevice { key: word.to_owned() }),
        }
    }

    /// Neither host memory nor disk.
    pub(crate) const fn is_card(self) -> bool {
        matches!(self, Self::Gpu(_) | Self::Mps)
    }
}

impl fmt::Display for DeviceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gpu(id) => write!(f, "{id}"),
            Self::Mps => f.write_str("mps"),
            Self::Cpu => f.write_str("cpu"),
            Self::Disk => f.write_str("disk"),
        }
    }
}

/// As Hugging Face writes device maps: cards as integers, the rest as strings.
impl Serialize for DeviceKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Gpu(id) => serializer.serialize_i64(*id),
            word => serializer.collect_str(word),
        }
    }
}

/// An amount of memory as it is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Amount {
    /// A number of bytes.
    Bytes(Size),
    /// A memory string, `20GiB`.
    Text(String),
}

impl Amount {
    /// Upstream's `convert_file_size_to_int`: bytes of a size, which may not be negative, and in 0.24.1 not 0.
    ///
    /// # Errors
    /// [`AccelerateError::MemorySize`], [`AccelerateError::InfiniteMemorySize`].
    pub fn file_size(&self, version: Version) -> Result<Size, AccelerateError> {
        let zero_allowed = version.rules().zero_memory_string;
        match self {
            Self::Text(text) => memory_bytes(text, version).map(Size::from_bytes),
            Self::Bytes(size) if *size > Size::ZERO || (zero_allowed && *size == Size::ZERO) => Ok(*size),
            Self::Bytes(size) => Err(AccelerateError::MemorySize { text: size.to_string(), zero_allowed }),
        }
    }

    /// A budget: text as in [`memory_bytes`]; a number as it is, zero and negatives included.
    fn budget(&self, version: Version) -> Result<Size, AccelerateError> {
        match self {
            Self::Text(_) => self.file_size(version),
            Self::Bytes(size) => Ok(*size),
        }
    }
}

/// Suffixes in the order in which they are tried, and the bytes of one unit.
const UNITS: [(&str, f64); 6] = [
    ("GiB", (1_u64 << 30) as f64),
    ("MiB", (1_u64 << 20) as f64),
    ("KiB", (1_u64 << 10) as f64),
    ("GB", 1e9),
    ("MB", 1e6),
    ("KB", 1e3),
];

/// Bytes of a memory string such as `20GiB`, `.5GB` or `1e1 mib`, truncated to a whole number.
///
/// The unit is compared without regard to case, except that a final lower-case `b` after a decimal unit means bits:
/// `8gb` is 1,000,000,000 bytes. The number may have blanks around it, a sign, an exponent, and `_` between digits.
/// Numbers past 2^127 come out as `i128::MAX`.
///
/// # Errors
/// [`AccelerateError::MemorySize`] for anything else: no unit, another unit, a negative result, and with 0.24.1 a
/// result of 0. [`AccelerateError::InfiniteMemorySize`] for `infGiB` and numbers that overflow to it.
pub fn memory_bytes(text: &str, version: Version) -> Result<i128, AccelerateError> {
    let zero_allowed = version.rules().zero_memory_string;
    let refused = || AccelerateError::MemorySize { text: text.to_owned(), zero_allowed };
    let (number, unit, unit_bytes) = UNITS
        .into_iter()
        .find_map(|(unit, bytes)| {
            let (number, suffix) = text.split_at_checked(text.len().checked_sub(unit.len())?)?;
            suffix.eq_ignore_ascii_case(unit).then_some((number, unit, bytes))
        })
        .ok_or_else(refused)?;
    let product = parse_python_float(number).ok_or_else(refused)? * unit_bytes;
    if product.is_nan() {
        return Err(refused());
    }
    if product.is_infinite() {
        return Err(AccelerateError::InfiniteMemorySize { text: text.to_owned() });
    }
    let truncated = product as i128;
    let counts_bits = unit.len() == 2 && text.ends_with('b');
    let bytes = if counts_bits { truncated.div_euclid(8) } else { truncated };
    if bytes > 0 || (zero_allowed && bytes == 0) { Ok(bytes) } else { Err(refused()) }
}

/// Python's `float(text)`, but for digits outside ASCII. The grammar is that of Rust's parser, with blanks around it
/// and single underscores between digits.
fn parse_python_float(text: &str) -> Option<f64> {
    let text = text.trim();
    if !text.contains('_') {
        return text.parse().ok();
    }
    let bytes = text.as_bytes();
    let between_digits = |at: usize| {
        let is_digit = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_digit);
        at > 0 && is_digit(at - 1) && is_digit(at + 1)
    };
    let well_placed = bytes.iter().enumerate().all(|(at, &byte)| byte != b'_' || between_digits(at));
    if well_placed { text.replace('_', "").parse().ok() } else { None }
}

/// Budgets by device, in the order in which devices are filled: cards by id, `mps`, `cpu`, `disk`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MaxMemory {
    budgets: Vec<(DeviceKey, Size)>,
}

impl MaxMemory {
    /// Reads budgets in the order in which they were given; of two for one device the later one holds, as in a
    /// Python dictionary.
    ///
    /// # Errors
    /// For memory strings that `version` refuses.
    pub fn new(given: &[(DeviceKey, Amount)], version: Version) -> Result<Self, AccelerateError> {
        let mut budgets = given
            .iter()
            .map(|(device, amount)| Ok((*device, amount.budget(version)?)))
            .collect::<Result<Vec<_>, AccelerateError>>()?;
        budgets.reverse();
        budgets.sort_by_key(|(device, _)| *device);
        budgets.dedup_by_key(|(device, _)| *device);
        Ok(Self { budgets })
    }

    /// Devices and budgets in the order of filling, as they were given: without `disk` if it was not.
    pub fn budgets(&self) -> &[(DeviceKey, Size)] {
        &self.budgets
    }

    /// The budget of `device`, if it has one.
    pub(crate) fn of(&self, device: DeviceKey) -> Option<Size> {
        self.position(device).map(|at| self.budgets[at].1)
    }

    /// Replaces the budget of a device that has one.
    pub(crate) fn set(&mut self, device: DeviceKey, size: Size) {
        if let Some(at) = self.position(device) {
            self.budgets[at].1 = size;
        }
    }

    fn position(&self, device: DeviceKey) -> Option<usize> {
        self.budgets.binary_search_by_key(&device, |(known, _)| *known).ok()
    }
}

/// Reads a list such as `0:20GiB,1:21474836480,cpu:16GiB`: per device, whose ids are plain numbers, bytes or a memory
/// string.
///
/// # Errors
/// [`AccelerateError::UnknownDevice`] for a key that is no device, [`AccelerateError::Budget`] for an item without
/// an amount. Memory strings are read later, by the rules of a release.
pub fn parse_max_memory(list: &str) -> Result<Vec<(DeviceKey, Amount)>, AccelerateError> {
    list.split(',')
        .map(|item| {
            let (key, amount) = item.split_once(':').unwrap_or((item, ""));
            let (key, amount) = (key.trim(), amount.trim());
            let is_id = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_digit());
            let unknown = |_| AccelerateError::UnknownDevice { key: key.to_owned() };
            let device = if is_id { DeviceKey::Gpu(key.parse().map_err(unknown)?) } else { DeviceKey::from_word(key)? };
            if amount.is_empty() {
                return Err(AccelerateError::Budget { device: key.to_owned(), found: "missing".to_owned() });
            }
            let bytes = amount.parse().map(|bytes| Amount::Bytes(Size::from_bytes(bytes)));
            Ok((device, bytes.unwrap_or_else(|_| Amount::Text(amount.to_owned()))))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_follow_python() {
        for (text, bytes) in [
            ("2_0GiB", 20 << 30),
            ("1e1GiB", 10 << 30),
            ("+5.MiB", 5 << 20),
            ("\u{a0}1\u{2003}KiB", 1024),
            ("1.9999KB", 1999),
            ("15kb", 1875),
            ("1e30GB", 1e39 as i128),
        ] {
            assert_eq!(memory_bytes(text, Version::V0_24_1).unwrap(), bytes, "{text:?}");
        }
        for bad in [
            "", "B", "é", "_1GiB", "1_GiB", "1__0GiB", "1_.5GiB", "nanGiB", "e5GB", ".GB", "1 0GB", "0x1GB", "\x1c1GB",
            "-1kb", "1GiB ",
        ] {
            let error = memory_bytes(bad, Version::V1_15_0).unwrap_err();
            assert_eq!(error.exception(), "ValueError", "{bad:?}");
        }
        assert_eq!(memory_bytes("-0.001kb", Version::V1_15_0).unwrap_err().exception(), "ValueError");
        assert_eq!(memory_bytes("-0.0001kb", Version::V1_15_0).unwrap(), 0);
        for endless in ["infGiB", "-InfinityMB", "1e308GiB"] {
            assert_eq!(memory_bytes(endless, Version::V1_15_0).unwrap_err().exception(), "OverflowError", "{endless}");
        }
    }

    #[test]
    fn budgets_are_ordered_and_later_ones_hold() {
        let given = parse_max_memory("cpu:1KiB, 10:7,2:3KB,disk:0,10:-8").unwrap();
        let max_memory = MaxMemory::new(&given, Version::V0_24_1).unwrap();
        let expected =
            [(DeviceKey::Gpu(2), 3000), (DeviceKey::Gpu(10), -8), (DeviceKey::Cpu, 1024), (DeviceKey::Disk, 0)];
        assert_eq!(max_memory.budgets(), expected.map(|(device, bytes)| (device, Size::from_bytes(bytes))));
    }

    #[test]
    fn lists_name_what_is_wrong() {
        for (list, message) in [
            ("cuda:0", "`cuda` is not a device: a budget is for a card (an integer), \"mps\", \"cpu\" or \"disk\""),
            ("0:1GiB,", "`` is not a device: a budget is for a card (an integer), \"mps\", \"cpu\" or \"disk\""),
            ("1", "the budget of `1` is missing, but it has to be a whole number of bytes or text like \"20GiB\""),
        ] {
            assert_eq!(parse_max_memory(list).unwrap_err().to_string(), message);
        }
    }
}
