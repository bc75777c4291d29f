//! Our own policies. A search proposes who executes what (`cut`), every proposal is given a place for each weight
//! (`settle`, which packs cards by `pack`) and charged by the rules that all plans are charged by (`account`); the
//! policy chooses among the results. A request that cannot be met is answered with the smallest change that can be
//! (`change`).
//!
//! Whatever the policy, hot weights stay on cards where the cards can hold them, and nothing rests off the cards where
//! they can hold everything.

use std::cell::RefCell;
use std::collections::HashMap;

use cogvlm_core::memory::format_bytes;
use cogvlm_core::{Device, Phase};

use crate::account::{Placement, Times};
use crate::cost::{card_flops_per_s, read_bytes_per_s};
use crate::error::PlanError;
use crate::links::Links;
use crate::plan::{Plan, PlanRequest, Policy, Prefill};
use cut::{Caps, Cut, PackKey, TextRule, VisionRule};
use pack::{Packed, Share};
use settle::Settled;
use sizes::Sizes;

pub(crate) mod change;
mod cut;
mod pack;
mod settle;
pub(crate) mod sizes;

/// Places the model of `request` by one of our own policies.
///
/// # Errors
/// [`PlanError::DoesNotFit`], with the smallest changes that would do, where the budgets do not hold the model;
/// other variants where the request itself makes no sense.
pub fn plan(request: &PlanRequest) -> Result<Plan, PlanError> {
    request.check()?;
    match try_plan(request)? {
        Some(plan) => Ok(plan),
        None => Err(change::does_not_fit(request)),
    }
}

/// As [`plan`], without an explanation where it does not fit.
pub(crate) fn try_plan(request: &PlanRequest) -> Result<Option<Plan>, PlanError> {
    let planner = Planner::new(request);
    let policy = request.resolved_policy()?;
    let Some(settled) = planner.place(policy) else { return Ok(None) };
    let notices = planner.notices(&settled.placement);
    settled.placement.into_plan(&planner.sizes, request, policy, notices).map(Some)
}

/// A card that units can be executed on.
pub(crate) struct Card {
    pub(crate) device: Device,
    /// Its budget without the reserve.
    pub(crate) capacity: u64,
    /// What decoding reads.
    pub(crate) bytes_per_s: f64,
    /// What a prefill computes.
    pub(crate) flops_per_s: f64,
}

/// A request, ready to be searched.
pub(crate) struct Planner<'a> {
    request: &'a PlanRequest,
    /// Rates of cards, whatever the numbers are: a plan for virtual ranks is one for cards.
    links: Links,
    sizes: Sizes,
    /// In the order of their ordinals.
    cards: Vec<Card>,
    /// Host memory that may be used.
    host: Option<u64>,
    /// Whether weights may rest in the file.
    file: bool,
    /// Cards packed so far: searches ask for the same again and again.
    packed: RefCell<HashMap<PackKey, Option<Packed>>>,
}

/// Beyond every machine, and far enough below the end of the integers for sums.
const MOST_BYTES: u64 = 1 << 56;

impl<'a> Planner<'a> {
    fn new(request: &'a PlanRequest) -> Self {
        let sizes = request.sizes();
        let reserve_bytes = request.card_reserve_bytes(&sizes);
        let links = request.links.of_cards();
        let mut cards = Vec::new();
        let (mut host, mut file) = (None, false);
        for budget in &request.budgets {
            match budget.device {
                Device::Gpu(ordinal) => {
                    let capacity = budget.bytes.saturating_sub(reserve_bytes).min(MOST_BYTES);
                    let bytes_per_s = read_bytes_per_s(&links, budget.device);
                    let flops_per_s = card_flops_per_s(&links, ordinal);
                    cards.push(Card { device: budget.device, capacity, bytes_per_s, flops_per_s });
                }
                Device::Cpu => host = Some(budget.bytes.min(MOST_BYTES)),
                Device::Disk => file = true,
            }
        }
        cards.sort_by_key(|card| card.device);
        Self { request, links, sizes, cards, host, file, packed: RefCell::default() }
    }

    fn place(&self, policy: Policy) -> Option<Settled> {
        let placed = match policy {
            Policy::Latency => self.few_cards(),
            _ => self.resident(policy).or_else(|| self.all_cards()),
        };
        placed.or_else(|| self.hot_overflow()).or_else(|| self.all_on_host())
    }

    /// Every weight on the card that uses it, work and room spread evenly.
    fn resident(&self, policy: Policy) -> Option<Settled> {
        let mut cut = self.cut_resident(&Caps::NONE)?;
        let mut caps = Caps::NONE;
        if policy == Policy::Balanced {
            // Room first, up to the grain of a cut; then even decode work; then what room is left to gain.
            let most_free = self.most_free(&mut cut, &caps);
            caps.free_bytes = most_free.saturating_sub(self.grain_bytes());
            caps.step_s = self.least_step_seconds(&mut cut, &caps);
        } else {
            caps.step_s = self.least_step_seconds(&mut cut, &caps);
            caps.image_s = self.least_image_seconds(&mut cut, &caps);
        }
        self.most_free(&mut cut, &caps);
        self.settle(&cut, true)
    }

    /// The most bytes that can stay free on every card in use, to within [`ROOM_GRAIN`]; `cut` becomes a cut that
    /// leaves them.
    fn most_free(&self, cut: &mut Cut, caps: &Caps) -> u64 {
        let largest = self.cards.iter().map(|card| card.capacity).max().unwrap_or(0);
        let (mut low, mut high) = (caps.free_bytes, largest.max(caps.free_bytes));
        while high - low > ROOM_GRAIN {
            let middle = low + (high - low) / 2;
            match self.cut_resident(&Caps { free_bytes: middle, ..*caps }) {
                Some(better) => (*cut, low) = (better, middle),
                None => high = middle,
            }
        }
        low
    }

    /// The least that the slowest card can take to read what a decode step needs, exactly.
    fn least_step_seconds(&self, cut: &mut Cut, caps: &Caps) -> f64 {
        let (first, end) = (self.sizes.num_vision, self.sizes.units.len());
        let shares = (first..end).flat_map(|start| (start + 1..=end).map(move |end| start..end));
        // Cards of one rate give the same candidates.
        let mut kinds: Vec<usize> = (0..self.cards.len()).collect();
        kinds.sort_by(|&a, &b| self.cards[a].bytes_per_s.total_cmp(&self.cards[b].bytes_per_s));
        kinds.dedup_by(|a, b| self.cards[*a].bytes_per_s == self.cards[*b].bytes_per_s);
        let seconds = shares.flat_map(|share| kinds.iter().map(move |&card| self.read_seconds(card, &share)));
        let mut candidates: Vec<f64> = seconds.collect();
        candidates.sort_by(f64::total_cmp);
        candidates.dedup();
        let (mut low, mut high) = (0, candidates.len() - 1);
        while low < high {
            let middle = (low + high) / 2;
            match self.cut_resident(&Caps { step_s: candidates[middle], ..*caps }) {
                Some(better) => (*cut, high) = (better, middle),
                None => low = middle + 1,
            }
        }
        candidates[high]
    }

    /// The least time of an image prefill's arithmetic on the busiest card, to within a thousandth of all of it on the
    /// slowest.
    fn least_image_seconds(&self, cut: &mut Cut, caps: &Caps) -> f64 {
        let slowest = self.cards.iter().map(|card| card.flops_per_s).fold(f64::INFINITY, f64::min);
        let whole = self.sizes.prefill_flops(&(0..self.sizes.units.len())) / slowest;
        let (mut low, mut high) = (0.0, whole);
        while high - low > whole / 1000.0 {
            let middle = (low + high) / 2.0;
            match self.cut_resident(&Caps { image_s: middle, ..*caps }) {
                Some(better) => (*cut, high) = (better, middle),
                None => low = middle,
            }
        }
        high
    }

    /// Hot weights and KV on as few cards as hold them, the largest ones; cold weights wherever there is room.
    fn few_cards(&self) -> Option<Settled> {
        let mut by_size: Vec<usize> = (0..self.cards.len()).collect();
        by_size.sort_by_key(|&card| std::cmp::Reverse(self.cards[card].capacity));
        let fewest = (1..=by_size.len()).find_map(|count| {
            let mut cards = by_size[..count].to_vec();
            cards.sort_unstable();
            self.hot_resident(&cards, VisionRule::OneImage)
        });
        match fewest {
            Some(settled) if !settled.off_cards => Some(settled),
            // One more hop costs less than what would cross from the host.
            fewest => self.resident(Policy::Throughput).or(fewest),
        }
    }

    /// Hot weights and KV spread evenly over all cards, cold weights wherever there is room.
    fn all_cards(&self) -> Option<Settled> {
        let cards: Vec<usize> = (0..self.cards.len()).collect();
        self.hot_resident(&cards, VisionRule::ManyImages).or_else(|| self.few_cards())
    }

    /// Hot weights on `cards` and none of them off its card; cold weights wherever there is room.
    fn hot_resident(&self, cards: &[usize], rule: VisionRule) -> Option<Settled> {
        let on_cards = self.best_hot_resident(cards, rule, true).filter(|settled| !settled.off_cards);
        on_cards.or_else(|| self.best_hot_resident(cards, rule, !self.host_holds_table()))
    }

    fn best_hot_resident(&self, cards: &[usize], rule: VisionRule, with_table: bool) -> Option<Settled> {
        let room: u64 = cards.iter().map(|&card| self.cards[card].capacity).sum();
        if room < self.step_bytes(&(self.sizes.num_vision..self.sizes.units.len())) {
            return None;
        }
        let judged = |cut: Cut| {
            let settled = self.settle(&cut, with_table)?;
            let times = settled.placement.times(&self.sizes, &self.links);
            Some((score(rule, &times), cut, settled))
        };
        let whole = self.vision_candidates(cards).into_iter().filter_map(|vision_on| {
            let cuts = self.cut_text(cards, vision_on, TextRule::Even, with_table, false)?;
            judged(cuts.after_host(0)?.1)
        });
        let whole = whole.min_by(|(a, ..), (b, ..)| compare(a, b))?;
        let split = self.cut_vision(&whole.1, rule, with_table).and_then(judged);
        let best = split.into_iter().chain([whole]).min_by(|(a, ..), (b, ..)| compare(a, b));
        best.map(|(.., settled)| settled)
    }

    /// Whether rows of the embedding table can be looked up off the cards.
    fn host_holds_table(&self) -> bool {
        self.file || self.host.is_some_and(|bytes| bytes >= self.sizes.table_bytes)
    }

    /// The cards do not hold the hot weights: the first layers are executed on the host, or weights are streamed,
    /// whichever makes the decode step of the planned batch faster. What the host executes, the first card prefills where
    /// answers about images come sooner so.
    fn hot_overflow(&self) -> Option<Settled> {
        // Both use one KV cache, so both are of one process.
        let can_prefill = self.host.is_some()
            && self.cards.first().is_some_and(|card| card.device.process() == Device::Cpu.process());
        let prefilled = if can_prefill { self.fastest_overflow(true) } else { None };
        let answers_s = |settled: &Settled| {
            let times = settled.placement.times(&self.sizes, &self.links);
            self.sizes.limits.max_sequences as f64 * times.image_s + ANSWER_TOKENS * times.step_s
        };
        let ways = prefilled.into_iter().chain(self.fastest_overflow(false));
        ways.min_by(|a, b| answers_s(a).total_cmp(&answers_s(b)))
    }

    /// The fastest decode step; with layers that the host executes and a card prefills, or without.
    fn fastest_overflow(&self, with_prefill: bool) -> Option<Settled> {
        let cards: Vec<usize> = (0..self.cards.len()).collect();
        let with_table = !self.host_holds_table();
        let (first, num_text) = (self.sizes.num_vision, self.sizes.num_text());
        let mut proposals: Vec<(f64, Cut)> = Vec::new();
        for vision_on in self.vision_candidates(&cards) {
            let Some(cuts) = self.cut_text(&cards, vision_on, TextRule::Fast, with_table, with_prefill) else {
                continue;
            };
            // The embedding alone on the host is what `with_table` already stands for.
            let least = if with_prefill { 2 } else { 0 };
            let on_host = (least..=num_text).filter(|&count| count != 1 && (count == 0 || self.host.is_some()));
            proposals.extend(on_host.filter_map(|count| {
                let (seconds, cut) = cuts.after_host(count)?;
                Some((seconds + self.host_step_seconds(&(first..first + count)), cut))
            }));
        }
        proposals.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        proposals.iter().find_map(|(_, cut)| self.settle(cut, with_table))
    }

    /// No card takes part.
    fn all_on_host(&self) -> Option<Settled> {
        self.host?;
        let shares = vec![Share::NONE; self.cards.len()];
        self.settle(&Cut { shares, host: self.sizes.num_vision..self.sizes.units.len() }, false)
    }

    /// What a person should know about a placement.
    fn notices(&self, placement: &Placement) -> Vec<String> {
        let mut notices = Vec::new();
        for card in &self.cards {
            let rests = self
                .sizes
                .groups
                .iter()
                .flat_map(|group| group.tensors.iter().map(move |tensor| (group.unit, *tensor)));
            let holds = |(unit, tensor): (usize, usize)| {
                placement.residency[tensor].place(placement.executes_on[unit]) == card.device
            };
            if !rests.into_iter().any(holds) {
                notices.push(format!("`{}` is not used", card.device));
            }
        }
        let on_host = placement.executes_on[self.sizes.num_vision + 1..].iter().filter(|on| **on == Device::Cpu);
        let num_on_host = on_host.count();
        if num_on_host > 0 && !self.cards.is_empty() {
            let num_layers = num_on_host.min(self.sizes.spec.num_layers);
            notices.push(format!("decoding is bound by the host: {num_layers} decoder layers are executed there"));
            if let Some(Prefill { device, from_rows }) = placement.prefill {
                notices.push(format!(
                    "`{device}` prefills them where a prompt has an image or {from_rows} tokens and more: their weights \
                     are streamed to it, their KV cache lies in host memory"
                ));
            }
        }
        let streamed = self.sizes.groups.iter().filter(|group| {
            let (on, residency) = (placement.executes_on[group.unit], placement.residency[group.tensors[0]]);
            group.phase == Phase::EveryToken && residency.place(on) != on
        });
        let streamed_bytes: u64 = streamed.map(|group| group.bytes).sum();
        if streamed_bytes > 0 {
            let streamed = format_bytes(streamed_bytes);
            notices.push(format!("decoding is bound by links: {streamed} are streamed for every token"));
        }
        if self.request.limits.context_len > self.request.spec.max_position_embeddings {
            notices.push(format!(
                "the model was trained for {} positions; {} are planned for",
                self.request.spec.max_position_embeddings, self.request.limits.context_len
            ));
        }
        notices
    }
}

/// Tokens of an answer about an image: what ways to do without enough memory on cards are compared by.
const ANSWER_TOKENS: f64 = 256.0;

/// Free bytes are evened out to this.
const ROOM_GRAIN: u64 = 1 << 22;

fn score(rule: VisionRule, times: &Times) -> [f64; 3] {
    match rule {
        VisionRule::OneImage => [times.token_s, times.image_s, 0.0],
        VisionRule::ManyImages => [times.slowest_step_s, times.slowest_image_s, times.image_s],
    }
}

fn compare(a: &[f64; 3], b: &[f64; 3]) -> std::cmp::Ordering {
    let firsts = a.iter().zip(b).map(|(a, b)| a.total_cmp(b));
    firsts.fold(std::cmp::Ordering::Equal, std::cmp::Ordering::then)
}
