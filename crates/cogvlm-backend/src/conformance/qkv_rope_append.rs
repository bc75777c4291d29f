use cogvlm_core::DType;

use super::approx::Approx;
use super::attention::heads;
use super::batches::{self, Routing};
use super::data::{Random, garbage};
use super::experts::ExpertTensors;
use super::harness::{
    Case, EXTRA_ROWS, WEIGHT_DTYPES, buffer, devices, load, refuses, refuses_shape, typed_buffer, verify,
    verify_rejects, verify_residency,
};
use super::{Make, VecTensor};
use crate::oracle::{self, KvPart, kv_index, kv_row_len};
use crate::{Backend, BackendError, Batch, ExpertWeights, HeadGeometry, RopeMode, rope};

/// Positions that the tables have; 299 is one that published angles round to another.
const NUM_POSITIONS: usize = 300;

#[derive(Clone)]
pub(crate) struct QkvRopeAppend {
    pub(crate) dtype: DType,
    pub(crate) heads: HeadGeometry,
    pub(crate) hidden_size: usize,
    pub(crate) mode: RopeMode,
    pub(crate) batch: Batch,
    pub(crate) num_blocks: usize,
    /// Rows beyond included.
    pub(crate) x: Vec<f32>,
    pub(crate) rope: Vec<f32>,
    pub(crate) weights: ExpertTensors,
}

impl QkvRopeAppend {
    pub(crate) fn new(
        [dtype, weight_dtype]: [DType; 2], geometry: [usize; 3], hidden_size: usize, sequences: &[(usize, usize)],
        routing: Routing, mode: RopeMode,
    ) -> Self {
        let mut random = Random::new(101);
        let heads = heads(geometry);
        let (batch, num_blocks) = batches::batch(&mut random, sequences, routing, NUM_POSITIONS);
        let x = random.values(dtype, (batch.num_rows() + EXTRA_ROWS) * hidden_size, 1.0);
        let rope = rope::table(&rope::inv_freq(heads.head_dim), NUM_POSITIONS, mode, dtype);
        let shape = [(heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim, hidden_size];
        let weights = ExpertTensors::new(&mut random, weight_dtype, shape, &batch.expert_ranges);
        Self { dtype, heads, hidden_size, mode, batch, num_blocks, x, rope, weights }
    }

    pub(crate) fn query_width(&self) -> usize {
        self.heads.num_heads * self.heads.head_dim
    }

    pub(crate) fn all_rows(&self) -> usize {
        self.batch.num_rows() + EXTRA_ROWS
    }

    /// What stands in the query buffer, and in the cache.
    fn before(&self) -> [Vec<f32>; 2] {
        [self.all_rows() * self.query_width(), self.num_blocks * kv_row_len(self.heads)]
            .map(|len| garbage(self.dtype, len))
    }

    /// Runs on buffers that are there already.
    pub(crate) fn run_on<B: Backend>(
        &self, backend: &B, weights: &[B::Weight], query: &mut B::Buffer, kv: &mut B::Buffer,
    ) -> Result<(), BackendError> {
        let x = buffer(backend, self.all_rows(), self.hidden_size, &self.x);
        let rope = typed_buffer(backend, DType::F32, NUM_POSITIONS, self.heads.head_dim, &self.rope);
        let (tables, ranges) = (batches::tables(backend, &self.batch), &self.batch.expert_ranges);
        let weights = self.weights.take(&mut weights.iter());
        backend.qkv_rope_append(&x, weights, ranges, self.heads, &rope, self.mode, &tables, query, kv)
    }

    /// Pairs of dimensions turned by the row's angles.
    fn rotate(&self, head: &mut [Approx], position: u32) {
        let half = self.heads.head_dim / 2;
        let angles = &self.rope[position as usize * self.heads.head_dim..];
        let product = |a: Approx, b: f32| {
            let product = a.times(Approx::exact(b));
            if self.mode == RopeMode::Published { product.rounded(self.dtype) } else { product }
        };
        for j in 0..half {
            let (a, b, cos, sin) = (head[j], head[j + half], angles[j], angles[j + half]);
            head[j] = product(a, cos).plus(product(b, sin).negated()).rounded(self.dtype);
            head[j + half] = product(a, sin).plus(product(b, cos)).rounded(self.dtype);
        }
    }
}

impl Case for QkvRopeAppend {
    fn label(&self) -> String {
        let sequences = self.batch.sequences.iter().map(|sequence| (sequence.rows.len(), sequence.context_len));
        let Self { heads, hidden_size, mode, .. } = self;
        let sequences: Vec<_> = sequences.collect();
        let weight = self.weights.dtype().map_or("none".to_owned(), |dtype| dtype.to_string());
        format!("qkv_rope_append {heads:?} of {hidden_size}, {mode:?}, weights {weight}, (rows, context) {sequences:?}")
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn weights(&self) -> Vec<VecTensor> {
        self.weights.tensors().collect()
    }

    /// The queries, then the cache.
    fn run<B: Backend>(&self, backend: &B, weights: &[B::Weight]) -> Result<Vec<f32>, BackendError> {
        let [query, kv] = self.before();
        let mut query = buffer(backend, self.all_rows(), self.query_width(), &query);
        let mut kv = buffer(backend, self.num_blocks, kv_row_len(self.heads), &kv);
        self.run_on(backend, weights, &mut query, &mut kv)?;
        Ok([backend.read(&query, 0..self.all_rows())?, backend.read(&kv, 0..self.num_blocks)?].concat())
    }

    fn expected(&self) -> Vec<Approx> {
        let HeadGeometry { num_heads, num_kv_heads, head_dim } = self.heads;
        let [mut query, mut kv] = self.before().map(|before| before.into_iter().map(Approx::exact).collect::<Vec<_>>());
        let products = self.weights.products(&self.x, self.hidden_size, &self.batch.expert_ranges, self.dtype);
        let products: Vec<Approx> = products.into_iter().map(|product| product.rounded(self.dtype)).collect();
        let rows = products.chunks_exact((num_heads + 2 * num_kv_heads) * head_dim);
        for (row, (products, slot)) in rows.zip(self.batch.slots()).enumerate() {
            let slot = slot.expect("a row has a slot");
            for (index, head) in products.chunks_exact(head_dim).enumerate() {
                let mut head = head.to_vec();
                if index < num_heads + num_kv_heads {
                    self.rotate(&mut head, self.batch.position_ids[row]);
                }
                let place = if index < num_heads {
                    &mut query[(row * num_heads + index) * head_dim..]
                } else if index < num_heads + num_kv_heads {
                    &mut kv[kv_index(self.heads, slot, KvPart::Key, index - num_heads)..]
                } else {
                    &mut kv[kv_index(self.heads, slot, KvPart::Value, index - num_heads - num_kv_heads)..]
                };
                place[..head_dim].copy_from_slice(&head);
            }
        }
        [query, kv].concat()
    }

    fn oracle(&self, dtype: DType) -> Vec<f32> {
        let [mut query, mut kv] = self.before();
        let rows = oracle::qkv_rope_append(
            &self.x,
            self.weights.values(),
            &self.batch.expert_ranges,
            self.hidden_size,
            self.heads,
            &self.rope,
            self.mode,
            &self.batch,
            &mut kv,
            dtype,
        );
        query[..rows.len()].copy_from_slice(&rows);
        [query, kv].concat()
    }
}

/// Projection, rotation by position id, and the slots of the cache.
pub fn qkv_rope_append<B: Backend>(make: Make<'_, B>) {
    const MIXED: &[(usize, usize)] = &[(17, 17), (1, 33), (7, 23), (1, 1), (9, 25)];
    let devices = devices(make);
    let backend = &devices[0];
    let dtype = backend.activation_dtype();
    let modes = [RopeMode::Float32, RopeMode::Published];
    for mode in modes {
        let case = |geometry, hidden_size, sequences: &[(usize, usize)], routing| {
            QkvRopeAppend::new([dtype; 2], geometry, hidden_size, sequences, routing, mode)
        };
        for (index, geometry) in
            [[2, 2, 128], [1, 1, 112], [3, 1, 32], [4, 2, 24], [3, 3, 10], [2, 1, 6]].into_iter().enumerate()
        {
            for (sequences, routing) in [
                (&[][..], Routing::Language),
                (&[(1, 1)], Routing::Language),
                (&[(1, 33), (1, 16), (1, 2)], Routing::Alternating),
                (MIXED, Routing::ALL[index % 4]),
            ] {
                verify(&devices, &case(geometry, 40, sequences, routing));
            }
        }
        for rows in [2, 8, 16, 65, 130] {
            verify(&devices, &case([2, 1, 6], 33, &[(rows, rows + 3)], Routing::Image));
        }
        verify(&devices, &case([1, 1, 128], 4096, &[(1, 20), (2, 2)], Routing::Image));
        // More rows of the weight than a device computes at once.
        verify(&devices, &case([20, 10, 128], 40, &[(1, 20), (1, 3)], Routing::Language));
        verify(&devices, &case([40, 20, 128], 40, &[(1, 20); 16], Routing::Language));
    }
    for weight_dtype in WEIGHT_DTYPES {
        for mode in modes {
            let dtypes = [dtype, weight_dtype];
            let case = QkvRopeAppend::new(dtypes, [2, 1, 10], 101, &[(9, 20)], Routing::Image, mode);
            verify(&devices, &case);
            verify_residency(&devices, &case);
            let decode = QkvRopeAppend::new(dtypes, [2, 1, 10], 101, &[(1, 20)], Routing::Language, mode);
            verify_residency(&devices, &decode);
        }
    }

    let case = QkvRopeAppend::new([dtype; 2], [4, 2, 24], 40, &[(17, 17), (3, 20)], Routing::Image, RopeMode::Float32);
    let altered = |alter: &dyn Fn(&mut QkvRopeAppend)| {
        let mut altered = case.clone();
        alter(&mut altered);
        altered
    };
    verify_rejects(&case, "experts swapped", &altered(&|case| case.weights = case.weights.swapped()));
    let next_position = altered(&|case| case.batch.position_ids[4] = (case.batch.position_ids[4] + 1) % 300);
    verify_rejects(&case, "one position shifted", &next_position);
    let token_indices = altered(&|case| case.batch.position_ids = (0..20).collect());
    verify_rejects(&case, "token indices for position ids", &token_indices);
    let next_slot = altered(&|case| case.batch.sequences[1].context_len -= 1);
    verify_rejects(&case, "the slot before", &next_slot);
    let blocks_swapped = altered(&|case| case.batch.sequences[0].blocks.swap(0, 1));
    verify_rejects(&case, "blocks in another order", &blocks_swapped);
    verify_rejects(&case, "angles of other pairs", &altered(&|case| case.rope = angles_of_other_pairs(&case.rope, 24)));
    if dtype != DType::F32 {
        let published =
            QkvRopeAppend::new([dtype; 2], [4, 2, 24], 40, &[(17, 17)], Routing::Image, RopeMode::Published);
        let exact = altered(&|case| {
            *case = QkvRopeAppend { mode: RopeMode::Published, ..published.clone() };
            case.rope = rope::table(&rope::inv_freq(24), NUM_POSITIONS, RopeMode::Float32, dtype);
        });
        verify_rejects(&published, "angles in f32", &exact);
    }
    refusals(backend, &case);
}

/// The angles of pair `j / 2` given to pair `j`.
fn angles_of_other_pairs(rope: &[f32], head_dim: usize) -> Vec<f32> {
    let half = head_dim / 2;
    let angle = |index: usize| {
        let (row, column) = (index / head_dim, index % head_dim);
        rope[row * head_dim + column / half * half + column % half / 2]
    };
    (0..rope.len()).map(angle).collect()
}

fn refusals<B: Backend>(backend: &B, case: &QkvRopeAppend) {
    let [language, vision] = <[VecTensor; 2]>::try_from(case.weights())
        .expect("both experts have rows")
        .map(|tensor| load(backend, &tensor));
    let both = ExpertWeights { language: Some(&language), vision: Some(&vision) };
    let max_position = case.batch.position_ids.iter().max().map_or(0, |&position| position as usize);
    let max_block = case.batch.sequences.iter().flat_map(|sequence| &sequence.blocks).max().map_or(0, |&block| block);
    let kv_row = kv_row_len(case.heads);
    let good = [[20, 40], [300, 24], [20, 96], [case.num_blocks, kv_row]];
    let attempt_with = |weights, geometry, ranges: &[_], shapes: [[usize; 2]; 4]| {
        let [x, rope, query, kv] = shapes;
        let x = buffer(backend, x[0], x[1], &[]);
        let rope = typed_buffer(backend, DType::F32, rope[0], rope[1], &[]);
        let [mut query, mut kv] = [query, kv].map(|[rows, width]| buffer(backend, rows, width, &[]));
        let tables = batches::tables(backend, &case.batch);
        backend.qkv_rope_append(&x, weights, ranges, heads(geometry), &rope, case.mode, &tables, &mut query, &mut kv)
    };
    let ranges = &case.batch.expert_ranges;
    let attempt = |what: &str, index: usize, shape: [usize; 2]| {
        let mut shapes = good;
        shapes[index] = shape;
        refuses_shape(&format!("qkv_rope_append: {what}"), attempt_with(both, [4, 2, 24], ranges, shapes));
    };
    attempt("fewer rows in x", 0, [19, 40]);
    attempt("x of another width", 0, [20, 41]);
    attempt("positions beyond the angles", 1, [max_position, 24]);
    attempt("angles of another width", 1, [300, 22]);
    attempt("fewer rows in query", 2, [19, 96]);
    attempt("query of another width", 2, [20, 95]);
    attempt("blocks beyond the cache", 3, [max_block as usize, kv_row]);
    attempt("cache of another width", 3, [case.num_blocks, kv_row + 1]);
    refuses_shape("qkv_rope_append: other heads", attempt_with(both, [2, 2, 24], ranges, good));
    refuses_shape("qkv_rope_append: fewer ranges than rows", attempt_with(both, [4, 2, 24], &ranges[..1], good));
    let mut long = ranges.clone();
    long[2].rows.end += 1;
    let roomy = [[30, 40], good[1], [30, 96], good[3]];
    refuses_shape("qkv_rope_append: ranges beyond the batch", attempt_with(both, [4, 2, 24], &long, roomy));
    let missing = ExpertWeights { vision: None, ..both };
    refuses("qkv_rope_append: no vision weight", attempt_with(missing, [4, 2, 24], ranges, good));
    let missing = ExpertWeights { language: None, ..both };
    refuses("qkv_rope_append: no language weight", attempt_with(missing, [4, 2, 24], ranges, good));
}
