//! Products of a few rows at the rate of memory: kernels/product_rows.cu.

use cogvlm_backend::BackendError;

use crate::backend::CudaBackend;
use crate::device::{Launch, arg};
use crate::product::{Finish, Product};

/// The most rows that the kernels take.
pub(crate) const MAX_ROWS: usize = 16;

pub(crate) fn run(cuda: &CudaBackend, product: &Product) -> Result<(), BackendError> {
    let arguments = product.tiled(1);
    let weight_rows = if product.finish.is_paired() { 2 * arguments.width } else { arguments.width };
    let num_multiprocessors = cuda.gpu.info.num_multiprocessors;
    // Two tiles a block halve how often x is read, which counts from 5 rows on; where that leaves multiprocessors
    // without work, twice as many warps share the depth.
    let tiles = if product.num_rows > 4 { 2 } else { 1 };
    let warps = if weight_rows / (16 * tiles) < 4 * num_multiprocessors { 16 } else { 8 };
    let rows = if product.num_rows > 8 { 16 } else { 8 };
    macro_rules! kernel {
        ($name:literal) => {
            match (warps, tiles, rows) {
                (8, 1, 8) => concat!("product_rows_", $name, "_8x1_8"),
                (16, 1, 8) => concat!("product_rows_", $name, "_16x1_8"),
                (8, 2, 8) => concat!("product_rows_", $name, "_8x2_8"),
                (16, 2, 8) => concat!("product_rows_", $name, "_16x2_8"),
                (8, ..) => concat!("product_rows_", $name, "_8x2_16"),
                _ => concat!("product_rows_", $name, "_16x2_16"),
            }
        };
    }
    let kernel = match product.finish {
        Finish::Bias | Finish::BiasGelu => kernel!("bias"),
        Finish::Residual => kernel!("residual"),
        Finish::GateUp => kernel!("gate_up"),
        Finish::Qkv => kernel!("qkv"),
        Finish::Logits => kernel!("logits"),
    };
    let grid = weight_rows.div_ceil(16 * tiles);
    let launch = Launch { overlap: product.is_stable, ..Launch::blocks(grid, 32 * warps) };
    // SAFETY: the kernel takes one `Product`, of at most `MAX_ROWS` rows in one range and a depth that is a multiple of
    // 8, as `Product::run` sees to; addresses, rows and widths in it were checked when it was made.
    unsafe { cuda.gpu.launch("product_rows", kernel, launch, &mut [arg(&arguments)]) }
}
