//! What a map leaves out, and what would go wrong if it were run.

use std::collections::BTreeSet;

use serde::Serialize;

use super::memory::DeviceKey;
use super::tree::{ModuleTree, NodeId, NodeKind, ROOT};

/// A way in which the published CogVLM code fails under a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Hazard {
    /// `boi` or `eoi` is not where the adapter computes, so that they cannot be concatenated with its output.
    BoiEoiApart,
    /// The patch embedding is offloaded: it runs without its position embedding and answers wrongly.
    PatchEmbeddingOffloaded,
    /// A decoder layer or ViT layer computes on several devices, so that its residual cannot be added.
    ResidualBlockSplit,
}

/// The device of every node under a map.
#[derive(Debug)]
pub(crate) struct Placement<'a> {
    tree: &'a ModuleTree,
    map: &'a [(NodeId, DeviceKey)],
    device: Vec<Option<DeviceKey>>,
    /// Where offloaded modules are executed: the first card of the map, the CPU if there is none.
    main: DeviceKey,
}

impl<'a> Placement<'a> {
    pub(crate) fn new(tree: &'a ModuleTree, map: &'a [(NodeId, DeviceKey)]) -> Self {
        let mut device = vec![None; tree.num_nodes()];
        for &(key, on) in map {
            device[tree.subtree(key)].fill(Some(on));
        }
        let main = map.iter().map(|(_, device)| *device).find(|device| device.is_card()).unwrap_or(DeviceKey::Cpu);
        Self { tree, map, device, main }
    }

    /// Tensors without a device: own buffers of split modules.
    pub(crate) fn uncovered(&self) -> Vec<NodeId> {
        let is_uncovered = |&node: &NodeId| self.device[node].is_none() && !self.tree.is_module(node);
        (ROOT..self.tree.num_nodes()).filter(is_uncovered).collect()
    }

    /// What `check_device_map` raises as a `ValueError`: it looks at everything in the state dict.
    pub(crate) fn check_error(&self) -> Option<String> {
        let is_in_state_dict =
            |node: &NodeId| !matches!(self.tree.kind(*node), NodeKind::Buffer { persistent: false, .. });
        let missing: Vec<_> =
            self.uncovered().into_iter().filter(is_in_state_dict).map(|node| self.tree.name(node)).collect();
        let list = missing.join(", ");
        (!missing.is_empty())
            .then(|| format!("The device_map provided does not give any device for the following parameters: {list}"))
    }

    /// What newer releases of `check_device_map` warn of: keys that name tensors.
    pub(crate) fn tensor_keys_warning(&self) -> Option<String> {
        let is_tensor = |(key, _): &&(NodeId, DeviceKey)| !self.tree.is_module(*key);
        let keys: Vec<_> =
            self.map.iter().filter(is_tensor).map(|(key, _)| format!("'{}'", self.tree.name(*key))).collect();
        let list = keys.join(", ");
        (!keys.is_empty())
            .then(|| format!("The following device_map keys do not match any submodules in the model: [{list}]"))
    }

    /// Everything that breaks the published code, for trees that have CogVLM's classes.
    pub(crate) fn hazards(&self) -> Vec<Hazard> {
        let mut hazards = BTreeSet::new();
        for node in ROOT..self.tree.num_nodes() {
            let hazard = match self.tree.class(node) {
                Some("EVA2CLIPModel") if self.boi_eoi_apart(node) => Hazard::BoiEoiApart,
                Some("PatchEmbedding") if self.is_position_embedding_offloaded(node) => Hazard::PatchEmbeddingOffloaded,
                Some("CogVLMDecoderLayer" | "TransformerLayer") if self.executing_devices(node).len() > 1 => {
                    Hazard::ResidualBlockSplit
                }
                _ => continue,
            };
            hazards.insert(hazard);
        }
        hazards.into_iter().collect()
    }

    fn is_offloaded(&self, device: DeviceKey) -> bool {
        device == DeviceKey::Disk || (device == DeviceKey::Cpu && self.main != DeviceKey::Cpu)
    }

    fn executing(&self, device: DeviceKey) -> DeviceKey {
        if self.is_offloaded(device) { self.main } else { device }
    }

    /// Devices that execute the tensors below a module.
    fn executing_devices(&self, module: NodeId) -> BTreeSet<DeviceKey> {
        let tensors = self.tree.subtree(module).filter(|&node| !self.tree.is_module(node));
        let mut devices: Vec<_> = tensors.filter_map(|node| self.device[node]).collect();
        devices.dedup();
        devices.into_iter().map(|device| self.executing(device)).collect()
    }

    fn boi_eoi_apart(&self, tower: NodeId) -> bool {
        let part = |node: &NodeId| self.tree.name(*node)[self.tree.name(tower).len()..].trim_start_matches('.');
        let Some(adapter) = self.tree.children(tower).find(|node| part(node) == "linear_proj") else { return false };
        let mut devices = self.executing_devices(adapter);
        for tensor in self.tree.own_parameters(tower).filter(|node| matches!(part(node), "boi" | "eoi")) {
            // A tensor that is a key of its own gets no hook: offloaded, it stays where it rests. It is one where the
            // tower as a whole has no device.
            let is_key = self.device[tower].is_none();
            devices.extend(self.device[tensor].map(|device| if is_key { device } else { self.executing(device) }));
        }
        devices.len() > 1
    }

    fn is_position_embedding_offloaded(&self, module: NodeId) -> bool {
        let table = self.tree.children(module).find(|&child| self.tree.name(child).ends_with("position_embedding"));
        let weight = table.and_then(|table| self.tree.own_parameters(table).next());
        weight.and_then(|weight| self.device[weight]).is_some_and(|device| self.is_offloaded(device))
    }
}
