//! Several devices on the host that compute one layer together.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cogvlm_backend::{Backend, BackendError, ExpertWeights, FollowingNorm, Shardable};
use cogvlm_core::DType;
use cogvlm_core::sharing::NUM_EXCHANGES;
use cogvlm_core::tokens::ExpertRange;
use half::bf16;

use crate::backend::CpuBackend;
use crate::buffer::CpuBuffer;
use crate::element::Element;
use crate::ops;
use crate::shape::{expect_buffer, unsupported};
use crate::weight::CpuWeight;

/// Sums of all members, in their order.
type Slots = Vec<[Mutex<CpuBuffer>; NUM_EXCHANGES]>;

/// One member's side of the memory that members share.
pub struct CpuExchange {
    member: usize,
    slots: Arc<Slots>,
}

fn lock(slot: &Mutex<CpuBuffer>) -> MutexGuard<'_, CpuBuffer> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shardable for CpuBackend {
    type Exchange = CpuExchange;

    fn join(members: &[&Self], shape: [usize; 2]) -> Result<Vec<CpuExchange>, BackendError> {
        if members.iter().any(|member| member.activation_dtype() != members[0].activation_dtype()) {
            return Err(unsupported("join", "members with activations of different types"));
        }
        let slot = |member: &&Self| member.alloc("sums of the group", DType::F32, shape).map(Mutex::new);
        let slots = members.iter().map(|member| Ok([slot(member)?, slot(member)?]));
        let slots: Arc<Slots> = Arc::new(slots.collect::<Result<_, BackendError>>()?);
        Ok((0..members.len()).map(|member| CpuExchange { member, slots: Arc::clone(&slots) }).collect())
    }

    fn linear_partial(
        &self, x: &CpuBuffer, weights: ExpertWeights<'_, CpuWeight>, ranges: &[ExpertRange], slot: usize,
        exchange: &mut CpuExchange,
    ) -> Result<(), BackendError> {
        let mut sums = lock(&exchange.slots[exchange.member][slot]);
        match self.activation_dtype() {
            DType::F32 => ops::linear_partial::linear_partial::<f32>(self, x, weights, ranges, &mut sums),
            _ => ops::linear_partial::linear_partial::<bf16>(self, x, weights, ranges, &mut sums),
        }
    }

    fn add_partials(
        &self, exchange: &mut CpuExchange, slot: usize, rows: usize, residual: &mut CpuBuffer,
        norm: Option<FollowingNorm<'_, Self>>,
    ) -> Result<(), BackendError> {
        match self.activation_dtype() {
            DType::F32 => add::<f32>(exchange, slot, rows, residual)?,
            _ => add::<bf16>(exchange, slot, rows, residual)?,
        }
        norm.map_or(Ok(()), |norm| self.rms_norm(residual, norm.weight, norm.eps, rows, norm.out))
    }

    fn replay_together(
        _members: &[&Self], _key: u64, operations: &mut dyn FnMut() -> Result<(), BackendError>,
    ) -> Result<(), BackendError> {
        operations()
    }
}

/// Adds the members' sums to the first `rows` rows of `residual`: the sum is rounded, then the result.
fn add<T: Element>(
    exchange: &CpuExchange, slot: usize, rows: usize, residual: &mut CpuBuffer,
) -> Result<(), BackendError> {
    const OP: &str = "add_partials";
    let width = residual.columns();
    expect_buffer(OP, "residual", residual, rows, width)?;
    let sums: Vec<_> = exchange.slots.iter().map(|slots| lock(&slots[slot])).collect();
    sums.iter().try_for_each(|sums| expect_buffer(OP, "sums", sums, rows, width))?;
    let sums: Vec<&[f32]> = sums.iter().map(|sums| sums.view(OP, "sums")).collect::<Result<_, _>>()?;
    for (index, residual) in residual.view_mut::<T>(OP, "residual")?[..rows * width].iter_mut().enumerate() {
        let sum = sums[1..].iter().fold(sums[0][index], |sum, sums| sum + sums[index]);
        *residual = T::of(residual.get() + T::round(sum));
    }
    Ok(())
}
