//! Products of many rows on Hopper: kernels/product_wgmma.cu.

use cogvlm_backend::BackendError;

use crate::backend::CudaBackend;
use crate::device::{Launch, arg};
use crate::product::{Finish, Product};
use crate::tensor_map::TensorMap;

/// As in the kernel.
const THREADS: u32 = 384;
const TILE_ROWS: u32 = 128;
const ROW_BYTES: u32 = 128;

/// Descriptors of the operands (`Maps`), passed by value.
#[repr(C)]
struct Maps {
    x: TensorMap,
    x_groups: TensorMap,
    weight: [TensorMap; 2],
    second: [TensorMap; 2],
}

/// Whether these kernels compute it: whole heads of 128, widths that 16-byte stores reach.
pub(crate) fn takes(product: &Product) -> bool {
    let arguments = &product.arguments;
    match product.finish {
        Finish::Logits => false,
        Finish::Qkv => arguments.head_dim == 128 && arguments.out_width.is_multiple_of(8),
        _ => {
            let bias_is_bf16 = arguments.bias == 0 || arguments.bias_type == 1;
            arguments.width.is_multiple_of(8) && arguments.out_width.is_multiple_of(8) && bias_is_bf16
        }
    }
}

/// Width of the tiles: the one whose tiles take the least time in whole waves of the GPU.
fn tile_width(product: &Product, num_tiles_m: u32, num_multiprocessors: u32) -> u32 {
    let widths: &[u32] = match product.finish {
        Finish::Qkv => &[256, 128],
        Finish::BiasGelu => &[240, 208, 176, 144],
        _ => &[256, 240, 208, 176, 144],
    };
    let weight_rows = if product.finish.is_paired() { 2 * product.arguments.width } else { product.arguments.width };
    // A tile takes time for its columns, and as much as about 16 more to begin and to end.
    let cost = |width: u32| (num_tiles_m * weight_rows.div_ceil(width)).div_ceil(num_multiprocessors) * (width + 16);
    widths.iter().copied().min_by_key(|width| cost(*width)).expect("there are widths")
}

pub(crate) fn run(cuda: &CudaBackend, product: &Product) -> Result<(), BackendError> {
    let arguments = product.tiled(16);
    let num_multiprocessors = cuda.gpu.info.num_multiprocessors;
    let width = tile_width(product, arguments.num_tiles_m, num_multiprocessors);
    macro_rules! kernel {
        ($name:literal) => {
            match width {
                144 => concat!("product_wgmma_", $name, "_144"),
                176 => concat!("product_wgmma_", $name, "_176"),
                208 => concat!("product_wgmma_", $name, "_208"),
                240 => concat!("product_wgmma_", $name, "_240"),
                128 => concat!("product_wgmma_", $name, "_128"),
                _ => concat!("product_wgmma_", $name, "_256"),
            }
        };
    }
    let kernel = match product.finish {
        Finish::Bias | Finish::Logits => kernel!("bias"),
        Finish::BiasGelu => kernel!("bias_gelu"),
        Finish::Residual => kernel!("residual"),
        Finish::Partial => kernel!("partial"),
        Finish::GateUp => kernel!("gate_up"),
        Finish::Qkv => kernel!("qkv"),
    };
    let depth = arguments.depth as usize;
    // Each block of a cluster copies half of the weights of a tile.
    let box_rows = width / 2;
    let x = |rows| TensorMap::tiles(&cuda.gpu, arguments.x, [product.x_rows, depth], rows);
    let weight = |address: u64| {
        // An expert without rows has no weight here; its descriptor is never used.
        let address = if address == 0 { arguments.x } else { address };
        TensorMap::tiles(&cuda.gpu, address, [product.weight_rows, depth], box_rows)
    };
    let [language, vision] = arguments.weight;
    let [second_language, second_vision] = arguments.second;
    let maps = Maps {
        x: x(TILE_ROWS)?,
        x_groups: x(8)?,
        weight: [weight(language)?, weight(vision)?],
        second: [weight(second_language)?, weight(second_vision)?],
    };
    let stage_bytes = (TILE_ROWS + width) * ROW_BYTES;
    let num_stages = (227 * 1024 - 2048) / stage_bytes;
    // The ring, its alignment to 1024, and two barriers a stage.
    let shared = num_stages * stage_bytes + 1024 + 16 * num_stages;
    let columns = if product.finish == Finish::GateUp { width / 2 } else { width };
    let all_columns = if product.finish == Finish::Qkv { 2 * arguments.width } else { arguments.width };
    let num_columns = all_columns.div_ceil(columns);
    // As `num_units` in the kernel.
    let (vision, language) = (arguments.num_vision_tiles, arguments.num_tiles_m - arguments.num_vision_tiles);
    let units = (vision / 2 + language / 2) * num_columns + (vision % 2 + language % 2) * num_columns.div_ceil(2);
    let grid = 2 * units.min(num_multiprocessors / 2);
    let launch = Launch { shared, overlap: product.is_stable, ..Launch::blocks(grid, THREADS) };
    // SAFETY: the kernel takes a `Product` and `Maps` of bf16 matrices with a depth that is a multiple of 8 and the widths
    // that `takes` asks for; addresses, rows and widths in it were checked when it was made.
    unsafe { cuda.gpu.launch("product_wgmma", kernel, launch, &mut [arg(&arguments), arg(&maps)]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::echo::{Numbers, echo};

    #[test]
    #[ignore = "needs a GPU"]
    fn kernels_find_every_map() {
        let mut numbers = Numbers::default();
        let mut map = || TensorMap::of([(); 16].map(|()| numbers.wide()));
        // In the order in which the kernel names the fields.
        let maps = Maps { x: map(), x_groups: map(), weight: [map(), map()], second: [map(), map()] };
        let given = numbers.given();
        assert_eq!(size_of::<Maps>(), given.len() * size_of::<u64>());
        // SAFETY: `maps_echo` takes a `Maps`, and writes all of its numbers.
        let found = unsafe { echo("product_generic", "maps_echo", &[arg(&maps)], given.len()) };
        assert_eq!(found, given);
    }
}
