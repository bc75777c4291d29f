//! Where the chain of units is cut. Each search is exact for its own objective: dynamic programming over the units and
//! the cards in the order of their ordinals.

use std::ops::Range;

use cogvlm_core::Device;

use super::Planner;
use super::pack::{Packed, Share};
use crate::cost::read_bytes_per_s;

/// Who executes what: a share for every card, and the units that the host executes. Text units start on the host, so
/// that hidden states cross to a card once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) shares: Vec<Share>,
    pub(crate) host: Range<usize>,
}

/// What a cut of the text units should be good at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TextRule {
    /// No hot weight off its card, and the slowest card's decode step as fast as possible.
    Even,
    /// One decode step through all cards as fast as possible, hot weights streamed where they must be.
    Fast,
}

/// What a cut of the vision tower should be good at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VisionRule {
    /// The time of one image through all cards.
    OneImage,
    /// The time of the slowest card, which is what many images take.
    ManyImages,
}

/// What resident weights may take of every card, and what work a card may have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Caps {
    /// Bytes that stay free on every card that is used.
    pub(crate) free_bytes: u64,
    /// Seconds that a card reads for a decode step.
    pub(crate) step_s: f64,
    /// Seconds of a card's arithmetic for an image prefill.
    pub(crate) image_s: f64,
}

impl Caps {
    pub(crate) const NONE: Self = Self { free_bytes: 0, step_s: f64::INFINITY, image_s: f64::INFINITY };
}

/// What packing text units depends on: the capacity, whether the table stays, whether the vision tower is there, how many
/// units, whether the embedding and the head are among them; how many units of the host the card prefills.
pub(crate) type PackKey = (u64, bool, bool, (usize, bool, bool), usize);

/// A cost to minimise, then one to choose among equals.
type Cost = (f64, f64);

/// The best cuts of the text units from every unit on.
pub(crate) struct TextCuts {
    /// For each card of `cards`, then past the last: for each first unit the cost of the rest, and where the card stops.
    best: Vec<Vec<Option<(Cost, usize)>>>,
    cards: Vec<usize>,
    vision_on: usize,
    first: usize,
    num_cards: usize,
    vision: Range<usize>,
    with_prefill: bool,
}

impl TextCuts {
    /// The best cut in which the host executes the first `num_host` text units: its cost and the cut.
    pub(crate) fn after_host(&self, num_host: usize) -> Option<(f64, Cut)> {
        let (cost, _) = self.best[0][num_host]?;
        let mut shares = vec![Share::NONE; self.num_cards];
        let mut start = num_host;
        for (position, &card) in self.cards.iter().enumerate() {
            let (_, end) = self.best[position][start]?;
            shares[card].text = self.first + start..self.first + end;
            start = end;
        }
        shares[self.vision_on].vision = self.vision.clone();
        shares[self.cards[0]].prefill = self.prefill(num_host);
        Some((cost.0, Cut { shares, host: self.first..self.first + num_host }))
    }
}

impl TextCuts {
    /// What the first card prefills where the host executes the first `num_host` text units.
    fn prefill(&self, num_host: usize) -> Range<usize> {
        prefill(self.with_prefill, self.first, num_host, self.best[0].len() - 1)
    }
}

/// Of the first `num_host` of `num_text` text units from `first` on, those that the first card prefills. The head is
/// where the rows of a step are few.
fn prefill(with_prefill: bool, first: usize, num_host: usize, num_text: usize) -> Range<usize> {
    let num_host = if with_prefill { num_host.min(num_text - 1) } else { 0 };
    first..first + num_host
}

impl Planner<'_> {
    /// Cuts the text units over `cards` (indices in ascending order), with the whole vision tower on card `vision_on`.
    /// `with_prefill`: the first of them prefills what the host executes.
    pub(crate) fn cut_text(
        &self, cards: &[usize], vision_on: usize, rule: TextRule, with_table: bool, with_prefill: bool,
    ) -> Option<TextCuts> {
        let (first, num_units) = (self.sizes.num_vision, self.sizes.num_text());
        let vision = 0..first;
        let share = |card: usize, text: Range<usize>| Share {
            vision: if card == vision_on { vision.clone() } else { 0..0 },
            text: first + text.start..first + text.end,
            prefill: if card == cards[0] { prefill(with_prefill, first, text.start, num_units) } else { 0..0 },
        };
        // A tower that does not even fit by itself fits nowhere.
        self.pack(vision_on, &share(vision_on, 0..0), with_table)?;
        let mut best = vec![vec![None; num_units + 1]; cards.len() + 1];
        best[cards.len()][num_units] = Some(((0.0, 0.0), num_units));
        for (position, &card) in cards.iter().enumerate().rev() {
            // Only hot overflow begins the first card behind units that the host executes.
            let last_start = if position == 0 && rule == TextRule::Even { 0 } else { num_units };
            for start in 0..=last_start {
                // From the longest share down, so that equal cuts leave the later cards empty.
                for end in (start..=num_units).rev() {
                    // The embedding stays with the first layer: alone it would only add a hop.
                    let Some((rest, _)) = best[position + 1][end] else { continue };
                    if (start, end) == (0, 1) {
                        continue;
                    }
                    let share = share(card, start..end);
                    // Most shares are far too large: see that without packing them.
                    if rule == TextRule::Even && self.step_bytes(&share.text) > self.cards[card].capacity {
                        continue;
                    }
                    let Some(packed) = self.pack_text(card, &share, with_table) else { continue };
                    let Some(cost) = self.text_cost(card, rule, &share, &packed) else { continue };
                    let total = match rule {
                        TextRule::Even => (cost.max(rest.0), cost * cost + rest.1),
                        TextRule::Fast => (cost + rest.0, cost * cost + rest.1),
                    };
                    if best[position][start].is_none_or(|(known, _): (Cost, usize)| less(total, known)) {
                        best[position][start] = Some((total, end));
                    }
                }
            }
        }
        let (cards, num_cards) = (cards.to_vec(), self.cards.len());
        Some(TextCuts { best, cards, vision_on, first, num_cards, vision, with_prefill })
    }

    /// Seconds of a decode step of the planned batch; `None` where the rule does not allow it.
    fn text_cost(&self, card: usize, rule: TextRule, share: &Share, packed: &Packed) -> Option<f64> {
        if share.text.is_empty() {
            return Some(0.0);
        }
        if rule == TextRule::Even && packed.hot_off > 0 {
            return None;
        }
        let (links, device) = (&self.links, self.cards[card].device);
        let read = self.step_bytes(&share.text) - packed.hot_off;
        let streamed = packed.hot_off as f64 / links.between(Device::Cpu, device);
        let seconds = read as f64 / read_bytes_per_s(links, device) + streamed;
        Some(if rule == TextRule::Fast { seconds + links.hop_s(Device::Cpu, device) } else { seconds })
    }

    /// Bytes that a decode step of the planned batch reads in `text`.
    pub(crate) fn step_bytes(&self, text: &Range<usize>) -> u64 {
        self.sizes.hot_bytes(text) + self.sizes.norm_bytes(text) + self.sizes.kv_bytes(text)
    }

    /// Cuts the vision tower over all cards where the text units are already cut, without pushing hot weights off any
    /// card.
    pub(crate) fn cut_vision(&self, cut: &Cut, rule: VisionRule, with_table: bool) -> Option<Cut> {
        let num_units = self.sizes.num_vision;
        let num_cards = self.cards.len();
        let mut best: Vec<Vec<Option<(Cost, usize)>>> = vec![vec![None; num_units + 1]; num_cards + 1];
        best[num_cards][num_units] = Some(((0.0, 0.0), num_units));
        for card in (0..num_cards).rev() {
            for start in 0..=num_units {
                for end in (start..=num_units).rev() {
                    let Some((rest, _)) = best[card + 1][end] else { continue };
                    let share = Share { vision: start..end, ..cut.shares[card].clone() };
                    let Some(packed) = self.pack(card, &share, with_table).filter(|packed| packed.hot_off == 0) else {
                        continue;
                    };
                    let seconds = self.image_seconds(card, &share, &packed);
                    let hop = if start < end { self.hop_to(card) } else { 0.0 };
                    let total = match rule {
                        VisionRule::OneImage => (seconds + hop + rest.0, rest.1),
                        VisionRule::ManyImages => (seconds.max(rest.0), hop + rest.1),
                    };
                    if best[card][start].is_none_or(|(known, _)| less(total, known)) {
                        best[card][start] = Some((total, end));
                    }
                }
            }
        }
        let mut cut = cut.clone();
        let mut start = 0;
        for (share, best) in cut.shares.iter_mut().zip(&best) {
            let (_, end) = best[start]?;
            share.vision = start..end;
            start = end;
        }
        Some(cut)
    }

    /// Seconds of a message to `card` from the card before it.
    fn hop_to(&self, card: usize) -> f64 {
        let (links, to) = (&self.links, self.cards[card].device);
        self.cards[..card].last().map_or_else(|| links.hop_s(Device::Cpu, to), |from| links.hop_s(from.device, to))
    }

    fn image_seconds(&self, card: usize, share: &Share, packed: &Packed) -> f64 {
        let (links, device) = (&self.links, self.cards[card].device);
        let flops = self.sizes.prefill_flops(&share.vision) + self.sizes.prefill_flops(&share.text);
        let copied = (packed.hot_off + packed.cold_off) as f64;
        (flops / self.cards[card].flops_per_s).max(copied / links.between(Device::Cpu, device))
    }

    /// Cuts both the vision tower and the text units so that every weight rests where it is used and no card exceeds
    /// `caps`. Greedy over the frontier of what the first cards can hold: having more units behind them never hurts
    /// the cards that follow.
    pub(crate) fn cut_resident(&self, caps: &Caps) -> Option<Cut> {
        /// The first cards hold `vision` and `text` units; `from` is the point of the previous frontier.
        #[derive(Clone, Copy)]
        struct Point {
            vision: usize,
            text: usize,
            from: usize,
        }
        let (num_vision, num_text) = (self.sizes.num_vision, self.sizes.num_text());
        let mut frontiers = vec![vec![Point { vision: 0, text: 0, from: 0 }]];
        for card in 0..self.cards.len() {
            // For each number of vision units the most text units, and where from.
            let mut furthest: Vec<Option<(usize, usize)>> = vec![None; num_vision + 1];
            for (from, point) in frontiers[card].iter().enumerate() {
                let mut text = num_text;
                for (vision, furthest) in furthest.iter_mut().enumerate().skip(point.vision) {
                    while text > point.text && !self.holds(card, point.vision..vision, point.text..text, caps) {
                        text -= 1;
                    }
                    if text == point.text && !self.holds(card, point.vision..vision, text..text, caps) {
                        break;
                    }
                    if furthest.is_none_or(|(known, _)| text > known) {
                        *furthest = Some((text, from));
                    }
                }
            }
            let mut frontier = Vec::new();
            let mut most_text = None;
            for (vision, reached) in furthest.into_iter().enumerate().rev() {
                if let Some((text, from)) = reached.filter(|(text, _)| most_text.is_none_or(|most| *text > most)) {
                    most_text = Some(text);
                    frontier.push(Point { vision, text, from });
                }
            }
            frontiers.push(frontier);
        }
        let mut shares = vec![Share::NONE; self.cards.len()];
        let mut at = frontiers.last()?.iter().position(|point| (point.vision, point.text) == (num_vision, num_text))?;
        for card in (0..self.cards.len()).rev() {
            let end = frontiers[card + 1][at];
            let start = frontiers[card][end.from];
            let text = num_vision + start.text..num_vision + end.text;
            shares[card] = Share { vision: start.vision..end.vision, text, prefill: 0..0 };
            at = end.from;
        }
        Some(Cut { shares, host: num_vision..num_vision })
    }

    fn holds(&self, card: usize, vision: Range<usize>, text: Range<usize>, caps: &Caps) -> bool {
        // The embedding stays with the first layer.
        if text == (0..1) {
            return false;
        }
        let text = self.sizes.num_vision + text.start..self.sizes.num_vision + text.end;
        let share = Share { vision, text, prefill: 0..0 };
        share.is_empty()
            || self.read_seconds(card, &share.text) <= caps.step_s
                && self.resident_bytes(&share).saturating_add(caps.free_bytes) <= self.cards[card].capacity
                && self.arithmetic_seconds(card, &share) <= caps.image_s
    }

    /// Seconds in which `card` reads what a decode step of the planned batch needs in `text`.
    pub(crate) fn read_seconds(&self, card: usize, text: &Range<usize>) -> f64 {
        self.step_bytes(text) as f64 / self.cards[card].bytes_per_s
    }

    /// Seconds of the arithmetic of an image prefill in `share` on `card`.
    fn arithmetic_seconds(&self, card: usize, share: &Share) -> f64 {
        let flops = self.sizes.prefill_flops(&share.vision) + self.sizes.prefill_flops(&share.text);
        flops / self.cards[card].flops_per_s
    }

    /// Everything that a card holds which executes `share` and keeps all its weights; without the reserve.
    pub(crate) fn resident_bytes(&self, share: &Share) -> u64 {
        let (sizes, Share { vision, text, .. }) = (&self.sizes, share);
        let table = if text.contains(&sizes.num_vision) { sizes.table_bytes } else { 0 };
        let weights =
            sizes.norm_bytes(text) + sizes.hot_bytes(text) + sizes.cold_bytes(text) + sizes.cold_bytes(vision);
        weights + table + sizes.kv_bytes(text) + sizes.workspace_bytes(vision, text)
    }

    /// [`Sizes::pack`](super::sizes::Sizes::pack) on a card; nothing fits easily where nothing is asked.
    pub(crate) fn pack(&self, card: usize, share: &Share, with_table: bool) -> Option<Packed> {
        let capacity = self.cards[card].capacity;
        if share.is_empty() {
            return Some(Packed { hot_off: 0, cold_off: 0, free: capacity });
        }
        self.sizes.pack(capacity, share, with_table)
    }

    /// As [`pack`](Self::pack), where the vision tower is whole or absent. All decoder layers are alike, so that the
    /// same is asked again and again.
    fn pack_text(&self, card: usize, share: &Share, with_table: bool) -> Option<Packed> {
        let (table, head) = (self.sizes.num_vision, self.sizes.units.len() - 1);
        let text = (share.text.len(), share.text.contains(&table), share.text.contains(&head));
        let key = (self.cards[card].capacity, with_table, !share.vision.is_empty(), text, share.prefill.len());
        *self.packed.borrow_mut().entry(key).or_insert_with(|| self.pack(card, share, with_table))
    }

    /// Cards of which one each is worth trying for the vision tower, where the text units go to `cards`: of cards
    /// with the same capacity and rates that neither begin nor end the text units, one stands for all.
    pub(crate) fn vision_candidates(&self, cards: &[usize]) -> Vec<usize> {
        let mut known = Vec::new();
        let role = |card: usize| {
            let place = cards.iter().position(|member| *member == card);
            (self.cards[card].capacity, place.is_some(), place == Some(0), place == Some(cards.len() - 1))
        };
        let alike = |one: usize, other: usize| match (self.cards[one].device, self.cards[other].device) {
            (Device::Gpu(one), Device::Gpu(other)) => self.links.alike(one, other),
            _ => false,
        };
        let mut candidates: Vec<usize> = (0..self.cards.len()).collect();
        candidates.retain(|&card| {
            let is_new = !known.iter().any(|&other| role(other) == role(card) && alike(other, card));
            known.push(card);
            is_new
        });
        candidates
    }

    /// Seconds that the host takes for a decode step of the planned batch through `text`.
    pub(crate) fn host_step_seconds(&self, text: &Range<usize>) -> f64 {
        let batch = self.sizes.limits.max_sequences as f64;
        let links = &self.links;
        let arithmetic = links.host_flops_per_s(self.sizes.activation_dtype);
        let hot = (self.sizes.hot_bytes(text) + self.sizes.norm_bytes(text)) as f64;
        let elements = hot / self.sizes.weight_dtype.size_bytes() as f64;
        let reads = (hot + self.sizes.kv_bytes(text) as f64) / read_bytes_per_s(links, Device::Cpu);
        let hop = self.cards.first().map_or(0.0, |card| links.hop_s(Device::Cpu, card.device));
        reads.max(2.0 * elements * batch / arithmetic) + if text.is_empty() { 0.0 } else { hop }
    }

    /// Largest unit with all that it needs beside workspace: the grain of every cut.
    pub(crate) fn grain_bytes(&self) -> u64 {
        let unit_bytes = |unit: usize| {
            let units = unit..unit + 1;
            let groups = &self.sizes.groups[self.sizes.groups_of[unit].clone()];
            groups.iter().map(|group| group.bytes).sum::<u64>() + self.sizes.kv_bytes(&units)
        };
        (0..self.sizes.units.len()).map(unit_bytes).max().unwrap_or(0)
    }
}

fn less(a: Cost, b: Cost) -> bool {
    a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)).is_lt()
}
