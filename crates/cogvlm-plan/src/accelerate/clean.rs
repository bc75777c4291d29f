//! Cleaning: modules whose parts all lie on one device become one key.

use super::memory::DeviceKey;
use super::tree::{ModuleTree, NodeId, ROOT};

/// The keys below a module.
#[derive(Debug, Clone, Copy)]
struct Below {
    num_keys: usize,
    /// Their device; `None` where they differ.
    device: Option<DeviceKey>,
    /// Place of the first of them in order of placement.
    first: usize,
}

impl Below {
    fn merge(self, other: Self) -> Self {
        Self {
            num_keys: self.num_keys + other.num_keys,
            device: if self.device == other.device { self.device } else { None },
            first: self.first.min(other.first),
        }
    }
}

/// Replaces keys by the topmost module below which there are at least two and all on one device. A key that is alone
/// below a module stays. The result is in order of placement, which upstream loses here.
pub(crate) fn clean(tree: &ModuleTree, placed: &[(NodeId, DeviceKey)]) -> Vec<(NodeId, DeviceKey)> {
    let mut keys: Vec<Option<Below>> = vec![None; tree.num_nodes()];
    for (first, &(node, device)) in placed.iter().enumerate() {
        keys[node] = Some(Below { num_keys: 1, device: Some(device), first });
    }
    // Whatever lies below a module has a greater index; placed entries never lie within each other.
    for node in (ROOT + 1..tree.num_nodes()).rev() {
        if let Some(below) = keys[node] {
            let parent = &mut keys[tree.parent(node)];
            *parent = Some(parent.map_or(below, |other| other.merge(below)));
        }
    }
    let mut cleaned = Vec::new();
    let mut node = ROOT;
    while node < tree.num_nodes() {
        let skip = tree.subtree(node).end;
        node = match keys[node] {
            Some(Below { num_keys: 1, first, .. }) => {
                let (key, device) = placed[first];
                cleaned.push((first, key, device));
                skip
            }
            Some(Below { device: Some(device), first, .. }) => {
                cleaned.push((first, node, device));
                skip
            }
            Some(Below { device: None, .. }) => node + 1,
            None => skip,
        };
    }
    cleaned.sort_unstable_by_key(|&(first, ..)| first);
    cleaned.into_iter().map(|(_, node, device)| (node, device)).collect()
}
