//! One backend gives the same bits whatever the plan: one rank, several, weights resident, streamed or on a peer.

mod common;

use std::collections::BTreeSet;

use cogvlm_checkpoint::ModelSource;
use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{DType, Device};
use cogvlm_pipeline::{Event, FinishReason, Image, Request};
use cogvlm_plan::plan::{Policy, Residency, STAGING_SLOTS};

use common::{MIB, Watched, answers, engine, engine_of, image, plan_for, request, source};

fn three_requests(source: &ModelSource) -> Vec<Request> {
    vec![
        request(source, &[1000, 2000, 3000], Some(image(source, 1)), 5),
        request(source, &[17, 18, 19, 20, 21, 22, 23, 24, 25], None, 7),
        request(source, &[], Some(image(source, 2)), 3),
    ]
}

#[test]
fn logits_do_not_depend_on_the_plan() {
    use Device::{Cpu, Disk, Gpu};
    let source = source();
    let limits = StepLimits::new(64, 3);
    for activations in [DType::F32, DType::Bf16] {
        type Case<'a> = (&'a str, &'a [(Device, u64)], Policy);
        let plans: &[Case<'_>] = &[
            ("one rank", &[(Gpu(0), 64 * MIB)], Policy::Balanced),
            ("two ranks", &[(Gpu(0), 16 * MIB), (Gpu(1), 16 * MIB)], Policy::Balanced),
            (
                "four ranks",
                &[(Gpu(0), 14 * MIB), (Gpu(1), 14 * MIB), (Gpu(2), 14 * MIB), (Gpu(3), 14 * MIB)],
                Policy::Throughput,
            ),
            ("hot on one, cold on the other", &[(Gpu(0), 15 * MIB), (Gpu(1), 15 * MIB)], Policy::Latency),
            ("one rank and the host", &[(Gpu(0), 14 * MIB), (Cpu, 64 * MIB)], Policy::Latency),
            ("two ranks and the host", &[(Gpu(0), 3 * MIB), (Gpu(1), 12 * MIB), (Cpu, 64 * MIB)], Policy::Throughput),
            ("two ranks and the file", &[(Gpu(0), 3 * MIB), (Gpu(1), 12 * MIB), (Disk, 0)], Policy::Balanced),
            ("the host alone", &[(Cpu, 64 * MIB)], Policy::Auto),
        ];
        let mut expected = None;
        let mut seen = BTreeSet::new();
        for (name, budgets, policy) in plans {
            let plan = plan_for(&source, budgets, *policy, limits, activations);
            seen.extend(plan.placements.iter().map(|placement| match placement.residency {
                Residency::Device => "device",
                Residency::Peer(_) => "peer",
                Residency::Host => "host",
                Residency::File => "file",
            }));
            for num_threads in [1, 2] {
                let mut engine = engine(&source, &plan, activations, num_threads);
                let found = answers(&mut engine, three_requests(&source));
                let (free, all) = (engine.block_pool().num_free(), engine.block_pool().num_blocks());
                assert_eq!(free, all, "{name}: blocks are left over");
                for (device, memory) in engine.memory() {
                    assert!(memory.peak <= memory.capacity, "{name}: rank {device}");
                }
                match &expected {
                    None => expected = Some(found),
                    Some(expected) => {
                        assert!(found == *expected, "{name}, {num_threads} threads, {activations}: other logits")
                    }
                }
            }
        }
        assert_eq!(seen, BTreeSet::from(["device", "peer", "host", "file"]), "a kind of residency was never run");
    }
}

#[test]
fn ranks_go_on_when_weights_can_be_read_again() {
    use Device::{Disk, Gpu};
    let flaky = Watched::new(source());
    let limits = StepLimits::new(64, 3);
    let budgets = [(Gpu(0), 12 * MIB + MIB / 4), (Disk, 0)];
    let plan = plan_for(&flaky.source, &budgets, Policy::Balanced, limits, DType::F32);
    let mut engine = engine_of(&flaky, flaky.source.spec(), &plan, DType::F32, 1);
    let expected = answers(&mut engine, three_requests(&flaky.source));
    flaky.fail_after(0);
    // More often than there are staging slots.
    for _ in 0..2 * STAGING_SLOTS + 1 {
        engine.submit(request(&flaky.source, &[17, 18], Some(image(&flaky.source, 3)), 2)).unwrap();
        let error = engine.step().expect_err("this plan streams weights for images");
        assert!(error.to_string().contains("not now"), "{error}");
    }
    flaky.recover();
    assert!(answers(&mut engine, three_requests(&flaky.source)) == expected, "other logits than before");
}

#[test]
fn memory_in_use_is_what_the_plan_says() {
    let source = source();
    let limits = StepLimits::new(128, 2);
    let budgets = [(Device::Gpu(0), 13 * MIB), (Device::Gpu(1), 11 * MIB), (Device::Cpu, 64 * MIB)];
    let plan = plan_for(&source, &budgets, Policy::Balanced, limits, DType::Bf16);
    let mut engine = engine(&source, &plan, DType::Bf16, 2);
    answers(&mut engine, three_requests(&source));
    for (device, memory) in engine.memory().into_iter().filter(|(device, _)| *device != Device::Cpu) {
        let planned = plan.devices.iter().find(|planned| planned.device == device).unwrap();
        let share = memory.peak as f64 / planned.used_bytes() as f64;
        assert!(
            (0.99..=1.0).contains(&share),
            "rank {device} held {} of {} planned",
            memory.peak,
            planned.used_bytes()
        );
    }
}

#[test]
fn a_kept_cache_gives_the_answer_of_a_fresh_start() {
    let source = source();
    let plan = plan_for(&source, &[(Device::Cpu, 256 * MIB)], Policy::Auto, StepLimits::new(256, 1), DType::F32);
    let mut engine = engine(&source, &plan, DType::F32, 2);
    let picture = image(&source, 3);
    let first_text = [5, 6, 7, 8];
    let first = Request { keep_cache: true, ..request(&source, &first_text, Some(picture.clone()), 4) };
    engine.submit(first).unwrap();
    let (mut prefix, mut said) = (None, Vec::new());
    while let Some(report) = engine.step().unwrap() {
        for event in report.events {
            match event {
                Event::Token { id, .. } => said.push(id),
                Event::Finished { prefix: kept, reason, .. } => {
                    assert_eq!(reason, FinishReason::Length);
                    prefix = kept;
                }
            }
        }
    }
    let prefix = prefix.expect("the cache was to be kept");
    assert!(engine.block_pool().num_free() < engine.block_pool().num_blocks());
    let second_text: Vec<u32> = first_text.iter().chain(&said).copied().chain([40, 41, 42]).collect();
    let fresh = answers(&mut engine, vec![request(&source, &second_text, Some(picture.clone()), 4)]);
    let resumed = Request { prefix: Some(prefix), ..request(&source, &second_text, Some(picture), 4) };
    let id = engine.submit(resumed).unwrap();
    let report = engine.step().unwrap().unwrap();
    // BOS, image, four ids and three of the four said were cached; the last one said was never fed.
    assert_eq!(report.num_rows, second_text.len() - 7);
    let mut tokens = Vec::new();
    let mut collect = |events: Vec<Event>| {
        for event in events {
            if let Event::Token { request, id: token, logits } = event {
                assert_eq!(request, id);
                tokens.push((token, logits.unwrap()));
            }
        }
    };
    collect(report.events);
    while let Some(report) = engine.step().unwrap() {
        collect(report.events);
    }
    for ((token, logits), (fresh_token, fresh_logits)) in tokens.iter().zip(&fresh[0]) {
        assert_eq!(token, fresh_token);
        let error = logits.iter().zip(fresh_logits).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // Sums over other groups of rows: rounding only, on logits of about 10.
        assert!(error < 1e-3, "{error}");
    }
    assert_eq!(engine.block_pool().num_free(), engine.block_pool().num_blocks());
}

/// The token that was chosen last has been handed to the next step, which never came: it is not cached.
#[test]
fn the_cache_of_a_stopped_request_ends_where_computing_ended() {
    let source = source();
    let plan = plan_for(&source, &[(Device::Cpu, 256 * MIB)], Policy::Auto, StepLimits::new(256, 1), DType::F32);
    let mut engine = engine(&source, &plan, DType::F32, 2);
    let text = [5, 6, 7, 8];
    let id = engine.submit(Request { keep_cache: true, ..request(&source, &text, None, 20) }).unwrap();
    let mut said = Vec::new();
    for _ in 0..3 {
        let events = engine.step().unwrap().unwrap().events;
        said.extend(events.iter().filter_map(|event| match event {
            Event::Token { id, .. } => Some(*id),
            Event::Finished { .. } => None,
        }));
    }
    let prefix = engine.stop(id).expect("the cache was to be kept");
    let longer: Vec<u32> = text.iter().chain(&said).copied().chain([40]).collect();
    let fresh = answers(&mut engine, vec![request(&source, &longer, None, 3)]);
    engine.submit(Request { prefix: Some(prefix), ..request(&source, &longer, None, 3) }).unwrap();
    let report = engine.step().unwrap().unwrap();
    assert_eq!(report.num_rows, 2, "the last token said, and one more");
    let Some(Event::Token { logits: Some(logits), .. }) = report.events.into_iter().next() else { panic!("no token") };
    let error = logits.iter().zip(&fresh[0][0].1).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(error < 1e-3, "{error}");
}

#[test]
fn another_image_is_not_taken_for_the_cached_one() {
    let source = source();
    let plan = plan_for(&source, &[(Device::Cpu, 256 * MIB)], Policy::Auto, StepLimits::new(64, 1), DType::F32);
    let mut engine = engine(&source, &plan, DType::F32, 2);
    let mut keep = |picture: usize, prefix| {
        let request = request(&source, &[9, 10], Some(image(&source, picture)), 2);
        engine.submit(Request { keep_cache: true, prefix, ..request }).unwrap();
        let (mut rows, mut kept) = (0, None);
        while let Some(report) = engine.step().unwrap() {
            rows += report.num_rows;
            for event in report.events {
                if let Event::Finished { prefix, .. } = event {
                    kept = prefix;
                }
            }
        }
        (rows, kept)
    };
    let prompt = source.spec().num_vision_tokens() + 3;
    let (rows, prefix) = keep(1, None);
    assert_eq!(rows, prompt + 1);
    let (rows, prefix) = keep(1, prefix);
    assert_eq!(rows, 2, "the same picture and text: the last token of the prompt, and one more");
    let (rows, _) = keep(2, prefix);
    assert_eq!(rows, prompt + 1, "another picture");
}

#[test]
fn requests_that_cannot_be_answered_are_refused_and_leave_nothing_behind() {
    let source = source();
    let plan = plan_for(&source, &[(Device::Cpu, 256 * MIB)], Policy::Auto, StepLimits::new(32, 1), DType::F32);
    let mut engine = engine(&source, &plan, DType::F32, 1);
    let num_vision_tokens = source.spec().num_vision_tokens();
    let good = || request(&source, &[1, 2], None, 1);
    let with_image = || request(&source, &[1, 2], Some(image(&source, 1)), 1);
    let refusals = [
        (
            request(&source, &[7; 40], None, 1),
            "the prompt has 41 tokens, but the plan has room for 32 per sequence, answer included",
        ),
        (Request { max_new_tokens: 0, ..good() }, "at least one new token has to be asked for"),
        (request(&source, &[32_000], None, 1), "token id 32000 is outside the model's vocabulary of 32000"),
        (
            Request { forced: Some(vec![1, 40_000]), ..good() },
            "token id 40000 is outside the model's vocabulary of 32000",
        ),
        (
            Request { image: None, ..with_image() },
            &*format!("the prompt has {num_vision_tokens} vision tokens, but 0 are right without an image"),
        ),
        (
            Request { image: Some(image(&source, 1)), ..good() },
            &format!("the prompt has 0 vision tokens, but {num_vision_tokens} are right for one image after BOS"),
        ),
        (
            Request { image: Some(Image { pixels: vec![0.0; 5].into() }), ..with_image() },
            "the image has 5 values, but the model reads 9408",
        ),
    ];
    for (request, message) in refusals {
        assert_eq!(engine.submit(request).unwrap_err().to_string(), message);
    }
    assert!(engine.is_idle());
    assert_eq!(engine.block_pool().num_free(), engine.block_pool().num_blocks());
    assert_eq!(answers(&mut engine, vec![good()])[0].len(), 1);
}

#[test]
fn a_request_that_is_stopped_gives_its_blocks_back() {
    let source = source();
    let plan = plan_for(&source, &[(Device::Cpu, 256 * MIB)], Policy::Auto, StepLimits::new(64, 2), DType::Bf16);
    let mut engine = engine(&source, &plan, DType::Bf16, 2);
    let running = engine.submit(request(&source, &[1, 2, 3], None, 50)).unwrap();
    engine.step().unwrap();
    let waiting = engine.submit(request(&source, &[1, 2, 3], None, 50)).unwrap();
    assert!(engine.block_pool().num_free() < engine.block_pool().num_blocks());
    assert!(engine.stop(running).is_none());
    assert!(engine.stop(waiting).is_none());
    assert!(engine.is_idle());
    assert_eq!(engine.block_pool().num_free(), engine.block_pool().num_blocks());
}
