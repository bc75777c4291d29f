//! Pictures against the reference's answers: pixels after decoding, after resizing and after normalising.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cogvlm_input::image::{Rgb8Image, decode_image, load_image, preprocess};
use serde::Deserialize;
use sha2::{Digest, Sha256};

fn goldens() -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens")).to_owned()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The 8-bit picture behind normalised pixels, `[size, size, 3]`.
fn denormalised(planes: &[f32]) -> Vec<u8> {
    let (mean, std) = ([0.481_454_66, 0.457_827_5, 0.408_210_73], [0.268_629_54, 0.261_302_6, 0.275_777_1]);
    let num_pixels = planes.len() / 3;
    let level =
        |index: usize, channel: usize| (planes[channel * num_pixels + index] * std[channel] + mean[channel]) * 255.0;
    (0..num_pixels).flat_map(|index| [0, 1, 2].map(|channel| level(index, channel).round() as u8)).collect()
}

/// Greatest and mean difference of two pictures of one size, in levels of 255.
fn difference(a: &Rgb8Image, b: &Rgb8Image) -> (u8, f64) {
    assert_eq!((a.width(), a.height()), (b.width(), b.height()));
    let differences: Vec<u8> = a.pixels().iter().zip(b.pixels()).map(|(a, b)| a.abs_diff(*b)).collect();
    let sum: f64 = differences.iter().copied().map(f64::from).sum();
    (differences.iter().copied().max().unwrap_or(0), sum / differences.len() as f64)
}

#[derive(Deserialize)]
struct ModelCase {
    image: Option<GoldenImage>,
}

#[derive(Deserialize)]
struct GoldenImage {
    file: String,
    decoded_file: Option<String>,
    width: usize,
    height: usize,
    rgb_sha256: String,
    resized_u8_sha256: String,
    pixels: GoldenPixels,
}

#[derive(Deserialize)]
struct GoldenPixels {
    shape: [usize; 3],
    sha256: String,
    channel_mean: [f64; 3],
    sample_index: Vec<usize>,
    sample_value: Vec<f32>,
}

#[test]
fn model_cases_agree_to_the_bit() {
    let mut num_images = 0;
    for set in ["tiny", "small"] {
        for entry in std::fs::read_dir(goldens().join(set)).unwrap() {
            let file = entry.unwrap().path();
            if file.extension().is_none_or(|extension| extension != "json") || file.ends_with("batch.json") {
                continue;
            }
            let case: ModelCase = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
            if let Some(golden) = case.image {
                check_model_case(&golden, file.parent().expect("a file has a parent"));
                num_images += 1;
            }
        }
    }
    assert_eq!(num_images, 16);
}

fn check_model_case(golden: &GoldenImage, dir: &Path) {
    let name = &golden.file;
    let given = load_image(&dir.join(name)).unwrap();
    let image = match &golden.decoded_file {
        None => given,
        Some(decoded) => {
            let decoded = load_image(&dir.join(decoded)).unwrap();
            // Decoders of 4:2:0 JPEG filter the chroma up in ways of their own, which differ by up to 4 levels.
            let (max, mean) = difference(&given, &decoded);
            assert!(max <= 4 && mean < 0.3, "{name}: max {max}, mean {mean}");
            decoded
        }
    };
    assert_eq!((image.width(), image.height()), (golden.width, golden.height), "{name}");
    assert_eq!(sha256(image.pixels()), golden.rgb_sha256, "{name}");

    let pixels = preprocess(&image, golden.pixels.shape[1]);
    assert_eq!(pixels.len(), golden.pixels.shape.iter().product::<usize>(), "{name}");
    assert_eq!(sha256(&denormalised(&pixels)), golden.resized_u8_sha256, "{name}");
    for (&index, &value) in golden.pixels.sample_index.iter().zip(&golden.pixels.sample_value) {
        assert_eq!(pixels[index], value, "{name}: sample {index}");
    }
    for (plane, mean) in pixels.chunks(pixels.len() / 3).zip(golden.pixels.channel_mean) {
        let ours = plane.iter().copied().map(f64::from).sum::<f64>() / plane.len() as f64;
        assert!((ours - mean).abs() < 1e-5, "{name}: mean {ours}, not {mean}");
    }
    let bytes: Vec<u8> = pixels.iter().flat_map(|value| value.to_le_bytes()).collect();
    assert_eq!(sha256(&bytes), golden.pixels.sha256, "{name}");
}

#[derive(Deserialize)]
struct Fixture {
    file: String,
    mode: String,
    width: usize,
    height: usize,
    rgb_sha256: String,
    decoded_file: Option<String>,
    resized: BTreeMap<usize, String>,
}

impl Fixture {
    fn all() -> Vec<Self> {
        let manifest = std::fs::read(goldens().join("images/manifest.json")).unwrap();
        serde_json::from_slice(&manifest).unwrap()
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(goldens().join("images").join(&self.file)).unwrap()
    }

    /// Greatest and mean difference from Pillow that this file may have.
    fn tolerance(&self) -> (u8, f64) {
        match self.file.as_str() {
            // Chroma of half the resolution is filtered up by each decoder in its own way, and these pictures are
            // gaudier than a photograph; progressive.jpg and rotated_by_exif.jpg are of this kind too.
            "quarter_chroma.jpg" | "progressive.jpg" | "rotated_by_exif.jpg" => (4, 0.4),
            "half_chroma.jpg" => (3, 0.2),
            // The inverse transform and the colour matrix may each be off by one rounding.
            file if file.ends_with(".jpg") || file == "jpeg.tif" => (2, 0.02),
            // Five bits to eight, and ink to light: Pillow truncates, the decoder rounds.
            "16bit.bmp" | "cmyk.tif" => (1, 0.5),
            _ => (0, 0.0),
        }
    }
}

#[test]
fn every_kind_of_picture_is_decoded_as_pillow_does() {
    for fixture in Fixture::all() {
        let Fixture { file, width, height, .. } = &fixture;
        if ["grey_alpha.tif", "palette.tif", "float.tif", "grey_16bit.png", "grey_16bit.tif"].contains(&file.as_str()) {
            continue; // Below.
        }
        let image = decode_image(&fixture.bytes()).unwrap_or_else(|error| panic!("{file}: {error}"));
        assert_eq!((image.width(), image.height()), (*width, *height), "{file}");
        let (max, mean) = fixture.tolerance();
        if max == 0 {
            assert_eq!(sha256(image.pixels()), fixture.rgb_sha256, "{file} ({})", fixture.mode);
            continue;
        }
        let pillow = fixture.decoded_file.as_ref().expect("kept where decoders differ");
        let pillow = load_image(&goldens().join("images").join(pillow)).unwrap();
        assert_eq!(sha256(pillow.pixels()), fixture.rgb_sha256, "{file}");
        let found = difference(&image, &pillow);
        assert!(found.0 <= max && found.1 <= mean, "{file}: {found:?}");
        // The bound can say no: colours swapped, or all one level brighter than it allows.
        let changed = |change: &dyn Fn([u8; 3]) -> [u8; 3]| {
            let pixels = image.pixels().as_chunks::<3>().0.iter().flat_map(|&pixel| change(pixel)).collect();
            let found = difference(&Rgb8Image::new(*width, *height, pixels).unwrap(), &pillow);
            found.0 > max || found.1 > mean
        };
        assert!(changed(&|[_, g, b]| [b, g, b]) || file == "grey.jpg", "{file}");
        assert!(changed(&|pixel| pixel.map(|sample| sample.saturating_add(max))), "{file}");
    }
}

#[test]
fn sixteen_bit_grey_keeps_its_high_byte() {
    let of = |file: &str| load_image(&goldens().join("images").join(file)).unwrap();
    // The red samples of this picture, whose low bytes differ.
    let rgb = of("rgb_16bit.png");
    let reds: Vec<u8> = rgb.pixels().as_chunks::<3>().0.iter().flat_map(|pixel| [pixel[0]; 3]).collect();
    assert_eq!(of("grey_16bit.png").pixels(), reds);
    assert_eq!(of("grey_16bit.tif").pixels(), reds);
}

#[test]
fn what_could_not_be_right_is_refused() {
    let refusal = |file: &str| load_image(&goldens().join("images").join(file)).unwrap_err().to_string();
    for (file, feature) in [
        ("grey_alpha.tif", "color type `Unknown(16)`"),
        ("palette.tif", "Photometric interpretation RGBPalette"),
        ("float.tif", "color type `Unknown(32)`"),
    ] {
        let message = refusal(file);
        assert!(message.contains(&format!("{file}` is a TIFF of a kind that is not supported: ")), "{message}");
        assert!(message.contains(feature) && message.ends_with("; convert it to 8-bit RGB"), "{message}");
    }
}

#[test]
fn resizing_is_pillows() {
    for fixture in Fixture::all() {
        let exact = if fixture.tolerance().0 > 0 { fixture.decoded_file.as_ref() } else { Some(&fixture.file) };
        let Some(Ok(image)) = exact.map(|file| load_image(&goldens().join("images").join(file))) else { continue };
        if sha256(image.pixels()) != fixture.rgb_sha256 {
            assert!(fixture.file.starts_with("grey_16bit"), "{}", fixture.file);
            continue;
        }
        for (size, expected) in &fixture.resized {
            let resized = denormalised(&preprocess(&image, *size));
            assert_eq!(&sha256(&resized), expected, "{} to {size}", fixture.file);
        }
    }
}

/// Every prefix of a file is refused, or nothing that the picture needs was cut off.
#[test]
fn a_file_that_is_cut_short_is_never_half_a_picture() {
    for fixture in Fixture::all() {
        let bytes = fixture.bytes();
        let Ok(whole) = decode_image(&bytes) else { continue };
        let mut num_refused = 0;
        for length in 0..bytes.len() {
            match decode_image(&bytes[..length]) {
                Ok(image) => assert!(image == whole, "{}: {length} of {} bytes", fixture.file, bytes.len()),
                Err(_) => num_refused += 1,
            }
        }
        // After the pixels come end markers, of an animation the other frames, and of a TIFF at times its tables.
        let rest = if fixture.file.starts_with("animated") { bytes.len() * 2 / 3 } else { 40 };
        assert!(num_refused + rest > bytes.len(), "{}: {num_refused} of {} refused", fixture.file, bytes.len());
    }
}

#[test]
fn damaged_files_never_panic() {
    let mut state = 1_u32;
    let mut random = |below: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as usize % below
    };
    for fixture in Fixture::all() {
        let bytes = fixture.bytes();
        for _ in 0..300 {
            let mut damaged = bytes.clone();
            for _ in 0..1 + random(4) {
                // Half of the damage goes to the headers.
                let place = if random(2) == 0 { random(bytes.len()) } else { random(bytes.len().min(100)) };
                damaged[place] = random(256) as u8;
            }
            drop(decode_image(&damaged));
        }
    }
}
