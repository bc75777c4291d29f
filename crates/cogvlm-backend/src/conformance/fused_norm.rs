use cogvlm_core::DType;

use super::approx::assert_same_bits;
use super::attention::heads;
use super::batches::{self, Routing};
use super::data::Random;
use super::experts::ExpertTensors;
use super::harness::{buffer, load, refuses_shape, rotated, typed_buffer};
use super::{Make, VecTensor};
use crate::oracle::kv_row_len;
use crate::{Backend, HostTensor, Norm, RopeMode, rope};

/// Of the norm, and what takes its place in wrong answers.
const EPS: f32 = 1e-5;
const NUM_POSITIONS: usize = 50;
/// Rows of the batch and width of the norm: few rows, which a backend may normalise on the way, and more.
const SIZES: [[usize; 2]; 9] = [[0, 16], [1, 64], [1, 4096], [2, 4096], [2, 104], [3, 72], [1, 33], [9, 64], [33, 40]];

fn norm_weight(random: &mut Random, weight_dtype: DType, width: usize) -> VecTensor {
    VecTensor::new("norm", weight_dtype, &[width], &random.values(DType::F32, width, 1.0))
}

/// The same bits as norm and product one after the other.
pub fn norm_gate_up<B: Backend>(make: Make<'_, B>) {
    let backend = make();
    let dtype = backend.activation_dtype();
    for [rows, width] in SIZES {
        let mut random = Random::new(111);
        let ranges = Routing::Language.ranges(rows);
        let x = buffer(&backend, rows, width, &random.values(dtype, rows * width, 1.0));
        let [gate, up] = [0, 1].map(|_| ExpertTensors::new(&mut random, dtype, [40, width], &ranges));
        let [gates, ups] =
            [&gate, &up].map(|weights| weights.tensors().map(|tensor| load(&backend, &tensor)).collect::<Vec<_>>());
        let tensor = norm_weight(&mut random, dtype, width);
        let answer = |tensor: &VecTensor, eps: f32, is_fused: bool| {
            let weight = load(&backend, tensor);
            let mut normed = buffer(&backend, rows, width, &[]);
            let mut out = buffer(&backend, rows, 40, &[]);
            let (gate, up) = (gate.take(&mut gates.iter()), up.take(&mut ups.iter()));
            let result = if is_fused {
                let norm = Norm { weight: &weight, eps };
                backend.norm_gate_up(&x, norm, &mut normed, gate, up, &ranges, &mut out)
            } else {
                let result = backend.rms_norm(&x, &weight, eps, rows, &mut normed);
                result.and_then(|()| backend.gate_up(&normed, gate, up, &ranges, &mut out))
            };
            result.and_then(|()| backend.read(&out, 0..rows)).unwrap_or_else(|error| panic!("norm_gate_up: {error}"))
        };
        let what = format!("norm_gate_up of {rows} rows of {width}");
        let expected = answer(&tensor, EPS, false);
        assert_same_bits(&what, &answer(&tensor, EPS, true), &expected);
        if rows > 0 {
            let turned = VecTensor::new("norm", dtype, &[width], &rotated(tensor.values()));
            assert_ne!(answer(&turned, EPS, true), expected, "{what}: takes no notice of the weight");
            assert_ne!(answer(&tensor, 1.0, true), expected, "{what}: takes no notice of eps");
            let short = load(&backend, &norm_weight(&mut random, dtype, width - 1));
            let (gate, up) = (gate.take(&mut gates.iter()), up.take(&mut ups.iter()));
            let mut normed = buffer(&backend, rows, width, &[]);
            let mut out = buffer(&backend, rows, 40, &[]);
            let norm = Norm { weight: &short, eps: EPS };
            refuses_shape(
                "norm_gate_up: a norm of another width",
                backend.norm_gate_up(&x, norm, &mut normed, gate, up, &ranges, &mut out),
            );
        }
    }
}

/// The same bits as norm and product one after the other, in queries and cache.
pub fn norm_qkv_rope_append<B: Backend>(make: Make<'_, B>) {
    let backend = make();
    let dtype = backend.activation_dtype();
    for ([rows, width], geometry) in SIZES.into_iter().zip([[2, 1, 32], [1, 1, 128], [2, 2, 6]].into_iter().cycle()) {
        let mut random = Random::new(112);
        let heads = heads(geometry);
        let sequences: Vec<(usize, usize)> = (0..rows).map(|row| (1, 1 + row * 7 % 40)).collect();
        let (batch, num_blocks) = batches::batch(&mut random, &sequences, Routing::Language, NUM_POSITIONS);
        let tables = batches::tables(&backend, &batch);
        let table = rope::table(&rope::inv_freq(heads.head_dim), NUM_POSITIONS, RopeMode::Float32, dtype);
        let rope = typed_buffer(&backend, DType::F32, NUM_POSITIONS, heads.head_dim, &table);
        let x = buffer(&backend, rows, width, &random.values(dtype, rows * width, 1.0));
        let shape = [(heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim, width];
        let ranges = &batch.expert_ranges;
        let weights = ExpertTensors::new(&mut random, dtype, shape, ranges);
        let loaded: Vec<B::Weight> = weights.tensors().map(|tensor| load(&backend, &tensor)).collect();
        let norm = load(&backend, &norm_weight(&mut random, dtype, width));
        let answer = |eps: f32, is_fused: bool| {
            let mut normed = buffer(&backend, rows, width, &[]);
            let mut query = buffer(&backend, rows, heads.num_heads * heads.head_dim, &[]);
            let mut kv = buffer(&backend, num_blocks, kv_row_len(heads), &[]);
            let weights = weights.take(&mut loaded.iter());
            let (mode, query_out, kv_out) = (RopeMode::Float32, &mut query, &mut kv);
            let result = if is_fused {
                let norm = Norm { weight: &norm, eps };
                backend.norm_qkv_rope_append(
                    &x,
                    norm,
                    &mut normed,
                    weights,
                    ranges,
                    heads,
                    &rope,
                    mode,
                    &tables,
                    query_out,
                    kv_out,
                )
            } else {
                backend.rms_norm(&x, &norm, eps, rows, &mut normed).and_then(|()| {
                    backend.qkv_rope_append(&normed, weights, ranges, heads, &rope, mode, &tables, query_out, kv_out)
                })
            };
            let both = result.and_then(|()| Ok([backend.read(&query, 0..rows)?, backend.read(&kv, 0..num_blocks)?]));
            both.unwrap_or_else(|error| panic!("norm_qkv_rope_append: {error}")).concat()
        };
        let what = format!("norm_qkv_rope_append of {rows} rows of {width}, {heads:?}");
        let expected = answer(EPS, false);
        assert_same_bits(&what, &answer(EPS, true), &expected);
        if rows > 0 {
            assert_ne!(answer(1.0, true), expected, "{what}: takes no notice of eps");
        }
    }
}
