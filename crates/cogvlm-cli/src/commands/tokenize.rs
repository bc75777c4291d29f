//! `tokenize`: lines of JSON in, lines of JSON out.

use cogvlm_input::Tokenizer;

use crate::args::TokenizeArgs;
use crate::error::{CliError, CliResult};
use crate::output::print_line;
use crate::stdin::StdinLines;

pub(crate) fn run(args: &TokenizeArgs) -> CliResult {
    let path = args.tokenizer.tokenizer.as_ref().ok_or_else(|| {
        CliError::usage("`tokenize` needs `--tokenizer FILE`")
            .hint("a SentencePiece `tokenizer.model` or a `tokenizer.json`")
    })?;
    let tokenizer = Tokenizer::open(path)?;
    for (index, line) in StdinLines::lock().enumerate() {
        let at = |what: &dyn std::fmt::Display| CliError::new(format!("line {} of stdin: {what}", index + 1));
        let line = line.map_err(|error| at(&error))?;
        let line = String::from_utf8(line).map_err(|error| at(&error))?;
        if line.trim().is_empty() {
            continue;
        }
        let answer = if args.decode {
            let ids: Vec<u32> =
                serde_json::from_str(&line).map_err(|error| at(&format!("not a JSON list of ids: {error}")))?;
            serde_json::to_string(&tokenizer.decode(&ids, args.skip_special).map_err(|error| at(&error))?)
        } else {
            let text: String =
                serde_json::from_str(&line).map_err(|error| at(&format!("not a JSON string: {error}")))?;
            let ids = if args.plain { tokenizer.encode_plain(&text) } else { tokenizer.encode(&text) };
            serde_json::to_string(&ids.map_err(|error| at(&error))?)
        };
        let answer = answer.map_err(|error| at(&error))?;
        // Line by line: whoever writes the next line may wait for this one.
        print_line(&answer)?;
    }
    Ok(())
}
