//! From a plan to ranks: every tensor goes to where the plan says.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use cogvlm_backend::shape::unsupported;
use cogvlm_backend::{Backend, BackendError, HostReadError, HostTensor, HostWeight, Portable, RopeMode, rope};
use cogvlm_cluster::ClusterError;
use cogvlm_core::{DType, Device, Expert, ModelSpec, TensorSpec, Unit, WeightGroup};
use cogvlm_model::{GroupKey, GroupSource, Rank, RankSpec, SourceTensor, Weights, kv_shape};
use cogvlm_plan::plan::{
    DevicePlan, Plan, Prefill, Residency, STAGING_ALIGN, STAGING_SLOTS, StagePlan, TensorPlacement,
};
use tracing::{info, warn};

use crate::ranks::{RankHere, RankOf, Ranks, Route, Routes};
use crate::remote::Processes;

/// Where weights come from: a checkpoint's mapped files, or the rule of a synthetic model.
pub trait WeightSource: Sync {
    /// The tensor called `tensor.name`; `None` if there is none, which is legal for optional ones.
    fn weight(&self, tensor: &TensorSpec) -> Option<HostWeight>;
}

/// Told now and then how many of how many bytes are loaded; from several threads.
pub type LoadProgress<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// Why a plan could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A tensor of the plan is not in the checkpoint.
    #[error("the checkpoint has no tensor `{tensor}`")]
    Missing {
        /// The tensor.
        tensor: String,
    },
    /// A device cannot be opened.
    #[error(transparent)]
    Open(BackendError),
    /// Decoder layers disagree about RoPE.
    #[error("`{tensor}` differs from that of layer 0; all layers of a CogVLM share their frequencies")]
    InvFreq {
        /// The odd one.
        tensor: String,
    },
    /// A tensor could not be placed.
    #[error("loading `{tensor}` onto rank {device}: {source}")]
    Tensor {
        /// The tensor.
        tensor: String,
        /// Where it was going.
        device: Device,
        /// What happened.
        source: BackendError,
    },
    /// A tensor that is to be used where it lies in its file has none.
    #[error(
        "`{tensor}` is to be used where it lies on disk, but synthetic weights are no file: give `cpu` room for them, or write them with `synth`"
    )]
    NoFile {
        /// The tensor.
        tensor: String,
    },
    /// A tensor rests in another process than the one that needs it.
    #[error(
        "`{tensor}` is used by rank {device}, but rests on a GPU of another process: weights are not streamed between processes"
    )]
    Elsewhere {
        /// The tensor.
        tensor: String,
        /// Who needs it.
        device: Device,
    },
    /// The host and a card cannot share a KV cache, in a run of several processes.
    #[error("the KV cache that the host and a card would share: {0}; lift the limit on locked memory (`ulimit -l`)")]
    SharedKv(#[source] BackendError),
    /// A rank could not be set up.
    #[error("setting up rank {device}: {source}")]
    Rank {
        /// The rank.
        device: Device,
        /// What happened.
        source: cogvlm_model::LoadError,
    },
    /// A thread could not be started.
    #[error("cannot start a thread for a rank: {0}")]
    Thread(#[from] std::io::Error),
    /// A process of the run has failed, or rows cannot get to it as they have to.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The host refused to give a weight.
    #[error(transparent)]
    Host(#[from] HostReadError),
    /// This model can be planned, not run.
    #[error("`{model}` is a CogVLM2 model, which can be planned but not run")]
    Unsupported {
        /// Its name.
        model: String,
    },
}

impl LoadError {
    /// What to do, where that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Open(source) | Self::Tensor { source, .. } => source.hint().map(str::to_owned),
            Self::Cluster(error) => error.hint(),
            _ => None,
        }
    }
}

/// Loads every tensor of `plan` from `source` and starts the ranks. `make_backend` opens a device with an arena of
/// exactly what the plan gives it, less the reserve. With several `processes`, each loads what is its own.
///
/// # Errors
/// Where a tensor is missing or unreadable, or a device refuses.
pub fn load_plan<B: Portable>(
    plan: &Plan, spec: &ModelSpec, source: &dyn WeightSource, rope_mode: RopeMode,
    make_backend: &dyn Fn(&DevicePlan) -> Result<B, BackendError>, progress: LoadProgress<'_>,
    processes: Option<Processes<B>>,
) -> Result<Ranks<B>, LoadError> {
    let process = processes.as_ref().map(Processes::rank);
    let loaded = load_ranks(plan, spec, source, rope_mode, make_backend, progress, process).inspect_err(|error| {
        if let Some(processes) = &processes {
            processes.fail(&error.to_string());
        }
    });
    let (ranks, prefill) = loaded?;
    let rank_of = |device: Device| {
        ranks.iter().position(|rank| rank.device == device).expect("plans list every device that executes a stage")
    };
    let routes = |stages: &[StagePlan]| -> Vec<Route> {
        stages.iter().map(|stage| Route { rank: rank_of(stage.device), units: stage.units.clone() }).collect()
    };
    let prefill = prefill.zip(plan.prefill_stages());
    let prefill = prefill.map(|(prefill, stages)| (prefill.from_rows, routes(&stages)));
    let routes = Routes { decode: routes(&plan.stages), prefill };
    Ranks::start(ranks, routes, &plan.limits, |doors| processes.map(|processes| processes.open(doors)).transpose())
}

/// All ranks of the plan, those of `process` loaded, of the only one if there are not several; and who prefills for the
/// host, if anybody does.
fn load_ranks<B: Portable>(
    plan: &Plan, spec: &ModelSpec, source: &dyn WeightSource, rope_mode: RopeMode,
    make_backend: &dyn Fn(&DevicePlan) -> Result<B, BackendError>, progress: LoadProgress<'_>, process: Option<usize>,
) -> Result<(Vec<RankOf<B>>, Option<Prefill>), LoadError> {
    if spec.grouped_kv {
        return Err(LoadError::Unsupported { model: plan.model.clone() });
    }
    let used: Vec<&DevicePlan> = plan.devices.iter().filter(|device| plan.uses(device.device)).collect();
    let mut backends = BTreeMap::new();
    for device in used.iter().filter(|planned| planned.device.process() == process.unwrap_or(0)) {
        backends.insert(device.device, Arc::new(make_backend(device).map_err(LoadError::Open)?));
    }
    let inv_freq = inv_freq(spec, source)?;
    let by_host_alone;
    let (plan, mut shared_kv) = match (share_kv(plan, spec, &backends), process) {
        (Ok(shared), _) => (plan, shared),
        (Err(error), None) => {
            warn!("{error}: the host computes its layers of prompts too, which takes longer");
            by_host_alone = Plan { prefill: None, ..plan.clone() };
            (&by_host_alone, BTreeMap::new())
        }
        // The others would not know.
        (Err(error), Some(_)) => return Err(LoadError::SharedKv(error)),
    };
    let weights = place_weights(plan, source, &backends, progress)?;
    let mut ranks = Vec::new();
    let mut grouped: BTreeMap<Device, PlacedGroups<B::Weight>> = BTreeMap::new();
    for placed in weights {
        let groups = grouped.entry(placed.executes_on).or_default();
        groups.entry((placed.unit, placed.group)).or_default().push(placed);
    }
    for device in used.iter().map(|planned| planned.device) {
        let Some(backend) = backends.remove(&device) else {
            ranks.push(RankOf { device, here: None });
            continue;
        };
        let units = plan.executed_on(device);
        let failed = |source| LoadError::Rank { device, source };
        let (mut slot_bytes, num_members) = (0, plan.members_with(device).len());
        let groups = grouped.remove(&device).unwrap_or_default().into_iter().map(|(key, tensors)| {
            let source = group_source(tensors, num_members, &mut slot_bytes);
            (key, source)
        });
        let groups: HashMap<GroupKey, GroupSource<B::Weight>> = groups.collect();
        let decodes = |unit: Unit| {
            let mut stages = plan.stages.iter().filter(|stage| stage.device == device);
            stages.any(|stage| stage.units.contains(&unit))
        };
        // What is streamed from host memory: for every token, and for prompts.
        let (mut for_tokens, mut for_prompts) = (Vec::new(), Vec::new());
        for ((unit, group), source) in &groups {
            let GroupSource::Streamed(sources) = source else { continue };
            let in_host_memory = sources.iter().filter_map(|source| match source {
                SourceTensor::Host(weight) => Some(HostWeight::clone(weight)),
                SourceTensor::File(_) | SourceTensor::Peer(_) => None,
            });
            let is_for_tokens = !unit.is_vision() && group.expert() != Some(Expert::Vision) && decodes(*unit);
            let weights = if is_for_tokens { &mut for_tokens } else { &mut for_prompts };
            weights.extend(in_host_memory);
        }
        backend.prepare_streaming(&for_tokens);
        let weights =
            Weights::new(&*backend, groups, STAGING_SLOTS, slot_bytes as usize).map_err(|e| failed(e.into()))?;
        let limits = plan.limits;
        let rank_spec = RankSpec { spec: spec.clone(), limits, units, inv_freq: inv_freq.clone(), rope_mode };
        let kv = shared_kv.remove(&device).unwrap_or_default();
        let rank = Rank::new(Arc::clone(&backend), rank_spec, weights, kv).map_err(failed)?;
        info!(%device, bytes = backend.memory().in_use, "loaded rank");
        ranks.push(RankOf { device, here: Some(RankHere { backend, rank, for_prompts }) });
    }
    Ok((ranks, plan.prefill))
}

/// KV caches of layers that the host decodes and a card prefills, by layer, for each of the two ranks. None where there
/// are no such layers, or they are another process's.
fn share_kv<B: Backend>(
    plan: &Plan, spec: &ModelSpec, backends: &BTreeMap<Device, Arc<B>>,
) -> Result<BTreeMap<Device, HashMap<usize, B::Buffer>>, BackendError> {
    let prefill = plan.prefill.and_then(|prefill| backends.get_key_value(&prefill.device));
    let (Some((card, on_card)), Some(on_host)) = (prefill, backends.get(&Device::Cpu)) else {
        return Ok(BTreeMap::new());
    };
    let (dtype, shape) = (on_host.activation_dtype(), kv_shape(spec, &plan.limits));
    if on_card.activation_dtype() != dtype {
        let reason = format!("{card} has a KV cache of {}, the host one of {dtype}", on_card.activation_dtype());
        return Err(unsupported("share", reason));
    }
    let (mut of_host, mut of_card) = (HashMap::new(), HashMap::new());
    for unit in plan.executed_on(Device::Cpu) {
        let Unit::DecoderLayer(layer) = unit else { continue };
        let buffer = on_host.alloc_shared("KV cache", dtype, shape)?;
        of_card.insert(layer, on_card.share(&buffer)?);
        of_host.insert(layer, buffer);
    }
    Ok(BTreeMap::from([(Device::Cpu, of_host), (*card, of_card)]))
}

/// Threads that load onto one device.
const MAX_LOAD_THREADS: usize = 12;

/// The tensors of one device by the group they are used in.
type PlacedGroups<W> = HashMap<GroupKey, Vec<PlacedTensor<W>>>;

/// A tensor in its place.
struct PlacedTensor<W> {
    unit: Unit,
    group: WeightGroup,
    executes_on: Device,
    bytes: u64,
    place: SourcePlace<W>,
}

enum SourcePlace<W> {
    Resident(W),
    Elsewhere(SourceTensor<W>),
}

/// Puts every tensor where the plan says.
fn place_weights<B: Backend>(
    plan: &Plan, source: &dyn WeightSource, backends: &BTreeMap<Device, Arc<B>>, progress: LoadProgress<'_>,
) -> Result<Vec<PlacedTensor<B::Weight>>, LoadError> {
    let wanted: Vec<(usize, &TensorPlacement)> =
        plan.placements.iter().enumerate().filter(|(_, placement)| !placement.tensor.optional).collect();
    if let Some((_, placement)) = wanted.iter().find(|(_, placement)| crosses_processes(placement)) {
        return Err(LoadError::Elsewhere { tensor: placement.tensor.name.clone(), device: placement.executes_on });
    }
    let is_here = |placement: &TensorPlacement| backends.contains_key(&placement.executes_on);
    let wanted: Vec<_> = wanted.into_iter().filter(|(_, placement)| is_here(placement)).collect();
    let total: u64 = wanted.iter().map(|(_, placement)| placement.bytes).sum();
    let done = AtomicU64::new(0);
    progress(0, total);
    // Several threads for each device, which take its tensors in turn: one alone copies slower than a link.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let num_threads = (cores / backends.len().max(1)).clamp(1, MAX_LOAD_THREADS);
    let queue_of = |device: &Device| {
        let mine = wanted.iter().filter(|(_, placement)| rests_on(placement) == *device);
        (mine.collect::<Vec<_>>(), AtomicUsize::new(0))
    };
    let queues: Vec<_> = backends.keys().map(queue_of).collect();
    let place_next = &|queue: &[&(usize, &TensorPlacement)], next: &AtomicUsize| -> Result<Vec<_>, LoadError> {
        let mut placed = Vec::new();
        while let Some((index, placement)) = queue.get(next.fetch_add(1, Ordering::Relaxed)) {
            let prefilled_on = plan.prefills(placement.executes_on, placement.tensor.unit);
            let tensors = place_tensor(placement, prefilled_on, source, backends);
            // The others need not go on.
            let tensors = tensors.inspect_err(|_| next.store(usize::MAX / 2, Ordering::Relaxed))?;
            placed.extend(tensors.into_iter().map(|tensor| (*index, tensor)));
            progress(done.fetch_add(placement.bytes, Ordering::Relaxed) + placement.bytes, total);
        }
        Ok(placed)
    };
    let mut all = std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (queue, next) in queues.iter().flat_map(|queue| std::iter::repeat_n(queue, num_threads)) {
            threads.push(std::thread::Builder::new().spawn_scoped(scope, move || place_next(queue, next))?);
        }
        let mut all: Vec<(usize, PlacedTensor<B::Weight>)> = Vec::new();
        for thread in threads {
            all.extend(thread.join().expect("loading reports failures as errors")?);
        }
        Ok::<_, LoadError>(all)
    })?;
    all.sort_by_key(|(index, _)| *index);
    Ok(all.into_iter().map(|(_, placed)| placed).collect())
}

/// Whether a tensor would have to be streamed from another process.
fn crosses_processes(placement: &TensorPlacement) -> bool {
    matches!(placement.residency, Residency::Peer(peer) if peer.process() != placement.executes_on.process())
}

/// The device whose backend handles the tensor.
fn rests_on(placement: &TensorPlacement) -> Device {
    match placement.residency {
        Residency::Peer(peer) => peer,
        _ => placement.executes_on,
    }
}

/// The tensor in its place; where `prefilled_on` uses it too, also as that one does.
fn place_tensor<B: Backend>(
    placement: &TensorPlacement, prefilled_on: Option<Device>, source: &dyn WeightSource,
    backends: &BTreeMap<Device, Arc<B>>,
) -> Result<Vec<PlacedTensor<B::Weight>>, LoadError> {
    let TensorPlacement { tensor, executes_on, residency, bytes } = placement;
    let missing = || LoadError::Missing { tensor: tensor.name.clone() };
    let mut weight = source.weight(tensor).ok_or_else(missing)?;
    // Weights that rest in host memory are there as they are mapped; those of a synthetic model are made once.
    let rests_in_host_memory = *residency == Residency::Host || tensor.unit == Unit::Embedding;
    if rests_in_host_memory
        && (*executes_on != Device::Cpu || prefilled_on.is_some())
        && *residency != Residency::Device
        && weight.mapped().is_none()
    {
        weight = Arc::new(MadeTensor::make(&*weight)?);
    }
    if *executes_on == Device::Cpu && *residency == Residency::File && weight.mapped().is_none() {
        return Err(LoadError::NoFile { tensor: tensor.name.clone() });
    }
    let device = rests_on(placement);
    let backend = backends.get(&device).expect("plans list every device that holds a tensor");
    let failed = |source| LoadError::Tensor { tensor: tensor.name.clone(), device, source };
    let (unit, group, bytes) = (tensor.unit, tensor.group, *bytes);
    let mut placed = Vec::new();
    if let Some(card) = prefilled_on {
        let backend = backends.get(&card).expect("plans list every device that executes a unit");
        let failed = |source| LoadError::Tensor { tensor: tensor.name.clone(), device: card, source };
        let place = match (unit, group, residency) {
            (Unit::Embedding, ..) => SourcePlace::Resident(backend.attach(&weight).map_err(failed)?),
            (_, WeightGroup::Norms, _) => SourcePlace::Resident(backend.load_for(tensor, &weight).map_err(failed)?),
            (.., Residency::File) => SourcePlace::Elsewhere(SourceTensor::File(HostWeight::clone(&weight))),
            _ => SourcePlace::Elsewhere(SourceTensor::Host(HostWeight::clone(&weight))),
        };
        placed.push(PlacedTensor { unit, group, executes_on: card, bytes, place });
    }
    // Host rows are looked up where they rest, and host units use their weights where they rest.
    let in_place = *executes_on == Device::Cpu || tensor.unit == Unit::Embedding;
    let place = match residency {
        Residency::Peer(_) => {
            SourcePlace::Elsewhere(SourceTensor::Peer(backend.load_for(tensor, &weight).map_err(failed)?))
        }
        Residency::Device if *executes_on != Device::Cpu => {
            SourcePlace::Resident(backend.load_for(tensor, &weight).map_err(failed)?)
        }
        _ if in_place => SourcePlace::Resident(backend.attach(&weight).map_err(failed)?),
        Residency::File => SourcePlace::Elsewhere(SourceTensor::File(weight)),
        _ => SourcePlace::Elsewhere(SourceTensor::Host(weight)),
    };
    placed.push(PlacedTensor { unit, group, executes_on: *executes_on, bytes, place });
    Ok(placed)
}

/// A weight without a file, held in host memory.
struct MadeTensor {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    /// Its bytes, in words so that they are aligned for every element type; the last word may be longer than needed.
    words: Vec<u64>,
    num_bytes: usize,
}

impl MadeTensor {
    fn make(weight: &dyn HostTensor) -> Result<Self, HostReadError> {
        let num_elements: usize = weight.shape().iter().product();
        let num_bytes = num_elements * weight.dtype().size_bytes();
        let mut words = vec![0_u64; num_bytes.div_ceil(8)];
        weight.read_into(&mut bytemuck::cast_slice_mut(&mut words)[..num_bytes])?;
        Ok(Self {
            name: weight.name().to_owned(),
            dtype: weight.dtype(),
            shape: weight.shape().to_vec(),
            words,
            num_bytes,
        })
    }

    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.num_bytes]
    }
}

impl HostTensor for MadeTensor {
    fn name(&self) -> &str {
        &self.name
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn mapped(&self) -> Option<&[u8]> {
        Some(self.bytes())
    }

    fn read_into(&self, destination: &mut [u8]) -> Result<(), HostReadError> {
        destination.copy_from_slice(self.bytes());
        Ok(())
    }
}

/// A group is resident if all of it is; else all of it goes through the staging ring, to each of `num_members` its part.
fn group_source<W: Clone>(tensors: Vec<PlacedTensor<W>>, num_members: usize, slot_bytes: &mut u64) -> GroupSource<W> {
    let all_resident = tensors.iter().all(|tensor| matches!(tensor.place, SourcePlace::Resident(_)));
    if all_resident {
        let weights = tensors.into_iter().filter_map(|tensor| match tensor.place {
            SourcePlace::Resident(weight) => Some(weight),
            SourcePlace::Elsewhere(_) => None,
        });
        return GroupSource::Resident(weights.collect());
    }
    let part = |tensor: &PlacedTensor<W>| tensor.group.sharing(tensor.unit).bytes(tensor.bytes, 0, num_members);
    let bytes: u64 = tensors.iter().map(|tensor| part(tensor).next_multiple_of(STAGING_ALIGN)).sum();
    *slot_bytes = bytes.max(*slot_bytes);
    let sources = tensors.into_iter().map(|tensor| match tensor.place {
        SourcePlace::Resident(weight) => SourceTensor::Peer(weight),
        SourcePlace::Elsewhere(source) => source,
    });
    GroupSource::Streamed(sources.collect())
}

/// RoPE's frequencies: the checkpoint's where it has them, else the formula's.
fn inv_freq(spec: &ModelSpec, source: &dyn WeightSource) -> Result<Vec<f32>, LoadError> {
    let mut first: Option<Vec<f32>> = None;
    for tensor in cogvlm_core::tensor_inventory(spec).iter().filter(|tensor| tensor.optional) {
        let Some(weight) = source.weight(tensor) else { continue };
        let values = read_f32(&*weight)?;
        match &first {
            None => first = Some(values),
            Some(first) if *first != values => return Err(LoadError::InvFreq { tensor: tensor.name.clone() }),
            Some(_) => {}
        }
    }
    Ok(first.unwrap_or_else(|| rope::inv_freq(spec.head_dim)))
}

fn read_f32(weight: &dyn HostTensor) -> Result<Vec<f32>, HostReadError> {
    let num_elements: usize = weight.shape().iter().product();
    let mut bytes = vec![0; num_elements * weight.dtype().size_bytes()];
    weight.read_into(&mut bytes)?;
    Ok(match weight.dtype() {
        DType::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        DType::F16 => bytes.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        DType::Bf16 => bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
    })
}
