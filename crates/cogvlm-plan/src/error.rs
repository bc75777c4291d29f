//! Why a plan cannot be made.

use std::fmt;

use cogvlm_core::Device;
use cogvlm_core::memory::{GIB, MIB, format_bytes};
use cogvlm_core::sharing::UnevenError;

/// A request that cannot be planned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Nothing to execute on.
    #[error("`--max-memory` names no device that executes: list a card or `cpu`")]
    NoDevice,
    /// Two budgets for one device.
    #[error("`--max-memory` names `{device}` twice")]
    DuplicateDevice {
        /// The device.
        device: Device,
    },
    /// A budget that holds nothing.
    #[error("the budget of `{device}` is 0: give it memory or leave it out")]
    ZeroBudget {
        /// The device.
        device: Device,
    },
    /// A limit that no run can have.
    #[error("`{flag}` is {value}; it must lie between {low} and {high}")]
    Limit {
        /// The flag that sets it.
        flag: &'static str,
        /// What was asked for.
        value: usize,
        /// The least.
        low: usize,
        /// The most.
        high: usize,
    },
    /// `accelerate` makes a device map by rules of its own.
    #[error("policy `accelerate` makes a device map, not a plan: make the map first, then a plan of it")]
    Accelerate,
    /// The budgets do not hold the model.
    #[error("{model} does not fit: `{device}` offers {}, it would need {}", format_bytes(*.budget_bytes), format_bytes(*.needed_bytes))]
    DoesNotFit {
        /// The model.
        model: String,
        /// The device for which the least more memory would do.
        device: Device,
        /// Its budget.
        budget_bytes: u64,
        /// A budget that would do.
        needed_bytes: u64,
        /// Changes each of which would do, the smallest first.
        changes: Vec<Change>,
    },
    /// Fewer cards than are to compute together.
    #[error("`--tensor-parallel {num_members}` needs {num_members} numbered devices, `--max-memory` names {num_cards}")]
    TooFewCards {
        /// Members of the group.
        num_members: usize,
        /// Cards that there are budgets for.
        num_cards: usize,
    },
    /// The model does not come out even among the cards that are to compute together.
    #[error("`--tensor-parallel`: {0}")]
    Uneven(#[from] UnevenError),
    /// A placement made elsewhere exceeds a budget.
    #[error("`{device}` would hold {}, its budget is {}", format_bytes(*.used_bytes), format_bytes(*.budget_bytes))]
    OverBudget {
        /// The device.
        device: Device,
        /// What it would hold.
        used_bytes: u64,
        /// What it may.
        budget_bytes: u64,
    },
    /// A device map or a plan that cannot be followed.
    #[error("{field}: {problem}")]
    Map {
        /// The key or field.
        field: String,
        /// What is wrong with it, and what to do.
        problem: String,
    },
}

impl PlanError {
    /// What to do, where there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::DoesNotFit { changes, .. } => Change::alternatives(changes),
            Self::OverBudget { device, used_bytes, .. } => {
                Some(Change::Raise(*device, used_bytes.next_multiple_of(MIB)).to_string())
            }
            _ => None,
        }
    }
}

/// A change to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Give a device this budget instead.
    Raise(Device, u64),
    /// Add a device with this budget.
    Add(Device, u64),
    /// Plan for sequences of so many tokens.
    Context(usize),
    /// Plan for so many sequences.
    Batch(usize),
}

impl Change {
    /// `raise 0 to 15.2GiB, or add cpu:22GiB`; `None` without changes.
    pub fn alternatives(changes: &[Self]) -> Option<String> {
        let texts: Vec<String> = changes.iter().map(Self::to_string).collect();
        (!texts.is_empty()).then(|| texts.join(", or "))
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Raise(device, bytes) => write!(f, "raise `{device}` to {}", budget_text(*bytes)),
            Self::Add(device, bytes) => write!(f, "add `{device}:{}`", budget_text(*bytes)),
            Self::Context(tokens) => write!(f, "`--context {tokens}`"),
            Self::Batch(sequences) => write!(f, "`--batch {sequences}`"),
        }
    }
}

/// A budget as `--max-memory` takes it, exactly.
fn budget_text(bytes: u64) -> String {
    let tenths = (bytes as f64 * 10.0 / GIB as f64).ceil();
    if tenths_of_gib(tenths as u64) == bytes && bytes >= GIB {
        format!("{}GiB", tenths / 10.0)
    } else if bytes.is_multiple_of(MIB) {
        format!("{}MiB", bytes / MIB)
    } else {
        bytes.to_string()
    }
}

/// So many tenths of a GiB, rounded down to bytes as `--max-memory` reads them.
pub(crate) fn tenths_of_gib(tenths: u64) -> u64 {
    (tenths as f64 / 10.0 * GIB as f64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_read_as_flags_take_them() {
        let changes = [
            Change::Raise(Device::Gpu(0), tenths_of_gib(152)),
            Change::Add(Device::Cpu, 22 * GIB),
            Change::Raise(Device::Gpu(1), 700 * MIB),
            Change::Raise(Device::Gpu(1), 12_345),
            Change::Context(1024),
            Change::Batch(4),
        ];
        assert_eq!(
            Change::alternatives(&changes).unwrap(),
            "raise `0` to 15.2GiB, or add `cpu:22GiB`, or raise `1` to 700MiB, or raise `1` to 12345, or \
             `--context 1024`, or `--batch 4`"
        );
        assert_eq!(Change::alternatives(&[]), None);
    }
}
