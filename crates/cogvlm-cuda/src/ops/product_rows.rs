//! Products of a few rows at the rate of memory: kernels/product_rows.cu.

use cogvlm_backend::BackendError;
use cogvlm_backend::shape::unsupported;

use crate::backend::CudaBackend;
use crate::device::{Launch, arg};
use crate::product::{Finish, Product};

/// The most rows that the kernels take.
pub(crate) const MAX_ROWS: usize = 16;
/// As in the kernels.
const THREADS: u32 = 256;
const BLOCKS_PER_MULTIPROCESSOR: u32 = 2;

pub(crate) fn run(cuda: &CudaBackend, product: &Product) -> Result<(), BackendError> {
    let arguments = product.tiled(1);
    let tiles = arguments.width.div_ceil(if product.finish.is_paired() { 8 } else { 16 });
    let takes_16 = product.num_rows > 8;
    macro_rules! kernel {
        ($name:literal) => {
            if takes_16 { concat!("product_rows_", $name, "_16") } else { concat!("product_rows_", $name, "_8") }
        };
    }
    let kernel = match product.finish {
        Finish::Bias | Finish::BiasGelu => kernel!("bias"),
        Finish::Residual => kernel!("residual"),
        Finish::GateUp => kernel!("gate_up"),
        Finish::Qkv => kernel!("qkv"),
        Finish::Logits => kernel!("logits"),
        Finish::Partial => kernel!("partial"),
    };
    let grid = tiles.min(BLOCKS_PER_MULTIPROCESSOR * cuda.gpu.info.num_multiprocessors);
    let launch = Launch { overlap: product.is_stable, ..Launch::blocks(grid, THREADS) };
    let mut arguments = vec![arg(&arguments)];
    if product.finish == Finish::Partial {
        let push = product.push.as_ref().ok_or_else(|| unsupported("linear_partial", "sums that nobody is told"))?;
        arguments.push(arg(push));
    }
    // SAFETY: the kernel takes one `Product`, of at most `MAX_ROWS` rows in one range and a depth that is a multiple of
    // 8, as `Product::run` sees to; addresses, rows and widths in it were checked when it was made. A partial one takes
    // a `Push` beside it, whose inboxes have `MAX_ROWS` rows or as many as the sums.
    unsafe { cuda.gpu.launch("product_rows", kernel, launch, &mut arguments) }
}
