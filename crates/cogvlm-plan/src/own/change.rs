//! The smallest change to a request that gives it a wanted property: found by search, and each answer is one that was
//! planned and had the property.

use cogvlm_core::Device;
use cogvlm_core::memory::{GIB, MIB};

use super::sizes::image_prompt_tokens;
use super::try_plan;
use crate::error::{Change, PlanError, tenths_of_gib};
use crate::plan::{DeviceBudget, MAX_CONTEXT, Plan, PlanRequest, STAGING_SLOTS};

/// The refusal of a request that does not fit.
pub(super) fn does_not_fit(request: &PlanRequest) -> PlanError {
    let changes = smallest_changes(request, |_| true);
    let raised = changes.iter().find_map(|change| match change {
        Change::Raise(device, bytes) => Some((*device, *bytes)),
        _ => None,
    });
    // One card with room for everything always does, and so does such a host; a request has one of them.
    let (device, needed_bytes) = raised.unwrap_or((Device::Cpu, enough_for_all(request)));
    PlanError::DoesNotFit {
        model: request.model.clone(),
        device,
        budget_bytes: budget(request, device).unwrap_or(0),
        needed_bytes,
        changes,
    }
}

/// Changes after which `request` has a plan that is `good`: the smallest raise of a card, more host memory, a shorter
/// context, fewer sequences, as far as each does alone.
pub(crate) fn smallest_changes(request: &PlanRequest, good: impl Fn(&Plan) -> bool) -> Vec<Change> {
    let does = |change: Change| {
        let changed = apply(request, change);
        matches!(try_plan(&changed), Ok(Some(plan)) if good(&plan))
    };
    let enough = enough_for_all(request);
    let raise = |device: Device, from: u64| least_budget(from, enough, |bytes| does(Change::Raise(device, bytes)));
    let mut changes = Vec::new();
    let mut cards: Vec<Device> = request.budgets.iter().map(|budget| budget.device).collect();
    cards.retain(|device| matches!(device, Device::Gpu(_)));
    cards.sort_unstable();
    let raised = cards.into_iter().filter_map(|device| {
        let from = budget(request, device)?;
        raise(device, from).map(|to| (to.saturating_sub(from), device, to))
    });
    if let Some((_, device, to)) = raised.min() {
        changes.push(Change::Raise(device, to));
    }
    match budget(request, Device::Cpu) {
        Some(from) => changes.extend(raise(Device::Cpu, from).map(|to| Change::Raise(Device::Cpu, to))),
        None => {
            let add = least_budget(0, enough, |bytes| does(Change::Add(Device::Cpu, bytes)));
            changes.extend(add.map(|bytes| Change::Add(Device::Cpu, bytes)));
        }
    }
    // A context that does not hold an image helps nobody.
    let shortest = image_prompt_tokens(&request.spec).div_ceil(CONTEXT_GRAIN);
    let planned = request.limits.context_len / CONTEXT_GRAIN;
    let contexts = most(shortest, planned, |n| does(Change::Context(n * CONTEXT_GRAIN)));
    changes.extend(contexts.map(|n| Change::Context(n * CONTEXT_GRAIN)));
    changes.extend(most(1, request.limits.max_sequences, |n| does(Change::Batch(n))).map(Change::Batch));
    changes
}

/// The longest context with which no weight leaves the device that uses it; `None` where that is the one planned for.
pub(crate) fn longest_context(request: &PlanRequest) -> Option<usize> {
    let planned = request.limits.context_len;
    let all_at_home = |tokens: usize| {
        let changed = apply(request, Change::Context(tokens));
        let at_home = |plan: &Plan| {
            plan.placements
                .iter()
                .all(|placement| placement.residency.place(placement.executes_on) == placement.executes_on)
        };
        matches!(try_plan(&changed), Ok(Some(plan)) if at_home(&plan))
    };
    // Nobody plans for more than a hundred times of what they asked for.
    let highest = MAX_CONTEXT.min(planned.saturating_mul(128)) / CONTEXT_GRAIN;
    let longest = most(planned / CONTEXT_GRAIN, highest, |n| all_at_home(n * CONTEXT_GRAIN))?;
    (longest * CONTEXT_GRAIN > planned).then_some(longest * CONTEXT_GRAIN)
}

/// Contexts are proposed in multiples of this.
const CONTEXT_GRAIN: usize = 128;

fn budget(request: &PlanRequest, device: Device) -> Option<u64> {
    request.budgets.iter().find(|budget| budget.device == device).map(|budget| budget.bytes)
}

fn apply(request: &PlanRequest, change: Change) -> PlanRequest {
    let mut request = request.clone();
    let limits = &mut request.limits;
    match change {
        Change::Raise(device, bytes) | Change::Add(device, bytes) => {
            request.budgets.retain(|budget| budget.device != device);
            request.budgets.push(DeviceBudget { device, bytes });
        }
        Change::Context(tokens) => {
            // A step that held a whole prompt goes on to hold one.
            let whole_prompt = limits.max_tokens >= limits.context_len;
            let longest = tokens.max(limits.max_sequences);
            limits.max_tokens = if whole_prompt { longest } else { limits.max_tokens.min(longest) };
            limits.context_len = tokens;
        }
        Change::Batch(sequences) => {
            limits.max_sequences = sequences;
            limits.max_tokens = limits.max_tokens.min(limits.context_len.max(sequences));
        }
    }
    request
}

/// A budget that holds the whole model on one device.
fn enough_for_all(request: &PlanRequest) -> u64 {
    let sizes = request.sizes();
    let (vision, text) = (0..sizes.num_vision, sizes.num_vision..sizes.units.len());
    let weights: u64 = sizes.groups.iter().map(|group| group.bytes).sum();
    let ring = STAGING_SLOTS as u64 * sizes.slot_of(&text).max(sizes.slot_of(&vision));
    let work = sizes.kv_bytes(&text) + sizes.workspace_bytes(&vision, &text);
    let all = (weights + work + ring).saturating_add(request.card_reserve_bytes(&sizes));
    // A whole GiB at the end of the search is one that flags can say.
    all.next_multiple_of(GIB)
}

/// The least budget above `from` and up to `enough` that does, in tenths of a GiB, or in MiB where the whole model is
/// small. Assumes that more never does worse; the answer itself was tried.
fn least_budget(from: u64, enough: u64, does: impl Fn(u64) -> bool) -> Option<u64> {
    if from >= enough {
        return None;
    }
    let (step, unit): (fn(u64) -> u64, u64) =
        if enough > 8 * GIB { (tenths_of_gib, GIB / 10) } else { (|n| n * MIB, MIB) };
    let low = (from / unit..).find(|&n| step(n) > from)? as usize;
    let high = (enough / unit..).find(|&n| step(n) >= enough)? as usize;
    // The search below looks for the most; look for the most that can be taken away.
    let away = most(0, high.checked_sub(low)?, |away| does(step((high - away) as u64)))?;
    Some(step((high - away) as u64))
}

/// The most of `low..=high` that does, assuming that whatever is less than one that does does too.
fn most(low: usize, high: usize, does: impl Fn(usize) -> bool) -> Option<usize> {
    if low > high || !does(low) {
        return None;
    }
    let (mut yes, mut no) = (low, high + 1);
    while no - yes > 1 {
        let middle = yes + (no - yes) / 2;
        if does(middle) { yes = middle } else { no = middle }
    }
    Some(yes)
}
