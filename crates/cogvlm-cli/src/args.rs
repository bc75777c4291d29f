//! The command line as it is typed. `spec` of every flag: docs/cli.md.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use cogvlm_core::{DType, Template};
use cogvlm_pipeline::Transport;
use cogvlm_plan::plan::Policy;

/// Plans, loads and runs CogVLM on what you have: several cards, small cards, host memory.
#[derive(Debug, Parser)]
#[command(name = "cogvlm-shard", version, arg_required_else_help = true, infer_long_args = false)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Log what happens, to stderr: error, warn, info, debug or trace.
    #[arg(long, global = true, default_value = "warn", value_name = "LEVEL")]
    pub(crate) log: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show where everything would go, before anything is loaded.
    Plan(PlanArgs),
    /// Check a checkpoint against its configuration by its headers.
    Inspect(InspectArgs),
    /// Write a checkpoint of synthetic weights.
    Synth(SynthArgs),
    /// Answer one prompt.
    Generate(GenerateArgs),
    /// Talk about an image over several turns.
    Chat(ChatArgs),
    /// Turn lines of JSON strings into token ids, or back.
    Tokenize(TokenizeArgs),
    /// Turn an image into the pixels that the model reads.
    Preprocess(PreprocessArgs),
    /// Measure loading, time to first token and decoding, beside what the machine can do.
    Bench(BenchArgs),
    /// Look at the machine: devices, memory, libraries, what is missing.
    Doctor(DoctorArgs),
    /// Run the main job on a synthetic model: no weights, no GPU, no arguments.
    Demo,
}

/// Where the model goes.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct PlacementArgs {
    /// Budget per device: `0:20GiB,1:20GiB,cpu:16GiB[,disk]`. Integers are bytes; `auto` takes what is free now
    /// [default: auto].
    #[arg(long, value_name = "BUDGETS")]
    pub(crate) max_memory: Option<String>,
    /// How to place.
    #[arg(long, value_enum, default_value_t = PolicyArg::Auto)]
    pub(crate) policy: PolicyArg,
    /// Let the first N numbered devices compute every layer together, each with its part of the weights and of the KV
    /// cache; the vision tower runs on the first of them [default: 1].
    #[arg(long, value_name = "N", conflicts_with = "policy", value_parser = clap::value_parser!(u8).range(1..=8))]
    pub(crate) tensor_parallel: Option<u8>,
    /// Tokens per sequence, image and answer included, that memory is planned for [default: the model's limit].
    #[arg(long, value_name = "N")]
    pub(crate) context: Option<usize>,
    /// Sequences that memory is planned for [default: 1].
    #[arg(long, value_name = "N")]
    pub(crate) batch: Option<usize>,
    /// Rates of the machine, as `doctor --json` writes them: what predicted times rest on, and what goes where
    /// [default: those recorded of a GPU of this name, else those of 24 GB cards in a desktop].
    #[arg(long, value_name = "FILE")]
    pub(crate) links: Option<PathBuf>,
    /// What carries rows between GPUs of different processes. NCCL needs memory of every GPU, which is set aside.
    #[arg(long, value_enum, default_value_t = TransportArg::Auto, help_heading = "Several processes")]
    pub(crate) transport: TransportArg,
}

/// What carries rows between GPUs of different processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum TransportArg {
    #[default]
    /// NCCL where both ends have it, else TCP
    Auto,
    /// NCCL, or the run does not begin
    Nccl,
    /// host memory and TCP
    Tcp,
}

impl From<TransportArg> for Transport {
    fn from(transport: TransportArg) -> Self {
        match transport {
            TransportArg::Auto => Self::Auto,
            TransportArg::Nccl => Self::Channels,
            TransportArg::Tcp => Self::Tcp,
        }
    }
}

/// Placement policies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum PolicyArg {
    #[default]
    /// latency for one sequence, throughput for more
    Auto,
    /// even free memory and even work
    Balanced,
    /// as few hops per token as possible
    Latency,
    /// stages of equal decode time
    Throughput,
    /// exactly what accelerate's infer_auto_device_map answers
    Accelerate,
}

impl From<PolicyArg> for Policy {
    fn from(policy: PolicyArg) -> Self {
        match policy {
            PolicyArg::Auto => Self::Auto,
            PolicyArg::Balanced => Self::Balanced,
            PolicyArg::Latency => Self::Latency,
            PolicyArg::Throughput => Self::Throughput,
            PolicyArg::Accelerate => Self::Accelerate,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    /// Checkpoint directory (its config.json is enough) or a built-in configuration.
    #[arg(default_value = "cogvlm-chat-17b")]
    pub(crate) model: String,
    #[command(flatten)]
    pub(crate) placement: PlacementArgs,
    /// What will execute: with `cpu`, numbered devices are virtual ranks, on which no CUDA context needs room.
    #[arg(long, value_enum, default_value_t = BackendArg::Auto)]
    pub(crate) backend: BackendArg,
    /// Activations and KV cache, f32 or bf16. With `--policy accelerate`: the element type that it assumes for all
    /// weights: float32, float16, bfloat16, int8, ... [default: bf16; as stored]
    #[arg(long, value_name = "TYPE")]
    pub(crate) dtype: Option<String>,
    /// With `--policy accelerate`: which release to agree with, 0.24.1 or 1.15.0 [default: 0.24.1].
    #[arg(long, value_name = "VERSION")]
    pub(crate) accelerate_version: Option<String>,
    /// With `--policy accelerate`: module classes that it must not split [default:
    /// CogVLMDecoderLayer,TransformerLayer].
    #[arg(long, value_name = "CLASS,CLASS", value_delimiter = ',')]
    pub(crate) no_split: Option<Vec<String>>,
    /// With `--policy accelerate`: balance the budgets first, as `device_map="auto"` does.
    #[arg(long)]
    pub(crate) balanced_memory: bool,
    /// Plan a module tree from a JSON file instead of a CogVLM configuration.
    #[arg(long, value_name = "FILE[:NAME]")]
    pub(crate) module_tree: Option<String>,
    /// Answer JSON requests, one per line on stdin, one answer per line on stdout.
    #[arg(long)]
    pub(crate) requests: bool,
    /// Print the plan as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Checkpoint directory.
    pub(crate) dir: PathBuf,
    /// Read the data too: SHA-256 of every file and of the weights.
    #[arg(long)]
    pub(crate) hash: bool,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SynthArgs {
    /// Configuration and seed: a built-in name, or a config.json, then `@SEED`.
    #[arg(value_name = "NAME@SEED")]
    pub(crate) model: String,
    /// Directory to write; made where it does not exist.
    #[arg(long, value_name = "DIR", required_unless_present = "digest")]
    pub(crate) out: Option<PathBuf>,
    /// Most data bytes per file: `5GB`, `500MB`, or bytes.
    #[arg(long, value_name = "SIZE", default_value = "5GB")]
    pub(crate) max_shard_size: String,
    /// Print the SHA-256 of the weights; without --out nothing is written.
    #[arg(long)]
    pub(crate) digest: bool,
}

/// Which model, on which backend.
#[derive(Debug, Clone, Args)]
pub(crate) struct ModelArgs {
    /// Checkpoint directory, or `NAME@SEED`: synthetic weights made where they are needed.
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: String,
    #[command(flatten)]
    pub(crate) placement: PlacementArgs,
    /// A plan written by `plan --json`, or a Hugging Face device map.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["policy", "tensor_parallel"])]
    pub(crate) device_map: Option<PathBuf>,
    /// What executes: with `cuda`, numbered devices are GPUs; with `cpu`, virtual ranks on the host.
    #[arg(long, value_enum, default_value_t = BackendArg::Auto)]
    pub(crate) backend: BackendArg,
    /// Activations and KV cache.
    #[arg(long, value_enum, default_value_t = DTypeArg::Bf16)]
    pub(crate) dtype: DTypeArg,
    /// Arithmetic of rotary angles: `float32`, or `published` (as the published code rounds them in bf16).
    #[arg(long, value_enum, default_value_t = RopeArg::Float32)]
    pub(crate) rope: RopeArg,
    /// Threads of what the host executes [default: all cores].
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
}

/// Which process of a run over several processes this is. All of them are started with the same flags; budgets of process
/// P are named P/N in --max-memory. By default the launcher's variables say so (Slurm, mpirun, torchrun, Kubernetes).
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ClusterArgs {
    /// This process, from 0 [default: what the launcher's variables say].
    #[arg(long, value_name = "P", help_heading = "Several processes")]
    pub(crate) process_rank: Option<usize>,
    /// How many processes there are [default: likewise].
    #[arg(long, value_name = "N", help_heading = "Several processes")]
    pub(crate) num_processes: Option<usize>,
    /// Where process 0 listens [default: likewise].
    #[arg(long, value_name = "HOST[:PORT]", help_heading = "Several processes")]
    pub(crate) coordinator: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum BackendArg {
    /// CUDA where a device is, else the CPU
    Auto,
    /// NVIDIA GPUs
    Cuda,
    /// the host
    Cpu,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DTypeArg {
    /// single precision: the exactness reference
    F32,
    /// the precision of the published weights
    Bf16,
}

impl From<DTypeArg> for DType {
    fn from(dtype: DTypeArg) -> Self {
        match dtype {
            DTypeArg::F32 => Self::F32,
            DTypeArg::Bf16 => Self::Bf16,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RopeArg {
    /// angles in single precision
    Float32,
    /// angles rounded to the model's type, as upstream's code does
    Published,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TemplateArg {
    /// Question: … Answer:
    Chat,
    /// Question: … Short answer:
    Vqa,
    /// the prompt as it is
    Base,
}

impl From<TemplateArg> for Template {
    fn from(template: TemplateArg) -> Self {
        match template {
            TemplateArg::Chat => Self::Chat,
            TemplateArg::Vqa => Self::Vqa,
            TemplateArg::Base => Self::Base,
        }
    }
}

/// How the answer is chosen.
#[derive(Debug, Clone, Args)]
pub(crate) struct SamplingArgs {
    /// Most tokens to generate [default: what the context leaves].
    #[arg(long, value_name = "N")]
    pub(crate) max_new_tokens: Option<usize>,
    /// 0 is greedy: the most probable token.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub(crate) temperature: f32,
    /// Keep the K most probable tokens; 0 keeps all.
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub(crate) top_k: usize,
    /// Keep the most probable tokens that together reach P.
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    pub(crate) top_p: f32,
    /// Above 1 discourages tokens seen before.
    #[arg(long, value_name = "R", default_value_t = 1.0, allow_negative_numbers = true)]
    pub(crate) repetition_penalty: f32,
    /// Seed of the draws; the same seed gives the same answer.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// End the answer before this text; may be given several times.
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
}

/// What turns text into ids.
#[derive(Debug, Clone, Args)]
pub(crate) struct TokenizerArgs {
    /// `tokenizer.model` or `tokenizer.json`, or a directory with one [default: next to the model].
    #[arg(long, value_name = "FILE|DIR")]
    pub(crate) tokenizer: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) tokenizer: TokenizerArgs,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    /// The question.
    #[arg(long, value_name = "TEXT", required_unless_present_any = ["input_ids", "prompts"], conflicts_with_all = ["input_ids", "prompts"])]
    pub(crate) prompt: Option<String>,
    /// Many questions, answered `--batch` at a time: a JSON object per line with `prompt` and, as wanted, `image`,
    /// `template` and `history`. Prints one JSON object per line, in order.
    #[arg(long, value_name = "FILE.jsonl", requires = "json", conflicts_with_all = ["input_ids", "image", "history", "force_ids", "logits_out", "hidden_states_out"])]
    pub(crate) prompts: Option<PathBuf>,
    /// Token ids in place of a prompt: a JSON list, or an object with `input_ids`. A list that begins with BOS is the
    /// whole input; else BOS and the image's tokens are put before it.
    #[arg(long, value_name = "FILE.json", conflicts_with_all = ["template", "history"])]
    pub(crate) input_ids: Option<PathBuf>,
    /// The image.
    #[arg(long, value_name = "FILE")]
    pub(crate) image: Option<PathBuf>,
    /// How the question is put [default: what config.json says].
    #[arg(long, value_enum)]
    pub(crate) template: Option<TemplateArg>,
    /// Earlier turns: a JSON list of [question, answer] pairs.
    #[arg(long, value_name = "FILE.json")]
    pub(crate) history: Option<PathBuf>,
    /// Print one JSON object when done, and no stream.
    #[arg(long)]
    pub(crate) json: bool,
    /// Write the logits of every new token, f32 [num_new_tokens, vocab_size].
    #[arg(long, value_name = "FILE.safetensors")]
    pub(crate) logits_out: Option<PathBuf>,
    /// Write the hidden states of the prefill after every unit, f32.
    #[arg(long, value_name = "FILE.safetensors")]
    pub(crate) hidden_states_out: Option<PathBuf>,
    /// Decode on after the end-of-sequence token.
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Feed these tokens in place of the chosen ones (teacher forcing): a JSON list of ids.
    #[arg(long, value_name = "FILE.json", conflicts_with = "max_new_tokens")]
    pub(crate) force_ids: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) tokenizer: TokenizerArgs,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    /// The image to talk about.
    #[arg(long, value_name = "FILE")]
    pub(crate) image: Option<PathBuf>,
    /// How questions are put [default: what config.json says].
    #[arg(long, value_enum)]
    pub(crate) template: Option<TemplateArg>,
}

#[derive(Debug, Args)]
pub(crate) struct TokenizeArgs {
    #[command(flatten)]
    pub(crate) tokenizer: TokenizerArgs,
    /// Read id lists, write strings.
    #[arg(long)]
    pub(crate) decode: bool,
    /// With --decode: leave out special tokens.
    #[arg(long, requires = "decode")]
    pub(crate) skip_special: bool,
    /// Treat `<s>`, `</s>` and `<unk>` in the text as plain text.
    #[arg(long, conflicts_with = "decode")]
    pub(crate) plain: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PreprocessArgs {
    /// The image.
    #[arg(long, value_name = "FILE")]
    pub(crate) image: PathBuf,
    /// Side of the model's input in pixels.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16384))]
    pub(crate) size: u32,
    /// Where to write `pixel_values`, f32 [3, N, N].
    #[arg(long, value_name = "FILE.safetensors")]
    pub(crate) out: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Text tokens of the prompt, beside the image.
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(crate) prompt_tokens: usize,
    /// Tokens to decode per repetition.
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(crate) new_tokens: usize,
    /// Repetitions after one warm-up; medians are reported.
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(crate) repeats: usize,
    /// Prompts without an image.
    #[arg(long)]
    pub(crate) text_only: bool,
    /// How many sequences are decoded at once, run after run, none above the batch; one comes first in any case
    /// [default: the batch].
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    pub(crate) sequences: Vec<usize>,
    /// Instead: time every operation of the model on the first GPU. No weights are loaded, so a configuration's name
    /// will do for MODEL.
    #[arg(long, conflicts_with_all = ["new_tokens", "repeats", "text_only", "sequences"])]
    pub(crate) kernels: bool,
    /// With --kernels: the best kernels for the GPU, or those that run on any.
    #[arg(long, value_enum, default_value_t = KernelPathArg::Hopper, requires = "kernels", hide = true)]
    pub(crate) path: KernelPathArg,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum KernelPathArg {
    /// `wgmma` and TMA where the GPU has them
    Hopper,
    /// `mma.sync` on every GPU
    Portable,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// The backend that has to work.
    #[arg(long, value_enum, default_value_t = BackendArg::Auto)]
    pub(crate) backend: BackendArg,
    /// Print JSON, with the rates that `--links` reads.
    #[arg(long)]
    pub(crate) json: bool,
}
