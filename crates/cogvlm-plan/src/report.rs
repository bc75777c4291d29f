//! What an operator decides from: plain text, at most [`WIDTH`] columns.

use std::collections::BTreeMap;
use std::fmt::Write;

use cogvlm_core::memory::{GIB, MIB, format_bytes};
use cogvlm_core::{Device, Expert, Phase, Unit, WeightGroup};

use crate::error::Change;
use crate::own::change::{longest_context, smallest_changes};
use crate::plan::{DevicePlan, Plan, PlanRequest, Policy, Residency};

/// Columns that the report needs at most.
const WIDTH: usize = 100;

impl Plan {
    /// The plan as text: per device its units and memory, per link its bytes, predicted times, what rests off its
    /// device, and what limits the plan. With the `request` that it was made of, the smallest change that would lift
    /// that limit is searched for, which takes as long as some tens of plans.
    pub fn report(&self, request: Option<&PlanRequest>) -> String {
        let mut text = String::new();
        let unit = self.memory_unit();
        self.write_head(&mut text, unit);
        self.write_devices(&mut text, unit);
        self.write_links(&mut text);
        self.write_off_device(&mut text);
        self.write_times(&mut text);
        self.write_limit(
            &mut text,
            request.filter(|_| self.policy != Policy::Accelerate && self.tensor_parallel.is_empty()),
        );
        for notice in &self.notices {
            wrapped(&mut text, "note: ", notice);
        }
        text
    }

    /// The unit of the memory table.
    fn memory_unit(&self) -> (u64, &'static str) {
        let largest = self.devices.iter().filter_map(|device| device.budget_bytes).max().unwrap_or(0);
        if largest >= GIB { (GIB, "GiB") } else { (MIB, "MiB") }
    }

    fn write_head(&self, text: &mut String, (_, unit): (u64, &str)) {
        let policy = format!("{:?}", self.policy).to_lowercase();
        let (weights, activations) = (self.weight_dtype, self.activation_dtype);
        let limits = &self.limits;
        line(text, format_args!("{}: policy {policy}, {weights} weights, {activations} activations", self.model));
        let (sequences, tokens) = (limits.max_sequences, limits.context_len);
        line(text, format_args!("planned for {sequences} x {tokens} tokens; memory in {unit}"));
    }

    fn write_devices(&self, text: &mut String, (unit, _): (u64, &str)) {
        let amount = |bytes: u64| format!("{:.2}", bytes as f64 / unit as f64);
        let head = ["device", "executes", "weights", "KV", "work", "staging", "reserve", "free", "budget"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        for device in &self.devices {
            let units = self.units_on(device.device);
            let mut lines = wrap(&units, EXECUTES_WIDTH).into_iter();
            let DevicePlan { weight_bytes, kv_bytes, workspace_bytes, staging_bytes, reserved_bytes, .. } = *device;
            let mut row = vec![device.device.to_string(), lines.next().unwrap_or_default()];
            row.extend([weight_bytes, kv_bytes, workspace_bytes, staging_bytes, reserved_bytes].map(amount));
            let limits = [device.free_bytes(), device.budget_bytes];
            row.extend(limits.map(|bytes| bytes.map_or_else(|| "-".to_owned(), amount)));
            rows.push(row);
            rows.extend(lines.map(|more| vec![String::new(), more]));
        }
        blank(text);
        table(text, &rows, &[0, 1]);
    }

    /// `ViT 0-31, adapter, layers 16-31; prompts: layers 0-15`.
    fn units_on(&self, device: Device) -> String {
        let own = self.units().filter(|(on, unit)| self.takes_part(device, *on, *unit)).map(|(_, unit)| unit);
        let prefilled =
            self.units().filter(|(on, unit)| self.prefills(*on, *unit) == Some(device)).map(|(_, unit)| unit);
        match (unit_names(own), unit_names(prefilled)) {
            (own, prefilled) if own.is_empty() && prefilled.is_empty() => "nothing".to_owned(),
            (own, prefilled) if prefilled.is_empty() => own,
            (own, prefilled) if own.is_empty() => format!("prompts: {prefilled}"),
            (own, prefilled) => format!("{own}; prompts: {prefilled}"),
        }
    }

    fn write_links(&self, text: &mut String) {
        if self.links.is_empty() {
            return;
        }
        let mut rows = vec![["link", "per token", "per image"].map(str::to_owned).to_vec()];
        rows.extend(self.links.iter().map(|link| {
            let amount = |bytes| if bytes == 0 { "-".to_owned() } else { format_bytes(bytes) };
            vec![format!("{} -> {}", link.from, link.to), amount(link.bytes_per_token), amount(link.bytes_per_image)]
        }));
        blank(text);
        table(text, &rows, &[0]);
    }

    /// Weights that do not rest where they are used, by kind and place.
    fn write_off_device(&self, text: &mut String) {
        let mut rests: BTreeMap<(Device, Device, Kind), OffDevice> = BTreeMap::new();
        let mut whole: BTreeMap<(Kind, Option<usize>), u64> = BTreeMap::new();
        for placement in &self.placements {
            let (kind, layer) = Kind::of(placement.tensor.unit, placement.tensor.group, placement.tensor.phase);
            *whole.entry((kind, layer)).or_default() += placement.bytes;
            let (on, rest) = (placement.executes_on, placement.residency.place(placement.executes_on));
            if on != rest {
                *rests.entry((on, rest, kind)).or_default().entry(layer).or_default() += placement.bytes;
            }
        }
        if rests.is_empty() {
            return;
        }
        let mut rows = vec![["used by", "rests on", "size", "weights"].map(str::to_owned).to_vec()];
        for ((on, rest, kind), layers) in &rests {
            let names = layers.iter().map(|(layer, bytes)| {
                let part = if *bytes < whole[&(*kind, *layer)] { "part of " } else { "" };
                (format!("{part}{}", kind.name()), *layer)
            });
            let size = format_bytes(layers.values().sum());
            let mut lines = wrap(&ranges(names).join(", "), WEIGHTS_WIDTH).into_iter();
            rows.push(vec![on.to_string(), place_name(*rest), size, lines.next().unwrap_or_default()]);
            rows.extend(lines.map(|more| vec![String::new(), String::new(), String::new(), more]));
        }
        blank(text);
        table(text, &rows, &[0, 1, 3]);
    }

    fn write_times(&self, text: &mut String) {
        let ms = |seconds: f64| {
            let ms = seconds * 1e3;
            if ms < 100.0 { format!("{ms:.1} ms") } else { format!("{ms:.0} ms") }
        };
        blank(text);
        let (token, image) = (ms(self.seconds_per_token), ms(self.seconds_per_image));
        let (sequences, context) = (self.limits.max_sequences, self.limits.context_len);
        line(
            text,
            format_args!("predicted: {token} per token at {context} tokens of context, {image} per image prefill"),
        );
        let hot = self.placements.iter().filter(|placement| placement.tensor.phase == Phase::EveryToken);
        let hot = format_bytes(hot.map(|placement| placement.bytes).sum());
        let kv: u64 = self.devices.iter().map(|device| device.kv_bytes).sum();
        let kv = format_bytes(kv / sequences.max(1) as u64);
        let indent = " ".repeat(11);
        if sequences > 1 {
            let rate = self.tokens_per_second;
            line(text, format_args!("{indent}{rate:.0} tokens/s of {sequences} sequences at once"));
        }
        line(text, format_args!("{indent}a step reads {hot} of weights, and {kv} of KV cache for each sequence"));
        if !self.rates.is_empty() {
            wrapped(text, "rates:     ", &self.rates);
            if self.rates.contains("assumed") {
                line(
                    text,
                    format_args!("{indent}`doctor --json` measures those of a machine, `--links FILE` takes them"),
                );
            }
        }
    }

    fn write_limit(&self, text: &mut String, request: Option<&PlanRequest>) {
        let off = |phase: Phase| {
            let off =
                self.placements.iter().filter(|placement| placement.tensor.phase == phase && !placement.at_home());
            off.map(|placement| placement.bytes).sum::<u64>()
        };
        let (hot, cold) = (off(Phase::EveryToken), off(Phase::ImagePrefill));
        let changes = |good: &dyn Fn(&Self) -> bool| {
            request.and_then(|request| Change::alternatives(&smallest_changes(request, good)))
        };
        let only_host = self.devices.iter().all(|device| !matches!(device.device, Device::Gpu(_)));
        if only_host || (hot, cold) == (0, 0) {
            let tightest = self.devices.iter().filter(|device| device.used_bytes() > 0);
            let tightest =
                tightest.filter_map(|device| Some((device.free_bytes()?, device.device, device.budget_bytes?))).min();
            if let Some((free, device, budget)) = tightest {
                let (free, budget) = (format_bytes(free), format_bytes(budget));
                wrapped(text, "limit: ", &format!("`{device}` has the least room, {free} of {budget}"));
            }
            if let Some(tokens) = request.and_then(longest_context) {
                wrapped(text, "       ", &format!("as it is, up to `--context {tokens}` fits"));
            }
            return;
        }
        let (what, lift) = if hot > 0 {
            let good = |plan: &Self| {
                plan.placements
                    .iter()
                    .all(|placement| placement.tensor.phase != Phase::EveryToken || placement.at_home())
            };
            (format!("{} that every token needs do not fit on the cards", format_bytes(hot)), changes(&good))
        } else {
            let good = |plan: &Self| {
                plan.placements
                    .iter()
                    .all(|placement| placement.tensor.phase == Phase::RowLookup || placement.at_home())
            };
            (format!("{} of vision weights cross a link for every image", format_bytes(cold)), changes(&good))
        };
        wrapped(text, "limit: ", &what);
        if let Some(lift) = lift {
            wrapped(text, "lift:  ", &lift);
        }
    }
}

impl crate::plan::TensorPlacement {
    /// On the card that executes its unit.
    fn at_home(&self) -> bool {
        self.residency == Residency::Device
    }
}

/// Weights of one kind by layer: bytes off their device.
type OffDevice = BTreeMap<Option<usize>, u64>;

/// Weights as an operator thinks of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Table,
    Patches,
    Vit,
    Adapter,
    VisionExperts,
    LanguageExperts,
    Norms,
    Head,
}

impl Kind {
    fn of(unit: Unit, group: WeightGroup, phase: Phase) -> (Self, Option<usize>) {
        let experts = if phase == Phase::ImagePrefill { Expert::Vision } else { Expert::Language };
        match (unit, group, experts) {
            (Unit::PatchEmbedding, ..) => (Self::Patches, None),
            (Unit::VitLayer(layer), ..) => (Self::Vit, Some(layer)),
            (Unit::Adapter, ..) => (Self::Adapter, None),
            (Unit::Embedding, ..) => (Self::Table, None),
            (Unit::DecoderLayer(layer), WeightGroup::Norms, _) => (Self::Norms, Some(layer)),
            (Unit::DecoderLayer(layer), _, Expert::Vision) => (Self::VisionExperts, Some(layer)),
            (Unit::DecoderLayer(layer), _, Expert::Language) => (Self::LanguageExperts, Some(layer)),
            (Unit::Head, ..) => (Self::Head, None),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Table => "embedding table (rows looked up)",
            Self::Patches => "patch embedding",
            Self::Vit => "ViT",
            Self::Adapter => "adapter",
            Self::VisionExperts => "vision experts of layers",
            Self::LanguageExperts => "language experts of layers",
            Self::Norms => "norms of layers",
            Self::Head => "head",
        }
    }
}

/// `ViT 0-31, adapter, layers 0-15`.
fn unit_names(units: impl Iterator<Item = Unit>) -> String {
    let parts = ranges(units.map(|unit| match unit {
        Unit::VitLayer(layer) => ("ViT".to_owned(), Some(layer)),
        Unit::DecoderLayer(layer) => ("layers".to_owned(), Some(layer)),
        other => (other.to_string(), None),
    }));
    parts.join(", ")
}

fn place_name(device: Device) -> String {
    match device {
        Device::Gpu(_) => device.to_string(),
        Device::Cpu => "host".to_owned(),
        Device::Disk => "file".to_owned(),
    }
}

/// `ViT 0-31` for consecutive numbers under one name.
fn ranges(items: impl Iterator<Item = (String, Option<usize>)>) -> Vec<String> {
    let mut runs: Vec<(String, Option<(usize, usize)>)> = Vec::new();
    for (name, number) in items {
        match (runs.last_mut(), number) {
            (Some((known, Some((_, last)))), Some(number)) if *known == name && *last + 1 == number => *last = number,
            _ => runs.push((name, number.map(|number| (number, number)))),
        }
    }
    let text = |(name, run): (String, Option<(usize, usize)>)| match run {
        None => name,
        Some((first, last)) if first == last => format!("{} {first}", name.replace("layers", "layer")),
        Some((first, last)) => format!("{name} {first}-{last}"),
    };
    runs.into_iter().map(text).collect()
}

const EXECUTES_WIDTH: usize = 33;
const WEIGHTS_WIDTH: usize = 66;

/// Rows in columns two blanks apart; `left` are the columns that stand on the left.
fn table(text: &mut String, rows: &[Vec<String>], left: &[usize]) {
    let num_columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..num_columns).map(width).collect();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
            if left.contains(&column) { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        line(text, format_args!("{}", cells.collect::<Vec<_>>().join("  ").trim_end()));
    }
}

/// `content` behind `label`, later lines indented below its beginning.
fn wrapped(text: &mut String, label: &str, content: &str) {
    for (index, part) in wrap(content, WIDTH - label.len()).iter().enumerate() {
        let label = if index == 0 { label } else { &" ".repeat(label.len()) };
        line(text, format_args!("{label}{part}"));
    }
}

/// Lines of at most `width` characters, broken at blanks; a longer word has a line of its own.
fn wrap(content: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in content.split(' ') {
        match lines.last_mut() {
            Some(last) if last.chars().count() + 1 + word.chars().count() <= width => {
                last.push(' ');
                last.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

fn line(text: &mut String, content: std::fmt::Arguments<'_>) {
    writeln!(text, "{content}").expect("a String takes everything");
}

fn blank(text: &mut String) {
    text.push('\n');
}
