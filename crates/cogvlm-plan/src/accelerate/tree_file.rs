//! Module trees as JSON: `{"schema": "module-trees/1", "trees": {name: {"total_bytes", "tied", "root"}}}`.

use std::collections::BTreeMap;

use cogvlm_core::module_tree::{Module, TreeBuffer, TreeTensor};
use serde::Deserialize;

use super::tree::{MAX_NODES, ModuleTree, TreeError};

/// Why a file of module trees cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TreeFileError {
    /// Not JSON, or not of this form.
    #[error("not a file of module trees: {0}")]
    Json(#[from] serde_json::Error),
    /// Another schema.
    #[error("the schema is `{found}`, this program reads `{SCHEMA}`")]
    Schema {
        /// What the file says.
        found: String,
    },
    /// No tree of that name.
    #[error("there is no tree called `{name}`; there are {known}")]
    UnknownTree {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: String,
    },
    /// A node with `repeat` and without `item`, or the other way round, or with tensors or children besides.
    #[error(
        "a node of class `{class}` in tree `{tree}` has to hold either `repeat` and `item`, or tensors and children"
    )]
    MixedNode {
        /// The tree.
        tree: String,
        /// Class of the node.
        class: String,
    },
    /// A tree that is no model.
    #[error("tree `{tree}`: {source}")]
    Tree {
        /// The tree.
        tree: String,
        /// What is wrong.
        source: TreeError,
    },
    /// The sizes do not add up to what the file says.
    #[error("tree `{tree}` holds {found} bytes, but its `total_bytes` says {declared}")]
    TotalBytes {
        /// The tree.
        tree: String,
        /// Sum over its tensors.
        found: f64,
        /// What the file says.
        declared: f64,
    },
}

/// The only schema there is.
const SCHEMA: &str = "module-trees/1";

/// A parsed file. Trees are laid out when they are asked for.
#[derive(Debug, Deserialize)]
pub struct TreeFile {
    schema: String,
    trees: BTreeMap<String, TreeEntry>,
}

#[derive(Debug, Deserialize)]
struct TreeEntry {
    total_bytes: Option<f64>,
    #[serde(default)]
    tied: Vec<Vec<String>>,
    root: TreeNode,
}

/// `{class, params?, buffers?, children?}`, or `{class, repeat, item}` for children `"0"`, `"1"` and so on, all equal
/// to `item`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TreeNode {
    class: String,
    #[serde(default)]
    params: Vec<TreeTensor>,
    #[serde(default)]
    buffers: Vec<TreeBuffer>,
    #[serde(default)]
    children: Vec<(String, TreeNode)>,
    repeat: Option<u64>,
    item: Option<Box<TreeNode>>,
}

impl TreeFile {
    /// Parses the text of a file. The parser allows 128 levels of JSON, about 40 levels of modules.
    ///
    /// # Errors
    /// [`TreeFileError::Json`], [`TreeFileError::Schema`].
    pub fn parse(text: &str) -> Result<Self, TreeFileError> {
        let file: Self = serde_json::from_str(text)?;
        if file.schema == SCHEMA { Ok(file) } else { Err(TreeFileError::Schema { found: file.schema }) }
    }

    /// Names of the trees.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.trees.keys().map(String::as_str)
    }

    /// The modules of the tree called `name`, repeated nodes written out.
    ///
    /// # Errors
    /// [`TreeFileError::UnknownTree`], [`TreeFileError::MixedNode`], [`TreeFileError::Tree`] where it is too large.
    pub fn module(&self, name: &str) -> Result<Module, TreeFileError> {
        let root = &self.entry(name)?.root;
        // Counted before anything is written out: nested repeats multiply.
        if root.count_nodes(name)? > MAX_NODES as u64 {
            let source = TreeError::TooLarge { what: "modules and tensors", limit: MAX_NODES };
            return Err(TreeFileError::Tree { tree: name.to_owned(), source });
        }
        Ok(root.expand())
    }

    /// The tree called `name`, ready to be planned.
    ///
    /// # Errors
    /// As [`TreeFile::module`], and where the tree is no model or its bytes are not `total_bytes`.
    pub fn tree(&self, name: &str) -> Result<ModuleTree, TreeFileError> {
        let entry = self.entry(name)?;
        let tree = ModuleTree::new(&self.module(name)?, &entry.tied)
            .map_err(|source| TreeFileError::Tree { tree: name.to_owned(), source })?;
        let found = tree.total_bytes().to_f64();
        match entry.total_bytes {
            Some(declared) if declared != found => {
                Err(TreeFileError::TotalBytes { tree: name.to_owned(), found, declared })
            }
            _ => Ok(tree),
        }
    }

    fn entry(&self, name: &str) -> Result<&TreeEntry, TreeFileError> {
        self.trees.get(name).ok_or_else(|| {
            let known = self.names().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
            TreeFileError::UnknownTree { name: name.to_owned(), known }
        })
    }
}

// These recurse, no deeper than the JSON parser did.
impl TreeNode {
    /// Modules and tensors when written out, saturating.
    fn count_nodes(&self, tree: &str) -> Result<u64, TreeFileError> {
        let own = 1 + self.params.len() as u64 + self.buffers.len() as u64;
        match (self.repeat, &self.item) {
            (None, None) => {
                self.children.iter().try_fold(own, |sum, (_, child)| Ok(child.count_nodes(tree)?.saturating_add(sum)))
            }
            (Some(repeat), Some(item)) if own == 1 && self.children.is_empty() => {
                Ok(item.count_nodes(tree)?.saturating_mul(repeat).saturating_add(1))
            }
            _ => Err(TreeFileError::MixedNode { tree: tree.to_owned(), class: self.class.clone() }),
        }
    }

    fn expand(&self) -> Module {
        let children = match (self.repeat, &self.item) {
            (Some(repeat), Some(item)) => {
                let item = item.expand();
                (0..repeat).map(|index| (index.to_string(), item.clone())).collect()
            }
            _ => self.children.iter().map(|(name, child)| (name.clone(), child.expand())).collect(),
        };
        Module { class: self.class.clone(), params: self.params.clone(), buffers: self.buffers.clone(), children }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(root: &str) -> String {
        let text = format!(r#"{{"schema": "module-trees/1", "trees": {{"t": {{"total_bytes": 8, "root": {root}}}}}}}"#);
        match TreeFile::parse(&text) {
            Ok(file) => file.tree("t").unwrap_err().to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn hostile_trees_are_refused() {
        let leaf = r#"{"class": "L", "params": [["w", [1], "float32"]]}"#;
        let too_large = "tree `t`: the module tree has more than 1048576 modules and tensors";
        assert_eq!(error(&format!(r#"{{"class": "A", "repeat": 1000000000000, "item": {leaf}}}"#)), too_large);
        let nested =
            (0..40).fold(leaf.to_owned(), |item, _| format!(r#"{{"class": "A", "repeat": 1000000, "item": {item}}}"#));
        assert_eq!(error(&nested), too_large);
        let deep = 1_000_000;
        let deep = r#"{"class":"A","children":[["a","#.repeat(deep) + leaf + &"]]}".repeat(deep);
        assert!(error(&deep).contains("recursion limit exceeded"), "{}", error(&deep));
        assert!(
            error(&format!(r#"{{"class": "A", "repeat": 2, "item": {leaf}, "children": [["x", {leaf}]]}}"#))
                .contains("either")
        );
        assert!(error(r#"{"class": "A", "repeat": 2}"#).contains("either"));
        assert!(error(r#"{"class": "A", "parms": []}"#).contains("unknown field `parms`"));
        assert!(error(r#"{"class": "A", "params": [["w", [-1], "float32"]]}"#).contains("invalid value"));
        assert_eq!(error(leaf), "tree `t` holds 4 bytes, but its `total_bytes` says 8");
    }

    #[test]
    fn unknown_trees_list_the_known_ones() {
        let file =
            TreeFile::parse(r#"{"schema": "module-trees/1", "trees": {"t": {"root": {"class": "A"}}}}"#).unwrap();
        assert_eq!(file.tree("u").unwrap_err().to_string(), "there is no tree called `u`; there are `t`");
        assert_eq!(file.tree("t").unwrap().num_nodes(), 1);
        let other = TreeFile::parse(r#"{"schema": "module-trees/2", "trees": {}}"#).unwrap_err().to_string();
        assert_eq!(other, "the schema is `module-trees/2`, this program reads `module-trees/1`");
    }
}
