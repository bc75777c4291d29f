use cogvlm_core::DType;
use cogvlm_core::workspace::StepLimits;

use super::approx::{Approx, UNIT_F32, assert_beyond, rounded_terms_error, sum_error, unit};
use super::batches::{self, Routing};
use super::data::{Random, garbage};
use super::harness::{Case, EXTRA_ROWS, buffer, devices, refuses, refuses_shape, verify, verify_rejects};
use super::{Make, VecTensor};
use crate::oracle::{self, KvPart, kv_index, kv_row_len};
use crate::{Backend, BackendError, Batch, HeadGeometry, SequenceRows};

/// Query heads, key/value heads, head width.
pub(crate) fn heads([num_heads, num_kv_heads, head_dim]: [usize; 3]) -> HeadGeometry {
    HeadGeometry { num_heads, num_kv_heads, head_dim }
}

/// `softmax(q kᵀ / √head_dim) v` of one query. An error `e` of the scores changes each probability by a factor of up to
/// `exp(2e)`, its own score and the total going apart. 16-bit backends may round the probabilities before the product
/// with v, as the unfused path of the reference model does.
pub(crate) fn expected_head(query: &[f32], keys: &[&[f32]], values: &[&[f32]], dtype: DType) -> Vec<Approx> {
    let scale = 1.0 / (query.len() as f64).sqrt();
    let scores: Vec<Approx> = keys.iter().map(|key| Approx::dot(query, key, 0.0)).collect();
    let best = scores.iter().map(|score| score.value * scale).fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score.value * scale - best).exp()).collect();
    let total: f64 = weights.iter().sum();
    // The product with the scale, the difference to the best, the change to base 2: a few units of the score.
    let score_error = scores.iter().map(|score| score.error * scale + 6.0 * UNIT_F32 * score.value.abs() * scale);
    let relative = (2.0 * score_error.fold(0.0, f64::max)).exp_m1() + 2.0 * sum_error(keys.len()) + 8.0 * UNIT_F32;
    let probability_unit = if dtype == DType::F32 { 0.0 } else { unit(dtype) };
    (0..query.len())
        .map(|column| {
            let (mut sum, mut magnitude, mut squares) = (0.0, 0.0, 0.0);
            for (weight, value) in weights.iter().zip(values) {
                let term = weight / total * f64::from(value[column]);
                sum += term;
                magnitude += term.abs();
                squares += term * term;
            }
            let rounded_probabilities = rounded_terms_error(probability_unit, magnitude, squares);
            Approx::new(sum, relative * magnitude + rounded_probabilities).rounded(dtype)
        })
        .collect()
}

/// The expected output of a whole batch.
pub(crate) fn expected_rows(
    query: &[f32], kv: &[f32], heads: HeadGeometry, sequences: &[SequenceRows], dtype: DType,
) -> Vec<Approx> {
    let HeadGeometry { num_heads, num_kv_heads, head_dim } = heads;
    let mut expected = Vec::new();
    for sequence in sequences {
        for (index, row) in sequence.rows.clone().enumerate() {
            let num_keys = sequence.first_token() + index + 1;
            for head in 0..num_heads {
                let cached = |part| {
                    let at = |token| {
                        let slot = sequence.slot(token).expect("a token has a slot");
                        &kv[kv_index(heads, slot, part, head * num_kv_heads / num_heads)..][..head_dim]
                    };
                    (0..num_keys).map(at).collect::<Vec<_>>()
                };
                let query = &query[(row * num_heads + head) * head_dim..][..head_dim];
                expected.extend(expected_head(query, &cached(KvPart::Key), &cached(KvPart::Value), dtype));
            }
        }
    }
    expected
}

#[derive(Clone)]
struct Attention {
    dtype: DType,
    heads: HeadGeometry,
    batch: Batch,
    num_blocks: usize,
    /// Rows beyond included.
    query: Vec<f32>,
    kv: Vec<f32>,
}

impl Attention {
    /// Queries of size about `scale`. Keys and values are of size 1 where a sequence has tokens, and enormous in every
    /// other slot: whoever looks there is found out.
    fn new(dtype: DType, heads: HeadGeometry, sequences: &[(usize, usize)], scale: f32) -> Self {
        let mut random = Random::new(81);
        let (batch, num_blocks) = batches::batch(&mut random, sequences, Routing::Language, 100);
        let width = heads.num_heads * heads.head_dim;
        let query = random.values(dtype, (batch.num_rows() + EXTRA_ROWS) * width, scale);
        let stale = |index| oracle::round_to(dtype, if index % 2 == 0 { 1e30 } else { -1e30 });
        let mut kv: Vec<f32> = (0..num_blocks * kv_row_len(heads)).map(stale).collect();
        for sequence in &batch.sequences {
            for token in 0..sequence.context_len {
                let slot = sequence.slot(token).expect("a token has a slot");
                for kv_head in 0..heads.num_kv_heads {
                    for part in [KvPart::Key, KvPart::Value] {
                        kv[kv_index(heads, slot, part, kv_head)..][..heads.head_dim].copy_from_slice(&random.values(
                            dtype,
                            heads.head_dim,
                            1.0,
                        ));
                    }
                }
            }
        }
        Self { dtype, heads, batch, num_blocks, query, kv }
    }

    fn width(&self) -> usize {
        self.heads.num_heads * self.heads.head_dim
    }

    fn used(&self) -> &[f32] {
        &self.query[..self.batch.num_rows() * self.width()]
    }

    fn before(&self) -> Vec<f32> {
        garbage(self.dtype, self.query.len())
    }
}

impl Case for Attention {
    fn label(&self) -> String {
        let sequences = self.batch.sequences.iter().map(|sequence| (sequence.rows.len(), sequence.context_len));
        format!("attention {:?}, (rows, context) {:?}", self.heads, sequences.collect::<Vec<_>>())
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn weights(&self) -> Vec<VecTensor> {
        Vec::new()
    }

    fn run<B: Backend>(&self, backend: &B, _weights: &[B::Weight]) -> Result<Vec<f32>, BackendError> {
        let all_rows = self.batch.num_rows() + EXTRA_ROWS;
        let query = buffer(backend, all_rows, self.width(), &self.query);
        let kv = buffer(backend, self.num_blocks, kv_row_len(self.heads), &self.kv);
        let mut out = buffer(backend, all_rows, self.width(), &self.before());
        backend.attention(&query, &kv, self.heads, &batches::tables(backend, &self.batch), &mut out)?;
        backend.read(&out, 0..all_rows)
    }

    fn expected(&self) -> Vec<Approx> {
        let mut expected = expected_rows(self.used(), &self.kv, self.heads, &self.batch.sequences, self.dtype);
        expected.extend(self.before()[expected.len()..].iter().map(|&value| Approx::exact(value)));
        expected
    }

    fn oracle(&self, dtype: DType) -> Vec<f32> {
        let mut out = oracle::attention(self.used(), &self.kv, self.heads, &self.batch.sequences, dtype);
        out.extend(&self.before()[out.len()..]);
        out
    }

    fn roundings_are_fixed(&self) -> bool {
        false
    }
}

/// Causal attention over the paged cache, in prefill, in decode and in between.
pub fn attention<B: Backend>(make: Make<'_, B>) {
    let devices = devices(make);
    let backend = &devices[0];
    let dtype = backend.activation_dtype();
    let mixed: &[(usize, usize)] = &[(33, 33), (1, 40), (7, 23), (1, 1), (16, 32), (1, 16), (2, 17)];
    for geometry in [[2, 2, 128], [4, 2, 128], [1, 1, 112], [3, 1, 32], [4, 2, 24], [3, 3, 10], [2, 1, 6]] {
        for sequences in [&[][..], &[(1, 1)], &[(1, 17)], &[(65, 130)], mixed] {
            verify(&devices, &Attention::new(dtype, heads(geometry), sequences, 1.0));
        }
    }
    for rows in [2, 8, 9, 15, 16, 17, 64, 130] {
        verify(&devices, &Attention::new(dtype, heads([2, 1, 24]), &[(rows, rows)], 1.0));
    }
    verify(&devices, &Attention::new(dtype, heads([2, 2, 128]), &[(1, 1260), (1, 700)], 2.0));
    // So many keys that each part of them, in which a device takes them, is long.
    for geometry in [[2, 2, 128], [4, 2, 128]] {
        verify(&devices, &Attention::new(dtype, heads(geometry), &[(1, 6001), (1, 30)], 1.0));
    }
    if dtype == DType::Bf16 {
        verify(&devices, &Attention::new(dtype, heads([1, 1, 128]), &[(1, 66_100)], 1.0));
    }
    verify(&devices, &Attention::new(dtype, heads([1, 1, 24]), &[(1, 33); 20], 1.0));
    // Scores of ten thousand and more, and queries of zero: a plain mean.
    for scale in [1e4, 0.0] {
        verify(&devices, &Attention::new(dtype, heads([2, 1, 32]), mixed, scale));
    }

    let case = Attention::new(dtype, heads([4, 2, 32]), &[(20, 40), (1, 33)], 1.0);
    verify(&devices, &case);
    let altered = |alter: &dyn Fn(&mut Attention)| {
        let mut altered = case.clone();
        alter(&mut altered);
        altered
    };
    let one_key_less = altered(&|case| case.batch.sequences[0].context_len -= 1);
    verify_rejects(&case, "every row sees one key less", &one_key_less);
    let blocks_swapped = altered(&|case| case.batch.sequences[0].blocks.swap(0, 1));
    verify_rejects(&case, "blocks in another order", &blocks_swapped);
    let sequences_mixed = altered(&|case| case.batch.sequences[1].blocks = case.batch.sequences[0].blocks.clone());
    verify_rejects(&case, "another sequence's blocks", &sequences_mixed);
    let root = 32f64.sqrt();
    let unscaled = altered(&|case| {
        case.query.iter_mut().for_each(|query| *query = (f64::from(*query) * root) as f32);
    });
    verify_rejects(&case, "no scale", &unscaled);
    // Query heads 0 1 2 3 with key/value heads 0 1 0 1: as though 1 and 2 changed places and changed back.
    let exchange = |rows: &mut [f32]| {
        rows.chunks_exact_mut(4 * 32).for_each(|row| {
            let (left, right) = row.split_at_mut(2 * 32);
            left[32..].swap_with_slice(&mut right[..32]);
        });
    };
    let mut interleaved = altered(&|case| exchange(&mut case.query)).oracle(dtype);
    exchange(&mut interleaved);
    assert_beyond("attention, key/value heads interleaved", &interleaved, &case.expected());

    let attempt = |what: &str, geometry: [usize; 3], query: [usize; 2], kv: [usize; 2], out: [usize; 2]| {
        let tables = batches::tables(backend, &case.batch);
        let [query, kv] = [query, kv].map(|[rows, width]| buffer(backend, rows, width, &[]));
        let mut out = buffer(backend, out[0], out[1], &[]);
        refuses_shape(what, backend.attention(&query, &kv, heads(geometry), &tables, &mut out));
    };
    let (rows, kv_row) = ([21, 128], kv_row_len(case.heads));
    let kv = [case.num_blocks, kv_row];
    attempt("attention: fewer queries than rows", [4, 2, 32], [20, 128], kv, rows);
    attempt("attention: fewer rows in out", [4, 2, 32], rows, kv, [20, 128]);
    attempt("attention: queries of another width", [4, 2, 32], [21, 127], kv, rows);
    attempt("attention: out of another width", [4, 2, 32], rows, kv, [21, 129]);
    attempt("attention: cache of another width", [4, 2, 32], rows, [case.num_blocks, kv_row - 1], rows);
    attempt("attention: other heads than the buffers", [2, 2, 32], rows, kv, rows);
    attempt("attention: heads that do not share evenly", [4, 3, 32], rows, [case.num_blocks, 3 * kv_row / 2], rows);
    let last_block = case.batch.sequences.iter().flat_map(|sequence| &sequence.blocks).max().expect("it has blocks");
    attempt("attention: blocks beyond the cache", [4, 2, 32], rows, [*last_block as usize, kv_row], rows);
}

/// Batches that contradict themselves or exceed the tables are refused when they are set.
pub fn set_batch<B: Backend>(make: Make<'_, B>) {
    let backend = make();
    let (good, _) = batches::batch(&mut Random::new(82), &[(3, 20), (1, 33)], Routing::Language, 100);
    let limits = batches::limits(&good);
    let attempt = |limits: &StepLimits, alter: &dyn Fn(&mut Batch)| {
        let mut batch = good.clone();
        alter(&mut batch);
        let mut tables = backend.tables(limits).unwrap_or_else(|error| panic!("tables: {error}"));
        backend.set_batch(&mut tables, &batch)
    };
    attempt(&limits, &|_| ()).expect("a batch that fills its tables is taken");
    let roomy = StepLimits { max_tokens: 100, max_sequences: 9, max_images: 2, context_len: 400, parcels: 0 };
    attempt(&roomy, &|_| ()).expect("a batch smaller than its tables is taken");
    attempt(&limits, &|batch| *batch = Batch::default()).expect("an empty batch is taken");

    let less = |alter: &dyn Fn(&mut StepLimits)| {
        let mut limits = limits;
        alter(&mut limits);
        attempt(&limits, &|_| ())
    };
    refuses_shape("set_batch: more rows than the limits", less(&|limits| limits.max_tokens -= 1));
    refuses_shape("set_batch: more sequences than the limits", less(&|limits| limits.max_sequences -= 1));
    refuses_shape("set_batch: a context beyond the limits", less(&|limits| limits.context_len -= 1));
    let wrong = |what: &str, alter: &dyn Fn(&mut Batch)| refuses_shape(what, attempt(&roomy, alter));
    wrong("set_batch: too few position ids", &|batch| batch.position_ids.truncate(3));
    wrong("set_batch: sequences that end early", &|batch| drop(batch.sequences.pop()));
    wrong("set_batch: sequences that go on beyond the rows", &|batch| batch.sequences[1].rows.end += 1);
    wrong("set_batch: a gap between sequences", &|batch| batch.sequences[0].rows.end -= 1);
    wrong("set_batch: a context shorter than its rows", &|batch| batch.sequences[0].context_len = 2);
    wrong("set_batch: too few blocks", &|batch| batch.sequences[1].blocks.truncate(2));
    wrong("set_batch: a context far beyond its blocks", &|batch| batch.sequences[1].context_len = usize::MAX);
    wrong("set_batch: logits of a row that is not there", &|batch| batch.logit_rows.push(4));

    // After a refusal the tables take the next batch.
    let mut tables = backend.tables(&limits).expect("the arena has room");
    let mut wrong = good.clone();
    wrong.sequences[1].blocks.clear();
    refuses("set_batch: no blocks", backend.set_batch(&mut tables, &wrong));
    backend.set_batch(&mut tables, &good).expect("a good batch is taken after a bad one");
    drop(tables);
    assert_eq!(backend.memory().in_use, 0, "tables give back what they took");
}
