//! `demo`: the main job on a fresh machine.

use std::path::Path;

use crate::answer;
use crate::args::{
    BackendArg, ClusterArgs, DTypeArg, ModelArgs, PlacementArgs, PolicyArg, RopeArg, SamplingArgs, TransportArg,
};
use crate::error::CliResult;
use crate::output::{note, print, print_line};
use crate::prompt::layout_of_text;
use crate::session::{Session, open_source};
use cogvlm_input::Tokenizer;
use cogvlm_pipeline::{Image, Request};

/// The photograph of tests/data, and the synthetic tokenizer of tests/goldens: the executable needs no file.
const PHOTO: &[u8] = include_bytes!("../../../../tests/data/photo.jpg");
const TOKENIZER: &[u8] = include_bytes!("../../../../tests/goldens/tokenizer.model");

const MODEL: &str = "small@12";
/// Two virtual ranks that together cannot hold the model, and host memory for the rest.
const MAX_MEMORY: &str = "0:70MiB,1:70MiB,cpu:256MiB";
const QUESTION: &str = "What is in the cup?";

pub(crate) fn run() -> CliResult {
    note(&format!(
        "This is the whole way of a request on synthetic weights: `{MODEL}` is random numbers in the shape of a small CogVLM.\n\
         It shows that planning, loading, two ranks and streaming from host memory work. The words of the answer mean nothing.\n"
    ));
    let args = ModelArgs {
        model: MODEL.to_owned(),
        placement: PlacementArgs {
            max_memory: Some(MAX_MEMORY.to_owned()),
            policy: PolicyArg::Auto,
            tensor_parallel: None,
            context: Some(1536),
            batch: None,
            links: None,
            transport: TransportArg::Auto,
        },
        device_map: None,
        backend: BackendArg::Cpu,
        dtype: DTypeArg::Bf16,
        rope: RopeArg::Float32,
        threads: None,
        cluster: ClusterArgs::default(),
    };
    note(&format!("$ cogvlm-shard plan {MODEL} --backend cpu --max-memory {MAX_MEMORY} --context 1536"));
    let Some(mut session) = Session::open(&args, open_source(MODEL)?, true)? else { return Ok(()) };
    let tokenizer = Tokenizer::from_sentencepiece(TOKENIZER, Path::new("tokenizer.model"))?;
    let spec = session.engine.spec().clone();
    let photo = cogvlm_input::image::decode_image(PHOTO)?;
    let image = Image { pixels: cogvlm_input::image::preprocess(&photo, spec.vision.image_size).into() };
    let (prompt, layout) = layout_of_text(&spec, &tokenizer, spec.template, QUESTION, &[], true)?;
    let num_prompt = layout.input_ids.len();
    note(&format!(
        "\nimage: tests/data/photo.jpg, {} x {} pixels\nprompt: {prompt} ({num_prompt} tokens with the image's)\nanswer:",
        photo.width(),
        photo.height()
    ));
    let sampling = SamplingArgs {
        max_new_tokens: Some(24),
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        repetition_penalty: 1.0,
        seed: 0,
        stop: Vec::new(),
    };
    let request = Request {
        layout,
        image: Some(image),
        params: answer::sampling_params(&sampling)?,
        max_new_tokens: 24,
        ignore_eos: false,
        forced: None,
        want_logits: false,
        capture: false,
        prefix: None,
        keep_cache: false,
    };
    let answer = answer::run(&mut session.engine, request, Some(&tokenizer), &[], &mut |text| print(text))?;
    print_line("")?;
    let timings = &answer.timings;
    let decode_s = timings.decode.as_secs_f64();
    note(&format!(
        "\nloaded in {:.0} ms, first token after {:.0} ms, then {:.1} tokens/s",
        session.load_time.as_secs_f64() * 1e3,
        timings.first_token.as_secs_f64() * 1e3,
        timings.num_decode_steps as f64 / decode_s.max(1e-9)
    ));
    for (device, memory) in session.engine.memory() {
        let (peak, capacity) = (memory.peak as f64 / 1e6, memory.capacity as f64 / 1e6);
        note(&format!("rank {device}: at most {peak:.1} MB of the {capacity:.1} MB planned"));
    }
    Ok(())
}
