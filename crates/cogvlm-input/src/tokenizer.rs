//! Text to token ids and back.
//!
//! CogVLM uses the tokenizer of Vicuna, a SentencePiece BPE model; CogVLM2 uses Llama 3's byte-level BPE. The first is
//! read here, the second through the `tokenizers` crate.

mod bpe;
mod error;
mod json;
mod model_file;
mod sentencepiece;
mod stream;
mod utf8;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use crate::bounded_file;
use json::JsonTokenizer;
use sentencepiece::SentencePiece;

pub use error::{ModelProblem, TokenizerError};
pub use stream::StreamDecoder;

/// No tokenizer file is longer than this: Llama's is 0.5 MB, Llama 3's 9 MB.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// A tokenizer, read-only once opened. Clones share its tables.
#[derive(Clone)]
pub struct Tokenizer {
    model: Arc<Model>,
}

enum Model {
    SentencePiece(Box<SentencePiece>),
    Json(Box<JsonTokenizer>),
}

/// The ids with a meaning of their own, where the tokenizer names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpecialIds {
    /// Beginning of a sequence, `<s>`.
    pub bos: Option<u32>,
    /// End of a sequence, `</s>`.
    pub eos: Option<u32>,
    /// What has no id, `<unk>`.
    pub unk: Option<u32>,
}

/// Whether text that looks like a special token becomes that token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SpecialText {
    Recognised,
    Plain,
}

impl Tokenizer {
    /// Opens a tokenizer file, or the one in a directory: `tokenizer.model`, else `tokenizer.json`. Any file whose name
    /// does not end in `.json` is taken for a SentencePiece model.
    ///
    /// A `tokenizer_config.json` beside the file is read for `legacy` (taken as true without it, as the reference does)
    /// and for the names of the special tokens; nothing else in it changes what this crate does.
    ///
    /// # Errors
    /// A file that is missing, unreadable, broken or of a kind whose ids could differ from the reference is refused.
    pub fn open(path: &Path) -> Result<Self, TokenizerError> {
        let file = if path.is_dir() { find_tokenizer(path)? } else { path.to_owned() };
        let bytes = read(&file)?;
        let config = TokenizerConfig::beside(&file)?;
        let model = if file.extension().is_some_and(|extension| extension == "json") {
            Model::Json(Box::new(JsonTokenizer::parse(&bytes, &file, &config)?))
        } else {
            let model = parse_sentencepiece(&bytes, &file, config.legacy.unwrap_or(true))?;
            config.check_names(&model)?;
            Model::SentencePiece(model)
        };
        Ok(Self { model: Arc::new(model) })
    }

    /// A SentencePiece model that is in memory, with `legacy` as without a configuration. `file` is its name in errors.
    ///
    /// # Errors
    /// A model that is broken, or not a Llama tokenizer.
    pub fn from_sentencepiece(bytes: &[u8], file: &Path) -> Result<Self, TokenizerError> {
        let model = Model::SentencePiece(parse_sentencepiece(bytes, file, true)?);
        Ok(Self { model: Arc::new(model) })
    }

    /// Token ids of `text`, with nothing put before or after them. The literal names of special tokens inside the text
    /// become special ids, as in the reference (slow `LlamaTokenizer` of transformers 4.35): a user who types `</s>`
    /// ends the sequence.
    ///
    /// # Errors
    /// Only a `tokenizer.json` whose model has no token for a part of the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encode_as(text, SpecialText::Recognised)
    }

    /// As [`encode`](Self::encode), but `<s>`, `</s>` and the like are text like any other.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encode_as(text, SpecialText::Plain)
    }

    fn encode_as(&self, text: &str, special_text: SpecialText) -> Result<Vec<u32>, TokenizerError> {
        match &*self.model {
            Model::SentencePiece(model) => Ok(model.encode(text, special_text)),
            Model::Json(model) => model.encode(text, special_text),
        }
    }

    /// Text of `ids`. Special tokens are left out, or stand as their names, with the reference's habits around them:
    /// `[▁a, </s>, ▁b]` becomes ` a</s>b`, because with `legacy` a space is put before the text that a special token
    /// ends. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// An id outside the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        match &*self.model {
            Model::SentencePiece(model) if !skip_special => model.decode_with_special(ids),
            Model::Json(model) if !skip_special => model.decode_with_special(ids),
            _ => {
                let mut stream = self.stream_decoder();
                let mut text = String::new();
                for &id in ids {
                    text += &stream.push(id)?;
                }
                Ok(text + &stream.finish())
            }
        }
    }

    /// A decoder for ids that arrive one by one.
    pub fn stream_decoder(&self) -> StreamDecoder {
        StreamDecoder::new(self.clone())
    }

    /// Number of ids. Compare with the rows of the model's embedding.
    pub fn vocab_size(&self) -> usize {
        match &*self.model {
            Model::SentencePiece(model) => model.vocab_size(),
            Model::Json(model) => model.vocab_size(),
        }
    }

    /// Ids of the special tokens.
    pub fn special_ids(&self) -> SpecialIds {
        match &*self.model {
            Model::SentencePiece(model) => model.special_ids(),
            Model::Json(model) => model.special_ids(),
        }
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}

/// What is read of `tokenizer_config.json`.
#[derive(Debug, Default, Deserialize)]
struct TokenizerConfig {
    legacy: Option<bool>,
    bos_token: Option<TokenName>,
    eos_token: Option<TokenName>,
    unk_token: Option<TokenName>,
    #[serde(skip)]
    file: PathBuf,
}

/// A token's text, alone or in the object in which older versions of transformers wrap it.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum TokenName {
    Text(String),
    Object { content: String },
}

impl TokenName {
    fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Object { content: text } => text,
        }
    }
}

impl TokenizerConfig {
    /// The file beside `tokenizer_file`, or a default where there is none.
    fn beside(tokenizer_file: &Path) -> Result<Self, TokenizerError> {
        let file = tokenizer_file.with_file_name("tokenizer_config.json");
        if !file.exists() {
            return Ok(Self::default());
        }
        match serde_json::from_slice::<Self>(&read(&file)?) {
            Ok(config) => Ok(Self { file, ..config }),
            Err(source) => Err(TokenizerError::Config { file, source }),
        }
    }

    /// The reference renames its special tokens to what the file says. We keep Llama's names, so the file must too.
    fn check_names(&self, model: &SentencePiece) -> Result<(), TokenizerError> {
        let keys = [("bos_token", &self.bos_token), ("eos_token", &self.eos_token), ("unk_token", &self.unk_token)];
        for ((key, name), expected) in keys.into_iter().zip(model.special_names()) {
            if let Some(name) = name
                && name.text() != expected
            {
                let (file, found) = (self.file.clone(), name.text().to_owned());
                return Err(TokenizerError::SpecialName { file, key, found, expected });
            }
        }
        Ok(())
    }
}

fn find_tokenizer(dir: &Path) -> Result<PathBuf, TokenizerError> {
    let candidates = ["tokenizer.model", "tokenizer.json"].map(|name| dir.join(name));
    let found = candidates.into_iter().find(|file| file.exists());
    found.ok_or_else(|| TokenizerError::Missing { dir: dir.to_owned() })
}

fn parse_sentencepiece(bytes: &[u8], file: &Path, legacy: bool) -> Result<Box<SentencePiece>, TokenizerError> {
    SentencePiece::parse(bytes, legacy)
        .map(Box::new)
        .map_err(|problem| TokenizerError::Model { file: file.to_owned(), problem })
}

fn read(file: &Path) -> Result<Vec<u8>, TokenizerError> {
    bounded_file::read(file, MAX_FILE_BYTES).map_err(|error| match error {
        bounded_file::ReadError::Io(source) => TokenizerError::Read { file: file.to_owned(), source },
        bounded_file::ReadError::TooLong => {
            TokenizerError::TooLong { file: file.to_owned(), limit_mib: MAX_FILE_BYTES >> 20 }
        }
    })
}
