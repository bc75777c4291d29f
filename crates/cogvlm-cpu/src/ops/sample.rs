//! From logits to tokens.

use cogvlm_backend::{BackendError, SampleRequest, sampling};

use crate::backend::CpuBackend;
use crate::buffer::CpuBuffer;
use crate::shape::{expect, expect_buffer};

pub(crate) fn sample(
    _: &CpuBackend, logits: &CpuBuffer, requests: &[SampleRequest<'_>],
) -> Result<Vec<u32>, BackendError> {
    const OP: &str = "sample";
    let vocab_size = logits.columns();
    expect_buffer(OP, "logits", logits, requests.len(), vocab_size)?;
    expect(OP, "logits", &logits.shape(), vocab_size > 0, || "at least one column".to_owned())?;
    let rows = logits.view::<f32>(OP, "logits")?.chunks_exact(vocab_size);
    Ok(rows.zip(requests).map(|(row, request)| sampling::sample(row, request)).collect())
}
