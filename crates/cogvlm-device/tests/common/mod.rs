//! What tests of whole plans share: requests, and what comes of them.

use cogvlm_backend::{Backend, SamplingParams};
use cogvlm_checkpoint::ModelSource;
use cogvlm_core::tokens::TokenLayout;
use cogvlm_pipeline::{Engine, Event, Image, Request};

/// Text tokens of a prompt, the seed of its image if it has one, and how many new tokens are wanted.
pub(crate) type Case = (u32, Option<usize>, usize);

pub(crate) fn requests(source: &ModelSource, cases: &[Case], want_logits: bool) -> Vec<Request> {
    let size = source.spec().vision.image_size;
    let image = |seed: usize| Image {
        pixels: (0..3 * size * size).map(|index| ((index * 37 + seed) % 101) as f32 / 50.0 - 1.0).collect(),
    };
    let request = |&(num_text, seed, max_new_tokens): &Case| Request {
        layout: TokenLayout::new(
            source.spec(),
            seed.is_some(),
            &(0..num_text).map(|index| index * 97 + 5).collect::<Vec<_>>(),
        ),
        image: seed.map(image),
        params: SamplingParams::default(),
        max_new_tokens,
        ignore_eos: true,
        forced: None,
        want_logits,
        capture: false,
        prefix: None,
        keep_cache: false,
    };
    cases.iter().map(request).collect()
}

/// Tokens of every request, and the logits of every token.
pub(crate) type Answers = (Vec<Vec<u32>>, Vec<Vec<Vec<f32>>>);

pub(crate) fn answers<B: Backend>(engine: &mut Engine<B>, requests: Vec<Request>) -> Answers {
    let order: Vec<_> = requests.into_iter().map(|request| engine.submit(request).unwrap()).collect();
    let (mut tokens, mut all_logits) = (vec![Vec::new(); order.len()], vec![Vec::new(); order.len()]);
    while let Some(report) = engine.step().unwrap_or_else(|error| panic!("{error}")) {
        for event in report.events {
            if let Event::Token { request, id, logits } = event {
                let index = order.iter().position(|known| *known == request).unwrap();
                tokens[index].push(id);
                all_logits[index].extend(logits);
            }
        }
    }
    (tokens, all_logits)
}

/// The same, one after the other: how many sequences are decoded together may change the last bits of long contexts.
pub(crate) fn answers_alone<B: Backend>(engine: &mut Engine<B>, requests: Vec<Request>) -> Answers {
    let alone = requests.into_iter().map(|request| answers(engine, vec![request]));
    let (tokens, logits): (Vec<_>, Vec<_>) = alone.unzip();
    (tokens.concat(), logits.concat())
}
