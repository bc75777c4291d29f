//! What is asked of the engine.

use std::sync::Arc;

use cogvlm_backend::SamplingParams;
use cogvlm_core::tokens::TokenLayout;
use cogvlm_core::{ModelSpec, TokenType};

use crate::blocks::BlockLease;

/// Names a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// An image as the model reads it. Clones share the pixels, and compare equal.
#[derive(Debug, Clone)]
pub struct Image {
    /// Normalised pixels, `[channels, image_size, image_size]`.
    pub pixels: Arc<[f32]>,
}

impl PartialEq for Image {
    /// Whether both are the same picture: the same memory, or the same pixels.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.pixels, &other.pixels) || self.pixels == other.pixels
    }
}

/// One answer to compute.
#[derive(Debug)]
pub struct Request {
    /// Tokens of the prompt.
    pub layout: TokenLayout,
    /// The image whose vision tokens stand in the layout.
    pub image: Option<Image>,
    /// How tokens are chosen.
    pub params: SamplingParams,
    /// Most tokens to generate.
    pub max_new_tokens: usize,
    /// Decode on after the end-of-sequence token.
    pub ignore_eos: bool,
    /// Feed these tokens in place of the chosen ones, and stop after them.
    pub forced: Option<Vec<u32>>,
    /// Report the logits of every step.
    pub want_logits: bool,
    /// Report the hidden states of the prefill.
    pub capture: bool,
    /// KV cache of an earlier request that this one may continue.
    pub prefix: Option<CachedPrefix>,
    /// Hand the KV cache out when the request is finished.
    pub keep_cache: bool,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FinishReason {
    /// The end-of-sequence token was chosen, or the caller saw a stop string.
    Stop,
    /// As many tokens as asked for, or the context is full.
    #[default]
    Length,
}

/// KV cache of a finished request: what a conversation continues from.
#[derive(Debug)]
pub struct CachedPrefix {
    pub(crate) input_ids: Vec<u32>,
    pub(crate) token_types: Vec<TokenType>,
    pub(crate) image: Option<Image>,
    pub(crate) blocks: BlockLease,
}

impl CachedPrefix {
    /// How many of the first tokens of a prompt the cache covers. At least one token of the prompt is left to compute,
    /// and an image is covered whole or not at all.
    pub(crate) fn covers(&self, layout: &TokenLayout, image: Option<&Image>) -> usize {
        let pairs = self.input_ids.iter().zip(&self.token_types);
        let same = pairs.zip(layout.input_ids.iter().zip(&layout.token_types)).take_while(|(a, b)| a == b).count();
        let same = same.min(layout.input_ids.len().saturating_sub(1));
        let image_end =
            layout.token_types.iter().rposition(|kind| *kind == TokenType::Vision).map_or(0, |last| last + 1);
        if image_end > 0 && (same < image_end || self.image.as_ref() != image) { 0 } else { same }
    }
}

/// Why a request is refused before anything is computed.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum RequestError {
    /// The prompt does not fit the planned context.
    #[error(
        "the prompt has {num_tokens} tokens, but the plan has room for {context_len} per sequence, answer included"
    )]
    TooLong {
        /// Tokens of the prompt, image included.
        num_tokens: usize,
        /// Tokens that a sequence may have.
        context_len: usize,
    },
    /// A token id that the model does not have.
    #[error("token id {id} is outside the model's vocabulary of {vocab_size}")]
    TokenId {
        /// The id.
        id: u32,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// Layout and image contradict each other.
    #[error("the prompt has {found} vision tokens, but {expected} are right {}", if *.expected == 0 { "without an image" } else { "for one image after BOS" })]
    VisionTokens {
        /// Vision tokens in the layout.
        found: usize,
        /// What the model needs.
        expected: usize,
    },
    /// The pixels are not those of one image of the model's size.
    #[error("the image has {found} values, but the model reads {expected}")]
    Pixels {
        /// Values given.
        found: usize,
        /// Values needed.
        expected: usize,
    },
    /// A request for no token at all.
    #[error("at least one new token has to be asked for")]
    NoTokens,
    /// An empty prompt.
    #[error("the prompt has no token, not even BOS")]
    Empty,
}

impl Request {
    /// Checks the request against the model and the planned context.
    pub(crate) fn validate(&self, spec: &ModelSpec, context_len: usize) -> Result<(), RequestError> {
        let num_tokens = self.layout.input_ids.len();
        if num_tokens == 0 {
            return Err(RequestError::Empty);
        }
        if self.max_new_tokens == 0 {
            return Err(RequestError::NoTokens);
        }
        if num_tokens > context_len {
            return Err(RequestError::TooLong { num_tokens, context_len });
        }
        let ids = self.layout.input_ids.iter().chain(self.forced.iter().flatten());
        if let Some(&id) = ids.into_iter().find(|id| **id as usize >= spec.vocab_size) {
            return Err(RequestError::TokenId { id, vocab_size: spec.vocab_size });
        }
        let found = self.layout.token_types.iter().filter(|kind| **kind == TokenType::Vision).count();
        let expected = if self.image.is_some() { spec.num_vision_tokens() } else { 0 };
        let contiguous = self.layout.token_types.iter().skip(1).take(expected).all(|kind| *kind == TokenType::Vision);
        if found != expected || !contiguous {
            return Err(RequestError::VisionTokens { found, expected });
        }
        if let Some(image) = &self.image {
            let expected = spec.vision.num_channels * spec.vision.image_size * spec.vision.image_size;
            if image.pixels.len() != expected {
                return Err(RequestError::Pixels { found: image.pixels.len(), expected });
            }
        }
        Ok(())
    }
}
