//! One device's share of the model: its weights, its KV cache, its workspace, and how a stage runs on them.

use std::collections::HashMap;
use std::sync::Arc;

use cogvlm_backend::{Backend, BackendError, BufferRole, RopeMode, rope};
use cogvlm_core::workspace::{BLOCK_LEN, BufferKind, StepLimits, decode_outbox_bytes, outbox_bytes, workspace_buffers};
use cogvlm_core::{Expert, ModelSpec, Unit, WeightGroup};

use crate::step::{Captured, Crossing, StageOutput, Step, StepKind};
use crate::weights::{GroupKey, Weights};

/// Why a rank could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The device refused or failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

/// What a rank is made for.
#[derive(Debug, Clone)]
pub struct RankSpec {
    /// The model.
    pub spec: ModelSpec,
    /// The largest step.
    pub limits: StepLimits,
    /// All units that the rank executes, in order of execution.
    pub units: Vec<Unit>,
    /// RoPE frequencies: the checkpoint's where it has them.
    pub inv_freq: Vec<f32>,
    /// Arithmetic of RoPE's angles.
    pub rope_mode: RopeMode,
}

/// Most rows of a step whose operations are recorded. With more of them the operations take longer than their launches,
/// and every number of rows is a recording of its own. A prompt of no more rows takes about as long as a decode step:
/// nobody needs to pass it.
const MAX_RECORDED_ROWS: usize = 16;

/// One device's share of the model.
pub struct Rank<B: Backend> {
    pub(crate) backend: Arc<B>,
    pub(crate) spec: ModelSpec,
    pub(crate) rope_mode: RopeMode,
    pub(crate) weights: Weights<B>,
    pub(crate) workspace: Workspace<B>,
    /// Paged KV cache of each decoder layer executed here.
    pub(crate) kv: HashMap<usize, B::Buffer>,
    pub(crate) lanes: Lanes<B>,
    /// Whether decode steps may pass prompts here: they stream nothing, so that the staging ring is a prompt's from its
    /// first unit to its last.
    decodes_may_pass: bool,
}

/// What a step has for itself while steps of the other kind run between its units. All other memory is shared: operations
/// follow each other, and nothing is left in it from unit to unit.
pub(crate) struct Lane<B: Backend> {
    /// Which buffer holds the residual.
    pub(crate) hidden: BufferKind,
    pub(crate) tables: B::Tables,
    /// For rows on their way to other ranks.
    outbox: B::Outbox,
    /// What the last step chose here.
    pub(crate) sampled: Option<B::Sampled>,
}

/// The lanes of a rank.
pub(crate) struct Lanes<B: Backend> {
    prompts: Lane<B>,
    /// Where decode steps may pass prompts, and come here at all.
    decodes: Option<Lane<B>>,
}

impl<B: Backend> Lanes<B> {
    /// The lane of steps of `kind`.
    pub(crate) fn of(&self, kind: StepKind) -> &Lane<B> {
        match (kind, &self.decodes) {
            (StepKind::Decode, Some(decodes)) => decodes,
            _ => &self.prompts,
        }
    }

    pub(crate) fn of_mut(&mut self, kind: StepKind) -> &mut Lane<B> {
        match (kind, &mut self.decodes) {
            (StepKind::Decode, Some(decodes)) => decodes,
            _ => &mut self.prompts,
        }
    }
}

/// The rank's workspace buffers.
pub(crate) struct Workspace<B: Backend> {
    buffers: HashMap<BufferKind, B::Buffer>,
}

impl<B: Backend> Workspace<B> {
    /// Several buffers at once, all different.
    pub(crate) fn buffers<const N: usize>(&mut self, kinds: [BufferKind; N]) -> [&mut B::Buffer; N] {
        let found = self.buffers.get_disjoint_mut(kinds.each_ref());
        found.map(|buffer| buffer.expect("the rank's units name the buffers they use in `workspace_buffers`"))
    }
}

impl<B: Backend> Rank<B> {
    /// Allocates workspace and KV cache beside `weights`, which are on `backend` already, and `kv`, the caches of layers
    /// that it shares with another rank. After this the rank allocates nothing.
    ///
    /// # Errors
    /// Where the device has no room.
    pub fn new(
        backend: Arc<B>, rank: RankSpec, weights: Weights<B>, mut kv: HashMap<usize, B::Buffer>,
    ) -> Result<Self, LoadError> {
        let RankSpec { spec, limits, units, inv_freq, rope_mode } = rank;
        let activations = backend.activation_dtype();
        let mut buffers = HashMap::new();
        let kinds = workspace_buffers(&units, &limits);
        let lane = |hidden, limits: StepLimits, outbox_bytes: u64| {
            let (tables, outbox) = (backend.tables(&limits)?, backend.outbox(outbox_bytes as usize)?);
            Ok::<_, BackendError>(Lane { hidden, tables, outbox, sampled: None })
        };
        let prompts = lane(BufferKind::Hidden, limits, outbox_bytes(&kinds, &spec, &limits, activations))?;
        let decodes = kinds.contains(&BufferKind::DecodeHidden).then(|| {
            let outbox_bytes = decode_outbox_bytes(&kinds, &spec, &limits, activations);
            lane(BufferKind::DecodeHidden, limits.of_decodes(), outbox_bytes)
        });
        let lanes = Lanes { prompts, decodes: decodes.transpose()? };
        for kind in kinds {
            let (role, dtype) = (BufferRole::Workspace(kind), kind.dtype(activations));
            buffers.insert(kind, backend.alloc_for(role, "workspace", dtype, kind.shape(&spec, &limits))?);
        }
        if let Some(table) = buffers.get_mut(&BufferKind::RopeTable) {
            backend.write(&rope::table(&inv_freq, limits.context_len, rope_mode, activations), table, 0)?;
        }
        for unit in &units {
            if let Unit::DecoderLayer(layer) = unit
                && !kv.contains_key(layer)
            {
                let buffer = backend.alloc_for(BufferRole::Kv, "KV cache", activations, kv_shape(&spec, &limits))?;
                kv.insert(*layer, buffer);
            }
        }
        let workspace = Workspace { buffers };
        let text = units.iter().filter(|unit| !unit.is_vision());
        let mut used_by_decodes =
            text.flat_map(|unit| groups_in_order_of_use(*unit, |expert| expert == Expert::Language));
        let decodes_may_pass = limits.decodes_pass_prompts() && used_by_decodes.all(|key| weights.is_resident(key));
        Ok(Self { backend, spec, rope_mode, weights, workspace, kv, lanes, decodes_may_pass })
    }

    /// Runs the stage of `units` on what the stage before sent. Before each unit of a step that is to be passed `let_pass`
    /// is called, which may run stages of decode steps, unless these would stream weights. It is called where no decode
    /// step comes, too: the next rank is to hear of the step when its rows are nearly there, since all that comes after it
    /// on a device waits for them.
    ///
    /// # Errors
    /// Where the device fails, or a weight cannot be read any more. The rank can be used again afterwards.
    pub fn run_stage(
        &mut self, units: &[Unit], step: &Step, input: Option<Crossing<B::Parcel>>, let_pass: LetPass<'_, B>,
    ) -> Result<StageOutput<B>, BackendError> {
        let units: Vec<Unit> =
            units.iter().copied().filter(|unit| !unit.is_vision() || !step.images.is_empty()).collect();
        let (vision, language) = units.split_at(units.partition_point(|unit| unit.is_vision()));
        let (embedding, decoder) = language.split_at(usize::from(language.first() == Some(&Unit::Embedding)));
        let mut output =
            StageOutput { crossing: None, sampled: None, logits: Vec::new(), captured: Vec::new(), vision: None };
        let uses = |expert| step.uses(expert);
        let used = units.iter().flat_map(|unit| groups_in_order_of_use(*unit, uses));
        let begun = self.weights.begin(&self.backend, used);
        let tables = &mut self.lanes.of_mut(step.kind).tables;
        let begun = begun.and_then(|()| self.backend.set_batch(tables, &step.batch));
        // Whatever failed: rows that another process sends are received in the order of the steps.
        self.receive(input, step)?;
        begun?;
        if !vision.is_empty() {
            let begin = self.backend.moment()?;
            self.run_units(vision, step, &mut output.captured, let_pass)?;
            output.vision = Some([begin, self.backend.moment()?]);
        }
        self.run_units(embedding, step, &mut output.captured, let_pass)?;
        match self.recording(decoder, step) {
            Some(key) => {
                let backend = Arc::clone(&self.backend);
                backend.replay(key, &mut || self.run_units(decoder, step, &mut output.captured, let_pass))?;
            }
            None => self.run_units(decoder, step, &mut output.captured, let_pass)?,
        }
        match units.last() {
            None => {}
            Some(Unit::Head) => self.choose(step, &mut output)?,
            Some(last) => output.crossing = Some(self.send(*last, step)?),
        }
        Ok(output)
    }

    /// Whether others may run between the units of a step.
    fn is_cut(&self, step: &Step) -> bool {
        self.decodes_may_pass && step.kind == StepKind::Prefill && step.batch.num_rows() > MAX_RECORDED_ROWS
    }

    fn run_units(
        &mut self, units: &[Unit], step: &Step, captured: &mut Vec<Captured>, let_pass: LetPass<'_, B>,
    ) -> Result<(), BackendError> {
        for unit in units {
            if self.is_cut(step) {
                // Also where nobody passes: a prompt has the same bits with others and alone.
                self.backend.settle()?;
                if step.is_passed {
                    let_pass(self)?;
                }
            }
            match *unit {
                Unit::PatchEmbedding => self.patch_embedding(step)?,
                Unit::VitLayer(layer) => self.vit_layer(layer, step)?,
                Unit::Adapter => self.adapter(step)?,
                Unit::Embedding => self.embedding(step)?,
                Unit::DecoderLayer(layer) => self.decoder_layer(layer, step)?,
                Unit::Head => self.head(step)?,
            }
            if step.capture {
                captured.push(self.capture(*unit, step)?);
            }
        }
        Ok(())
    }

    /// The name under which `decoder`, layers and head of one stage, is recorded in steps like this one. `None` where
    /// such steps differ in more than tables say, or weights are copied between the operations.
    fn recording(&self, decoder: &[Unit], step: &Step) -> Option<u64> {
        let rows = step.batch.num_rows();
        let mut groups = decoder.iter().flat_map(|unit| groups_in_order_of_use(*unit, |expert| step.uses(expert)));
        let can_be_recorded =
            step.is_plain_decode() && rows <= MAX_RECORDED_ROWS && groups.all(|key| self.weights.is_resident(key));
        // The first unit tells the stages of a rank apart.
        let first = match decoder.first()? {
            Unit::DecoderLayer(layer) => *layer,
            _ => self.spec.num_layers,
        };
        can_be_recorded.then_some((first * (MAX_RECORDED_ROWS + 1) + rows) as u64)
    }

    fn receive(&mut self, input: Option<Crossing<B::Parcel>>, step: &Step) -> Result<(), BackendError> {
        let (parcel, kind) = match input {
            None => return Ok(()),
            Some(Crossing::VitHidden(parcel)) => (parcel, BufferKind::VitHidden),
            Some(Crossing::VisionFeatures(parcel)) => (parcel, BufferKind::VisionFeatures),
            Some(Crossing::Hidden(parcel)) => (parcel, self.lanes.of(step.kind).hidden),
        };
        let [buffer] = self.workspace.buffers([kind]);
        self.backend.receive(parcel, buffer, 0)
    }

    /// What the stage after one that ends in `last` needs.
    fn send(&mut self, last: Unit, step: &Step) -> Result<Crossing<B::Parcel>, BackendError> {
        let (kind, rows) = self.result_of(last, step);
        let [buffer] = self.workspace.buffers([kind]);
        let parcel = self.backend.send(&self.lanes.of(step.kind).outbox, buffer, 0..rows)?;
        Ok(match kind {
            BufferKind::VitHidden => Crossing::VitHidden(parcel),
            BufferKind::VisionFeatures => Crossing::VisionFeatures(parcel),
            _ => Crossing::Hidden(parcel),
        })
    }

    /// The buffer that holds what `unit` computed, and its rows.
    fn result_of(&self, unit: Unit, step: &Step) -> (BufferKind, usize) {
        let num_images = step.images.len();
        match unit {
            Unit::PatchEmbedding | Unit::VitLayer(_) => {
                (BufferKind::VitHidden, num_images * self.spec.vision.num_tokens())
            }
            Unit::Adapter => (BufferKind::VisionFeatures, num_images * self.spec.num_vision_tokens()),
            Unit::Embedding | Unit::DecoderLayer(_) => (self.lanes.of(step.kind).hidden, step.batch.num_rows()),
            Unit::Head => (BufferKind::HeadInput, step.batch.logit_rows.len()),
        }
    }

    fn capture(&mut self, unit: Unit, step: &Step) -> Result<Captured, BackendError> {
        let name = match unit {
            Unit::PatchEmbedding => "vit.embed".to_owned(),
            Unit::VitLayer(layer) => format!("vit.layer.{layer}"),
            Unit::Adapter => "vision.out".to_owned(),
            Unit::Embedding => "llm.embed".to_owned(),
            Unit::DecoderLayer(layer) => format!("llm.layer.{layer}"),
            Unit::Head => "llm.norm".to_owned(),
        };
        let (kind, rows) = self.result_of(unit, step);
        let [buffer] = self.workspace.buffers([kind]);
        let values = self.backend.read(buffer, 0..rows)?;
        let columns = values.len().checked_div(rows).unwrap_or(0);
        Ok(Captured { name, shape: [rows, columns], values })
    }
}

/// Called between the units of a prompt.
pub type LetPass<'a, B> = &'a mut dyn FnMut(&mut Rank<B>) -> Result<(), BackendError>;

/// Shape of the KV cache of a decoder layer.
pub fn kv_shape(spec: &ModelSpec, limits: &StepLimits) -> [usize; 2] {
    [limits.num_kv_blocks(), BLOCK_LEN * spec.kv_elements_per_token()]
}

/// The groups that a unit takes in a step that uses some experts, in the order in which it takes them.
fn groups_in_order_of_use(unit: Unit, uses: impl Fn(Expert) -> bool) -> Vec<GroupKey> {
    let groups = match unit {
        Unit::DecoderLayer(_) => {
            let experts = [Expert::Language, Expert::Vision];
            let used = || experts.into_iter().filter(|expert| uses(*expert));
            let operations = [WeightGroup::Qkv, WeightGroup::Dense, WeightGroup::GateUp, WeightGroup::Down];
            operations.into_iter().flat_map(|operation| used().map(operation)).collect()
        }
        _ => vec![WeightGroup::Whole],
    };
    groups.into_iter().map(|group| (unit, group)).collect()
}
