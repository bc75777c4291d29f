//! The queue of modules and tensors that wait for a device, and the reserve: the room that main devices keep free for
//! the largest layer in it.

use std::collections::{BTreeMap, VecDeque};

use super::size::Size;
use super::sizes::{Layers, Sizes};
use super::tree::{ModuleTree, NodeId, ROOT};

/// An entry of the queue.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) node: NodeId,
    /// The reserve (by number) whose list of names has lost this entry's, or never had them.
    unlisted_in: Option<usize>,
}

/// Modules and tensors in the order in which they are to be placed.
#[derive(Debug)]
pub(crate) struct Queue<'a> {
    tree: &'a ModuleTree,
    sizes: &'a Sizes,
    entries: VecDeque<Entry>,
    /// Over all queued modules: how many layers are the largest of their module, by size. The last key is the size of
    /// the largest layer in the queue.
    layers: BTreeMap<Size, usize>,
    reserve: Reserve,
}

/// Upstream keeps the size of the largest layer and the list of all names of that size, drops names as their modules
/// come up, and looks anew when the list is empty. Only its length matters.
#[derive(Debug)]
struct Reserve {
    size: Size,
    names_left: usize,
    /// How many reserves there were before this one. The first one also lists tensors of the root.
    number: usize,
}

impl<'a> Queue<'a> {
    /// The root's parameters, children and buffers.
    pub(crate) fn new(tree: &'a ModuleTree, sizes: &'a Sizes) -> Self {
        let nodes = tree.own_parameters(ROOT).chain(tree.children(ROOT)).chain(tree.own_buffers(ROOT));
        let reserve = Reserve { size: Size::ZERO, names_left: 0, number: 0 };
        let mut queue = Self { tree, sizes, entries: VecDeque::new(), layers: BTreeMap::new(), reserve };
        let mut largest = Layers { size: Size::ZERO, count: 0 };
        for node in nodes {
            queue.entries.push_back(Entry { node, unlisted_in: None });
            queue.count_layers(node);
            largest.merge(sizes.layers(node));
        }
        queue.reserve = Reserve { size: largest.size, names_left: largest.count, number: 0 };
        queue
    }

    /// Takes the first entry. Its names leave the reserve's list; if none is left, the reserve becomes the largest
    /// layer among the modules that remain.
    pub(crate) fn pop(&mut self) -> Option<Entry> {
        let mut entry = self.entries.pop_front()?;
        self.uncount_layers(entry.node);
        if self.is_listed(&entry) {
            let layers = self.sizes.layers(entry.node);
            if layers.size == self.reserve.size {
                self.reserve.names_left -= layers.count;
            }
        }
        if self.reserve.names_left == 0 {
            self.renew_reserve();
        }
        entry.unlisted_in = Some(self.reserve.number);
        Some(entry)
    }

    /// Size of the largest layer, as upstream last looked.
    pub(crate) fn reserve(&self) -> Size {
        self.reserve.size
    }

    /// Entries from `from` on.
    pub(crate) fn iter_from(&self, from: usize) -> impl Iterator<Item = NodeId> {
        self.entries.range(from.min(self.entries.len())..).map(|entry| entry.node)
    }

    /// Place of `node`, if it is an entry.
    pub(crate) fn position(&self, node: NodeId) -> Option<usize> {
        self.entries.iter().position(|entry| entry.node == node)
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The entry at a place that exists.
    pub(crate) fn node_at(&self, at: usize) -> NodeId {
        self.entries[at].node
    }

    /// Puts an entry that was taken back in front.
    pub(crate) fn put_back(&mut self, entry: Entry) {
        self.count_layers(entry.node);
        self.entries.push_front(entry);
    }

    /// Takes an entry out. The reserve keeps its names.
    pub(crate) fn remove(&mut self, at: usize) -> Option<Entry> {
        let entry = self.entries.remove(at)?;
        self.uncount_layers(entry.node);
        Some(entry)
    }

    /// Replaces a module by its own parameters and its children. Its own buffers are dropped, as upstream does.
    pub(crate) fn split(&mut self, at: usize) {
        if let Some(entry) = self.remove(at) {
            self.insert_parts(at, entry);
        }
    }

    /// Puts the parts of a module that was taken in front: its own parameters and its children.
    pub(crate) fn put_back_split(&mut self, entry: Entry) {
        self.insert_parts(0, entry);
    }

    /// Makes the reserve the largest layer among the queued modules.
    pub(crate) fn renew_reserve(&mut self) {
        let (size, names_left) = self.layers.last_key_value().map_or((Size::ZERO, 0), |(size, count)| (*size, *count));
        self.reserve = Reserve { size, names_left, number: self.reserve.number + 1 };
    }

    /// Parts of a module are listed as the module was.
    fn insert_parts(&mut self, at: usize, Entry { node, unlisted_in }: Entry) {
        let parts: Vec<_> = self.tree.own_parameters(node).chain(self.tree.children(node)).collect();
        for &part in &parts {
            self.count_layers(part);
        }
        let parts = parts.into_iter().map(|node| Entry { node, unlisted_in });
        if at == 0 {
            // The common case, without moving what lies behind.
            parts.rev().for_each(|part| self.entries.push_front(part));
        } else {
            let behind = self.entries.split_off(at);
            self.entries.extend(parts.chain(behind));
        }
    }

    fn is_listed(&self, entry: &Entry) -> bool {
        let could_be = if self.tree.is_module(entry.node) {
            true
        } else {
            self.reserve.number == 0 && self.tree.parent(entry.node) == ROOT
        };
        could_be && entry.unlisted_in != Some(self.reserve.number)
    }

    fn count_layers(&mut self, node: NodeId) {
        if self.tree.is_module(node) {
            let Layers { size, count } = self.sizes.layers(node);
            *self.layers.entry(size).or_default() += count;
        }
    }

    fn uncount_layers(&mut self, node: NodeId) {
        if self.tree.is_module(node) {
            let Layers { size, count } = self.sizes.layers(node);
            let counted = self.layers.entry(size).or_default();
            *counted -= count;
            if *counted == 0 {
                self.layers.remove(&size);
            }
        }
    }
}
