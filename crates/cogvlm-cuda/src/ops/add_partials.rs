//! `residual += Σ sums` over the GPUs that compute together, and the norm that follows: kernels/add_partials.cu.

use cogvlm_backend::shape::{expect_rows, expect_shape};
use cogvlm_backend::{BackendError, FollowingNorm};
use cogvlm_core::DType;
use cogvlm_core::sharing::NUM_EXCHANGES;
use cudarc::driver::sys::CUdeviceptr;

use crate::backend::CudaBackend;
use crate::buffer::{CudaBuffer, dtype_code};
use crate::device::{Launch, arg};
use crate::exchange::{CudaExchange, MAX_MEMBERS, PATIENCE_S};

/// As in the kernels.
const THREADS: u32 = 256;
/// As in `add_pushed_bf16_4096`.
const PUSHED_THREADS: u32 = 512;
/// Width that the fast kernels are made for.
const WIDE: usize = 4096;

/// What a kernel is told (`Meeting`), passed by value.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Meeting {
    sums: [CUdeviceptr; MAX_MEMBERS],
    inboxes: [CUdeviceptr; MAX_MEMBERS],
    flags: [CUdeviceptr; MAX_MEMBERS],
    epochs: CUdeviceptr,
    exchange: CUdeviceptr,
    next_exchange: CUdeviceptr,
    broken: CUdeviceptr,
    failure: CUdeviceptr,
    patience_ns: u64,
    member: u32,
    num_members: u32,
    rows: u32,
    width: u32,
}

impl Meeting {
    fn new(exchange: &CudaExchange, slot: usize, rows: usize, width: usize) -> Self {
        Self {
            sums: exchange.all_sums(slot),
            inboxes: exchange.inboxes(slot),
            flags: exchange.all_flags(),
            epochs: exchange.epochs(),
            exchange: exchange.number(slot),
            next_exchange: exchange.number((slot + 1) % NUM_EXCHANGES),
            broken: exchange.broken(),
            failure: exchange.failure(),
            patience_ns: PATIENCE_S * 1_000_000_000,
            member: exchange.member as u32,
            num_members: exchange.num_members() as u32,
            rows: rows as u32,
            width: width as u32,
        }
    }
}

/// The norm as a kernel takes it; addresses are 0 where there is none.
#[derive(Default)]
struct Norm {
    weight: CUdeviceptr,
    weight_type: u32,
    eps: f32,
    out: CUdeviceptr,
}

pub(crate) fn add_partials(
    cuda: &CudaBackend, exchange: &mut CudaExchange, slot: usize, rows: usize, residual: &CudaBuffer,
    norm: Option<FollowingNorm<'_, CudaBackend>>,
) -> Result<(), BackendError> {
    const OP: &str = "add_partials";
    let width = residual.columns();
    expect_rows(OP, "residual", residual.shape(), [rows, width])?;
    expect_rows(OP, "sums", exchange.sums(slot).shape(), [rows, width])?;
    residual.expect_dtype(OP, "residual", cuda.activations)?;
    let (mut is_stable, mut is_plain) = (true, true);
    let mut following = Norm::default();
    if let Some(FollowingNorm { weight, eps, out }) = norm {
        expect_shape(OP, "weight", weight.shape(), &[width])?;
        expect_rows(OP, "out", out.shape(), [rows, width])?;
        out.expect_dtype(OP, "out", cuda.activations)?;
        is_stable = weight.is_stable();
        is_plain = weight.dtype() == DType::Bf16;
        let weight_type = dtype_code(weight.dtype());
        following = Norm { weight: weight.address(OP, "weight")?, weight_type, eps, out: out.address() };
    }
    let meeting = Meeting::new(exchange, slot, rows, width);
    let way = if exchange.take_pushed(slot) { Way::Pushed } else { Way::Read };
    let num_blocks = if way == Way::Pushed { rows } else { rows.min(exchange.max_blocks) };
    let is_wide = cuda.activations == DType::Bf16 && is_plain && width == WIDE;
    // SAFETY: rows and widths of everything were checked above; slots of all members have one shape, as `join` made
    // them, and products send no more rows than an inbox has. Everybody's memory lives as long as the exchange, which
    // waits for the stream before it goes.
    unsafe { run(cuda, &meeting, way, residual.address(), &following, num_blocks as u32, is_stable, is_wide) }
}

/// How sums come from the other members.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// They are read where they were computed.
    Read,
    /// They were sent.
    Pushed,
}

/// Loads every kernel that [`add_partials`] may launch, and launches it on no rows.
pub(crate) fn load(cuda: &CudaBackend, exchange: &CudaExchange) -> Result<(), BackendError> {
    let (meeting, norm) = (Meeting::new(exchange, 0, 0, 0), Norm::default());
    let ways: &[_] = match cuda.activations {
        DType::Bf16 => &[(Way::Read, false), (Way::Read, true), (Way::Pushed, false), (Way::Pushed, true)],
        _ => &[(Way::Read, false)],
    };
    ways.iter().try_for_each(|(way, is_wide)| {
        // SAFETY: without rows nothing is read or written but the numbers of exchanges.
        unsafe { run(cuda, &meeting, *way, 0, &norm, 1, false, *is_wide) }
    })
}

/// # Safety
/// The residual, the sums of all members and what the norm writes have the rows and the width of `meeting`, in the type
/// of the activations, and the norm's weight has that width; `is_wide` only where that is `WIDE` and both are bf16.
/// Rows that were pushed are as many as `num_blocks`, and bf16.
#[expect(clippy::too_many_arguments, reason = "what the two callers differ in")]
unsafe fn run(
    cuda: &CudaBackend, meeting: &Meeting, way: Way, residual: CUdeviceptr, norm: &Norm, num_blocks: u32,
    overlap: bool, is_wide: bool,
) -> Result<(), BackendError> {
    let Norm { weight, weight_type, eps, out } = norm;
    let (kernel, threads) = match (way, is_wide) {
        (Way::Read, true) if meeting.num_members <= 2 => ("add_partials_bf16_4096_x2", THREADS),
        (Way::Read, true) => ("add_partials_bf16_4096_x8", THREADS),
        (Way::Read, false) if cuda.activations == DType::F32 => ("add_partials_f32", THREADS),
        (Way::Read, false) => ("add_partials_bf16", THREADS),
        (Way::Pushed, true) => ("add_pushed_bf16_4096", PUSHED_THREADS),
        (Way::Pushed, false) => ("add_pushed_bf16", THREADS),
    };
    let launch = Launch { overlap, ..Launch::blocks(num_blocks, threads) };
    if is_wide {
        let mut arguments = [arg(meeting), arg(&residual), arg(weight), arg(out), arg(eps)];
        // SAFETY: arguments and threads are those of the three kernels for `WIDE` columns; the caller vouches for the
        // rest.
        return unsafe { cuda.gpu.launch("add_partials", kernel, launch, &mut arguments) };
    }
    let mut arguments = [arg(meeting), arg(&residual), arg(weight), arg(weight_type), arg(out), arg(eps)];
    // SAFETY: arguments and threads are those of the three kernels for any width; the caller vouches for the rest.
    unsafe { cuda.gpu.launch("add_partials", kernel, launch, &mut arguments) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::echo::{Numbers, echo};
    use crate::exchange::Push;

    #[test]
    fn a_meeting_is_laid_out_as_in_c() {
        // 3 x 8 + 5 addresses and a time, then 4 numbers.
        assert_eq!(size_of::<Meeting>(), 30 * 8 + 4 * 4);
        assert_eq!(std::mem::offset_of!(Meeting, member), 30 * 8);
        // 7 + 1 addresses, a number, and what makes it whole words.
        assert_eq!(size_of::<Push>(), 8 * 8 + 8);
        assert_eq!(std::mem::offset_of!(Push, num_others), 8 * 8);
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn kernels_find_every_field_of_what_members_are_told() {
        let mut numbers = Numbers::default();
        // In the order in which the kernel names the fields.
        let meeting = Meeting {
            sums: [(); MAX_MEMBERS].map(|()| numbers.wide()),
            inboxes: [(); MAX_MEMBERS].map(|()| numbers.wide()),
            flags: [(); MAX_MEMBERS].map(|()| numbers.wide()),
            epochs: numbers.wide(),
            exchange: numbers.wide(),
            next_exchange: numbers.wide(),
            broken: numbers.wide(),
            failure: numbers.wide(),
            patience_ns: numbers.wide(),
            member: numbers.narrow(),
            num_members: numbers.narrow(),
            rows: numbers.narrow(),
            width: numbers.narrow(),
        };
        let push = Push {
            inboxes: [(); MAX_MEMBERS - 1].map(|()| numbers.wide()),
            exchange: numbers.wide(),
            num_others: numbers.narrow(),
        };
        let given = numbers.given();
        // SAFETY: `add_partials_echo` takes a `Meeting` and a `Push`, and writes a number for each of their fields.
        let found = unsafe { echo("add_partials", "add_partials_echo", &[arg(&meeting), arg(&push)], given.len()) };
        assert_eq!(found, given);
    }
}
