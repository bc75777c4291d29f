//! The tree that is planned: modules and tensors in one list, in order of registration.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use cogvlm_core::module_tree::{Module, TreeBuffer, TreeTensor};

use super::element_type::ElementType;
use super::size::Size;

/// Most modules and tensors of a tree.
pub const MAX_NODES: usize = 1 << 20;
/// Most levels of modules.
pub const MAX_DEPTH: usize = 256;
/// Most bytes that all dotted names of a tree may take together.
const MAX_NAME_BYTES: usize = 1 << 28;

/// Why a module tree cannot be planned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// Too large or too deep.
    #[error("the module tree has more than {limit} {what}")]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// The bound.
        limit: usize,
    },
    /// A module or tensor whose name is empty or has a dot.
    #[error("`{parent}` owns something called `{name}`; names must not be empty and must not contain a dot")]
    BadName {
        /// Path of the module.
        parent: String,
        /// The name.
        name: String,
    },
    /// Two tensors or modules of the same name.
    #[error("`{path}` occurs twice; names must differ within a module")]
    Twice {
        /// The path.
        path: String,
    },
    /// An element type without a known width.
    #[error("`{tensor}` has the element type `{dtype}`; PyTorch's names are meant, like `bfloat16`")]
    ElementType {
        /// The tensor.
        tensor: String,
        /// What stands there.
        dtype: String,
    },
    /// More elements than any tensor has.
    #[error("`{tensor}` of shape {shape:?} has 2^63 elements or more")]
    Elements {
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<u64>,
    },
    /// A tied name that is no parameter, or stands in two groups.
    #[error("tied tensor `{name}` {problem}")]
    Tied {
        /// The name.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// Index of a module or tensor. The root is 0; whatever lies below a module follows it without a gap.
pub(crate) type NodeId = usize;

/// Index of the root.
pub(crate) const ROOT: NodeId = 0;

/// A module tree with all dotted names, ready to be planned any number of times.
#[derive(Debug, Clone)]
pub struct ModuleTree {
    /// Depth first: a module, its own parameters, its own buffers, then its children one after the other.
    nodes: Vec<Node>,
    /// Bare class names; modules refer to them by index.
    classes: Vec<String>,
    /// Groups of at least two parameters that are one tensor, each sorted by name.
    tied_groups: Vec<Vec<NodeId>>,
}

#[derive(Debug, Clone)]
struct Node {
    name: String,
    parent: NodeId,
    /// One past the last node below this one.
    end: NodeId,
    kind: NodeKind,
}

#[derive(Debug, Clone)]
pub(crate) enum NodeKind {
    Module { class: usize, first_buffer: NodeId, first_child: NodeId },
    Parameter(Tensor),
    Buffer { tensor: Tensor, persistent: bool },
}

#[derive(Debug, Clone)]
pub(crate) struct Tensor {
    pub(crate) num_elements: u64,
    pub(crate) element_type: ElementType,
    /// Another name of the same tensor comes first, under which it is counted.
    pub(crate) counted_elsewhere: bool,
    /// That name belongs to the same module: PyTorch then never lists this one.
    pub(crate) is_unlisted: bool,
}

impl ModuleTree {
    /// Lays out the tree below `root`. `tied` holds groups of full names of parameters that are one tensor.
    ///
    /// # Errors
    /// [`TreeError`] for what no PyTorch model can be, and for trees beyond [`MAX_NODES`] or [`MAX_DEPTH`].
    pub fn new(root: &Module, tied: &[Vec<String>]) -> Result<Self, TreeError> {
        let mut builder = Builder::default();
        builder.add_modules(root)?;
        let mut tree = builder.finish();
        tree.tie(tied)?;
        Ok(tree)
    }

    /// Modules and tensors, the root included.
    pub fn num_nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Bytes of all tensors in their stored types, tied ones counted once.
    pub fn total_bytes(&self) -> Size {
        let bytes = |tensor: &Tensor| Size::of_elements(tensor.num_elements, tensor.element_type.stored_bits());
        let counted = (ROOT..self.num_nodes()).filter_map(|node| self.tensor(node));
        counted.filter(|tensor| !tensor.counted_elsewhere).map(bytes).sum()
    }

    /// Dotted name; empty for the root.
    pub(crate) fn name(&self, node: NodeId) -> &str {
        &self.nodes[node].name
    }

    pub(crate) fn parent(&self, node: NodeId) -> NodeId {
        self.nodes[node].parent
    }

    /// The node itself and everything below it.
    pub(crate) fn subtree(&self, node: NodeId) -> Range<NodeId> {
        node..self.nodes[node].end
    }

    pub(crate) fn kind(&self, node: NodeId) -> &NodeKind {
        &self.nodes[node].kind
    }

    pub(crate) fn is_module(&self, node: NodeId) -> bool {
        matches!(self.kind(node), NodeKind::Module { .. })
    }

    pub(crate) fn tensor(&self, node: NodeId) -> Option<&Tensor> {
        match self.kind(node) {
            NodeKind::Module { .. } => None,
            NodeKind::Parameter(tensor) | NodeKind::Buffer { tensor, .. } => Some(tensor),
        }
    }

    /// Bare class name of a module.
    pub(crate) fn class(&self, node: NodeId) -> Option<&str> {
        match self.kind(node) {
            NodeKind::Module { class, .. } => Some(&self.classes[*class]),
            _ => None,
        }
    }

    /// Parameters that the module owns itself, those of several names in it once.
    pub(crate) fn own_parameters(&self, node: NodeId) -> impl Iterator<Item = NodeId> {
        let own = match self.kind(node) {
            NodeKind::Module { first_buffer, .. } => node + 1..*first_buffer,
            _ => 0..0,
        };
        own.filter(|&node| self.tensor(node).is_none_or(|tensor| !tensor.is_unlisted))
    }

    /// Buffers that the module owns itself.
    pub(crate) fn own_buffers(&self, node: NodeId) -> Range<NodeId> {
        match self.kind(node) {
            NodeKind::Module { first_buffer, first_child, .. } => *first_buffer..*first_child,
            _ => 0..0,
        }
    }

    /// Child modules in order of registration; none for a tensor.
    pub(crate) fn children(&self, node: NodeId) -> impl Iterator<Item = NodeId> {
        let (mut next, end) = match self.kind(node) {
            NodeKind::Module { first_child, .. } => (*first_child, self.nodes[node].end),
            _ => (0, 0),
        };
        std::iter::from_fn(move || {
            let child = (next < end).then_some(next)?;
            next = self.nodes[child].end;
            Some(child)
        })
    }

    pub(crate) fn has_children(&self, node: NodeId) -> bool {
        self.children(node).next().is_some()
    }

    /// Groups of parameters that are one tensor, each sorted by name, in the order in which 0.24.1 finds them. (1.15.0
    /// goes over a hash set.)
    pub(crate) fn tied_groups(&self) -> &[Vec<NodeId>] {
        &self.tied_groups
    }

    fn tie(&mut self, tied: &[Vec<String>]) -> Result<(), TreeError> {
        if tied.is_empty() {
            return Ok(());
        }
        let by_name: HashMap<&str, NodeId> = (ROOT..self.num_nodes()).map(|node| (self.name(node), node)).collect();
        let mut taken = HashSet::new();
        let mut groups = Vec::new();
        for names in tied {
            let mut group = Vec::new();
            for name in names {
                let refuse = |problem| TreeError::Tied { name: name.clone(), problem };
                let node = *by_name.get(name.as_str()).ok_or_else(|| refuse("does not exist"))?;
                let NodeKind::Parameter(tensor) = self.kind(node) else { return Err(refuse("is not a parameter")) };
                if !taken.insert(node) {
                    return Err(refuse("stands in the list twice"));
                }
                let first = self.tensor(*group.first().unwrap_or(&node)).expect("groups hold parameters only");
                if (first.num_elements, first.element_type) != (tensor.num_elements, tensor.element_type) {
                    return Err(refuse("differs from its partner in size or element type"));
                }
                group.push(node);
            }
            if group.len() > 1 {
                groups.push(group);
            }
        }
        groups.iter_mut().for_each(|group| group.sort_unstable());
        groups.sort_by_key(|group| group.windows(2).filter_map(|pair| self.found_at(pair[0], pair[1])).min());
        for group in &mut groups {
            let owners: Vec<NodeId> = group.iter().map(|&node| self.parent(node)).collect();
            for (at, &node) in group.iter().enumerate().skip(1) {
                if let NodeKind::Parameter(tensor) = &mut self.nodes[node].kind {
                    tensor.counted_elsewhere = true;
                    tensor.is_unlisted = owners[at] == owners[at - 1];
                }
            }
            group.sort_by(|&a, &b| self.nodes[a].name.cmp(&self.nodes[b].name));
        }
        self.tied_groups = groups;
        Ok(())
    }

    /// When 0.24.1 finds `name`, whose nearest earlier twin is `earlier`: it goes down the modules in order of
    /// registration, and in each over the tensors in order, and finds a name in the first module that lacks the twin.
    fn found_at(&self, earlier: NodeId, name: NodeId) -> Option<(NodeId, NodeId)> {
        let modules = std::iter::successors(Some(self.parent(name)), |&module| Some(self.parent(module)));
        let module = modules.take_while(|&module| module > earlier).last()?;
        Some((module, name))
    }
}

/// A module whose children are being laid out.
struct OpenModule<'m> {
    node: NodeId,
    module: &'m Module,
    next_child: usize,
}

#[derive(Default)]
struct Builder<'m> {
    nodes: Vec<Node>,
    classes: Vec<String>,
    class_ids: HashMap<&'m str, usize>,
    name_bytes: usize,
}

impl<'m> Builder<'m> {
    /// Walks the tree with a stack of its own, so that no depth can overflow the thread's.
    fn add_modules(&mut self, root: &'m Module) -> Result<(), TreeError> {
        let node = self.add_module(ROOT, String::new(), root)?;
        let mut open = vec![OpenModule { node, module: root, next_child: 0 }];
        while let Some(parent) = open.last_mut() {
            let Some((name, module)) = parent.module.children.get(parent.next_child) else {
                self.nodes[parent.node].end = self.nodes.len();
                open.pop();
                continue;
            };
            parent.next_child += 1;
            let parent = parent.node;
            if open.len() >= MAX_DEPTH {
                return Err(TreeError::TooLarge { what: "levels of modules", limit: MAX_DEPTH });
            }
            let path = self.path(parent, name)?;
            let node = self.add_module(parent, path, module)?;
            open.push(OpenModule { node, module, next_child: 0 });
        }
        Ok(())
    }

    /// Adds a module and its own tensors; its `end` is set when its children are done.
    fn add_module(&mut self, parent: NodeId, name: String, module: &'m Module) -> Result<NodeId, TreeError> {
        let children = module.children.iter().map(|(name, _)| name);
        let params = module.params.iter().map(|TreeTensor(name, ..)| name);
        let buffers = module.buffers.iter().map(|TreeBuffer(name, ..)| name);
        let mut names = HashSet::new();
        for inner in children.chain(params).chain(buffers) {
            if !names.insert(inner) {
                let path = if name.is_empty() { inner.clone() } else { format!("{name}.{inner}") };
                return Err(TreeError::Twice { path });
            }
        }
        let next_class = self.class_ids.len();
        let class = *self.class_ids.entry(&module.class).or_insert(next_class);
        if class == next_class {
            self.classes.push(module.class.clone());
        }
        let node = self.nodes.len();
        let first_buffer = node + 1 + module.params.len();
        let kind = NodeKind::Module { class, first_buffer, first_child: first_buffer + module.buffers.len() };
        self.push(parent, name, kind)?;
        for TreeTensor(name, shape, dtype) in &module.params {
            let name = self.path(node, name)?;
            let tensor = tensor(&name, shape, dtype)?;
            self.push(node, name, NodeKind::Parameter(tensor))?;
        }
        for TreeBuffer(name, shape, dtype, persistent) in &module.buffers {
            let name = self.path(node, name)?;
            let tensor = tensor(&name, shape, dtype)?;
            self.push(node, name, NodeKind::Buffer { tensor, persistent: *persistent })?;
        }
        Ok(node)
    }

    fn push(&mut self, parent: NodeId, name: String, kind: NodeKind) -> Result<(), TreeError> {
        if self.nodes.len() >= MAX_NODES {
            return Err(TreeError::TooLarge { what: "modules and tensors", limit: MAX_NODES });
        }
        self.nodes.push(Node { name, parent, end: self.nodes.len() + 1, kind });
        Ok(())
    }

    fn path(&mut self, parent: NodeId, name: &str) -> Result<String, TreeError> {
        let parent = &self.nodes[parent].name;
        if name.is_empty() || name.contains('.') {
            return Err(TreeError::BadName { parent: parent.clone(), name: name.to_owned() });
        }
        self.name_bytes += parent.len() + 1 + name.len();
        if self.name_bytes > MAX_NAME_BYTES {
            return Err(TreeError::TooLarge { what: "bytes of names", limit: MAX_NAME_BYTES });
        }
        Ok(if parent.is_empty() { name.to_owned() } else { format!("{parent}.{name}") })
    }

    fn finish(self) -> ModuleTree {
        ModuleTree { nodes: self.nodes, classes: self.classes, tied_groups: Vec::new() }
    }
}

fn tensor(name: &str, shape: &[u64], dtype: &str) -> Result<Tensor, TreeError> {
    let element_type = ElementType::parse(dtype)
        .ok_or_else(|| TreeError::ElementType { tensor: name.to_owned(), dtype: dtype.to_owned() })?;
    // A size of 0 makes the tensor empty, whatever the others are.
    let product = shape.iter().try_fold(1_u64, |product, &size| product.checked_mul(size));
    let num_elements = if shape.contains(&0) { Some(0) } else { product };
    let num_elements = num_elements
        .filter(|&count| count < 1 << 63)
        .ok_or_else(|| TreeError::Elements { tensor: name.to_owned(), shape: shape.to_vec() })?;
    Ok(Tensor { num_elements, element_type, counted_elsewhere: false, is_unlisted: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(shape: &[u64]) -> Module {
        let weight = TreeTensor("weight".into(), shape.to_vec(), "float32".into());
        Module { class: "Leaf".into(), params: vec![weight], ..Module::default() }
    }

    fn root(children: Vec<(&str, Module)>) -> Module {
        let children = children.into_iter().map(|(name, module)| (name.to_owned(), module)).collect();
        Module { class: "Root".into(), children, ..Module::default() }
    }

    #[test]
    fn nodes_are_laid_out_in_order_of_registration() {
        let mut inner = root(vec![("x", leaf(&[2])), ("y", leaf(&[3]))]);
        inner.params.push(TreeTensor("scale".into(), vec![], "float32".into()));
        inner.buffers.push(TreeBuffer("table".into(), vec![0, u64::MAX, u64::MAX], "bool".into(), false));
        let tree = ModuleTree::new(&root(vec![("a", inner), ("b", leaf(&[4]))]), &[]).unwrap();
        let names: Vec<_> = (ROOT..tree.num_nodes()).map(|node| tree.name(node)).collect();
        assert_eq!(names, ["", "a", "a.scale", "a.table", "a.x", "a.x.weight", "a.y", "a.y.weight", "b", "b.weight"]);
        assert_eq!(tree.children(1).map(|node| tree.name(node)).collect::<Vec<_>>(), ["a.x", "a.y"]);
        assert_eq!((tree.own_parameters(1).collect(), tree.own_buffers(1), tree.subtree(1)), (vec![2], 3..4, 1..8));
        assert_eq!(tree.total_bytes(), Size::from_bytes(4 * (1 + 2 + 3 + 4)));
    }

    #[test]
    fn what_no_model_can_be_is_refused() {
        let refused = |module: &Module, tied: &[&[&str]]| {
            let tied: Vec<Vec<String>> =
                tied.iter().map(|names| names.iter().map(|&name| name.into()).collect()).collect();
            ModuleTree::new(module, &tied).unwrap_err().to_string()
        };
        let two = || root(vec![("a", leaf(&[2])), ("b", leaf(&[3]))]);
        assert_eq!(
            refused(&root(vec![("a", leaf(&[2])), ("a", leaf(&[2]))]), &[]),
            "`a` occurs twice; names must differ within a module"
        );
        assert!(refused(&root(vec![("a.b", leaf(&[2]))]), &[]).contains("must not contain a dot"));
        assert!(refused(&leaf(&[1 << 32, 1 << 31]), &[]).contains("2^63 elements"));
        assert!(refused(&two(), &[&["a.weight", "b.weight"]]).contains("differs from its partner"));
        assert!(refused(&two(), &[&["a.weight", "a.weight"]]).contains("twice"));
        assert!(refused(&two(), &[&["a", "b"]]).contains("is not a parameter"));
        assert!(refused(&two(), &[&["a.weight", "c.weight"]]).contains("`c.weight` does not exist"));
        let deep = (0..MAX_DEPTH).fold(leaf(&[1]), |inner, _| root(vec![("m", inner)]));
        assert_eq!(refused(&deep, &[]), "the module tree has more than 256 levels of modules");
    }
}
