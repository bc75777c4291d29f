//! What can be wrong with a picture.

use std::fmt;
use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why a picture cannot be loaded from a file.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The file cannot be read.
    #[error("cannot read `{}`: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file is longer than the limit.
    #[error("`{}` is longer than {limit_bytes} bytes", file.display())]
    TooLong {
        /// The file.
        file: PathBuf,
        /// The limit, [`DecodeLimits::max_file_bytes`](super::DecodeLimits::max_file_bytes).
        limit_bytes: u64,
    },
    /// What is in the file cannot be decoded.
    #[error("`{}` {problem}", file.display())]
    Decode {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        #[source]
        problem: DecodeError,
    },
}

/// Why a picture cannot be decoded. The messages go on from a name: "the picture …", "`cat.png` …".
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Not one of the formats, by its first bytes.
    #[error("is neither PNG, JPEG, WebP, GIF, BMP nor TIFF")]
    UnknownFormat,
    /// A side is longer than the limit.
    #[error("is {width} x {height} pixels; at most {limit_px} a side are decoded")]
    TooLarge {
        /// In pixels.
        width: u32,
        /// In pixels.
        height: u32,
        /// The limit, [`DecodeLimits::max_side_px`](super::DecodeLimits::max_side_px).
        limit_px: u32,
    },
    /// Decoding would take more memory than the limit.
    #[error("is {width} x {height} pixels, which take {needed_bytes} bytes to decode; the limit is {limit_bytes}")]
    TooMuchMemory {
        /// In pixels.
        width: u32,
        /// In pixels.
        height: u32,
        /// What decoding takes.
        needed_bytes: u64,
        /// The limit, [`DecodeLimits::max_alloc_bytes`](super::DecodeLimits::max_alloc_bytes).
        limit_bytes: u64,
    },
    /// Something besides the pixels would take more memory than the limit.
    #[error("is a {format} that takes more than {limit_bytes} bytes to decode, which is the limit")]
    TooMuchBesides {
        /// The format.
        format: Format,
        /// The limit, [`DecodeLimits::max_alloc_bytes`](super::DecodeLimits::max_alloc_bytes).
        limit_bytes: u64,
    },
    /// The file says that it has no pixels.
    #[error("is {width} x {height} pixels: nothing to see")]
    Empty {
        /// In pixels.
        width: u32,
        /// In pixels.
        height: u32,
    },
    /// The data end too early, or contradict themselves.
    #[error("is a {format} that is cut short or damaged: {source}")]
    Damaged {
        /// The format.
        format: Format,
        /// Where and why, in the words of the decoder.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A variant of the format whose pixels could not be made right.
    #[error("is a {format} of a kind that is not supported: {feature}; convert it to 8-bit RGB")]
    Unsupported {
        /// The format.
        format: Format,
        /// What is not supported.
        feature: String,
    },
}

/// A picture format, told by the first bytes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Format {
    Png,
    Jpeg,
    WebP,
    Gif,
    Bmp,
    Tiff,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Png => "PNG",
            Self::Jpeg => "JPEG",
            Self::WebP => "WebP",
            Self::Gif => "GIF",
            Self::Bmp => "BMP",
            Self::Tiff => "TIFF",
        })
    }
}
