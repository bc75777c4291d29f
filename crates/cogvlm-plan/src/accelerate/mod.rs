//! accelerate's device maps, exactly: what `infer_auto_device_map` and `get_balanced_memory` of 0.24.1 and 1.15.0
//! answer, for any tree of modules.
//!
//! The pieces in the order in which they work: [`ModuleTree`] is the model, [`MaxMemory`] the budgets, `sizes` what
//! every module counts, `balance` rewrites budgets where asked, `fill` is the loop over a `queue` with its `ties`,
//! `clean` shortens the map, `check` says what would go wrong with it. `version` lists every difference between the
//! two releases.

mod balance;
mod check;
mod clean;
mod element_type;
mod error;
mod fill;
mod memory;
mod queue;
mod size;
mod sizes;
mod ties;
mod tree;
mod tree_file;
mod version;
mod work;

pub use check::Hazard;
pub use element_type::ElementType;
pub use error::AccelerateError;
pub use memory::{Amount, DeviceKey, MaxMemory, memory_bytes, parse_max_memory};
pub use size::Size;
pub use sizes::Widths;
pub use tree::{MAX_DEPTH, MAX_NODES, ModuleTree, TreeError};
pub use tree_file::{TreeFile, TreeFileError};
pub use version::Version;

use std::collections::BTreeMap;

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use self::balance::balance;
use self::check::Placement;
use self::clean::clean;
use self::fill::{Filled, Setting, fill};
use self::sizes::{Sizes, buffer_size};
use self::tree::NodeId;

/// The arguments of a call, under upstream's names.
#[derive(Debug, Clone, Default)]
pub struct Arguments {
    /// The release to reproduce.
    pub version: Version,
    /// Budgets in the order in which they were given.
    pub max_memory: Vec<(DeviceKey, Amount)>,
    /// Bare names of classes whose instances stay whole (`no_split_module_classes`).
    pub no_split: Vec<String>,
    /// `dtype` and `special_dtypes`.
    pub widths: Widths,
    /// Pass the budgets through `get_balanced_memory` first.
    pub balanced: Option<Balanced>,
    /// Buffers of offloaded modules are offloaded too; false by default. Absent from 0.24.1, as are the next two.
    pub offload_buffers: Option<bool>,
    /// Search on where nothing was placed on a device; false by default.
    pub fallback_allocation: Option<bool>,
    /// Replace keys by modules that lie on one device as a whole; true by default.
    pub clean_result: Option<bool>,
}

/// Arguments of `get_balanced_memory`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Balanced {
    /// Leave as much of card 0 free as the others allow.
    pub low_zero: bool,
}

/// What comes back. Names are those of the tree; devices come in the order of filling.
/// In JSON, what is empty or does not apply is left out.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Answer<'t> {
    /// The map, in order of placement. `""` stands for the whole tree.
    #[serde(serialize_with = "as_map")]
    pub device_map: Vec<(&'t str, DeviceKey)>,
    /// Every module and tensor placed as one, in order of placement.
    pub placed: Vec<(&'t str, DeviceKey)>,
    /// Sizes of the map's keys by device; devices without a key are left out.
    #[serde(serialize_with = "as_map")]
    pub device_bytes: Vec<(DeviceKey, Size)>,
    /// The rewritten budgets, where balancing was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balanced_max_memory: Option<Vec<(DeviceKey, Size)>>,
    /// For each device left empty, the bytes that the first entry refused there would have needed (1.15.0).
    #[serde(serialize_with = "as_map", skip_serializing_if = "Vec::is_empty")]
    pub minimum_bytes: Vec<(DeviceKey, Size)>,
    /// Warnings of the call (1.15.0).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
    /// Tensors that the map gives no device.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub uncovered: Vec<&'t str>,
    /// Message of the `ValueError` that `check_device_map` raises for the map.
    #[serde(serialize_with = "as_value_error", skip_serializing_if = "Option::is_none")]
    pub check_error: Option<String>,
    /// Warnings of `check_device_map` (1.15.0).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub check_warnings: Vec<String>,
    /// How the published CogVLM code fails under the map.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub upstream_hazards: Vec<Hazard>,
}

/// Computes the map of `tree`.
///
/// # Errors
/// [`AccelerateError`] in the cases in which upstream raises, and where the bound on the work is reached.
pub fn infer<'t>(tree: &'t ModuleTree, arguments: &Arguments) -> Result<Answer<'t>, AccelerateError> {
    let Arguments { version, no_split, widths, .. } = arguments;
    let rules = version.rules();
    refuse_newer_arguments(arguments)?;

    let mut max_memory = MaxMemory::new(&arguments.max_memory, *version)?;
    let sizes = Sizes::new(tree, *version, widths, no_split)?;
    if let Some(Balanced { low_zero }) = arguments.balanced {
        max_memory = balance(tree, &sizes, max_memory, no_split, low_zero)?;
    }
    let fallback = arguments.fallback_allocation.unwrap_or(false);
    let filled = fill(Setting { tree, sizes: &sizes, rules, max_memory: &max_memory, fallback })?;

    let map = if arguments.clean_result.unwrap_or(true) { clean(tree, &filled.placed) } else { filled.placed.clone() };
    let warnings = if rules.notices { buffer_warning(tree, arguments, &max_memory, &filled)? } else { None };
    let placement = Placement::new(tree, &map);
    let named = |keys: &[(NodeId, DeviceKey)]| keys.iter().map(|&(key, device)| (tree.name(key), device)).collect();
    Ok(Answer {
        device_map: named(&map),
        placed: named(&filled.placed),
        device_bytes: bytes_by_device(&sizes, &map),
        balanced_max_memory: arguments.balanced.map(|_| max_memory.budgets().to_vec()),
        minimum_bytes: if rules.notices { filled.minimum_bytes } else { Vec::new() },
        warnings: warnings.into_iter().collect(),
        uncovered: placement.uncovered().into_iter().map(|node| tree.name(node)).collect(),
        check_error: placement.check_error(),
        check_warnings: placement.tensor_keys_warning().filter(|_| rules.warns_of_tensor_keys).into_iter().collect(),
        upstream_hazards: placement.hazards(),
    })
}

fn refuse_newer_arguments(arguments: &Arguments) -> Result<(), AccelerateError> {
    let newer = [
        ("offload_buffers", arguments.offload_buffers),
        ("fallback_allocation", arguments.fallback_allocation),
        ("clean_result", arguments.clean_result),
    ];
    let version = arguments.version;
    match newer.into_iter().find(|(_, value)| value.is_some() && !version.rules().newer_arguments) {
        Some((argument, _)) => Err(AccelerateError::Unsupported { argument, version }),
        None => Ok(()),
    }
}

fn bytes_by_device(sizes: &Sizes, map: &[(NodeId, DeviceKey)]) -> Vec<(DeviceKey, Size)> {
    let mut bytes = BTreeMap::new();
    for &(key, device) in map {
        *bytes.entry(device).or_default() += sizes.of(key);
    }
    bytes.into_iter().collect()
}

/// Buffers of offloaded modules stay on the executing card; upstream warns where no single card has room for them.
fn buffer_warning(
    tree: &ModuleTree, arguments: &Arguments, max_memory: &MaxMemory, filled: &Filled,
) -> Result<Option<String>, AccelerateError> {
    if arguments.offload_buffers.unwrap_or(false) {
        return Ok(None);
    }
    // Upstream forgets the buffers of partners.
    let counts = |node: &NodeId| tree.is_module(*node) && !filled.partners.contains(node);
    let offloaded = filled.placed.iter().filter(|(node, device)| !device.is_card() && counts(node));
    let buffers = offloaded
        .map(|&(node, _)| buffer_size(tree, node, arguments.version, &arguments.widths))
        .sum::<Result<Size, _>>()?;
    let used = |card| {
        let at = filled.used.binary_search_by_key(&card, |(device, _)| *device);
        at.map_or(Size::ZERO, |at| filled.used[at].1)
    };
    let mut cards = max_memory.budgets().iter().filter(|(device, _)| device.is_card()).peekable();
    let warns =
        buffers > Size::ZERO && cards.peek().is_some() && cards.all(|&(card, budget)| budget < buffers + used(card));
    Ok(warns.then(|| {
        format!(
            "Current model requires {buffers} bytes of buffer for offloaded layers, which seems does not fit any GPU's \
             remaining memory. If you are experiencing a OOM later, please consider using offload_buffers=True."
        )
    }))
}

/// Pairs as a JSON object, in their order. Card ids become strings, as keys have to.
fn as_map<K: Serialize, V: Serialize, S: Serializer>(pairs: &[(K, V)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(pairs.iter().map(|(key, value)| (key, value)))
}

fn as_value_error<S: Serializer>(message: &Option<String>, serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(2))?;
    map.serialize_entry("type", "ValueError")?;
    map.serialize_entry("message", message)?;
    map.end()
}
