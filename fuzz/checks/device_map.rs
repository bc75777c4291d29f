//! Device maps, plans, requests and files of module trees: the first byte says which.

use std::sync::LazyLock;

use cogvlm_core::workspace::StepLimits;
use cogvlm_core::{DType, Device, ModelConfig};
use cogvlm_plan::accelerate::TreeFile;
use cogvlm_plan::links::Links;
use cogvlm_plan::plan::{DeviceBudget, Plan, PlanRequest, Policy};
use cogvlm_plan::requests::{RequestError, TreeCache, answer_line};

static TINY: LazyLock<PlanRequest> = LazyLock::new(|| {
    let devices = [Device::Gpu(0), Device::Gpu(1), Device::Cpu];
    PlanRequest {
        model: "tiny".to_owned(),
        spec: ModelConfig::built_in("tiny").expect("it is built in").resolve().expect("tested"),
        weight_dtype: DType::Bf16,
        activation_dtype: DType::F32,
        budgets: devices.map(|device| DeviceBudget { device, bytes: 1 << 30 }).into(),
        policy: Policy::Auto,
        limits: StepLimits::new(256, 2),
        reserve_bytes: 0,
        links: Links::default(),
    }
});

/// Panics where the code under test is wrong.
pub(crate) fn check(bytes: &[u8]) {
    let Some((kind, text)) = bytes.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    match kind {
        b'm' => {
            if let Ok(plan) = Plan::from_hugging_face(text, &TINY) {
                let again = Plan::from_json(&plan.to_json(), &TINY.spec).expect("a plan reads itself");
                assert_eq!(again.to_json(), plan.to_json());
            }
        }
        b'p' => {
            if let Ok(plan) = Plan::from_json(text, &TINY.spec) {
                Plan::from_json(&plan.to_json(), &TINY.spec).expect("a plan reads itself");
            }
        }
        b'r' => {
            // Requests name files: the fuzzer shall not read those of the machine.
            if text.contains("module_tree") || text.contains('/') || text.contains("\\u") {
                return;
            }
            let mut own = |_, _: &_| Err(RequestError::new("ValueError", "another policy"));
            let answer = answer_line(text, &mut TreeCache::default(), &mut own);
            serde_json::from_str::<serde_json::Value>(&answer).expect("an answer is JSON");
        }
        _ => {
            let Ok(file) = TreeFile::parse(text) else { return };
            for name in file.names() {
                drop(file.tree(name));
            }
        }
    }
}
