//! What can be wrong with a tokenizer.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why a tokenizer cannot be opened or used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The directory holds no tokenizer.
    #[error(
        "`{}` holds neither `tokenizer.model` nor `tokenizer.json`; CogVLM is published without a tokenizer: \
         put `tokenizer.model` of lmsys/vicuna-7b-v1.5 there",
        dir.display()
    )]
    Missing {
        /// Where it was looked for.
        dir: PathBuf,
    },
    /// The file cannot be read.
    #[error("cannot read `{}`: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file is longer than any tokenizer.
    #[error("`{}` is longer than {limit_mib} MiB and therefore no tokenizer", file.display())]
    TooLong {
        /// The file.
        file: PathBuf,
        /// The limit in MiB.
        limit_mib: u64,
    },
    /// A SentencePiece model that is broken, or of a kind that is not read here.
    #[error("`{}` {problem}", file.display())]
    Model {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        problem: ModelProblem,
    },
    /// `tokenizer_config.json` is not what it should be.
    #[error("`{}` is not a tokenizer configuration: {source}", file.display())]
    Config {
        /// The file.
        file: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// `tokenizer_config.json` renames a special token.
    #[error(
        "`{}` calls its `{key}` `{found}`, the tokenizer beside it `{expected}`; \
         take both files from one model",
        file.display()
    )]
    SpecialName {
        /// The configuration file.
        file: PathBuf,
        /// The key in it.
        key: &'static str,
        /// Its value.
        found: String,
        /// The name in the tokenizer.
        expected: &'static str,
    },
    /// `tokenizer.json` is not what it should be.
    #[error("`{}` is not a tokenizer in the format of the tokenizers library: {source}", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// Where and why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// `tokenizer.json` decodes in a way that is not known here.
    #[error(
        "`{}` has a `decoder` of a kind that is not supported (byte-level, and Llama's with byte fallback, are): {found}",
        file.display()
    )]
    Decoder {
        /// The file.
        file: PathBuf,
        /// The decoder, as JSON, cut short if it is long.
        found: String,
    },
    /// A special token of `tokenizer_config.json` is not in `tokenizer.json`.
    #[error("`{}` names `{name}` as its `{key}`, which the tokenizer beside it does not know", file.display())]
    UnknownName {
        /// The configuration file.
        file: PathBuf,
        /// The key in it.
        key: &'static str,
        /// Its value.
        name: String,
    },
    /// A `tokenizer.json` that has no token for a part of the text.
    #[error("the tokenizer cannot encode the text: {source}")]
    Encode {
        /// What the library said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// An id that the tokenizer does not have.
    #[error("token id {id} is not in the vocabulary of {vocab_size} tokens; the tokenizer is not this model's")]
    UnknownId {
        /// The id.
        id: u32,
        /// Number of ids there are.
        vocab_size: usize,
    },
}

/// What is wrong with a SentencePiece model file.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ModelProblem {
    /// Not the protocol buffer that it should be, or cut short.
    #[error("is not a SentencePiece model: {problem} at byte {offset}; download it again")]
    Protobuf {
        /// What was met.
        problem: &'static str,
        /// Where in the file.
        offset: usize,
    },
    /// No piece at all, as in an empty file.
    #[error("is not a SentencePiece model: it has no pieces; download it again")]
    NoPieces,
    /// More pieces than any vocabulary has.
    #[error("has more than {limit} pieces")]
    TooManyPieces {
        /// The limit.
        limit: usize,
    },
    /// A piece without text.
    #[error("has an empty piece, id {id}")]
    EmptyPiece {
        /// Its id.
        id: usize,
    },
    /// A piece longer than any word.
    #[error("has a piece of {bytes} bytes, id {id}; at most {limit} are read")]
    PieceTooLong {
        /// Its id.
        id: usize,
        /// Its length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// A piece that is not text.
    #[error("has a piece that is not UTF-8, id {id}")]
    PieceNotUtf8 {
        /// Its id.
        id: usize,
    },
    /// A score by which pieces cannot be ordered.
    #[error("gives piece `{piece}`, id {id}, the score {score}")]
    BadScore {
        /// The piece.
        piece: String,
        /// Its id.
        id: usize,
        /// `NaN`, `inf` or `-inf`.
        score: String,
    },
    /// Two ids for one text.
    #[error("has piece `{piece}` twice, as ids {first} and {second}")]
    DuplicatePiece {
        /// The piece.
        piece: String,
        /// The lower id.
        first: usize,
        /// The higher id.
        second: usize,
    },
    /// A piece type that Llama's models do not use.
    #[error("has piece `{piece}`, id {id}, of type {found}, which is not supported")]
    PieceType {
        /// The piece.
        piece: String,
        /// Its id.
        id: usize,
        /// The type, by name or number.
        found: String,
    },
    /// A byte piece whose text is not `<0x00>` … `<0xFF>`.
    #[error("has a byte piece called `{piece}`, id {id}; `<0x00>` to `<0xFF>` are expected")]
    BadBytePiece {
        /// The piece.
        piece: String,
        /// Its id.
        id: usize,
    },
    /// A byte that could not be encoded.
    #[error("has no byte piece `<0x{byte:02X}>`; without all 256 some text has no ids")]
    MissingByte {
        /// The first byte without a piece.
        byte: u8,
    },
    /// A special token that Llama's tokenizers have.
    #[error("has no {kind} piece `{piece}`; it is not a Llama tokenizer")]
    MissingSpecial {
        /// `unknown` or `control`.
        kind: &'static str,
        /// The piece.
        piece: &'static str,
    },
    /// A second `unknown` piece.
    #[error("has a second unknown piece `{piece}`, id {id}")]
    SecondUnknown {
        /// The piece.
        piece: String,
        /// Its id.
        id: usize,
    },
    /// Not a BPE model.
    #[error("is a {found} model; only BPE models are read, as CogVLM's is")]
    NotBpe {
        /// Name or number of the model type.
        found: String,
    },
    /// A normaliser setting that would change the text in a way not implemented here.
    #[error("sets `{setting}` to {found}; only {expected} is supported, as in Llama's tokenizer")]
    Normaliser {
        /// Field of `normalizer_spec`, `denormalizer_spec` or `trainer_spec`.
        setting: &'static str,
        /// Its value.
        found: String,
        /// The one value that is supported.
        expected: &'static str,
    },
}
