//! Vision tower and adapter: pixels become the vision tokens of the decoder.

use cogvlm_backend::{Activation, Backend, BackendError, ExpertWeights, HeadGeometry, PatchGeometry, PatchWeights};
use cogvlm_core::spec::ADAPTER_NORM_EPS;
use cogvlm_core::tokens::ExpertRange;
use cogvlm_core::workspace::BufferKind;
use cogvlm_core::{Expert, Unit, WeightGroup};

use crate::rank::Rank;
use crate::step::Step;

impl<B: Backend> Rank<B> {
    /// Pixels to patch vectors, with class token and position embedding: `VitHidden`.
    pub(crate) fn patch_embedding(&mut self, step: &Step) -> Result<(), BackendError> {
        let vision = &self.spec.vision;
        let geometry = PatchGeometry {
            num_images: step.images.len(),
            num_channels: vision.num_channels,
            image_size: vision.image_size,
            patch_size: vision.patch_size,
        };
        let key = (Unit::PatchEmbedding, WeightGroup::Whole);
        let taken = self.weights.take(&self.backend, key)?;
        {
            let [class, projection, bias, position] = taken.exactly();
            let weights = PatchWeights { projection, bias, class, position };
            let [pixels, hidden] = self.workspace.buffers([BufferKind::Pixels, BufferKind::VitHidden]);
            for (index, image) in step.images.iter().enumerate() {
                self.backend.write(&image.pixels, pixels, index)?;
            }
            self.backend.patch_embed(pixels, weights, geometry, hidden)?;
        }
        self.weights.give_back(&self.backend, taken)
    }

    /// One ViT layer. Its norms stand after the sublayers, inside the residual branch, and the sublayers read the
    /// residual as it is.
    pub(crate) fn vit_layer(&mut self, layer: usize, step: &Step) -> Result<(), BackendError> {
        let vision = &self.spec.vision;
        let (num_images, num_tokens, eps) = (step.images.len(), vision.num_tokens(), vision.layer_norm_eps);
        let rows = num_images * num_tokens;
        let heads =
            HeadGeometry { num_heads: vision.num_heads, num_kv_heads: vision.num_heads, head_dim: vision.head_dim };
        let taken = self.weights.take(&self.backend, (Unit::VitLayer(layer), WeightGroup::Whole))?;
        {
            let [norm, norm_bias, qkv_w, qkv_b, dense_w, dense_b, fc1_w, fc1_b, fc2_w, fc2_b, post, post_bias] =
                taken.exactly();
            let backend = &*self.backend;
            let [hidden, qkv, attention, branch, inner] = self.workspace.buffers([
                BufferKind::VitHidden,
                BufferKind::VitQkv,
                BufferKind::VitAttention,
                BufferKind::VitBranch,
                BufferKind::VitInner,
            ]);
            backend.linear(hidden, qkv_w, Some(qkv_b), Activation::Identity, rows, qkv)?;
            backend.image_attention(qkv, num_images, num_tokens, heads, attention)?;
            backend.linear(attention, dense_w, Some(dense_b), Activation::Identity, rows, branch)?;
            backend.layer_norm_residual(branch, norm, norm_bias, eps, rows, hidden)?;
            backend.linear(hidden, fc1_w, Some(fc1_b), Activation::Gelu, rows, inner)?;
            backend.linear(inner, fc2_w, Some(fc2_b), Activation::Identity, rows, branch)?;
            backend.layer_norm_residual(branch, post, post_bias, eps, rows, hidden)?;
        }
        self.weights.give_back(&self.backend, taken)
    }

    /// Drops the class token, maps each patch to the decoder's width, and puts BOI and EOI around them:
    /// `VisionFeatures`.
    pub(crate) fn adapter(&mut self, step: &Step) -> Result<(), BackendError> {
        let num_patches = self.spec.vision.num_patches();
        let num_vision_tokens = self.spec.num_vision_tokens();
        let num_images = step.images.len();
        let rows = num_images * num_patches;
        let ranges = [ExpertRange { rows: 0..rows, expert: Expert::Vision }];
        let taken = self.weights.take(&self.backend, (Unit::Adapter, WeightGroup::Whole))?;
        {
            let [boi, eoi, proj, norm, norm_bias, up, gate, down] = taken.exactly();
            let only = |weight| ExpertWeights { language: None, vision: Some(weight) };
            let backend = &*self.backend;
            let [vit_hidden, patches, projected, inner, features] = self.workspace.buffers([
                BufferKind::VitHidden,
                BufferKind::VitBranch,
                BufferKind::AdapterHidden,
                BufferKind::AdapterInner,
                BufferKind::VisionFeatures,
            ]);
            for image in 0..num_images {
                let first = image * (num_patches + 1) + 1;
                backend.copy_rows(vit_hidden, first..first + num_patches, patches, image * num_patches)?;
            }
            backend.linear(patches, proj, None, Activation::Identity, rows, projected)?;
            backend.layer_norm_gelu(projected, norm, norm_bias, ADAPTER_NORM_EPS, rows)?;
            backend.gate_up(projected, only(gate), only(up), &ranges, inner)?;
            backend.linear(inner, down, None, Activation::Identity, rows, projected)?;
            for image in 0..num_images {
                let (first, patch) = (image * num_vision_tokens, image * num_patches);
                backend.copy_weight_rows(boi, features, first)?;
                backend.copy_rows(projected, patch..patch + num_patches, features, first + 1)?;
                backend.copy_weight_rows(eoi, features, first + 1 + num_patches)?;
            }
        }
        self.weights.give_back(&self.backend, taken)
    }
}
