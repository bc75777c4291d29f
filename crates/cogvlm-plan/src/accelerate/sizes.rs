//! What every module and tensor counts, and the largest layers below it.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};

use super::element_type::ElementType;
use super::error::AccelerateError;
use super::size::Size;
use super::tree::{ModuleTree, NodeId, NodeKind, Tensor};
use super::version::Version;

/// How elements are counted: as stored, unless told otherwise.
#[derive(Debug, Clone, Default)]
pub struct Widths {
    /// Element type assumed for all tensors; it only ever narrows.
    pub dtype: Option<ElementType>,
    /// Element types of the tensors named in full, wider ones included.
    pub special_dtypes: HashMap<String, ElementType>,
}

/// Sizes of all nodes of a tree, indexed by node.
#[derive(Debug)]
pub(crate) struct Sizes {
    of: Vec<Size>,
    layers: Vec<Layers>,
    whole: Vec<bool>,
}

/// The largest layers of a subtree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layers {
    /// Size of the largest.
    pub(crate) size: Size,
    /// How many are of that size.
    pub(crate) count: usize,
}

impl Layers {
    const NONE: Self = Self { size: Size::ZERO, count: 0 };

    /// The largest of both; of equals this one's size.
    pub(crate) fn merge(&mut self, other: Self) {
        match other.size.cmp(&self.size) {
            _ if self.count == 0 => *self = other,
            Ordering::Greater if other.count > 0 => *self = other,
            Ordering::Equal => self.count += other.count,
            _ => {}
        }
    }
}

impl Sizes {
    /// Sums every tensor into all modules above it, and finds the largest layers: a layer is a module without
    /// children or of a class in `no_split`, or a bare tensor of the root.
    pub(crate) fn new(
        tree: &ModuleTree, version: Version, widths: &Widths, no_split: &[String],
    ) -> Result<Self, AccelerateError> {
        let no_split: HashSet<&str> = no_split.iter().map(String::as_str).collect();
        let num_nodes = tree.num_nodes();
        let mut of = vec![Size::ZERO; num_nodes];
        let mut layers = vec![Layers::NONE; num_nodes];
        let mut whole = vec![true; num_nodes];
        // Whatever lies below a module has a greater index.
        for node in (0..num_nodes).rev() {
            if let Some(tensor) = tree.tensor(node) {
                of[node] = tensor_size(tensor, tree.name(node), version, widths)?;
            }
            let class = tree.class(node);
            whole[node] = class.is_none_or(|class| no_split.contains(class)) || !tree.has_children(node);
            if whole[node] {
                layers[node] = Layers { size: of[node], count: 1 };
            }
            if node > 0 {
                let parent = tree.parent(node);
                of[parent] = of[parent] + of[node];
                if class.is_some() {
                    // Children come last to first, and of equals the first is to be kept.
                    let mut below = layers[node];
                    below.merge(layers[parent]);
                    layers[parent] = below;
                }
            }
        }
        Ok(Self { of, layers, whole })
    }

    /// Size of a module or tensor.
    pub(crate) fn of(&self, node: NodeId) -> Size {
        self.of[node]
    }

    /// The largest layers of a module; of a tensor, itself.
    pub(crate) fn layers(&self, node: NodeId) -> Layers {
        self.layers[node]
    }

    /// Whether the node stays in one piece: a tensor, a module without children, or one of a no-split class.
    pub(crate) fn is_whole(&self, node: NodeId) -> bool {
        self.whole[node]
    }
}

/// Size of all buffers below `module`, which stay on the executing card when the module is offloaded. Upstream looks
/// special types up by the name within the module, not the full one.
pub(crate) fn buffer_size(
    tree: &ModuleTree, module: NodeId, version: Version, widths: &Widths,
) -> Result<Size, AccelerateError> {
    let prefix_len = if tree.name(module).is_empty() { 0 } else { tree.name(module).len() + 1 };
    tree.subtree(module)
        .filter_map(|node| match tree.kind(node) {
            NodeKind::Buffer { tensor, .. } => Some((node, tensor)),
            _ => None,
        })
        .map(|(node, tensor)| tensor_size(tensor, &tree.name(node)[prefix_len..], version, widths))
        .sum()
}

/// `elements x width`; nothing for a tensor that is counted under another name.
fn tensor_size(tensor: &Tensor, name: &str, version: Version, widths: &Widths) -> Result<Size, AccelerateError> {
    if tensor.counted_elsewhere {
        return Ok(Size::ZERO);
    }
    let special = if widths.special_dtypes.is_empty() { None } else { widths.special_dtypes.get(name) };
    let bits = match (special, widths.dtype) {
        (Some(special), _) => special.bits(version)?,
        (None, Some(dtype)) => {
            let keeps_width = version.rules().integers_keep_width && tensor.element_type.is_integer();
            let stored = tensor.element_type.bits(version)?;
            if keeps_width { stored } else { stored.min(dtype.bits(version)?) }
        }
        (None, None) => tensor.element_type.bits(version)?,
    };
    Ok(Size::of_elements(tensor.num_elements, bits))
}

#[cfg(test)]
mod tests {
    use cogvlm_core::module_tree::{Module, TreeBuffer, TreeTensor};

    use super::*;

    fn sizes(version: Version, dtype: &str, special: &[(&str, &str)]) -> String {
        let tensor = |name: &str, dtype: &str| TreeTensor(name.into(), vec![100], dtype.into());
        let flags = TreeBuffer("flags".into(), vec![100], "bool".into(), true);
        let params = vec![tensor("f", "float32"), tensor("i", "int64")];
        let root = Module { class: "Root".into(), params, buffers: vec![flags], children: vec![] };
        let special_dtypes = special.iter().map(|(name, dtype)| (name.to_string(), ElementType::parse(dtype).unwrap()));
        let widths = Widths { dtype: ElementType::parse(dtype), special_dtypes: special_dtypes.collect() };
        let tree = ModuleTree::new(&root, &[]).unwrap();
        let sizes = Sizes::new(&tree, version, &widths, &[]).unwrap();
        (0..4).map(|node| sizes.of(node).to_string()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn dtype_narrows_and_special_dtypes_replace() {
        for version in Version::ALL {
            assert_eq!(sizes(version, "", &[]), "1212.5 400 800 12.5");
            assert_eq!(sizes(version, "float64", &[("i", "int4")]), "462.5 400 50.0 12.5");
            assert_eq!(sizes(version, "", &[("f", "float64"), ("flags", "int8")]), "1700 800 800 100");
        }
        assert_eq!(sizes(Version::V0_24_1, "float16", &[]), "412.5 200 200 12.5");
        assert_eq!(sizes(Version::V1_15_0, "float16", &[]), "1012.5 200 800 12.5");
    }
}
