//! `out[i] = norm(x[logit_rows[i]])`

use cogvlm_backend::BackendError;

use super::rms_norm::norm_rows;
use crate::backend::CpuBackend;
use crate::buffer::CpuBuffer;
use crate::element::Element;
use crate::shape::expect_buffer;
use crate::tables::CpuTables;
use crate::weight::CpuWeight;

pub(crate) fn rms_norm_logit_rows<T: Element>(
    cpu: &CpuBackend, x: &CpuBuffer, weight: &CpuWeight, eps: f32, tables: &CpuTables, out: &mut CpuBuffer,
) -> Result<(), BackendError> {
    const OP: &str = "rms_norm_logit_rows";
    let batch = tables.batch();
    expect_buffer(OP, "x", x, batch.num_rows(), x.columns())?;
    norm_rows::<T>(OP, cpu, x, weight, eps, batch.logit_rows.len(), |index| batch.logit_rows[index], out)
}
