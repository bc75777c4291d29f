//! `hidden[i] = table[ids[i]]`

use cogvlm_backend::BackendError;

use crate::backend::CpuBackend;
use crate::buffer::CpuBuffer;
use crate::element::Element;
use crate::shape::{expect, expect_buffer, unsupported};
use crate::weight::CpuWeight;

pub(crate) fn embed<T: Element>(
    _: &CpuBackend, table: &CpuWeight, ids: &[u32], hidden: &mut CpuBuffer,
) -> Result<(), BackendError> {
    const OP: &str = "embed";
    let width = hidden.columns();
    expect_buffer(OP, "hidden", hidden, ids.len(), width)?;
    expect(OP, "table", table.shape(), table.shape().len() == 2 && table.shape()[1] == width, || {
        format!("[vocab_size, {width}]")
    })?;
    let vocab_size = table.shape()[0];
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
        return Err(unsupported(OP, format!("token id {id} in a vocabulary of {vocab_size}")));
    }
    if width == 0 {
        return Ok(());
    }
    let hidden = hidden.view_mut::<T>(OP, "hidden")?;
    for (row, &id) in hidden.chunks_exact_mut(width).zip(ids) {
        table.round_row(id as usize, row);
    }
    Ok(())
}
