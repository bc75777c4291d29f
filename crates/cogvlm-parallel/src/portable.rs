//! Rows between groups of several processes.

use cogvlm_backend::shape::unsupported;
use cogvlm_backend::{Backend, BackendError, HostRows, Portable, Shardable};

use crate::group::TensorParallel;

/// Rows leave and enter a group once: every member has the same.
impl<B: Shardable + Portable> Portable for TensorParallel<B> {
    fn pack(&self, parcel: Self::Parcel) -> Result<HostRows, BackendError> {
        self.settle()?;
        let first = parcel.into_iter().next();
        first.map_or_else(|| Err(unsupported("pack", "rows of no device")), |parcel| self.first().pack(parcel))
    }

    fn unpack(&self, rows: HostRows) -> Result<Self::Parcel, BackendError> {
        self.members().iter().map(|member| member.unpack(rows.clone())).collect()
    }
}
