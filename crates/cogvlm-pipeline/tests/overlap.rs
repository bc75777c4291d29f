//! Steps that are under way side by side: groups of sequences for every rank, tokens fed before the host knows them.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use cogvlm_checkpoint::ModelSource;
use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{DType, Device, ModelSpec};
use cogvlm_cpu::CpuBackend;
use cogvlm_pipeline::{Engine, Event, FinishReason, Request, RequestId, StepKind, StepReport};
use cogvlm_plan::plan::{Plan, Policy};

use common::{MIB, answers, engine, engine_of, image, plan_for, request, source};

fn one_rank(source: &ModelSource, limits: StepLimits) -> Plan {
    plan_for(source, &[(Device::Gpu(0), 128 * MIB)], Policy::Auto, limits, DType::F32)
}

fn two_ranks(source: &ModelSource, limits: StepLimits) -> Plan {
    let budgets = [(Device::Gpu(0), 64 * MIB), (Device::Gpu(1), 64 * MIB)];
    let plan = plan_for(source, &budgets, Policy::Throughput, limits, DType::F32);
    let text = plan.stages.iter().filter(|stage| stage.units.iter().any(|unit| !unit.is_vision()));
    assert_eq!(text.map(|stage| stage.device).collect::<BTreeSet<_>>().len(), 2, "both ranks compute text");
    plan
}

/// Requests that need no more of a step than its token.
fn free_requests(source: &ModelSource) -> Vec<Request> {
    let free = |text: &[u32], picture: Option<usize>, num_new| {
        let picture = picture.map(|seed| image(source, seed));
        Request { want_logits: false, ..request(source, text, picture, num_new) }
    };
    vec![
        free(&[1000, 2000, 3000], Some(1), 12),
        free(&[17, 18, 19, 20, 21, 22], None, 9),
        free(&[], Some(2), 15),
        free(&[7, 7, 7], None, 12),
        free(&[31_000, 5], None, 1),
    ]
}

fn bound_requests(source: &ModelSource) -> Vec<Request> {
    free_requests(source).into_iter().map(|request| Request { want_logits: true, ..request }).collect()
}

fn ids(answers: &[Vec<(u32, Vec<f32>)>]) -> Vec<Vec<u32>> {
    answers.iter().map(|answer| answer.iter().map(|(id, _)| *id).collect()).collect()
}

fn expect_all_free(engine: &Engine<CpuBackend>) {
    assert!(engine.is_idle());
    assert_eq!(engine.block_pool().num_free(), engine.block_pool().num_blocks(), "blocks are left over");
}

#[test]
fn tokens_do_not_depend_on_what_is_under_way() {
    let source = source();
    // Each limit makes other steps: all at once, some wait, one after the other.
    for max_sequences in [5, 3, 1] {
        let limits = StepLimits::new(64, max_sequences);
        let mut expected = None;
        for plan in [one_rank(&source, limits), two_ranks(&source, limits)] {
            let mut engine = engine(&source, &plan, DType::F32, 2);
            let step_by_step = ids(&answers(&mut engine, bound_requests(&source)));
            let expected = expected.get_or_insert_with(|| step_by_step.clone());
            assert_eq!(step_by_step, *expected, "{max_sequences} at once");
            assert_eq!(ids(&answers(&mut engine, free_requests(&source))), *expected, "{max_sequences} at once");
            expect_all_free(&engine);
        }
    }
}

fn collect(engine: &mut Engine<CpuBackend>) -> Vec<StepReport> {
    std::iter::from_fn(|| engine.step().unwrap()).collect()
}

fn num_tokens(report: &StepReport) -> usize {
    report.events.iter().filter(|event| matches!(event, Event::Token { .. })).count()
}

#[test]
fn every_rank_has_a_group() {
    let source = source();
    let mut engine = engine(&source, &two_ranks(&source, StepLimits::new(64, 7)), DType::F32, 2);
    for index in 0..7 {
        engine.submit(Request { want_logits: false, ..request(&source, &[index, 9], None, 24) }).unwrap();
    }
    let reports = collect(&mut engine);
    let decode: Vec<usize> =
        reports.iter().filter(|report| report.kind == StepKind::Decode).map(|report| report.num_rows).collect();
    // One step had all prompts; then seven sequences go round in groups of four and three until they end.
    assert_eq!(reports[0].kind, StepKind::Prefill);
    assert_eq!(num_tokens(&reports[0]), 7);
    assert!(decode.iter().all(|rows| *rows <= 4), "{decode:?}");
    assert_eq!(decode.iter().sum::<usize>(), 7 * 23);
    assert!(decode.len() <= 2 * 23 + 2, "groups grow together: {decode:?}");
}

#[test]
fn running_sequences_get_a_token_between_prompts() {
    let source = source();
    let mut engine = engine(&source, &one_rank(&source, StepLimits::new(64, 4)), DType::F32, 1);
    for seed in 0..4 {
        let request = request(&source, &[3, 4], Some(image(&source, seed)), 40);
        engine.submit(Request { want_logits: false, ..request }).unwrap();
    }
    let reports = collect(&mut engine);
    let kinds: Vec<StepKind> = reports.iter().map(|report| report.kind).collect();
    let prompts: Vec<usize> = (0..kinds.len()).filter(|index| kinds[*index] == StepKind::Prefill).collect();
    // One image a step. Whoever has one token gets the next before the last prompt is computed.
    assert_eq!(prompts.len(), 4, "{kinds:?}");
    assert_eq!(prompts[0], 0);
    assert!(prompts[3] >= 5, "two tokens at least come between the prompts: {kinds:?}");
    let elapsed: f64 = reports.iter().map(|report| report.elapsed.as_secs_f64()).sum();
    assert!(elapsed > 0.0);
    expect_all_free(&engine);
}

/// The same model, for which `id` ends an answer.
fn ended_by(source: &ModelSource, id: u32) -> ModelSpec {
    ModelSpec { eos_token_id: id, ..source.spec().clone() }
}

#[test]
fn an_answer_that_ends_early_leaves_the_others_as_they_are() {
    let source = source();
    let limits = StepLimits::new(64, 5);
    let whole = ids(&answers(&mut engine(&source, &one_rank(&source, limits), DType::F32, 2), free_requests(&source)));
    // A token that one answer has in its middle ends it; those after it were begun already.
    let (longest, eos) = (2, whole[2][6]);
    let expected: Vec<Vec<u32>> = whole
        .iter()
        .map(|answer| {
            let end = answer.iter().position(|id| *id == eos).map_or(answer.len(), |at| at + 1);
            answer[..end].to_vec()
        })
        .collect();
    assert!(expected[longest].len() < whole[longest].len());
    for plan in [one_rank(&source, limits), two_ranks(&source, limits)] {
        let mut engine = engine_of(&source, &ended_by(&source, eos), &plan, DType::F32, 2);
        let order: Vec<RequestId> = free_requests(&source)
            .into_iter()
            .map(|request| engine.submit(Request { ignore_eos: false, ..request }).unwrap())
            .collect();
        let (mut found, mut reasons) = (vec![Vec::new(); order.len()], BTreeMap::new());
        for report in collect(&mut engine) {
            assert!(!report.events.is_empty(), "a report without news");
            for event in report.events {
                let index = |request: RequestId| order.iter().position(|known| *known == request).unwrap();
                match event {
                    Event::Token { request, id, .. } => {
                        assert!(!reasons.contains_key(&index(request)), "a token after the end");
                        found[index(request)].push(id);
                    }
                    Event::Finished { request, reason, prefix } => {
                        assert!(prefix.is_none());
                        assert!(reasons.insert(index(request), reason).is_none(), "ended twice");
                    }
                }
            }
        }
        assert_eq!(found, expected);
        assert_eq!(reasons.len(), order.len());
        assert_eq!(reasons[&longest], FinishReason::Stop);
        assert_eq!(reasons[&4], FinishReason::Length);
        expect_all_free(&engine);
    }
}

/// A conversation goes on from a cache that was handed out while a step of its sequence was still under way.
#[test]
fn caches_handed_out_early_are_as_good() {
    let source = source();
    let limits = StepLimits::new(128, 2);
    let text = [5, 6, 7, 8];
    for stop_by_hand in [false, true] {
        let plan = one_rank(&source, limits);
        let whole = ids(&answers(&mut engine(&source, &plan, DType::F32, 2), vec![request(&source, &text, None, 20)]));
        let said = &whole[0][..8];
        let spec = ended_by(&source, if stop_by_hand { source.spec().eos_token_id } else { said[7] });
        let mut engine = engine_of(&source, &spec, &plan, DType::F32, 2);
        let kept = Request {
            keep_cache: true,
            ignore_eos: stop_by_hand,
            want_logits: false,
            ..request(&source, &text, None, 20)
        };
        let id = engine.submit(kept).unwrap();
        // A neighbour, so that blocks that are given back go to somebody.
        engine.submit(Request { want_logits: false, ..request(&source, &[90, 91], None, 40) }).unwrap();
        let (mut heard, mut prefix) = (0, None);
        while heard < said.len() {
            for event in engine.step().unwrap().unwrap().events {
                match event {
                    Event::Token { request, id: token, .. } if request == id => {
                        assert_eq!(token, said[heard]);
                        heard += 1;
                    }
                    Event::Finished { request, prefix: given, .. } if request == id => prefix = given,
                    _ => {}
                }
            }
        }
        let prefix = if stop_by_hand { engine.stop(id) } else { prefix }.expect("the cache was to be kept");
        let longer: Vec<u32> = text.iter().chain(said).copied().chain([40]).collect();
        let next = Request { prefix: Some(prefix), ..request(&source, &longer, None, 5) };
        let next = engine.submit(next).unwrap();
        let (mut rows, mut resumed) = (None, Vec::new());
        while let Some(report) = engine.step().unwrap() {
            for event in report.events {
                if let Event::Token { request, id, logits: Some(logits) } = event
                    && request == next
                {
                    rows.get_or_insert(report.num_rows);
                    resumed.push((id, logits));
                }
            }
        }
        assert_eq!(rows, Some(2), "the last token said, and one more");
        expect_all_free(&engine);
        let fresh = answers(&mut engine, vec![Request { ignore_eos: true, ..request(&source, &longer, None, 5) }]);
        for ((token, logits), (fresh_token, fresh_logits)) in resumed.iter().zip(&fresh[0]) {
            assert_eq!(token, fresh_token);
            let error = logits.iter().zip(fresh_logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(error < 1e-3, "{error}");
        }
    }
}

#[test]
fn answers_drawn_by_chance_are_drawn_as_one_at_a_time() {
    let source = source();
    let plan = one_rank(&source, StepLimits::new(64, 2));
    let mut engine = engine(&source, &plan, DType::F32, 1);
    let drawn = |want_logits| {
        let mut request = Request { want_logits, ..request(&source, &[11, 12], None, 30) };
        request.params.temperature = 1.3;
        request.params.seed = 77;
        request
    };
    let expected = ids(&answers(&mut engine, vec![drawn(true)]));
    assert_eq!(ids(&answers(&mut engine, vec![drawn(false)])), expected);
    // A penalty needs every token before the next is chosen.
    let mut penalised = [drawn(true), drawn(false)];
    penalised.iter_mut().for_each(|request| request.params.repetition_penalty = 1.4);
    let [bound, free] = penalised.map(|request| ids(&answers(&mut engine, vec![request])));
    assert_eq!(bound, free);
    assert_ne!(bound, expected, "the penalty has an effect");
}
