//! How fast a machine moves and computes: measured, recorded of a kind of card, or assumed.

use std::collections::BTreeMap;

use cogvlm_core::{DType, Device};
use serde_json::{Map, Value, json};

/// The schema that is written, and the only one that is read.
pub const LINKS_SCHEMA: &str = "cogvlm-shard.links/1";

/// Rates of the host. Bytes and operations per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HostRates {
    /// What all cores together read from memory.
    pub read_bytes_per_s: f64,
    /// The inner loop of a product in f32, by all cores.
    pub f32_flops_per_s: f64,
    /// The same in bf16.
    pub bf16_flops_per_s: f64,
    /// What the disk reads that holds the checkpoint, where that was measured.
    pub disk_bytes_per_s: Option<f64>,
}

/// Rates of one card. Bytes and operations per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CardRates {
    /// A copy within its memory, bytes read plus written.
    pub copy_bytes_per_s: f64,
    /// A bf16 product of 8192 x 8192 x 8192.
    pub product_flops_per_s: f64,
    /// From pinned host memory to the card.
    pub from_host_bytes_per_s: f64,
    /// From the card to pinned host memory.
    pub to_host_bytes_per_s: f64,
    /// Seconds that the hidden state of one token takes to the host or from it, waiting included.
    pub host_hop_s: f64,
}

/// The way from one card to another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PeerRates {
    /// Whether one reads the other's memory; otherwise the driver copies through the host.
    pub peer_access: bool,
    /// Bytes per second of a large copy.
    pub bytes_per_s: f64,
    /// Seconds that the hidden state of one token takes, waiting included.
    pub hop_s: f64,
}

/// Where the rates of a device come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Measured on the machine that is named.
    Measured(String),
    /// Recorded of cards of this name (docs/benchmarks).
    Recorded(String),
    /// Nobody measured anything.
    Assumed,
}

/// Who measured.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MeasuredOn {
    /// Name of the machine.
    pub machine: String,
    /// Version of the NVIDIA driver, where there is one.
    pub driver: Option<String>,
    /// CUDA version that it supports.
    pub cuda: Option<String>,
}

/// Rates of a machine: of the host, of each card, of each pair of cards. What predictions rest on, and the choice
/// between streaming and computing on the host. Devices that nobody measured have assumed rates.
#[derive(Debug, Clone, PartialEq)]
pub struct Links {
    host: (HostRates, Source),
    cards: BTreeMap<u32, (CardRates, Source, String)>,
    pairs: BTreeMap<(u32, u32), PeerRates>,
    measured_on: Option<MeasuredOn>,
    virtual_ranks: bool,
}

/// A desktop host of the 2020s: two channels of memory, eight cores.
const ASSUMED_HOST: HostRates =
    HostRates { read_bytes_per_s: 40e9, f32_flops_per_s: 1e12, bf16_flops_per_s: 1e12, disk_bytes_per_s: None };
/// Its disk.
const ASSUMED_DISK_BYTES_PER_S: f64 = 2e9;
/// A 24 GB card of the 2020s on PCIe 4.0 x16: about 85 % of its data sheet's bandwidths, 70 % of its dense bf16
/// arithmetic.
const ASSUMED_CARD: CardRates = CardRates {
    copy_bytes_per_s: 800e9,
    product_flops_per_s: 50e12,
    from_host_bytes_per_s: 20e9,
    to_host_bytes_per_s: 20e9,
    host_hop_s: 20e-6,
};
/// Two such cards, which reach each other through the host.
const ASSUMED_PAIR: PeerRates = PeerRates { peer_access: false, bytes_per_s: 20e9, hop_s: 20e-6 };

/// Cards that were measured, by the name that the driver gives them: docs/benchmarks/2026-11-22-h100, and for the H200
/// a copy, a product and a link measured with PyTorch. Hops are those assumed: they were not measured by this program.
const RECORDED: [(&str, CardRates); 2] = [
    (
        "NVIDIA H100 80GB HBM3",
        CardRates {
            copy_bytes_per_s: 2.98e12,
            product_flops_per_s: 775e12,
            from_host_bytes_per_s: 54.5e9,
            to_host_bytes_per_s: 54.5e9,
            host_hop_s: 20e-6,
        },
    ),
    (
        "NVIDIA H200",
        CardRates {
            copy_bytes_per_s: 4.167e12,
            product_flops_per_s: 747e12,
            from_host_bytes_per_s: 55e9,
            to_host_bytes_per_s: 55e9,
            host_hop_s: 20e-6,
        },
    ),
];

impl Default for Links {
    /// Cautious figures for 24 GB cards in a desktop host. They are assumptions: predictions that rest on them compare
    /// plans, they do not promise times.
    fn default() -> Self {
        Self {
            host: (ASSUMED_HOST, Source::Assumed),
            cards: BTreeMap::new(),
            pairs: BTreeMap::new(),
            measured_on: None,
            virtual_ranks: false,
        }
    }
}

impl Links {
    /// Nothing yet, measured by `measured_on`; what is not added to it is assumed.
    pub fn measured(measured_on: MeasuredOn, host: HostRates) -> Self {
        let source = Source::Measured(measured_on.machine.clone());
        Self { host: (host, source), measured_on: Some(measured_on), ..Self::default() }
    }

    /// With other rates of the host, measured now.
    #[must_use]
    pub fn with_host(self, host: HostRates) -> Self {
        Self { host: (host, Source::Measured("this machine".to_owned())), ..self }
    }

    /// With rates of card `ordinal`, which calls itself `name`, measured now.
    #[must_use]
    pub fn with_card(mut self, ordinal: u32, name: &str, rates: CardRates) -> Self {
        let machine = self.measured_on.as_ref().map_or("this machine", |on| on.machine.as_str());
        self.cards.insert(ordinal, (rates, Source::Measured(machine.to_owned()), name.to_owned()));
        self
    }

    /// With rates from card `from` to card `to`, measured now.
    #[must_use]
    pub fn with_pair(mut self, from: u32, to: u32, rates: PeerRates) -> Self {
        self.pairs.insert((from, to), rates);
        self
    }

    /// With what is recorded of cards of this name, where something is and card `ordinal` has no rates yet.
    #[must_use]
    pub fn with_card_name(mut self, ordinal: u32, name: &str) -> Self {
        if let Some((_, rates)) = RECORDED.iter().find(|(known, _)| *known == name) {
            let recorded = || (*rates, Source::Recorded(name.to_owned()), name.to_owned());
            self.cards.entry(ordinal).or_insert_with(recorded);
        }
        self
    }

    /// The same machine, where numbers are virtual ranks that the host executes. It changes predicted times only: plans
    /// for virtual ranks are those for cards.
    #[must_use]
    pub fn with_virtual_ranks(self) -> Self {
        Self { virtual_ranks: true, ..self }
    }

    /// The same rates, numbers being cards.
    pub(crate) fn of_cards(&self) -> Self {
        Self { virtual_ranks: false, ..self.clone() }
    }

    /// The host.
    pub fn host(&self) -> &HostRates {
        &self.host.0
    }

    /// Card `ordinal`.
    pub fn card(&self, ordinal: u32) -> &CardRates {
        self.cards.get(&ordinal).map_or(&ASSUMED_CARD, |(rates, ..)| rates)
    }

    /// From card `from` to card `to`; the other direction's where only that was measured.
    pub fn pair(&self, from: u32, to: u32) -> &PeerRates {
        self.pairs.get(&(from, to)).or_else(|| self.pairs.get(&(to, from))).unwrap_or(&ASSUMED_PAIR)
    }

    /// Operations per second of the host with activations of this type, which takes f32 products where they are faster.
    pub(crate) fn host_flops_per_s(&self, activations: DType) -> f64 {
        let HostRates { f32_flops_per_s, bf16_flops_per_s, .. } = self.host.0;
        if activations == DType::Bf16 { bf16_flops_per_s.max(f32_flops_per_s) } else { f32_flops_per_s }
    }

    /// Whether the host executes what is on `device`.
    pub(crate) fn is_host(&self, device: Device) -> bool {
        self.virtual_ranks || !matches!(device, Device::Gpu(_))
    }

    /// Bytes per second from `from` to `to`, two different places.
    pub(crate) fn between(&self, from: Device, to: Device) -> f64 {
        let host = &self.host.0;
        match (from, to) {
            (Device::Disk, _) | (_, Device::Disk) => host.disk_bytes_per_s.unwrap_or(ASSUMED_DISK_BYTES_PER_S),
            // Read once, written once.
            _ if self.virtual_ranks => host.read_bytes_per_s / 2.0,
            (Device::Gpu(from), Device::Gpu(to)) => self.pair(from, to).bytes_per_s,
            (Device::Gpu(card), _) => self.card(card).to_host_bytes_per_s,
            (_, Device::Gpu(card)) => self.card(card).from_host_bytes_per_s,
            _ => host.read_bytes_per_s,
        }
    }

    /// Seconds of a small message from `from` to `to`, two different places.
    pub(crate) fn hop_s(&self, from: Device, to: Device) -> f64 {
        match (from, to) {
            _ if self.virtual_ranks => ASSUMED_PAIR.hop_s,
            (Device::Gpu(from), Device::Gpu(to)) => self.pair(from, to).hop_s,
            (Device::Gpu(card), _) | (_, Device::Gpu(card)) => self.card(card).host_hop_s,
            _ => 0.0,
        }
    }

    /// Whether two cards have the same rates, the ways to others included.
    pub(crate) fn alike(&self, one: u32, other: u32) -> bool {
        let ways = |card: u32| self.pairs.keys().any(|(from, to)| *from == card || *to == card);
        one == other || self.card(one) == self.card(other) && !ways(one) && !ways(other)
    }

    /// What the rates of `devices` are: `measured on host-7 (`0`, `1`); assumed of a desktop host (`cpu`)`.
    pub(crate) fn describe(&self, devices: &[Device]) -> String {
        let mut parts: Vec<(String, Vec<String>)> = Vec::new();
        for &device in devices.iter().filter(|device| device.executes()) {
            let source = match device {
                Device::Gpu(card) if !self.virtual_ranks => {
                    self.cards.get(&card).map_or(&Source::Assumed, |(_, source, _)| source)
                }
                _ => &self.host.1,
            };
            let text = match (source, self.is_host(device)) {
                (Source::Measured(machine), _) => format!("measured on {machine}"),
                (Source::Recorded(name), _) => format!("recorded of an {name}"),
                (Source::Assumed, true) => "assumed of a desktop host".to_owned(),
                (Source::Assumed, false) => "assumed of a 24 GB card on PCIe 4.0".to_owned(),
            };
            let name = format!("`{device}`");
            match parts.iter_mut().find(|(known, _)| *known == text) {
                Some((_, names)) => names.push(name),
                None => parts.push((text, vec![name])),
            }
        }
        parts.iter().map(|(text, names)| format!("{text} ({})", names.join(", "))).collect::<Vec<_>>().join("; ")
    }

    /// What `devices` lack that others were measured of: for notices.
    pub(crate) fn missing(&self, devices: &[Device]) -> Vec<String> {
        let mut missing = Vec::new();
        if self.measured_on.is_none() || self.virtual_ranks {
            return missing;
        }
        let card = |device: &Device| if let Device::Gpu(card) = device { Some((*card, *device)) } else { None };
        let cards: Vec<(u32, Device)> = devices.iter().filter_map(card).collect();
        for (card, device) in &cards {
            let instead = match self.cards.get(card).map(|(_, source, _)| source) {
                None => "of a 24 GB card are assumed".to_owned(),
                Some(Source::Recorded(name)) => format!("recorded of an {name} are taken"),
                Some(_) => continue,
            };
            missing.push(format!("there are no measured rates of `{device}`: those {instead}"));
        }
        for (index, (from, sender)) in cards.iter().enumerate() {
            for (to, receiver) in &cards[index + 1..] {
                let known = self.pairs.contains_key(&(*from, *to)) || self.pairs.contains_key(&(*to, *from));
                if !known {
                    missing.push(format!(
                        "there are no measured rates between `{sender}` and `{receiver}`: {} GB/s through the host are \
                         assumed",
                        ASSUMED_PAIR.bytes_per_s / 1e9
                    ));
                }
            }
        }
        missing
    }

    /// The rates as JSON, `cogvlm-shard.links/1`. Only what was measured is written.
    pub fn to_json(&self) -> Value {
        let on = self.measured_on.clone().unwrap_or_default();
        let host = self.host();
        let measured = self.cards.iter().filter(|(_, (_, source, _))| matches!(source, Source::Measured(_)));
        let cards: Map<String, Value> = measured
            .map(|(ordinal, (rates, _, name))| {
                let entry = json!({
                    "name": name,
                    "copy_bytes_per_s": rates.copy_bytes_per_s,
                    "product_flops_per_s": rates.product_flops_per_s,
                    "from_host_bytes_per_s": rates.from_host_bytes_per_s,
                    "to_host_bytes_per_s": rates.to_host_bytes_per_s,
                    "host_hop_s": rates.host_hop_s,
                });
                (Device::Gpu(*ordinal).to_string(), entry)
            })
            .collect();
        let pair = |((from, to), rates): (&(u32, u32), &PeerRates)| {
            json!({
                "from": Device::Gpu(*from), "to": Device::Gpu(*to), "peer_access": rates.peer_access, "bytes_per_s": rates.bytes_per_s,
                "hop_s": rates.hop_s,
            })
        };
        json!({
            "schema": LINKS_SCHEMA,
            "measured_on": {"machine": on.machine, "driver": on.driver, "cuda": on.cuda},
            "host": {
                "read_bytes_per_s": host.read_bytes_per_s,
                "f32_flops_per_s": host.f32_flops_per_s,
                "bf16_flops_per_s": host.bf16_flops_per_s,
                "disk_bytes_per_s": host.disk_bytes_per_s,
            },
            "devices": cards,
            "pairs": self.pairs.iter().map(pair).collect::<Vec<_>>(),
        })
    }

    /// Reads what [`to_json`](Self::to_json) wrote, by itself or as `links` of a larger object (`doctor --json`).
    ///
    /// # Errors
    /// [`LinksError`] with the field that does not hold.
    pub fn from_json(text: &str) -> Result<Self, LinksError> {
        let value: Value = serde_json::from_str(text).map_err(|error| wrong("", "links", &error.to_string()))?;
        match value.get("links") {
            Some(links) => read(links, "links."),
            None => read(&value, ""),
        }
    }
}

/// A file of rates that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` {problem}")]
pub struct LinksError {
    /// The field.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
}

fn wrong(prefix: &str, field: &str, problem: &str) -> LinksError {
    LinksError { field: format!("{prefix}{field}"), problem: problem.to_owned() }
}

/// An object of which every field is asked for, and nothing else may be there.
struct Fields<'a> {
    object: &'a Map<String, Value>,
    /// What stands before its fields in messages.
    prefix: String,
    asked: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    fn new(value: &'a Value, parent: &str, name: &str) -> Result<Self, LinksError> {
        let object = value.as_object().ok_or_else(|| wrong(parent, name, "is no JSON object"))?;
        let prefix = if name.is_empty() { parent.to_owned() } else { format!("{parent}{name}.") };
        Ok(Self { object, prefix, asked: Vec::new() })
    }

    fn get(&mut self, name: &'static str) -> Result<&'a Value, LinksError> {
        self.asked.push(name);
        let missing = "is missing; `cogvlm-shard doctor --json` writes a whole file";
        self.object.get(name).ok_or_else(|| wrong(&self.prefix, name, missing))
    }

    fn wrong(&self, name: &str, problem: &str) -> LinksError {
        wrong(&self.prefix, name, problem)
    }

    /// A number in `low..high`.
    fn number(&mut self, name: &'static str, low: f64, high: f64) -> Result<f64, LinksError> {
        let value = self.get(name)?;
        let number = value.as_f64().ok_or_else(|| self.wrong(name, &format!("is {value}, which is no number")))?;
        if (low..high).contains(&number) {
            Ok(number)
        } else {
            Err(self.wrong(name, &format!("is {number}; it lies between {low} and {high}")))
        }
    }

    fn rate(&mut self, name: &'static str) -> Result<f64, LinksError> {
        // Slower than that, times would not be finite.
        self.number(name, 1.0, 1e21)
    }

    fn seconds(&mut self, name: &'static str) -> Result<f64, LinksError> {
        self.number(name, 0.0, 60.0)
    }

    fn text(&mut self, name: &'static str) -> Result<String, LinksError> {
        let value = self.get(name)?;
        let text = value.as_str().ok_or_else(|| self.wrong(name, &format!("is {value}, which is no text")))?;
        Ok(text.to_owned())
    }

    fn optional_text(&mut self, name: &'static str) -> Result<Option<String>, LinksError> {
        if self.object.get(name).is_none_or(Value::is_null) {
            self.asked.push(name);
            return Ok(None);
        }
        self.text(name).map(Some)
    }

    fn ordinal(&mut self, name: &'static str, known: &BTreeMap<u32, CardRates>) -> Result<u32, LinksError> {
        let value = self.get(name)?;
        let number = match value.as_str() {
            Some(text) => gpu_number(text),
            None => value.as_u64().and_then(|number| gpu_number(&number.to_string())),
        };
        let number = number.ok_or_else(|| self.wrong(name, &format!("is {value}, which is {NO_GPU}")))?;
        if known.contains_key(&number) {
            Ok(number)
        } else {
            Err(self.wrong(name, &format!("is {value}, which `devices` does not list")))
        }
    }

    fn end(self) -> Result<(), LinksError> {
        let unknown = self.object.keys().find(|key| !self.asked.contains(&key.as_str()));
        unknown.map_or(Ok(()), |key| Err(self.wrong(key, "is no field of this file")))
    }
}

/// What a GPU's name has to be.
const NO_GPU: &str = "no GPU's number, such as 0, or \"1/0\" for GPU 0 of process 1";

/// The number of a GPU that is written as devices are.
fn gpu_number(text: &str) -> Option<u32> {
    match Device::parse(text) {
        Some(Device::Gpu(number)) if Device::Gpu(number).to_string() == text => Some(number),
        _ => None,
    }
}

fn read(value: &Value, parent: &str) -> Result<Links, LinksError> {
    let mut file = Fields::new(value, parent, "").map_err(|_| wrong("", "links", "is no JSON object"))?;
    match file.get("schema")?.as_str() {
        Some(LINKS_SCHEMA) => {}
        _ => {
            let found = &file.object["schema"];
            let problem =
                format!("is {found}; this program reads \"{LINKS_SCHEMA}\", which its `doctor --json` writes");
            return Err(file.wrong("schema", &problem));
        }
    }
    let mut on = Fields::new(file.get("measured_on")?, parent, "measured_on")?;
    let (machine, driver, cuda) = (on.text("machine")?, on.optional_text("driver")?, on.optional_text("cuda")?);
    on.end()?;
    let measured_on = MeasuredOn { machine, driver, cuda };

    let mut host = Fields::new(file.get("host")?, parent, "host")?;
    let no_disk = host.object.get("disk_bytes_per_s").is_none_or(Value::is_null);
    let rates = HostRates {
        read_bytes_per_s: host.rate("read_bytes_per_s")?,
        f32_flops_per_s: host.rate("f32_flops_per_s")?,
        bf16_flops_per_s: host.rate("bf16_flops_per_s")?,
        disk_bytes_per_s: if no_disk { None } else { Some(host.rate("disk_bytes_per_s")?) },
    };
    host.asked.push("disk_bytes_per_s");
    host.end()?;

    let mut links = Links::measured(measured_on, rates);
    let devices = Fields::new(file.get("devices")?, parent, "devices")?;
    let mut known = BTreeMap::new();
    for (key, value) in devices.object {
        let ordinal = gpu_number(key).ok_or_else(|| devices.wrong(key, &format!("is {NO_GPU}")))?;
        let mut card = Fields::new(value, &devices.prefix, key)?;
        let name = card.text("name")?;
        let rates = CardRates {
            copy_bytes_per_s: card.rate("copy_bytes_per_s")?,
            product_flops_per_s: card.rate("product_flops_per_s")?,
            from_host_bytes_per_s: card.rate("from_host_bytes_per_s")?,
            to_host_bytes_per_s: card.rate("to_host_bytes_per_s")?,
            host_hop_s: card.seconds("host_hop_s")?,
        };
        card.end()?;
        known.insert(ordinal, rates);
        links = links.with_card(ordinal, &name, rates);
    }
    let pairs = file.get("pairs")?.as_array().ok_or_else(|| file.wrong("pairs", "is no list"))?;
    for (index, value) in pairs.iter().enumerate() {
        let mut pair = Fields::new(value, parent, &format!("pairs[{index}]"))?;
        let (from, to) = (pair.ordinal("from", &known)?, pair.ordinal("to", &known)?);
        if from == to || links.pairs.contains_key(&(from, to)) {
            let (from, to) = (Device::Gpu(from), Device::Gpu(to));
            return Err(pair.wrong("to", &format!("is {to}: the way from {from} is itself, or stands here twice")));
        }
        let peer_access = pair.get("peer_access")?.as_bool();
        let peer_access = peer_access.ok_or_else(|| pair.wrong("peer_access", "is neither true nor false"))?;
        let rates = PeerRates { peer_access, bytes_per_s: pair.rate("bytes_per_s")?, hop_s: pair.seconds("hop_s")? };
        pair.end()?;
        links = links.with_pair(from, to, rates);
    }
    file.end()?;
    Ok(links)
}
