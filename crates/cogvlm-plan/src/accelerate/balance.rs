//! Balanced budgets: `device_map="auto"`, `"balanced"` and `"balanced_low_0"`.

use std::collections::HashSet;

use super::error::AccelerateError;
use super::memory::{DeviceKey, MaxMemory};
use super::size::Size;
use super::sizes::Sizes;
use super::tree::{ModuleTree, NodeId, NodeKind, ROOT};

/// Upstream's `get_balanced_memory`: caps every card but the last at an even share and some room for rounding. With
/// `low_zero` card 0 gets only what the others leave over.
pub(crate) fn balance(
    tree: &ModuleTree, sizes: &Sizes, mut max_memory: MaxMemory, no_split: &[String], low_zero: bool,
) -> Result<MaxMemory, AccelerateError> {
    let unknown_to_torch = |device| matches!(device, DeviceKey::Disk | DeviceKey::Gpu(..=-1));
    if let Some(&(key, _)) = max_memory.budgets().iter().find(|(device, _)| unknown_to_torch(*device)) {
        return Err(AccelerateError::NotBalanceable { key });
    }
    let is_usable =
        |&&(device, budget): &&(DeviceKey, Size)| matches!(device, DeviceKey::Gpu(_)) && budget > Size::ZERO;
    let cards: Vec<DeviceKey> = max_memory.budgets().iter().filter(is_usable).map(|(device, _)| *device).collect();
    let Some((_last, capped)) = cards.split_last() else { return Ok(max_memory) };
    let low_zero = low_zero && cards.len() > 1;

    let total = sizes.of(ROOT);
    let shares = if low_zero { cards.len() - 1 } else { cards.len() };
    let per_card = total.floor_div(shares) + rounding_room(tree, sizes, no_split);
    for &card in capped {
        let budget = max_memory.of(card).unwrap_or_default();
        let keeps_budget = low_zero && card == DeviceKey::Gpu(0);
        max_memory.set(card, if keeps_budget { budget } else { per_card.min(budget) });
    }
    if low_zero {
        // Ids 1 .. n-1, whatever the ids of the n cards are.
        let budget_of = |id| max_memory.of(DeviceKey::Gpu(id)).ok_or(AccelerateError::LowZeroIds { id });
        let others = (1..cards.len() as i64).map(budget_of).sum::<Result<Size, _>>()?;
        let left_over = Size::ZERO.max(total - others);
        let card_0 = left_over.min(budget_of(0)?);
        max_memory.set(DeviceKey::Gpu(0), card_0);
    }
    Ok(max_memory)
}

/// A quarter more than the larger of the greatest no-split block and the mean innermost module.
fn rounding_room(tree: &ModuleTree, sizes: &Sizes, no_split: &[String]) -> Size {
    let holds = HoldsTensors::new(tree);
    let is_innermost = |&node: &NodeId| holds.any[node] && !tree.children(node).any(|child| holds.any[child]);
    let innermost: Vec<_> =
        (ROOT + 1..tree.num_nodes()).filter(|&node| tree.is_module(node)).filter(is_innermost).collect();
    let innermost_sum: Size = innermost.iter().map(|&node| sizes.of(node)).sum();
    let mean = (innermost_sum.to_f64() / innermost.len().max(1) as f64).trunc();
    let room = 1.25 * holds.largest_block(tree, sizes, no_split).to_f64().max(mean);
    Size::from_bytes(room as i128)
}

/// Which nodes appear in upstream's table of sizes: counted tensors and the modules above them. It lists parameters
/// before buffers, and thereby modules that hold parameters before those that hold buffers only.
struct HoldsTensors {
    any: Vec<bool>,
    parameters: Vec<bool>,
}

impl HoldsTensors {
    fn new(tree: &ModuleTree) -> Self {
        let mut holds = Self { any: vec![false; tree.num_nodes()], parameters: vec![false; tree.num_nodes()] };
        for node in (ROOT..tree.num_nodes()).rev() {
            if tree.tensor(node).is_some_and(|tensor| !tensor.counted_elsewhere) {
                holds.any[node] = true;
                holds.parameters[node] = matches!(tree.kind(node), NodeKind::Parameter(_));
            }
            let parent = tree.parent(node);
            holds.any[parent] |= holds.any[node];
            holds.parameters[parent] |= holds.parameters[node];
        }
        holds
    }

    /// The greatest among the first module of each no-split class in upstream's table; the root is not considered.
    fn largest_block(&self, tree: &ModuleTree, sizes: &Sizes, no_split: &[String]) -> Size {
        let mut missing: HashSet<&str> = no_split.iter().map(String::as_str).collect();
        let mut largest = Size::ZERO;
        for listed in [&self.parameters, &self.any] {
            for node in (ROOT + 1..tree.num_nodes()).filter(|&node| listed[node]) {
                if tree.class(node).is_some_and(|class| missing.remove(class)) {
                    largest = largest.max(sizes.of(node));
                }
            }
        }
        largest
    }
}
