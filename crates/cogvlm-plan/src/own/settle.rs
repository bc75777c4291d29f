//! Where every weight rests once it is known who executes what.

use std::ops::Range;

use cogvlm_core::{Device, Phase};

use super::Planner;
use super::cut::Cut;
use crate::account::Placement;
use crate::plan::Residency;

/// A cut with a place for every weight.
#[derive(Debug, Clone)]
pub(crate) struct Settled {
    pub(crate) placement: Placement,
    /// Something rests in host memory or in the file.
    pub(crate) off_cards: bool,
}

impl Planner<'_> {
    /// Finds a place for every weight: on the card that executes it, on another card, in host memory, in the file, in
    /// this order. Hot weights never rest in the file. `None` where there is no room.
    ///
    /// `with_table`: the embedding table stays on its card. Otherwise it rests on the host, where its rows are looked up.
    pub(crate) fn settle(&self, cut: &Cut, with_table: bool) -> Option<Settled> {
        let sizes = &self.sizes;
        let mut executes_on = vec![Device::Cpu; sizes.units.len()];
        // Where each group rests; `None` until it has a place.
        let mut rests: Vec<Option<Residency>> = vec![None; sizes.groups.len()];
        let mut free = Vec::with_capacity(self.cards.len());
        for (card, share) in self.cards.iter().zip(&cut.shares) {
            for unit in share.vision.clone().chain(share.text.clone()) {
                executes_on[unit] = card.device;
            }
            if share.is_empty() {
                free.push(card.capacity);
                continue;
            }
            let mut keep = |groups: Range<usize>| rests[groups].fill(Some(Residency::Device));
            let packed = sizes.pack_groups(card.capacity, share, with_table, &mut keep)?;
            free.push(packed.free);
        }
        let mut host = Shelf { room: self.host.unwrap_or(0) };
        let host_units: Vec<usize> = (0..sizes.units.len()).filter(|&unit| executes_on[unit] == Device::Cpu).collect();
        if !host_units.is_empty() {
            let vision = if host_units[0] == 0 { 0..sizes.num_vision } else { 0..0 };
            host.take(sizes.kv_bytes(&cut.host) + sizes.workspace_bytes(&vision, &cut.host)).then_some(())?;
        }
        for (index, group) in self.by_importance(&executes_on) {
            if rests[index].is_some() {
                continue;
            }
            let on = executes_on[group.unit];
            let mut peer = || {
                let is_peer = |device: Device| device != on && device.process() == on.process();
                let peers = self.cards.iter().zip(&mut free).filter(|(card, _)| is_peer(card.device));
                let mut roomy = peers.filter(|(_, free)| **free >= group.bytes);
                roomy.next().map(|(card, free)| {
                    *free -= group.bytes;
                    Residency::Peer(card.device)
                })
            };
            let travels_by_rows = group.phase == Phase::RowLookup;
            let peer = if on == Device::Cpu || travels_by_rows { None } else { peer() };
            let in_file = || (self.file && group.phase != Phase::EveryToken).then_some(Residency::File);
            let mut in_host = || host.take(group.bytes).then_some(Residency::Host);
            rests[index] = Some(peer.or_else(&mut in_host).or_else(in_file)?);
        }
        let mut residency = vec![Residency::Device; sizes.inventory.len()];
        for (group, rests) in sizes.groups.iter().zip(&rests) {
            for &tensor in &group.tensors {
                residency[tensor] = (*rests)?;
            }
        }
        let off_cards = residency.iter().any(|rests| matches!(rests, Residency::Host | Residency::File));
        let mut placement = Placement { executes_on, residency, prefill: None };
        let prefills = self.cards.iter().zip(&cut.shares).find(|(_, share)| !share.prefill.is_empty());
        placement.prefill = prefills.map(|(card, _)| placement.prefill_on(card.device, sizes, &self.links));
        Some(Settled { placement, off_cards })
    }

    /// All groups: hot ones, the table, cold ones; what the host executes first, since it is read where it lies.
    fn by_importance(&self, executes_on: &[Device]) -> impl Iterator<Item = (usize, &super::sizes::Group)> {
        let rank = |phase: Phase| match phase {
            Phase::EveryToken => 0,
            Phase::RowLookup => 1,
            Phase::ImagePrefill => 2,
        };
        let mut order: Vec<_> = self.sizes.groups.iter().enumerate().collect();
        order.sort_by_key(|(_, group)| (rank(group.phase), executes_on[group.unit] != Device::Cpu));
        order.into_iter()
    }
}

/// Room in host memory.
struct Shelf {
    room: u64,
}

impl Shelf {
    fn take(&mut self, bytes: u64) -> bool {
        let fits = bytes <= self.room;
        if fits {
            self.room -= bytes;
        }
        fits
    }
}
