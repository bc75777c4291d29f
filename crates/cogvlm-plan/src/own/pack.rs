//! What a card keeps of the weights of the units that it executes.
//!
//! Everything, where it fits. Otherwise a staging ring is set up, and weights stay in order of importance: what is
//! read for every token first, then what comes first in an image prefill, so that the first copies hide behind
//! computing. Inside a layer the first matrices that fit stay, and what is left of the card is smaller than the
//! smallest matrix of that layer that does not.
//!
//! The bytes kept of a list grow with the capacity: a larger card keeps a longer run of whole units, and that run
//! alone outweighs everything that the smaller card kept.

use std::ops::Range;

use super::sizes::Sizes;
use crate::plan::STAGING_SLOTS;

/// The units that a card executes: some of the vision tower, some of the text part. Indices in the order of execution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) vision: Range<usize>,
    pub(crate) text: Range<usize>,
    /// Units of the host that the card prefills: just before `text`, where that is not empty.
    pub(crate) prefill: Range<usize>,
}

impl Share {
    pub(crate) const NONE: Self = Self { vision: 0..0, text: 0..0, prefill: 0..0 };

    pub(crate) fn is_empty(&self) -> bool {
        self.vision.is_empty() && self.text.is_empty() && self.prefill.is_empty()
    }

    /// Text units that need workspace.
    fn computed(&self) -> Range<usize> {
        match (self.prefill.is_empty(), self.text.is_empty()) {
            (true, _) => self.text.clone(),
            (_, true) => self.prefill.clone(),
            _ => self.prefill.start..self.text.end,
        }
    }
}

/// What rests off a card, and what is left on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Packed {
    /// Hot weights that do not stay.
    pub(crate) hot_off: u64,
    /// Cold weights that do not stay.
    pub(crate) cold_off: u64,
    /// Bytes that nothing occupies.
    pub(crate) free: u64,
}

/// What a ring is sized for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Streamed {
    /// There is no ring.
    Nothing,
    /// Matrices of decoder layers and ViT layers.
    Layers,
    /// Any group, the head's and the adapter's too.
    Everything,
}

impl Sizes {
    /// Packs `share` into `capacity` bytes, which do not include the reserve. `with_table`: whether the embedding
    /// table has to stay, if the share executes the embedding; otherwise it rests elsewhere. `None` where not even
    /// a ring, workspace and KV cache fit.
    pub(crate) fn pack(&self, capacity: u64, share: &Share, with_table: bool) -> Option<Packed> {
        self.best_ring(capacity, share, with_table).map(|(_, packed)| packed)
    }

    /// As [`pack`](Self::pack); calls `keep` with every range of groups that stays.
    pub(crate) fn pack_groups(
        &self, capacity: u64, share: &Share, with_table: bool, keep: &mut dyn FnMut(Range<usize>),
    ) -> Option<Packed> {
        let (streamed, _) = self.best_ring(capacity, share, with_table)?;
        self.pack_with(streamed, capacity, share, with_table, Some(keep))
    }

    fn best_ring(&self, capacity: u64, share: &Share, with_table: bool) -> Option<(Streamed, Packed)> {
        let try_ring =
            |streamed| self.pack_with(streamed, capacity, share, with_table, None).map(|packed| (streamed, packed));
        if let Some(whole) = try_ring(Streamed::Nothing) {
            return Some(whole);
        }
        let rings = [try_ring(Streamed::Layers), try_ring(Streamed::Everything)];
        rings.into_iter().flatten().min_by_key(|(_, packed)| (packed.hot_off, packed.cold_off))
    }

    fn pack_with<'a>(
        &'a self, streamed: Streamed, capacity: u64, share: &Share, with_table: bool,
        keep: Option<&'a mut dyn FnMut(Range<usize>)>,
    ) -> Option<Packed> {
        let Share { vision, text, prefill } = share;
        let table = text.contains(&self.num_vision);
        let norms = self.norm_bytes(text) + self.norm_bytes(prefill);
        let fixed = norms + self.kv_bytes(text) + self.workspace_bytes(vision, &share.computed());
        let table_bytes = if table && with_table { self.table_bytes } else { 0 };
        let (hot, cold) = (self.hot_bytes(text), self.cold_bytes(vision) + self.cold_bytes(text));
        let mut shelf = Shelf { sizes: self, room: capacity.checked_sub(fixed + table_bytes)?, keep };
        shelf.keep_all(text, &self.norms_of);
        if table && with_table {
            shelf.keep_all(&(self.num_vision..self.num_vision + 1), &self.groups_of);
        }
        if streamed == Streamed::Nothing {
            // What the host keeps is streamed.
            if !prefill.is_empty() {
                return None;
            }
            shelf.room = shelf.room.checked_sub(hot + cold)?;
            for units in [vision, text] {
                shelf.keep_all(units, &self.hot_of);
                shelf.keep_all(units, &self.cold_of);
            }
            return Some(Packed { hot_off: 0, cold_off: 0, free: shelf.room });
        }
        shelf.room = shelf.room.checked_sub(STAGING_SLOTS as u64 * self.slot_bytes(streamed, share))?;
        let must = streamed == Streamed::Layers;
        let mut kept = Packed { hot_off: 0, cold_off: 0, free: 0 };
        let (layers, vit_layers) = (self.layers_in(text), self.vit_layers_in(vision));
        let (patches, adapter, head) = (0, self.num_vision - 1, self.units.len() - 1);
        if must {
            // The ring is not made for their groups: no room for them, no plan with this ring.
            for unit in [patches, adapter].into_iter().filter(|unit| vision.contains(unit)) {
                kept.cold_off += shelf.put_all(&self.cold_of[unit])?;
            }
        }
        if text.contains(&head) {
            let bytes = if must { shelf.put_all(&self.hot_of[head])? } else { shelf.put_some(&self.hot_of[head]) };
            kept.hot_off += bytes;
        }
        kept.hot_off += shelf.put_units(&layers, self.hot_before(), &self.hot_of);
        if !must && vision.contains(&patches) {
            kept.cold_off += shelf.put_some(&self.cold_of[patches]);
        }
        kept.cold_off += shelf.put_units(&vit_layers, self.cold_before(), &self.cold_of);
        if !must && vision.contains(&adapter) {
            kept.cold_off += shelf.put_some(&self.cold_of[adapter]);
        }
        kept.cold_off += shelf.put_units(&layers, self.cold_before(), &self.cold_of);
        Some(Packed { hot_off: hot - kept.hot_off, cold_off: cold - kept.cold_off, free: shelf.room })
    }

    /// Bytes of one slot of the ring.
    fn slot_bytes(&self, streamed: Streamed, share: &Share) -> u64 {
        let (vision, text) = match streamed {
            Streamed::Nothing => return 0,
            Streamed::Layers => (self.vit_layers_in(&share.vision), self.layers_in(&share.text)),
            Streamed::Everything => (share.vision.clone(), share.text.clone()),
        };
        [vision, text, self.layers_in(&share.prefill)].iter().map(|units| self.slot_of(units)).max().unwrap_or(0)
    }
}

/// Room that weights are put into.
struct Shelf<'a> {
    sizes: &'a Sizes,
    room: u64,
    keep: Option<&'a mut dyn FnMut(Range<usize>)>,
}

impl Shelf<'_> {
    fn keep_all(&mut self, units: &Range<usize>, groups_of: &[Range<usize>]) {
        // The search asks for sums only, very often.
        if self.keep.is_none() {
            return;
        }
        groups_of[units.clone()].iter().for_each(|groups| self.keep(groups.clone()));
    }

    fn keep(&mut self, groups: Range<usize>) {
        if let Some(keep) = &mut self.keep {
            keep(groups);
        }
    }

    /// Puts all `groups` or fails; returns their bytes.
    fn put_all(&mut self, groups: &Range<usize>) -> Option<u64> {
        let bytes = self.sizes.groups[groups.clone()].iter().map(|group| group.bytes).sum();
        self.room = self.room.checked_sub(bytes)?;
        self.keep(groups.clone());
        Some(bytes)
    }

    /// Puts each of `groups` that still fits; returns their bytes.
    fn put_some(&mut self, groups: &Range<usize>) -> u64 {
        let mut kept = 0;
        for index in groups.clone() {
            let bytes = self.sizes.groups[index].bytes;
            if bytes <= self.room {
                self.room -= bytes;
                kept += bytes;
                self.keep(index..index + 1);
            }
        }
        kept
    }

    /// Puts whole units from the first on, then what fits of the first that does not; returns their bytes. `before`
    /// are the bytes of all units before an index, `groups_of` the groups of each.
    fn put_units(&mut self, units: &Range<usize>, before: &[u64], groups_of: &[Range<usize>]) -> u64 {
        let base = before[units.start];
        let whole = before[units.start + 1..=units.end].partition_point(|&sum| sum - base <= self.room);
        let boundary = units.start + whole;
        let kept = before[boundary] - base;
        self.room -= kept;
        self.keep_all(&(units.start..boundary), groups_of);
        if boundary < units.end { kept + self.put_some(&groups_of[boundary]) } else { kept }
    }
}
