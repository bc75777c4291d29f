//! The backend that is several.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cogvlm_backend::shape::unsupported;
use cogvlm_backend::{
    Activation, Backend, BackendError, Batch, BufferRole, ExpertWeights, FollowingNorm, HeadGeometry, HostWeight,
    MemoryUse, PatchGeometry, PatchWeights, RopeMode, SampleRequest, Shardable, StagedSource,
};
use cogvlm_core::sharing::{NUM_EXCHANGES, Sharing, attended_columns, check_even, exchange_shape};
use cogvlm_core::tokens::ExpertRange;
use cogvlm_core::workspace::{BufferKind, PARCEL_ALIGN, StepLimits};
use cogvlm_core::{DType, Device, ModelSpec, TensorSpec};

use crate::shard::Shard;
use crate::shares::{SharedBuffer, SharedRing, SharedWeight, covered_rows, of_member};

/// Devices of one kind that compute every layer together, or one device alone.
///
/// Operations are called member after member from the caller's thread, and wait for nobody: members meet where they add
/// up sums. That is put off until it is known what follows, so that a norm is done along with it.
pub struct TensorParallel<B: Shardable> {
    members: Vec<B>,
    devices: Vec<Device>,
    /// `None` for a member alone.
    group: Option<Group<B>>,
}

struct Group<B: Shardable> {
    /// Rows of queries, keys and values in a fused projection.
    qkv_parts: [usize; 3],
    /// Columns that each member attends to.
    attended_columns: usize,
    state: Mutex<State<B>>,
}

struct State<B: Shardable> {
    /// Of each member.
    exchanges: Vec<B::Exchange>,
    /// The slot that is used next. Recordings begin with slot 0, and every step does.
    slot: usize,
    /// Sums that are still to be added up.
    pending: Option<Pending<B>>,
    /// What the first member sends to the others goes through it.
    relay: Option<B::Outbox>,
}

/// Parts of a product on all members, in one slot.
struct Pending<B: Backend> {
    residual: SharedBuffer<B>,
    slot: usize,
    rows: usize,
}

impl<B: Shardable> TensorParallel<B> {
    /// A device that computes alone: the group of it does what it does.
    pub fn alone(device: Device, member: B) -> Self {
        Self { members: vec![member], devices: vec![device], group: None }
    }

    /// `members` that compute the model of `spec` together, in steps of up to `limits`.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`] where there are none, the model does not come out even among them, or they cannot
    /// read each other's memory; [`BackendError::OutOfMemory`].
    pub fn new(members: Vec<(Device, B)>, spec: &ModelSpec, limits: &StepLimits) -> Result<Self, BackendError> {
        const OP: &str = "join";
        let (devices, members): (Vec<_>, Vec<_>) = members.into_iter().unzip();
        check_even(spec, members.len()).map_err(|error| unsupported(OP, error.to_string()))?;
        let group = if members.len() == 1 {
            None
        } else {
            let exchanges = B::join(&members.iter().collect::<Vec<_>>(), exchange_shape(spec, limits))?;
            let state = State { exchanges, slot: 0, pending: None, relay: None };
            let [query, key] = [spec.num_heads, spec.num_kv_heads].map(|heads| heads * spec.head_dim);
            let attended_columns = attended_columns(spec, members.len());
            Some(Group { qkv_parts: [query, key, key], attended_columns, state: Mutex::new(state) })
        };
        Ok(Self { members, devices, group })
    }

    /// The members, in their order.
    pub fn members(&self) -> &[B] {
        &self.members
    }

    pub(crate) fn first(&self) -> &B {
        &self.members[0]
    }

    /// Its own thing for each of the first `count` members.
    fn each<T>(
        &self, count: usize, make: impl FnMut((usize, &B)) -> Result<T, BackendError>,
    ) -> Result<Vec<T>, BackendError> {
        self.members.iter().enumerate().take(count).map(make).collect()
    }

    fn state(&self) -> Option<MutexGuard<'_, State<B>>> {
        self.group.as_ref().map(|group| group.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Lets slot 0 be the next. That it was used last means that a step broke off half-way: then everybody is waited
    /// for, and begins anew.
    fn align_slots(&self) -> Result<(), BackendError> {
        let Some(mut state) = self.state() else { return Ok(()) };
        let State { exchanges, slot, .. } = &mut *state;
        if *slot != 0 {
            self.members.iter().try_for_each(Backend::synchronize)?;
            self.members.iter().zip(exchanges).try_for_each(|(member, exchange)| member.reset_exchange(exchange))?;
            *slot = 0;
        }
        Ok(())
    }

    /// Whether all members take part, once values have come from the first.
    fn check(&self) -> Result<(), BackendError> {
        let Some(state) = self.state() else { return Ok(()) };
        self.members.iter().zip(&state.exchanges).try_for_each(|(member, exchange)| member.check_exchange(exchange))
    }

    /// The heads that each member has, where `sharing` of the queries says that it has some.
    fn heads_of_member(
        &self, op: &'static str, sharing: Sharing, heads: HeadGeometry,
    ) -> Result<HeadGeometry, BackendError> {
        if sharing != Sharing::Columns || self.group.is_none() {
            return Ok(heads);
        }
        let (count, HeadGeometry { num_heads, num_kv_heads, head_dim }) = (self.members.len(), heads);
        if !num_heads.is_multiple_of(count) || !num_kv_heads.is_multiple_of(count) {
            let reason = format!("{count} devices cannot share {num_heads} and {num_kv_heads} heads evenly");
            return Err(unsupported(op, reason));
        }
        Ok(HeadGeometry { num_heads: num_heads / count, num_kv_heads: num_kv_heads / count, head_dim })
    }

    fn alloc_parts(
        &self, sharing: Sharing, what: &'static str, dtype: DType, [rows, columns]: [usize; 2],
    ) -> Result<Vec<B::Buffer>, BackendError> {
        let count = self.members.len();
        match sharing {
            Sharing::First => self.each(1, |(_, member)| member.alloc(what, dtype, [rows, columns])),
            Sharing::Replicated => self.each(count, |(_, member)| member.alloc(what, dtype, [rows, columns])),
            _ if !columns.is_multiple_of(count) => {
                Err(unsupported("alloc", format!("{count} devices cannot share {columns} columns of {what} evenly")))
            }
            _ => self.each(count, |(_, member)| member.alloc(what, dtype, [rows, columns / count])),
        }
    }
}

impl<B: Shardable> Backend for TensorParallel<B> {
    type Buffer = SharedBuffer<B>;
    type Weight = SharedWeight<B::Weight>;
    type Tables = Vec<B::Tables>;
    type Ring = SharedRing<B>;
    type Parcel = Vec<B::Parcel>;
    type Outbox = Vec<B::Outbox>;
    type Moment = B::Moment;
    type Sampled = Vec<B::Sampled>;

    fn activation_dtype(&self) -> DType {
        self.first().activation_dtype()
    }

    /// Of all members together.
    fn memory(&self) -> MemoryUse {
        let mut all = self.first().memory();
        for memory in self.members[1..].iter().map(Backend::memory) {
            all.in_use += memory.in_use;
            all.peak += memory.peak;
            all.capacity += memory.capacity;
        }
        all
    }

    fn memory_by_device(&self, _device: Device) -> Vec<(Device, MemoryUse)> {
        self.devices.iter().copied().zip(self.members.iter().map(Backend::memory)).collect()
    }

    fn alloc(&self, what: &'static str, dtype: DType, shape: [usize; 2]) -> Result<SharedBuffer<B>, BackendError> {
        let parts = self.alloc_parts(Sharing::Replicated, what, dtype, shape)?;
        Ok(SharedBuffer::new(Sharing::Replicated, parts, Vec::new()))
    }

    fn alloc_for(
        &self, role: BufferRole, what: &'static str, dtype: DType, shape: [usize; 2],
    ) -> Result<SharedBuffer<B>, BackendError> {
        let Some(group) = &self.group else { return self.alloc(what, dtype, shape) };
        let sharing = match role {
            BufferRole::Workspace(kind) => kind.sharing(),
            BufferRole::Kv => Sharing::Columns,
        };
        let parts = self.alloc_parts(sharing, what, dtype, shape)?;
        let mut attended = Vec::new();
        if role == BufferRole::Workspace(BufferKind::Normed) {
            let shape = [shape[0], group.attended_columns];
            attended = self.each(self.members.len(), |(_, member)| member.alloc(what, dtype, shape))?;
        }
        if role == BufferRole::Workspace(BufferKind::VisionFeatures)
            && let Some(mut state) = self.state()
        {
            let bytes = shape[0] * shape[1] * dtype.size_bytes();
            state.relay = Some(self.first().outbox(bytes.next_multiple_of(PARCEL_ALIGN as usize))?);
        }
        Ok(SharedBuffer::new(sharing, parts, attended))
    }

    fn alloc_shared(
        &self, what: &'static str, dtype: DType, shape: [usize; 2],
    ) -> Result<SharedBuffer<B>, BackendError> {
        Ok(SharedBuffer::alone(self.only("alloc_shared")?.alloc_shared(what, dtype, shape)?))
    }

    fn share(&self, buffer: &SharedBuffer<B>) -> Result<SharedBuffer<B>, BackendError> {
        Ok(SharedBuffer::alone(self.only("share")?.share(buffer.lock().input("share", 0)?)?))
    }

    fn load(&self, weight: &HostWeight) -> Result<Self::Weight, BackendError> {
        let parts = self.each(self.members.len(), |(_, member)| member.load(weight))?;
        Ok(SharedWeight::new(Sharing::Replicated, parts))
    }

    fn load_for(&self, tensor: &TensorSpec, weight: &HostWeight) -> Result<Self::Weight, BackendError> {
        let Some(group) = &self.group else { return self.load(weight) };
        let (sharing, count) = (tensor.sharing(), self.members.len());
        let num_parts = if sharing == Sharing::First { 1 } else { count };
        let parts = self.each(num_parts, |(index, member)| {
            member.load(&Shard::of(weight, sharing, group.qkv_parts, index, count)?)
        })?;
        Ok(SharedWeight::new(sharing, parts))
    }

    fn attach(&self, weight: &HostWeight) -> Result<Self::Weight, BackendError> {
        let parts = self.each(self.members.len(), |(_, member)| member.attach(weight))?;
        Ok(SharedWeight::new(Sharing::Replicated, parts))
    }

    fn prepare_streaming(&self, weights: &[HostWeight]) {
        self.first().prepare_streaming(weights);
    }

    fn staging(&self, num_slots: usize, slot_bytes: usize) -> Result<Self::Ring, BackendError> {
        let rings = self.each(self.members.len(), |(_, member)| member.staging(num_slots, slot_bytes))?;
        Ok(SharedRing { rings, sharings: vec![Sharing::Replicated; num_slots] })
    }

    /// All of them to every member.
    fn stage(
        &self, ring: &mut Self::Ring, slot: usize, sources: Vec<StagedSource<Self::Weight>>,
    ) -> Result<(), BackendError> {
        self.stage_for(Sharing::Replicated, ring, slot, sources)
    }

    /// To each member its part.
    fn stage_for(
        &self, sharing: Sharing, ring: &mut Self::Ring, slot: usize, sources: Vec<StagedSource<Self::Weight>>,
    ) -> Result<(), BackendError> {
        const OP: &str = "stage";
        let count = if sharing == Sharing::First { 1 } else { self.members.len() };
        let parts = self.group.as_ref().map(|group| group.qkv_parts);
        let of_member = |member: usize| {
            let source = |source: &StagedSource<Self::Weight>| {
                Ok(match (source, parts) {
                    (StagedSource::Host(weight), None) => StagedSource::Host(HostWeight::clone(weight)),
                    (StagedSource::Host(weight), Some(parts)) => {
                        StagedSource::Host(Shard::of(weight, sharing, parts, member, self.members.len())?)
                    }
                    (StagedSource::Peer(weight), _) => StagedSource::Peer(weight.of(OP, member)?.clone()),
                })
            };
            sources.iter().map(source).collect::<Result<Vec<_>, BackendError>>()
        };
        for (index, (member, ring)) in self.members.iter().zip(&mut ring.rings).enumerate().take(count) {
            member.stage(ring, slot, of_member(index)?)?;
        }
        match ring.sharings.get_mut(slot) {
            Some(staged) => *staged = sharing,
            None => return Err(unsupported(OP, format!("slot {slot} of a ring of {}", ring.sharings.len()))),
        }
        Ok(())
    }

    fn staged(&self, ring: &mut Self::Ring, slot: usize) -> Result<Vec<Self::Weight>, BackendError> {
        let sharing = ring.sharings.get(slot).copied().unwrap_or(Sharing::Replicated);
        let count = if sharing == Sharing::First { 1 } else { self.members.len() };
        let members = self.members.iter().zip(&mut ring.rings).take(count);
        let staged = members.map(|(member, ring)| member.staged(ring, slot)).collect::<Result<Vec<_>, _>>()?;
        let mut staged: Vec<_> = staged.into_iter().map(Vec::into_iter).collect();
        let weights = std::iter::from_fn(|| staged.iter_mut().map(Iterator::next).collect::<Option<Vec<_>>>());
        Ok(weights.map(|parts| SharedWeight::new(sharing, parts)).collect())
    }

    fn write(&self, values: &[f32], buffer: &mut SharedBuffer<B>, first_row: usize) -> Result<(), BackendError> {
        self.settle()?;
        let mut buffer = buffer.lock();
        let (num_parts, is_cut) = (buffer.parts.len(), buffer.sharing == Sharing::Columns && self.group.is_some());
        for (index, member) in self.members.iter().enumerate().take(num_parts) {
            if is_cut {
                return Err(unsupported("write", "rows of which each member of the group has a part"));
            }
            member.write(values, buffer.output("write", index)?, first_row)?;
        }
        Ok(())
    }

    /// Where members have some columns each, what they have is put together.
    fn read(&self, buffer: &SharedBuffer<B>, rows: Range<usize>) -> Result<Vec<f32>, BackendError> {
        self.settle()?;
        let buffer = buffer.lock();
        let is_cut = self.group.is_some() && (buffer.sharing == Sharing::Columns || buffer.holds_attended);
        let num_parts = if is_cut { self.members.len() } else { 1 };
        let parts = self.each(num_parts, |(index, member)| member.read(buffer.input("read", index)?, rows.clone()))?;
        self.check()?;
        if let [_] = parts[..] {
            return Ok(parts.concat());
        }
        let num_rows = rows.len();
        let of_row = |row: usize| {
            parts.iter().flat_map(move |part| {
                let columns = part.len() / num_rows;
                &part[row * columns..][..columns]
            })
        };
        Ok((0..num_rows).flat_map(of_row).copied().collect())
    }

    fn outbox(&self, bytes: usize) -> Result<Self::Outbox, BackendError> {
        self.each(self.members.len(), |(_, member)| member.outbox(bytes))
    }

    /// Every member that has the rows sends them to its like.
    fn send(
        &self, outbox: &Self::Outbox, buffer: &SharedBuffer<B>, rows: Range<usize>,
    ) -> Result<Self::Parcel, BackendError> {
        self.settle()?;
        let buffer = buffer.lock();
        self.each(buffer.parts.len(), |(index, member)| {
            member.send(&outbox[index], buffer.input("send", index)?, rows.clone())
        })
    }

    fn receive(
        &self, parcel: Self::Parcel, buffer: &mut SharedBuffer<B>, first_row: usize,
    ) -> Result<(), BackendError> {
        self.settle()?;
        let mut buffer = buffer.lock();
        // What came from another process is there for every member.
        if parcel.len() < buffer.parts.len() {
            let reason = format!("rows from {} devices for {}", parcel.len(), buffer.parts.len());
            return Err(unsupported("receive", reason));
        }
        let num_parts = buffer.parts.len();
        for (index, (member, parcel)) in self.members.iter().zip(parcel).take(num_parts).enumerate() {
            member.receive(parcel, buffer.output("receive", index)?, first_row)?;
        }
        Ok(())
    }

    /// What only the first member has goes to all that have the destination.
    fn copy_rows(
        &self, source: &SharedBuffer<B>, rows: Range<usize>, destination: &mut SharedBuffer<B>, first_row: usize,
    ) -> Result<(), BackendError> {
        const OP: &str = "copy_rows";
        self.settle()?;
        let (source, mut destination) = (source.lock(), destination.lock());
        for index in 0..destination.parts.len() {
            let member = &self.members[index];
            if index == 0 || source.sharing != Sharing::First {
                let source = source.input(OP, index)?;
                member.copy_rows(source, rows.clone(), destination.output(OP, index)?, first_row)?;
                continue;
            }
            let state = self.state();
            let relay = state.as_ref().and_then(|state| state.relay.as_ref());
            let relay =
                relay.ok_or_else(|| unsupported(OP, "the group was given no memory for rows between members"))?;
            let parcel = self.first().send(relay, source.input(OP, 0)?, rows.clone())?;
            member.receive(parcel, destination.output(OP, index)?, first_row)?;
        }
        Ok(())
    }

    fn tables(&self, limits: &StepLimits) -> Result<Self::Tables, BackendError> {
        self.each(self.members.len(), |(_, member)| member.tables(limits))
    }

    fn set_batch(&self, tables: &mut Self::Tables, batch: &Batch) -> Result<(), BackendError> {
        self.settle()?;
        self.align_slots()?;
        self.members.iter().zip(tables).try_for_each(|(member, tables)| member.set_batch(tables, batch))
    }

    /// Adds up what is still to be added up.
    fn settle(&self) -> Result<(), BackendError> {
        let Some(mut state) = self.state() else { return Ok(()) };
        let State { exchanges, pending, .. } = &mut *state;
        let Some(Pending { residual, slot, rows }) = pending.take() else { return Ok(()) };
        let mut residual = residual.lock();
        for (index, (member, exchange)) in self.members.iter().zip(exchanges).enumerate() {
            member.add_partials(exchange, slot, rows, residual.output("linear_residual", index)?, None)?;
        }
        Ok(())
    }

    fn moment(&self) -> Result<B::Moment, BackendError> {
        self.settle()?;
        self.first().moment()
    }

    fn has_come(&self, moment: &B::Moment) -> Result<bool, BackendError> {
        self.first().has_come(moment)
    }

    fn elapsed(&self, from: &B::Moment, to: &B::Moment) -> Result<Duration, BackendError> {
        self.first().elapsed(from, to)
    }

    fn synchronize(&self) -> Result<(), BackendError> {
        self.settle()?;
        self.members.iter().try_for_each(Backend::synchronize)?;
        self.check()
    }

    fn replay(&self, key: u64, operations: &mut dyn FnMut() -> Result<(), BackendError>) -> Result<(), BackendError> {
        if self.group.is_none() {
            return self.first().replay(key, operations);
        }
        self.settle()?;
        self.align_slots()?;
        let members: Vec<&B> = self.members.iter().collect();
        B::replay_together(&members, key, &mut || {
            // Nothing ran of a recording that failed.
            if let Some(mut state) = self.state() {
                (state.slot, state.pending) = (0, None);
            }
            operations()?;
            self.settle()?;
            // What is run from a recording leaves the count as it was.
            match self.state().map(|state| state.slot) {
                None | Some(0) => Ok(()),
                Some(_) => Err(unsupported("replay", "operations that add up an odd number of times")),
            }
        })
    }

    fn embed(&self, table: &Self::Weight, ids: &[u32], hidden: &mut SharedBuffer<B>) -> Result<(), BackendError> {
        const OP: &str = "embed";
        self.settle()?;
        let mut hidden = hidden.lock();
        for (index, member) in self.members.iter().enumerate() {
            member.embed(table.of(OP, index)?, ids, hidden.output(OP, index)?)?;
        }
        Ok(())
    }

    fn rms_norm(
        &self, x: &SharedBuffer<B>, weight: &Self::Weight, eps: f32, rows: usize, out: &mut SharedBuffer<B>,
    ) -> Result<(), BackendError> {
        const OP: &str = "rms_norm";
        if let Some(mut state) = self.state() {
            let State { exchanges, pending, .. } = &mut *state;
            let follows = |pending: &mut Pending<B>| pending.residual.is(x) && pending.rows == rows && !out.is(x);
            if let Some(Pending { residual, slot, rows }) = pending.take_if(follows) {
                let (mut residual, mut out) = (residual.lock(), out.lock());
                for (index, (member, exchange)) in self.members.iter().zip(exchanges).enumerate() {
                    let norm = FollowingNorm { weight: weight.of(OP, index)?, eps, out: out.output(OP, index)? };
                    member.add_partials(exchange, slot, rows, residual.output(OP, index)?, Some(norm))?;
                }
                return Ok(());
            }
        }
        self.settle()?;
        let (x, mut out) = (x.lock(), out.lock());
        for index in 0..out.parts.len() {
            let (weight, member) = (weight.of(OP, index)?, &self.members[index]);
            member.rms_norm(x.input(OP, index)?, weight, eps, rows, out.output(OP, index)?)?;
        }
        Ok(())
    }

    fn rms_norm_logit_rows(
        &self, x: &SharedBuffer<B>, weight: &Self::Weight, eps: f32, tables: &Self::Tables, out: &mut SharedBuffer<B>,
    ) -> Result<(), BackendError> {
        const OP: &str = "rms_norm_logit_rows";
        self.settle()?;
        let (x, mut out) = (x.lock(), out.lock());
        for (index, member) in self.members.iter().enumerate() {
            let (weight, x) = (weight.of(OP, index)?, x.input(OP, index)?);
            member.rms_norm_logit_rows(x, weight, eps, &tables[index], out.output(OP, index)?)?;
        }
        Ok(())
    }

    fn qkv_rope_append(
        &self, x: &SharedBuffer<B>, weights: ExpertWeights<'_, Self::Weight>, ranges: &[ExpertRange],
        heads: HeadGeometry, rope: &SharedBuffer<B>, mode: RopeMode, tables: &Self::Tables,
        query: &mut SharedBuffer<B>, kv: &mut SharedBuffer<B>,
    ) -> Result<(), BackendError> {
        const OP: &str = "qkv_rope_append";
        self.settle()?;
        let (x, rope, mut query, mut kv) = (x.lock(), rope.lock(), query.lock(), kv.lock());
        let heads = self.heads_of_member(OP, query.sharing, heads)?;
        for (index, member) in self.members.iter().enumerate() {
            let (x, rope, weights) = (x.input(OP, index)?, rope.input(OP, index)?, of_member(OP, weights, index)?);
            let (query, kv) = (query.output(OP, index)?, kv.output(OP, index)?);
            member.qkv_rope_append(x, weights, ranges, heads, rope, mode, &tables[index], query, kv)?;
        }
        Ok(())
    }

    fn attention(
        &self, query: &SharedBuffer<B>, kv: &SharedBuffer<B>, heads: HeadGeometry, tables: &Self::Tables,
        out: &mut SharedBuffer<B>,
    ) -> Result<(), BackendError> {
        const OP: &str = "attention";
        self.settle()?;
        let (query, kv, mut out) = (query.lock(), kv.lock(), out.lock());
        let is_cut = query.sharing == Sharing::Columns && self.group.is_some() && out.sharing == Sharing::Replicated;
        let heads = self.heads_of_member(OP, query.sharing, heads)?;
        for (index, member) in self.members.iter().enumerate() {
            let (query, kv) = (query.input(OP, index)?, kv.input(OP, index)?);
            let out = if is_cut { out.attended(OP, index)? } else { out.output(OP, index)? };
            member.attention(query, kv, heads, &tables[index], out)?;
        }
        Ok(())
    }

    /// With columns of the weights on each member: everybody's part, which is added up when it is known what follows.
    fn linear_residual(
        &self, x: &SharedBuffer<B>, weights: ExpertWeights<'_, Self::Weight>, ranges: &[ExpertRange],
        residual: &mut SharedBuffer<B>,
    ) -> Result<(), BackendError> {
        const OP: &str = "linear_residual";
        self.settle()?;
        let x = x.lock();
        let mut given = [weights.language, weights.vision].into_iter().flatten();
        let is_cut = given.any(|weight| weight.sharing == Sharing::Columns);
        let Some(mut state) = self.state().filter(|_| is_cut) else {
            let mut residual = residual.lock();
            for (index, member) in self.members.iter().enumerate() {
                let (x, weights) = (x.input(OP, index)?, of_member(OP, weights, index)?);
                member.linear_residual(x, weights, ranges, residual.output(OP, index)?)?;
            }
            return Ok(());
        };
        let (rows, slot) = (covered_rows(OP, ranges)?, state.slot);
        for (index, (member, exchange)) in self.members.iter().zip(&mut state.exchanges).enumerate() {
            let weights = of_member(OP, weights, index)?;
            member.linear_partial(x.input(OP, index)?, weights, ranges, slot, exchange)?;
        }
        state.slot = (slot + 1) % NUM_EXCHANGES;
        state.pending = (rows > 0).then(|| Pending { residual: residual.again(), slot, rows });
        Ok(())
    }

    fn gate_up(
        &self, x: &SharedBuffer<B>, gate: ExpertWeights<'_, Self::Weight>, up: ExpertWeights<'_, Self::Weight>,
        ranges: &[ExpertRange], out: &mut SharedBuffer<B>,
    ) -> Result<(), BackendError> {
        const OP: &str = "gate_up";
        self.settle()?;
        let (x, mut out) = (x.lock(), out.lock());
        for index in 0..out.parts.len() {
            let (gate, up) = (of_member(OP, gate, index)?, of_member(OP, up, index)?);
            self.members[index].gate_up(x.input(OP, index)?, gate, up, ranges, out.output(OP, index)?)?;
        }
        Ok(())
    }

    fn logits(
        &self, x: &SharedBuffer<B>, weight: &Self::Weight, rows: usize, logits: &mut SharedBuffer<B>,
    ) -> Result<(), BackendError> {
        const OP: &str = "logits";
        self.settle()?;
        let (x, mut logits) = (x.lock(), logits.lock());
        for (index, member) in self.members.iter().enumerate() {
            member.logits(x.input(OP, index)?, weight.of(OP, index)?, rows, logits.output(OP, index)?)?;
        }
        Ok(())
    }

    /// Every member has all logits, and chooses the same tokens.
    fn sample(&self, logits: &SharedBuffer<B>, requests: &[SampleRequest<'_>]) -> Result<Self::Sampled, BackendError> {
        const OP: &str = "sample";
        self.settle()?;
        let logits = logits.lock();
        self.each(self.members.len(), |(index, member)| member.sample(logits.input(OP, index)?, requests))
    }

    fn sampled(&self, tokens: &Self::Sampled) -> Result<Vec<u32>, BackendError> {
        let tokens = tokens.first().map_or(Ok(Vec::new()), |tokens| self.first().sampled(tokens))?;
        self.check()?;
        Ok(tokens)
    }

    fn embed_sampled(
        &self, table: &Self::Weight, tokens: &Self::Sampled, hidden: &mut SharedBuffer<B>,
    ) -> Result<(), BackendError> {
        const OP: &str = "embed";
        self.settle()?;
        let mut hidden = hidden.lock();
        for (index, (member, tokens)) in self.members.iter().zip(tokens).enumerate() {
            member.embed_sampled(table.of(OP, index)?, tokens, hidden.output(OP, index)?)?;
        }
        Ok(())
    }

    fn patch_embed(
        &self, pixels: &SharedBuffer<B>, weights: PatchWeights<'_, Self::Weight>, geometry: PatchGeometry,
        out: &mut SharedBuffer<B>,
    ) -> Result<(), BackendError> {
        const OP: &str = "patch_embed";
        self.settle()?;
        let (pixels, mut out) = (pixels.lock(), out.lock());
        let PatchWeights { projection, bias, class, position } = weights;
        for index in 0..out.parts.len() {
            let (projection, bias) = (projection.of(OP, index)?, bias.of(OP, index)?);
            let weights =
                PatchWeights { projection, bias, class: class.of(OP, index)?, position: position.of(OP, index)? };
            self.members[index].patch_embed(pixels.input(OP, index)?, weights, geometry, out.output(OP, index)?)?;
        }
        Ok(())
    }

    fn linear(
        &self, x: &SharedBuffer<B>, weight: &Self::Weight, bias: Option<&Self::Weight>, activation: Activation,
        rows: usize, out: &mut SharedBuffer<B>,
    ) -> Result<(), BackendError> {
        const OP: &str = "linear";
        self.settle()?;
        let (x, mut out) = (x.lock(), out.lock());
        for index in 0..out.parts.len() {
            let bias = bias.map(|bias| bias.of(OP, index)).transpose()?;
            let (x, weight) = (x.input(OP, index)?, weight.of(OP, index)?);
            self.members[index].linear(x, weight, bias, activation, rows, out.output(OP, index)?)?;
        }
        Ok(())
    }

    fn image_attention(
        &self, qkv: &SharedBuffer<B>, num_images: usize, num_tokens: usize, heads: HeadGeometry,
        out: &mut SharedBuffer<B>,
    ) -> Result<(), BackendError> {
        const OP: &str = "image_attention";
        self.settle()?;
        let (qkv, mut out) = (qkv.lock(), out.lock());
        for index in 0..out.parts.len() {
            let qkv = qkv.input(OP, index)?;
            self.members[index].image_attention(qkv, num_images, num_tokens, heads, out.output(OP, index)?)?;
        }
        Ok(())
    }

    fn layer_norm_residual(
        &self, branch: &SharedBuffer<B>, weight: &Self::Weight, bias: &Self::Weight, eps: f32, rows: usize,
        residual: &mut SharedBuffer<B>,
    ) -> Result<(), BackendError> {
        const OP: &str = "layer_norm_residual";
        self.settle()?;
        let (branch, mut residual) = (branch.lock(), residual.lock());
        for index in 0..residual.parts.len() {
            let (weight, bias) = (weight.of(OP, index)?, bias.of(OP, index)?);
            let (branch, residual) = (branch.input(OP, index)?, residual.output(OP, index)?);
            self.members[index].layer_norm_residual(branch, weight, bias, eps, rows, residual)?;
        }
        Ok(())
    }

    fn layer_norm_gelu(
        &self, x: &mut SharedBuffer<B>, weight: &Self::Weight, bias: &Self::Weight, eps: f32, rows: usize,
    ) -> Result<(), BackendError> {
        const OP: &str = "layer_norm_gelu";
        self.settle()?;
        let mut x = x.lock();
        for index in 0..x.parts.len() {
            let (weight, bias) = (weight.of(OP, index)?, bias.of(OP, index)?);
            self.members[index].layer_norm_gelu(x.output(OP, index)?, weight, bias, eps, rows)?;
        }
        Ok(())
    }

    fn copy_weight_rows(
        &self, weight: &Self::Weight, destination: &mut SharedBuffer<B>, first_row: usize,
    ) -> Result<(), BackendError> {
        const OP: &str = "copy_weight_rows";
        self.settle()?;
        let mut destination = destination.lock();
        for index in 0..destination.parts.len() {
            let weight = weight.of(OP, index)?;
            self.members[index].copy_weight_rows(weight, destination.output(OP, index)?, first_row)?;
        }
        Ok(())
    }
}
