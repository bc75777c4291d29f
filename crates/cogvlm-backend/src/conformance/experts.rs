//! Weights of two experts, as cases hold them.

use cogvlm_core::tokens::ExpertRange;
use cogvlm_core::{DType, Expert};

use super::VecTensor;
use super::approx::Approx;
use super::data::Random;
use super::harness::weight_unit;
use crate::{ExpertWeights, HostTensor};

/// `[out_features, in_features]` of each expert that is there.
#[derive(Clone)]
pub(crate) struct ExpertTensors {
    language: Option<VecTensor>,
    vision: Option<VecTensor>,
}

impl ExpertTensors {
    /// The weights of the experts that `ranges` name and no others.
    pub(crate) fn new(
        random: &mut Random, dtype: DType, [out_features, in_features]: [usize; 2], ranges: &[ExpertRange],
    ) -> Self {
        let mut tensor = |expert: Expert, name: &str| {
            let values = random.values(DType::F32, out_features * in_features, 1.0 / (in_features as f32).sqrt());
            let has_rows = ranges.iter().any(|range| range.expert == expert);
            has_rows.then(|| VecTensor::new(name, dtype, &[out_features, in_features], &values))
        };
        Self { language: tensor(Expert::Language, "language"), vision: tensor(Expert::Vision, "vision") }
    }

    pub(crate) fn tensors(&self) -> impl Iterator<Item = VecTensor> {
        self.language.iter().chain(&self.vision).cloned()
    }

    /// Takes this pair's weights from the front of a case's.
    pub(crate) fn take<'w, W>(&self, weights: &mut impl Iterator<Item = &'w W>) -> ExpertWeights<'w, W> {
        let language = self.language.as_ref().and_then(|_| weights.next());
        ExpertWeights { language, vision: self.vision.as_ref().and_then(|_| weights.next()) }
    }

    /// As the oracle takes them.
    pub(crate) fn values(&self) -> ExpertWeights<'_, Vec<f32>> {
        ExpertWeights {
            language: self.language.as_ref().map(VecTensor::values),
            vision: self.vision.as_ref().map(VecTensor::values),
        }
    }

    /// Each expert with the other's weights.
    pub(crate) fn swapped(&self) -> Self {
        Self { language: self.vision.clone(), vision: self.language.clone() }
    }

    /// Type that they are stored in.
    pub(crate) fn dtype(&self) -> Option<DType> {
        self.tensors().next().map(|tensor| tensor.dtype())
    }

    /// `x Wᵀ` with the weight of each row's expert, before any rounding.
    pub(crate) fn products(&self, x: &[f32], in_features: usize, ranges: &[ExpertRange], dtype: DType) -> Vec<Approx> {
        let mut products = Vec::new();
        for range in ranges {
            let tensor = match range.expert {
                Expert::Language => &self.language,
                Expert::Vision => &self.vision,
            };
            let tensor = tensor.as_ref().expect("an expert that has rows has a weight");
            let unit = weight_unit(tensor.dtype(), dtype);
            for x in x[range.rows.start * in_features..range.rows.end * in_features].chunks_exact(in_features) {
                products.extend(tensor.values().chunks_exact(in_features).map(|weight| Approx::dot(x, weight, unit)));
            }
        }
        products
    }
}
