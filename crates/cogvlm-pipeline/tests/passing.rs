//! Running sequences go on while the prompts of others are computed, and nobody's bits depend on it.

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use cogvlm_checkpoint::ModelSource;
use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{DType, Device, Phase};
use cogvlm_cpu::CpuBackend;
use cogvlm_pipeline::{Engine, Event, FinishReason, Request, RequestId, StepKind};
use cogvlm_plan::plan::{Plan, Policy, Residency};

use common::{MIB, Watched, answers, engine, engine_of, image, plan_for, plan_request, request, source};

use Device::{Cpu, Disk, Gpu};

const LIMITS: StepLimits = StepLimits { max_tokens: 96, max_sequences: 3, max_images: 1, context_len: 96, parcels: 0 };

/// Tokens of an answer, and what they were chosen from.
type Answer = Vec<(u32, Vec<f32>)>;

/// What was heard of requests.
type Heard = BTreeMap<RequestId, Answer>;

/// Takes one turn, and says whose tokens came of it.
fn turn(engine: &mut Engine<CpuBackend>, heard: &mut Heard) -> Vec<RequestId> {
    let report = engine.step().unwrap_or_else(|error| panic!("{error}")).expect("somebody is being answered");
    let tokens = report.events.into_iter().filter_map(|event| match event {
        Event::Token { request, id, logits } => Some((request, (id, logits.unwrap_or_default()))),
        Event::Finished { .. } => None,
    });
    let mut whose = Vec::new();
    for (request, token) in tokens {
        heard.entry(request).or_default().push(token);
        whose.push(request);
    }
    whose
}

fn expect_all_free(engine: &Engine<CpuBackend>) {
    assert!(engine.is_idle());
    assert_eq!(engine.block_pool().num_free(), engine.block_pool().num_blocks(), "blocks are left over");
}

fn runner(source: &ModelSource, num_new: usize) -> Request {
    request(source, &[17, 18, 19, 20, 21], None, num_new)
}

/// A prompt with an image, and a word of answer.
fn look(source: &ModelSource, picture: usize) -> Request {
    request(source, &[1000, 2000, picture as u32], Some(image(source, picture)), 1)
}

/// Plans of one rank, of two, and of two that take turns, which have most weights of images in the file and all others on
/// the devices.
fn streaming_plans(source: &ModelSource) -> Vec<Plan> {
    const QUARTER: u64 = MIB / 4;
    let budgets: [&[(Device, u64)]; 3] = [
        &[(Gpu(0), 48 * QUARTER), (Disk, 0)],
        &[(Gpu(0), 10 * QUARTER), (Gpu(1), 41 * QUARTER), (Disk, 0)],
        &[(Gpu(0), 13 * QUARTER), (Gpu(1), 40 * QUARTER), (Disk, 0)],
    ];
    let plans = budgets.map(|budgets| plan_for(source, budgets, Policy::Throughput, LIMITS, DType::F32));
    assert_eq!(plans.each_ref().map(|plan| plan.stages.len()), [1, 2, 4]);
    for plan in &plans {
        let weights = plan.placements.iter().filter(|placement| !placement.tensor.optional);
        let in_file = weights.filter(|placement| placement.residency == Residency::File);
        let phases: Vec<Phase> = in_file.map(|placement| placement.tensor.phase).collect();
        assert!(phases.len() > 40, "{} tensors of 68", phases.len());
        assert!(phases.iter().all(|phase| *phase != Phase::EveryToken), "decode steps would stream");
    }
    plans.into()
}

/// Two layers are in the file as a whole: the staging ring belongs to whoever computes, prompt or decode step.
fn plan_that_streams_tokens(source: &ModelSource) -> Plan {
    let request = plan_request(source, &[(Gpu(0), 64 * MIB)], Policy::Auto, LIMITS, DType::F32);
    let map = r#"{"": 0, "model.layers.1": "disk", "model.layers.3": "disk"}"#;
    let plan = Plan::from_hugging_face(map, &request).unwrap_or_else(|error| panic!("{error}"));
    let hot = plan.placements.iter().filter(|placement| placement.tensor.phase == Phase::EveryToken);
    assert!(hot.filter(|placement| placement.residency == Residency::File).count() > 4);
    plan
}

#[test]
fn prompts_in_the_middle_change_no_bit() {
    let source = source();
    type Case<'a> = (&'a str, &'a [(Device, u64)], Policy);
    let cases: &[Case<'_>] = &[
        ("one rank", &[(Gpu(0), 64 * MIB)], Policy::Auto),
        ("two ranks", &[(Gpu(0), 20 * MIB), (Gpu(1), 20 * MIB)], Policy::Throughput),
        ("hot on one, cold on the other", &[(Gpu(0), 15 * MIB), (Gpu(1), 15 * MIB)], Policy::Latency),
        (
            "four ranks",
            &[(Gpu(0), 16 * MIB), (Gpu(1), 16 * MIB), (Gpu(2), 16 * MIB), (Gpu(3), 16 * MIB)],
            Policy::Throughput,
        ),
        ("one rank and the host", &[(Gpu(0), 14 * MIB), (Cpu, 64 * MIB)], Policy::Latency),
        ("one rank and the file", &[(Gpu(0), 13 * MIB), (Disk, 0)], Policy::Balanced),
        ("two ranks and the host", &[(Gpu(0), 3 * MIB), (Gpu(1), 12 * MIB), (Cpu, 64 * MIB)], Policy::Throughput),
        ("the host alone", &[(Cpu, 64 * MIB)], Policy::Auto),
    ];
    let requests = || std::iter::once(runner(&source, 60)).chain((1..=6).map(|picture| look(&source, picture)));
    let plans =
        cases.iter().map(|(name, budgets, policy)| (*name, plan_for(&source, budgets, *policy, LIMITS, DType::F32)));
    let plans = plans.chain([("decode steps stream too", plan_that_streams_tokens(&source))]);
    let mut expected: Option<Vec<Answer>> = None;
    for (name, plan) in plans {
        for num_threads in [1, 2] {
            let mut engine = engine(&source, &plan, DType::F32, num_threads);
            // One after the other.
            let alone: Vec<_> = requests().flat_map(|request| answers(&mut engine, vec![request])).collect();
            let expected = expected.get_or_insert_with(|| alone.clone());
            assert!(alone == *expected, "{name}: other bits without anybody else");
            // Images come while the first is being answered.
            let mut order = Vec::new();
            let mut heard = Heard::new();
            for request in requests() {
                order.push(engine.submit(request).unwrap());
                let num_heard = heard.get(&order[0]).map_or(0, Vec::len);
                while heard.get(&order[0]).map_or(0, Vec::len) < num_heard + 3 {
                    turn(&mut engine, &mut heard);
                }
            }
            while !engine.is_idle() {
                turn(&mut engine, &mut heard);
            }
            let found: Vec<_> = order.iter().map(|request| heard[request].clone()).collect();
            assert!(found == *expected, "{name}, {num_threads} threads: other bits beside others");
            expect_all_free(&engine);
        }
    }
}

/// Answers of free lengths, images among them, whenever they come: the tokens that each would get alone.
#[test]
fn tokens_do_not_depend_on_when_others_come() {
    let source = source();
    let free = |request: Request, num_new| Request { want_logits: false, max_new_tokens: num_new, ..request };
    let requests = || {
        (0..7).map(|index| {
            let request = if index % 3 == 1 { runner(&source, 1) } else { look(&source, index) };
            free(request, 5 + 7 * (index % 4))
        })
    };
    for budgets in [&[(Gpu(0), 64 * MIB)][..], &[(Gpu(0), 20 * MIB), (Gpu(1), 20 * MIB)]] {
        let plan = plan_for(&source, budgets, Policy::Throughput, LIMITS, DType::F32);
        let mut engine = engine(&source, &plan, DType::F32, 2);
        let alone: Vec<_> = requests().flat_map(|request| answers(&mut engine, vec![request])).collect();
        for num_between in [1, 2, 5] {
            let (mut order, mut heard) = (Vec::new(), Heard::new());
            for request in requests() {
                order.push(engine.submit(request).unwrap());
                for _ in 0..num_between {
                    turn(&mut engine, &mut heard);
                }
            }
            while !engine.is_idle() {
                turn(&mut engine, &mut heard);
            }
            let found: Vec<_> = order.iter().map(|request| heard[request].clone()).collect();
            assert!(found == alone, "{num_between} turns between requests");
            expect_all_free(&engine);
        }
    }
}

/// A prompt whose weights come slowly does not keep others from their tokens.
#[test]
fn decode_steps_pass_a_long_prompt() {
    let watched = Watched::new(source());
    for plan in streaming_plans(&watched.source) {
        let num_units: usize = plan.stages.iter().map(|stage| stage.units.len()).sum();
        for want_logits in [true, false] {
            let mut engine = engine_of(&watched, watched.source.spec(), &plan, DType::F32, 1);
            let mut heard = Heard::new();
            let running = engine.submit(Request { want_logits, ..runner(&watched.source, 80) }).unwrap();
            while heard.get(&running).map_or(0, Vec::len) < 3 {
                turn(&mut engine, &mut heard);
            }
            watched.delay(Duration::from_millis(2));
            let looking = engine.submit(look(&watched.source, 1)).unwrap();
            while !heard.contains_key(&looking) {
                turn(&mut engine, &mut heard);
            }
            watched.delay(Duration::ZERO);
            // One before every unit, but for those whose token was late. Else it would be one before the prompt, or two.
            let passed = heard[&running].len() - 3;
            assert!(passed >= num_units / 2, "{passed} tokens during a prompt of {num_units} units");
            while !engine.is_idle() {
                turn(&mut engine, &mut heard);
            }
            expect_all_free(&engine);
        }
    }
}

/// The prompt has its turns too: decode steps that are always there do not keep it from its end.
#[test]
fn prompts_get_their_turns() {
    let source = source();
    let plan = plan_for(&source, &[(Gpu(0), 20 * MIB), (Gpu(1), 20 * MIB)], Policy::Throughput, LIMITS, DType::F32);
    let mut engine = engine(&source, &plan, DType::F32, 1);
    let mut heard = Heard::new();
    // Two groups: while one is on the first rank, the other is on the second.
    let running: Vec<_> = (0..2).map(|_| engine.submit(runner(&source, 85)).unwrap()).collect();
    while heard.len() < 2 {
        turn(&mut engine, &mut heard);
    }
    let looking = engine.submit(look(&source, 1)).unwrap();
    while !heard.contains_key(&looking) {
        turn(&mut engine, &mut heard);
    }
    let num_units: usize = plan.stages.iter().map(|stage| stage.units.len()).sum();
    for request in &running {
        assert!(heard[request].len() < 85, "the prompt came last");
        assert!(heard[request].len() <= 4 * num_units, "the prompt waited for {} tokens", heard[request].len());
    }
}

/// Blocks of a prompt that is stopped on its way go to the next one, which comes after it everywhere.
#[test]
fn blocks_of_a_stopped_prompt_are_good_for_the_next() {
    let watched = Watched::new(source());
    let plan = streaming_plans(&watched.source).remove(0);
    let mut engine = engine_of(&watched, watched.source.spec(), &plan, DType::F32, 1);
    let long = |request: Request| Request { max_new_tokens: 60, ..request };
    let expected = [runner(&watched.source, 85), look(&watched.source, 2)]
        .into_iter()
        .flat_map(|request| answers(&mut engine, vec![request]))
        .collect::<Vec<_>>();
    let mut heard = Heard::new();
    let running = engine.submit(runner(&watched.source, 85)).unwrap();
    while heard.is_empty() {
        turn(&mut engine, &mut heard);
    }
    watched.delay(Duration::from_millis(1));
    // The prompt is under way when it is stopped; the next one gets its blocks.
    let stopped = engine.submit(long(look(&watched.source, 1))).unwrap();
    let before = heard[&running].len();
    while heard[&running].len() < before + 2 {
        turn(&mut engine, &mut heard);
    }
    assert!(!heard.contains_key(&stopped), "the prompt was at its end before it was stopped");
    let free = engine.block_pool().num_free();
    engine.stop(stopped);
    assert!(engine.block_pool().num_free() > free, "a prompt holds blocks");
    let looking = engine.submit(look(&watched.source, 2)).unwrap();
    while !engine.is_idle() {
        turn(&mut engine, &mut heard);
    }
    assert!([&heard[&running], &heard[&looking]].into_iter().eq(expected.iter()), "other bits");
    expect_all_free(&engine);
}

/// A prompt that fails between decode steps takes nobody with it.
#[test]
fn a_prompt_that_fails_on_its_way_leaves_the_others_as_they_are() {
    let watched = Watched::new(source());
    for plan in streaming_plans(&watched.source) {
        let mut engine = engine_of(&watched, watched.source.spec(), &plan, DType::F32, 1);
        let expected = answers(&mut engine, vec![runner(&watched.source, 85)]);
        let look_alone = answers(&mut engine, vec![look(&watched.source, 3)]);
        let mut heard = Heard::new();
        let running = engine.submit(runner(&watched.source, 85)).unwrap();
        while heard.is_empty() {
            turn(&mut engine, &mut heard);
        }
        watched.delay(Duration::from_micros(500));
        // In the vision tower, in the adapter, in the decoder.
        for num_read in [3, 20, 30, 40] {
            watched.fail_after(num_read);
            let failing = engine.submit(look(&watched.source, 1)).unwrap();
            let error = loop {
                match engine.step() {
                    Err(error) => break error,
                    Ok(report) => {
                        for event in report.expect("the first goes on").events {
                            if let Event::Token { request, id, logits } = event {
                                assert_ne!(request, failing, "{num_read} tensors are not enough");
                                heard.entry(request).or_default().push((id, logits.unwrap_or_default()));
                            }
                        }
                    }
                }
            };
            assert!(error.to_string().contains("not now"), "{error}");
            watched.recover();
            assert!(!engine.is_idle(), "the first has ended meanwhile");
        }
        let looking = engine.submit(look(&watched.source, 3)).unwrap();
        while !engine.is_idle() {
            turn(&mut engine, &mut heard);
        }
        watched.delay(Duration::ZERO);
        assert!(heard[&running] == expected[0], "other bits beside prompts that failed");
        assert!(heard[&looking] == look_alone[0], "other bits after prompts that failed");
        expect_all_free(&engine);
    }
}

/// With memory for one sequence there is nobody to pass: the engine works as it would without.
#[test]
fn one_sequence_at_a_time_needs_nothing_for_it() {
    let source = source();
    let limits = StepLimits { max_sequences: 1, ..LIMITS };
    let plan = plan_for(&source, &[(Gpu(0), 64 * MIB)], Policy::Auto, limits, DType::F32);
    let mut engine = engine(&source, &plan, DType::F32, 1);
    let ids: Vec<_> = [runner(&source, 4), look(&source, 1)].map(|request| engine.submit(request).unwrap()).into();
    let mut kinds = Vec::new();
    let mut reasons = BTreeMap::new();
    while let Some(report) = engine.step().unwrap() {
        kinds.push(report.kind);
        for event in report.events {
            if let Event::Finished { request, reason, .. } = event {
                reasons.insert(request, reason);
            }
        }
    }
    use StepKind::{Decode, Prefill};
    assert_eq!(kinds, [Prefill, Decode, Decode, Decode, Prefill]);
    assert!(ids.iter().all(|id| reasons[id] == FinishReason::Length));
    expect_all_free(&engine);
}
