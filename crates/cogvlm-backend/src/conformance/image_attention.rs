use cogvlm_core::DType;

use super::approx::Approx;
use super::attention::{expected_head, heads};
use super::data::{Random, garbage};
use super::harness::{Case, EXTRA_ROWS, buffer, devices, refuses_shape, verify, verify_rejects};
use super::{Make, VecTensor};
use crate::{Backend, BackendError, HeadGeometry, oracle};

#[derive(Clone)]
struct ImageAttention {
    dtype: DType,
    heads: HeadGeometry,
    num_images: usize,
    num_tokens: usize,
    /// Rows beyond included.
    qkv: Vec<f32>,
}

impl ImageAttention {
    /// Queries, keys and values of size about `scale`.
    fn new(dtype: DType, [num_heads, head_dim]: [usize; 2], [num_images, num_tokens]: [usize; 2], scale: f32) -> Self {
        let heads = heads([num_heads, num_heads, head_dim]);
        let rows = num_images * num_tokens + EXTRA_ROWS;
        let qkv = Random::new(91).values(dtype, rows * 3 * num_heads * head_dim, scale);
        Self { dtype, heads, num_images, num_tokens, qkv }
    }

    fn width(&self) -> usize {
        self.heads.num_heads * self.heads.head_dim
    }

    fn all_rows(&self) -> usize {
        self.num_images * self.num_tokens + EXTRA_ROWS
    }

    fn before(&self) -> Vec<f32> {
        garbage(self.dtype, self.all_rows() * self.width())
    }

    fn used(&self) -> &[f32] {
        &self.qkv[..self.num_images * self.num_tokens * 3 * self.width()]
    }
}

impl Case for ImageAttention {
    fn label(&self) -> String {
        format!("image_attention {:?}, {} images of {} tokens", self.heads, self.num_images, self.num_tokens)
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn weights(&self) -> Vec<VecTensor> {
        Vec::new()
    }

    fn run<B: Backend>(&self, backend: &B, _weights: &[B::Weight]) -> Result<Vec<f32>, BackendError> {
        let qkv = buffer(backend, self.all_rows(), 3 * self.width(), &self.qkv);
        let mut out = buffer(backend, self.all_rows(), self.width(), &self.before());
        backend.image_attention(&qkv, self.num_images, self.num_tokens, self.heads, &mut out)?;
        backend.read(&out, 0..self.all_rows())
    }

    fn expected(&self) -> Vec<Approx> {
        let HeadGeometry { num_heads, head_dim, .. } = self.heads;
        let mut expected = Vec::new();
        for image in self.used().chunks_exact(self.num_tokens * 3 * self.width()) {
            for token in 0..self.num_tokens {
                for head in 0..num_heads {
                    let part = |token: usize, part: usize| {
                        &image[((token * 3 + part) * num_heads + head) * head_dim..][..head_dim]
                    };
                    let keys: Vec<&[f32]> = (0..self.num_tokens).map(|token| part(token, 1)).collect();
                    let values: Vec<&[f32]> = (0..self.num_tokens).map(|token| part(token, 2)).collect();
                    expected.extend(expected_head(part(token, 0), &keys, &values, self.dtype));
                }
            }
        }
        expected.extend(self.before()[expected.len()..].iter().map(|&value| Approx::exact(value)));
        expected
    }

    fn oracle(&self, dtype: DType) -> Vec<f32> {
        let mut out = oracle::image_attention(self.used(), self.num_tokens, self.heads, dtype);
        out.extend(&self.before()[out.len()..]);
        out
    }

    fn roundings_are_fixed(&self) -> bool {
        false
    }
}

/// Every token of an image sees every token of that image.
pub fn image_attention<B: Backend>(make: Make<'_, B>) {
    let devices = devices(make);
    let backend = &devices[0];
    let dtype = backend.activation_dtype();
    for num_tokens in [1, 2, 7, 8, 9, 16, 17, 33, 65] {
        verify(&devices, &ImageAttention::new(dtype, [2, 24], [2, num_tokens], 1.0));
    }
    for (heads, images) in [
        ([2, 112], [1, 130]),
        ([1, 112], [1, 257]),
        ([3, 32], [3, 17]),
        ([2, 10], [2, 26]),
        ([3, 6], [1, 50]),
        ([2, 24], [0, 10]),
    ] {
        verify(&devices, &ImageAttention::new(dtype, heads, images, 1.0));
    }
    // Scores of ten thousand and more, and of zero.
    for scale in [100.0, 0.0] {
        verify(&devices, &ImageAttention::new(dtype, [2, 24], [2, 33], scale));
    }
    let case = ImageAttention::new(dtype, [2, 24], [2, 17], 1.0);
    let one_image = ImageAttention { num_images: 1, num_tokens: 34, ..case.clone() };
    verify_rejects(&case, "attention across images", &one_image);
    let mut by_head = case.clone();
    for row in by_head.qkv.chunks_exact_mut(3 * 48) {
        // As though a row were [head][q | k | v].
        let split: Vec<f32> = (0..6).flat_map(|index| row[(index % 2 * 3 + index / 2) * 24..][..24].to_vec()).collect();
        row.copy_from_slice(&split);
    }
    verify_rejects(&case, "split by head first", &by_head);
    let mut unscaled = case.clone();
    unscaled.qkv.chunks_exact_mut(48).step_by(3).flatten().for_each(|q| *q *= 24f32.sqrt());
    verify_rejects(&case, "no scale", &unscaled);

    let attempt = |what: &str, geometry: [usize; 3], tokens: usize, qkv: [usize; 2], out: [usize; 2]| {
        let qkv = buffer(backend, qkv[0], qkv[1], &[]);
        let mut out = buffer(backend, out[0], out[1], &[]);
        refuses_shape(what, backend.image_attention(&qkv, 2, tokens, heads(geometry), &mut out));
    };
    attempt("image_attention: too few rows", [2, 2, 24], 17, [33, 144], [34, 48]);
    attempt("image_attention: far too few rows", [2, 2, 24], usize::MAX, [34, 144], [34, 48]);
    attempt("image_attention: too few rows in out", [2, 2, 24], 17, [34, 144], [33, 48]);
    attempt("image_attention: qkv of another width", [2, 2, 24], 17, [34, 143], [34, 48]);
    attempt("image_attention: out of another width", [2, 2, 24], 17, [34, 144], [34, 47]);
    attempt("image_attention: other heads than the buffers", [3, 3, 24], 17, [34, 144], [34, 48]);
    attempt("image_attention: fewer key heads than query heads", [2, 1, 24], 17, [34, 144], [34, 48]);
}
