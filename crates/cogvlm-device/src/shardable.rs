//! Several devices of one kind that compute one layer together.

use cogvlm_backend::shape::unsupported;
use cogvlm_backend::{BackendError, ExpertWeights, FollowingNorm, Shardable};
use cogvlm_core::tokens::ExpertRange;
use cogvlm_cpu::{CpuBackend, CpuExchange};
use cogvlm_cuda::{CudaBackend, CudaExchange};

use crate::argument::{Argument, Buffer, Either, Weight};
use crate::backend::AnyBackend;

/// One member's side of what sums are exchanged through.
pub type Exchange = Either<CpuExchange, CudaExchange>;

/// All of them on the host, or all on GPUs.
fn of_one_kind<'a>(
    op: &'static str, members: &[&'a AnyBackend],
) -> Result<Either<Vec<&'a CpuBackend>, Vec<&'a CudaBackend>>, BackendError> {
    let (mut on_host, mut on_gpus) = (Vec::new(), Vec::new());
    for member in members {
        match member {
            AnyBackend::Cpu(cpu) => on_host.push(cpu),
            AnyBackend::Cuda(cuda) => on_gpus.push(cuda),
        }
    }
    match (on_host.is_empty(), on_gpus.is_empty()) {
        (_, true) => Ok(Either::Cpu(on_host)),
        (true, _) => Ok(Either::Cuda(on_gpus)),
        _ => Err(unsupported(op, "the host and GPUs do not compute layers together")),
    }
}

impl Shardable for AnyBackend {
    type Exchange = Exchange;

    fn join(members: &[&Self], shape: [usize; 2]) -> Result<Vec<Exchange>, BackendError> {
        Ok(match of_one_kind("join", members)? {
            Either::Cpu(members) => CpuBackend::join(&members, shape)?.into_iter().map(Either::Cpu).collect(),
            Either::Cuda(members) => CudaBackend::join(&members, shape)?.into_iter().map(Either::Cuda).collect(),
        })
    }

    fn linear_partial(
        &self, x: &Buffer, weights: ExpertWeights<'_, Weight>, ranges: &[ExpertRange], slot: usize,
        exchange: &mut Exchange,
    ) -> Result<(), BackendError> {
        const OP: &str = "linear_partial";
        match self {
            Self::Cpu(cpu) => {
                cpu.linear_partial(x.for_cpu(OP)?, weights.for_cpu(OP)?, ranges, slot, exchange.for_cpu(OP)?)
            }
            Self::Cuda(cuda) => {
                cuda.linear_partial(x.for_cuda(OP)?, weights.for_cuda(OP)?, ranges, slot, exchange.for_cuda(OP)?)
            }
        }
    }

    fn add_partials(
        &self, exchange: &mut Exchange, slot: usize, rows: usize, residual: &mut Buffer,
        norm: Option<FollowingNorm<'_, Self>>,
    ) -> Result<(), BackendError> {
        const OP: &str = "add_partials";
        match self {
            Self::Cpu(cpu) => {
                let norm = norm.map(|FollowingNorm { weight, eps, out }| {
                    Ok::<_, BackendError>(FollowingNorm { weight: weight.for_cpu(OP)?, eps, out: out.for_cpu(OP)? })
                });
                cpu.add_partials(exchange.for_cpu(OP)?, slot, rows, residual.for_cpu(OP)?, norm.transpose()?)
            }
            Self::Cuda(cuda) => {
                let norm = norm.map(|FollowingNorm { weight, eps, out }| {
                    Ok::<_, BackendError>(FollowingNorm { weight: weight.for_cuda(OP)?, eps, out: out.for_cuda(OP)? })
                });
                cuda.add_partials(exchange.for_cuda(OP)?, slot, rows, residual.for_cuda(OP)?, norm.transpose()?)
            }
        }
    }

    fn reset_exchange(&self, exchange: &mut Exchange) -> Result<(), BackendError> {
        const OP: &str = "reset_exchange";
        match self {
            Self::Cpu(cpu) => cpu.reset_exchange(exchange.for_cpu(OP)?),
            Self::Cuda(cuda) => cuda.reset_exchange(exchange.for_cuda(OP)?),
        }
    }

    fn check_exchange(&self, exchange: &Exchange) -> Result<(), BackendError> {
        const OP: &str = "check_exchange";
        match self {
            Self::Cpu(cpu) => cpu.check_exchange(exchange.for_cpu(OP)?),
            Self::Cuda(cuda) => cuda.check_exchange(exchange.for_cuda(OP)?),
        }
    }

    fn replay_together(
        members: &[&Self], key: u64, operations: &mut dyn FnMut() -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        match of_one_kind("replay", members)? {
            Either::Cpu(members) => CpuBackend::replay_together(&members, key, operations),
            Either::Cuda(members) => CudaBackend::replay_together(&members, key, operations),
        }
    }
}
