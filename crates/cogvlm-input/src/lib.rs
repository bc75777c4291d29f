//! What a user brings, in the form in which the model reads it: text as token ids, pictures as normalised pixels.
#![forbid(unsafe_code)]

mod bounded_file;
pub mod image;
pub mod tokenizer;

pub use tokenizer::{SpecialIds, StreamDecoder, Tokenizer, TokenizerError};
