//! The two releases whose maps are reproduced, and what differs between them.

use std::fmt;

/// A release of accelerate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Version {
    /// 0.24.1, which the published CogVLM instructions pin.
    #[default]
    V0_24_1,
    /// 1.15.0.
    V1_15_0,
}

impl Version {
    /// Both releases, the older one first.
    pub const ALL: [Self; 2] = [Self::V0_24_1, Self::V1_15_0];

    /// The release as upstream writes it, `0.24.1`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V0_24_1 => "0.24.1",
            Self::V1_15_0 => "1.15.0",
        }
    }

    /// Reads `0.24.1` or `1.15.0`; `None` for any other release.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|version| version.as_str() == text)
    }

    pub(crate) const fn rules(self) -> &'static Rules {
        match self {
            Self::V0_24_1 => &RULES_0_24_1,
            Self::V1_15_0 => &RULES_1_15_0,
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Every difference between the releases, one field each. The code that plans has no other place where it asks for
/// the version.
#[derive(Debug)]
pub(crate) struct Rules {
    /// The arguments `offload_buffers`, `fallback_allocation` and `clean_result` exist (0.26.0 to 1.2.0).
    pub(crate) newer_arguments: bool,
    /// A memory string may come to 0 bytes (0.28.0).
    pub(crate) zero_memory_string: bool,
    /// `dtype` does not narrow integer and bool tensors (0.27.0).
    pub(crate) integers_keep_width: bool,
    /// Float8 types are known, and take a byte.
    pub(crate) knows_float8: bool,
    /// Names of tied tensors are matched against a module's name with its dot (0.26.0), not against any substring.
    pub(crate) ties_match_with_dot: bool,
    /// Two names of one tensor within one module count as tied.
    pub(crate) finds_ties_within_module: bool,
    /// Partners are looked up for every entry, not only for one that fits by itself (1.2.0).
    pub(crate) partners_first: bool,
    /// An entry that fills its device to the byte is split where its partners do not fit as well (1.2.0).
    pub(crate) splits_exact_fit: bool,
    /// A root buffer that does not fit goes to the next device (0.28.0) instead of ending the call.
    pub(crate) root_buffers_move_on: bool,
    /// Devices left empty and buffers of offloaded modules are reported (0.28.0, 1.2.0).
    pub(crate) notices: bool,
    /// `check_device_map` warns of keys that name no module (1.9.0).
    pub(crate) warns_of_tensor_keys: bool,
}

const RULES_0_24_1: Rules = Rules {
    newer_arguments: false,
    zero_memory_string: false,
    integers_keep_width: false,
    knows_float8: false,
    ties_match_with_dot: false,
    finds_ties_within_module: false,
    partners_first: false,
    splits_exact_fit: false,
    root_buffers_move_on: false,
    notices: false,
    warns_of_tensor_keys: false,
};

const RULES_1_15_0: Rules = Rules {
    newer_arguments: true,
    zero_memory_string: true,
    integers_keep_width: true,
    knows_float8: true,
    ties_match_with_dot: true,
    finds_ties_within_module: true,
    partners_first: true,
    splits_exact_fit: true,
    root_buffers_move_on: true,
    notices: true,
    warns_of_tensor_keys: true,
};
