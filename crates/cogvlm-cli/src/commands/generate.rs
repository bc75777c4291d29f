//! `generate`: one answer.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cogvlm_core::prompt::Turn;
use cogvlm_core::tokens::TokenLayout;
use cogvlm_core::{ModelSpec, Template, TokenType};
use cogvlm_input::Tokenizer;
use cogvlm_pipeline::{FinishReason, Image, Request};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use crate::answer::{self, Answer};
use crate::args::GenerateArgs;
use crate::cluster::ways_json;
use crate::error::{CliError, CliResult};
use crate::output::{OutputFile, print, print_line};
use crate::prompt::{layout_of_ids, layout_of_text, open_tokenizer, read_history, read_image, read_json, read_text};
use crate::session::{Session, open_source};

/// What will be asked of the model.
struct Question {
    prompt: Option<String>,
    layout: TokenLayout,
    image: Option<Image>,
}

/// A line of `--prompts`.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct PromptLine {
    prompt: String,
    #[serde(default)]
    image: Option<PathBuf>,
    #[serde(default)]
    template: Option<Template>,
    #[serde(default)]
    history: Vec<(String, String)>,
}

pub(crate) fn run(args: &GenerateArgs) -> CliResult {
    let params = answer::sampling_params(&args.sampling)?;
    let forced: Option<Vec<u32>> =
        args.force_ids.as_deref().map(|path| read_json(path, "a JSON list of token ids")).transpose()?;
    if forced.as_ref().is_some_and(Vec::is_empty) {
        return Err(CliError::new("`--force-ids`: the list is empty; at least one token has to be fed"));
    }
    // Everything that can be wrong with files and questions is found before the model is loaded.
    let outputs = Outputs::create(args)?;
    let source = open_source(&args.model.model)?;
    let tokenizer = find_tokenizer(args)?;
    let questions = read_questions(args, source.spec(), tokenizer.as_ref())?;
    let Some(mut session) = Session::open(&args.model, source.clone(), false)? else { return Ok(()) };
    let context_len = session.plan.limits.context_len;
    let request = |question: &Question| Request {
        layout: question.layout.clone(),
        image: question.image.clone(),
        params: params.clone(),
        max_new_tokens: match &forced {
            Some(forced) => forced.len(),
            // At least one: the last row's logits choose a token even where nothing can follow it.
            None => args
                .sampling
                .max_new_tokens
                .unwrap_or(context_len.saturating_sub(question.layout.input_ids.len()).max(1)),
        },
        ignore_eos: args.ignore_eos,
        forced: forced.clone(),
        want_logits: args.logits_out.is_some(),
        capture: args.hidden_states_out.is_some(),
        prefix: None,
        keep_cache: false,
    };
    let requests = questions.iter().map(request).collect();
    let mut stream = |_, text: &str| if args.json { Ok(()) } else { print(text) };
    let answers = answer::run_all(&mut session.engine, requests, tokenizer.as_ref(), &args.sampling.stop, &mut stream)?;
    if let [answer] = &answers[..] {
        outputs.write(session.engine.spec(), answer)?;
    }
    if !args.json {
        return print_line("");
    }
    for (question, answer) in questions.iter().zip(&answers) {
        print_line(&report(&session, question, answer).to_string())?;
    }
    Ok(())
}

/// The tokenizer: needed for text, welcome for ids.
fn find_tokenizer(args: &GenerateArgs) -> CliResult<Option<Tokenizer>> {
    let given = args.tokenizer.tokenizer.as_ref();
    let found = open_tokenizer(given, &args.model.model);
    if args.input_ids.is_some() && given.is_none() { Ok(found.ok()) } else { found.map(Some) }
}

fn read_questions(args: &GenerateArgs, spec: &ModelSpec, tokenizer: Option<&Tokenizer>) -> CliResult<Vec<Question>> {
    let read_image = |path: Option<&Path>| path.map(|path| read_image(path, spec)).transpose();
    if let Some(path) = &args.input_ids {
        let image = read_image(args.image.as_deref())?;
        let layout = layout_of_ids(spec, path, image.is_some())?;
        return Ok(vec![Question { prompt: None, layout, image }]);
    }
    let ask =
        |query: &str, template: Option<Template>, history: &[Turn], image: Option<&Path>| -> CliResult<Question> {
            let image = read_image(image)?;
            let tokenizer = tokenizer.expect("`find_tokenizer` fails where text has none");
            let template = template.or(args.template.map(Into::into)).unwrap_or(spec.template);
            let (prompt, layout) = layout_of_text(spec, tokenizer, template, query, history, image.is_some())?;
            Ok(Question { prompt: Some(prompt), layout, image })
        };
    let Some(path) = &args.prompts else {
        let history = args.history.as_deref().map(read_history).transpose()?.unwrap_or_default();
        return Ok(vec![ask(args.prompt.as_deref().unwrap_or_default(), None, &history, args.image.as_deref())?]);
    };
    let text = read_text(path)?;
    let mut questions = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let at = |error: &dyn std::fmt::Display| {
            CliError::new(format!("line {} of `{}`: {error}", index + 1, path.display()))
        };
        let line: PromptLine = serde_json::from_str(line).map_err(|error| at(&error))?;
        let history: Vec<Turn> = line.history.into_iter().map(|(question, answer)| Turn { question, answer }).collect();
        // Images are named relative to the file that names them.
        let image = line.image.map(|image| path.parent().unwrap_or(Path::new("")).join(image));
        questions
            .push(ask(&line.prompt, line.template, &history, image.as_deref()).map_err(|error| at(&error.message()))?);
    }
    if questions.is_empty() {
        return Err(CliError::new(format!("`{}` holds no question", path.display())));
    }
    Ok(questions)
}

/// The files of `--logits-out` and `--hidden-states-out`.
struct Outputs {
    logits: Option<OutputFile>,
    hidden_states: Option<OutputFile>,
}

impl Outputs {
    fn create(args: &GenerateArgs) -> CliResult<Self> {
        if args.logits_out.is_some() && args.logits_out == args.hidden_states_out {
            return Err(CliError::usage("`--logits-out` and `--hidden-states-out` name the same file"));
        }
        let create = |path: &Option<PathBuf>| path.as_deref().map(OutputFile::create).transpose();
        Ok(Self { logits: create(&args.logits_out)?, hidden_states: create(&args.hidden_states_out)? })
    }

    fn write(self, spec: &ModelSpec, answer: &Answer) -> CliResult {
        if let Some(file) = self.logits {
            let values: Vec<f32> = answer.logits.concat();
            write_tensors(file, &[("logits", vec![answer.logits.len(), spec.vocab_size], &values)])?;
        }
        if let Some(file) = self.hidden_states {
            let taps = answer.captured.iter();
            let tensors: Vec<_> =
                taps.map(|tap| (tap.name.as_str(), tap.shape.to_vec(), tap.values.as_slice())).collect();
            write_tensors(file, &tensors)?;
        }
        Ok(())
    }
}

fn report(session: &Session, question: &Question, answer: &Answer) -> serde_json::Value {
    let Question { prompt, layout, .. } = question;
    let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
    let timings = &answer.timings;
    let steps = timings.num_decode_steps as f64;
    let per_token = (timings.num_decode_steps > 0).then(|| ms(timings.decode) / steps);
    let mut report = json!({
        "prompt": prompt,
        "input_ids": layout.input_ids,
        "token_type_ids": layout.token_types.iter().map(|kind| TokenType::id(*kind)).collect::<Vec<_>>(),
        "position_ids": layout.position_ids,
        "output_ids": answer.output_ids,
        "text": answer.text,
        "finish_reason": match answer.finish_reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        },
        "usage": {"prompt_tokens": layout.input_ids.len(), "completion_tokens": answer.output_ids.len()},
        "timings": {
            "load_ms": ms(session.load_time),
            "vision_ms": ms(timings.vision),
            "prefill_ms": ms(timings.prefill),
            "ttft_ms": ms(timings.first_token),
            "decode_ms_per_token": per_token,
            "decode_tokens_per_s": per_token.map(|ms| 1e3 / ms),
        },
        "memory": session.peak_memory(),
    });
    if !session.ways.is_empty() {
        report["transport"] = ways_json(&session.ways);
    }
    report
}

/// Writes f32 tensors as one safetensors file.
pub(crate) fn write_tensors(file: OutputFile, tensors: &[(&str, Vec<usize>, &[f32])]) -> CliResult {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(_, _, values)| values.iter().flat_map(|value| value.to_le_bytes()).collect()).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), bytes)| TensorView::new(Dtype::F32, shape.clone(), bytes).map(|view| (*name, view)));
    let views: HashMap<_, _> = views.collect::<Result<_, _>>()?;
    file.write(&safetensors::serialize(views, None)?)
}
