//! `tokenizer.json`: encoding through the `tokenizers` crate, decoding here, so that it can go id by id.

use std::path::Path;
use std::sync::OnceLock;

use serde::Deserialize;
use serde_json::{Value, json};

use super::error::TokenizerError;
use super::utf8::{Invalid, Utf8Buffer};
use super::{SpecialIds, SpecialText, TokenizerConfig};

pub(super) struct JsonTokenizer {
    library: tokenizers::Tokenizer,
    /// The same, deaf to the names of special tokens; made when it is first asked for.
    plain: OnceLock<tokenizers::Tokenizer>,
    kind: DecoderKind,
    special: SpecialIds,
}

/// How tokens become text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DecoderKind {
    /// Each character stands for a byte (GPT-2, Llama 3).
    ByteLevel,
    /// `▁` is a space, `<0x0A>` a byte, and the text loses one leading space (Llama).
    ByteFallback,
}

impl JsonTokenizer {
    /// # Errors
    /// A file that is broken, or decodes in a way of its own.
    pub(super) fn parse(bytes: &[u8], file: &Path, config: &TokenizerConfig) -> Result<Self, TokenizerError> {
        #[derive(Deserialize)]
        struct Outline {
            #[serde(default)]
            decoder: Value,
        }
        let not_a_tokenizer = |source| TokenizerError::Json { file: file.to_owned(), source };
        let outline: Outline = serde_json::from_slice(bytes).map_err(|error| not_a_tokenizer(error.into()))?;
        let kind = DecoderKind::of(&outline.decoder).ok_or_else(|| TokenizerError::Decoder {
            file: file.to_owned(),
            found: outline.decoder.to_string().chars().take(200).collect(),
        })?;
        let mut library = tokenizers::Tokenizer::from_bytes(bytes).map_err(not_a_tokenizer)?;
        // Both are settings of the last caller. A prompt that is too long is refused elsewhere, not cut here.
        library.with_truncation(None).map_err(not_a_tokenizer)?;
        library.with_padding(None);
        let special_id = |key, name: &Option<super::TokenName>| match name.as_ref().map(super::TokenName::text) {
            None => Ok(None),
            Some(name) => library.token_to_id(name).map(Some).ok_or_else(|| TokenizerError::UnknownName {
                file: config.file.clone(),
                key,
                name: name.to_owned(),
            }),
        };
        let special = SpecialIds {
            bos: special_id("bos_token", &config.bos_token)?,
            eos: special_id("eos_token", &config.eos_token)?,
            unk: special_id("unk_token", &config.unk_token)?,
        };
        Ok(Self { library, plain: OnceLock::new(), kind, special })
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.library.get_vocab_size(true)
    }

    pub(super) fn special_ids(&self) -> SpecialIds {
        self.special
    }

    /// # Errors
    /// Text for which the model has no token.
    pub(super) fn encode(&self, text: &str, special_text: SpecialText) -> Result<Vec<u32>, TokenizerError> {
        let library = match special_text {
            SpecialText::Recognised => &self.library,
            SpecialText::Plain => self.plain.get_or_init(|| {
                let mut plain = self.library.clone();
                plain.set_encode_special_tokens(true);
                plain
            }),
        };
        let encoding = library.encode_fast(text, false).map_err(|source| TokenizerError::Encode { source })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// # Errors
    /// An id outside the vocabulary.
    pub(super) fn decode_with_special(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        let mut decoder = JsonDecoder::new(self);
        let mut text = String::new();
        for &id in ids {
            decoder.push_token(&self.token(id)?, &mut text);
        }
        decoder.finish(&mut text);
        Ok(text)
    }

    fn token(&self, id: u32) -> Result<String, TokenizerError> {
        let token = self.library.id_to_token(id);
        token.ok_or_else(|| TokenizerError::UnknownId { id, vocab_size: self.vocab_size() })
    }
}

impl DecoderKind {
    fn of(decoder: &Value) -> Option<Self> {
        let llama = json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]});
        if decoder["type"] == "ByteLevel" {
            Some(Self::ByteLevel)
        } else {
            (*decoder == llama).then_some(Self::ByteFallback)
        }
    }
}

/// Text of tokens, one by one.
#[derive(Debug)]
pub(super) struct JsonDecoder {
    kind: DecoderKind,
    bytes: Utf8Buffer,
    /// No text yet: one leading space goes, if Llama's decoder is at work.
    expects_prefix: bool,
}

impl JsonDecoder {
    pub(super) fn new(model: &JsonTokenizer) -> Self {
        let (invalid, expects_prefix) = match model.kind {
            DecoderKind::ByteLevel => (Invalid::EachSequence, false),
            DecoderKind::ByteFallback => (Invalid::WholeRun, true),
        };
        Self { kind: model.kind, bytes: Utf8Buffer::new(invalid), expects_prefix }
    }

    /// Appends to `out` what `id` adds to the text; nothing for a special token.
    ///
    /// # Errors
    /// An id outside the vocabulary.
    pub(super) fn push(&mut self, model: &JsonTokenizer, id: u32, out: &mut String) -> Result<(), TokenizerError> {
        let token = model.token(id)?;
        if !model.library.get_added_vocabulary().is_special_token(&token) {
            self.push_token(&token, out);
        }
        Ok(())
    }

    /// Appends what an unfinished character comes to.
    pub(super) fn finish(&mut self, out: &mut String) {
        let mut text = String::new();
        self.bytes.end_run(&mut text);
        self.append(&text, out);
    }

    fn push_token(&mut self, token: &str, out: &mut String) {
        let mut text = String::new();
        match self.kind {
            // An added token is no byte-level text. The library tells by its characters, and so do we.
            DecoderKind::ByteLevel => {
                let bytes: Option<Vec<u8>> = token.chars().map(byte_of_character).collect();
                bytes.unwrap_or_else(|| token.into()).into_iter().for_each(|byte| self.bytes.push(byte, &mut text));
            }
            DecoderKind::ByteFallback => match byte_of_token(token) {
                Some(byte) => self.bytes.push(byte, &mut text),
                None => {
                    self.bytes.end_run(&mut text);
                    text.extend(token.chars().map(|character| if character == '▁' { ' ' } else { character }));
                }
            },
        }
        self.append(&text, out);
    }

    fn append(&mut self, mut text: &str, out: &mut String) {
        if self.expects_prefix && !text.is_empty() {
            text = text.strip_prefix(' ').unwrap_or(text);
            self.expects_prefix = false;
        }
        out.push_str(text);
    }
}

/// The byte of a token `<0x00>` … `<0xFF>`.
fn byte_of_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// The byte that a character of a byte-level token stands for: printable Latin-1 stands for itself, and the 68 others
/// are counted from U+0100. Source: `bytes_to_unicode` of GPT-2.
fn byte_of_character(character: char) -> Option<u8> {
    let is_printable = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u8::try_from(character) {
        Ok(byte) => is_printable(&byte).then_some(byte),
        Err(_) => (0..=255).filter(|byte| !is_printable(byte)).nth((character as usize).checked_sub(0x100)?),
    }
}
