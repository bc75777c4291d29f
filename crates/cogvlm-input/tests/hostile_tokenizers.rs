//! Tokenizer files that are broken, or of a kind that is not read: one message each.

use std::path::Path;

use cogvlm_input::Tokenizer;

/// A SentencePiece model, piece by piece.
struct ModelFile {
    pieces: Vec<Vec<u8>>,
    trainer: Vec<u8>,
    normalizer: Vec<u8>,
}

const NORMAL: u64 = 1;
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const BYTE: u64 = 6;

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

fn number(field: u64, value: u64) -> Vec<u8> {
    [varint(field << 3), varint(value)].concat()
}

fn message(field: u64, bytes: &[u8]) -> Vec<u8> {
    [varint(field << 3 | 2), varint(bytes.len() as u64), bytes.to_vec()].concat()
}

fn piece(text: &[u8], score: f32, kind: u64) -> Vec<u8> {
    [message(1, text), vec![2 << 3 | 5], score.to_le_bytes().to_vec(), number(3, kind)].concat()
}

impl ModelFile {
    /// The smallest Llama tokenizer that can say `ab`: ids 259 `▁`, 260 `a`, 261 `b`, 262 `ab`, 263 `▁ab`.
    fn whole() -> Self {
        let mut pieces = vec![piece(b"<unk>", 0.0, UNKNOWN), piece(b"<s>", 0.0, CONTROL), piece(b"</s>", 0.0, CONTROL)];
        pieces.extend((0..=255_u8).map(|byte| piece(format!("<0x{byte:02X}>").as_bytes(), 0.0, BYTE)));
        let normal = ["▁", "a", "b", "ab", "▁ab"].into_iter().zip([-3.0, -4.0, -5.0, -1.0, -2.0]);
        pieces.extend(normal.map(|(text, score)| piece(text.as_bytes(), score, NORMAL)));
        Self { pieces, trainer: number(3, 2), normalizer: number(4, 0) }
    }

    fn with_piece(id: usize, piece: Vec<u8>) -> Self {
        let mut model = Self::whole();
        if id < model.pieces.len() {
            model.pieces[id] = piece;
        } else {
            model.pieces.push(piece);
        }
        model
    }

    fn bytes(&self) -> Vec<u8> {
        let pieces = self.pieces.iter().flat_map(|piece| message(1, piece));
        pieces.chain(message(2, &self.trainer)).chain(message(3, &self.normalizer)).collect()
    }

    fn refusal(&self) -> String {
        refusal(&self.bytes())
    }
}

/// What is said of a model file called `m`.
fn refusal(bytes: &[u8]) -> String {
    let error = Tokenizer::from_sentencepiece(bytes, Path::new("m")).expect_err("it must be refused");
    error.to_string()
}

#[test]
fn the_whole_model_is_read() {
    let tokenizer = Tokenizer::from_sentencepiece(&ModelFile::whole().bytes(), Path::new("m")).unwrap();
    assert_eq!(tokenizer.vocab_size(), 264);
    assert_eq!(tokenizer.encode("abab\n").unwrap(), [263, 262, 13]);
    assert_eq!(tokenizer.decode(&[263, 262, 13], true).unwrap(), "abab\n");
}

#[test]
fn broken_protocol_buffers_are_refused() {
    assert_eq!(refusal(b""), "`m` is not a SentencePiece model: it has no pieces; download it again");
    let problem = |bytes: &[u8], problem: &str, offset: usize| {
        let expected = format!("`m` is not a SentencePiece model: {problem} at byte {offset}; download it again");
        assert_eq!(refusal(bytes), expected);
    };
    let whole = ModelFile::whole().bytes();
    problem(&whole[..20], "a field longer than the rest", 18);
    problem(b"version https://git-lfs.github.com/spec/v1", "an unknown wire type", 1);
    problem(b"<html>", "an unknown wire type", 1);
    problem(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "an integer of more than ten bytes", 11);
    problem(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "a field longer than the rest", 11);
    problem(b"\x02\x00", "a field without a number", 2);
    problem(b"\x08\x01", "a field of another type than expected", 2);
    // Inside a piece, the place is still that in the file.
    problem(b"\x0a\x03\x0a\x09x", "a field longer than the rest", 4);
}

#[test]
fn no_part_of_a_model_is_a_model() {
    let whole = ModelFile::whole().bytes();
    for length in 0..whole.len() {
        let part = Tokenizer::from_sentencepiece(&whole[..length], Path::new("m"));
        assert!(part.is_err(), "{length} of {} bytes", whole.len());
    }
}

#[test]
fn bad_pieces_are_refused() {
    let refusal = |id: usize, piece: Vec<u8>| ModelFile::with_piece(id, piece).refusal();
    assert_eq!(refusal(262, piece(b"", 0.0, NORMAL)), "`m` has an empty piece, id 262");
    assert_eq!(refusal(262, piece(b"\xff", 0.0, NORMAL)), "`m` has a piece that is not UTF-8, id 262");
    assert_eq!(refusal(262, piece(b"ab", f32::NAN, NORMAL)), "`m` gives piece `ab`, id 262, the score NaN");
    assert_eq!(refusal(262, piece(b"ab", f32::INFINITY, NORMAL)), "`m` gives piece `ab`, id 262, the score inf");
    assert_eq!(refusal(262, piece(b"b", 0.0, NORMAL)), "`m` has piece `b` twice, as ids 261 and 262");
    assert_eq!(refusal(264, piece(b"<s>", 0.0, NORMAL)), "`m` has piece `<s>` twice, as ids 1 and 264");
    let long = piece(&[b'x'; 1025], 0.0, NORMAL);
    assert_eq!(refusal(262, long), "`m` has a piece of 1025 bytes, id 262; at most 1024 are read");
    let user_defined = "`m` has piece `ab`, id 262, of type user-defined, which is not supported";
    assert_eq!(refusal(262, piece(b"ab", 0.0, 4)), user_defined);
    let unused = "`m` has piece `ab`, id 262, of type unused, which is not supported";
    assert_eq!(refusal(262, piece(b"ab", 0.0, 5)), unused);
    assert_eq!(refusal(262, piece(b"ab", 0.0, 99)), "`m` has piece `ab`, id 262, of type 99, which is not supported");
    // What a terminal would act on is shown, not sent.
    let escape = "`m` gives piece `\\u{1b}[2J`, id 262, the score NaN";
    assert_eq!(refusal(262, piece(b"\x1b[2J", f32::NAN, NORMAL)), escape);
}

#[test]
fn missing_pieces_are_refused() {
    let refusal = |id: usize, piece: Vec<u8>| ModelFile::with_piece(id, piece).refusal();
    let missing = "`m` has no byte piece `<0x41>`; without all 256 some text has no ids";
    assert_eq!(refusal(3 + 0x41, piece(b"x", 0.0, NORMAL)), missing);
    let bad = "`m` has a byte piece called `<0x4g>`, id 68; `<0x00>` to `<0xFF>` are expected";
    assert_eq!(refusal(68, piece(b"<0x4g>", 0.0, BYTE)), bad);
    let no_unknown = "`m` has no unknown piece `<unk>`; it is not a Llama tokenizer";
    assert_eq!(refusal(0, piece(b"<unk>", 0.0, NORMAL)), no_unknown);
    let no_end = "`m` has no control piece `</s>`; it is not a Llama tokenizer";
    assert_eq!(refusal(2, piece(b"<end>", 0.0, CONTROL)), no_end);
    let second = "`m` has a second unknown piece `<what>`, id 264";
    assert_eq!(refusal(264, piece(b"<what>", 0.0, UNKNOWN)), second);
}

#[test]
fn other_models_are_refused() {
    let kind = |trainer: Vec<u8>| ModelFile { trainer, ..ModelFile::whole() }.refusal();
    let expected = |found: &str| format!("`m` is a {found} model; only BPE models are read, as CogVLM's is");
    assert_eq!(kind(Vec::new()), expected("unigram"));
    assert_eq!(kind(number(3, 1)), expected("unigram"));
    assert_eq!(kind(number(3, 3)), expected("word"));
    assert_eq!(kind(number(3, 4)), expected("char"));
    assert_eq!(kind(number(3, 77)), expected("type 77"));
    assert_eq!(
        kind([number(3, 2), number(24, 1)].concat()),
        "`m` sets `trainer_spec.treat_whitespace_as_suffix` to true; only false is supported, as in Llama's tokenizer"
    );
    let setting = |normalizer: Vec<u8>| ModelFile { normalizer, ..ModelFile::whole() }.refusal();
    assert_eq!(
        setting(Vec::new()),
        "`m` sets `normalizer_spec.remove_extra_whitespaces` to true; only false is supported, as in Llama's tokenizer"
    );
    assert_eq!(
        setting([number(4, 0), number(3, 0)].concat()),
        "`m` sets `normalizer_spec.add_dummy_prefix` to false; only true is supported, as in Llama's tokenizer"
    );
    assert_eq!(
        setting([number(4, 0), message(2, b"nfkc")].concat()),
        "`m` sets `normalizer_spec.precompiled_charsmap` to 4 bytes; only none is supported, as in Llama's tokenizer"
    );
}

#[test]
fn too_many_pieces_are_refused() {
    let pieces = message(1, &piece(b"x", 0.0, NORMAL)).repeat((1 << 20) + 1);
    assert_eq!(refusal(&pieces), "`m` has more than 1048576 pieces");
}

#[test]
fn a_piece_of_a_thousand_bytes_is_only_a_piece() {
    let long = "x".repeat(1024);
    let model = ModelFile::with_piece(264, piece(long.as_bytes(), 0.0, NORMAL));
    let tokenizer = Tokenizer::from_sentencepiece(&model.bytes(), Path::new("m")).unwrap();
    // Nothing merges into it, as none of its parts is a piece.
    assert_eq!(tokenizer.encode(&long).unwrap().len(), 1 + 1024);
    assert_eq!(tokenizer.decode(&[264], true).unwrap(), long);
}

#[test]
fn damaged_models_never_panic() {
    let whole = ModelFile::whole().bytes();
    let mut state = 1_u32;
    let mut random = |below: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as usize % below
    };
    let mut num_read = 0;
    for _ in 0..5000 {
        let mut damaged = whole.clone();
        for _ in 0..1 + random(3) {
            let place = random(damaged.len());
            damaged[place] = random(256) as u8;
        }
        if let Ok(tokenizer) = Tokenizer::from_sentencepiece(&damaged, Path::new("m")) {
            let ids = tokenizer.encode("ab </s>\u{2581}ab \u{1F600}").unwrap();
            tokenizer.decode(&ids, false).unwrap();
            num_read += 1;
        }
    }
    assert!(num_read > 100, "damage to scores and normal pieces is not noticed, but {num_read} were read");
}

#[test]
fn files_are_named_in_messages() {
    let dir = tempfile::tempdir().unwrap();
    let in_dir = |name: &str| dir.path().join(name);
    let shown = |name: &str| in_dir(name).display().to_string();
    let refusal = |name: &str| Tokenizer::open(&in_dir(name)).expect_err("it must be refused").to_string();
    let write = |name: &str, bytes: &[u8]| std::fs::write(in_dir(name), bytes).unwrap();

    assert_eq!(
        Tokenizer::open(dir.path()).unwrap_err().to_string(),
        format!(
            "`{}` holds neither `tokenizer.model` nor `tokenizer.json`; CogVLM is published without a tokenizer: \
             put `tokenizer.model` of lmsys/vicuna-7b-v1.5 there",
            dir.path().display()
        )
    );
    let missing = refusal("none.model");
    assert_eq!(missing, format!("cannot read `{}`: No such file or directory (os error 2)", shown("none.model")));

    let json = |name: &str, why: &str| {
        assert_eq!(
            refusal(name),
            format!("`{}` is not a tokenizer in the format of the tokenizers library: {why}", shown(name))
        );
    };
    write("cut.json", b"{\"model\": ");
    json("cut.json", "EOF while parsing a value at line 1 column 10");
    write("empty.json", b"{\"decoder\": {\"type\": \"ByteLevel\"}}");
    json("empty.json", "missing field `add_prefix_space` at line 1 column 34");
    write("decoder.json", b"{\"decoder\": {\"type\": \"WordPiece\", \"prefix\": \"##\"}}");
    assert_eq!(
        refusal("decoder.json"),
        format!(
            "`{}` has a `decoder` of a kind that is not supported (byte-level, and Llama's with byte fallback, are): \
             {{\"type\":\"WordPiece\",\"prefix\":\"##\"}}",
            shown("decoder.json")
        )
    );

    write("tokenizer.model", &ModelFile::whole().bytes());
    let config = |bytes: &[u8]| {
        write("tokenizer_config.json", bytes);
        refusal("tokenizer.model")
    };
    let file = shown("tokenizer_config.json");
    assert_eq!(
        config(b"{\"legacy\": \"no\"}"),
        format!(
            "`{file}` is not a tokenizer configuration: invalid type: string \"no\", expected a boolean at line 1 column 15"
        )
    );
    assert_eq!(
        config(b"{\"eos_token\": \"<|im_end|>\"}"),
        format!(
            "`{file}` calls its `eos_token` `<|im_end|>`, the tokenizer beside it `</s>`; take both files from one model"
        )
    );
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens/tokenizers/byte_level.json");
    std::fs::copy(golden, in_dir("tokenizer.json")).unwrap();
    assert_eq!(
        refusal("tokenizer.json"),
        format!("`{file}` names `<|im_end|>` as its `eos_token`, which the tokenizer beside it does not know")
    );

    let huge = std::fs::File::create(in_dir("huge.model")).unwrap();
    huge.set_len((64 << 20) + 1).unwrap();
    let expected = format!("`{}` is longer than 64 MiB and therefore no tokenizer", shown("huge.model"));
    std::fs::remove_file(in_dir("tokenizer_config.json")).unwrap();
    assert_eq!(refusal("huge.model"), expected);
}
