use cogvlm_core::DType;

use super::Make;
use super::data::Random;
use super::harness::{refuses_shape, typed_buffer};
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
        let tokens = backend.sample(&held, &requests).unwrap_or_else(|error| panic!("sample: {error}"));
        assert_eq!(tokens.len(), rows, "a token for each request");
        assert_eq!(tokens, backend.sample(&held, &requests).expect("as before"), "the same seeds, the same tokens");
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
        assert!(backend.sample(&held, &[]).expect("no requests, no tokens").is_empty());
        let too_many = vec![requests[0]; rows + 2];
        refuses_shape("sample: more requests than rows", backend.sample(&held, &too_many));
    }
    assert!(num_left_out * 10 <= num_compared, "{num_left_out} draws left out, {num_compared} compared");
}
