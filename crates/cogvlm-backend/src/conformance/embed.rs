use cogvlm_core::DType;

use super::approx::{Approx, assert_same_bits};
use super::data::{Random, garbage};
use super::harness::{
    Case, EXTRA_ROWS, WEIGHT_DTYPES, buffer, devices, load, refuses, refuses_shape, verify, verify_rejects,
    verify_residency,
};
use super::{Make, VecTensor};
use crate::oracle::round_to;
use crate::{Backend, BackendError, HostTensor};

#[derive(Clone)]
struct Embed {
    dtype: DType,
    width: usize,
    ids: Vec<u32>,
    table: VecTensor,
}

impl Embed {
    fn new(dtype: DType, table_dtype: DType, vocab_size: usize, width: usize, ids: &[u32]) -> Self {
        let values = Random::new(11).values(DType::F32, vocab_size * width, 1.0);
        let table = VecTensor::new("embed", table_dtype, &[vocab_size, width], &values);
        Self { dtype, width, ids: ids.to_vec(), table }
    }
}

impl Case for Embed {
    fn label(&self) -> String {
        format!("embed {:?} of {:?} {}", self.ids, self.table.shape(), self.table.dtype())
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn weights(&self) -> Vec<VecTensor> {
        vec![self.table.clone()]
    }

    fn run<B: Backend>(&self, backend: &B, weights: &[B::Weight]) -> Result<Vec<f32>, BackendError> {
        let rows = self.ids.len() + EXTRA_ROWS;
        let mut hidden = buffer(backend, rows, self.width, &garbage(self.dtype, rows * self.width));
        backend.embed(&weights[0], &self.ids, &mut hidden)?;
        backend.read(&hidden, 0..rows)
    }

    fn expected(&self) -> Vec<Approx> {
        // A rounding to the nearest is exact: there is one right answer.
        self.oracle(self.dtype).into_iter().map(Approx::exact).collect()
    }

    fn oracle(&self, dtype: DType) -> Vec<f32> {
        let mut out = garbage(self.dtype, (self.ids.len() + EXTRA_ROWS) * self.width);
        for (row, &id) in out.chunks_exact_mut(self.width).zip(&self.ids) {
            let values = &self.table.values()[id as usize * self.width..][..self.width];
            for (out, &value) in row.iter_mut().zip(values) {
                *out = round_to(dtype, f64::from(value));
            }
        }
        out
    }

    fn roundings_are_fixed(&self) -> bool {
        true
    }
}

/// Rows of the table, rounded to the activation type.
pub fn embed<B: Backend>(make: Make<'_, B>) {
    let devices = devices(make);
    let backend = &devices[0];
    let dtype = backend.activation_dtype();
    for table_dtype in WEIGHT_DTYPES {
        for (width, ids) in
            [(1, vec![4]), (33, vec![0, 12, 5, 5, 0]), (4096, vec![3]), (7, (0..130).map(|i| i % 13).collect())]
        {
            verify(&devices, &Embed::new(dtype, table_dtype, 13, width, &ids));
        }
        let case = Embed::new(dtype, table_dtype, 13, 33, &[12, 0, 7]);
        verify_residency(&devices, &case);
        verify_rejects(&case, "the next id", &Embed { ids: vec![11, 1, 8], ..case.clone() });
        // Every backend embeds from weights that rest on the host.
        let attached = backend.attach(&case.table.shared()).expect("a mapped weight can be attached");
        let found = case.run(backend, &[attached]).expect("an attached table can be embedded from");
        assert_same_bits("embed, table attached", &found, &case.oracle(dtype));
    }
    verify(&devices, &Embed::new(dtype, dtype, 13, 33, &[]));

    let table = load(backend, &Embed::new(dtype, dtype, 13, 33, &[]).table);
    let mut hidden = buffer(backend, 4, 33, &[]);
    let mut narrow = buffer(backend, 4, 32, &[]);
    refuses_shape("embed: more ids than rows", backend.embed(&table, &[1; 5], &mut hidden));
    refuses_shape("embed: another width", backend.embed(&table, &[1; 4], &mut narrow));
    refuses("embed: an id beyond the vocabulary", backend.embed(&table, &[0, 13], &mut hidden));
    refuses("embed: an id far beyond the vocabulary", backend.embed(&table, &[u32::MAX], &mut hidden));
}

#[derive(Clone)]
struct CopyWeightRows {
    dtype: DType,
    weight: VecTensor,
    first_row: usize,
}

impl CopyWeightRows {
    const ROWS: usize = 6;

    fn new(dtype: DType, weight_dtype: DType, shape: &[usize], first_row: usize) -> Self {
        let values = Random::new(12).values(DType::F32, shape.iter().product(), 1.0);
        Self { dtype, weight: VecTensor::new("rows", weight_dtype, shape, &values), first_row }
    }

    fn width(&self) -> usize {
        self.weight.shape()[self.weight.shape().len() - 1]
    }
}

impl Case for CopyWeightRows {
    fn label(&self) -> String {
        format!("copy_weight_rows {:?} {} to row {}", self.weight.shape(), self.weight.dtype(), self.first_row)
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn weights(&self) -> Vec<VecTensor> {
        vec![self.weight.clone()]
    }

    fn run<B: Backend>(&self, backend: &B, weights: &[B::Weight]) -> Result<Vec<f32>, BackendError> {
        let before = garbage(self.dtype, Self::ROWS * self.width());
        let mut destination = buffer(backend, Self::ROWS, self.width(), &before);
        backend.copy_weight_rows(&weights[0], &mut destination, self.first_row)?;
        backend.read(&destination, 0..Self::ROWS)
    }

    fn expected(&self) -> Vec<Approx> {
        self.oracle(self.dtype).into_iter().map(Approx::exact).collect()
    }

    fn oracle(&self, dtype: DType) -> Vec<f32> {
        let mut out = garbage(self.dtype, Self::ROWS * self.width());
        for (out, &value) in out[self.first_row * self.width()..].iter_mut().zip(self.weight.values()) {
            *out = round_to(dtype, f64::from(value));
        }
        out
    }

    fn roundings_are_fixed(&self) -> bool {
        true
    }
}

/// Weights as rows, rounded to the activation type.
pub fn copy_weight_rows<B: Backend>(make: Make<'_, B>) {
    let devices = devices(make);
    let backend = &devices[0];
    let dtype = backend.activation_dtype();
    for weight_dtype in WEIGHT_DTYPES {
        for (shape, first_row) in [(&[1, 1, 33][..], 0), (&[1, 1, 4096], 5), (&[3, 7], 2), (&[6, 1], 0)] {
            let case = CopyWeightRows::new(dtype, weight_dtype, shape, first_row);
            verify(&devices, &case);
            verify_residency(&devices, &case);
        }
    }
    let case = CopyWeightRows::new(dtype, dtype, &[3, 7], 2);
    verify_rejects(&case, "one row too early", &CopyWeightRows { first_row: 1, ..case.clone() });

    let weight = load(backend, &case.weight);
    let mut destination = buffer(backend, 4, 7, &[]);
    let mut narrow = buffer(backend, 4, 6, &[]);
    refuses_shape("copy_weight_rows: beyond the end", backend.copy_weight_rows(&weight, &mut destination, 2));
    refuses_shape("copy_weight_rows: far beyond", backend.copy_weight_rows(&weight, &mut destination, usize::MAX));
    refuses_shape("copy_weight_rows: another width", backend.copy_weight_rows(&weight, &mut narrow, 0));
}
