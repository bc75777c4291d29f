//! Budgets as the command line takes them.

use cogvlm_core::Device;

use crate::accelerate::{Version, memory_bytes};
use crate::plan::DeviceBudget;

/// An entry of `--max-memory` that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{entry}` in `--max-memory` {problem}")]
pub struct MaxMemoryError {
    /// The entry as it was given.
    pub entry: String,
    /// What is wrong with it, and what to write.
    pub problem: String,
}

/// Reads `0:20GiB,1:20GiB,cpu:16GiB,disk:1000GB`: for each device a number of bytes or a memory string of
/// [`memory_bytes`]. A card is its ordinal, `0` or `cuda:0`; disk is not limited, so that any size stands for it,
/// and none has to.
///
/// # Errors
/// [`MaxMemoryError`] with the first entry that names no device, names one twice, or has no budget above 0.
pub fn parse_max_memory(text: &str) -> Result<Vec<DeviceBudget>, MaxMemoryError> {
    let mut budgets: Vec<DeviceBudget> = Vec::new();
    for entry in text.split(',').map(str::trim) {
        let budget = parse_entry(entry).map_err(|problem| MaxMemoryError { entry: entry.to_owned(), problem })?;
        if budgets.iter().any(|known| known.device == budget.device) {
            let problem = format!("is the second budget of `{}`: give each device one", budget.device);
            return Err(MaxMemoryError { entry: entry.to_owned(), problem });
        }
        budgets.push(budget);
    }
    Ok(budgets)
}

fn parse_entry(entry: &str) -> Result<DeviceBudget, String> {
    if entry.is_empty() {
        return Err("is empty: write a device and its budget, like `0:20GiB`".to_owned());
    }
    if entry == "disk" {
        return Ok(DeviceBudget { device: Device::Disk, bytes: 0 });
    }
    // The last colon: `cuda:0` has one of its own.
    let (key, amount) = entry.rsplit_once(':').ok_or("has no budget: write it behind a colon, like `0:20GiB`")?;
    let device = Device::parse(key.trim())
        .ok_or_else(|| format!("names `{key}`, which is no device: use a card's number, `cpu` or `disk`"))?;
    let bytes = parse_amount(amount.trim()).map_err(|problem| format!("has {problem}"))?;
    if bytes == 0 && device.executes() {
        return Err("is 0: give the device memory or leave it out".to_owned());
    }
    Ok(DeviceBudget { device, bytes })
}

fn parse_amount(amount: &str) -> Result<u64, String> {
    if amount.is_empty() {
        return Err("no budget behind its colon".to_owned());
    }
    let too_large = || format!("the budget `{amount}`, which is more bytes than can be counted");
    if amount.bytes().all(|byte| byte.is_ascii_digit()) {
        return amount.parse().map_err(|_| too_large());
    }
    let bytes = memory_bytes(amount, Version::V1_15_0)
        .map_err(|_| format!("the budget `{amount}`: write bytes, or a size like `20GiB`, `16000MB`"))?;
    u64::try_from(bytes).map_err(|_| too_large())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_read_in_the_order_given() {
        let budgets = parse_max_memory("1:20GiB, cuda:0:1e1GB,cpu:17179869184,disk").unwrap();
        let expected = [
            (Device::Gpu(1), 20 << 30),
            (Device::Gpu(0), 10_000_000_000),
            (Device::Cpu, 17_179_869_184),
            (Device::Disk, 0),
        ];
        assert_eq!(budgets, expected.map(|(device, bytes)| DeviceBudget { device, bytes }));
        assert_eq!(parse_max_memory("disk:8gb,0:1").unwrap()[0].bytes, 1_000_000_000);
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        for (text, message) in [
            ("", "`` in `--max-memory` is empty: write a device and its budget, like `0:20GiB`"),
            ("0:1GiB,", "`` in `--max-memory` is empty: write a device and its budget, like `0:20GiB`"),
            ("0", "`0` in `--max-memory` has no budget: write it behind a colon, like `0:20GiB`"),
            ("0:", "`0:` in `--max-memory` has no budget behind its colon"),
            (
                "gpu:1GiB",
                "`gpu:1GiB` in `--max-memory` names `gpu`, which is no device: use a card's number, `cpu` or `disk`",
            ),
            (
                "-1:1GiB",
                "`-1:1GiB` in `--max-memory` names `-1`, which is no device: use a card's number, `cpu` or `disk`",
            ),
            ("0:1GiB,cuda:0:2GiB", "`cuda:0:2GiB` in `--max-memory` is the second budget of `0`: give each device one"),
            ("0:0", "`0:0` in `--max-memory` is 0: give the device memory or leave it out"),
            ("cpu:0GiB", "`cpu:0GiB` in `--max-memory` is 0: give the device memory or leave it out"),
            (
                "0:20TiB",
                "`0:20TiB` in `--max-memory` has the budget `20TiB`: write bytes, or a size like `20GiB`, `16000MB`",
            ),
            (
                "0:-5GiB",
                "`0:-5GiB` in `--max-memory` has the budget `-5GiB`: write bytes, or a size like `20GiB`, `16000MB`",
            ),
            (
                "0:infGiB",
                "`0:infGiB` in `--max-memory` has the budget `infGiB`: write bytes, or a size like `20GiB`, `16000MB`",
            ),
            (
                "0:99999999999999999999",
                "`0:99999999999999999999` in `--max-memory` has the budget `99999999999999999999`, which is more bytes \
                 than can be counted",
            ),
            (
                "0:1e30GiB",
                "`0:1e30GiB` in `--max-memory` has the budget `1e30GiB`, which is more bytes than can be counted",
            ),
        ] {
            assert_eq!(parse_max_memory(text).unwrap_err().to_string(), message, "{text}");
        }
    }
}
