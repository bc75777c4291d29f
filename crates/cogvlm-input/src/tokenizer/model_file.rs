//! The SentencePiece model file, a protocol buffer. Source: `sentencepiece_model.proto`.

use super::error::ModelProblem;

/// Vocabularies end far below this: Llama 3's has 128,256 tokens.
const MAX_PIECES: usize = 1 << 20;
/// SentencePiece itself stops at 16 characters by default.
const MAX_PIECE_BYTES: usize = 1024;

/// A piece of the vocabulary. Its id is its place in the file.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) text: String,
    /// Pieces with higher scores are merged first.
    pub(super) score: f32,
    pub(super) kind: PieceKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PieceKind {
    Normal,
    /// The one piece for what has no other.
    Unknown,
    /// Never made from text, and no text itself.
    Control,
    Byte(u8),
}

/// Pieces of a BPE model with Llama's settings. Each piece was checked alone; the caller checks them together.
///
/// # Errors
/// A file that is broken, or of another kind.
pub(super) fn read_pieces(file: &[u8]) -> Result<Vec<Piece>, ModelProblem> {
    let mut pieces = Vec::new();
    let mut trainer = TrainerSpec::default();
    let mut normalizer = NormalizerSpec::default();
    let mut fields = Fields::new(file);
    while let Some((number, value)) = fields.next()? {
        match (number, value) {
            (1, Value::Bytes(message)) => {
                if pieces.len() == MAX_PIECES {
                    return Err(ModelProblem::TooManyPieces { limit: MAX_PIECES });
                }
                pieces.push(read_piece(message, pieces.len())?);
            }
            // A message that occurs twice is merged, field by field.
            (2, Value::Bytes(message)) => trainer.read(message)?,
            (3, Value::Bytes(message)) => normalizer.read(message, "normalizer_spec.precompiled_charsmap")?,
            (5, Value::Bytes(message)) => {
                NormalizerSpec::default().read(message, "denormalizer_spec.precompiled_charsmap")?;
            }
            (1 | 2 | 3 | 5, _) => return Err(fields.problem("a field of another type than expected")),
            _ => {}
        }
    }
    if pieces.is_empty() {
        return Err(ModelProblem::NoPieces);
    }
    trainer.check()?;
    normalizer.check()?;
    Ok(pieces)
}

fn read_piece(message: Message<'_>, id: usize) -> Result<Piece, ModelProblem> {
    let (mut text, mut score, mut kind) = (&[][..], 0.0, 1);
    let mut fields = Fields::of(message);
    while let Some((number, value)) = fields.next()? {
        match (number, value) {
            (1, Value::Bytes(value)) => text = value.bytes,
            (2, Value::Fixed32(value)) => score = f32::from_bits(value),
            (3, Value::Varint(value)) => kind = value,
            (1..=3, _) => return Err(fields.problem("a field of another type than expected")),
            _ => {}
        }
    }
    if text.is_empty() {
        return Err(ModelProblem::EmptyPiece { id });
    }
    if text.len() > MAX_PIECE_BYTES {
        return Err(ModelProblem::PieceTooLong { id, bytes: text.len(), limit: MAX_PIECE_BYTES });
    }
    let text = std::str::from_utf8(text).map_err(|_| ModelProblem::PieceNotUtf8 { id })?.to_owned();
    if !score.is_finite() {
        return Err(ModelProblem::BadScore { piece: shown(&text), id, score: score.to_string() });
    }
    let kind = match kind {
        1 => PieceKind::Normal,
        2 => PieceKind::Unknown,
        3 => PieceKind::Control,
        6 => match byte_of(&text) {
            Some(byte) => PieceKind::Byte(byte),
            None => return Err(ModelProblem::BadBytePiece { piece: shown(&text), id }),
        },
        other => {
            let found = match other {
                4 => "user-defined".to_owned(),
                5 => "unused".to_owned(),
                number => number.to_string(),
            };
            return Err(ModelProblem::PieceType { piece: shown(&text), id, found });
        }
    };
    Ok(Piece { text, score, kind })
}

/// A piece as a message shows it: control characters escaped.
pub(super) fn shown(piece: &str) -> String {
    piece.escape_debug().to_string()
}

/// The byte of a piece `<0x00>` … `<0xFF>`, upper case as SentencePiece writes it.
fn byte_of(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    let byte = u8::from_str_radix(digits, 16).ok()?;
    (format!("{byte:02X}") == digits).then_some(byte)
}

/// What of `TrainerSpec` decides how text is cut; the rest tells how the model was trained.
struct TrainerSpec {
    model_type: u64,
    treat_whitespace_as_suffix: bool,
}

impl Default for TrainerSpec {
    fn default() -> Self {
        Self { model_type: 1, treat_whitespace_as_suffix: false }
    }
}

impl TrainerSpec {
    fn read(&mut self, message: Message<'_>) -> Result<(), ModelProblem> {
        let mut fields = Fields::of(message);
        while let Some((number, value)) = fields.next()? {
            match (number, value) {
                (3, Value::Varint(value)) => self.model_type = value,
                (24, Value::Varint(value)) => self.treat_whitespace_as_suffix = value != 0,
                (3 | 24, _) => return Err(fields.problem("a field of another type than expected")),
                _ => {}
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), ModelProblem> {
        let name = match self.model_type {
            2 => return setting("trainer_spec.treat_whitespace_as_suffix", self.treat_whitespace_as_suffix, false),
            1 => "unigram".to_owned(),
            3 => "word".to_owned(),
            4 => "char".to_owned(),
            number => format!("type {number}"),
        };
        Err(ModelProblem::NotBpe { found: name })
    }
}

struct NormalizerSpec {
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    escape_whitespaces: bool,
}

impl Default for NormalizerSpec {
    fn default() -> Self {
        Self { add_dummy_prefix: true, remove_extra_whitespaces: true, escape_whitespaces: true }
    }
}

impl NormalizerSpec {
    /// A character map is refused at once, under the name `charsmap`: ours is the identity.
    fn read(&mut self, message: Message<'_>, charsmap: &'static str) -> Result<(), ModelProblem> {
        let mut fields = Fields::of(message);
        while let Some((number, value)) = fields.next()? {
            match (number, value) {
                (2, Value::Bytes(map)) if map.bytes.is_empty() => {}
                (2, Value::Bytes(map)) => {
                    let found = format!("{} bytes", map.bytes.len());
                    return Err(ModelProblem::Normaliser { setting: charsmap, found, expected: "none" });
                }
                (3, Value::Varint(value)) => self.add_dummy_prefix = value != 0,
                (4, Value::Varint(value)) => self.remove_extra_whitespaces = value != 0,
                (5, Value::Varint(value)) => self.escape_whitespaces = value != 0,
                (2..=5, _) => return Err(fields.problem("a field of another type than expected")),
                _ => {}
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), ModelProblem> {
        setting("normalizer_spec.add_dummy_prefix", self.add_dummy_prefix, true)?;
        setting("normalizer_spec.remove_extra_whitespaces", self.remove_extra_whitespaces, false)?;
        setting("normalizer_spec.escape_whitespaces", self.escape_whitespaces, true)
    }
}

fn setting(setting: &'static str, found: bool, expected: bool) -> Result<(), ModelProblem> {
    if found == expected {
        return Ok(());
    }
    let expected = if expected { "true" } else { "false" };
    Err(ModelProblem::Normaliser { setting, found: found.to_string(), expected })
}

/// Bytes of a message, and where they lie in the file.
#[derive(Clone, Copy)]
struct Message<'a> {
    bytes: &'a [u8],
    start: usize,
}

enum Value<'a> {
    Varint(u64),
    Fixed64,
    Bytes(Message<'a>),
    Fixed32(u32),
}

/// The fields of one message, in file order.
struct Fields<'a> {
    message: Message<'a>,
    offset: usize,
}

impl<'a> Fields<'a> {
    fn new(file: &'a [u8]) -> Self {
        Self::of(Message { bytes: file, start: 0 })
    }

    fn of(message: Message<'a>) -> Self {
        Self { message, offset: 0 }
    }

    /// Number and value of the next field; `None` after the last.
    fn next(&mut self) -> Result<Option<(u64, Value<'a>)>, ModelProblem> {
        if self.offset == self.message.bytes.len() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Value::Varint(self.varint()?),
            1 => {
                self.take(8)?;
                Value::Fixed64
            }
            2 => {
                let length = self.varint()?;
                // What does not fit in usize is longer than the file as well.
                Value::Bytes(self.take(usize::try_from(length).unwrap_or(usize::MAX))?)
            }
            5 => {
                let bytes = self.take(4)?.bytes;
                Value::Fixed32(u32::from_le_bytes(bytes.try_into().expect("take(4) gave four bytes")))
            }
            _ => return Err(self.problem("an unknown wire type")),
        };
        if tag >> 3 == 0 {
            return Err(self.problem("a field without a number"));
        }
        Ok(Some((tag >> 3, value)))
    }

    fn take(&mut self, length: usize) -> Result<Message<'a>, ModelProblem> {
        let rest = &self.message.bytes[self.offset..];
        let bytes = rest.get(..length).ok_or_else(|| self.problem("a field longer than the rest"))?;
        let start = self.message.start + self.offset;
        self.offset += length;
        Ok(Message { bytes, start })
    }

    fn varint(&mut self) -> Result<u64, ModelProblem> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?.bytes[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(self.problem("an integer of more than ten bytes"))
    }

    fn problem(&self, problem: &'static str) -> ModelProblem {
        ModelProblem::Protobuf { problem, offset: self.message.start + self.offset }
    }
}
