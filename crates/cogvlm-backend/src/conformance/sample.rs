use cogvlm_core::DType;

use super::approx::assert_same_bits;
use super::data::{Random, garbage};
use super::harness::{buffer, load, refuses, refuses_shape, typed_buffer};
use super::{Make, VecTensor};
use crate::oracle::round_to;
use crate::{Backend, SampleRequest, SamplingParams, sampling};

/// The tokens of [`sampling::sample`].
///
/// A draw may fall between two tokens so nearly that the last bits of an exponential decide; such draws, where the
/// answer changes with the temperature's last bits, are left out. They are few.
pub fn sample<B: Backend>(make: Make<'_, B>) {
    let backend = make();
    let mut random = Random::new(111);
    let greedy = SamplingParams::default();
    let params = [
        greedy.clone(),
        SamplingParams { repetition_penalty: 3.0, ..greedy.clone() },
        SamplingParams { temperature: 0.8, top_k: 50, top_p: 0.8, seed: 1, ..greedy.clone() },
        SamplingParams { temperature: 0.8, top_k: 1, top_p: 0.4, seed: 2, ..greedy.clone() },
        SamplingParams { temperature: 1.5, repetition_penalty: 1.2, seed: u64::MAX, ..greedy.clone() },
        SamplingParams { temperature: 1e-3, top_p: 0.9, seed: 4, ..greedy },
    ];
    let (mut num_compared, mut num_left_out) = (0, 0);
    for vocab_size in [1, 7, 1000, 32000] {
        let rows = if vocab_size < 32000 { 12 } else { 6 };
        let mut logits = random.values(DType::Bf16, (rows + 1) * vocab_size, 3.0);
        // Ties: the first row's best score stands twice more.
        let best = sampling::argmax(&logits[..vocab_size]) as usize;
        let score = logits[best];
        logits[vocab_size - 1] = score;
        logits[vocab_size / 2] = score;
        let held = typed_buffer(&backend, DType::F32, rows + 1, vocab_size, &logits);
        // The favourite of every row has been seen, as have ids that are not in the vocabulary.
        let favourites = logits.chunks_exact(vocab_size).map(sampling::argmax);
        let seen: Vec<u32> = favourites.chain([0, 0, vocab_size as u32, u32::MAX]).collect();
        let requests: Vec<SampleRequest<'_>> = (0..rows)
            .map(|row| SampleRequest { params: &params[row % params.len()], seen: &seen, index: row as u64 * 7 })
            .collect();
        let sample = |requests: &[SampleRequest<'_>]| {
            let sampled = backend.sample(&held, requests).unwrap_or_else(|error| panic!("sample: {error}"));
            // Tokens chosen meanwhile are others.
            drop(backend.sample(&held, &requests[..requests.len().min(1)]).expect("one row is some rows"));
            backend.sampled(&sampled).unwrap_or_else(|error| panic!("sampled: {error}"))
        };
        let tokens = sample(&requests);
        assert_eq!(tokens.len(), rows, "a token for each request");
        assert_eq!(tokens, sample(&requests), "the same seeds, the same tokens");
        for (row, request) in requests.iter().enumerate() {
            let logits = &logits[row * vocab_size..][..vocab_size];
            let at = |factor: f32| {
                let params =
                    SamplingParams { temperature: request.params.temperature * factor, ..request.params.clone() };
                sampling::sample(logits, &SampleRequest { params: &params, ..*request })
            };
            if at(1.0 - 1e-5) == at(1.0 + 1e-5) {
                assert_eq!(tokens[row], at(1.0), "row {row} of {vocab_size} tokens, {:?}", request.params);
                num_compared += 1;
            } else {
                num_left_out += 1;
            }
        }
        assert!(sample(&[]).is_empty(), "no requests, no tokens");
        let too_many = vec![requests[0]; rows + 2];
        refuses_shape("sample: more requests than rows", backend.sample(&held, &too_many));
    }
    assert!(num_left_out * 10 <= num_compared, "{num_left_out} draws left out, {num_compared} compared");
}

/// Rows of the table for tokens that were just chosen, and for tokens that were chosen before others.
pub fn embed_sampled<B: Backend>(make: Make<'_, B>) {
    const WIDTH: usize = 40;
    let backend = make();
    let dtype = backend.activation_dtype();
    let mut random = Random::new(112);
    for (vocab_size, rows) in [(13, 1), (13, 5), (601, 530)] {
        let logits = random.values(DType::F32, rows * vocab_size, 3.0);
        let held = typed_buffer(&backend, DType::F32, rows, vocab_size, &logits);
        let params = SamplingParams::default();
        let request = |index| SampleRequest { params: &params, seen: &[], index };
        let requests: Vec<SampleRequest<'_>> = (0..rows as u64).map(request).collect();
        let values = random.values(DType::F32, vocab_size * WIDTH, 1.0);
        for table_dtype in [dtype, DType::F16] {
            let table = VecTensor::new("embed", table_dtype, &[vocab_size, WIDTH], &values);
            let loaded = load(&backend, &table);
            let attached = backend.attach(&table.shared()).expect("a mapped weight can be attached");
            let sampled = backend.sample(&held, &requests).expect("greedy rows can be sampled");
            drop(backend.sample(&held, &requests[..1]).expect("greedy rows can be sampled"));
            let best = logits.chunks_exact(vocab_size).map(|row| sampling::argmax(row) as usize);
            let rows_of_table = best.flat_map(|id| table.values()[id * WIDTH..][..WIDTH].to_vec());
            let expected: Vec<f32> = rows_of_table.map(|value| round_to(dtype, f64::from(value))).collect();
            for table in [&loaded, &attached] {
                let mut hidden = buffer(&backend, rows, WIDTH, &garbage(dtype, rows * WIDTH));
                backend.embed_sampled(table, &sampled, &mut hidden).expect("every token is in the table");
                let found = backend.read(&hidden, 0..rows).expect("all rows are there");
                assert_same_bits("embed_sampled", &found, &expected);
            }
            let mut short = buffer(&backend, rows - 1, WIDTH, &[]);
            refuses_shape("embed_sampled: too few rows", backend.embed_sampled(&loaded, &sampled, &mut short));
        }
    }
    let held = typed_buffer(&backend, DType::F32, 1, 3, &[0.0, 0.0, 1.0]);
    let params = SamplingParams::default();
    let sampled = backend.sample(&held, &[SampleRequest { params: &params, seen: &[], index: 0 }]).expect("one row");
    let small = load(&backend, &VecTensor::new("embed", dtype, &[2, WIDTH], &[0.5; 2 * WIDTH]));
    let mut hidden = buffer(&backend, 1, WIDTH, &[]);
    refuses("embed_sampled: a table of fewer tokens", backend.embed_sampled(&small, &sampled, &mut hidden));
}
