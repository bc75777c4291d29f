//! Channels to devices of other processes.

use cogvlm_backend::shape::unsupported;
use cogvlm_backend::{BackendError, DeviceChannel, RowsLayout, Shardable};

use crate::group::TensorParallel;

/// A channel of a device that computes alone.
pub struct ChannelOfOne<C>(pub C);

impl<B: Shardable, C: DeviceChannel<B>> DeviceChannel<TensorParallel<B>> for ChannelOfOne<C> {
    fn send(&self, parcel: Vec<B::Parcel>) -> Result<RowsLayout, BackendError> {
        let [parcel] = <[B::Parcel; 1]>::try_from(parcel)
            .map_err(|parcel| unsupported("send", format!("rows of {} devices over a channel of one", parcel.len())))?;
        self.0.send(parcel)
    }

    fn receive(&self, layout: RowsLayout) -> Result<Vec<B::Parcel>, BackendError> {
        Ok(vec![self.0.receive(layout)?])
    }

    fn check(&self) -> Result<(), BackendError> {
        self.0.check()
    }

    fn close(&self) {
        self.0.close();
    }
}
