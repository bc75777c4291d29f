//! Element types by PyTorch's names, and how many bits one element counts.

use super::error::AccelerateError;
use super::version::Version;

/// An element type that accelerate can size: one of PyTorch's, or the library's own `int4`, `int2` and `fp8`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ElementType {
    name: &'static str,
    bits: u32,
}

/// Name and bits of an element.
const ELEMENT_TYPES: [ElementType; 19] = {
    const fn of(name: &'static str, bits: u32) -> ElementType {
        ElementType { name, bits }
    }
    [
        of("float32", 32),
        of("bfloat16", 16),
        of("float16", 16),
        of("float64", 64),
        of("float8_e4m3fn", 8),
        of("float8_e5m2", 8),
        of("fp8", 8),
        of("bool", 1),
        of("int2", 2),
        of("int4", 4),
        of("int8", 8),
        of("int16", 16),
        of("int32", 32),
        of("int64", 64),
        of("uint8", 8),
        of("uint16", 16),
        of("uint32", 32),
        of("complex64", 64),
        of("complex128", 128),
    ]
};

/// PyTorch's second names.
const ALIASES: [(&str, &str); 8] = [
    ("half", "float16"),
    ("float", "float32"),
    ("double", "float64"),
    ("short", "int16"),
    ("int", "int32"),
    ("long", "int64"),
    ("cfloat", "complex64"),
    ("cdouble", "complex128"),
];

impl ElementType {
    /// Reads `bfloat16` or `torch.bfloat16`. `None` for a type whose elements have no known width.
    pub fn parse(text: &str) -> Option<Self> {
        let name = text.strip_prefix("torch.").unwrap_or(text);
        let name = ALIASES.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, name)| name);
        ELEMENT_TYPES.into_iter().find(|known| known.name == name)
    }

    /// PyTorch's name without `torch.`.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// Integers and bools, which newer releases do not narrow.
    pub(crate) fn is_integer(self) -> bool {
        ["int", "uint", "bool"].iter().any(|prefix| self.name.starts_with(prefix))
    }

    /// Bits that `version` counts for an element. It reads them off the end of the type's name, so that 0.24.1
    /// refuses `float8_e4m3fn` and counts nothing for `float8_e5m2`.
    ///
    /// # Errors
    /// [`AccelerateError::ElementWidth`] where the release knows no width.
    pub(crate) fn bits(self, version: Version) -> Result<u32, AccelerateError> {
        match self.name {
            "float8_e4m3fn" if !version.rules().knows_float8 => {
                Err(AccelerateError::ElementWidth { name: self.name, version })
            }
            "float8_e5m2" if !version.rules().knows_float8 => Ok(0),
            _ => Ok(self.bits),
        }
    }

    /// Bits of an element as it is stored.
    pub(crate) fn stored_bits(self) -> u32 {
        self.bits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_widths() {
        for (text, bits) in [("torch.bfloat16", 16), ("bool", 1), ("int4", 4), ("half", 16), ("complex128", 128)] {
            assert_eq!(ElementType::parse(text).unwrap().bits(Version::V1_15_0).unwrap(), bits, "{text}");
        }
        for bad in ["", "torch.", "torch.torch.int8", "Float32", "quint4x2", "bf16"] {
            assert_eq!(ElementType::parse(bad), None, "{bad}");
        }
        assert!(ElementType::parse("float8_e4m3fn").unwrap().bits(Version::V0_24_1).is_err());
    }
}
