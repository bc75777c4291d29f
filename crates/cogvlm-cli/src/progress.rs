//! Progress of long work: bytes, rate, time left; on stderr, and only where someone watches.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar over `total_bytes` called `title`.
pub(crate) fn byte_bar(title: &'static str, total_bytes: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}, {eta} left",
    )
    .expect("the template is a constant, parsed by every run of a test")
    .progress_chars("=> ");
    let bar = ProgressBar::with_draw_target(Some(total_bytes), ProgressDrawTarget::stderr_with_hz(8));
    bar.set_style(style);
    bar.set_message(title);
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}
