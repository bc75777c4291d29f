//! One member's part of a weight, as a tensor of its own.

use std::ops::Range;
use std::sync::Arc;

use cogvlm_backend::shape::unsupported;
use cogvlm_backend::{BackendError, ElementRule, HostReadError, HostTensor, HostWeight, MappedRows};
use cogvlm_core::DType;
use cogvlm_core::sharing::Sharing;

/// Some rows, or some columns of every row, of a weight: contiguous when it is read.
pub struct Shard {
    whole: HostWeight,
    shape: [usize; 2],
    /// Runs of rows of the whole, one after the other.
    rows: Vec<Range<usize>>,
    /// Columns of the whole.
    columns: Range<usize>,
}

/// Elements of [`ElementRule`]s: the difference between the states of neighbouring ones.
const RULE_STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// Which run of `count` the device `member` of `num_members` has.
fn run(count: usize, member: usize, num_members: usize) -> Range<usize> {
    let each = count / num_members;
    member * each..(member + 1) * each
}

impl Shard {
    /// The part of `whole` that `member` of `num_members` has by `sharing`; `parts` are the rows of queries, keys and
    /// values of a fused projection.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`] where the tensor is no matrix, or does not come out even.
    pub fn of(
        whole: &HostWeight, sharing: Sharing, parts: [usize; 3], member: usize, num_members: usize,
    ) -> Result<HostWeight, BackendError> {
        if matches!(sharing, Sharing::Replicated | Sharing::First) {
            return Ok(HostWeight::clone(whole));
        }
        let &[num_rows, num_columns] = whole.shape() else {
            return Err(unsupported("load", format!("`{}` is no matrix that devices could share", whole.name())));
        };
        let only = |run: Range<usize>| -> Vec<Range<usize>> { std::iter::once(run).collect() };
        let (mut rows, mut columns) = (only(0..num_rows), 0..num_columns);
        let is_even = |count: usize| count.is_multiple_of(num_members);
        let comes_out_even = match sharing {
            Sharing::Replicated | Sharing::First => true,
            Sharing::Rows => {
                rows = only(run(num_rows, member, num_members));
                is_even(num_rows)
            }
            Sharing::Columns => {
                columns = run(num_columns, member, num_members);
                is_even(num_columns)
            }
            Sharing::Heads => {
                let mut first = 0;
                let runs = parts.into_iter().map(|count| {
                    let run = run(count, member, num_members);
                    first += count;
                    first - count + run.start..first - count + run.end
                });
                rows = runs.collect();
                parts.into_iter().all(is_even) && parts.into_iter().sum::<usize>() == num_rows
            }
        };
        if !comes_out_even {
            let (name, shape) = (whole.name(), whole.shape());
            return Err(unsupported(
                "load",
                format!("{num_members} devices cannot share `{name}` of {shape:?} evenly"),
            ));
        }
        let shape = [rows.iter().map(Range::len).sum(), columns.len()];
        Ok(Arc::new(Self { whole: HostWeight::clone(whole), shape, rows, columns }))
    }

    /// Columns of the whole.
    fn pitch(&self) -> usize {
        self.whole.shape()[1]
    }

    /// Rows of the whole that it has some of, run by run: where their parts lie in `bytes` of the whole.
    fn mapped_runs<'a>(&self, bytes: &'a [u8]) -> Vec<MappedRows<'a>> {
        let size = self.dtype().size_bytes();
        let (pitch, width) = (self.pitch() * size, self.columns.len() * size);
        let run = |rows: &Range<usize>| {
            let first = rows.start * pitch + self.columns.start * size;
            if width == pitch {
                MappedRows::one(&bytes[first..first + rows.len() * pitch])
            } else {
                MappedRows { bytes: &bytes[first..first + (rows.len() - 1) * pitch + width], width, pitch }
            }
        };
        self.rows.iter().filter(|rows| !rows.is_empty() && width > 0).map(run).collect()
    }

    /// The elements of the whole that follow each other there and hold those of the shard from `element` on.
    fn span_at(&self, element: usize) -> Range<usize> {
        let (mut row, column) = (element / self.shape[1], element % self.shape[1]);
        for run in &self.rows {
            if row >= run.len() {
                row -= run.len();
                continue;
            }
            let first = (run.start + row) * self.pitch() + self.columns.start + column;
            let takes_whole_rows = self.columns.len() == self.pitch();
            let end = if takes_whole_rows { run.end * self.pitch() } else { first + self.columns.len() - column };
            return first..end;
        }
        0..0
    }
}

impl HostTensor for Shard {
    fn name(&self) -> &str {
        self.whole.name()
    }

    fn dtype(&self) -> DType {
        self.whole.dtype()
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Its bytes need not follow each other where they lie.
    fn mapped(&self) -> Option<&[u8]> {
        None
    }

    fn mapped_rows(&self) -> Option<Vec<MappedRows<'_>>> {
        self.whole.mapped().map(|bytes| self.mapped_runs(bytes))
    }

    fn mapping(&self) -> Option<&[u8]> {
        self.whole.mapping()
    }

    fn read_into(&self, destination: &mut [u8]) -> Result<(), HostReadError> {
        self.read_at(0, destination)
    }

    fn read_at(&self, offset: usize, destination: &mut [u8]) -> Result<(), HostReadError> {
        let size = self.dtype().size_bytes();
        let (mut element, mut rest) = (offset / size, destination);
        let mapped = self.whole.mapped();
        while !rest.is_empty() {
            let span = self.span_at(element);
            let count = span.len().min(rest.len() / size);
            if count == 0 {
                let reason = "bytes beyond its end were asked for".to_owned();
                return Err(HostReadError { tensor: self.name().to_owned(), reason });
            }
            let (piece, after) = std::mem::take(&mut rest).split_at_mut(count * size);
            let first = span.start * size;
            match mapped {
                Some(bytes) => piece.copy_from_slice(&bytes[first..first + count * size]),
                None => self.whole.read_at(first, piece)?,
            }
            (element, rest) = (element + count, after);
        }
        mapped.map_or(Ok(()), |_| self.whole.verify())
    }

    fn read_ahead(&self) {
        self.whole.read_ahead();
    }

    fn verify(&self) -> Result<(), HostReadError> {
        self.whole.verify()
    }

    /// Elements that follow each other follow the same rule from another state on.
    fn rule(&self) -> Option<ElementRule> {
        let rule = self.whole.rule()?;
        let [rows] = &self.rows[..] else { return None };
        if rule.mixes_rows || self.columns.len() != self.pitch() {
            return None;
        }
        let first = (rows.start * self.pitch()) as u64;
        Some(ElementRule { key: rule.key.wrapping_add(first.wrapping_mul(RULE_STEP)), ..rule })
    }
}

#[cfg(test)]
mod tests {
    use cogvlm_backend::conformance::VecTensor;
    use cogvlm_backend::oracle::made_element;

    use super::*;

    /// `[6, 4]`, element `[row, column]` is `10 row + column`.
    fn whole() -> HostWeight {
        let values: Vec<f32> = (0..24).map(|index| (10 * (index / 4) + index % 4) as f32).collect();
        Arc::new(VecTensor::new("w", DType::F32, &[6, 4], &values))
    }

    fn read(weight: &HostWeight) -> Vec<f32> {
        let mut bytes = vec![0; weight.shape().iter().product::<usize>() * 4];
        weight.read_into(&mut bytes).unwrap();
        bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    #[test]
    fn members_have_equal_parts() {
        let part = |sharing, parts, member| Shard::of(&whole(), sharing, parts, member, 2).unwrap();
        let rows = part(Sharing::Rows, [0; 3], 1);
        assert_eq!(rows.shape(), [3, 4]);
        assert_eq!(read(&rows), [30., 31., 32., 33., 40., 41., 42., 43., 50., 51., 52., 53.]);
        let columns = part(Sharing::Columns, [0; 3], 1);
        assert_eq!(columns.shape(), [6, 2]);
        assert_eq!(read(&columns), [2., 3., 12., 13., 22., 23., 32., 33., 42., 43., 52., 53.]);
        let heads = part(Sharing::Heads, [2, 2, 2], 0);
        assert_eq!(heads.shape(), [3, 4]);
        assert_eq!(read(&heads), [0., 1., 2., 3., 20., 21., 22., 23., 40., 41., 42., 43.]);
        assert_eq!(read(&part(Sharing::Replicated, [0; 3], 1)), read(&whole()));
    }

    #[test]
    fn parts_of_parts_are_read_at_any_element() {
        for (sharing, parts) in [(Sharing::Rows, [0; 3]), (Sharing::Columns, [0; 3]), (Sharing::Heads, [2, 2, 2])] {
            let shard = Shard::of(&whole(), sharing, parts, 1, 2).unwrap();
            let all = read(&shard);
            for first in 0..all.len() {
                for end in first..=all.len() {
                    let mut bytes = vec![0; (end - first) * 4];
                    shard.read_at(first * 4, &mut bytes).unwrap();
                    let found: Vec<f32> = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
                    assert_eq!(found, all[first..end], "{sharing:?} {first}..{end}");
                }
            }
            assert!(shard.read_at(all.len() * 4, &mut [0; 4]).is_err(), "beyond the end");
            let runs = shard.mapped_rows().expect("the whole is mapped");
            let rows =
                runs.iter().flat_map(|run| (0..run.num_rows()).map(|row| &run.bytes[row * run.pitch..][..run.width]));
            let mapped: Vec<f32> =
                rows.flat_map(|row| row.as_chunks().0).map(|bytes| f32::from_le_bytes(*bytes)).collect();
            assert_eq!(mapped, all, "{sharing:?}");
        }
    }

    #[test]
    fn what_does_not_come_out_even_is_refused() {
        let refused = |sharing, parts, num_members| Shard::of(&whole(), sharing, parts, 0, num_members).is_err();
        assert!(refused(Sharing::Rows, [0; 3], 4) && refused(Sharing::Columns, [0; 3], 3));
        assert!(refused(Sharing::Heads, [3, 2, 1], 2) && refused(Sharing::Heads, [2, 2, 4], 2));
        let vector: HostWeight = Arc::new(VecTensor::new("v", DType::F32, &[4], &[0.0; 4]));
        assert!(Shard::of(&vector, Sharing::Rows, [0; 3], 0, 2).is_err());
    }

    /// A rule that is told as another tensor's is kept.
    struct Ruled(HostWeight);

    const RULE: ElementRule = ElementRule { key: 99, base: 0.5, amplitude: 0.25, mixes_rows: false };

    impl HostTensor for Ruled {
        fn name(&self) -> &str {
            self.0.name()
        }
        fn dtype(&self) -> DType {
            DType::Bf16
        }
        fn shape(&self) -> &[usize] {
            self.0.shape()
        }
        fn mapped(&self) -> Option<&[u8]> {
            None
        }
        fn read_into(&self, destination: &mut [u8]) -> Result<(), HostReadError> {
            self.0.read_into(destination)
        }
        fn rule(&self) -> Option<ElementRule> {
            Some(RULE)
        }
    }

    #[test]
    fn rows_are_made_by_the_rule_of_the_whole() {
        let whole: HostWeight = Arc::new(Ruled(whole()));
        let shard = Shard::of(&whole, Sharing::Rows, [0; 3], 1, 2).unwrap();
        let rule = shard.rule().expect("rows follow each other");
        for index in 0..12 {
            assert_eq!(made_element(rule, [3, 4], index), made_element(RULE, [6, 4], 12 + index), "element {index}");
        }
        assert_eq!(Shard::of(&whole, Sharing::Columns, [0; 3], 1, 2).unwrap().rule(), None);
    }
}
