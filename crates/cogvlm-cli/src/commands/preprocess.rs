//! `preprocess`: an image as the model reads it.

use crate::args::PreprocessArgs;
use crate::commands::generate::write_tensors;
use crate::error::CliResult;
use crate::output::OutputFile;

pub(crate) fn run(args: &PreprocessArgs) -> CliResult {
    let size = args.size as usize;
    let out = OutputFile::create(&args.out)?;
    let image = cogvlm_input::image::load_image(&args.image)?;
    let pixels = cogvlm_input::image::preprocess(&image, size);
    write_tensors(out, &[("pixel_values", vec![3, size, size], &pixels)])
}
