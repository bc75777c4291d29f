//! Files that are no pictures, or pictures that must not be decoded: one message each.

use std::path::Path;

use cogvlm_input::image::{DecodeLimits, Rgb8Image, decode_image, decode_image_within, load_image, load_image_within};

fn golden(name: &str) -> Vec<u8> {
    let dir = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens/images"));
    std::fs::read(dir.join(name)).expect("the golden is in the repository")
}

fn message(bytes: &[u8]) -> String {
    decode_image(bytes).expect_err("it must be refused").to_string()
}

/// `bytes` with `replacement` at the first place where `before` stands, right after it.
fn patched(name: &str, before: &[u8], replacement: &[u8]) -> Vec<u8> {
    let mut bytes = golden(name);
    let at = bytes.windows(before.len()).position(|window| window == before).expect("it is there") + before.len();
    bytes[at..at + replacement.len()].copy_from_slice(replacement);
    bytes
}

/// A PNG that is all header, with a checksum that holds.
fn png_of(width: u32, height: u32) -> Vec<u8> {
    let mut header = b"IHDR".to_vec();
    header.extend(width.to_be_bytes().into_iter().chain(height.to_be_bytes()).chain([8, 2, 0, 0, 0]));
    let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\x0d".to_vec();
    png.extend(&header);
    png.extend(crc32(&header).to_be_bytes());
    png.extend(b"\0\0\0\0IDAT");
    png.extend(crc32(b"IDAT").to_be_bytes());
    png
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 })
    })
}

#[test]
fn what_is_no_picture_is_refused() {
    for bytes in
        [&b""[..], b"\0", b"GIF", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"\0\0\0\x20ftypavif"]
    {
        assert_eq!(message(bytes), "is neither PNG, JPEG, WebP, GIF, BMP nor TIFF");
    }
}

#[test]
fn cut_or_damaged_files_are_refused() {
    let damaged = |bytes: &[u8], format: &str, why: &str| {
        assert_eq!(message(bytes), format!("is a {format} that is cut short or damaged: {why}"));
    };
    damaged(&golden("rgb.png")[..500], "PNG", "unexpected end of file");
    damaged(&golden("quarter_chroma.jpg")[..2050], "JPEG", "it has no end marker");
    damaged(&golden("lossy.webp")[..500], "WebP", "Format error decoding WebP: Corrupt bitstream");
    damaged(&golden("palette.gif")[..300], "GIF", "Unexpected End of File");
    damaged(&golden("rgb.bmp")[..1000], "BMP", "failed to fill whole buffer");
    damaged(&golden("rgb.tif")[..1000], "TIFF", "failed to fill whole buffer");

    let mut checksum = golden("rgb.png");
    checksum[30] ^= 1;
    damaged(
        &checksum,
        "PNG",
        "Format error decoding Png: CRC error: expected 0x4e87b0f9 have 0x4e86b0f9 while decoding \
         ChunkType { type: IHDR, critical: true, private: false, reserved: false, safecopy: false } chunk.",
    );
    damaged(b"\xff\xd8\xff\xd9", "JPEG", "\"Premature End of image\"");
    damaged(b"GIF87a\x05\0\x05\0\0\0\0;", "GIF", "Unexpected End of File");
    damaged(b"GIF87a\x05\0\x05\0\0\0\0;\0", "GIF", "it has no picture");
    let two_colours = patched("flat.gif", b"GIF87a", &[37, 0, 21, 0, 0x80]);
    damaged(&two_colours, "GIF", "unknown block type encountered");
    let mut colour_outside = golden("flat.gif");
    colour_outside.drain(13 + 3 * 8..13 + 3 * 32);
    colour_outside[10] = 0x82;
    damaged(&colour_outside, "GIF", "a colour outside its palette");
}

#[test]
fn pictures_without_pixels_are_refused() {
    let frame = patched("flat.gif", b"\x2c\0\0\0\0", &[0, 0, 0, 0]);
    assert_eq!(message(&frame), "is a GIF that is cut short or damaged: its first frame has no pixels");
    let mut both = frame;
    both[6..10].fill(0);
    assert_eq!(message(&both), "is 0 x 0 pixels: nothing to see");
    assert_eq!(
        message(&png_of(0, 5)),
        "is a PNG that is cut short or damaged: Format error decoding Png: Invalid image dimensions"
    );
    let jpeg = patched("full_chroma.jpg", b"\xff\xc0\0\x11\x08", &[0, 0, 0, 0]);
    assert_eq!(
        message(&jpeg),
        "is a JPEG that is cut short or damaged: Image width or height is set to zero, cannot continue"
    );
}

#[test]
fn bombs_are_refused_before_they_are_decoded() {
    assert_eq!(message(&png_of(60_000, 2)), "is 60000 x 2 pixels; at most 16384 a side are decoded");
    let message_of_library = "is a PNG that takes more than 536870912 bytes to decode, which is the limit";
    assert_eq!(message(&png_of(u32::MAX >> 1, 1)), message_of_library);
    assert_eq!(
        message(&png_of(16_000, 16_000)),
        "is 16000 x 16000 pixels, which take 1536000000 bytes to decode; the limit is 536870912"
    );
    let jpeg = patched("full_chroma.jpg", b"\xff\xc0\0\x11\x08", &[0xFF, 0xF0, 0xFF, 0xF0]);
    assert_eq!(message(&jpeg), "is 65520 x 65520 pixels; at most 16384 a side are decoded");
    let jpeg = patched("progressive.jpg", b"\xff\xc2\0\x11\x08", &[0x2E, 0xE0, 0x2E, 0xE0]);
    assert_eq!(
        message(&jpeg),
        "is 12000 x 12000 pixels, which take 1296000000 bytes to decode; the limit is 536870912"
    );
    let gif = patched("flat.gif", b"GIF87a", &[0xFF, 0xFF, 0xFF, 0xFF]);
    assert_eq!(message(&gif), "is 65535 x 65535 pixels; at most 16384 a side are decoded");
    let bmp = patched("rgb.bmp", b"\x28\0\0\0", &[0xFF, 0xFF, 0, 0, 0xFF, 0x0F, 0, 0]);
    assert_eq!(message(&bmp), "is 65535 x 4095 pixels; at most 16384 a side are decoded");
    let tiff = patched("big_endian.tif", b"\x01\0\0\x03\0\0\0\x01", &[0xFF, 0xFF]);
    assert_eq!(message(&tiff), "is 65535 x 21 pixels; at most 16384 a side are decoded");
}

#[test]
fn limits_are_the_callers() {
    let rgb = golden("rgb.png");
    let limits = DecodeLimits { max_side_px: 36, ..DecodeLimits::default() };
    let error = decode_image_within(&rgb, &limits).unwrap_err();
    assert_eq!(error.to_string(), "is 37 x 21 pixels; at most 36 a side are decoded");
    let limits = DecodeLimits { max_side_px: 37, max_alloc_bytes: 2 * 37 * 21 * 3, ..DecodeLimits::default() };
    assert!(decode_image_within(&rgb, &limits).is_ok());
    let limits = DecodeLimits { max_alloc_bytes: limits.max_alloc_bytes - 1, ..limits };
    let error = decode_image_within(&rgb, &limits).unwrap_err();
    assert_eq!(error.to_string(), "is 37 x 21 pixels, which take 4662 bytes to decode; the limit is 4661");
}

#[test]
fn files_are_named_in_messages() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("cat.png");
    let shown = file.display().to_string();
    let error = load_image(&file).unwrap_err().to_string();
    assert_eq!(error, format!("cannot read `{shown}`: No such file or directory (os error 2)"));
    std::fs::write(&file, "meow").unwrap();
    let error = load_image(&file).unwrap_err().to_string();
    assert_eq!(error, format!("`{shown}` is neither PNG, JPEG, WebP, GIF, BMP nor TIFF"));
    let limits = DecodeLimits { max_file_bytes: 3, ..DecodeLimits::default() };
    let error = load_image_within(&file, &limits).unwrap_err().to_string();
    assert_eq!(error, format!("`{shown}` is longer than 3 bytes"));
    // The content tells the format, not the name.
    std::fs::write(&file, golden("full_chroma.jpg")).unwrap();
    assert_eq!(load_image(&file).unwrap().width(), 67);
}

#[test]
fn pixels_of_the_wrong_number_make_no_picture() {
    assert!(Rgb8Image::new(2, 1, vec![0; 6]).is_some());
    assert!(Rgb8Image::new(2, 1, vec![0; 5]).is_none());
    assert!(Rgb8Image::new(0, 1, vec![]).is_none());
    assert!(Rgb8Image::new(usize::MAX, usize::MAX, vec![0; 3]).is_none());
}
