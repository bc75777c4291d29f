//! Working memory of a thread.

use std::cell::RefCell;

/// The most that one thread keeps for packed panels, tiles of sums and scores; it does not grow with the context. It is
/// not part of a device's arena. (240 rows of 512 f32, two panels, 32 Ki sums, and 420 x 128 scores in f32 and bf16,
/// for heads of up to 512.)
pub const SCRATCH_BYTES_PER_THREAD: usize = 2 << 20;

/// Arrays that an operation may use while it works on one task. Contents are left over from the task before.
#[derive(Default)]
pub(crate) struct Scratch {
    /// Rows of the left operand in f32.
    pub(crate) rows: Vec<f32>,
    /// Rows of the left operand in bf16, as bits.
    pub(crate) rows_bf16: Vec<u16>,
    /// A packed panel in f32.
    pub(crate) panel: Vec<f32>,
    /// A packed panel of pairs of bf16.
    pub(crate) pairs: Vec<u32>,
    /// Sums of a tile.
    pub(crate) sums: Vec<f32>,
    /// Scores of a block of queries and keys.
    pub(crate) scores: Vec<f32>,
    /// Running maximum and running sum of each query.
    pub(crate) softmax: Vec<[f32; 2]>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Calls `work` with this thread's scratch. A task may not ask for it twice.
pub(crate) fn with<R>(work: impl FnOnce(&mut Scratch) -> R) -> R {
    SCRATCH.with_borrow_mut(work)
}

/// The first `len` elements of `array`, which grows where it is shorter.
pub(crate) fn grown<T: Default + Clone>(array: &mut Vec<T>, len: usize) -> &mut [T] {
    if array.len() < len {
        array.resize(len, T::default());
    }
    &mut array[..len]
}
