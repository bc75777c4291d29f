//! Products with weights of two experts: one description for all kernels that compute them, and which of those does.

use cogvlm_backend::shape::{expect_ranges, expect_shape, unsupported};
use cogvlm_backend::{BackendError, ExpertWeights, HeadGeometry, RopeMode};
use cogvlm_core::tokens::ExpertRange;
use cogvlm_core::{DType, Expert};
use cudarc::driver::sys::CUdeviceptr;

use crate::backend::{CudaBackend, KernelPath};
use crate::buffer::{CudaBuffer, dtype_code};
use crate::exchange::Push;
use crate::ops::{product_generic, product_mma, product_rows, product_wgmma};
use crate::tables::CudaTables;
use crate::weight::CudaWeight;

/// Rows of a group (`GROUP_ROWS` in kernels/include/product.cuh).
const GROUP_ROWS: usize = 8;
/// Ranges that one launch takes (`MAX_RANGES`).
const MAX_RANGES: usize = 64;

/// What is done with the sums (`Finish` in kernels/include/product.cuh).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Finish {
    Bias,
    BiasGelu,
    Residual,
    GateUp,
    Qkv,
    Logits,
    Partial,
}

impl Finish {
    /// Whether sums come in pairs.
    pub(crate) fn is_paired(self) -> bool {
        matches!(self, Self::GateUp | Self::Qkv)
    }
}

/// Rows of one expert (`RowRange`).
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct RowRange {
    first: u32,
    end: u32,
    expert: u32,
}

/// What a kernel is told (`Product`), passed by value.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct ProductArguments {
    pub(crate) x: CUdeviceptr,
    pub(crate) weight: [CUdeviceptr; 2],
    pub(crate) second: [CUdeviceptr; 2],
    pub(crate) out: CUdeviceptr,
    pub(crate) bias: CUdeviceptr,
    pub(crate) kv: CUdeviceptr,
    pub(crate) rope: CUdeviceptr,
    pub(crate) positions: CUdeviceptr,
    pub(crate) slots: CUdeviceptr,
    pub(crate) weight_type: u32,
    pub(crate) bias_type: u32,
    pub(crate) depth: u32,
    pub(crate) width: u32,
    pub(crate) out_width: u32,
    pub(crate) num_heads: u32,
    pub(crate) num_kv_heads: u32,
    pub(crate) head_dim: u32,
    pub(crate) published: u32,
    pub(crate) num_ranges: u32,
    pub(crate) num_vision_tiles: u32,
    pub(crate) num_tiles_m: u32,
    pub(crate) ranges: [RowRange; MAX_RANGES],
}

/// A product that is to be computed: its description and what decides between kernels.
pub(crate) struct Product {
    pub(crate) finish: Finish,
    pub(crate) arguments: ProductArguments,
    /// Rows of x that there are, whether they take part or not.
    pub(crate) x_rows: usize,
    /// Rows of each weight.
    pub(crate) weight_rows: usize,
    /// Groups of up to 8 rows of the language and the vision expert.
    pub(crate) groups: [usize; 2],
    pub(crate) num_rows: usize,
    /// Whether no weight is streamed.
    pub(crate) is_stable: bool,
    /// Who is told the sums as they are computed, by kernels that do that.
    pub(crate) push: Option<Push>,
    weight_dtype: DType,
    /// All ranges; each launch takes `MAX_RANGES` of them.
    ranges: Vec<RowRange>,
}

/// Weights of a product: the only ones or the gates, and the ups.
pub(crate) struct ProductWeights<'a> {
    pub(crate) first: ExpertWeights<'a, CudaWeight>,
    pub(crate) second: Option<ExpertWeights<'a, CudaWeight>>,
}

impl Product {
    /// `x Wᵀ` for the rows of `ranges`, each weight of shape `[weight_rows, x.columns()]`.
    pub(crate) fn new(
        op: &'static str, finish: Finish, x: &CudaBuffer, weights: &ProductWeights<'_>, ranges: &[ExpertRange],
        weight_rows: usize,
    ) -> Result<Self, BackendError> {
        expect_ranges(op, ranges, x.rows())?;
        let depth = x.columns();
        let used: Vec<&ExpertRange> = ranges.iter().filter(|range| !range.rows.is_empty()).collect();
        let mut arguments = ProductArguments {
            x: x.address(),
            weight: [0; 2],
            second: [0; 2],
            out: 0,
            bias: 0,
            kv: 0,
            rope: 0,
            positions: 0,
            slots: 0,
            weight_type: 0,
            bias_type: 0,
            depth: depth as u32,
            width: if finish == Finish::Qkv { weight_rows / 2 } else { weight_rows } as u32,
            out_width: 0,
            num_heads: 0,
            num_kv_heads: 0,
            head_dim: 0,
            published: 0,
            num_ranges: 0,
            num_vision_tiles: 0,
            num_tiles_m: 0,
            ranges: [RowRange::default(); MAX_RANGES],
        };
        let (mut is_stable, mut weight_dtype) = (true, None);
        let mut row_ranges = Vec::new();
        for range in used {
            let (name, expert) = match range.expert {
                Expert::Language => ("language", 0),
                Expert::Vision => ("vision", 1),
            };
            let (first, end) = (range.rows.start as u32, range.rows.end as u32);
            row_ranges.push(RowRange { first, end, expert: expert as u32 });
            let of = |weights: ExpertWeights<'_, CudaWeight>| {
                let weight = match range.expert {
                    Expert::Language => weights.language,
                    Expert::Vision => weights.vision,
                };
                weight
                    .cloned()
                    .ok_or_else(|| unsupported(op, format!("rows of the {name} expert, but no weight of it")))
            };
            let mut place = |weight: CudaWeight, argument: &'static str| {
                expect_shape(op, argument, weight.shape(), &[weight_rows, depth])?;
                let dtype = weight.dtype();
                if *weight_dtype.get_or_insert(dtype) != dtype {
                    return Err(unsupported(op, "weights of different element types"));
                }
                is_stable &= weight.is_stable();
                weight.address(op, argument)
            };
            arguments.weight[expert] = place(of(weights.first)?, "weight")?;
            if let Some(second) = weights.second {
                arguments.second[expert] = place(of(second)?, "second weight")?;
            }
        }
        let weight_dtype = weight_dtype.unwrap_or(DType::Bf16);
        arguments.weight_type = dtype_code(weight_dtype);
        let x_rows = x.rows();
        let (groups, num_rows) = ([0; 2], 0);
        let (ranges, push) = (row_ranges, None);
        Ok(Self { finish, arguments, x_rows, weight_rows, groups, num_rows, is_stable, push, weight_dtype, ranges })
    }

    /// Where [`is_of_few_rows`](Self::is_of_few_rows): who is told the sums.
    pub(crate) fn pushed(self, push: Push) -> Self {
        Self { push: Some(push), ..self }
    }

    /// Where plain results go.
    pub(crate) fn into_buffer(mut self, out: &CudaBuffer) -> Self {
        self.arguments.out = out.address();
        self.arguments.out_width = out.columns() as u32;
        self
    }

    /// Adds a bias of `[width]`.
    pub(crate) fn with_bias(mut self, op: &'static str, bias: Option<&CudaWeight>) -> Result<Self, BackendError> {
        if let Some(bias) = bias {
            self.arguments.bias = bias.address(op, "bias")?;
            self.arguments.bias_type = dtype_code(bias.dtype());
            self.is_stable &= bias.is_stable();
        }
        Ok(self)
    }

    /// Where rotated queries, keys and values go.
    pub(crate) fn into_heads(
        mut self, heads: HeadGeometry, rope: &CudaBuffer, mode: RopeMode, tables: &CudaTables, query: &CudaBuffer,
        kv: &CudaBuffer,
    ) -> Self {
        let arguments = &mut self.arguments;
        arguments.out = query.address();
        arguments.out_width = query.columns() as u32;
        arguments.kv = kv.address();
        arguments.rope = rope.address();
        arguments.positions = tables.positions();
        arguments.slots = tables.slots();
        arguments.num_heads = heads.num_heads as u32;
        arguments.num_kv_heads = heads.num_kv_heads as u32;
        arguments.head_dim = heads.head_dim as u32;
        arguments.published = u32::from(mode == RopeMode::Published);
        self
    }

    /// The arguments for kernels whose tiles have `groups_per_tile` groups of rows.
    pub(crate) fn tiled(&self, groups_per_tile: usize) -> ProductArguments {
        let [language, vision] = self.groups.map(|groups| groups.div_ceil(groups_per_tile) as u32);
        ProductArguments { num_vision_tiles: vision, num_tiles_m: language + vision, ..self.arguments }
    }

    /// Whether it is computed by the kernels for few rows (kernels/product_rows.cu).
    pub(crate) fn is_of_few_rows(&self, cuda: &CudaBackend) -> bool {
        let [range] = self.ranges[..] else { return false };
        // An inbox has room for the first rows of a group's sums alone.
        let first = if self.finish == Finish::Partial { 0 } else { range.first };
        let is_few = (range.end - first) as usize <= product_rows::MAX_ROWS;
        is_few && self.is_vectorised(cuda) && self.finish != Finish::BiasGelu
    }

    /// Whether kernels take it that load several elements at once.
    fn is_vectorised(&self, cuda: &CudaBackend) -> bool {
        let (is_bf16, depth) =
            (cuda.activations == DType::Bf16 && self.weight_dtype == DType::Bf16, self.arguments.depth);
        cuda.path != KernelPath::Generic && is_bf16 && depth > 0 && depth.is_multiple_of(8)
    }

    /// Computes it, in one launch unless there are very many ranges.
    pub(crate) fn run(mut self, cuda: &CudaBackend) -> Result<(), BackendError> {
        if self.weight_rows == 0 {
            return Ok(());
        }
        let is_of_few_rows = self.is_of_few_rows(cuda);
        for ranges in std::mem::take(&mut self.ranges).chunks(MAX_RANGES) {
            self.arguments.num_ranges = ranges.len() as u32;
            self.arguments.ranges[..ranges.len()].copy_from_slice(ranges);
            self.groups = [0; 2];
            self.num_rows = 0;
            for range in ranges {
                let rows = (range.end - range.first) as usize;
                self.groups[range.expert as usize] += rows.div_ceil(GROUP_ROWS);
                self.num_rows += rows;
            }
            // With the fastest kernel that takes it.
            if is_of_few_rows {
                product_rows::run(cuda, &self)?;
            } else if !self.is_vectorised(cuda) {
                product_generic::run(cuda, &self)?;
            } else if cuda.path == KernelPath::Hopper && product_wgmma::takes(&self) {
                product_wgmma::run(cuda, &self)?;
            } else {
                product_mma::run(cuda, &self)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;
    use crate::device::arg;
    use crate::echo::{Numbers, echo};

    #[test]
    fn arguments_are_laid_out_as_in_c() {
        // 11 addresses, 12 numbers, ranges of 3 each.
        assert_eq!(size_of::<ProductArguments>(), 11 * 8 + 12 * 4 + MAX_RANGES * 3 * 4);
        assert_eq!(offset_of!(ProductArguments, weight_type), 11 * 8);
        assert_eq!(offset_of!(ProductArguments, ranges), 11 * 8 + 12 * 4);
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn kernels_find_every_argument() {
        let mut numbers = Numbers::default();
        // In the order in which the kernel names the fields.
        let arguments = ProductArguments {
            x: numbers.wide(),
            weight: [numbers.wide(), numbers.wide()],
            second: [numbers.wide(), numbers.wide()],
            out: numbers.wide(),
            bias: numbers.wide(),
            kv: numbers.wide(),
            rope: numbers.wide(),
            positions: numbers.wide(),
            slots: numbers.wide(),
            weight_type: numbers.narrow(),
            bias_type: numbers.narrow(),
            depth: numbers.narrow(),
            width: numbers.narrow(),
            out_width: numbers.narrow(),
            num_heads: numbers.narrow(),
            num_kv_heads: numbers.narrow(),
            head_dim: numbers.narrow(),
            published: numbers.narrow(),
            num_ranges: numbers.narrow(),
            num_vision_tiles: numbers.narrow(),
            num_tiles_m: numbers.narrow(),
            ranges: [(); MAX_RANGES].map(|()| RowRange {
                first: numbers.narrow(),
                end: numbers.narrow(),
                expert: numbers.narrow(),
            }),
        };
        let given = numbers.given();
        // SAFETY: `product_echo` takes a `Product`, and writes a number for each of its fields.
        let found = unsafe { echo("product_generic", "product_echo", &[arg(&arguments)], given.len()) };
        assert_eq!(found, given);
    }
}
