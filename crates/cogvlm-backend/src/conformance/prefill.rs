use cogvlm_core::tokens::ExpertRange;

use super::Make;
use super::approx::{Approx, assert_within};
use super::attention::expected_rows;
use super::batches::{self, Routing};
use super::data::garbage;
use super::harness::{Case, EXTRA_ROWS, buffer, load};
use super::qkv_rope_append::QkvRopeAppend;
use crate::oracle::kv_row_len;
use crate::{Backend, Batch, RopeMode};

/// A prompt in one step, and in chunks that end with single tokens: the same queries, the same cache, the same
/// attention, up to twice the bounds of one.
pub fn chunked_prefill<B: Backend>(make: Make<'_, B>) {
    const NUM_TOKENS: usize = 70;
    let backend = make();
    let dtype = backend.activation_dtype();
    for mode in [RopeMode::Float32, RopeMode::Published] {
        let whole = QkvRopeAppend::new([dtype; 2], [4, 2, 24], 40, &[(NUM_TOKENS, NUM_TOKENS)], Routing::Image, mode);
        let weights: Vec<B::Weight> = whole.weights().iter().map(|tensor| load(&backend, tensor)).collect();
        let (width, kv_row) = (whole.query_width(), kv_row_len(whole.heads));
        let cache = || buffer(&backend, whole.num_blocks, kv_row, &garbage(dtype, whole.num_blocks * kv_row));
        let queries = || {
            let rows = NUM_TOKENS + EXTRA_ROWS;
            buffer(&backend, rows, width, &garbage(dtype, rows * width))
        };
        let read = |buffer: &B::Buffer, rows: usize| backend.read(buffer, 0..rows).expect("rows fit");

        let (mut query, mut kv) = (queries(), cache());
        whole.run_on(&backend, &weights, &mut query, &mut kv).expect("the whole prompt fits");
        let mut out = queries();
        backend
            .attention(&query, &kv, whole.heads, &batches::tables(&backend, &whole.batch), &mut out)
            .expect("it fits");
        let [whole_query, whole_out] = [&query, &out].map(|buffer| read(buffer, NUM_TOKENS));
        let whole_kv = read(&kv, whole.num_blocks);
        let whole_qkv = [read(&query, NUM_TOKENS + EXTRA_ROWS), whole_kv.clone()].concat();
        let expected_out = expected_rows(&whole_query, &whole_kv, whole.heads, &whole.batch.sequences, dtype);

        let mut chunked_kv = cache();
        let (mut chunked_query, mut chunked_out) = (Vec::new(), Vec::new());
        let mut first = 0;
        for num_rows in [1, 16, 30, 21, 1, 1] {
            let chunk = chunk(&whole, first, num_rows);
            let mut query = queries();
            // With the weights of both experts, whichever has rows.
            chunk.run_on(&backend, &weights, &mut query, &mut chunked_kv).expect("a chunk fits");
            chunked_query.extend(read(&query, num_rows));
            // Attention over the cache of the whole prompt, so that the two differ by attention alone: the chunk sees
            // none of the tokens behind it.
            backend.write(&whole_query[first * width..][..num_rows * width], &mut query, 0).expect("rows fit");
            let tables = batches::tables(&backend, &chunk.batch);
            let mut out = queries();
            backend.attention(&query, &kv, chunk.heads, &tables, &mut out).expect("a chunk fits");
            chunked_out.extend(read(&out, num_rows));
            first += num_rows;
        }
        assert_eq!(first, NUM_TOKENS);
        let beyond = &whole_qkv[NUM_TOKENS * width..(NUM_TOKENS + EXTRA_ROWS) * width];
        chunked_query.extend(beyond);
        let chunked_qkv = [chunked_query, read(&chunked_kv, whole.num_blocks)].concat();
        assert_within("queries and cache in chunks", &chunked_qkv, &around(&whole_qkv, &whole.expected()));
        assert_within("attention in chunks", &chunked_out, &around(&whole_out, &expected_out));
    }
}

/// What another right answer may be where `found` is one.
fn around(found: &[f32], expected: &[Approx]) -> Vec<Approx> {
    let around = |(&found, expected): (&f32, &Approx)| Approx::new(f64::from(found), 2.0 * expected.error);
    found.iter().zip(expected).map(around).collect()
}

/// `num_rows` tokens of a prompt from `first` on, where those before them are cached.
fn chunk(whole: &QkvRopeAppend, first: usize, num_rows: usize) -> QkvRopeAppend {
    let rows = first..first + num_rows;
    let cut = |range: &ExpertRange| {
        let (start, end) = (range.rows.start.max(rows.start), range.rows.end.min(rows.end));
        (start < end).then(|| ExpertRange { rows: start - first..end - first, expert: range.expert })
    };
    let mut sequence = whole.batch.sequences[0].clone();
    (sequence.rows, sequence.context_len) = (0..num_rows, rows.end);
    let batch = Batch {
        input_ids: whole.batch.input_ids[rows.clone()].to_vec(),
        position_ids: whole.batch.position_ids[rows.clone()].to_vec(),
        expert_ranges: whole.batch.expert_ranges.iter().filter_map(cut).collect(),
        sequences: vec![sequence],
        logit_rows: vec![num_rows - 1],
    };
    // `EXTRA_ROWS` rows beyond, which are the next tokens of the prompt.
    let x = whole.x[first * whole.hidden_size..][..(num_rows + EXTRA_ROWS) * whole.hidden_size].to_vec();
    QkvRopeAppend { batch, x, ..whole.clone() }
}
