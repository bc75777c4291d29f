//! `plan --requests`: one JSON request in, one JSON answer out, whatever the request is.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::rc::Rc;

use cogvlm_core::module_tree::Module;
use cogvlm_core::{DType, ModelConfig};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value, json};

use crate::accelerate::{
    AccelerateError, Amount, Arguments, Balanced, DeviceKey, ElementType, MAX_NODES, ModuleTree, Size, TreeFile,
    Version, Widths, infer,
};
use crate::plan::Policy;

/// A request that is answered with an error: the name of an exception, and what happened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RequestError {
    /// Upstream's exception where it raises one, else the nearest of Python's.
    pub exception: String,
    /// What happened, and to which field.
    pub message: String,
}

impl RequestError {
    /// An error of the given exception.
    pub fn new(exception: &str, message: impl Into<String>) -> Self {
        Self { exception: exception.to_owned(), message: message.into() }
    }
}

/// Answers requests under policies other than `accelerate`: gets the policy and the fields of the request, gives the
/// fields of the answer.
pub type OwnPolicy<'a> = dyn FnMut(Policy, &Map<String, Value>) -> Result<Value, RequestError> + 'a;

/// Answers one line. The answer is one line too, without its end: the fields of the map computed, or
/// `{"error": {"type", "message"}}`, or `{"unsupported": true, "argument"}` where the release lacks an argument.
///
/// A request without `policy` is for `accelerate`, one without `accelerate_version` for 0.24.1. Other policies go to
/// `own`.
pub fn answer_line(line: &str, trees: &mut TreeCache, own: &mut OwnPolicy<'_>) -> String {
    let answer = parse_line(line).and_then(|fields| match policy(&fields)? {
        Policy::Accelerate => answer_accelerate(fields, trees),
        policy => own(policy, &fields),
    });
    let answer = answer.unwrap_or_else(|error| json!({"error": {"type": error.exception, "message": error.message}}));
    answer.to_string()
}

fn parse_line(line: &str) -> Result<Map<String, Value>, RequestError> {
    let not_json = |error| RequestError::new("ValueError", format!("the request is not JSON: {error}"));
    match serde_json::from_str(line).map_err(not_json)? {
        Value::Object(fields) => Ok(fields),
        _ => Err(RequestError::new("TypeError", "a request is a JSON object")),
    }
}

fn policy(fields: &Map<String, Value>) -> Result<Policy, RequestError> {
    let given = fields.get("policy").filter(|policy| !policy.is_null());
    given.map_or(Ok(Policy::Accelerate), |policy| {
        Policy::deserialize(policy).map_err(|error| RequestError::new("ValueError", format!("`policy`: {error}")))
    })
}

/// The fields of a request under the accelerate policy: those of a recorded case, and where the tree comes from.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AccelerateRequest {
    module_tree: Option<String>,
    model: Option<String>,
    accelerate_version: Option<String>,
    #[serde(rename = "fn", default)]
    function: Function,
    low_zero: Option<bool>,
    max_memory: Option<Vec<(Value, Value)>>,
    no_split: Option<OneOrMany>,
    dtype: Option<String>,
    special_dtypes: Option<HashMap<String, String>>,
    offload_buffers: Option<bool>,
    fallback_allocation: Option<bool>,
    clean_result: Option<bool>,
    /// What a recorded case says about itself, and what was read already.
    #[serde(rename = "policy")]
    _policy: Option<IgnoredAny>,
    #[serde(rename = "id")]
    _id: Option<IgnoredAny>,
    #[serde(rename = "group")]
    _group: Option<IgnoredAny>,
    #[serde(rename = "note")]
    _note: Option<IgnoredAny>,
    #[serde(rename = "tree")]
    _tree: Option<IgnoredAny>,
    #[serde(rename = "expect")]
    _expect: Option<IgnoredAny>,
}

#[derive(Deserialize, Default, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Function {
    #[default]
    Infer,
    Balanced,
}

/// A list, or one string that stands for a list of one.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a class name or a list of class names")]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

fn answer_accelerate(fields: Map<String, Value>, trees: &mut TreeCache) -> Result<Value, RequestError> {
    let request = AccelerateRequest::deserialize(Value::Object(fields))
        .map_err(|error| RequestError::new("TypeError", format!("cannot read the request: {error}")))?;
    let tree = match (&request.module_tree, &request.model) {
        (Some(reference), None) => trees.module_tree(reference)?,
        (None, Some(model)) => trees.model(model)?,
        _ => return Err(RequestError::new("TypeError", "a request names either `module_tree` (FILE:NAME) or `model`")),
    };
    match request.arguments().and_then(|arguments| Ok(infer(&tree, &arguments)?)) {
        Ok(answer) => Ok(json!(answer)),
        Err(Refusal::Unsupported(argument)) => Ok(json!({"unsupported": true, "argument": argument})),
        Err(Refusal::Request(error)) => Err(error),
    }
}

enum Refusal {
    Unsupported(&'static str),
    Request(RequestError),
}

impl From<RequestError> for Refusal {
    fn from(error: RequestError) -> Self {
        Self::Request(error)
    }
}

impl From<AccelerateError> for Refusal {
    fn from(error: AccelerateError) -> Self {
        match error {
            AccelerateError::Unsupported { argument, .. } => Self::Unsupported(argument),
            error => Self::Request(RequestError::new(error.exception(), error.to_string())),
        }
    }
}

impl AccelerateRequest {
    fn arguments(self) -> Result<Arguments, Refusal> {
        let version = match &self.accelerate_version {
            None => Version::default(),
            Some(text) => Version::parse(text).ok_or_else(|| {
                let known = Version::ALL.map(Version::as_str).join(" and ");
                RequestError::new("ValueError", format!("`accelerate_version` is `{text}`; {known} are reproduced"))
            })?,
        };
        let balanced = match self.function {
            Function::Balanced => Some(Balanced { low_zero: self.low_zero.unwrap_or(false) }),
            Function::Infer if self.low_zero == Some(true) => {
                return Err(RequestError::new("TypeError", "`low_zero` needs `fn` to be \"balanced\"").into());
            }
            Function::Infer => None,
        };
        let max_memory = self.max_memory.ok_or_else(|| {
            RequestError::new(
                "TypeError",
                "`max_memory` is missing; the memory of this machine is not part of a request",
            )
        })?;
        let special_dtypes = self.special_dtypes.unwrap_or_default().into_iter();
        Ok(Arguments {
            version,
            max_memory: max_memory.into_iter().map(budget).collect::<Result<_, _>>()?,
            no_split: match self.no_split {
                None => Vec::new(),
                Some(OneOrMany::One(class)) => vec![class],
                Some(OneOrMany::Many(classes)) => classes,
            },
            widths: Widths {
                dtype: self.dtype.as_deref().map(element_type).transpose()?,
                special_dtypes: special_dtypes
                    .map(|(name, dtype)| Ok((name, element_type(&dtype)?)))
                    .collect::<Result<_, AccelerateError>>()?,
            },
            balanced,
            offload_buffers: self.offload_buffers,
            fallback_allocation: self.fallback_allocation,
            clean_result: self.clean_result,
        })
    }
}

fn element_type(name: &str) -> Result<ElementType, AccelerateError> {
    ElementType::parse(name).ok_or_else(|| AccelerateError::UnknownElementType { name: name.to_owned() })
}

/// `[key, value]`: a card's id or a word, and bytes or a memory string.
fn budget((key, amount): (Value, Value)) -> Result<(DeviceKey, Amount), AccelerateError> {
    let device = match (&key, key.as_i64()) {
        (_, Some(id)) => DeviceKey::Gpu(id),
        (Value::String(word), _) => DeviceKey::from_word(word)?,
        _ => return Err(AccelerateError::UnknownDevice { key: key.to_string() }),
    };
    let amount = match amount {
        Value::String(text) => Amount::Text(text),
        Value::Number(number) => match (number.as_i128(), number.as_f64()) {
            (Some(bytes), _) => Amount::Bytes(Size::from_bytes(bytes)),
            // Python's comparisons take a float as well as an integer.
            (None, Some(bytes)) if bytes.fract() == 0.0 => Amount::Bytes(Size::from_bytes(bytes as i128).as_float()),
            _ => return Err(AccelerateError::Budget { device: device.to_string(), found: number.to_string() }),
        },
        other => return Err(AccelerateError::Budget { device: device.to_string(), found: other.to_string() }),
    };
    Ok((device, amount))
}

/// Trees that requests refer to, read once.
#[derive(Debug, Default)]
pub struct TreeCache {
    files: HashMap<String, TreeFile>,
    trees: BTreeMap<String, Rc<ModuleTree>>,
}

/// Most files, and most trees, that are kept.
const MAX_CACHED: usize = 32;
/// Most bytes of a file of module trees or a configuration.
const MAX_FILE_BYTES: u64 = 64 << 20;

impl TreeCache {
    /// The tree `FILE:NAME`; `FILE` will do where the file holds one tree.
    ///
    /// # Errors
    /// `FileNotFoundError` or another `OSError` where the file cannot be read, `ValueError` for its content,
    /// `KeyError` for an unknown name.
    pub fn module_tree(&mut self, reference: &str) -> Result<Rc<ModuleTree>, RequestError> {
        let key = format!("file {reference}");
        if let Some(tree) = self.trees.get(&key) {
            return Ok(Rc::clone(tree));
        }
        let (path, name) = match reference.rsplit_once(':') {
            Some((path, name)) => (path, Some(name)),
            None => (reference, None),
        };
        let file = self.file(path)?;
        let name = name.or_else(|| file.names().next().filter(|_| file.names().nth(1).is_none())).ok_or_else(|| {
            let known = file.names().collect::<Vec<_>>().join("`, `");
            RequestError::new(
                "KeyError",
                format!("`module_tree` {path} names no tree; write FILE:NAME with one of `{known}`"),
            )
        })?;
        let tree = file
            .tree(name)
            .map_err(|error| RequestError::new("ValueError", format!("`module_tree` {path}: {error}")))?;
        Ok(self.keep(key, tree))
    }

    /// The tree of a built-in configuration, or of the `config.json` in a directory, with the element type that the
    /// configuration names.
    ///
    /// # Errors
    /// As [`TreeCache::module_tree`].
    pub fn model(&mut self, model: &str) -> Result<Rc<ModuleTree>, RequestError> {
        let key = format!("model {model}");
        if let Some(tree) = self.trees.get(&key) {
            return Ok(Rc::clone(tree));
        }
        let refuse = |message: String| RequestError::new("ValueError", format!("`model` {model}: {message}"));
        // `NAME@SEED` is the configuration NAME with synthetic weights.
        let name =
            model.split_once('@').filter(|(_, seed)| seed.parse::<u64>().is_ok()).map_or(model, |(name, _)| name);
        let config = match ModelConfig::built_in(name) {
            Some(config) => config,
            None => {
                let path = [model, name].map(Path::new).into_iter().find(|path| path.exists());
                let path = path.unwrap_or(Path::new(model));
                let text = read(&if path.is_file() { path.to_owned() } else { path.join("config.json") })?;
                ModelConfig::from_json(&text).map_err(|error| refuse(error.to_string()))?
            }
        };
        let spec = config.resolve().map_err(|error| refuse(error.to_string()))?;
        // A layer has more than ten modules and tensors.
        if spec.num_layers.max(spec.vision.num_layers) > MAX_NODES / 10 {
            return Err(refuse("too many layers to plan".to_owned()));
        }
        let dtype = match config.torch_dtype.as_deref() {
            None => DType::Bf16,
            Some(name) => [DType::F32, DType::F16, DType::Bf16]
                .into_iter()
                .find(|dtype| dtype.torch_name() == name)
                .ok_or_else(|| refuse(format!("`torch_dtype` is {name}; float32, float16 and bfloat16 are known")))?,
        };
        let tree = ModuleTree::new(&Module::of_model(&spec, dtype), &[]).map_err(|error| refuse(error.to_string()))?;
        Ok(self.keep(key, tree))
    }

    fn file(&mut self, path: &str) -> Result<&TreeFile, RequestError> {
        if !self.files.contains_key(path) {
            let file = TreeFile::parse(&read(Path::new(path))?)
                .map_err(|error| RequestError::new("ValueError", format!("`module_tree` {path}: {error}")))?;
            if self.files.len() >= MAX_CACHED {
                self.files.clear();
            }
            self.files.insert(path.to_owned(), file);
        }
        Ok(&self.files[path])
    }

    fn keep(&mut self, key: String, tree: ModuleTree) -> Rc<ModuleTree> {
        if self.trees.len() >= MAX_CACHED {
            self.trees.clear();
        }
        let tree = Rc::new(tree);
        self.trees.insert(key, Rc::clone(&tree));
        tree
    }
}

fn read(path: &Path) -> Result<String, RequestError> {
    let refuse = |error: std::io::Error| {
        let exception = if error.kind() == std::io::ErrorKind::NotFound { "FileNotFoundError" } else { "OSError" };
        RequestError::new(exception, format!("cannot read {}: {error}", path.display()))
    };
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text));
    if read.map_err(refuse)? as u64 > MAX_FILE_BYTES {
        return Err(RequestError::new(
            "ValueError",
            format!("{} is larger than {MAX_FILE_BYTES} bytes", path.display()),
        ));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(line: &str) -> String {
        let mut own = |policy: Policy, fields: &Map<String, Value>| Ok(json!({"own": policy, "fields": fields.len()}));
        answer_line(line, &mut TreeCache::default(), &mut own)
    }

    fn refusal(line: &str) -> (String, String) {
        let answer: Value = serde_json::from_str(&answer(line)).unwrap();
        let field =
            |name: &str| answer["error"][name].as_str().unwrap_or_else(|| panic!("{line}: {answer}")).to_owned();
        (field("type"), field("message"))
    }

    #[test]
    fn a_model_is_planned() {
        let request = r#"{"model": "tiny", "max_memory": [[0, "1GiB"]]}"#;
        let seeded = r#"{"model": "tiny@11", "max_memory": [[0, "1GiB"]], "policy": "accelerate"}"#;
        assert_eq!(answer(request), answer(seeded));
        let answer: Value = serde_json::from_str(&answer(request)).unwrap();
        assert_eq!(answer["device_map"], json!({"": 0}));
        // The parameters, and an `inv_freq` of 16 for each of the layers.
        assert!(answer["device_bytes"]["0"].as_u64().unwrap() > 10_119_072, "{answer}");
    }

    #[test]
    fn other_policies_are_handed_on() {
        assert_eq!(answer(r#"{"policy": "latency", "context": 7}"#), r#"{"own":"latency","fields":2}"#);
    }

    #[test]
    fn an_argument_that_the_release_lacks_is_told_apart() {
        let request = r#"{"model": "tiny", "max_memory": [[0, 1]], "clean_result": true}"#;
        assert_eq!(answer(request), r#"{"unsupported":true,"argument":"clean_result"}"#);
    }

    #[test]
    fn bad_requests_are_answered() {
        let deep = "[".repeat(1_000_000);
        for (line, exception, part) in [
            ("", "ValueError", "not JSON"),
            ("[1]", "TypeError", "a JSON object"),
            (deep.as_str(), "ValueError", "recursion limit"),
            (r#"{"max_memory": [[0, 1]]}"#, "TypeError", "either `module_tree`"),
            (r#"{"model": "tiny"}"#, "TypeError", "`max_memory` is missing"),
            (r#"{"model": "huge", "max_memory": []}"#, "FileNotFoundError", "huge/config.json"),
            (r#"{"module_tree": "none.json:a", "max_memory": []}"#, "FileNotFoundError", "none.json"),
            (r#"{"model": "tiny", "max_memory": [[0, 1]], "no_splits": []}"#, "TypeError", "unknown field `no_splits`"),
            (r#"{"model": "tiny", "max_memory": [["0", 1]]}"#, "ValueError", "`0` is not a device"),
            (r#"{"model": "tiny", "max_memory": [[0.5, 1]]}"#, "ValueError", "`0.5` is not a device"),
            (r#"{"model": "tiny", "max_memory": [[0, 1.5]]}"#, "TypeError", "the budget of `0` is 1.5"),
            (r#"{"model": "tiny", "max_memory": [[0, null]]}"#, "TypeError", "the budget of `0` is null"),
            (r#"{"model": "tiny", "max_memory": [[0]]}"#, "TypeError", "cannot read the request"),
            (r#"{"model": "tiny", "max_memory": [[0, "1GiB"]], "dtype": "floaty"}"#, "AttributeError", "`floaty`"),
            (
                r#"{"model": "tiny", "max_memory": [], "accelerate_version": "0.25.0"}"#,
                "ValueError",
                "0.24.1 and 1.15.0",
            ),
            (r#"{"model": "tiny", "max_memory": [], "fn": "guess"}"#, "TypeError", "unknown variant `guess`"),
            (
                r#"{"model": "tiny", "max_memory": [], "policy": "best"}"#,
                "ValueError",
                "`policy`: unknown variant `best`",
            ),
            (r#"{"model": "tiny", "max_memory": [["disk", 1]], "fn": "balanced"}"#, "RuntimeError", "`disk`"),
        ] {
            let (found, message) = refusal(line);
            assert_eq!(found, exception, "{line:.100}: {message}");
            assert!(message.contains(part), "{line:.100}: {message}");
        }
    }
}
