//! One answer: the step loop, stop strings, text as it comes.

use std::time::{Duration, Instant};

use cogvlm_backend::SamplingParams;
use cogvlm_input::{StreamDecoder, Tokenizer};
use cogvlm_model::Captured;
use cogvlm_pipeline::{
    CachedPrefix, Engine, Event, FinishReason, Request, RequestError, RequestId, StepKind, StepReport,
};

use crate::args::SamplingArgs;
use crate::error::{CliError, CliResult};
use crate::session::RankBackend;

/// A finished answer.
#[derive(Default)]
pub(crate) struct Answer {
    pub(crate) output_ids: Vec<u32>,
    /// Decoded text without special tokens, cut before a stop string; `None` without a tokenizer.
    pub(crate) text: Option<String>,
    pub(crate) finish_reason: FinishReason,
    pub(crate) logits: Vec<Vec<f32>>,
    pub(crate) captured: Vec<Captured>,
    pub(crate) timings: Timings,
    pub(crate) prefix: Option<CachedPrefix>,
}

/// Where the time of an answer went.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Timings {
    /// Vision tower and adapter.
    pub(crate) vision: Duration,
    /// The whole step that computed the prompt, vision included.
    pub(crate) prefill: Duration,
    /// From the request to the first token.
    pub(crate) first_token: Duration,
    /// All decode steps together.
    pub(crate) decode: Duration,
    /// How many there were.
    pub(crate) num_decode_steps: usize,
}

/// Checks sampling flags and turns them into parameters.
pub(crate) fn sampling_params(args: &SamplingArgs) -> CliResult<SamplingParams> {
    let refuse =
        |flag: &str, value: f32, range: &str| Err(CliError::usage(format!("`--{flag} {value}`: it must {range}")));
    if !(0.0..=100.0).contains(&args.temperature) {
        return refuse("temperature", args.temperature, "lie between 0 and 100");
    }
    if !(0.0..=1.0).contains(&args.top_p) {
        return refuse("top-p", args.top_p, "lie between 0 and 1");
    }
    if !(args.repetition_penalty > 0.0 && args.repetition_penalty <= 100.0) {
        return refuse("repetition-penalty", args.repetition_penalty, "be above 0 and at most 100");
    }
    if args.max_new_tokens == Some(0) {
        return Err(CliError::usage("`--max-new-tokens 0`: at least one token has to be asked for"));
    }
    if args.stop.iter().any(String::is_empty) {
        return Err(CliError::usage("`--stop` needs a text that is not empty"));
    }
    let SamplingArgs { temperature, top_k, top_p, repetition_penalty, seed, .. } = *args;
    Ok(SamplingParams { temperature, top_k, top_p, repetition_penalty, seed })
}

/// Runs `requests` to their ends, as many at once as the plan has room for; the answers come back in their order.
/// `print` gets the text of each piece by piece (or ids, without a tokenizer), with the request's index.
pub(crate) fn run_all(
    engine: &mut Engine<RankBackend>, requests: Vec<Request>, tokenizer: Option<&Tokenizer>, stop: &[String],
    print: &mut dyn FnMut(usize, &str) -> CliResult,
) -> CliResult<Vec<Answer>> {
    let start = Instant::now();
    let eos = engine.spec().eos_token_id;
    let mut collectors = Vec::new();
    for request in requests {
        let hidden_id = (!request.ignore_eos && request.forced.is_none()).then_some(eos);
        let id = engine.submit(request).map_err(refused)?;
        let text = tokenizer.map(|tokenizer| TextStream::new(tokenizer.stream_decoder(), stop));
        collectors.push(Collector { id, hidden_id, text, answer: Answer::default() });
    }
    while let Some(report) = engine.step()? {
        let StepReport { kind, elapsed, vision_time, events, captured, .. } = report;
        let mut captured = Some(captured);
        for event in events {
            let (Event::Token { request, .. } | Event::Finished { request, .. }) = &event;
            let Some(index) = collectors.iter().position(|collector| collector.id == *request) else { continue };
            let collector = &mut collectors[index];
            match event {
                Event::Token { id, logits, .. } => {
                    collector.answer.timings.count(kind, elapsed, vision_time, start);
                    collector.answer.logits.extend(logits);
                    collector.answer.captured.extend(captured.take().unwrap_or_default());
                    print(index, &collector.push(id)?)?;
                    if collector.stopped() && collector.answer.finish_reason == FinishReason::Length {
                        collector.answer.finish_reason = FinishReason::Stop;
                        collector.answer.prefix = engine.stop(collector.id);
                    }
                }
                Event::Finished { reason, prefix, .. } => {
                    if !collector.stopped() {
                        collector.answer.finish_reason = reason;
                    }
                    collector.answer.prefix = prefix.or(collector.answer.prefix.take());
                }
            }
        }
    }
    let finish = |(index, collector): (usize, Collector<'_>)| {
        let (rest, answer) = collector.finish();
        print(index, &rest)?;
        Ok(answer)
    };
    collectors.into_iter().enumerate().map(finish).collect()
}

/// A request that the engine does not take.
fn refused(error: RequestError) -> CliError {
    let too_long = matches!(error, RequestError::TooLong { .. });
    let error = CliError::new(error);
    if too_long { error.hint("raise `--context`, or ask for less") } else { error }
}

/// [`run_all`] of one request.
pub(crate) fn run(
    engine: &mut Engine<RankBackend>, request: Request, tokenizer: Option<&Tokenizer>, stop: &[String],
    print: &mut dyn FnMut(&str) -> CliResult,
) -> CliResult<Answer> {
    let answers = run_all(engine, vec![request], tokenizer, stop, &mut |_, text| print(text))?;
    Ok(answers.into_iter().next().expect("there is an answer to every request"))
}

/// What has come of a request so far.
struct Collector<'a> {
    id: RequestId,
    /// The end-of-sequence token, where it ends the answer and is no part of its text.
    hidden_id: Option<u32>,
    text: Option<TextStream<'a>>,
    answer: Answer,
}

impl Collector<'_> {
    /// Adds a token; gives what can be printed of the answer now.
    fn push(&mut self, id: u32) -> CliResult<String> {
        self.answer.output_ids.push(id);
        if self.hidden_id == Some(id) {
            return Ok(String::new());
        }
        match &mut self.text {
            Some(text) => text.push(id),
            None if self.answer.output_ids.len() > 1 => Ok(format!(" {id}")),
            None => Ok(id.to_string()),
        }
    }

    /// Whether a stop string has come.
    fn stopped(&self) -> bool {
        self.text.as_ref().is_some_and(|text| text.stopped)
    }

    /// What is left to print, and the answer.
    fn finish(self) -> (String, Answer) {
        let Some(text) = self.text else { return (String::new(), self.answer) };
        let (rest, whole) = text.finish();
        (rest, Answer { text: Some(whole), ..self.answer })
    }
}

impl Timings {
    fn count(&mut self, kind: StepKind, elapsed: Duration, vision_time: Duration, start: Instant) {
        match kind {
            StepKind::Prefill => {
                self.vision = vision_time;
                self.prefill = elapsed;
                self.first_token = start.elapsed();
            }
            StepKind::Decode => {
                self.decode += elapsed;
                self.num_decode_steps += 1;
            }
        }
    }
}

/// Decoded text on its way to the reader: held back while it may be the beginning of a stop string.
struct TextStream<'a> {
    decoder: StreamDecoder,
    stop: &'a [String],
    /// Everything decoded, cut before a stop string.
    text: String,
    /// Bytes of it that were handed out.
    printed: usize,
    stopped: bool,
}

impl<'a> TextStream<'a> {
    fn new(decoder: StreamDecoder, stop: &'a [String]) -> Self {
        Self { decoder, stop, text: String::new(), printed: 0, stopped: false }
    }

    /// Adds a token; gives what can be printed now.
    fn push(&mut self, id: u32) -> CliResult<String> {
        let piece = self.decoder.push(id)?;
        self.text.push_str(&piece);
        Ok(self.take_printable())
    }

    fn take_printable(&mut self) -> String {
        let found = self.stop.iter().filter_map(|stop| self.text[self.printed..].find(stop.as_str())).min();
        let end = match found {
            Some(at) => {
                self.stopped = true;
                self.text.truncate(self.printed + at);
                self.text.len()
            }
            None => self.text.len() - self.held_back(),
        };
        let printable = self.text[self.printed..end].to_owned();
        self.printed = end;
        printable
    }

    /// Bytes at the end of the text that may be the beginning of a stop string.
    fn held_back(&self) -> usize {
        let text = &self.text[self.printed..];
        let longest = |stop: &String| {
            (1..stop.len().min(text.len() + 1))
                .rev()
                .find(|len| stop.is_char_boundary(*len) && text.ends_with(&stop[..*len]))
        };
        self.stop.iter().filter_map(longest).max().unwrap_or(0)
    }

    /// What is left to print, and the whole text.
    fn finish(mut self) -> (String, String) {
        if !self.stopped {
            let rest = self.decoder.finish();
            self.text.push_str(&rest);
        }
        let found = self.stop.iter().filter_map(|stop| self.text[self.printed..].find(stop.as_str())).min();
        if let Some(at) = found {
            self.text.truncate(self.printed + at);
        }
        (self.text[self.printed..].to_owned(), self.text)
    }
}
