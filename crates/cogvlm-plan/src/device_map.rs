//! Device maps in Hugging Face's form, `{module path: device}`: written from plans, and followed where people bring
//! their own.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use cogvlm_core::module_tree::Module;
use cogvlm_core::{DType, Device, ModelSpec, WeightGroup};
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::account::Placement;
use crate::error::PlanError;
use crate::own::sizes::{Group, Sizes};
use crate::plan::{DeviceBudget, DevicePlan, Plan, PlanRequest, Policy, Prefill, Residency};

impl Plan {
    /// Where every tensor rests, as a device map: modules whose tensors all rest in one place are one key, and `""`
    /// is the whole model. In the order of the inventory.
    pub fn device_map(&self) -> Vec<(String, Device)> {
        clean(&self.placed())
    }

    /// Where every module that owns tensors rests, and every tensor of a module that rests in several places; in the
    /// order of the inventory.
    pub fn placed(&self) -> Vec<(String, Device)> {
        let tensors = self.placements.iter().map(|placement| {
            let name = placement.tensor.name.as_str();
            (name, parent(name).unwrap_or(""), placement.residency.place(placement.executes_on))
        });
        let tensors: Vec<_> = tensors.collect();
        let mut places: BTreeMap<&str, BTreeSet<Device>> = BTreeMap::new();
        for &(_, module, device) in &tensors {
            places.entry(module).or_default().insert(device);
        }
        // A module that has children besides tensors of its own cannot stand for those tensors alone.
        let has_children = |module: &str| {
            let below = format!("{module}.");
            module.is_empty() || places.range(below.as_str()..).next().is_some_and(|(next, _)| next.starts_with(&below))
        };
        let mut placed: Vec<(String, Device)> = Vec::new();
        let mut whole: Option<&str> = None;
        for &(name, module, device) in &tensors {
            if whole == Some(module) {
                continue;
            }
            if places[module].len() > 1 || has_children(module) {
                placed.push((name.to_owned(), device));
            } else {
                placed.push((module.to_owned(), device));
                whole = Some(module);
            }
        }
        placed
    }

    /// Budgets of the devices that were planned with.
    pub fn budgets(&self) -> Vec<DeviceBudget> {
        let budget = |plan: &DevicePlan| DeviceBudget { device: plan.device, bytes: plan.budget_bytes.unwrap_or(0) };
        self.devices.iter().map(budget).collect()
    }

    /// The same placement for another run: other budgets, another context or batch, other element types.
    ///
    /// # Errors
    /// [`PlanError::Map`] with the device that `request` has no budget for; [`PlanError::OverBudget`]; the errors of a
    /// request for limits and budgets.
    pub fn for_request(&self, request: &PlanRequest) -> Result<Self, PlanError> {
        request.check()?;
        if !self.tensor_parallel.is_empty() {
            return crate::tensor::plan_members(request, &self.tensor_parallel);
        }
        let sizes = request.sizes();
        let mut request = request.clone();
        for placement in &self.placements {
            let rests = placement.residency.place(placement.executes_on);
            for device in [placement.executes_on, rests] {
                if request.budgets.iter().any(|budget| budget.device == device) {
                    continue;
                }
                if device != Device::Disk {
                    let problem = format!("is on `{device}`, which has no budget in `--max-memory`");
                    return Err(wrong(&placement.tensor.name, &problem));
                }
                request.budgets.push(DeviceBudget { device, bytes: 0 });
            }
        }
        if let Some(Prefill { device, .. }) = self.prefill
            && request.budgets.iter().all(|budget| budget.device != device)
        {
            let problem = format!("is on `{device}`, which has no budget in `--max-memory`");
            return Err(wrong("prefill", &problem));
        }
        Placement::of(self).into_plan(&sizes, &request, self.policy, self.notices.clone())
    }

    /// Follows a device map that was written by hand or by accelerate. Keys are module paths or names of tensors; the
    /// longest key that leads a tensor's name decides.
    ///
    /// A unit executes on the card that holds most of its bytes. What the map puts on `cpu` or `disk` rests there and
    /// is streamed, to the first card of the map where a unit has no part on any card; where the map has no card, the
    /// host executes everything. A unit that the map spreads over several cards executes on one of them, and the
    /// rest is streamed to it. Norms, and vectors of a weight group that is otherwise in place, stay with
    /// their unit.
    ///
    /// # Errors
    /// [`PlanError::Map`] with the key that leads nowhere, stands twice, or names a device without a budget, and with
    /// the first tensor that no key covers; [`PlanError::OverBudget`].
    pub fn from_hugging_face(map_json: &str, request: &PlanRequest) -> Result<Self, PlanError> {
        let map = read_map(map_json)?;
        request.check()?;
        let sizes = request.sizes();
        check_keys(&map, request)?;
        let by_key: BTreeMap<&str, Device> = map.iter().map(|(key, device)| (key.as_str(), *device)).collect();
        let rests = sizes.inventory.iter().map(|tensor| {
            let covering = std::iter::successors(Some(tensor.name.as_str()), |name| parent(name));
            let found = covering.into_iter().find_map(|name| by_key.get(name).copied());
            found.ok_or_else(|| wrong(&tensor.name, "no key of the device map covers it"))
        });
        let rests = rests.collect::<Result<Vec<Device>, _>>()?;
        let main = map.iter().map(|(_, device)| *device).find(|device| matches!(device, Device::Gpu(_)));
        let mut notices = Vec::new();
        let placement = follow(&sizes, &rests, main, &mut notices);
        let mut request = request.clone();
        if rests.contains(&Device::Disk) && request.budgets.iter().all(|budget| budget.device != Device::Disk) {
            // A map that says `disk` is explicit enough.
            request.budgets.push(DeviceBudget { device: Device::Disk, bytes: 0 });
        }
        placement.into_plan(&sizes, &request, Policy::Accelerate, notices)
    }
}

/// Executors of units and residencies of tensors where each tensor was put on `rests`.
fn follow(sizes: &Sizes, rests: &[Device], main: Option<Device>, notices: &mut Vec<String>) -> Placement {
    let mut executes_on = Vec::with_capacity(sizes.units.len());
    for unit in 0..sizes.units.len() {
        let groups = &sizes.groups[sizes.groups_of[unit].clone()];
        let cards = bytes_per_card(sizes, groups, rests);
        // Of equals the card that holds the first tensor.
        let most = cards.iter().map(|(_, bytes)| *bytes).max();
        let card = cards.iter().find(|(_, bytes)| Some(*bytes) == most).map(|(card, _)| *card);
        executes_on.push(card.or(main).unwrap_or(Device::Cpu));
    }
    let (embedding, first_layer) = (sizes.num_vision, sizes.num_vision + 1);
    if sizes.groups[sizes.groups_of[embedding].clone()]
        .iter()
        .all(|group| group.tensors.iter().all(|&tensor| !matches!(rests[tensor], Device::Gpu(_))))
    {
        // Rows are looked up on the host and go straight to where they are needed.
        executes_on[embedding] = executes_on[first_layer];
    }
    let mut residency = vec![Residency::Device; rests.len()];
    let mut kept = 0_u64;
    for group in &sizes.groups {
        let on = executes_on[group.unit];
        let partly_there = group.tensors.iter().any(|&tensor| rests[tensor] == on);
        for &tensor in &group.tensors {
            let is_vector = sizes.inventory[tensor].shape.iter().filter(|&&size| size > 1).count() <= 1;
            let stays = group.group == WeightGroup::Norms || is_vector && partly_there;
            residency[tensor] = match rests[tensor] {
                rests if on == Device::Cpu => {
                    if rests == Device::Disk {
                        Residency::File
                    } else {
                        Residency::Host
                    }
                }
                rests if rests == on => Residency::Device,
                _ if stays => {
                    kept += sizes.tensor_bytes(tensor);
                    Residency::Device
                }
                Device::Gpu(_) => Residency::Peer(rests[tensor]),
                Device::Cpu => Residency::Host,
                Device::Disk => Residency::File,
            };
        }
    }
    for (unit, groups) in sizes.groups_of.iter().enumerate() {
        let tensors = sizes.groups[groups.clone()].iter().flat_map(|group| &group.tensors);
        let peers: BTreeSet<Device> = tensors
            .filter_map(|&tensor| match residency[tensor] {
                Residency::Peer(card) => Some(card),
                _ => None,
            })
            .collect();
        if !peers.is_empty() {
            let peers: Vec<String> = peers.iter().map(|card| format!("`{card}`")).collect();
            let (unit, on, peers) = (sizes.units[unit], executes_on[unit], peers.join(" and "));
            notices.push(format!("the map spreads {unit}: `{on}` executes it and streams the rest from {peers}"));
        }
    }
    if kept > 0 {
        notices.push(format!("{kept} B of norms and other vectors stay with their units, whatever the map says"));
    }
    Placement { executes_on, residency, prefill: None }
}

/// Bytes of `groups` on each card, in the order in which their tensors come.
fn bytes_per_card(sizes: &Sizes, groups: &[Group], rests: &[Device]) -> Vec<(Device, u64)> {
    let mut cards: Vec<(Device, u64)> = Vec::new();
    for &tensor in groups.iter().flat_map(|group| &group.tensors) {
        let device = rests[tensor];
        if matches!(device, Device::Gpu(_)) {
            match cards.iter_mut().find(|(card, _)| *card == device) {
                Some((_, bytes)) => *bytes += sizes.tensor_bytes(tensor),
                None => cards.push((device, sizes.tensor_bytes(tensor))),
            }
        }
    }
    cards
}

fn check_keys(map: &[(String, Device)], request: &PlanRequest) -> Result<(), PlanError> {
    let known = module_paths(&request.spec);
    let mut seen = BTreeSet::new();
    for (key, device) in map {
        if !seen.insert(key) {
            return Err(wrong(key, "stands twice in the device map"));
        }
        if !known.contains(key.as_str()) {
            return Err(wrong(key, "is no module of this model"));
        }
        if *device != Device::Disk && request.budgets.iter().all(|budget| budget.device != *device) {
            return Err(wrong(key, &format!("is on `{device}`, which has no budget in `--max-memory`")));
        }
    }
    Ok(())
}

/// Paths of all modules and names of all tensors; `""` is the model.
fn module_paths(spec: &ModelSpec) -> BTreeSet<String> {
    fn walk(module: &Module, path: &str, paths: &mut BTreeSet<String>) {
        let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
        let own = module.params.iter().map(|tensor| &tensor.0).chain(module.buffers.iter().map(|buffer| &buffer.0));
        paths.extend(own.map(|name| below(name)));
        for (name, child) in &module.children {
            walk(child, &below(name), paths);
        }
        paths.insert(path.to_owned());
    }
    let mut paths = BTreeSet::new();
    walk(&Module::of_model(spec, DType::Bf16), "", &mut paths);
    paths
}

/// Replaces keys by the topmost module below which there are at least two and all on one device; a key that is alone
/// below a module stays (spec of accelerate's `clean_device_map`).
fn clean(placed: &[(String, Device)]) -> Vec<(String, Device)> {
    // Below each module: how many keys, and their device if it is one.
    let mut below: BTreeMap<&str, (usize, Option<Device>)> = BTreeMap::new();
    for (key, device) in placed {
        for module in modules_above(key) {
            let (count, common) = below.entry(module).or_insert((0, Some(*device)));
            *count += 1;
            *common = common.filter(|common| common == device);
        }
    }
    let mut seen = BTreeSet::new();
    let mut cleaned = Vec::new();
    for (key, device) in placed {
        let whole = modules_above(key).filter(|module| matches!(below[module], (2.., Some(_))));
        let key = whole.last().unwrap_or(key);
        if seen.insert(key) {
            cleaned.push((key.to_owned(), *device));
        }
    }
    cleaned
}

/// The modules that lead to `key`, innermost first; the last is `""`.
fn modules_above(key: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(parent(key), |module| parent(module))
}

/// The path above `name`; `""` above the first component, nothing above that.
fn parent(name: &str) -> Option<&str> {
    match name.rfind('.') {
        Some(dot) => Some(&name[..dot]),
        None if name.is_empty() => None,
        None => Some(""),
    }
}

fn wrong(key: &str, problem: &str) -> PlanError {
    PlanError::Map { field: format!("`{key}`"), problem: problem.to_owned() }
}

/// Reads the object without losing keys that stand twice.
fn read_map(json: &str) -> Result<Vec<(String, Device)>, PlanError> {
    struct Pairs(Vec<(String, Device)>);
    struct PairsVisitor;
    impl<'de> Visitor<'de> for PairsVisitor {
        type Value = Pairs;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object of module paths and devices")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
            let mut pairs = Vec::new();
            while let Some(key) = map.next_key::<String>()? {
                let device = map.next_value().map_err(|error| de::Error::custom(format!("`{key}`: {error}")))?;
                pairs.push((key, device));
            }
            Ok(Pairs(pairs))
        }
    }
    impl<'de> Deserialize<'de> for Pairs {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_map(PairsVisitor)
        }
    }
    let pairs: Pairs = serde_json::from_str(json)
        .map_err(|error| PlanError::Map { field: "device map".to_owned(), problem: error.to_string() })?;
    Ok(pairs.0)
}
