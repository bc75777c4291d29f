//! `plan`: where everything would go.

use std::io::Write;

use cogvlm_core::DType;
use cogvlm_core::memory::format_bytes;
use cogvlm_plan::accelerate::{
    self, Arguments, Balanced, DeviceKey, ElementType, MaxMemory, ModuleTree, Version, Widths,
};
use cogvlm_plan::links::Links;
use cogvlm_plan::plan::{Plan, PlanRequest, Policy};
use cogvlm_plan::requests::{RequestError, TreeCache, answer_line};
use cogvlm_plan::{PLAN_SCHEMA, parse_max_memory, plan};
use serde::de::IgnoredAny;
use serde_json::{Map, Value, json};

use crate::args::{PlacementArgs, PlanArgs, PolicyArg};
use crate::error::{CliError, CliResult};
use crate::machine::Machine;
use crate::output::print_line;
use crate::session::{placed_request, plan_error, plan_of, planned_model, request_for};
use crate::stdin::StdinLines;

pub(crate) fn run(args: &PlanArgs) -> CliResult {
    if args.requests {
        return answer_requests();
    }
    if args.module_tree.is_some() && args.placement.policy != PolicyArg::Accelerate {
        return Err(CliError::usage(
            "`--module-tree` needs `--policy accelerate`: other policies plan CogVLM configurations",
        ));
    }
    if args.placement.policy == PolicyArg::Accelerate {
        if args.placement.links.is_some() {
            return Err(CliError::usage("`--links` is not for `--policy accelerate`: its maps depend on no rates"));
        }
        return accelerate_plan(args);
    }
    let given = [
        ("--accelerate-version", args.accelerate_version.is_some()),
        ("--no-split", args.no_split.is_some()),
        ("--balanced-memory", args.balanced_memory),
    ];
    if let Some((flag, _)) = given.iter().find(|(_, given)| *given) {
        return Err(CliError::usage(format!("`{flag}` needs `--policy accelerate`: other policies do not read it")));
    }
    let activations = match args.dtype.as_deref() {
        None | Some("bf16" | "bfloat16") => DType::Bf16,
        Some("f32" | "float32") => DType::F32,
        Some(other) => {
            return Err(CliError::usage(format!("`--dtype {other}`: activations are f32 or bf16"))
                .hint("other element types are for `--policy accelerate`"));
        }
    };
    let mut machine = Machine::planned(args.backend, &args.placement);
    let request = placed_request(planned_model(&args.model)?, &args.placement, activations, &mut machine)?;
    drop(machine);
    let plan = plan_of(&request, &args.placement).map_err(plan_error)?;
    if args.json {
        return print_line(&plan.to_json());
    }
    print_line(plan.report(Some(&request)).trim_end())?;
    // Policies are for devices of which each computes units of its own.
    if plan.tensor_parallel.is_empty() { print_line(&comparison(&request, &plan)) } else { Ok(()) }
}

/// The policies beside each other: what an operator gives for what.
fn comparison(request: &PlanRequest, chosen: &Plan) -> String {
    // Of one sequence it is what its time per token says.
    let many = request.limits.max_sequences > 1;
    let rate = |text: String| if many { format!(" {text:>9}") } else { String::new() };
    let head = rate("tokens/s".to_owned());
    let mut lines = vec![format!(
        "\n{:<12} {:>12}{head} {:>12} {:>16}",
        "policy", "ms per token", "ms per image", "off its device"
    )];
    for policy in [Policy::Latency, Policy::Throughput, Policy::Balanced] {
        let Ok(plan) = plan(&PlanRequest { policy, ..request.clone() }) else { continue };
        let off_device = plan.placements.iter().filter(|it| it.residency.place(it.executes_on) != it.executes_on);
        let off_device: u64 = off_device.map(|placement| placement.bytes).sum();
        lines.push(format!(
            "{:<12} {:>12.1}{} {:>12.0} {:>16} {}",
            format!("{policy:?}").to_lowercase(),
            plan.seconds_per_token * 1e3,
            rate(format!("{:.0}", plan.tokens_per_second)),
            plan.seconds_per_image * 1e3,
            format_bytes(off_device),
            if policy == chosen.policy { "<- this plan" } else { "" }
        ));
    }
    lines.iter().map(|line| line.trim_end()).collect::<Vec<_>>().join("\n")
}

/// `--requests`: a line of JSON in, a line of JSON out, nothing fatal.
fn answer_requests() -> CliResult {
    let mut trees = TreeCache::default();
    let mut stdout = std::io::stdout().lock();
    for line in StdinLines::lock() {
        let answer = match line {
            Ok(line) => {
                let line = String::from_utf8_lossy(&line);
                if line.trim().is_empty() {
                    continue;
                }
                answer_line(line.trim_end(), &mut trees, &mut own_policy)
            }
            Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                json!({"error": {"type": "ValueError", "message": format!("the request: {error}")}}).to_string()
            }
            Err(error) => return Err(CliError::new(format!("cannot read stdin: {error}"))),
        };
        let written = writeln!(stdout, "{answer}").and_then(|()| stdout.flush());
        match written {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            written => written.map_err(|error| CliError::new(format!("cannot write to stdout: {error}")))?,
        }
    }
    Ok(())
}

/// A request under one of our own policies: the fields of a plan, as `plan --json` prints them.
fn own_policy(policy: Policy, fields: &Map<String, Value>) -> Result<Value, RequestError> {
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct OwnRequest {
        #[serde(rename = "policy")]
        _policy: IgnoredAny,
        #[serde(default)]
        model: Option<String>,
        max_memory: Vec<(Value, Value)>,
        #[serde(default)]
        context: Option<usize>,
        #[serde(default)]
        batch: Option<usize>,
    }
    let refused = |error: CliError| RequestError::new("ValueError", error.message());
    let request: OwnRequest = serde_json::from_value(Value::Object(fields.clone()))
        .map_err(|error| RequestError::new("TypeError", format!("cannot read the request: {error}")))?;
    let word = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let budgets: Vec<String> =
        request.max_memory.iter().map(|(device, amount)| format!("{}:{}", word(device), word(amount))).collect();
    let budgets = parse_max_memory(&budgets.join(",")).map_err(|error| refused(error.into()))?;
    let placement = PlacementArgs { context: request.context, batch: request.batch, ..PlacementArgs::default() };
    let model = planned_model(request.model.as_deref().unwrap_or("cogvlm-chat-17b")).map_err(refused)?;
    let mut plan_request =
        request_for(model, &placement, DType::Bf16, true, budgets, Links::default()).map_err(refused)?;
    plan_request.policy = policy;
    let plan = plan(&plan_request).map_err(|error| refused(plan_error(error)))?;
    serde_json::from_str(&plan.to_json()).map_err(|error| RequestError::new("RuntimeError", error.to_string()))
}

/// `--policy accelerate`: upstream's map, by upstream's rules.
fn accelerate_plan(args: &PlanArgs) -> CliResult {
    let mut trees = TreeCache::default();
    let (name, tree) = match &args.module_tree {
        Some(reference) => (reference, trees.module_tree(reference)?),
        None => (&args.model, trees.model(&args.model)?),
    };
    let arguments = accelerate_arguments(args)?;
    let version = arguments.version;
    let answer = accelerate::infer(&tree, &arguments)?;
    let budgets: Vec<(DeviceKey, Option<f64>)> = match &answer.balanced_max_memory {
        Some(budgets) => budgets.iter().map(|(device, size)| (*device, Some(size.to_f64()))).collect(),
        None => MaxMemory::new(&arguments.max_memory, version)?
            .budgets()
            .iter()
            .map(|(device, size)| (*device, Some(size.to_f64())))
            .collect(),
    };
    let budget_of = |device: DeviceKey| {
        let given = budgets.iter().find(|(known, _)| *known == device).and_then(|(_, budget)| *budget);
        // Upstream ignores a budget for disk.
        given.filter(|_| device.to_string() != "disk")
    };
    let mut notices: Vec<String> = answer.warnings.iter().chain(&answer.check_warnings).cloned().collect();
    notices.extend(answer.minimum_bytes.iter().map(|(device, bytes)| {
        format!(
            "nothing is on `{device}`: the first entry refused there needs {} with the reserve",
            format_bytes(bytes.to_f64() as u64)
        )
    }));
    notices.extend(answer.check_error.iter().map(|error| format!("check_device_map would refuse this map: {error}")));
    notices.extend(
        answer
            .upstream_hazards
            .iter()
            .map(|hazard| format!("the published code fails under this map: {}", json!(hazard))),
    );
    if args.json {
        let devices: Map<String, Value> = answer
            .device_bytes
            .iter()
            .map(|(device, bytes)| {
                let budget = budget_of(*device);
                let entry = json!({
                    "budget_bytes": budget.map(number), "weight_bytes": bytes, "kv_bytes": 0, "workspace_bytes": 0, "staging_bytes": 0,
                    "reserved_bytes": 0, "free_bytes": budget.map(|budget| number(budget - bytes.to_f64())),
                });
                (device.to_string(), entry)
            })
            .collect();
        let mut object = json!(answer);
        object["schema"] = json!(PLAN_SCHEMA);
        object["policy"] = json!(Policy::Accelerate);
        object["accelerate_version"] = json!(version.as_str());
        object["model"] = json!(name);
        object["devices"] = json!(devices);
        object["tensors_off_device"] = json!({});
        object["links"] = json!([]);
        object["notices"] = json!(notices);
        return print_line(&object.to_string());
    }
    let mut lines = vec![format!("{name}: device map of accelerate {}", version.as_str())];
    for (device, bytes) in &answer.device_bytes {
        let budget =
            budget_of(*device).map_or_else(|| "no limit".to_owned(), |budget| format_bytes(budget.max(0.0) as u64));
        lines.push(format!("  {device:<5} {} of {budget}", format_bytes(bytes.to_f64() as u64)));
    }
    lines.extend(
        answer
            .device_map
            .iter()
            .map(|(key, device)| format!("    {:<44} {device}", if key.is_empty() { "(everything)" } else { key })),
    );
    lines.extend(notices.iter().map(|notice| format!("note: {notice}")));
    lines.push(
        "note: accelerate plans weights only; KV cache, activations and the CUDA context are not counted here"
            .to_owned(),
    );
    print_line(&lines.join("\n"))
}

/// A whole number as JSON writes it.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 9e15 { json!(value as i64) } else { json!(value) }
}

/// `_no_split_modules` of the published code.
const PUBLISHED_NO_SPLIT: [&str; 2] = ["CogVLMDecoderLayer", "TransformerLayer"];

fn accelerate_arguments(args: &PlanArgs) -> CliResult<Arguments> {
    let version = args.accelerate_version.as_deref().map(|text| {
        let known = Version::ALL.map(Version::as_str).join(" and ");
        Version::parse(text)
            .ok_or_else(|| CliError::usage(format!("`--accelerate-version {text}`: {known} are reproduced")))
    });
    let dtype = args.dtype.as_deref().map(|name| {
        ElementType::parse(name)
            .ok_or_else(|| CliError::usage(format!("`--dtype {name}` is no element type of PyTorch")))
    });
    Ok(Arguments {
        version: version.transpose()?.unwrap_or_default(),
        max_memory: accelerate_budgets(&args.placement)?,
        no_split: match &args.no_split {
            Some(classes) => classes.iter().filter(|class| !class.is_empty()).cloned().collect(),
            None => PUBLISHED_NO_SPLIT.map(str::to_owned).into(),
        },
        widths: Widths { dtype: dtype.transpose()?, ..Widths::default() },
        balanced: args.balanced_memory.then_some(Balanced { low_zero: false }),
        ..Arguments::default()
    })
}

fn accelerate_budgets(placement: &PlacementArgs) -> CliResult<Vec<(DeviceKey, accelerate::Amount)>> {
    let text = placement.max_memory.as_deref().filter(|text| *text != "auto");
    let text = text.ok_or_else(|| {
        CliError::usage("`--policy accelerate` needs `--max-memory`")
            .hint("like `--max-memory 0:20GiB,1:20GiB,cpu:16GiB`")
    })?;
    Ok(accelerate::parse_max_memory(text)?)
}

/// The map that accelerate 0.24.1 gives a model, as Hugging Face JSON: what `--policy accelerate` runs.
pub(crate) fn accelerate_map(tree: &ModuleTree, placement: &PlacementArgs) -> CliResult<String> {
    let no_split = PUBLISHED_NO_SPLIT.map(str::to_owned).into();
    let arguments = Arguments { max_memory: accelerate_budgets(placement)?, no_split, ..Arguments::default() };
    let answer = accelerate::infer(tree, &arguments)?;
    Ok(json!(answer)["device_map"].to_string())
}
