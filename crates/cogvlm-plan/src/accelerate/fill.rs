//! The loop that fills one device after the other. One loop for both releases: what differs is in [`Rules`].

use std::collections::HashSet;

use super::error::AccelerateError;
use super::memory::{DeviceKey, MaxMemory};
use super::queue::{Entry, Queue};
use super::size::Size;
use super::sizes::Sizes;
use super::ties::Ties;
use super::tree::{ModuleTree, NodeId, NodeKind};
use super::version::Rules;
use super::work::Work;

/// What the loop leaves behind.
#[derive(Debug, Default)]
pub(crate) struct Filled {
    /// Every module and tensor that was placed as one, in order of placement.
    pub(crate) placed: Vec<(NodeId, DeviceKey)>,
    /// Those of them that were placed as partners of another entry.
    pub(crate) partners: HashSet<NodeId>,
    /// For each device left empty, what the first refused entry would have needed.
    pub(crate) minimum_bytes: Vec<(DeviceKey, Size)>,
    /// Bytes in use by device, in the order of filling, the reserve included where the device was left.
    pub(crate) used: Vec<(DeviceKey, Size)>,
}

/// What does not change while the loop runs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setting<'a> {
    pub(crate) tree: &'a ModuleTree,
    pub(crate) sizes: &'a Sizes,
    pub(crate) rules: &'a Rules,
    pub(crate) max_memory: &'a MaxMemory,
    /// `fallback_allocation`.
    pub(crate) fallback: bool,
}

/// Places the whole tree.
pub(crate) fn fill(setting: Setting<'_>) -> Result<Filled, AccelerateError> {
    let mut fill = Fill {
        setting,
        ties: Ties::new(setting.tree, setting.rules),
        queue: Queue::new(setting.tree, setting.sizes),
        devices: devices(setting.max_memory),
        current: 0,
        used: Size::ZERO,
        filled: Filled::default(),
        fallbacks_left: setting.tree.num_nodes(),
        work: Work::new(),
    };
    fill.run()?;
    Ok(fill.filled)
}

/// A device and what it offers.
#[derive(Debug, Clone, Copy)]
struct Target {
    device: DeviceKey,
    /// `None` without a limit.
    budget: Option<Size>,
    /// Keeps the reserve free, because offloaded layers are executed from here.
    is_main: bool,
}

/// All devices in the order of filling, `disk` last in any case, and without a limit whatever its budget says.
fn devices(max_memory: &MaxMemory) -> Vec<Target> {
    let given = || max_memory.budgets().iter().filter(|(device, _)| *device != DeviceKey::Disk);
    let has_mps = given().any(|(device, _)| *device == DeviceKey::Mps);
    let first = given().next().map(|(device, _)| *device);
    let is_main = |device| {
        if has_mps { device == DeviceKey::Mps } else { device == DeviceKey::Cpu || Some(device) == first }
    };
    let limited = given().map(|&(device, budget)| Target { device, budget: Some(budget), is_main: is_main(device) });
    limited.chain([Target { device: DeviceKey::Disk, budget: None, is_main: false }]).collect()
}

/// The queue entries that have to go where an entry goes, because they share tensors with it.
#[derive(Debug, Default)]
struct Partners {
    /// Holders of the shared tensors, one for each of these, so possibly some twice.
    holders: Vec<NodeId>,
    /// What they add to the entry's size.
    extra: Size,
}

struct Fill<'a> {
    setting: Setting<'a>,
    ties: Ties<'a>,
    queue: Queue<'a>,
    devices: Vec<Target>,
    /// Index of the device being filled; devices once left are not looked at again.
    current: usize,
    /// Bytes placed on it.
    used: Size,
    filled: Filled,
    /// Each fallback places an entry, unless upstream goes round in circles.
    fallbacks_left: usize,
    work: Work,
}

impl Fill<'_> {
    fn run(&mut self) -> Result<(), AccelerateError> {
        let Setting { sizes, rules, .. } = self.setting;
        while let Some(entry) = self.queue.pop() {
            self.work.spend(1)?;
            let target = self.devices[self.current];
            let reserved = if target.is_main { self.queue.reserve() } else { Size::ZERO };
            // May be negative.
            let cap = target.budget.map(|budget| budget - reserved);
            let fits = |bytes| cap.is_none_or(|cap| bytes <= cap);

            let alone = self.used + sizes.of(entry.node);
            let partners =
                if rules.partners_first || fits(alone) { self.partners(entry.node)? } else { Partners::default() };
            let need = sizes.of(entry.node) + partners.extra;

            if fits(alone) && fits(self.used + need) {
                self.place(entry, &partners, need)?;
            } else if fits(alone) && self.split_a_partner(entry, &partners)? {
                // The entry is looked at again.
            } else if self.may_be_split(entry.node, alone, cap)? {
                self.queue.put_back_split(entry);
                self.queue.renew_reserve();
            } else if !self.fall_back(entry, need)? {
                self.leave_device(entry, need, reserved);
            }
        }
        let device = self.devices[self.current].device;
        self.filled.used.push((device, self.used));
        Ok(())
    }

    /// Puts the entry and its partners on the current device.
    fn place(&mut self, entry: Entry, partners: &Partners, need: Size) -> Result<(), AccelerateError> {
        let device = self.devices[self.current].device;
        self.used += need;
        self.filled.placed.push((entry.node, device));
        for &holder in &partners.holders {
            self.work.spend(self.queue.len())?;
            // Absent where it holds two of the shared tensors and is placed already.
            if let Some(at) = self.queue.position(holder) {
                self.queue.remove(at);
                self.filled.placed.push((holder, device));
                self.filled.partners.insert(holder);
            }
        }
        Ok(())
    }

    /// The partners of an entry that was taken from the queue.
    fn partners(&mut self, entry: NodeId) -> Result<Partners, AccelerateError> {
        self.partners_among(entry, &[], 0)
    }

    /// The partners of `entry` among `ahead` (the last one first) and the queue's entries from `from` on.
    fn partners_among(&mut self, entry: NodeId, ahead: &[NodeId], from: usize) -> Result<Partners, AccelerateError> {
        let Setting { tree, sizes, .. } = self.setting;
        let mut found = Partners::default();
        for partner in self.ties.partners(entry, &mut self.work)? {
            self.work.spend(ahead.len() + self.queue.len())?;
            let mut candidates = ahead.iter().rev().copied().chain(self.queue.iter_from(from));
            let holder = candidates.find(|&candidate| self.ties.holds(candidate, partner));
            let holder = holder.ok_or_else(|| AccelerateError::PartnerNotFound {
                entry: tree.name(entry).to_owned(),
                partner: tree.name(partner.node).to_owned(),
            })?;
            found.extra += sizes.of(holder) - sizes.of(partner.node);
            found.holders.push(holder);
        }
        Ok(found)
    }

    /// The entry fits, its partners do not: splits the first of them that may be, so that a smaller piece is left to
    /// share the device. Whether one was.
    fn split_a_partner(&mut self, entry: Entry, partners: &Partners) -> Result<bool, AccelerateError> {
        let Setting { tree, sizes, .. } = self.setting;
        for &holder in &partners.holders {
            if !tree.is_module(holder) {
                // Found by any part of its name, which only the older release does, and asked for its children.
                return Err(AccelerateError::TiedRootTensor {
                    tensor: tree.name(holder).to_owned(),
                    entry: tree.name(entry.node).to_owned(),
                    device: self.devices[self.current].device,
                });
            }
            if sizes.is_whole(holder) {
                continue;
            }
            self.work.spend(self.queue.len())?;
            if let Some(at) = self.queue.position(holder) {
                self.queue.split(at);
            }
            self.queue.put_back(entry);
            self.queue.renew_reserve();
            return Ok(true);
        }
        Ok(false)
    }

    /// Whether the entry is replaced by its parts, given the bytes in use with it.
    fn may_be_split(&self, entry: NodeId, alone: Size, cap: Option<Size>) -> Result<bool, AccelerateError> {
        let Setting { tree, sizes, rules, .. } = self.setting;
        let too_big = cap.is_some_and(|cap| if rules.splits_exact_fit { alone >= cap } else { alone > cap });
        if too_big && !rules.root_buffers_move_on && matches!(tree.kind(entry), NodeKind::Buffer { .. }) {
            return Err(AccelerateError::RootBuffer {
                buffer: tree.name(entry).to_owned(),
                device: self.devices[self.current].device,
            });
        }
        Ok(too_big && !sizes.is_whole(entry))
    }

    /// On a device that is still empty, pulls some later module that fits to the front of the queue. Whether one was.
    fn fall_back(&mut self, entry: Entry, need: Size) -> Result<bool, AccelerateError> {
        let Target { device, budget, .. } = self.devices[self.current];
        let Some(budget) = budget.filter(|_| self.setting.fallback && self.used == Size::ZERO) else {
            return Ok(false);
        };
        let limit = budget - self.queue.reserve().max(need) - self.used;
        if limit.is_float() {
            return Err(AccelerateError::FractionalLimit { device, limit: limit.to_string() });
        }
        if limit < Size::ZERO {
            return Ok(false);
        }
        let Some((at, found)) = self.find_fallback(limit)? else { return Ok(false) };
        self.fallbacks_left = self.fallbacks_left.checked_sub(1).ok_or(AccelerateError::Endless)?;
        self.work.spend(self.queue.len())?;
        let found = self.take_out(at, found);
        self.queue.put_back(entry);
        found.into_iter().for_each(|found| self.queue.put_back(found));
        Ok(true)
    }

    /// The first module or tensor, depth first in the order of the queue, that takes no more than `limit` together with
    /// its partners, and the place of the queue entry it lies in.
    fn find_fallback(&mut self, limit: Size) -> Result<Option<(usize, NodeId)>, AccelerateError> {
        let Setting { tree, sizes, .. } = self.setting;
        let mut parts: Vec<NodeId> = Vec::new();
        for at in 0..self.queue.len() {
            parts.push(self.queue.node_at(at));
            while let Some(node) = parts.pop() {
                self.work.spend(1)?;
                let need = sizes.of(node) + self.partners_among(node, &parts, at + 1)?.extra;
                if need <= limit {
                    return Ok(Some((at, node)));
                }
                if !sizes.is_whole(node) {
                    let first = parts.len();
                    parts.extend(tree.own_parameters(node).chain(tree.children(node)));
                    parts[first..].reverse();
                }
            }
        }
        Ok(None)
    }

    /// Takes `node` out of the queue, splitting the modules around it, the outermost of which is the entry at `at`.
    fn take_out(&mut self, mut at: usize, node: NodeId) -> Option<Entry> {
        let tree = self.setting.tree;
        while self.queue.node_at(at) != node {
            self.queue.split(at);
            at += self.queue.iter_from(at).position(|part| tree.subtree(part).contains(&node))?;
        }
        self.queue.remove(at)
    }

    /// Goes on to the next device, with the same entry.
    fn leave_device(&mut self, entry: Entry, need: Size, reserved: Size) {
        let device = self.devices[self.current].device;
        if self.used == Size::ZERO {
            self.filled.minimum_bytes.push((device, need + reserved));
        }
        self.filled.used.push((device, self.used + reserved));
        self.current += 1;
        self.used = Size::ZERO;
        self.queue.put_back(entry);
    }
}
