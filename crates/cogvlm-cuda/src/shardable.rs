//! Several GPUs that compute one layer together.

use cogvlm_backend::{BackendError, ExpertWeights, FollowingNorm, Shardable};
use cogvlm_core::tokens::ExpertRange;

use crate::backend::CudaBackend;
use crate::buffer::CudaBuffer;
use crate::exchange::CudaExchange;
use crate::graph::Graphs;
use crate::ops;
use crate::weight::CudaWeight;

impl Shardable for CudaBackend {
    type Exchange = CudaExchange;

    fn join(members: &[&Self], shape: [usize; 2]) -> Result<Vec<CudaExchange>, BackendError> {
        CudaExchange::join(members, shape)
    }

    fn linear_partial(
        &self, x: &CudaBuffer, weights: ExpertWeights<'_, CudaWeight>, ranges: &[ExpertRange], slot: usize,
        exchange: &mut CudaExchange,
    ) -> Result<(), BackendError> {
        ops::linear_partial::linear_partial(self, x, weights, ranges, slot, exchange)
    }

    fn add_partials(
        &self, exchange: &mut CudaExchange, slot: usize, rows: usize, residual: &mut CudaBuffer,
        norm: Option<FollowingNorm<'_, Self>>,
    ) -> Result<(), BackendError> {
        ops::add_partials::add_partials(self, exchange, slot, rows, residual, norm)
    }

    fn reset_exchange(&self, exchange: &mut CudaExchange) -> Result<(), BackendError> {
        exchange.reset()
    }

    fn check_exchange(&self, exchange: &CudaExchange) -> Result<(), BackendError> {
        exchange.check()
    }

    fn replay_together(
        members: &[&Self], key: u64, operations: &mut dyn FnMut() -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        let graphs: Vec<&Graphs> = members.iter().map(|member| &member.graphs).collect();
        Graphs::replay_together(&graphs, key, operations)
    }
}
