//! What a group has with others: rows that leave the process, memory in common.

use cogvlm_backend::shape::unsupported;
use cogvlm_backend::{Backend, BackendError, HostRows, Portable, Shardable};

use crate::group::TensorParallel;

impl<B: Shardable> TensorParallel<B> {
    /// The device, where it computes alone.
    pub(crate) fn only(&self, op: &'static str) -> Result<&B, BackendError> {
        match self.members() {
            [member] => Ok(member),
            _ => Err(unsupported(op, "devices that compute together have no memory in common with others")),
        }
    }
}

/// Rows leave and enter a group once: every member has the same.
impl<B: Shardable + Portable> Portable for TensorParallel<B> {
    fn pack(&self, parcel: Self::Parcel) -> Result<HostRows, BackendError> {
        self.settle()?;
        let first = parcel.into_iter().next();
        first.map_or_else(|| Err(unsupported("pack", "rows of no device")), |parcel| self.first().pack(parcel))
    }

    fn unpack(&self, rows: HostRows) -> Result<Self::Parcel, BackendError> {
        // The last one gets the rows themselves.
        let rows = std::iter::repeat_n(rows, self.members().len());
        self.members().iter().zip(rows).map(|(member, rows)| member.unpack(rows)).collect()
    }
}
