//! Byte-pair merging: always the adjacent pair whose joined text is the best-scoring piece, leftmost on ties.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// What merging needs to know of a vocabulary.
pub(super) trait Vocabulary {
    /// Id of the piece that `text` may be merged into, and its rank: lower is merged earlier.
    fn merged(&self, text: &str) -> Option<Merge>;

    /// Appends the ids of one character that was merged with nothing.
    fn push_character(&self, character: &str, ids: &mut Vec<u32>);
}

/// A piece that two neighbours may become.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Merge {
    pub(super) rank: u32,
    pub(super) id: u32,
}

/// Part of the text, in a list that is linked both ways. A symbol that went into its left neighbour is empty.
struct Symbol {
    start: usize,
    end: usize,
    left: Option<usize>,
    right: Option<usize>,
    /// `None` while it is a single character.
    id: Option<u32>,
}

/// A pair that may be merged. It is stale if one of the two symbols has changed since, which shows in its length.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    rank: u32,
    left: usize,
    right: usize,
    bytes: usize,
    id: u32,
}

/// Appends the ids of `text`. Takes O(n log n) for n characters.
pub(super) fn encode(vocabulary: &impl Vocabulary, text: &str, ids: &mut Vec<u32>) {
    let mut symbols = split_characters(text);
    let mut queue: BinaryHeap<Reverse<Candidate>> = (1..symbols.len())
        .filter_map(|right| candidate(vocabulary, text, &symbols, right - 1, right).map(Reverse))
        .collect();

    while let Some(Reverse(Candidate { left, right, bytes, id, .. })) = queue.pop() {
        let (start, end) = (symbols[left].start, symbols[right].end);
        // An emptied symbol has no length, and one that took up its neighbour is longer than the pair was.
        let is_empty = |symbol: &Symbol| symbol.start == symbol.end;
        if is_empty(&symbols[left]) || is_empty(&symbols[right]) || end - start != bytes {
            continue;
        }
        let after = symbols[right].right;
        symbols[left] = Symbol { start, end, left: symbols[left].left, right: after, id: Some(id) };
        symbols[right].start = end;
        if let Some(after) = after {
            symbols[after].left = Some(left);
            queue.extend(candidate(vocabulary, text, &symbols, left, after).map(Reverse));
        }
        if let Some(before) = symbols[left].left {
            queue.extend(candidate(vocabulary, text, &symbols, before, left).map(Reverse));
        }
    }

    for symbol in symbols.iter().filter(|symbol| symbol.start < symbol.end) {
        match symbol.id {
            Some(id) => ids.push(id),
            None => vocabulary.push_character(&text[symbol.start..symbol.end], ids),
        }
    }
}

fn split_characters(text: &str) -> Vec<Symbol> {
    let mut symbols: Vec<Symbol> = Vec::with_capacity(text.len());
    for (start, character) in text.char_indices() {
        let index = symbols.len();
        let symbol = Symbol {
            start,
            end: start + character.len_utf8(),
            left: index.checked_sub(1),
            right: Some(index + 1),
            id: None,
        };
        symbols.push(symbol);
    }
    if let Some(last) = symbols.last_mut() {
        last.right = None;
    }
    symbols
}

fn candidate(
    vocabulary: &impl Vocabulary, text: &str, symbols: &[Symbol], left: usize, right: usize,
) -> Option<Candidate> {
    let (start, end) = (symbols[left].start, symbols[right].end);
    let Merge { rank, id } = vocabulary.merged(&text[start..end])?;
    Some(Candidate { rank, left, right, bytes: end - start, id })
}
