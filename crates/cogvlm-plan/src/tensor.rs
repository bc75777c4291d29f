//! Plans of tensor parallelism: several cards that compute every layer together. They hold what every token reads.

use cogvlm_core::memory::format_bytes;
use cogvlm_core::sharing::check_even;
use cogvlm_core::workspace::{BufferKind, StepLimits};
use cogvlm_core::{DType, Device, Unit};

use crate::account::Placement;
use crate::cost::card_flops_per_s;
use crate::error::PlanError;
use crate::links::{CardRates, Links};
use crate::own::sizes::{Group, IMAGE_PROMPT_TEXT_TOKENS, Member, Sizes};
use crate::plan::{DeviceBudget, DevicePlan, LinkPlan, Plan, PlanRequest, Policy, Residency, STAGING_SLOTS};

/// Predicted time for cards to add up the sums of a decode step, beside what they read for it: what two H200 took beyond
/// their reads and launches for a token of 1 and of 16 sequences, 2.5 to 6 us.
const EXCHANGE_S: f64 = 4e-6;
/// Of the rate between two cards, reached by those of a prompt: two H200 took 47.5 ms for one with an image.
const EXCHANGE_SHARE: f64 = 0.5;

/// Places the model of `request` on the first `num_members` cards of its budgets, which compute every layer together;
/// the vision tower runs on the first of them. Other devices are not used, and the request's policy is not asked.
///
/// # Errors
/// [`PlanError::TooFewCards`] and [`PlanError::Uneven`] where such a group cannot be; [`PlanError::OverBudget`] where a
/// member does not hold its part; the errors of a request for limits and budgets.
pub fn plan_tensor_parallel(request: &PlanRequest, num_members: usize) -> Result<Plan, PlanError> {
    request.check()?;
    let cards = request.budgets.iter().map(|budget| budget.device).filter(|device| matches!(device, Device::Gpu(_)));
    let members: Vec<Device> = cards.take(num_members).collect();
    if members.len() < num_members {
        return Err(PlanError::TooFewCards { num_members, num_cards: members.len() });
    }
    plan_members(request, &members)
}

/// [`plan_tensor_parallel`], of exactly these members.
pub(crate) fn plan_members(request: &PlanRequest, members: &[Device]) -> Result<Plan, PlanError> {
    plan_reserving(request, members, request.card_reserve_bytes(&request.sizes()))
}

/// The same, with so much left free on every member.
pub(crate) fn plan_reserving(request: &PlanRequest, members: &[Device], reserve_bytes: u64) -> Result<Plan, PlanError> {
    let num_members = members.len();
    check_even(&request.spec, num_members)?;
    for (index, member) in members.iter().enumerate() {
        let has_budget = request.budgets.iter().any(|budget| budget.device == *member);
        if !matches!(member, Device::Gpu(_)) || !has_budget || members[..index].contains(member) {
            let problem = format!("names `{member}`, which has no budget, is no card or stands twice");
            return Err(PlanError::Map { field: "`tensor_parallel`".to_owned(), problem });
        }
        if member.process() != members[0].process() {
            let problem = format!("needs devices of one process, but `{}` and `{member}` are of two", members[0]);
            return Err(PlanError::Map { field: "`--tensor-parallel`".to_owned(), problem });
        }
    }
    let sizes = Sizes::new(&request.spec, request.weight_dtype, request.activation_dtype, request.limits.among(1));
    let of_members: Vec<Sizes> = (0..num_members).map(|index| sizes.of_member(Member { index, num_members })).collect();
    let budget_of = |device: Device| request.budgets.iter().find(|budget| budget.device == device);
    let room = |device: &Device| budget_of(*device).map_or(0, |budget| budget.bytes.saturating_sub(reserve_bytes));
    let residency = residency(&sizes, &of_members, &members.iter().map(room).collect::<Vec<_>>(), &request.budgets);
    let placement = Placement { executes_on: vec![members[0]; sizes.units.len()], residency, prefill: None };
    // The first member's part of a group is the largest.
    let is_streamed =
        |group: &&Group| group.tensors.iter().any(|&tensor| placement.residency[tensor] != Residency::Device);
    let streamed = of_members[0].groups.iter().filter(is_streamed);
    let slot_bytes = streamed.map(|group| group.staged_bytes).max().unwrap_or(0);
    let device = |budget: &DeviceBudget| match members.iter().position(|member| *member == budget.device) {
        Some(member) => member_plan(&of_members[member], &placement.residency, slot_bytes, budget, reserve_bytes),
        None => beside(&sizes, &placement.residency, budget),
    };
    let mut devices: Vec<DevicePlan> = request.budgets.iter().map(device).collect();
    devices.sort_by_key(|plan| plan.device);
    Placement::check(&devices)?;
    let Times { seconds_per_token, seconds_per_image, tokens_per_second } =
        times(&placement, &sizes, &request.links, members);
    let mut notices = notices(request, &devices, members);
    notices.extend(request.links.missing(members));
    Ok(Plan {
        policy: Policy::Latency,
        model: request.model.clone(),
        weight_dtype: sizes.weight_dtype,
        activation_dtype: sizes.activation_dtype,
        limits: sizes.limits,
        stages: placement.stages(&sizes),
        prefill: None,
        placements: placement.tensors(&sizes),
        links: links(&sizes, &of_members, &placement.residency, members),
        notices,
        devices,
        seconds_per_token,
        seconds_per_image,
        tokens_per_second,
        rates: request.links.describe(members),
        tensor_parallel: members.to_vec(),
    })
}

/// Where every tensor rests: on the members, as far as each has `room` for its part. What is read for every token and
/// everything small stays; of the layers' weights that only images need, those that come first, so that the copies of
/// the others hide behind computing. These rest in host memory, else in the file, and each member is streamed its part.
/// Where even that does not fit, all of these rest off the cards, or everything stays if there is no such place, for
/// others to refuse.
fn residency(sizes: &Sizes, of_members: &[Sizes], room: &[u64], budgets: &[DeviceBudget]) -> Vec<Residency> {
    let all_resident = vec![Residency::Device; sizes.inventory.len()];
    let (vision, text) = (0..sizes.num_vision, sizes.num_vision..sizes.units.len());
    let layers = || sizes.vit_layers_in(&vision).chain(sizes.layers_in(&text));
    let cold = || layers().flat_map(|unit| sizes.cold_of[unit].clone());
    let fixed = |sizes: &Sizes| {
        let weights = sizes.norm_bytes(&text) + sizes.hot_bytes(&text) + sizes.table_bytes;
        let vision_ends = sizes.cold_bytes(&vision) - sizes.cold_bytes(&sizes.vit_layers_in(&vision));
        weights + vision_ends + sizes.kv_bytes(&text) + sizes.workspace_bytes(&vision, &text)
    };
    let bytes_of = |device: Device| budgets.iter().find(|budget| budget.device == device).map(|budget| budget.bytes);
    let (host, in_file) = (bytes_of(Device::Cpu), bytes_of(Device::Disk).is_some());
    let off_cards = host.map(|_| Residency::Host).or(in_file.then_some(Residency::File));
    let all_streamed = || {
        let mut residency = all_resident.clone();
        let tensors = cold().flat_map(|group| &sizes.groups[group].tensors);
        tensors.for_each(|&tensor| residency[tensor] = off_cards.unwrap_or(Residency::Device));
        residency
    };
    let left = |(sizes, room): (&Sizes, &u64)| room.checked_sub(fixed(sizes));
    let Some(left) = of_members.iter().zip(room).map(left).collect::<Option<Vec<u64>>>() else { return all_streamed() };
    let cold_bytes = |sizes: &Sizes| cold().map(|group| sizes.groups[group].bytes).sum::<u64>();
    if of_members.iter().zip(&left).all(|(sizes, left)| cold_bytes(sizes) <= *left) || off_cards.is_none() {
        return all_resident;
    }
    let slot = |groups: &mut dyn Iterator<Item = usize>| {
        groups.map(|group| of_members[0].groups[group].staged_bytes).max().unwrap_or(0)
    };
    // A ring for the vision experts alone, where that is enough.
    let experts = || sizes.layers_in(&text).flat_map(|unit| sizes.cold_of[unit].clone());
    let vit_bytes = |sizes: &Sizes| cold_bytes(sizes) - experts().map(|group| sizes.groups[group].bytes).sum::<u64>();
    let with_ring = |slot: u64, kept: &dyn Fn(&Sizes) -> u64| {
        let members = of_members.iter().zip(&left);
        members.map(|(sizes, left)| left.checked_sub(STAGING_SLOTS as u64 * slot + kept(sizes))).collect()
    };
    let (candidates, left): (Vec<usize>, Vec<u64>) = match with_ring(slot(&mut experts()), &vit_bytes) {
        Some(left) => (experts().collect(), left),
        None => match with_ring(slot(&mut cold()), &|_| 0) {
            Some(left) => (cold().collect(), left),
            None => return all_streamed(),
        },
    };
    let mut host = host.unwrap_or(0);
    let (mut residency, mut left) = (all_resident.clone(), left);
    for index in candidates {
        let part = |member: usize| of_members[member].groups[index].bytes;
        let rests = if left.iter().enumerate().all(|(member, left)| part(member) <= *left) {
            left.iter_mut().enumerate().for_each(|(member, left)| *left -= part(member));
            Residency::Device
        } else if sizes.groups[index].bytes <= host {
            host -= sizes.groups[index].bytes;
            Residency::Host
        } else if in_file {
            Residency::File
        } else {
            // More than the host has room for.
            Residency::Host
        };
        sizes.groups[index].tensors.iter().for_each(|&tensor| residency[tensor] = rests);
    }
    residency
}

/// What a member of the group holds; `sizes` are its own, the ring of all has slots of `slot_bytes`.
fn member_plan(
    sizes: &Sizes, residency: &[Residency], slot_bytes: u64, budget: &DeviceBudget, reserved_bytes: u64,
) -> DevicePlan {
    let (vision, text) = (0..sizes.num_vision, sizes.num_vision..sizes.units.len());
    let resident = residency.iter().enumerate().filter(|(_, rests)| **rests == Residency::Device);
    DevicePlan {
        device: budget.device,
        budget_bytes: Some(budget.bytes),
        weight_bytes: resident.map(|(tensor, _)| sizes.tensor_bytes(tensor)).sum(),
        kv_bytes: sizes.kv_bytes(&text),
        workspace_bytes: sizes.workspace_bytes(&vision, &text),
        staging_bytes: STAGING_SLOTS as u64 * slot_bytes,
        reserved_bytes,
    }
}

/// What a device holds that is no member.
fn beside(sizes: &Sizes, residency: &[Residency], budget: &DeviceBudget) -> DevicePlan {
    let rests = residency.iter().enumerate().filter(|(_, rests)| match budget.device {
        Device::Gpu(_) => false,
        Device::Cpu => **rests == Residency::Host,
        Device::Disk => **rests == Residency::File,
    });
    DevicePlan {
        device: budget.device,
        budget_bytes: (budget.device != Device::Disk).then_some(budget.bytes),
        weight_bytes: rests.map(|(tensor, _)| sizes.tensor_bytes(tensor)).sum(),
        kv_bytes: 0,
        workspace_bytes: 0,
        staging_bytes: 0,
        reserved_bytes: 0,
    }
}

/// Bytes of sums that a member reads of another for one row.
fn sum_bytes(sizes: &Sizes) -> u64 {
    (2 * sizes.spec.num_layers * sizes.spec.hidden_size * DType::F32.size_bytes()) as u64
}

/// Every member reads the sums of every other; the others are sent what the images become; each is streamed its part of
/// what rests elsewhere.
fn links(sizes: &Sizes, of_members: &[Sizes], residency: &[Residency], members: &[Device]) -> Vec<LinkPlan> {
    let rows = (sizes.spec.num_vision_tokens() + IMAGE_PROMPT_TEXT_TOKENS) as u64;
    let mut links = Vec::new();
    for &from in members {
        for &to in members.iter().filter(|to| **to != from) {
            let features = if from == members[0] { features_bytes(sizes) } else { 0 };
            let bytes_per_token = sum_bytes(sizes);
            links.push(LinkPlan { from, to, bytes_per_token, bytes_per_image: rows * bytes_per_token + features });
        }
    }
    for (from, place) in [(Device::Cpu, Residency::Host), (Device::Disk, Residency::File)] {
        let streamed = || residency.iter().enumerate().filter(|(_, rests)| **rests == place);
        for (&to, sizes) in members.iter().zip(of_members).filter(|_| streamed().next().is_some()) {
            let bytes_per_image = streamed().map(|(tensor, _)| sizes.tensor_bytes(tensor)).sum();
            links.push(LinkPlan { from, to, bytes_per_token: 0, bytes_per_image });
        }
    }
    links.sort_by_key(|link| (link.from, link.to));
    links
}

/// What one image becomes.
fn features_bytes(sizes: &Sizes) -> u64 {
    let limits = StepLimits { max_images: 1, ..sizes.limits };
    BufferKind::VisionFeatures.bytes(&sizes.spec, &limits, sizes.activation_dtype)
}

/// What is predicted of a group.
struct Times {
    seconds_per_token: f64,
    seconds_per_image: f64,
    tokens_per_second: f64,
}

/// Layers at the rate of all members, the vision tower at that of one.
fn times(placement: &Placement, sizes: &Sizes, links: &Links, members: &[Device]) -> Times {
    let together = together(links, members);
    let times = placement.times(sizes, &together);
    let sequences = sizes.limits.max_sequences as f64;
    let round_s = placement.round_s(sizes, &together, sequences, sizes.limits.context_len as f64);
    let rows = sizes.spec.num_vision_tokens() + IMAGE_PROMPT_TEXT_TOKENS;
    let decode_s = group_s(placement, sizes, links, members, false, 1);
    Times {
        seconds_per_token: times.token_s + decode_s,
        seconds_per_image: times.image_s + group_s(placement, sizes, links, members, true, rows),
        tokens_per_second: sequences / (round_s + decode_s),
    }
}

fn number(device: Device) -> u32 {
    if let Device::Gpu(number) = device { number } else { 0 }
}

/// `links`, where the first of `members` is as fast as all of them.
pub(crate) fn together(links: &Links, members: &[Device]) -> Links {
    let (first, num_members) = (number(members[0]), members.len() as f64);
    let card = links.card(first);
    let all_cards = CardRates {
        copy_bytes_per_s: card.copy_bytes_per_s * num_members,
        product_flops_per_s: card.product_flops_per_s * num_members,
        from_host_bytes_per_s: card.from_host_bytes_per_s * num_members,
        ..*card
    };
    links.clone().with_card(first, "", all_cards)
}

/// Seconds of a step of `rows` rows beyond what members together take: adding up sums, and the vision tower, which only
/// one of them computes and is streamed.
pub(crate) fn group_s(
    placement: &Placement, sizes: &Sizes, links: &Links, members: &[Device], has_image: bool, rows: usize,
) -> f64 {
    let (first, last) = (number(members[0]), number(members[members.len() - 1]));
    if first == last {
        return 0.0;
    }
    let num_members = members.len() as f64;
    let exchanges_s = 2.0 * sizes.spec.num_layers as f64 * EXCHANGE_S;
    let link_bytes_per_s = EXCHANGE_SHARE * links.pair(first, last).bytes_per_s;
    let rows_s = rows as f64 * sum_bytes(sizes) as f64 * (num_members - 1.0) / link_bytes_per_s;
    let vision_flops = if has_image { sizes.prefill_flops(&(0..sizes.num_vision)) } else { 0.0 };
    let computed_s = vision_flops / card_flops_per_s(links, first);
    let tower = sizes.inventory.iter().zip(&placement.residency).enumerate();
    let streamed = tower.filter(|(_, (tensor, rests))| tensor.unit.is_vision() && **rests != Residency::Device);
    let copied = streamed.map(|(index, (_, rests))| {
        sizes.tensor_bytes(index) as f64 / links.between(rests.place(members[0]), members[0])
    });
    let copied_s: f64 = if has_image { copied.sum() } else { 0.0 };
    exchanges_s + rows_s + computed_s.max(copied_s) * (1.0 - 1.0 / num_members)
}

fn notices(request: &PlanRequest, devices: &[DevicePlan], members: &[Device]) -> Vec<String> {
    let names: Vec<String> = members.iter().map(|member| format!("`{member}`")).collect();
    let shared: u64 = devices.iter().filter(|device| members.contains(&device.device)).map(|it| it.weight_bytes).sum();
    let mut notices = vec![format!(
        "tensor parallel: {} compute every layer together, {} of weights on all of them; the vision tower runs on `{}`",
        names.join(", "),
        format_bytes(shared),
        members[0]
    )];
    let streamed = devices.iter().filter(|device| !matches!(device.device, Device::Gpu(_)));
    let streamed: u64 = streamed.map(|device| device.weight_bytes).sum();
    if streamed > 0 {
        let streamed = format_bytes(streamed);
        notices.push(format!("{streamed} are streamed for every image, to each member its part"));
    }
    let idle = devices.iter().filter(|device| matches!(device.device, Device::Gpu(_)));
    let idle = idle.filter(|device| !members.contains(&device.device));
    notices.extend(idle.map(|device| format!("`{}` is not used", device.device)));
    if request.limits.context_len > request.spec.max_position_embeddings {
        notices.push(format!(
            "the model was trained for {} positions; {} are planned for",
            request.spec.max_position_embeddings, request.limits.context_len
        ));
    }
    notices
}

impl Plan {
    /// Whether memory of `device` is planned with: a rank is on it, or it is a member of the group that is one.
    pub fn occupies(&self, device: Device) -> bool {
        self.uses(device) || self.tensor_parallel.contains(&device)
    }

    /// The planned members of the group that `device` leads, in their order; that device alone where it leads none.
    pub fn members_with(&self, device: Device) -> Vec<&DevicePlan> {
        let alone = [device];
        let leads = self.tensor_parallel.first() == Some(&device);
        let members = if leads { &self.tensor_parallel[..] } else { &alone };
        let planned = |member: &Device| self.devices.iter().find(|planned| planned.device == *member);
        members.iter().filter_map(planned).collect()
    }

    /// Whether `device` takes part in `unit`.
    pub(crate) fn takes_part(&self, device: Device, executes_on: Device, unit: Unit) -> bool {
        device == executes_on || (!unit.is_vision() && self.tensor_parallel.contains(&device))
    }
}

#[cfg(test)]
mod tests {
    use cogvlm_core::memory::GIB;
    use cogvlm_core::{ModelConfig, Phase};

    use super::*;
    use crate::plan::TensorPlacement;

    fn request(model: &str, gib: &[u64], batch: usize) -> PlanRequest {
        let budget =
            |(ordinal, gib): (usize, &u64)| DeviceBudget { device: Device::Gpu(ordinal as u32), bytes: gib * GIB };
        PlanRequest {
            model: model.to_owned(),
            spec: ModelConfig::built_in(model).unwrap().resolve().unwrap(),
            weight_dtype: DType::Bf16,
            activation_dtype: DType::Bf16,
            budgets: gib.iter().enumerate().map(budget).collect(),
            policy: Policy::Auto,
            limits: StepLimits::new(2048, batch),
            reserve_bytes: 600 << 20,
            links: Links::default(),
        }
    }

    #[test]
    fn members_hold_half_of_the_layers_each() {
        let plan = plan_tensor_parallel(&request("cogvlm-chat-17b", &[139, 139, 139], 1), 2).unwrap();
        assert_eq!(plan.tensor_parallel, [Device::Gpu(0), Device::Gpu(1)]);
        let [first, second, third] = &plan.devices[..] else { panic!("three devices") };
        // The vision tower and the adapter: 8 850 528 768 bytes.
        assert_eq!(first.weight_bytes - second.weight_bytes, 8_850_528_768);
        assert_eq!([first.kv_bytes, second.kv_bytes], [2048 * 524_288 / 2; 2]);
        assert_eq!(third.used_bytes(), 0);
        assert!(plan.notices.iter().any(|notice| notice == "`2` is not used"), "{:?}", plan.notices);
        assert!(plan.uses(Device::Gpu(0)) && !plan.uses(Device::Gpu(1)) && plan.occupies(Device::Gpu(1)));
        assert_eq!(plan.members_with(Device::Gpu(0)).len(), 2);
        let alone = crate::plan(&request("cogvlm-chat-17b", &[139], 1)).unwrap();
        assert!(plan.seconds_per_token < 0.6 * alone.seconds_per_token, "{plan:?}");
        assert!(plan.seconds_per_image < alone.seconds_per_image);
    }

    fn host(gib: u64) -> DeviceBudget {
        DeviceBudget { device: Device::Cpu, bytes: gib * GIB }
    }

    #[test]
    fn two_small_cards_are_streamed_vision_experts() {
        let mut request = request("cogvlm-chat-17b", &[20, 20], 1);
        let error = plan_tensor_parallel(&request, 2).unwrap_err();
        assert!(matches!(error, PlanError::OverBudget { device: Device::Gpu(0), .. }), "{error}");
        request.budgets.push(host(16));
        let plan = plan_tensor_parallel(&request, 2).unwrap();
        let [first, second, cpu] = &plan.devices[..] else { panic!("three devices") };
        let rests = |residency| {
            let placements = plan.placements.iter().filter(move |placement| placement.residency == residency);
            placements.map(|placement| placement.bytes).sum::<u64>()
        };
        let streamed = rests(Residency::Host);
        assert_eq!((cpu.weight_bytes, rests(Residency::File)), (streamed, 0));
        // A layer's experts are 404,750,336 bytes; the first card is full to within less than one of its halves.
        assert!(streamed > 2 * GIB && streamed < 8 * GIB, "{streamed}");
        assert!(first.free_bytes().unwrap() < 404_750_336 / 2, "{first:?}");
        // Gate and up of one expert, half of their rows, in each slot.
        let slot = 2 * 4096 * 11_008 / 2 * 2;
        assert_eq!([first.staging_bytes, second.staging_bytes], [STAGING_SLOTS as u64 * slot; 2]);
        let from_host = plan.links.iter().filter(|link| link.from == Device::Cpu);
        assert!(from_host.clone().all(|link| link.bytes_per_token == 0 && link.bytes_per_image == streamed / 2));
        assert_eq!(from_host.count(), 2);
        // What every token reads stays, and the first layers' experts.
        for placement in &plan.placements {
            let (tensor, stays) = (&placement.tensor, placement.residency == Residency::Device);
            let is_expert = tensor.phase == Phase::ImagePrefill && !tensor.unit.is_vision();
            assert!(stays || is_expert, "{} rests off the cards", tensor.name);
            assert!(stays || tensor.unit != Unit::DecoderLayer(0), "{} of the first layer does not stay", tensor.name);
        }
        let longer = PlanRequest { links: Links::default(), ..request.clone() };
        assert_eq!(Plan::from_json(&plan.to_json(), &longer.spec).unwrap(), plan);
        // Where a long cache leaves no room for the vision tower, it is streamed to the first.
        let crowded = PlanRequest { limits: StepLimits::new(1344, 16), ..request.clone() };
        let crowded = PlanRequest { budgets: vec![request.budgets[0], request.budgets[1], host(24)], ..crowded };
        let plan = plan_tensor_parallel(&crowded, 2).unwrap();
        let streamed = plan.placements.iter().filter(|placement| placement.residency == Residency::Host);
        let tower = |placement: &TensorPlacement| placement.tensor.unit.is_vision();
        assert!(streamed.clone().any(tower) && streamed.clone().any(|placement| !tower(placement)));
        let to = |device| plan.links.iter().find(|link| (link.from, link.to) == (Device::Cpu, device)).unwrap();
        assert!(to(Device::Gpu(0)).bytes_per_image > to(Device::Gpu(1)).bytes_per_image);
        assert_eq!(Plan::from_json(&plan.to_json(), &crowded.spec).unwrap(), plan);
        // The file stands in for host memory.
        request.budgets[2] = DeviceBudget { device: Device::Disk, bytes: 0 };
        let plan = plan_tensor_parallel(&request, 2).unwrap();
        assert!(plan.placements.iter().any(|placement| placement.residency == Residency::File));
        // What every token reads is not streamed to a group.
        let small = PlanRequest { budgets: vec![request.budgets[0], request.budgets[1], host(40)], ..request };
        let too_small = PlanRequest {
            budgets: small
                .budgets
                .iter()
                .map(|budget| DeviceBudget { bytes: budget.bytes.min(7 * GIB), ..*budget })
                .collect(),
            ..small.clone()
        };
        // What is said to be missing is what is missing where all is streamed that can be: two GPUs of 10 GiB do.
        let error = plan_tensor_parallel(&too_small, 2).unwrap_err();
        let PlanError::OverBudget { device: Device::Gpu(0), used_bytes, .. } = error else { panic!("{error}") };
        assert!(used_bytes > 8 * GIB && used_bytes < 10 * GIB, "{error}");
        let in_host = PlanRequest { budgets: vec![small.budgets[0], small.budgets[1], host(1)], ..small.clone() };
        let error = plan_tensor_parallel(&in_host, 2).unwrap_err();
        assert!(matches!(error, PlanError::OverBudget { device: Device::Cpu, .. }), "{error}");
    }

    #[test]
    fn plans_survive_json() {
        let request = PlanRequest { limits: StepLimits::new(1024, 3), ..request("tiny", &[1, 1, 1], 1) };
        let mut swapped = request.clone();
        swapped.budgets.reverse();
        for request in [&request, &swapped] {
            let plan = plan_tensor_parallel(request, 2).unwrap();
            let text = plan.to_json();
            assert_eq!(Plan::from_json(&text, &request.spec).unwrap(), plan);
            let longer = PlanRequest { limits: StepLimits::new(2048, 3), ..request.clone() };
            let longer = plan.for_request(&longer).unwrap();
            assert_eq!(longer.tensor_parallel, plan.tensor_parallel);
            assert_eq!(longer.devices[1].kv_bytes, 2 * plan.devices[1].kv_bytes);
            let other = text.replacen("\"units\": [", "\"units\": [\n\"model.norm\",", 1);
            assert!(Plan::from_json(&other, &request.spec).unwrap_err().to_string().contains("`stages`"));
        }
        let alone = DeviceBudget { device: Device::Gpu(0), bytes: 1 << 30 };
        let plan = plan_tensor_parallel(&request, 2).unwrap();
        let error = plan.for_request(&PlanRequest { budgets: vec![alone], ..request }).unwrap_err();
        assert!(error.to_string().contains("names `1`, which has no budget"), "{error}");
    }

    #[test]
    fn groups_that_cannot_be_are_refused() {
        let refused = |model, gib: &[u64], members| plan_tensor_parallel(&request(model, gib, 1), members).unwrap_err();
        assert_eq!(
            refused("cogvlm-chat-17b", &[139], 2).to_string(),
            "`--tensor-parallel 2` needs 2 numbered devices, `--max-memory` names 1"
        );
        assert_eq!(
            refused("cogvlm-chat-17b", &[139; 3], 3).to_string(),
            "`--tensor-parallel`: 3 devices cannot share 32 query heads evenly"
        );
        let mut apart = request("cogvlm-chat-17b", &[139, 139], 1);
        apart.budgets[1].device = Device::parse("1/0").unwrap();
        let error = plan_tensor_parallel(&apart, 2).unwrap_err().to_string();
        assert!(error.ends_with("needs devices of one process, but `0` and `1/0` are of two"), "{error}");
        let error = refused("cogvlm-chat-17b", &[139, 8], 2);
        assert!(matches!(error, PlanError::OverBudget { device: Device::Gpu(1), .. }), "{error}");
        assert!(error.hint().is_some_and(|hint| hint.starts_with("raise `1` to ")), "{error}");
    }
}
