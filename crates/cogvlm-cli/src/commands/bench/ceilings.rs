//! What the hardware could do at most, measured in the same run.

use cogvlm_core::{DType, Device, Unit};
use cogvlm_cpu::ceiling as host;
use cogvlm_cuda::ceiling as gpu;
use cogvlm_plan::links::{HostRates, Links};
use cogvlm_plan::plan::Plan;
use serde_json::{Value, json};

use super::report::{flops_rate, gigabytes};
use crate::commands::doctor::{card_rates, peer_rates};
use crate::output::note;

/// Ceilings of one device, each with what was measured.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Ceilings {
    /// What the device moves to and from its memory.
    pub(super) bytes_per_s: f64,
    bytes_by: String,
    /// Its matrix arithmetic.
    pub(super) flops_per_s: f64,
    flops_by: String,
    /// What reaches it from host memory; `None` for the host.
    pub(super) link_bytes_per_s: Option<f64>,
}

/// What the link's ceiling is.
const LINK_BY: &str = "link: copy from pinned host memory";

/// What a run measured of its machine.
pub(super) struct Measured {
    /// Of the first device that executes decoder layers. `None` where it cannot be measured, which is said.
    pub(super) ceilings: Option<Ceilings>,
    /// Rates of all devices of the plan. `None` where one of them cannot be measured, which is said.
    pub(super) links: Option<Links>,
}

impl Measured {
    /// Measures every device of `plan`, and the ways between those between which something crosses.
    pub(super) fn of(plan: &Plan, on_gpus: bool, activations: DType) -> Self {
        let decodes = |unit: &Unit| matches!(unit, Unit::DecoderLayer(_));
        let stage = plan.stages.iter().find(|stage| stage.units.iter().any(decodes));
        let decoding = stage.map_or(Device::Cpu, |stage| stage.device);
        let host = (!on_gpus || plan.stages.iter().any(|stage| stage.device == Device::Cpu)).then(host_rates);
        let mut links = Links::default();
        if let Some(host) = host {
            links = links.with_host(host);
        }
        if !on_gpus {
            let ceilings = host.map(|host| Ceilings::of_host(&host, activations));
            return Self { ceilings, links: Some(links.with_virtual_ranks()) };
        }
        let mut all_measured = true;
        let mut ceilings = host.filter(|_| decoding == Device::Cpu).map(|host| Ceilings::of_host(&host, activations));
        for planned in plan.devices.iter().filter(|planned| plan.uses(planned.device)) {
            let Some(ordinal) = planned.device.ordinal() else { continue };
            // GPUs of other processes are taken to be like the one of the same number here, for shares alone.
            let is_here = planned.device.process() == 0;
            all_measured &= is_here;
            if !is_here && planned.device != decoding {
                continue;
            }
            match gpu::measure(ordinal) {
                Ok(measured) => {
                    if is_here {
                        links = links.with_card(ordinal, "", card_rates(&measured));
                    }
                    if planned.device == decoding {
                        ceilings = Some(Ceilings::from(measured).together(plan.tensor_parallel.len().max(1)));
                    }
                }
                Err(error) => {
                    all_measured = false;
                    let lost = if planned.device == decoding { "shares of what" } else { "prediction by what" };
                    note(&format!("no {lost} GPU {ordinal} could do, which cannot be measured: {error}"));
                }
            }
        }
        for link in &plan.links {
            let (Device::Gpu(from), Device::Gpu(to)) = (link.from, link.to) else { continue };
            if link.from.process() != 0 || link.to.process() != 0 {
                continue;
            }
            match gpu::measure_pair(from, to) {
                Ok(measured) => links = links.with_pair(from, to, peer_rates(&measured)),
                Err(error) => {
                    all_measured = false;
                    note(&format!(
                        "no prediction by what crosses from GPU {from} to {to}, which cannot be measured: {error}"
                    ));
                }
            }
        }
        Self { ceilings, links: all_measured.then_some(links) }
    }
}

/// Rates of the host.
fn host_rates() -> HostRates {
    let [f32_flops_per_s, bf16_flops_per_s] = [DType::F32, DType::Bf16].map(host::flops_per_s);
    HostRates { read_bytes_per_s: host::read_bytes_per_s(), f32_flops_per_s, bf16_flops_per_s, disk_bytes_per_s: None }
}

impl Ceilings {
    /// Of as many of the device as compute every layer together. Each has a link of its own, of which one is meant.
    fn together(self, num_members: usize) -> Self {
        if num_members == 1 {
            return self;
        }
        Self {
            bytes_per_s: self.bytes_per_s * num_members as f64,
            bytes_by: format!("{num_members} times: {}", self.bytes_by),
            flops_per_s: self.flops_per_s * num_members as f64,
            flops_by: format!("{num_members} times: {}", self.flops_by),
            ..self
        }
    }

    fn of_host(rates: &HostRates, activations: DType) -> Self {
        Self {
            bytes_per_s: rates.read_bytes_per_s,
            bytes_by: "1 GiB read by all cores".to_owned(),
            flops_per_s: if activations == DType::F32 { rates.f32_flops_per_s } else { rates.bf16_flops_per_s },
            flops_by: format!("inner loop of a product in {activations}, operands in the first cache"),
            link_bytes_per_s: None,
        }
    }

    /// Of GPU `ordinal`. `None` where it cannot be measured, which is said.
    pub(super) fn of_gpu(ordinal: u32) -> Option<Self> {
        match gpu::measure(ordinal) {
            Ok(measured) => Some(measured.into()),
            Err(error) => {
                note(&format!("no shares of what GPU {ordinal} could do, which cannot be measured: {error}"));
                None
            }
        }
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "read_bytes_per_s": self.bytes_per_s, "read_by": self.bytes_by,
            "flops_per_s": self.flops_per_s, "flops_by": self.flops_by,
            "link_bytes_per_s": self.link_bytes_per_s, "link_by": self.link_bytes_per_s.map(|_| LINK_BY),
        })
    }

    /// A line for each, under one word.
    pub(super) fn text(&self) -> String {
        let mut measured = vec![(gigabytes(self.bytes_per_s), self.bytes_by.as_str())];
        measured.push((flops_rate(self.flops_per_s), &self.flops_by));
        measured.extend(self.link_bytes_per_s.map(|rate| (gigabytes(rate), LINK_BY)));
        let line = |(index, (rate, by)): (usize, &(String, &str))| {
            format!("  {:9} {rate:>15}   {by}", if index == 0 { "measured" } else { "" })
        };
        measured.iter().enumerate().map(line).collect::<Vec<_>>().join("\n")
    }
}

impl From<gpu::Ceilings> for Ceilings {
    fn from(measured: gpu::Ceilings) -> Self {
        Self {
            bytes_per_s: measured.copy_bytes_per_s,
            bytes_by: "copy within the device, bytes read plus written".to_owned(),
            flops_per_s: measured.gemm_flops_per_s,
            flops_by: format!("bf16 product of 8192 x 8192 x 8192 by {}", measured.gemm_by),
            link_bytes_per_s: Some(measured.link_bytes_per_s),
        }
    }
}

#[cfg(test)]
pub(super) fn example() -> Ceilings {
    let measured = gpu::Ceilings {
        copy_bytes_per_s: 3e12,
        gemm_flops_per_s: 600e12,
        gemm_by: "cuBLASLt",
        link_bytes_per_s: 50e9,
        to_host_bytes_per_s: 40e9,
        host_hop_s: 2e-5,
    };
    measured.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ceiling_says_what_it_is() {
        let ceilings = example();
        let text = ceilings.text();
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        assert_eq!(lines[0], "measured      3000.0 GB/s   copy within the device, bytes read plus written");
        assert_eq!(lines[1], "600.0 TFLOP/s   bf16 product of 8192 x 8192 x 8192 by cuBLASLt");
        assert_eq!(lines[2], "50.0 GB/s   link: copy from pinned host memory");
        let json = ceilings.json();
        assert_eq!((&json["read_bytes_per_s"], &json["link_by"]), (&json!(3e12), &json!(LINK_BY)));
        let host = Ceilings { link_bytes_per_s: None, ..ceilings };
        assert_eq!((host.text().lines().count(), &host.json()["link_by"]), (2, &Value::Null));
    }
}
