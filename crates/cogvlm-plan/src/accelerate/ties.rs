//! Tied tensors: which names tie a module to others, and which queue entries hold those.

use super::tree::{ModuleTree, NodeId};
use super::version::Rules;
use super::work::{Work, WorkSpent};

/// The tied groups of a tree, matched as one release matches names.
#[derive(Debug)]
pub(crate) struct Ties<'t> {
    tree: &'t ModuleTree,
    with_dot: bool,
    by_prefix: bool,
    groups: Vec<Vec<TiedName>>,
}

/// One name of a tied tensor.
#[derive(Debug, Clone)]
pub(crate) struct TiedName {
    pub(crate) node: NodeId,
    /// The name as it is matched: with a dot behind it where the release does so.
    pattern: String,
}

impl<'t> Ties<'t> {
    pub(crate) fn new(tree: &'t ModuleTree, rules: &Rules) -> Self {
        let with_dot = rules.ties_match_with_dot;
        let tied_name = |&node: &NodeId| TiedName { node, pattern: pattern(tree.name(node), with_dot) };
        let is_found = |node: &&NodeId| {
            let is_unlisted = tree.tensor(**node).is_some_and(|tensor| tensor.is_unlisted);
            rules.finds_ties_within_module || !is_unlisted
        };
        let group = |nodes: &Vec<NodeId>| nodes.iter().filter(is_found).map(tied_name).collect();
        let groups = tree.tied_groups().iter().map(group).collect();
        Self { tree, with_dot, by_prefix: rules.partners_first, groups }
    }

    /// The partners of `entry`: of every group with a name inside the entry and another outside, the outside names.
    /// "Inside" is no question of the tree: the entry's name, or the name and its dot, occurs anywhere in the tensor's.
    pub(crate) fn partners(&self, entry: NodeId, work: &mut Work) -> Result<Vec<&TiedName>, WorkSpent> {
        if self.groups.is_empty() {
            return Ok(Vec::new());
        }
        let entry_pattern = pattern(self.tree.name(entry), self.with_dot);
        let mut partners = Vec::new();
        for group in &self.groups {
            work.spend(group.len())?;
            let is_inside = |name: &&TiedName| name.pattern.contains(&entry_pattern);
            let outside: Vec<_> = group.iter().filter(|name| !is_inside(name)).collect();
            if outside.len() < group.len() {
                partners.extend(outside);
            }
        }
        Ok(partners)
    }

    /// Whether upstream takes `entry` for the holder of the tensor `partner`: by the start of its name, before 1.2.0 by
    /// any part of it.
    pub(crate) fn holds(&self, entry: NodeId, partner: &TiedName) -> bool {
        let (entry, partner) = (self.tree.name(entry), self.tree.name(partner.node));
        if self.by_prefix {
            partner.strip_prefix(entry).is_some_and(|rest| rest.starts_with('.'))
        } else {
            partner.contains(entry)
        }
    }
}

fn pattern(name: &str, with_dot: bool) -> String {
    if with_dot { format!("{name}.") } else { name.to_owned() }
}
