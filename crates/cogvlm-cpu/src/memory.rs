//! Memory of a device: aligned, zeroed, counted by its arena.

use std::sync::Arc;

use bytemuck::{AnyBitPattern, NoUninit, Pod, Zeroable};
use cogvlm_backend::{Arena, BackendError, Lease};

/// One cache line; what allocations consist of, so that rows of 64 bytes never straddle lines.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Zeroed bytes, aligned to 64, taken from an arena for as long as they live.
pub(crate) struct Memory {
    lines: Box<[Line]>,
    num_bytes: usize,
    _lease: Arc<Lease>,
}

impl Memory {
    /// Takes `num_bytes` from `arena` for `what`.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`] where the arena, [`BackendError::Device`] where the system has too little left.
    pub(crate) fn take(arena: &Arena, what: &str, num_bytes: usize) -> Result<Self, BackendError> {
        let lease = arena.lease(what, num_bytes as u64)?;
        Self::under(Arc::new(lease), arena, what, num_bytes)
    }

    /// `num_bytes` for `what` that `lease` has taken already, perhaps with others.
    pub(crate) fn under(lease: Arc<Lease>, arena: &Arena, what: &str, num_bytes: usize) -> Result<Self, BackendError> {
        let lines = bytemuck::allocation::try_zeroed_slice_box(num_bytes.div_ceil(64)).map_err(|()| {
            let reason = format!("the system has no {num_bytes} bytes left for {what}; lower the device's budget");
            BackendError::Device { device: arena.device(), reason }
        })?;
        Ok(Self { lines, num_bytes, _lease: lease })
    }

    /// The elements.
    pub(crate) fn slice<T: AnyBitPattern>(&self) -> &[T] {
        bytemuck::cast_slice(&bytemuck::cast_slice::<Line, u8>(&self.lines)[..self.num_bytes])
    }

    /// The elements.
    pub(crate) fn slice_mut<T: AnyBitPattern + NoUninit>(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut bytemuck::cast_slice_mut::<Line, u8>(&mut self.lines)[..self.num_bytes])
    }
}
