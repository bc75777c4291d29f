//! The weights of one rank: resident, or streamed through a staging ring just ahead of their use.

use std::collections::{HashMap, VecDeque};

use cogvlm_backend::{Backend, BackendError, ExpertWeights, HostWeight, StagedSource};
use cogvlm_core::{Expert, Unit, WeightGroup};

/// Names a group of weights.
pub type GroupKey = (Unit, WeightGroup);

/// Where the weights of a group come from. Tensors stand in inventory order.
pub enum GroupSource<W> {
    /// On the device, or used where they rest.
    Resident(Vec<W>),
    /// Streamed to the device for each use.
    Streamed(Vec<SourceTensor<W>>),
}

/// One tensor of a streamed group.
#[derive(Clone)]
pub enum SourceTensor<W> {
    /// In host memory.
    Host(HostWeight),
    /// In the mapped file only: the system is asked to read it ahead.
    File(HostWeight),
    /// On another device.
    Peer(W),
}

/// All weights of one rank.
pub struct Weights<B: Backend> {
    groups: HashMap<GroupKey, GroupSource<B::Weight>>,
    ring: Option<Ring<B>>,
}

/// The staging ring and what is under way in it.
struct Ring<B: Backend> {
    slots: B::Ring,
    num_slots: usize,
    free: Vec<usize>,
    /// Groups that the running stage will use, in order, and that are not being copied yet.
    upcoming: VecDeque<GroupKey>,
    /// Groups that are being copied or are there, in order of use, with their slots.
    in_flight: VecDeque<(GroupKey, usize)>,
}

/// Weights of a group, for one use. Give it back with [`Weights::give_back`].
pub(crate) struct Taken<W> {
    weights: Vec<W>,
    slot: Option<usize>,
}

impl<W> Taken<W> {
    /// The group's tensors, of which there are `N`.
    pub(crate) fn exactly<const N: usize>(&self) -> &[W; N] {
        self.weights.as_slice().try_into().expect("groups hold the tensors of the inventory, which the caller names")
    }
}

/// The two experts' groups of one operation, each where it has rows.
pub(crate) struct TakenPair<W> {
    language: Option<Taken<W>>,
    vision: Option<Taken<W>>,
}

impl<W> TakenPair<W> {
    /// The `index`-th tensor of each expert's group.
    pub(crate) fn nth(&self, index: usize) -> ExpertWeights<'_, W> {
        ExpertWeights {
            language: self.language.as_ref().map(|taken| &taken.weights[index]),
            vision: self.vision.as_ref().map(|taken| &taken.weights[index]),
        }
    }
}

/// Groups beyond those being copied that are read ahead from files.
const READ_AHEAD_GROUPS: usize = 4;

fn read_ahead<W>(groups: &HashMap<GroupKey, GroupSource<W>>, key: GroupKey) {
    let Some(GroupSource::Streamed(tensors)) = groups.get(&key) else { return };
    for tensor in tensors {
        if let SourceTensor::File(weight) = tensor {
            weight.read_ahead();
        }
    }
}

impl<B: Backend> Weights<B> {
    /// Weights in `groups`, with a ring of `num_slots` slots of `slot_bytes` where any are streamed.
    ///
    /// # Errors
    /// Where the device has no room for the ring.
    pub fn new(
        backend: &B, groups: HashMap<GroupKey, GroupSource<B::Weight>>, num_slots: usize, slot_bytes: usize,
    ) -> Result<Self, BackendError> {
        let streams = groups.values().any(|source| matches!(source, GroupSource::Streamed(_)));
        let ring = if streams {
            let slots = backend.staging(num_slots, slot_bytes)?;
            let (upcoming, in_flight) = (VecDeque::new(), VecDeque::new());
            Some(Ring { slots, num_slots, free: (0..num_slots).collect(), upcoming, in_flight })
        } else {
            None
        };
        Ok(Self { groups, ring })
    }

    /// Whether a group is used where it is, and not streamed.
    pub(crate) fn is_resident(&self, key: GroupKey) -> bool {
        matches!(self.groups.get(&key), Some(GroupSource::Resident(_)))
    }

    /// Begins a stage that will use `keys` in this order: the first streamed ones are copied from now on.
    pub(crate) fn begin(&mut self, backend: &B, keys: impl Iterator<Item = GroupKey>) -> Result<(), BackendError> {
        let groups = &self.groups;
        let Some(ring) = &mut self.ring else { return Ok(()) };
        // A stage that failed half-way leaves copies behind: wait for them, so that their slots are free again.
        while let Some((_, slot)) = ring.in_flight.pop_front() {
            // Whether those copies succeeded no longer matters.
            drop(backend.staged(&mut ring.slots, slot));
        }
        // So are those of weights that it had taken and, failing, did not give back: nobody holds them any more.
        ring.free.clear();
        ring.free.extend(0..ring.num_slots);
        ring.upcoming = keys.filter(|key| matches!(groups.get(key), Some(GroupSource::Streamed(_)))).collect();
        for key in ring.upcoming.iter().take(READ_AHEAD_GROUPS) {
            read_ahead(groups, *key);
        }
        self.fill(backend)
    }

    /// Starts copies into free slots.
    fn fill(&mut self, backend: &B) -> Result<(), BackendError> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        while !ring.free.is_empty() {
            let Some(key) = ring.upcoming.pop_front() else { break };
            let Some(GroupSource::Streamed(tensors)) = self.groups.get(&key) else { continue };
            let sources = tensors.iter().map(|tensor| match tensor {
                SourceTensor::Host(weight) | SourceTensor::File(weight) => {
                    StagedSource::Host(HostWeight::clone(weight))
                }
                SourceTensor::Peer(weight) => StagedSource::Peer(weight.clone()),
            });
            let slot = ring.free.pop().expect("checked by the loop");
            ring.in_flight.push_back((key, slot));
            let (unit, group) = key;
            backend.stage_for(group.sharing(unit), &mut ring.slots, slot, sources.collect())?;
            if let Some(entering) = ring.upcoming.get(READ_AHEAD_GROUPS - 1) {
                read_ahead(&self.groups, *entering);
            }
        }
        Ok(())
    }

    /// The weights of a group, waited for where they are streamed.
    pub(crate) fn take(&mut self, backend: &B, key: GroupKey) -> Result<Taken<B::Weight>, BackendError> {
        match self.groups.get(&key) {
            Some(GroupSource::Resident(weights)) => Ok(Taken { weights: weights.clone(), slot: None }),
            Some(GroupSource::Streamed(_)) => {
                let ring = self.ring.as_mut().expect("a ring exists where any group is streamed");
                let (next, slot) = ring.in_flight.pop_front().expect("stages announce the groups they use");
                debug_assert_eq!(next, key, "stages use groups in the order announced");
                Ok(Taken { weights: backend.staged(&mut ring.slots, slot)?, slot: Some(slot) })
            }
            None => {
                let reason = format!("the plan gives this rank no weights for {} ({:?})", key.0, key.1);
                Err(BackendError::Unsupported { op: "take weights", reason })
            }
        }
    }

    /// The groups of the experts that have rows, for one operation.
    pub(crate) fn take_pair(
        &mut self, backend: &B, unit: Unit, group: fn(Expert) -> WeightGroup, uses: [bool; 2],
    ) -> Result<TakenPair<B::Weight>, BackendError> {
        let [language, vision] = uses;
        let language = language.then(|| self.take(backend, (unit, group(Expert::Language)))).transpose()?;
        let vision = vision.then(|| self.take(backend, (unit, group(Expert::Vision)))).transpose()?;
        Ok(TakenPair { language, vision })
    }

    /// Ends a use: a slot it held is filled with what comes next.
    pub(crate) fn give_back(&mut self, backend: &B, taken: Taken<B::Weight>) -> Result<(), BackendError> {
        let Taken { weights, slot } = taken;
        drop(weights);
        if let (Some(slot), Some(ring)) = (slot, &mut self.ring) {
            ring.free.push(slot);
            self.fill(backend)?;
        }
        Ok(())
    }

    /// [`give_back`](Self::give_back) for both experts.
    pub(crate) fn give_back_pair(&mut self, backend: &B, pair: TakenPair<B::Weight>) -> Result<(), BackendError> {
        for taken in [pair.language, pair.vision].into_iter().flatten() {
            self.give_back(backend, taken)?;
        }
        Ok(())
    }
}
