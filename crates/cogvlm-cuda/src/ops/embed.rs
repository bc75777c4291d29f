//! `hidden[i] = table[ids[i]]`

use cogvlm_backend::shape::{expect, expect_rows, unsupported};
use cogvlm_backend::{BackendError, HostWeight};
use cogvlm_core::DType;
use cudarc::driver::sys::CUdeviceptr;
use half::{bf16, f16};

use crate::backend::CudaBackend;
use crate::buffer::{CudaBuffer, dtype_code};
use crate::device::{Launch, arg};
use crate::sampled::SampledTokens;
use crate::weight::CudaWeight;

/// As in kernels/embed.cu.
const THREADS: u32 = 256;
/// As in kernels/embed.cu: ids that a launch takes along as an argument.
const MOST_IDS: usize = 512;

/// Rows that are looked up on the host and copied together.
const HOST_ROWS: usize = 64;

pub(crate) fn embed(
    cuda: &CudaBackend, table: &CudaWeight, ids: &[u32], hidden: &mut CudaBuffer,
) -> Result<(), BackendError> {
    let vocab_size = check(cuda, table, ids.len(), hidden)?;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
        return Err(unsupported(OP, format!("token id {id} in a vocabulary of {vocab_size}")));
    }
    if let Some(host) = table.host() {
        return embed_from_host(cuda, host, ids, hidden);
    }
    for (index, piece) in ids.chunks(MOST_IDS).enumerate() {
        let mut token_ids = [0_u32; MOST_IDS];
        token_ids[..piece.len()].copy_from_slice(piece);
        // SAFETY: ids are within the table and rows within `hidden`, as checked above.
        unsafe { launch(cuda, table, &token_ids, 0, piece.len(), hidden, index * MOST_IDS) }?;
    }
    Ok(())
}

/// Of tokens that this device chose: they are read where they are, unless the table rests on the host.
pub(crate) fn embed_sampled(
    cuda: &CudaBackend, table: &CudaWeight, tokens: &SampledTokens, hidden: &mut CudaBuffer,
) -> Result<(), BackendError> {
    if table.host().is_some() {
        return embed(cuda, table, &tokens.wait()?, hidden);
    }
    let vocab_size = check(cuda, table, tokens.len(), hidden)?;
    if tokens.vocab_size > vocab_size {
        let reason = format!("tokens of a vocabulary of {} in a table of {vocab_size}", tokens.vocab_size);
        return Err(unsupported(OP, reason));
    }
    // SAFETY: the tokens are within the table and rows within `hidden`, as checked above; what wrote the tokens went to
    // the stream before.
    unsafe { launch(cuda, table, &[0; MOST_IDS], tokens.address(), tokens.len(), hidden, 0) }
}

const OP: &str = "embed";

/// Gives the size of the table's vocabulary.
fn check(cuda: &CudaBackend, table: &CudaWeight, rows: usize, hidden: &CudaBuffer) -> Result<usize, BackendError> {
    let width = hidden.columns();
    expect_rows(OP, "hidden", hidden.shape(), [rows, width])?;
    expect(OP, "table", table.shape(), table.shape().len() == 2 && table.shape()[1] == width, || {
        format!("[vocab_size, {width}]")
    })?;
    hidden.expect_dtype(OP, "hidden", cuda.activations)?;
    Ok(table.shape()[0])
}

/// Rows `first_row..` of `hidden`, `rows` of them, for tokens at `sampled`, or `ids` where that is 0.
///
/// # Safety
/// The tokens are within the table, which is on the device, and the rows within `hidden`; there are at most `MOST_IDS`
/// where they are passed by value.
unsafe fn launch(
    cuda: &CudaBackend, table: &CudaWeight, ids: &[u32; MOST_IDS], sampled: CUdeviceptr, rows: usize,
    hidden: &CudaBuffer, first_row: usize,
) -> Result<(), BackendError> {
    let width = hidden.columns();
    if width == 0 {
        return Ok(());
    }
    let (address, output) = (table.address(OP, "table")?, hidden.row(first_row));
    let (table_type, columns, chunks) = (dtype_code(table.dtype()), width as u32, (width / 8) as u32);
    let launch = Launch { overlap: table.is_stable(), ..Launch::blocks(rows as u32, THREADS) };
    if cuda.activations == DType::Bf16 && table.dtype() == DType::Bf16 && width.is_multiple_of(8) {
        let mut arguments = [arg(&address), arg(ids), arg(&sampled), arg(&output), arg(&chunks)];
        // SAFETY: arguments and THREADS are those of `embed_bf16_wide`; the caller vouches for ids and rows; rows of a
        // multiple of eight elements begin at multiples of 16 bytes.
        return unsafe { cuda.gpu.launch("embed", "embed_bf16_wide", launch, &mut arguments) };
    }
    let kernel = if cuda.activations == DType::F32 { "embed_f32" } else { "embed_bf16" };
    let mut arguments = [arg(&address), arg(&table_type), arg(ids), arg(&sampled), arg(&output), arg(&columns)];
    // SAFETY: arguments and THREADS are those of `embed_f32` and `embed_bf16`; the caller vouches for ids and rows.
    unsafe { cuda.gpu.launch("embed", kernel, launch, &mut arguments) }
}

/// Looks the rows up where they rest, and copies them over as the type of activations.
fn embed_from_host(
    cuda: &CudaBackend, table: &HostWeight, ids: &[u32], hidden: &mut CudaBuffer,
) -> Result<(), BackendError> {
    let (stored, width) = (table.dtype(), hidden.columns());
    let stored_bytes = width * stored.size_bytes();
    for (index, piece) in ids.chunks(HOST_ROWS).enumerate() {
        let mut rows = vec![0_u8; piece.len() * stored_bytes];
        for (row, &id) in rows.chunks_exact_mut(stored_bytes).zip(piece) {
            table.read_at(id as usize * stored_bytes, row)?;
        }
        let rounded = if stored == cuda.activations { rows } else { round(stored, cuda.activations, &rows) };
        cuda.uploader.upload(hidden.row(index * HOST_ROWS), &rounded)?;
    }
    Ok(())
}

/// Elements of `from` as elements of `to`, which is f32 or bf16, both little-endian bytes.
fn round(from: DType, to: DType, bytes: &[u8]) -> Vec<u8> {
    let values: Vec<f32> = match from {
        DType::F32 => bytes.as_chunks().0.iter().map(|element| f32::from_le_bytes(*element)).collect(),
        DType::Bf16 => bytes.as_chunks().0.iter().map(|element| bf16::from_le_bytes(*element).to_f32()).collect(),
        DType::F16 => bytes.as_chunks().0.iter().map(|element| f16::from_le_bytes(*element).to_f32()).collect(),
    };
    match to {
        DType::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_rounded_to_the_nearest() {
        // 1 + 3/256 lies half way between two bf16 numbers; the even one is 1 + 4/256.
        let bytes = (1.0_f32 + 3.0 / 256.0).to_le_bytes();
        assert_eq!(round(DType::F32, DType::Bf16, &bytes), bf16::from_f32(1.015_625).to_le_bytes());
        assert_eq!(round(DType::F16, DType::F32, &f16::from_f32(-2.5).to_le_bytes()), (-2.5_f32).to_le_bytes());
        assert_eq!(round(DType::Bf16, DType::F32, &bf16::from_f32(0.5).to_le_bytes()), 0.5_f32.to_le_bytes());
    }
}
