//! SentencePiece models, and text through those that are read: what is encoded can be decoded.

use std::path::Path;
use std::sync::LazyLock;

use cogvlm_input::Tokenizer;

static WHOLE: LazyLock<Tokenizer> = LazyLock::new(|| {
    let bytes: &[u8] = include_bytes!("../../tests/goldens/tokenizer.model");
    read(bytes).expect("the synthetic tokenizer is whole")
});

fn read(bytes: &[u8]) -> Option<Tokenizer> {
    Tokenizer::from_sentencepiece(bytes, Path::new("tokenizer.model")).ok()
}

/// Panics where the code under test is wrong.
pub(crate) fn check(bytes: &[u8]) {
    // A text, its length in the first two bytes, then a model; without a model: text through the synthetic tokenizer.
    let Some((length, rest)) = bytes.split_first_chunk::<2>() else { return };
    let Some((text, model)) = rest.split_at_checked(usize::from(u16::from_le_bytes(*length)) % 512) else { return };
    let Some(tokenizer) = (if model.is_empty() { Some(WHOLE.clone()) } else { read(model) }) else { return };
    let text = String::from_utf8_lossy(text);
    for ids in [tokenizer.encode(&text), tokenizer.encode_plain(&text)] {
        let ids = ids.expect("every text has ids");
        assert!(ids.iter().all(|id| (*id as usize) < tokenizer.vocab_size()));
        for skip_special in [true, false] {
            tokenizer.decode(&ids, skip_special).expect("its own ids are known");
        }
    }
    let ids: Vec<u32> = text.chars().map(u32::from).collect();
    drop(tokenizer.decode(&ids, true));
}
