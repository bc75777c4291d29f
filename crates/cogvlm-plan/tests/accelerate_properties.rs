//! What holds for every tree and every budget, and for every line that may arrive.

use std::collections::BTreeMap;

use cogvlm_core::module_tree::{Module, TreeBuffer, TreeTensor};
use cogvlm_plan::accelerate::{
    AccelerateError, Amount, Answer, Arguments, Balanced, DeviceKey, ElementType, ModuleTree, Size, Version, infer,
};
use cogvlm_plan::requests::{TreeCache, answer_line};
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Value, json};

/// Names that contain each other, which is what matching by parts of names stumbles over.
const NAMES: [&str; 6] = ["layer", "layer1", "layer10", "h", "a", "1"];
const CLASSES: [&str; 4] = ["Block", "Leaf", "ModuleList", "EVA2CLIPModel"];

fn module() -> impl Strategy<Value = Module> {
    let tensor = (0..40_u64, prop::sample::select(vec!["float32", "int8", "bool"]));
    let own = (prop::sample::select(CLASSES.to_vec()), vec(tensor.clone(), 0..3), vec(tensor, 0..2), any::<bool>());
    let leaf = own.prop_map(|(class, params, buffers, persistent)| Module {
        class: class.to_owned(),
        params: (0..)
            .zip(params)
            .map(|(i, (size, dtype))| TreeTensor(format!("w{i}"), vec![size], dtype.into()))
            .collect(),
        buffers: (0..)
            .zip(buffers)
            .map(|(i, (size, dtype))| TreeBuffer(format!("b{i}"), vec![size], dtype.into(), persistent))
            .collect(),
        children: Vec::new(),
    });
    leaf.clone().prop_recursive(4, 40, NAMES.len() as u32, move |inner| {
        (leaf.clone(), vec(inner, 1..=NAMES.len())).prop_map(|(module, children)| {
            let children = NAMES.iter().map(|name| (*name).to_owned()).zip(children).collect();
            Module { children, ..module }
        })
    })
}

fn arguments() -> impl Strategy<Value = Arguments> {
    let device = prop_oneof![
        6 => (0..4_i64).prop_map(DeviceKey::Gpu),
        1 => Just(DeviceKey::Mps),
        3 => Just(DeviceKey::Cpu),
        1 => Just(DeviceKey::Disk),
    ];
    let amount = prop_oneof![
        (-50..2000_i128).prop_map(|bytes| Amount::Bytes(Size::from_bytes(bytes))),
        Just(Amount::Text("1KiB".into()))
    ];
    let newer = || prop::option::of(any::<bool>());
    (
        prop::sample::select(Version::ALL.to_vec()),
        vec((device, amount), 0..6),
        prop::sample::subsequence(CLASSES.to_vec(), 0..3),
        prop::option::weighted(0.3, prop::sample::select(vec!["float16", "int4", "float64"])),
        prop::option::weighted(0.3, any::<bool>()),
        (newer(), newer(), newer()),
    )
        .prop_map(
            |(version, max_memory, no_split, dtype, balanced, (offload_buffers, fallback_allocation, clean_result))| {
                let mut arguments = Arguments {
                    version,
                    max_memory,
                    no_split: no_split.into_iter().map(str::to_owned).collect(),
                    balanced: balanced.map(|low_zero| Balanced { low_zero }),
                    ..Arguments::default()
                };
                arguments.widths.dtype = dtype.and_then(ElementType::parse);
                if version == Version::V1_15_0 {
                    arguments = Arguments { offload_buffers, fallback_allocation, clean_result, ..arguments };
                }
                arguments
            },
        )
}

/// Bits of every tensor by name, as stored.
fn tensor_bits(module: &Module, path: &str, bits: &mut BTreeMap<String, u64>) {
    let width = |dtype: &str| {
        if dtype == "float32" {
            32
        } else if dtype == "int8" {
            8
        } else {
            1
        }
    };
    for TreeTensor(name, shape, dtype) in &module.params {
        bits.insert(format!("{path}{name}"), shape[0] * width(dtype));
    }
    for TreeBuffer(name, shape, dtype, _) in &module.buffers {
        bits.insert(format!("{path}{name}"), shape[0] * width(dtype));
    }
    for (name, child) in &module.children {
        tensor_bits(child, &format!("{path}{name}."), bits);
    }
}

fn is_below(name: &str, key: &str) -> bool {
    key.is_empty() || name == key || name.strip_prefix(key).is_some_and(|rest| rest.starts_with('.'))
}

/// The device of a tensor under a list of keys, none of which may lie below another.
fn device_of(name: &str, keys: &[(&str, DeviceKey)]) -> Option<DeviceKey> {
    let mut devices = keys.iter().filter(|(key, _)| is_below(name, key)).map(|(_, device)| *device);
    let device = devices.next();
    assert_eq!(devices.next(), None, "`{name}` is placed twice");
    device
}

/// Names of the buffers that belong to no placed module: own buffers of modules that were split.
fn check(module: &Module, arguments: &Arguments, answer: &Answer<'_>) {
    let mut bits = BTreeMap::new();
    tensor_bits(module, "", &mut bits);
    let mut placed_bits: BTreeMap<DeviceKey, u64> = BTreeMap::new();
    for (name, bits) in &bits {
        let (placed, mapped) = (device_of(name, &answer.placed), device_of(name, &answer.device_map));
        match placed {
            Some(device) => {
                *placed_bits.entry(device).or_default() += bits;
                assert_eq!(mapped, placed, "cleaning moved `{name}`");
            }
            // A buffer of a split module; cleaning may bring it back.
            None => assert!(name.rsplit('.').next().unwrap().starts_with('b'), "`{name}` was lost"),
        }
        assert_eq!(mapped.is_none(), answer.uncovered.contains(&name.as_str()), "{name}");
    }
    if arguments.widths.dtype.is_none() {
        // Every device within its budget, and what the map holds adds up.
        let max_memory = match &answer.balanced_max_memory {
            Some(balanced) => balanced.clone(),
            None => {
                let mut last = BTreeMap::new();
                let size = |amount: &Amount| match amount {
                    Amount::Bytes(size) => *size,
                    Amount::Text(_) => Size::from_bytes(1024),
                };
                last.extend(arguments.max_memory.iter().map(|(device, amount)| (*device, size(amount))));
                last.into_iter().collect()
            }
        };
        for (device, bits) in &placed_bits {
            let budget = max_memory.iter().find(|(known, _)| known == device && *device != DeviceKey::Disk);
            assert!(
                budget.is_none_or(|(_, budget)| *bits as f64 / 8.0 <= budget.to_f64()),
                "{device} holds {bits} bits"
            );
        }
        let mapped: f64 = answer.device_bytes.iter().map(|(_, size)| size.to_f64()).sum();
        let uncovered: u64 = answer.uncovered.iter().map(|name| bits[*name]).sum();
        assert_eq!(mapped + uncovered as f64 / 8.0, bits.values().sum::<u64>() as f64 / 8.0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn every_tensor_is_placed_once_and_no_budget_is_exceeded(module in module(), arguments in arguments()) {
        let tree = ModuleTree::new(&module, &[]).unwrap();
        match infer(&tree, &arguments) {
            Ok(answer) => check(&module, &arguments, &answer),
            Err(error) => prop_assert!(!matches!(error, AccelerateError::PartnerNotFound { .. } | AccelerateError::TooMuchWork { .. } | AccelerateError::Endless), "{error}"),
        }
    }

    /// Ties of any kind: some answer comes back, and each tensor still has at most one place.
    #[test]
    fn ties_place_nothing_twice(module in module(), arguments in arguments(), picks in vec((any::<prop::sample::Index>(), 0..3_usize), 2..8)) {
        // Names of parameters of one size and type are tied in up to three groups.
        let mut params = Vec::new();
        own_params(&module, "", &mut params);
        prop_assume!(!params.is_empty());
        let mut groups = vec![Vec::new(); 3];
        for (index, group) in picks {
            let (name, kind) = index.get(&params).clone();
            let is_taken = groups.iter().flatten().any(|(taken, _)| *taken == name);
            let fits = groups[group].first().is_none_or(|(_, other)| *other == kind);
            if !is_taken && fits {
                groups[group].push((name, kind));
            }
        }
        let tied: Vec<Vec<String>> = groups.into_iter().map(|group| group.into_iter().map(|(name, _)| name).collect()).collect();
        let tree = ModuleTree::new(&module, &tied).unwrap();
        if let Ok(answer) = infer(&tree, &arguments) {
            let mut bits = BTreeMap::new();
            tensor_bits(&module, "", &mut bits);
            for name in bits.keys() {
                device_of(name, &answer.placed);
                device_of(name, &answer.device_map);
            }
        }
    }

    #[test]
    fn any_line_is_answered(line in ".{0,80}") {
        is_answered(&line);
    }

    /// A good request with one part replaced.
    #[test]
    fn any_request_is_answered(
        field in prop::sample::select(vec!["model", "module_tree", "max_memory", "no_split", "dtype", "fn", "low_zero", "policy", "accelerate_version", "special_dtypes", "clean_result"]),
        value in prop::sample::select(vec![
            json!(null), json!(-1), json!(1e300), json!(""), json!("tiny"), json!([]), json!([[0, "1e400GiB"]]), json!([[0, -9e18]]),
            json!([["mps", 1e308], ["cpu", "1e300GB"]]), json!([[i64::MIN, u64::MAX], [i64::MAX, i64::MIN]]), json!({}), json!({"model.norm": "int4"}),
            json!([[[]]]), json!("balanced"), json!(true), json!("/dev/null"), json!("/:/"), json!("latency"),
        ]),
        balanced in any::<bool>(),
    ) {
        let mut request = json!({"model": "tiny", "max_memory": [[0, "5MB"], ["cpu", "1GiB"]], "accelerate_version": "1.15.0", "fallback_allocation": true});
        if balanced {
            request["fn"] = json!("balanced");
            request["low_zero"] = json!(true);
        }
        request[field] = value;
        is_answered(&request.to_string());
    }
}

/// Full names of parameters with their size and type.
fn own_params(module: &Module, path: &str, params: &mut Vec<(String, (u64, String))>) {
    params.extend(
        module.params.iter().map(|TreeTensor(name, shape, dtype)| (format!("{path}{name}"), (shape[0], dtype.clone()))),
    );
    for (name, child) in &module.children {
        own_params(child, &format!("{path}{name}."), params);
    }
}

fn is_answered(line: &str) {
    let answer = answer_line(line, &mut TreeCache::default(), &mut |_, _| Ok(json!({"own": true})));
    assert!(!answer.contains('\n'));
    let answer: Value = serde_json::from_str(&answer).unwrap();
    let known = ["device_map", "error", "unsupported", "own"];
    assert!(known.iter().any(|field| answer.get(field).is_some()), "{answer}");
}

fn leaf(num_elements: u64) -> Module {
    let weight = TreeTensor("weight".into(), vec![num_elements], "float32".into());
    Module { class: "Leaf".into(), params: vec![weight], ..Module::default() }
}

fn flat(sizes: impl Iterator<Item = u64>) -> Module {
    let children = sizes.enumerate().map(|(index, size)| (format!("m{index}"), leaf(size))).collect();
    Module { class: "Root".into(), children, ..Module::default() }
}

/// Descending sizes renew the reserve at every entry, which upstream pays for with a look at the whole queue. Looking
/// at it 100,000 times would take minutes.
#[test]
fn a_hundred_thousand_layers_take_no_quadratic_time() {
    let tree = ModuleTree::new(&flat((0..100_000).map(|index| 200_000 - index)), &[]).unwrap();
    let max_memory =
        vec![(DeviceKey::Gpu(0), Amount::Text("40GB".into())), (DeviceKey::Cpu, Amount::Text("1TiB".into()))];
    assert!(infer(&tree, &Arguments { max_memory, ..Arguments::default() }).is_err(), "there is no TiB");
    let max_memory =
        vec![(DeviceKey::Gpu(0), Amount::Text("40GB".into())), (DeviceKey::Cpu, Amount::Text("1000GB".into()))];
    let start = std::time::Instant::now();
    let answer = infer(&tree, &Arguments { max_memory, ..Arguments::default() }).unwrap();
    assert_eq!(answer.placed.len(), 100_000);
    assert_eq!(answer.device_bytes.len(), 2);
    assert!(start.elapsed().as_secs() < 10, "{:?}", start.elapsed());
}

/// Ten thousand names of one tensor, on a thousand devices too small for it: bounded, not endless.
#[test]
fn hostile_ties_are_bounded() {
    let module = flat((0..10_000).map(|_| 1000));
    let tied = vec![(0..10_000).map(|index| format!("m{index}.weight")).collect::<Vec<_>>()];
    let tree = ModuleTree::new(&module, &tied).unwrap();
    let max_memory = (0..1000).map(|id| (DeviceKey::Gpu(id), Amount::Bytes(Size::from_bytes(10)))).collect();
    let arguments = Arguments { version: Version::V1_15_0, max_memory, ..Arguments::default() };
    assert!(matches!(infer(&tree, &arguments), Err(AccelerateError::TooMuchWork { .. })));
}
