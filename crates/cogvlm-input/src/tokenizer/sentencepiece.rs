//! SentencePiece BPE, used as Hugging Face's slow `LlamaTokenizer` uses it (transformers 4.35, which the published
//! model code was written for).

use std::collections::HashMap;

use super::bpe::{self, Merge, Vocabulary};
use super::error::{ModelProblem, TokenizerError};
use super::model_file::{self, Piece, PieceKind};
use super::utf8::{Invalid, Utf8Buffer};
use super::{SpecialIds, SpecialText};

/// Stands for a space inside pieces, `▁`.
const SPACE: char = '\u{2581}';

/// Names that become special ids inside text: begin, end, unknown.
const SPECIAL: [&str; 3] = ["<s>", "</s>", "<unk>"];

pub(super) struct SentencePiece {
    pieces: Vec<Piece>,
    ids: HashMap<String, u32>,
    /// By id. Equal scores have equal ranks, so that the leftmost pair wins.
    ranks: Vec<u32>,
    byte_ids: [u32; 256],
    /// Ids of [`SPECIAL`].
    special: [u32; 3],
    longest_piece_bytes: usize,
    legacy: bool,
}

impl SentencePiece {
    /// `legacy`: every run of text between special tokens gets a space put before it, not only the first.
    ///
    /// # Errors
    /// A file that is broken, or not a Llama tokenizer.
    pub(super) fn parse(file: &[u8], legacy: bool) -> Result<Self, ModelProblem> {
        let pieces = model_file::read_pieces(file)?;
        let mut ids: HashMap<String, u32> = HashMap::with_capacity(pieces.len());
        let mut byte_ids = [None; 256];
        let mut unknown = None;
        for (id, piece) in pieces.iter().enumerate() {
            let id_u32 = u32::try_from(id).expect("read_pieces limits their number");
            if let Some(first) = ids.insert(piece.text.clone(), id_u32) {
                let piece = model_file::shown(&piece.text);
                return Err(ModelProblem::DuplicatePiece { piece, first: first as usize, second: id });
            }
            match piece.kind {
                PieceKind::Byte(byte) => byte_ids[usize::from(byte)] = Some(id_u32),
                PieceKind::Unknown if unknown.replace(id).is_some() => {
                    return Err(ModelProblem::SecondUnknown { piece: model_file::shown(&piece.text), id });
                }
                PieceKind::Unknown | PieceKind::Normal | PieceKind::Control => {}
            }
        }
        let special = |name: &'static str, kind, kind_name| match ids.get(name) {
            Some(&id) if pieces[id as usize].kind == kind => Ok(id),
            _ => Err(ModelProblem::MissingSpecial { kind: kind_name, piece: name }),
        };
        let special = [
            special(SPECIAL[0], PieceKind::Control, "control")?,
            special(SPECIAL[1], PieceKind::Control, "control")?,
            special(SPECIAL[2], PieceKind::Unknown, "unknown")?,
        ];
        if let Some(byte) = (0..=255).find(|&byte| byte_ids[usize::from(byte)].is_none()) {
            return Err(ModelProblem::MissingByte { byte });
        }
        Ok(Self {
            ranks: rank_by_score(&pieces),
            byte_ids: byte_ids.map(|id| id.expect("checked above")),
            longest_piece_bytes: pieces.iter().map(|piece| piece.text.len()).max().unwrap_or(0),
            special,
            pieces,
            ids,
            legacy,
        })
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.pieces.len()
    }

    pub(super) fn special_ids(&self) -> SpecialIds {
        let [bos, eos, unk] = self.special.map(Some);
        SpecialIds { bos, eos, unk }
    }

    pub(super) fn special_names(&self) -> [&'static str; 3] {
        SPECIAL
    }

    pub(super) fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// # Errors
    /// An id outside the vocabulary.
    pub(super) fn piece(&self, id: u32) -> Result<&Piece, TokenizerError> {
        let piece = self.pieces.get(id as usize);
        piece.ok_or(TokenizerError::UnknownId { id, vocab_size: self.vocab_size() })
    }

    pub(super) fn encode(&self, text: &str, special_text: SpecialText) -> Vec<u32> {
        let mut ids = Vec::new();
        if text.is_empty() {
            return ids;
        }
        if self.legacy {
            self.encode_runs(text, special_text, |run| format!("{SPACE}{run}"), &mut ids);
            return ids;
        }
        // A `▁` that the user typed is a space here, and the one put before the text goes if a special token follows.
        let text = format!(" {}", text.replace(SPACE, " "));
        self.encode_runs(&text, special_text, str::to_owned, &mut ids);
        let space = self.ids.get(SPACE.encode_utf8(&mut [0; 4]) as &str);
        if let [first, second, ..] = ids[..]
            && Some(&first) == space
            && self.is_special(second)
        {
            ids.remove(0);
        }
        ids
    }

    /// Cuts `text` at the names of special tokens and encodes each run between them, prefixed by `prefix`.
    fn encode_runs(&self, text: &str, special_text: SpecialText, prefix: impl Fn(&str) -> String, ids: &mut Vec<u32>) {
        let encode_run = |run: &str, ids: &mut Vec<u32>| {
            if !run.is_empty() {
                bpe::encode(self, &prefix(run).replace(' ', "\u{2581}"), ids);
            }
        };
        let mut run_start = 0;
        if special_text == SpecialText::Recognised {
            // No name is part of another, or can overlap one: each begins with the only `<` in it.
            for (at, _) in text.match_indices('<') {
                if let Some(index) = SPECIAL.iter().position(|name| text[at..].starts_with(name)) {
                    encode_run(&text[run_start..at], ids);
                    ids.push(self.special[index]);
                    run_start = at + SPECIAL[index].len();
                }
            }
        }
        encode_run(&text[run_start..], ids);
    }

    /// # Errors
    /// An id outside the vocabulary.
    pub(super) fn decode_with_special(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        let mut text = String::new();
        let mut run = RunDecoder::first(self);
        let mut run_text = String::new();
        let mut after_special = false;
        for (index, &id) in ids.iter().enumerate() {
            if !self.is_special(id) {
                run.push(self, id, &mut run_text)?;
                after_special = false;
                continue;
            }
            if self.legacy && index > 0 && !after_special {
                text.push(' ');
            }
            run.finish(&mut run_text);
            text += &run_text;
            text += &self.pieces[id as usize].text;
            run = RunDecoder::later(self);
            run_text.clear();
            after_special = true;
        }
        run.finish(&mut run_text);
        Ok(text + &run_text)
    }
}

impl Vocabulary for SentencePiece {
    fn merged(&self, text: &str) -> Option<Merge> {
        if text.len() > self.longest_piece_bytes {
            return None;
        }
        let &id = self.ids.get(text)?;
        let normal = self.pieces[id as usize].kind == PieceKind::Normal;
        normal.then(|| Merge { rank: self.ranks[id as usize], id })
    }

    fn push_character(&self, character: &str, ids: &mut Vec<u32>) {
        match self.ids.get(character) {
            Some(&id) => ids.push(id),
            None => ids.extend(character.bytes().map(|byte| self.byte_ids[usize::from(byte)])),
        }
    }
}

fn rank_by_score(pieces: &[Piece]) -> Vec<u32> {
    let mut order: Vec<usize> = (0..pieces.len()).collect();
    order.sort_by(|&a, &b| pieces[b].score.partial_cmp(&pieces[a].score).expect("read_pieces refuses NaN"));
    let mut ranks = vec![0; pieces.len()];
    let mut rank = 0;
    for pair in order.windows(2) {
        rank += u32::from(pieces[pair[0]].score != pieces[pair[1]].score);
        ranks[pair[1]] = rank;
    }
    ranks
}

/// Text of a run of pieces without special tokens among them, piece by piece.
#[derive(Debug)]
pub(super) struct RunDecoder {
    bytes: Utf8Buffer,
    /// The next piece is the very first: it loses one `▁`, and what remains is looked up again.
    is_first: bool,
    /// The text has not begun, and the space that was put before it when it was encoded has not been met.
    expects_prefix: bool,
}

impl RunDecoder {
    /// For the run that starts the sequence.
    pub(super) fn first(model: &SentencePiece) -> Self {
        Self { is_first: true, ..Self::later(model) }
    }

    /// For a run after a special token. Only with `legacy` did it get a space of its own.
    fn later(model: &SentencePiece) -> Self {
        Self { bytes: Utf8Buffer::new(Invalid::EachByte), is_first: false, expects_prefix: model.legacy }
    }

    /// Appends to `out` what `id` adds to the text.
    ///
    /// # Errors
    /// An id outside the vocabulary.
    pub(super) fn push(&mut self, model: &SentencePiece, id: u32, out: &mut String) -> Result<(), TokenizerError> {
        let mut piece = model.piece(id)?;
        if std::mem::take(&mut self.is_first)
            && let Some(rest) = piece.text.strip_prefix(SPACE)
        {
            match model.ids.get(rest) {
                Some(&id) => piece = &model.pieces[id as usize],
                // SentencePiece hands text that is no piece through as it is. It is nothing at all where the piece
                // was a lone `▁`, and then the next piece may lose its space as well.
                None => {
                    out.push_str(rest);
                    self.expects_prefix &= rest.is_empty();
                    return Ok(());
                }
            }
        }
        if let PieceKind::Byte(byte) = piece.kind {
            self.bytes.push(byte, out);
            self.expects_prefix = false;
            return Ok(());
        }
        self.bytes.end_run(out);
        let mut text = match piece.kind {
            PieceKind::Control => "",
            _ => &piece.text[..],
        };
        if self.expects_prefix {
            text = text.strip_prefix(SPACE).unwrap_or(text);
            self.expects_prefix = piece.kind == PieceKind::Control;
        }
        out.extend(text.chars().map(|character| if character == SPACE { ' ' } else { character }));
        Ok(())
    }

    /// Appends what an unfinished character comes to.
    pub(super) fn finish(&mut self, out: &mut String) {
        self.bytes.end_run(out);
    }
}
