//! `bench`: how fast a plan runs, each figure beside what the hardware could do, measured in the same run.

mod ceilings;
mod kernels;
mod memory;
mod report;
mod work;

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use cogvlm_backend::SamplingParams;
use cogvlm_core::tokens::TokenLayout;
use cogvlm_core::{DType, Device, ModelSpec};
use cogvlm_pipeline::{CachedPrefix, Event, Image, Request, RequestId, StepKind, StepReport};
use cogvlm_plan::links::Links;
use cogvlm_plan::plan::Plan;

use self::ceilings::Measured;
use self::report::{Decode, Gaps, Load, Predicted, Report, median};
use self::work::Work;
use crate::args::BenchArgs;
use crate::error::{CliError, CliResult};
use crate::output::{note, print_line};
use crate::session::{Session, open_source};

/// Times of one repetition.
struct Run {
    /// From the first request to the first token of any.
    first_token: Duration,
    vision: Duration,
    /// From the first request to the first token of the last.
    prefill: Duration,
    /// Between two tokens of a sequence, where the prompts of others were still to be computed at the first of them.
    gaps: Vec<Duration>,
    /// Steps after the prompts, while all sequences were running; all steps, where some ended before others began.
    decode: Decoding,
}

/// Decode steps: their time, and the tokens of all sequences in it.
#[derive(Clone, Copy, Default)]
struct Decoding {
    elapsed: Duration,
    num_tokens: usize,
}

impl Decoding {
    fn add(&mut self, report: &StepReport, num_tokens: usize) {
        self.elapsed += report.elapsed;
        self.num_tokens += num_tokens;
    }

    /// Seconds in which each of `sequences` gets a token.
    fn step_seconds(&self, sequences: usize) -> f64 {
        self.elapsed.as_secs_f64() * sequences as f64 / self.num_tokens.max(1) as f64
    }
}

pub(crate) fn run(args: &BenchArgs) -> CliResult {
    if args.kernels {
        return kernels::run(args);
    }
    if args.repeats == 0 || args.new_tokens < 2 {
        return Err(CliError::usage("`bench` needs `--repeats` of at least 1 and `--new-tokens` of at least 2"));
    }
    if args.sequences.contains(&0) {
        return Err(CliError::usage("`--sequences` needs numbers of at least 1"));
    }
    // A plan from a file may have a batch of its own, which is known when it is read.
    let placement = &args.model.placement;
    if let Some(batch) = placement.batch.or_else(|| args.model.device_map.is_none().then_some(1)) {
        check_sequences(&args.sequences, batch)?;
    }
    let start = Instant::now();
    let source = open_source(&args.model.model)?;
    let Some(mut session) = Session::open(&args.model, source, false)? else { return Ok(()) };
    let batch = session.plan.limits.max_sequences;
    check_sequences(&args.sequences, batch)?;
    let spec = session.engine.spec().clone();
    // Counted before it is made: any number can be asked for.
    let num_vision_tokens = if args.text_only { 0 } else { spec.num_vision_tokens() };
    let num_prompt = args.prompt_tokens.saturating_add(1 + num_vision_tokens);
    if num_prompt.saturating_add(args.new_tokens) > session.plan.limits.context_len {
        return Err(CliError::new(format!(
            "a prompt of {num_prompt} tokens and {} new ones exceed the context of {}",
            args.new_tokens, session.plan.limits.context_len
        ))
        .hint("raise `--context`, or ask for fewer with `--prompt-tokens` and `--new-tokens`"));
    }
    let layout = prompt(&spec, args);

    let opened = start.elapsed();
    let (mut to_first_token, mut ready) = (None, Duration::ZERO);
    let mut measured = Vec::new();
    for sequences in numbers_of_sequences(&args.sequences, batch) {
        note(&format!("warming up, {sequences} at once"));
        let warm_up = repetition(&mut session, &layout, args, sequences)?;
        if to_first_token.is_none() {
            to_first_token = Some(opened + warm_up.first_token);
            let start = Instant::now();
            session.engine.expect_many_prompts();
            ready = start.elapsed();
        }
        let mut runs = Vec::new();
        for index in 0..args.repeats {
            note(&format!("repetition {} of {}", index + 1, args.repeats));
            runs.push(repetition(&mut session, &layout, args, sequences)?);
        }
        measured.push((sequences, runs));
    }

    let memory = memory::memory(&session);
    let Session { engine, plan, links, ways, on_gpus, source, load_time, num_threads } = session;
    // What is measured next needs memory too.
    drop(engine);
    note("measuring the machine");
    let activations = DType::from(args.model.dtype);
    let Measured { ceilings, links: measured_links } = Measured::of(&plan, on_gpus, activations);
    let work = Work::of(&spec, num_prompt, !args.text_only);
    let context_len = num_prompt as f64 + args.new_tokens as f64 / 2.0;
    let kv_bytes = (spec.num_layers * spec.kv_elements_per_token() * activations.size_bytes()) as f64 * context_len;
    let predicted = |rates: String, links: &Links| {
        let prediction = plan.prediction(&spec, links);
        Predicted {
            rates,
            prefill_s: prediction.prefill_s(!args.text_only, args.prompt_tokens + 1),
            decode_s: measured
                .iter()
                .map(|(sequences, _)| prediction.decode_round_s(*sequences, context_len))
                .collect(),
            num_text_ranks: prediction.text_ranks().len(),
        }
    };
    let decode = |(sequences, runs): &(usize, Vec<Run>)| Decode {
        sequences: *sequences,
        step_s: median(runs.iter().map(|run| run.decode.step_seconds(*sequences))),
        prefill_s: median(runs.iter().map(|run| run.prefill.as_secs_f64())),
        gaps: gaps(runs),
        bytes: work.hot_bytes as f64 + *sequences as f64 * kv_bytes,
    };
    let of_one = |time: fn(&Run) -> Duration| median(measured[0].1.iter().map(|run| time(run).as_secs_f64()));
    let to_first_token_s = to_first_token.unwrap_or_default().as_secs_f64();
    let report = Report {
        model: args.model.model.clone(),
        dtype: activations.to_string(),
        backend: if on_gpus { "cuda" } else { "cpu" },
        num_threads,
        num_prompt,
        has_image: !args.text_only,
        batch,
        repeats: args.repeats,
        load: load(&plan, source.total_bytes(), [load_time, ready], to_first_token_s),
        first_token_s: of_one(|run| run.first_token),
        vision_s: of_one(|run| run.vision),
        prefill_s: of_one(|run| run.prefill),
        decode: measured.iter().map(decode).collect(),
        work,
        predicted: predicted(plan.rates.clone(), &links),
        predicted_here: measured_links.map(|links| predicted("measured in this run".to_owned(), &links)),
        ceilings,
        memory,
        ways,
    };
    print_line(&if args.json { report.json().to_string() } else { report.text() })
}

/// `None` where nobody had to wait for the prompts of others.
fn gaps(runs: &[Run]) -> Option<Gaps> {
    let all: Vec<f64> = runs.iter().flat_map(|run| &run.gaps).map(Duration::as_secs_f64).collect();
    let longest: Vec<f64> = runs.iter().filter_map(|run| run.gaps.iter().max()).map(Duration::as_secs_f64).collect();
    (!all.is_empty()).then(|| Gaps { median_s: median(all.into_iter()), longest_s: median(longest.into_iter()) })
}

/// Refuses more sequences than memory is planned for.
fn check_sequences(asked: &[usize], batch: usize) -> CliResult {
    match asked.iter().max() {
        Some(&most) if most > batch => {
            Err(CliError::new(format!("`--sequences {most}` exceeds the {batch} that memory is planned for"))
                .hint(format!("raise `--batch` to {most}")))
        }
        _ => Ok(()),
    }
}

/// How many sequences are answered at once, run after run: one, then what was asked for, else the whole batch.
fn numbers_of_sequences(asked: &[usize], batch: usize) -> BTreeSet<usize> {
    let asked = if asked.is_empty() { &[batch] } else { asked };
    asked.iter().copied().chain([1]).collect()
}

fn load(plan: &Plan, weight_bytes: u64, [time, ready]: [Duration; 2], to_first_token_s: f64) -> Load {
    let holds = plan.devices.iter().filter(|planned| matches!(planned.device, Device::Gpu(_)));
    let copied: Vec<u64> = holds.map(|planned| planned.weight_bytes).filter(|bytes| *bytes > 0).collect();
    Load {
        seconds: time.as_secs_f64(),
        weight_bytes,
        copied_bytes: copied.iter().sum(),
        num_links: copied.len(),
        ready_s: ready.as_secs_f64(),
        to_first_token_s,
    }
}

/// BOS, the image's tokens, and ids spread over the vocabulary.
fn prompt(spec: &ModelSpec, args: &BenchArgs) -> TokenLayout {
    let first = 3.min(spec.vocab_size - 1);
    let text: Vec<u32> =
        (0..args.prompt_tokens).map(|index| (first + index * 7919 % (spec.vocab_size - first)) as u32).collect();
    TokenLayout::new(spec, !args.text_only, &text)
}

/// Answers the prompt `sequences` times, all at once. Of several, all prompts are computed first, then all answers from
/// what was kept of these, then both beside each other.
fn repetition(session: &mut Session, layout: &TokenLayout, args: &BenchArgs, sequences: usize) -> CliResult<Run> {
    let vision = &session.engine.spec().vision;
    let num_values = vision.num_channels * vision.image_size * vision.image_size;
    let image = Image { pixels: (0..num_values).map(|index| (index % 509) as f32 / 254.5 - 1.0).collect() };
    let request = |prefix: Option<CachedPrefix>| Request {
        layout: layout.clone(),
        image: (!args.text_only).then(|| image.clone()),
        params: SamplingParams::default(),
        max_new_tokens: args.new_tokens,
        ignore_eos: true,
        forced: None,
        want_logits: false,
        capture: false,
        prefix,
        keep_cache: false,
    };
    let together = (0..sequences).map(|_| request(None)).collect();
    if sequences == 1 {
        return Ok(pass(session, together)?.run);
    }
    let prompt = |_| Request { max_new_tokens: 1, keep_cache: true, ..request(None) };
    let Pass { run: prompts, prefixes } = pass(session, (0..sequences).map(prompt).collect())?;
    let answers = pass(session, prefixes.into_iter().map(|prefix| request(Some(prefix))).collect())?.run;
    let together = pass(session, together)?.run;
    Ok(Run { decode: answers.decode, gaps: together.gaps, ..prompts })
}

/// What came of requests that were all submitted at once.
struct Pass {
    run: Run,
    /// What those have kept that were to.
    prefixes: Vec<CachedPrefix>,
}

fn pass(session: &mut Session, requests: Vec<Request>) -> CliResult<Pass> {
    let sequences = requests.len();
    let start = Instant::now();
    for request in requests {
        session.engine.submit(request)?;
    }
    let mut run = Run {
        first_token: Duration::ZERO,
        vision: Duration::ZERO,
        prefill: Duration::ZERO,
        gaps: Vec::new(),
        decode: Decoding::default(),
    };
    let (mut num_begun, mut any_ended, mut all_steps) = (0, false, Decoding::default());
    let mut prefixes = Vec::new();
    // When each had its last token, and whether prompts were still to be computed then.
    let mut last_tokens: HashMap<RequestId, (Duration, bool)> = HashMap::new();
    while let Some(report) = session.engine.step()? {
        let now = start.elapsed();
        let tokens: Vec<RequestId> = report.events.iter().filter_map(token_of).collect();
        let num_tokens = tokens.len();
        if run.first_token.is_zero() && num_tokens > 0 {
            run.first_token = now;
        }
        if report.kind == StepKind::Prefill {
            num_begun += num_tokens;
        }
        for request in tokens {
            if let Some((before, true)) = last_tokens.insert(request, (now, num_begun < sequences)) {
                run.gaps.push(now - before);
            }
        }
        match report.kind {
            StepKind::Prefill => {
                run.vision += report.vision_time;
                run.prefill = now;
            }
            StepKind::Decode => {
                all_steps.add(&report, num_tokens);
                if num_begun == sequences && !any_ended {
                    run.decode.add(&report, num_tokens);
                }
            }
        }
        any_ended |= num_tokens < report.events.len();
        prefixes.extend(report.events.into_iter().filter_map(kept_of));
    }
    if run.decode.num_tokens == 0 {
        run.decode = all_steps;
    }
    Ok(Pass { run, prefixes })
}

/// Whose token it is that an event tells.
fn token_of(event: &Event) -> Option<RequestId> {
    match event {
        Event::Token { request, .. } => Some(*request),
        Event::Finished { .. } => None,
    }
}

/// The KV cache that an event hands out.
fn kept_of(event: Event) -> Option<CachedPrefix> {
    match event {
        Event::Token { .. } => None,
        Event::Finished { prefix, .. } => prefix,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_of_all_runs_and_the_longest_of_each() {
        let run = |gaps: &[u64]| Run {
            first_token: Duration::ZERO,
            vision: Duration::ZERO,
            prefill: Duration::ZERO,
            gaps: gaps.iter().map(|ms| Duration::from_millis(*ms)).collect(),
            decode: Decoding::default(),
        };
        assert!(gaps(&[run(&[]), run(&[])]).is_none());
        let Gaps { median_s, longest_s } = gaps(&[run(&[1, 2, 30]), run(&[5, 6]), run(&[7, 50])]).unwrap();
        assert_eq!((median_s, longest_s), (0.006, 0.03));
    }

    #[test]
    fn one_sequence_comes_first() {
        let numbers = |asked: &[usize], batch| numbers_of_sequences(asked, batch).into_iter().collect::<Vec<_>>();
        assert_eq!(numbers(&[], 1), [1]);
        assert_eq!(numbers(&[], 4), [1, 4]);
        assert_eq!(numbers(&[4, 2, 4], 8), [1, 2, 4]);
    }

    #[test]
    fn sequences_beyond_the_batch_are_refused() {
        assert!(check_sequences(&[], 0).is_ok(), "what a batch of none means is said elsewhere");
        assert!(check_sequences(&[1, 4], 4).is_ok());
        let error = check_sequences(&[1, 8, 2], 4).unwrap_err().render();
        assert!(error.contains("`--sequences 8`") && error.contains("raise `--batch` to 8"), "{error}");
    }
}
