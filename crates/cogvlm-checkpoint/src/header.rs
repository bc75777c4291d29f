//! Headers of safetensors files: eight bytes of length, JSON, then data that the header describes to the last byte.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

use cogvlm_core::DType;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};

use crate::error::printable;

/// Longest header that the format allows, in bytes.
pub(crate) const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Bytes of the length before the header.
pub(crate) const LENGTH_BYTES: u64 = 8;

/// A header that describes its file completely: offsets are contiguous, sizes agree with shapes, the data ends where the
/// file ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Offset in the file of the first byte of data.
    pub data_start: u64,
    /// The tensors in the order of their data.
    pub tensors: Vec<HeaderTensor>,
    /// `__metadata__`, in the order of the file.
    pub metadata: Vec<(String, String)>,
}

/// One entry of a header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderTensor {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Shape.
    pub shape: Vec<usize>,
    /// Bytes of the file that hold its data.
    pub file_range: Range<u64>,
}

/// A kind of file that often lies where a checkpoint's file should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForeignFile {
    /// What Git leaves in place of a large file that was not fetched.
    LfsPointer,
    /// A zip archive, as `torch.save` writes.
    TorchArchive,
    /// A bare Python pickle, as old versions of `torch.save` wrote.
    Pickle,
    /// llama.cpp's format.
    Gguf,
    /// A web page, as a failed download leaves.
    Html,
}

impl fmt::Display for ForeignFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LfsPointer => "a Git LFS pointer instead of the file itself; run `git lfs pull` in its directory",
            Self::TorchArchive | Self::Pickle => {
                "a PyTorch pickle, not safetensors; convert the checkpoint to safetensors first"
            }
            Self::Gguf => "a GGUF file, not safetensors; download the model in Hugging Face layout",
            Self::Html => "a web page, as a failed download leaves it; download the file again",
        })
    }
}

impl ForeignFile {
    /// Recognises a file by its first bytes.
    pub(crate) fn recognise(start: &[u8]) -> Option<Self> {
        let text = start.trim_ascii_start();
        match start {
            _ if start.starts_with(b"version https://git-lfs.github.com/spec/") => Some(Self::LfsPointer),
            _ if start.starts_with(b"PK\x03\x04") => Some(Self::TorchArchive),
            _ if start.starts_with(b"GGUF") => Some(Self::Gguf),
            [0x80, 2..=5, ..] => Some(Self::Pickle),
            _ if text.starts_with(b"<!DOCTYPE") || text.starts_with(b"<!doctype") || text.starts_with(b"<html") => {
                Some(Self::Html)
            }
            _ => None,
        }
    }
}

/// Why a header cannot be used. Offsets are bytes from the start of the data, as in the header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Not a safetensors file at all.
    #[error("it is {0}")]
    Foreign(ForeignFile),
    /// Fewer bytes than the length field has.
    #[error("it ends after {file_bytes} bytes, before its header; download it again")]
    TooShort {
        /// Size of the file.
        file_bytes: u64,
    },
    /// The length field is above the format's limit.
    #[error(
        "it declares a header of {header_bytes} bytes, above the format's limit of 100000000; it is damaged, or no safetensors file"
    )]
    TooLong {
        /// What the length field says.
        header_bytes: u64,
    },
    /// The file, or the buffer handed in, ends inside the header.
    #[error("it declares a header of {header_bytes} bytes, and {found_bytes} follow; the download is incomplete")]
    Incomplete {
        /// What the length field says.
        header_bytes: u64,
        /// Bytes after the length field.
        found_bytes: u64,
    },
    /// The header is not text.
    #[error("its header is not UTF-8 (byte {offset}); it is damaged, or no safetensors file")]
    NotUtf8 {
        /// Offset in the header of the first byte that is not UTF-8.
        offset: usize,
    },
    /// The header is not JSON, or JSON of another form.
    #[error("its header is malformed: {reason}")]
    Malformed {
        /// What the JSON parser says.
        reason: String,
    },
    /// A name stands in the header twice.
    #[error("its header lists `{name}` twice; which of the two counts is undefined")]
    Duplicate {
        /// The tensor, or `__metadata__`, or a key in there.
        name: String,
    },
    /// An element type that no CogVLM checkpoint has.
    #[error("`{tensor}` is stored as {found}; only BF16, F16 and F32 can be read: use an unquantised checkpoint")]
    DType {
        /// The tensor.
        tensor: String,
        /// The name of the type.
        found: String,
    },
    /// More elements than there are addresses.
    #[error("`{tensor}` has shape {shape:?}, larger than any file")]
    Overflow {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// The size between the offsets is not the size of the shape.
    #[error("`{tensor}` {shape:?} of {dtype} takes {expected_bytes} bytes, but its offsets are {begin}..{end}")]
    Size {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its element type.
        dtype: DType,
        /// Bytes that shape and element type imply.
        expected_bytes: u64,
        /// First offset.
        begin: u64,
        /// Second offset.
        end: u64,
    },
    /// Two tensors share bytes.
    #[error("`{tensor}` begins at byte {begin} of the data, inside `{previous}`, which ends at {previous_end}")]
    Overlap {
        /// The tensor that begins too early.
        tensor: String,
        /// Where it begins.
        begin: u64,
        /// The tensor before it.
        previous: String,
        /// Where that one ends.
        previous_end: u64,
    },
    /// Bytes between two tensors, or before the first, belong to none.
    #[error(
        "`{tensor}` begins at byte {begin} of the data, but the data before it ends at {previous_end}: the bytes between belong to no tensor"
    )]
    Gap {
        /// The tensor that begins too late.
        tensor: String,
        /// Where it begins.
        begin: u64,
        /// Where the data before it ends.
        previous_end: u64,
    },
    /// The file ends before its data does.
    #[error("its data ends at byte {expected_bytes} of the file, which has {file_bytes}; the download is incomplete")]
    Truncated {
        /// Where the last tensor ends.
        expected_bytes: u64,
        /// Size of the file.
        file_bytes: u64,
    },
    /// The file goes on after its data.
    #[error(
        "its data ends at byte {expected_bytes} of the file, which has {file_bytes}; the bytes after it belong to no tensor"
    )]
    Trailing {
        /// Where the last tensor ends.
        expected_bytes: u64,
        /// Size of the file.
        file_bytes: u64,
    },
}

/// Reads and checks the header of a safetensors file of `file_bytes` bytes, whose first bytes (length, header, and any
/// more) are `start`. Never panics, whatever the bytes are, and allocates no more than a small multiple of `start`.
///
/// # Errors
/// Anything that keeps the header from describing the file completely, as [`HeaderError`] lists.
pub fn parse_header(start: &[u8], file_bytes: u64) -> Result<Header, HeaderError> {
    let Some((length, rest)) = start.split_first_chunk::<8>() else {
        return Err(HeaderError::TooShort { file_bytes: start.len() as u64 });
    };
    let foreign_or = |error| ForeignFile::recognise(start).map_or(error, HeaderError::Foreign);
    let header_bytes = u64::from_le_bytes(*length);
    if header_bytes > MAX_HEADER_BYTES {
        return Err(foreign_or(HeaderError::TooLong { header_bytes }));
    }
    let found_bytes = (rest.len() as u64).min(file_bytes.saturating_sub(LENGTH_BYTES));
    if header_bytes > found_bytes {
        return Err(foreign_or(HeaderError::Incomplete { header_bytes, found_bytes }));
    }
    let text = std::str::from_utf8(&rest[..header_bytes as usize])
        .map_err(|error| foreign_or(HeaderError::NotUtf8 { offset: error.valid_up_to() }))?;
    let raw: RawHeader = serde_json::from_str(text)
        .map_err(|error| foreign_or(HeaderError::Malformed { reason: printable(&error.to_string()) }))?;
    check_unique(&raw)?;
    let data_start = LENGTH_BYTES + header_bytes;
    let mut tensors = raw.tensors.into_iter().map(|(name, entry)| entry.check(name)).collect::<Result<Vec<_>, _>>()?;
    tensors.sort_by_key(|tensor| (tensor.file_range.start, tensor.file_range.end));
    let data_bytes = check_contiguous(&tensors)?;
    let expected_bytes = data_start.saturating_add(data_bytes);
    match expected_bytes.cmp(&file_bytes) {
        std::cmp::Ordering::Greater => return Err(HeaderError::Truncated { expected_bytes, file_bytes }),
        std::cmp::Ordering::Less => return Err(HeaderError::Trailing { expected_bytes, file_bytes }),
        std::cmp::Ordering::Equal => {}
    }
    for tensor in &mut tensors {
        tensor.file_range = data_start + tensor.file_range.start..data_start + tensor.file_range.end;
    }
    Ok(Header { data_start, tensors, metadata: raw.metadata.unwrap_or_default() })
}

fn check_unique(raw: &RawHeader) -> Result<(), HeaderError> {
    let duplicate = |name: &str| HeaderError::Duplicate { name: printable(name) };
    if raw.num_metadata > 1 {
        return Err(duplicate("__metadata__"));
    }
    for names in [raw.tensors.iter().map(|(name, _)| name).collect(), metadata_keys(raw)] as [Vec<&String>; 2] {
        let mut seen = HashSet::with_capacity(names.len());
        if let Some(name) = names.into_iter().find(|name| !seen.insert(*name)) {
            return Err(duplicate(name));
        }
    }
    Ok(())
}

fn metadata_keys(raw: &RawHeader) -> Vec<&String> {
    raw.metadata.iter().flatten().map(|(key, _)| key).collect()
}

/// Checks that tensors, sorted by offset, lie back to back from 0, and returns where they end.
fn check_contiguous(sorted: &[HeaderTensor]) -> Result<u64, HeaderError> {
    let mut previous_end = 0;
    for (index, HeaderTensor { name, file_range, .. }) in sorted.iter().enumerate() {
        let begin = file_range.start;
        if begin > previous_end {
            return Err(HeaderError::Gap { tensor: printable(name), begin, previous_end });
        }
        if begin < previous_end {
            let previous = printable(&sorted[index - 1].name);
            return Err(HeaderError::Overlap { tensor: printable(name), begin, previous, previous_end });
        }
        previous_end = file_range.end;
    }
    Ok(previous_end)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

impl RawEntry {
    fn check(self, name: String) -> Result<HeaderTensor, HeaderError> {
        let Self { dtype, shape, data_offsets: (begin, end) } = self;
        let known = [DType::Bf16, DType::F16, DType::F32].into_iter().find(|known| known.safetensors_name() == dtype);
        let Some(dtype) = known else {
            return Err(HeaderError::DType { tensor: printable(&name), found: printable(&dtype) });
        };
        let size = |bytes: usize, &dim: &usize| bytes.checked_mul(dim);
        let Some(expected_bytes) = shape.iter().try_fold(dtype.size_bytes(), size) else {
            return Err(HeaderError::Overflow { tensor: printable(&name), shape });
        };
        let expected_bytes = expected_bytes as u64;
        if end.checked_sub(begin) != Some(expected_bytes) {
            return Err(HeaderError::Size { tensor: printable(&name), shape, dtype, expected_bytes, begin, end });
        }
        Ok(HeaderTensor { name, dtype, shape, file_range: begin..end })
    }
}

/// An entry written as an object; derived code would take an array of its values too.
struct EntryObject(RawEntry);

impl<'de> Deserialize<'de> for EntryObject {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntryVisitor;
        impl<'de> Visitor<'de> for EntryVisitor {
            type Value = EntryObject;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with `dtype`, `shape` and `data_offsets`")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<EntryObject, A::Error> {
                RawEntry::deserialize(MapAccessDeserializer::new(map)).map(EntryObject)
            }
        }
        deserializer.deserialize_map(EntryVisitor)
    }
}

/// The header as it stands in the file, duplicates included: `serde_json::Map` would keep the last of them silently.
struct RawHeader {
    tensors: Vec<(String, RawEntry)>,
    metadata: Option<Vec<(String, String)>>,
    num_metadata: usize,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with an entry for each tensor")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader { tensors: Vec::new(), metadata: None, num_metadata: 0 };
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        header.metadata = Some(map.next_value::<Pairs<String>>()?.0);
                        header.num_metadata += 1;
                    } else {
                        header.tensors.push((name, map.next_value::<EntryObject>()?.0));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// A JSON object as the pairs that stand in it, duplicates included.
#[derive(Debug)]
pub(crate) struct Pairs<V>(pub(crate) Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Pairs<V> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PairsVisitor<V>(std::marker::PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for PairsVisitor<V> {
            type Value = Pairs<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs<V>, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(PairsVisitor(std::marker::PhantomData))
    }
}
