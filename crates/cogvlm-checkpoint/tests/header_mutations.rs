//! Thousands of damaged headers: the parser never panics, and whatever it accepts, the reference implementation of the
//! format accepts too, and reads the same.

use cogvlm_checkpoint::{HeaderError, parse_header};
use safetensors::SafeTensors;

/// SplitMix64: the same mutations in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

fn file(header: &[u8], data_bytes: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, &vec![7; data_bytes]].concat()
}

/// Three tensors, one of them empty.
const VALID: &str = r#"{"__metadata__":{"format":"pt"},"a.weight":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},"b":{"dtype":"F32","shape":[],"data_offsets":[12,16]},"c":{"dtype":"F16","shape":[0,9],"data_offsets":[16,16]},"d":{"shape":[4],"data_offsets":[16,24],"dtype":"F16"}}"#;
const DATA_BYTES: usize = 24;

/// What JSON and this format are made of: inserting it gets further than random bytes.
const PARTS: [&str; 20] = [
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\"",
    "\\u0000",
    "null",
    "-1",
    "1e3",
    "18446744073709551615",
    "[0,0]",
    "\"dtype\":\"F32\",",
    "\"shape\":[1],",
    "\"data_offsets\":[0,2],",
    "\"x\":{\"dtype\":\"BF16\",\"shape\":[0],\"data_offsets\":[0,0]},",
    "\"__metadata__\":{},",
    " ",
    "\u{e9}",
];

fn mutate(random: &mut Random, header: &mut Vec<u8>) {
    let at = random.below(header.len().max(1)).min(header.len().saturating_sub(1));
    match random.below(8) {
        _ if header.is_empty() => header.extend(b"{}"),
        0 => header[at] ^= 1 << random.below(8),
        1 => header[at] = random.next() as u8,
        2 => drop(header.remove(at)),
        3 => {
            let end = (at + random.below(12)).min(header.len());
            drop(header.drain(at..end));
        }
        4 => drop(header.splice(at..at, PARTS[random.below(PARTS.len())].bytes())),
        // Offsets that fit their tensor, and not their neighbours.
        5 => slide(random, header),
        // A digit for a digit: offsets and shapes that parse and do not fit.
        6 => {
            let digits: Vec<usize> = (0..header.len()).filter(|&at| header[at].is_ascii_digit()).collect();
            if !digits.is_empty() {
                header[digits[random.below(digits.len())]] = b'0' + random.below(10) as u8;
            }
        }
        _ => {
            let (from, len) = (random.below(header.len()), random.below(80));
            let copy = header[from..(from + len).min(header.len())].to_vec();
            drop(header.splice(at..at, copy));
        }
    }
}

/// Moves one tensor by a few bytes, where the header still is JSON.
fn slide(random: &mut Random, header: &mut Vec<u8>) {
    let Ok(mut json) = serde_json::from_slice::<serde_json::Value>(header) else { return };
    let name = ["a.weight", "b", "c", "d"][random.below(4)];
    let Some(offsets) = json.pointer_mut(&format!("/{name}/data_offsets")) else { return };
    let by = random.below(9) as u64;
    if let [Some(begin), Some(end)] = [0, 1].map(|index| offsets.get(index).and_then(serde_json::Value::as_u64)) {
        *offsets =
            serde_json::json!([begin.saturating_add(by).saturating_sub(4), end.saturating_add(by).saturating_sub(4)]);
        *header = json.to_string().into_bytes();
    }
}

/// Checks one file against the reference implementation; returns whether it was accepted.
fn check(bytes: &[u8]) -> Result<(), HeaderError> {
    let header = parse_header(bytes, bytes.len() as u64)?;
    let reference = SafeTensors::deserialize(bytes)
        .unwrap_or_else(|error| panic!("accepted {:?}: {error}", String::from_utf8_lossy(bytes)));
    assert_eq!(header.tensors.len(), reference.len());
    for tensor in &header.tensors {
        let view = reference.tensor(&tensor.name).unwrap();
        assert_eq!(view.shape(), tensor.shape);
        assert_eq!(format!("{:?}", view.dtype()), tensor.dtype.safetensors_name());
        assert_eq!(view.data(), &bytes[tensor.file_range.start as usize..tensor.file_range.end as usize]);
    }
    Ok(())
}

#[test]
fn mutated_headers_are_refused_or_read_right() {
    let mut random = Random(1);
    let (mut accepted, mut refused) = (0, std::collections::BTreeMap::new());
    for _ in 0..30_000 {
        let mut header = VALID.as_bytes().to_vec();
        for _ in 0..1 + random.below(3) {
            mutate(&mut random, &mut header);
        }
        match check(&file(&header, DATA_BYTES)) {
            Ok(()) => accepted += 1,
            Err(error) => *refused.entry(variant(&error)).or_insert(0) += 1,
        }
    }
    // The mutations reach past the JSON parser, and some headers stay valid.
    assert!(accepted > 100, "{accepted} accepted");
    let expected = ["DType", "Duplicate", "Gap", "Malformed", "NotUtf8", "Overlap", "Size"];
    let kinds: Vec<_> = refused.keys().map(String::as_str).filter(|kind| expected.contains(kind)).collect();
    assert_eq!(kinds, expected, "{refused:?}");
}

fn variant(error: &HeaderError) -> String {
    format!("{error:?}").split([' ', '(']).next().unwrap_or_default().to_owned()
}

#[test]
fn mutated_files_are_refused_or_read_right() {
    let mut random = Random(2);
    let valid = file(VALID.as_bytes(), DATA_BYTES);
    check(&valid).unwrap();
    let mut accepted = 0;
    for _ in 0..30_000 {
        let mut bytes = valid.clone();
        match random.below(4) {
            // The length field.
            0 => bytes[random.below(8)] = random.next() as u8,
            1 => bytes.truncate(random.below(bytes.len() + 1)),
            2 => bytes.extend((0..random.below(40)).map(|_| 0)),
            _ => (0..8).for_each(|_| {
                let at = random.below(bytes.len());
                bytes[at] = random.next() as u8;
            }),
        }
        accepted += usize::from(check(&bytes).is_ok());
    }
    assert!((1..15_000).contains(&accepted), "{accepted} accepted");
}

#[test]
fn noise_is_refused() {
    let mut random = Random(3);
    for _ in 0..10_000 {
        let len = random.below(200);
        let noise: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
        assert!(parse_header(&noise, len as u64).is_err());
        assert!(parse_header(&noise, random.next()).is_err());
        assert!(parse_header(&file(&noise, 0), 8 + len as u64).is_err());
    }
}

#[test]
fn a_valid_header_needs_its_whole_file() {
    let bytes = file(VALID.as_bytes(), DATA_BYTES);
    let header = parse_header(&bytes[..8 + VALID.len()], bytes.len() as u64).unwrap();
    assert_eq!(header.data_start, 8 + VALID.len() as u64);
    assert_eq!(header.metadata, [("format".to_owned(), "pt".to_owned())]);
    let names: Vec<_> = header.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    assert_eq!(names, ["a.weight", "b", "c", "d"]);
    for len in (0..8 + VALID.len()).chain([bytes.len() + 1]) {
        assert!(parse_header(&bytes[..len.min(bytes.len())], len as u64).is_err(), "{len}");
    }
    assert!(matches!(parse_header(&bytes, u64::MAX), Err(HeaderError::Trailing { .. })));
}
