//! What each device was given, and what it held.

use cogvlm_core::Device;
use cogvlm_core::memory::format_bytes;
use serde_json::{Value, json};

use crate::session::Session;

/// What a device was given, and what it held.
pub(super) struct DeviceMemory {
    pub(super) device: Device,
    /// What the plan says, reserve included.
    planned_bytes: u64,
    /// The most that its arena held.
    peak_bytes: u64,
    /// What its arena may hold.
    arena_bytes: u64,
    /// What the driver says is in use on the GPU, by whomever.
    driver_used_bytes: Option<u64>,
}

pub(super) fn memory(session: &Session) -> Vec<DeviceMemory> {
    let of_device = |(device, memory): (Device, cogvlm_backend::MemoryUse)| {
        let planned = session.plan.devices.iter().find(|planned| planned.device == device);
        let driver_used_bytes = device.ordinal().filter(|_| session.on_gpus).and_then(|ordinal| {
            let memory = cogvlm_cuda::Context::open(ordinal).and_then(|context| context.memory());
            memory.ok().map(|(free, total)| total - free)
        });
        DeviceMemory {
            device,
            planned_bytes: planned.map_or(0, |planned| planned.used_bytes()),
            peak_bytes: memory.peak,
            arena_bytes: memory.capacity,
            driver_used_bytes,
        }
    };
    session.engine.memory().into_iter().map(of_device).collect()
}

impl DeviceMemory {
    /// What the device holds as a share of what was planned: by the driver's account, else by the arena's.
    fn share_of_plan(&self) -> f64 {
        self.driver_used_bytes.unwrap_or(self.peak_bytes) as f64 / (self.planned_bytes as f64).max(1.0)
    }

    pub(super) fn json(&self) -> Value {
        json!({
            "planned_bytes": self.planned_bytes, "peak_bytes": self.peak_bytes, "arena_bytes": self.arena_bytes,
            "driver_used_bytes": self.driver_used_bytes, "share_of_plan": self.share_of_plan(),
        })
    }

    pub(super) fn text(&self) -> String {
        let driver = self.driver_used_bytes.map(|used| format!(", {} in use for the driver", format_bytes(used)));
        format!(
            "  rank {}: arena at most {} of {}{}; planned {}, of which {:.1} %",
            self.device,
            format_bytes(self.peak_bytes),
            format_bytes(self.arena_bytes),
            driver.unwrap_or_default(),
            format_bytes(self.planned_bytes),
            100.0 * self.share_of_plan()
        )
    }
}
