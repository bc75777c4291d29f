use cogvlm_core::DType;

use super::approx::Approx;
use super::data::{Random, garbage};
use super::harness::{
    Case, EXTRA_ROWS, WEIGHT_DTYPES, buffer, devices, load, refuses, refuses_shape, rotated, verify, verify_rejects,
    verify_residency, weight_unit,
};
use super::{Make, VecTensor};
use crate::{Backend, BackendError, HostTensor, PatchGeometry, PatchWeights, oracle};

#[derive(Clone)]
struct PatchEmbed {
    dtype: DType,
    geometry: PatchGeometry,
    width: usize,
    /// One image beyond those used.
    pixels: Vec<f32>,
    projection: VecTensor,
    bias: VecTensor,
    class: VecTensor,
    position: VecTensor,
}

impl PatchEmbed {
    /// `geometry` is images, channels, image size, patch size.
    fn new([dtype, weight_dtype]: [DType; 2], geometry: [usize; 4], width: usize) -> Self {
        let [num_images, num_channels, image_size, patch_size] = geometry;
        let geometry = PatchGeometry { num_images, num_channels, image_size, patch_size };
        let mut random = Random::new(71);
        let pixels = random.values(dtype, (num_images + 1) * num_channels * image_size * image_size, 1.0);
        let window = num_channels * patch_size * patch_size;
        let tokens = (image_size / patch_size).pow(2) + 1;
        let mut tensor = |name, shape: &[usize], scale| {
            VecTensor::new(name, weight_dtype, shape, &random.values(DType::F32, shape.iter().product(), scale))
        };
        let scale = 1.0 / (window as f32).sqrt();
        let projection = tensor("projection", &[width, num_channels, patch_size, patch_size], scale);
        let (bias, class) = (tensor("bias", &[width], 1.0), tensor("class", &[1, width], 1.0));
        let position = tensor("position", &[tokens, width], 1.0);
        Self { dtype, geometry, width, pixels, projection, bias, class, position }
    }

    fn image_len(&self) -> usize {
        self.pixels.len() / (self.geometry.num_images + 1)
    }

    fn all_rows(&self) -> usize {
        self.geometry.num_images * self.position.shape()[0] + EXTRA_ROWS
    }

    fn before(&self) -> Vec<f32> {
        garbage(self.dtype, self.all_rows() * self.width)
    }
}

impl Case for PatchEmbed {
    fn label(&self) -> String {
        format!("patch_embed {:?} to {}, weights {}", self.geometry, self.width, self.projection.dtype())
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn weights(&self) -> Vec<VecTensor> {
        [&self.projection, &self.bias, &self.class, &self.position].map(Clone::clone).to_vec()
    }

    fn run<B: Backend>(&self, backend: &B, weights: &[B::Weight]) -> Result<Vec<f32>, BackendError> {
        let pixels = buffer(backend, self.geometry.num_images + 1, self.image_len(), &self.pixels);
        let mut out = buffer(backend, self.all_rows(), self.width, &self.before());
        backend.patch_embed(&pixels, patch_weights(weights), self.geometry, &mut out)?;
        backend.read(&out, 0..self.all_rows())
    }

    fn expected(&self) -> Vec<Approx> {
        let unit = weight_unit(self.projection.dtype(), self.dtype);
        let PatchGeometry { num_images, num_channels, image_size, patch_size } = self.geometry;
        let per_side = image_size / patch_size;
        let positions: Vec<Approx> = self.position.values().iter().map(|&p| Approx::weight(p, unit)).collect();
        let mut expected = Vec::new();
        for image in self.pixels.chunks_exact(self.image_len()).take(num_images) {
            let mut tokens: Vec<Approx> = self.class.values().iter().map(|&c| Approx::weight(c, unit)).collect();
            for patch in 0..per_side * per_side {
                let (top, left) = (patch / per_side * patch_size, patch % per_side * patch_size);
                let pixel = |index: usize| {
                    let (x, y) = (index % patch_size, index / patch_size % patch_size);
                    let channel = index / patch_size / patch_size;
                    image[(channel * image_size + top + y) * image_size + left + x]
                };
                let window: Vec<f32> = (0..num_channels * patch_size * patch_size).map(pixel).collect();
                for (filter, &bias) in self.projection.values().chunks_exact(window.len()).zip(self.bias.values()) {
                    let sum = Approx::dot(&window, filter, unit).plus(Approx::weight(bias, unit));
                    tokens.push(sum.rounded(self.dtype));
                }
            }
            expected.extend(tokens.iter().zip(&positions).map(|(t, p)| t.plus(*p).rounded(self.dtype)));
        }
        expected.extend(self.before()[expected.len()..].iter().map(|&value| Approx::exact(value)));
        expected
    }

    fn oracle(&self, dtype: DType) -> Vec<f32> {
        let [projection, bias, class, position] =
            [&self.projection, &self.bias, &self.class, &self.position].map(VecTensor::values);
        let weights = PatchWeights { projection, bias, class, position };
        let mut out = oracle::patch_embed(&self.pixels, weights, self.geometry, dtype);
        out.extend(&self.before()[out.len()..]);
        out
    }
}

fn patch_weights<W>(weights: &[W]) -> PatchWeights<'_, W> {
    PatchWeights { projection: &weights[0], bias: &weights[1], class: &weights[2], position: &weights[3] }
}

/// Class token and patches, rounded; with their positions, rounded.
pub fn patch_embed<B: Backend>(make: Make<'_, B>) {
    let devices = devices(make);
    let backend = &devices[0];
    let dtype = backend.activation_dtype();
    let real = [3, 56, 14];
    for weight_dtype in WEIGHT_DTYPES {
        let dtypes = [dtype, weight_dtype];
        for (images, [channels, size, patch], width) in [
            (1, real, 100),
            (2, real, 33),
            (1, [3, 14, 14], 65),
            (3, [2, 9, 3], 7),
            (1, [1, 5, 1], 1),
            (0, [3, 8, 4], 9),
        ] {
            verify(&devices, &PatchEmbed::new(dtypes, [images, channels, size, patch], width));
        }
        verify_residency(&devices, &PatchEmbed::new(dtypes, [2, 3, 12, 4], 33));
    }

    let case = PatchEmbed::new([dtype; 2], [2, 3, 12, 4], 33);
    let replaced = |tensor: &VecTensor, values: &[f32]| VecTensor::new("replaced", dtype, tensor.shape(), values);
    let position = replaced(&case.position, &{
        let mut values = case.position.values().clone();
        values.rotate_right(33);
        values
    });
    verify_rejects(&case, "positions shifted by a patch", &PatchEmbed { position, ..case.clone() });
    let bias = replaced(&case.bias, &rotated(case.bias.values()));
    verify_rejects(&case, "bias rotated", &PatchEmbed { bias, ..case.clone() });
    // Transposed images have their patches column by column, once the filters are transposed too: here they are not.
    let mut transposed = case.clone();
    for (index, pixel) in transposed.pixels.iter_mut().enumerate() {
        let (x, y, plane) = (index % 12, index / 12 % 12, index / 144);
        *pixel = case.pixels[plane * 144 + x * 12 + y];
    }
    verify_rejects(&case, "rows and columns exchanged", &transposed);

    let weights: Vec<B::Weight> = case.weights().iter().map(|tensor| load(backend, tensor)).collect();
    let attempt = |weights: PatchWeights<'_, B::Weight>, geometry, pixels: [usize; 2], out: [usize; 2]| {
        let pixels = buffer(backend, pixels[0], pixels[1], &[]);
        let mut out = buffer(backend, out[0], out[1], &[]);
        backend.patch_embed(&pixels, weights, geometry, &mut out)
    };
    let good = || patch_weights(&weights);
    let (geometry, pixels, out) = (case.geometry, [2, 3 * 144], [20, 33]);
    refuses_shape("patch_embed: too few images", attempt(good(), geometry, [1, 3 * 144], out));
    refuses_shape("patch_embed: images of another size", attempt(good(), geometry, [2, 3 * 143], out));
    refuses_shape("patch_embed: too few rows in out", attempt(good(), geometry, pixels, [19, 33]));
    refuses_shape("patch_embed: out of another width", attempt(good(), geometry, pixels, [20, 32]));
    let swapped = PatchWeights { bias: &weights[3], ..good() };
    refuses_shape("patch_embed: bias of another shape", attempt(swapped, geometry, pixels, out));
    let swapped = PatchWeights { position: &weights[2], ..good() };
    refuses_shape("patch_embed: position of another shape", attempt(swapped, geometry, pixels, out));
    for (what, patch_size) in [("patches that do not fill the image", 5), ("patches of nothing", 0)] {
        refuses(what, attempt(good(), PatchGeometry { patch_size, ..geometry }, pixels, out));
    }
}
