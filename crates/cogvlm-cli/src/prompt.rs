//! From what a user gives to what the model reads.

use std::io::Read;
use std::path::{Path, PathBuf};

use cogvlm_core::prompt::Turn;
use cogvlm_core::tokens::{TokenLayout, TokenType, position_ids};
use cogvlm_core::{ModelSpec, Template};
use cogvlm_input::Tokenizer;
use cogvlm_pipeline::Image;

use crate::error::{CliError, CliResult};

/// Reads and prepares the image at `path` for `spec`'s model.
pub(crate) fn read_image(path: &Path, spec: &ModelSpec) -> CliResult<Image> {
    let image = cogvlm_input::image::load_image(path)?;
    let pixels = cogvlm_input::image::preprocess(&image, spec.vision.image_size);
    Ok(Image { pixels: pixels.into() })
}

/// Opens the tokenizer given, or the one next to the model.
pub(crate) fn open_tokenizer(given: Option<&PathBuf>, model: &str) -> CliResult<Tokenizer> {
    if let Some(path) = given {
        return Ok(Tokenizer::open(path)?);
    }
    let dir = Path::new(model);
    if !dir.is_dir() {
        return Err(CliError::new(format!("`{model}` has no tokenizer"))
            .hint("give `--tokenizer FILE`, or token ids with `--input-ids FILE.json`"));
    }
    Ok(Tokenizer::open(dir)?)
}

/// Reads a JSON list of `[question, answer]` pairs.
pub(crate) fn read_history(path: &Path) -> CliResult<Vec<Turn>> {
    let pairs: Vec<(String, String)> = read_json(path, "a list of [question, answer] pairs")?;
    Ok(pairs.into_iter().map(|(question, answer)| Turn { question, answer }).collect())
}

/// Most bytes of a file that a user writes: prompts, histories, device maps.
const MAX_TEXT_BYTES: u64 = 64 << 20;

/// Reads a text file of a sensible size: endless device files end as an error.
pub(crate) fn read_text(path: &Path) -> CliResult<String> {
    let failed = |error: &dyn std::fmt::Display| CliError::new(format!("cannot read `{}`: {error}", path.display()));
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(|error| failed(&error))?;
    file.take(MAX_TEXT_BYTES + 1).read_to_end(&mut bytes).map_err(|error| failed(&error))?;
    if bytes.len() as u64 > MAX_TEXT_BYTES {
        return Err(failed(&format!("it is longer than {} MiB", MAX_TEXT_BYTES >> 20)));
    }
    String::from_utf8(bytes).map_err(|error| failed(&format!("it is not UTF-8: {}", error.utf8_error())))
}

/// Reads a JSON file of the form that `wanted` describes.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path, wanted: &str) -> CliResult<T> {
    let text = read_text(path)?;
    serde_json::from_str(&text).map_err(|error| CliError::new(format!("`{}` is not {wanted}: {error}", path.display())))
}

/// Tokens of a prompt.
pub(crate) fn layout_of_text(
    spec: &ModelSpec, tokenizer: &Tokenizer, template: Template, query: &str, history: &[Turn], has_image: bool,
) -> CliResult<(String, TokenLayout)> {
    if tokenizer.vocab_size() > spec.vocab_size {
        return Err(CliError::new(format!(
            "the tokenizer has {} pieces, the model's vocabulary {}: they do not belong together",
            tokenizer.vocab_size(),
            spec.vocab_size
        )));
    }
    let prompt = template.render(query, history);
    let ids = tokenizer.encode(&prompt)?;
    Ok((prompt, TokenLayout::new(spec, has_image, &ids)))
}

/// Tokens from a file of ids: the whole input where it begins with BOS, else the text.
pub(crate) fn layout_of_ids(spec: &ModelSpec, path: &Path, has_image: bool) -> CliResult<TokenLayout> {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum Ids {
        List(Vec<u32>),
        Object { input_ids: Vec<u32> },
    }
    let ids = match read_json(path, "a JSON list of token ids, nor an object with `input_ids`")? {
        Ids::List(ids) | Ids::Object { input_ids: ids } => ids,
    };
    if let Some(id) = ids.iter().find(|id| **id as usize >= spec.vocab_size) {
        return Err(CliError::new(format!(
            "`{}`: token id {id} is outside the model's vocabulary of {}",
            path.display(),
            spec.vocab_size
        )));
    }
    if ids.first() != Some(&spec.bos_token_id) {
        return Ok(TokenLayout::new(spec, has_image, &ids));
    }
    let num_vision_tokens = if has_image { spec.num_vision_tokens() } else { 0 };
    let placeholders = ids.iter().skip(1).take(num_vision_tokens).filter(|id| **id == spec.pad_token_id).count();
    if placeholders < num_vision_tokens {
        return Err(CliError::new(format!(
            "`{}` begins with BOS, so it is the whole input, but BOS is not followed by the {num_vision_tokens} placeholders ({}) of the image",
            path.display(),
            spec.pad_token_id
        ))
        .hint("leave BOS out, and BOS and the image's tokens are put before the ids"));
    }
    let mut token_types = vec![TokenType::Language; ids.len()];
    token_types[1..=num_vision_tokens].fill(TokenType::Vision);
    let position_ids = position_ids(&token_types);
    Ok(TokenLayout { input_ids: ids, token_types, position_ids })
}
