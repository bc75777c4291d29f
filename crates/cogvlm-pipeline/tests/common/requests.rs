//! What tests of engines share, those of crates above too: requests, and what comes of them.
#![allow(dead_code, reason = "every test target uses some of it")]

use cogvlm_backend::{Backend, SamplingParams};
use cogvlm_checkpoint::ModelSource;
use cogvlm_core::tokens::TokenLayout;
use cogvlm_pipeline::{Engine, Event, Image, Request, RequestId};

pub(crate) fn image(source: &ModelSource, seed: usize) -> Image {
    let size = source.spec().vision.image_size;
    Image { pixels: (0..3 * size * size).map(|index| ((index * 37 + seed) % 101) as f32 / 50.0 - 1.0).collect() }
}

pub(crate) fn request(source: &ModelSource, text: &[u32], image: Option<Image>, num_new: usize) -> Request {
    Request {
        layout: TokenLayout::new(source.spec(), image.is_some(), text),
        image,
        params: SamplingParams::default(),
        max_new_tokens: num_new,
        ignore_eos: true,
        forced: None,
        want_logits: true,
        capture: false,
        prefix: None,
        keep_cache: false,
    }
}

/// Text tokens of a prompt, the seed of its image if it has one, and how many new tokens are wanted.
pub(crate) type Case = (u32, Option<usize>, usize);

pub(crate) fn requests(source: &ModelSource, cases: &[Case], want_logits: bool) -> Vec<Request> {
    let of_case = |&(num_text, seed, num_new): &Case| {
        let text: Vec<u32> = (0..num_text).map(|index| index * 97 + 5).collect();
        let image = seed.map(|seed| image(source, seed));
        Request { want_logits, ..request(source, &text, image, num_new) }
    };
    cases.iter().map(of_case).collect()
}

/// Tokens of every request, in order of submission, and the logits of every token, where they are wanted.
pub(crate) type Answers = (Vec<Vec<u32>>, Vec<Vec<Vec<f32>>>);

pub(crate) fn answers<B: Backend>(engine: &mut Engine<B>, requests: Vec<Request>) -> Answers {
    let order: Vec<RequestId> = requests.into_iter().map(|request| engine.submit(request).unwrap()).collect();
    let (mut tokens, mut all_logits) = (vec![Vec::new(); order.len()], vec![Vec::new(); order.len()]);
    while let Some(report) = engine.step().unwrap_or_else(|error| panic!("{error}")) {
        for event in report.events {
            if let Event::Token { request, id, logits } = event {
                let index = order.iter().position(|known| *known == request).unwrap();
                tokens[index].push(id);
                all_logits[index].push(logits.unwrap_or_default());
            }
        }
    }
    (tokens, all_logits)
}

/// The same, one after the other: whose rows are computed together depends on when they come, and may change last bits.
pub(crate) fn answers_alone<B: Backend>(engine: &mut Engine<B>, requests: Vec<Request>) -> Answers {
    let alone = requests.into_iter().map(|request| answers(engine, vec![request]));
    let (tokens, logits): (Vec<_>, Vec<_>) = alone.unzip();
    (tokens.concat(), logits.concat())
}
