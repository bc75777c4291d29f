//! Rows on their way from rank to rank, between devices of one kind or of both.

use std::ops::Range;

use cogvlm_backend::shape::{expect, unsupported};
use cogvlm_backend::{Backend, BackendError, DeviceChannel, HostRows, Portable, RowsLayout};
use cogvlm_core::DType;
use cogvlm_cpu::{CpuBackend, CpuParcel};
use cogvlm_cuda::{CudaBackend, NcclChannel};

use crate::argument::{Argument, Buffer, Either, Outbox};
use crate::backend::AnyBackend;

/// Rows copied out of a buffer, still with the device that sends them.
pub struct Parcel {
    dtype: DType,
    columns: usize,
    from: Either<<CpuBackend as Backend>::Parcel, <CudaBackend as Backend>::Parcel>,
}

impl Parcel {
    pub(crate) fn pack(
        sender: &AnyBackend, outbox: &Outbox, buffer: &Buffer, rows: Range<usize>,
    ) -> Result<Self, BackendError> {
        const OP: &str = "send";
        let from = match sender {
            AnyBackend::Cpu(cpu) => Either::Cpu(cpu.send(outbox.for_cpu(OP)?, buffer.for_cpu(OP)?, rows)?),
            AnyBackend::Cuda(cuda) => Either::Cuda(cuda.send(outbox.for_cuda(OP)?, buffer.for_cuda(OP)?, rows)?),
        };
        Ok(Self { dtype: buffer.dtype, columns: buffer.columns, from })
    }

    /// Into rows `first_row..` of a buffer of `receiver`. Between two kinds the rows pass through host memory: as f32,
    /// which holds every bf16, so that writing them rounds nothing.
    pub(crate) fn unpack(
        self, receiver: &AnyBackend, buffer: &mut Buffer, first_row: usize,
    ) -> Result<(), BackendError> {
        const OP: &str = "receive";
        let Self { dtype, columns, from } = self;
        let values = match (receiver, from) {
            (AnyBackend::Cpu(cpu), Either::Cpu(parcel)) => {
                return cpu.receive(parcel, buffer.for_cpu(OP)?, first_row);
            }
            (AnyBackend::Cuda(cuda), Either::Cuda(parcel)) => {
                return cuda.receive(parcel, buffer.for_cuda(OP)?, first_row);
            }
            (AnyBackend::Cuda(_), Either::Cpu(parcel)) => parcel.to_f32(),
            (AnyBackend::Cpu(_), Either::Cuda(parcel)) => CpuParcel::of_host_rows(parcel.into_host_rows()?)?.to_f32(),
        };
        unpack_values(receiver, &values, dtype, columns, buffer, first_row)
    }
}

/// What a device of the same kind checks when it receives, then a write.
fn unpack_values(
    receiver: &AnyBackend, values: &[f32], dtype: DType, columns: usize, buffer: &mut Buffer, first_row: usize,
) -> Result<(), BackendError> {
    const OP: &str = "receive";
    if dtype != buffer.dtype {
        return Err(unsupported(OP, format!("rows of {dtype} cannot go into a buffer of {}", buffer.dtype)));
    }
    let rows = values.len() / columns.max(1);
    expect(OP, "rows", &[rows, columns], columns == buffer.columns, || format!("rows of {}", buffer.columns))?;
    receiver.write(values, buffer, first_row)
}

impl Portable for AnyBackend {
    fn pack(&self, parcel: Parcel) -> Result<HostRows, BackendError> {
        match parcel.from {
            Either::Cpu(parcel) => Ok(parcel.into_host_rows()),
            Either::Cuda(parcel) => parcel.into_host_rows(),
        }
    }

    fn unpack(&self, rows: HostRows) -> Result<Parcel, BackendError> {
        let (dtype, columns) = (rows.dtype, rows.columns);
        Ok(Parcel { dtype, columns, from: Either::Cpu(CpuParcel::of_host_rows(rows)?) })
    }
}

/// A channel between GPUs, which may be either backend's.
pub struct GpuChannel(pub NcclChannel);

impl DeviceChannel<AnyBackend> for GpuChannel {
    fn send(&self, parcel: Parcel) -> Result<RowsLayout, BackendError> {
        match parcel.from {
            Either::Cuda(parcel) => self.0.send(parcel),
            Either::Cpu(_) => Err(unsupported("send", "rows of the host do not go over a channel between GPUs")),
        }
    }

    fn receive(&self, layout: RowsLayout) -> Result<Parcel, BackendError> {
        let RowsLayout { dtype, columns, .. } = layout;
        Ok(Parcel { dtype, columns, from: Either::Cuda(self.0.receive(layout)?) })
    }

    fn check(&self) -> Result<(), BackendError> {
        self.0.check()
    }

    fn close(&self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cogvlm_core::Device;
    use cogvlm_cpu::Threads;

    use super::*;

    fn backend(activations: DType) -> AnyBackend {
        let threads = Threads::new(1).expect("a thread can be started");
        let cpu = CpuBackend::new(Device::Cpu, 1 << 20, activations, Arc::new(threads));
        AnyBackend::Cpu(cpu.expect("f32 and bf16 are supported"))
    }

    #[test]
    fn rows_that_pass_through_host_memory_keep_their_bits() {
        for dtype in [DType::F32, DType::Bf16] {
            let backend = backend(dtype);
            let mut source = backend.alloc("source", dtype, [3, 5]).unwrap();
            let mut target = backend.alloc("target", dtype, [4, 5]).unwrap();
            let values: Vec<f32> = (0..15).map(|index| (index as f32 - 7.3) * 1e-3).collect();
            backend.write(&values, &mut source, 0).unwrap();
            let outbox = backend.outbox(1 << 10).unwrap();
            let Either::Cpu(parcel) = Parcel::pack(&backend, &outbox, &source, 1..3).unwrap().from else {
                panic!("a GPU's")
            };
            unpack_values(&backend, &parcel.to_f32(), dtype, 5, &mut target, 2).unwrap();
            assert_eq!(backend.read(&target, 2..4).unwrap(), backend.read(&source, 1..3).unwrap());
            assert_eq!(backend.read(&target, 0..2).unwrap(), [0.0; 10]);
        }
    }

    #[test]
    fn rows_that_do_not_fit_are_refused() {
        let backend = backend(DType::Bf16);
        let mut target = backend.alloc("target", DType::Bf16, [2, 4]).unwrap();
        let mut receive = |values: &[f32], dtype, columns, first_row| {
            unpack_values(&backend, values, dtype, columns, &mut target, first_row).map_err(|error| error.to_string())
        };
        assert_eq!(receive(&[1.0; 8], DType::Bf16, 4, 0), Ok(()));
        assert!(receive(&[1.0; 8], DType::F32, 4, 0).unwrap_err().contains("rows of f32"), "another type");
        assert!(receive(&[1.0; 8], DType::Bf16, 2, 0).unwrap_err().contains("rows of 4"), "another width");
        assert!(receive(&[1.0; 8], DType::Bf16, 4, 1).unwrap_err().contains("write"), "too many rows");
    }
}
