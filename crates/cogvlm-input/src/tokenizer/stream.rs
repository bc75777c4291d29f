//! Text of ids that arrive one by one.

use super::json::JsonDecoder;
use super::sentencepiece::RunDecoder;
use super::{Model, Tokenizer, TokenizerError};

/// Turns ids into text as they come. Special tokens are left out. What the calls return, put together, is
/// `decode(ids, true)`; no call returns part of a character.
///
/// ```no_run
/// # fn main() -> Result<(), cogvlm_input::TokenizerError> {
/// let tokenizer = cogvlm_input::Tokenizer::open("cogvlm-chat".as_ref())?;
/// let mut stream = tokenizer.stream_decoder();
/// let mut answer = String::new();
/// for id in tokenizer.encode("two cats")? {
///     answer += &stream.push(id)?;
/// }
/// answer += &stream.finish();
/// assert_eq!(answer, "two cats");
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    state: State,
}

#[derive(Debug)]
enum State {
    SentencePiece(RunDecoder),
    Json(JsonDecoder),
}

impl StreamDecoder {
    pub(super) fn new(tokenizer: Tokenizer) -> Self {
        let state = match &*tokenizer.model {
            Model::SentencePiece(model) => State::SentencePiece(RunDecoder::first(model)),
            Model::Json(model) => State::Json(JsonDecoder::new(model)),
        };
        Self { tokenizer, state }
    }

    /// The text that `id` completes; empty while a character is unfinished.
    ///
    /// # Errors
    /// An id outside the vocabulary. The decoder stays as it was.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        let mut text = String::new();
        match (&*self.tokenizer.model, &mut self.state) {
            (Model::SentencePiece(model), State::SentencePiece(run)) => {
                if !model.is_special(id) {
                    run.push(model, id, &mut text)?;
                }
            }
            (Model::Json(model), State::Json(decoder)) => decoder.push(model, id, &mut text)?,
            _ => unreachable!("`new` made the state for this model"),
        }
        Ok(text)
    }

    /// The rest: U+FFFD for a character that was never finished.
    pub fn finish(mut self) -> String {
        let mut text = String::new();
        match &mut self.state {
            State::SentencePiece(run) => run.finish(&mut text),
            State::Json(decoder) => decoder.finish(&mut text),
        }
        text
    }
}
