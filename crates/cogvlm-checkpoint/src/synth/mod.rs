//! Synthetic checkpoints: weights that anyone can make again, bit for bit, from a configuration and a 64-bit seed.

mod element;
mod rule;
mod write;

use std::ops::Range;
use std::path::{Path, PathBuf};

use cogvlm_core::config::{ConfigError, built_in_json, built_in_names};
use cogvlm_core::{DType, ModelConfig, ModelSpec, TensorSpec, tensor_inventory};

pub use rule::Rule;
pub use write::{DEFAULT_MAX_SHARD_BYTES, Written, parse_shard_size, write_checkpoint};

use crate::error::CheckpointError;
use crate::layout::read_json;
use crate::monitor::Cancelled;
use crate::table::{TensorInfo, TensorTable};

/// A configuration with the synthetic weights of a seed. All tensors are bf16; any range of any of them can be made, in
/// any order, on any number of threads.
#[derive(Debug)]
pub struct SyntheticModel {
    name: String,
    config_json: String,
    config: ModelConfig,
    spec: ModelSpec,
    seed: u64,
    table: TensorTable,
    /// For each tensor of the table, how its elements are made.
    rules: Vec<Rule>,
}

/// Why a synthetic model cannot be made or written.
#[derive(Debug, thiserror::Error)]
pub enum SynthError {
    /// A name without a seed.
    #[error("`{name}` names a configuration, which has no weights; `{name}@1` has the synthetic weights of seed 1")]
    NoSeed {
        /// The name.
        name: String,
    },
    /// A seed that is no number.
    #[error("`{seed}` in `{model}` is not a seed; give a number from 0 to 18446744073709551615, in decimal or as 0x…")]
    Seed {
        /// What was given as seed.
        seed: String,
        /// The whole argument.
        model: String,
    },
    /// No such built-in configuration.
    #[error("there is no built-in configuration `{name}`; there are {known}")]
    UnknownName {
        /// What was asked for.
        name: String,
        /// Those there are.
        known: String,
    },
    /// A size that is no number.
    #[error("`{text}` is not a size; write bytes, or a number with KB, MB or GB, as 5GB")]
    ShardSize {
        /// What was given.
        text: String,
    },
    /// A configuration that describes no CogVLM model.
    #[error("`{name}`: {source}")]
    Config {
        /// The configuration.
        name: String,
        /// What is wrong with it.
        source: ConfigError,
    },
    /// A model that can be planned, not run.
    #[error("`{name}` is a CogVLM2 model, for which no synthetic weights are defined; it can be planned only")]
    NotDefined {
        /// Its name.
        name: String,
    },
    /// Sizes that no machine could hold.
    #[error("`{name}` describes a model with a tensor of more than 2^40 elements; no machine could hold it")]
    TooLarge {
        /// Its name.
        name: String,
    },
    /// The directory to write holds something else.
    #[error("`{}` is not empty and is not the checkpoint to write: {reason}; choose another directory", dir.display())]
    NotEmpty {
        /// The directory.
        dir: PathBuf,
        /// How that was seen.
        reason: String,
    },
    /// The configuration file cannot be read.
    #[error(transparent)]
    ReadConfig(#[from] CheckpointError),
    /// Another process writes the same checkpoint.
    #[error("`{}` is being written by another process; wait for it, or choose another directory", path.display())]
    Busy {
        /// The file.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("cannot write `{}`: {source}", path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// Asked to stop; nothing is left behind.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

impl SyntheticModel {
    /// The model that `NAME@SEED` or `FILE.json@SEED` names; the seed is decimal or `0x…`.
    ///
    /// # Errors
    /// Where the seed is absent or no number, or NAME is no built-in configuration or one without synthetic weights, or
    /// the file is no configuration.
    pub fn parse(model: &str) -> Result<Self, SynthError> {
        let Some((name, seed)) = model.rsplit_once('@') else {
            return Err(
                Self::built_in(model, 1).map_or_else(|error| error, |_| SynthError::NoSeed { name: model.to_owned() })
            );
        };
        let parsed = match seed.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => seed.parse(),
        };
        let seed = parsed.map_err(|_| SynthError::Seed { seed: seed.to_owned(), model: model.to_owned() })?;
        if !name.ends_with(".json") {
            return Self::built_in(name, seed);
        }
        Self::from_config_json(name, &read_json(Path::new(name), "give a config.json")?, seed)
    }

    /// The built-in configuration called `name`, with the weights of `seed`.
    ///
    /// # Errors
    /// [`SynthError::UnknownName`], [`SynthError::NotDefined`].
    pub fn built_in(name: &str, seed: u64) -> Result<Self, SynthError> {
        let config_json = built_in_json(name).ok_or_else(|| unknown_name(name))?;
        Self::from_config_json(name, config_json, seed)
    }

    /// The model that the text of a `config.json` describes, with the weights of `seed`; `name` is for messages.
    ///
    /// # Errors
    /// [`SynthError::Config`], [`SynthError::NotDefined`], [`SynthError::TooLarge`].
    pub fn from_config_json(name: &str, config_json: &str, seed: u64) -> Result<Self, SynthError> {
        let wrong = |source| SynthError::Config { name: name.to_owned(), source };
        let config = ModelConfig::from_json(config_json).map_err(wrong)?;
        let spec = config.resolve().map_err(wrong)?;
        if spec.grouped_kv {
            return Err(SynthError::NotDefined { name: name.to_owned() });
        }
        let inventory = tensor_inventory(&spec);
        if !inventory.iter().all(has_plausible_size) {
            return Err(SynthError::TooLarge { name: name.to_owned() });
        }
        let rules = inventory.iter().map(|tensor| Rule::of_tensor(tensor, &spec, seed)).collect();
        let table =
            TensorTable::new(inventory.into_iter().map(|spec| TensorInfo { spec, dtype: DType::Bf16 }).collect());
        Ok(Self { name: name.to_owned(), config_json: config_json.to_owned(), config, spec, seed, table, rules })
    }

    /// The name of the configuration.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The text of its `config.json`.
    pub fn config_json(&self) -> &str {
        &self.config_json
    }

    /// The sizes of the model.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Every tensor, in checkpoint order.
    pub fn tensors(&self) -> &[TensorInfo] {
        self.table.all()
    }

    pub(crate) fn table(&self) -> &TensorTable {
        &self.table
    }

    /// How the elements of tensor `tensor` of the table are made.
    pub(crate) fn rule(&self, tensor: usize) -> &Rule {
        &self.rules[tensor]
    }

    /// Makes elements `elements` of tensor `tensor` of the table; `dst` has two bytes for each.
    pub(crate) fn fill(&self, tensor: usize, elements: Range<usize>, dst: &mut [u8]) {
        self.rules[tensor].fill(elements.start as u64, dst);
    }
}

fn has_plausible_size(tensor: &TensorSpec) -> bool {
    let num_elements = tensor.shape.iter().try_fold(1_usize, |product, &size| product.checked_mul(size));
    num_elements.is_some_and(|num_elements| num_elements <= 1 << 40)
}

fn unknown_name(name: &str) -> SynthError {
    let known: Vec<_> = built_in_names().map(|name| format!("`{name}`")).collect();
    SynthError::UnknownName { name: name.to_owned(), known: known.join(", ") }
}
