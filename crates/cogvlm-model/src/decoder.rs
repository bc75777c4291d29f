//! Embedding, decoder layers, head.

use cogvlm_backend::{Backend, BackendError, HeadGeometry, SampleRequest};
use cogvlm_core::workspace::BufferKind;
use cogvlm_core::{Expert, Unit, WeightGroup};

use crate::rank::Rank;
use crate::step::{StageOutput, Step};

impl<B: Backend> Rank<B> {
    /// Looks up the rows' embeddings and writes the images' vision tokens over theirs: the residual of the step's lane.
    pub(crate) fn embedding(&mut self, step: &Step) -> Result<(), BackendError> {
        let num_vision_tokens = self.spec.num_vision_tokens();
        let taken = self.weights.take(&self.backend, (Unit::Embedding, WeightGroup::Whole))?;
        {
            let [table] = taken.exactly();
            let lane = self.lanes.of(step.kind);
            let [hidden] = self.workspace.buffers([lane.hidden]);
            match lane.sampled.as_ref().filter(|_| step.continues) {
                Some(sampled) => self.backend.embed_sampled(table, sampled, hidden)?,
                None if step.continues => {
                    let reason = "the step continues one that chose its tokens elsewhere, or not at all".to_owned();
                    return Err(BackendError::Unsupported { op: "embed", reason });
                }
                None => self.backend.embed(table, &step.batch.input_ids, hidden)?,
            }
        }
        self.weights.give_back(&self.backend, taken)?;
        if !step.images.is_empty() {
            let kinds = [BufferKind::VisionFeatures, self.lanes.of(step.kind).hidden];
            let [features, hidden] = self.workspace.buffers(kinds);
            for (index, image) in step.images.iter().enumerate() {
                let first = index * num_vision_tokens;
                self.backend.copy_rows(features, first..first + num_vision_tokens, hidden, image.first_row)?;
            }
        }
        Ok(())
    }

    /// One decoder layer on the residual: attention, then MLP, each row with its expert's weights.
    pub(crate) fn decoder_layer(&mut self, layer: usize, step: &Step) -> Result<(), BackendError> {
        let (unit, backend) = (Unit::DecoderLayer(layer), self.backend.clone());
        let (rows, eps, mode) = (step.batch.num_rows(), self.spec.rms_norm_eps, self.rope_mode);
        let (num_heads, num_kv_heads, head_dim) = (self.spec.num_heads, self.spec.num_kv_heads, self.spec.head_dim);
        let heads = HeadGeometry { num_heads, num_kv_heads, head_dim };
        let uses = [step.uses(Expert::Language), step.uses(Expert::Vision)];
        let ranges = &step.batch.expert_ranges;
        let norms = self.weights.take(&backend, (unit, WeightGroup::Norms))?;
        let [input_norm, post_norm] = norms.exactly();
        let kv = self.kv.get_mut(&layer).expect("a KV cache is allocated for every decoder layer of the rank");
        let lane = self.lanes.of(step.kind);
        let [hidden, normed, query, inner, rope] = self.workspace.buffers([
            lane.hidden,
            BufferKind::Normed,
            BufferKind::Query,
            BufferKind::MlpInner,
            BufferKind::RopeTable,
        ]);

        backend.rms_norm(hidden, input_norm, eps, rows, normed)?;
        let qkv = self.weights.take_pair(&backend, unit, WeightGroup::Qkv, uses)?;
        backend.qkv_rope_append(normed, qkv.nth(0), ranges, heads, rope, mode, &lane.tables, query, kv)?;
        self.weights.give_back_pair(&backend, qkv)?;
        backend.attention(query, kv, heads, &lane.tables, normed)?;
        let dense = self.weights.take_pair(&backend, unit, WeightGroup::Dense, uses)?;
        backend.linear_residual(normed, dense.nth(0), ranges, hidden)?;
        self.weights.give_back_pair(&backend, dense)?;

        backend.rms_norm(hidden, post_norm, eps, rows, normed)?;
        let gate_up = self.weights.take_pair(&backend, unit, WeightGroup::GateUp, uses)?;
        backend.gate_up(normed, gate_up.nth(0), gate_up.nth(1), ranges, inner)?;
        self.weights.give_back_pair(&backend, gate_up)?;
        let down = self.weights.take_pair(&backend, unit, WeightGroup::Down, uses)?;
        backend.linear_residual(inner, down.nth(0), ranges, hidden)?;
        self.weights.give_back_pair(&backend, down)
    }

    /// Final norm, and the logits of the rows that the step wants.
    pub(crate) fn head(&mut self, step: &Step) -> Result<(), BackendError> {
        let backend = self.backend.clone();
        let norms = self.weights.take(&backend, (Unit::Head, WeightGroup::Norms))?;
        let lane = self.lanes.of(step.kind);
        let [hidden, head_input, logits] =
            self.workspace.buffers([lane.hidden, BufferKind::HeadInput, BufferKind::Logits]);
        let [norm] = norms.exactly();
        backend.rms_norm_logit_rows(hidden, norm, self.spec.rms_norm_eps, &lane.tables, head_input)?;
        let taken = self.weights.take(&backend, (Unit::Head, WeightGroup::Whole))?;
        let [weight] = taken.exactly();
        backend.logits(head_input, weight, step.batch.logit_rows.len(), logits)?;
        self.weights.give_back(&backend, taken)
    }

    /// The tokens chosen from the logits, and the logits themselves where the step wants them.
    pub(crate) fn choose(&mut self, step: &Step, output: &mut StageOutput<B>) -> Result<(), BackendError> {
        let [logits] = self.workspace.buffers([BufferKind::Logits]);
        let requests: Vec<SampleRequest<'_>> = step
            .samples
            .iter()
            .map(|spec| SampleRequest { params: &spec.params, seen: &spec.seen, index: spec.index })
            .collect();
        let sampled = self.backend.sample(logits, &requests)?;
        self.lanes.of_mut(step.kind).sampled = Some(sampled.clone());
        output.sampled = Some(sampled);
        if step.want_logits {
            let rows = 0..step.batch.logit_rows.len();
            output.logits = rows.map(|row| self.backend.read(logits, row..row + 1)).collect::<Result<_, _>>()?;
        }
        Ok(())
    }
}
