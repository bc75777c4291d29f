//! Token types, position ids and expert routing of a sequence.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::inventory::Expert;
use crate::spec::ModelSpec;

/// What a token is. Serialised as 0 (language) and 1 (vision), as upstream's `token_type_ids`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TokenType {
    /// Text, and BOS.
    Language,
    /// BOI, the patches of an image, EOI.
    Vision,
}

impl TokenType {
    /// Upstream's number for it.
    pub const fn id(self) -> u32 {
        match self {
            Self::Language => 0,
            Self::Vision => 1,
        }
    }
}

/// The tokens of one request before the model has seen them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenLayout {
    /// Token ids; under vision tokens stands the padding id, which is never read.
    pub input_ids: Vec<u32>,
    /// One type per token.
    pub token_types: Vec<TokenType>,
    /// One position id per token: the input of RoPE.
    pub position_ids: Vec<u32>,
}

impl TokenLayout {
    /// BOS, the vision tokens of the image if there is one, then the text.
    ///
    /// Source: `build_conversation_input_ids` of the published model code.
    pub fn new(spec: &ModelSpec, has_image: bool, text_ids: &[u32]) -> Self {
        let num_vision_tokens = if has_image { spec.num_vision_tokens() } else { 0 };
        let mut input_ids = vec![spec.bos_token_id];
        input_ids.resize(1 + num_vision_tokens, spec.pad_token_id);
        input_ids.extend_from_slice(text_ids);
        let mut token_types = vec![TokenType::Language];
        token_types.resize(1 + num_vision_tokens, TokenType::Vision);
        token_types.resize(input_ids.len(), TokenType::Language);
        let position_ids = position_ids(&token_types);
        Self { input_ids, token_types, position_ids }
    }
}

/// Expert of each token: vision where the token *and its right neighbour* are vision tokens, so EOI, the last token
/// of an image, goes to the language expert. Source: `get_expert_mask` in the reference model.
pub fn route_experts(token_types: &[TokenType]) -> Vec<Expert> {
    use TokenType::{Language, Vision};
    let right_neighbours = token_types.iter().skip(1).chain([&Language]);
    let pairs = token_types.iter().zip(right_neighbours);
    pairs.map(|pair| if pair == (&Vision, &Vision) { Expert::Vision } else { Expert::Language }).collect()
}

/// Position id of each token: every language token, BOI and EOI advance by one, the patches of an image share one.
/// Source: `build_position_ids` in the reference model (without its attention mask: nothing is padded here).
pub fn position_ids(token_types: &[TokenType]) -> Vec<u32> {
    use TokenType::{Language, Vision};
    let at = |index: Option<usize>| index.and_then(|index| token_types.get(index)).copied().unwrap_or(Language);
    let is_patch =
        |index: usize| at(Some(index)) == Vision && at(index.checked_sub(1)) == Vision && at(Some(index + 1)) == Vision;
    let mut position = 0;
    (0..token_types.len())
        .map(|index| {
            if index > 0 && !(is_patch(index) && is_patch(index - 1)) {
                position += 1;
            }
            position
        })
        .collect()
}

/// A run of rows that one expert processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpertRange {
    /// Rows of the batch.
    pub rows: Range<usize>,
    /// Whose weights process them.
    pub expert: Expert,
}

/// The maximal runs of equal experts, in order; together they cover all rows.
pub fn expert_ranges(experts: &[Expert]) -> Vec<ExpertRange> {
    let mut ranges: Vec<ExpertRange> = Vec::new();
    for (row, &expert) in experts.iter().enumerate() {
        match ranges.last_mut() {
            Some(last) if last.expert == expert => last.rows.end = row + 1,
            _ => ranges.push(ExpertRange { rows: row..row + 1, expert }),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use TokenType::{Language as L, Vision as V};

    #[test]
    fn image_tokens_share_a_position_and_eoi_is_language() {
        // BOS, BOI, four patches, EOI, three words: the example of the model's description, without its padding.
        let types = [L, V, V, V, V, V, V, L, L, L];
        assert_eq!(position_ids(&types), [0, 1, 2, 2, 2, 2, 3, 4, 5, 6]);
        let ranges = expert_ranges(&route_experts(&types));
        let expected = [(0..1, Expert::Language), (1..6, Expert::Vision), (6..10, Expert::Language)];
        assert_eq!(ranges, expected.map(|(rows, expert)| ExpertRange { rows, expert }));
    }

    #[test]
    fn eoi_may_be_the_last_token() {
        let types = [L, V, V, V];
        assert_eq!(position_ids(&types), [0, 1, 2, 3]);
        assert_eq!(route_experts(&types), [Expert::Language, Expert::Vision, Expert::Vision, Expert::Language]);
    }

    #[test]
    fn text_counts_up() {
        assert_eq!(position_ids(&[L; 5]), [0, 1, 2, 3, 4]);
        assert!(position_ids(&[]).is_empty());
    }
}
