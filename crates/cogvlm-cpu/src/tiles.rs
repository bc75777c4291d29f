//! Writing one array from several threads, each its own part.
#![expect(unsafe_code, reason = "tiles of a matrix are not runs of a slice, which is all that can be split off safely")]

use std::marker::PhantomData;
use std::ops::Range;

use crate::threads::Threads;

/// A mutable slice whose disjoint parts are written by different threads.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]`.
unsafe impl<T: Send> Send for Disjoint<'_, T> {}
// SAFETY: sharing it lets threads take parts, which are disjoint by the contract of `part`.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// Elements `range`.
    ///
    /// # Safety
    /// No element of `range` is in another part that is alive.
    ///
    /// # Panics
    /// If `range` does not lie within the slice.
    #[expect(clippy::mut_from_ref, reason = "exclusive by the contract above")]
    pub(crate) unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        // SAFETY: within the slice by the assertion; borrowed by nobody else by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

/// Some rows of some columns of a matrix, borrowed exclusively.
pub(crate) struct Tile<'a, T> {
    matrix: &'a Disjoint<'a, T>,
    stride: usize,
    rows: Range<usize>,
    columns: Range<usize>,
}

impl<T> Tile<'_, T> {
    /// Its rows in the matrix.
    pub(crate) fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// Its columns in the matrix.
    pub(crate) fn columns(&self) -> Range<usize> {
        self.columns.clone()
    }

    /// The tile's part of row `row` of the matrix, which must be one of its own.
    pub(crate) fn row(&mut self, row: usize) -> &mut [T] {
        assert!(self.rows.contains(&row), "row {row} of {:?}", self.rows);
        let start = row * self.stride;
        // SAFETY: tiles are disjoint (`for_each` makes each once, of disjoint rows or columns), the row is one of this
        // tile's, its columns are below the stride, and the tile is borrowed mutably for as long as the part lives.
        unsafe { self.matrix.part(start + self.columns.start..start + self.columns.end) }
    }
}

/// Cuts `rows` into runs of at most `longest`, about equally long, each but the last a multiple of `multiple`.
pub(crate) fn row_blocks(rows: Range<usize>, longest: usize, multiple: usize) -> Vec<Range<usize>> {
    let num_blocks = rows.len().div_ceil(longest.max(1)).max(1);
    let len = rows.len().div_ceil(num_blocks).next_multiple_of(multiple).max(1);
    rows.clone().step_by(len).map(|start| start..rows.end.min(start + len)).collect()
}

/// Calls `work` for every tile of `matrix`: of every run in `row_blocks` and of every `width` of its `columns`.
///
/// # Panics
/// If runs of rows are not ascending and disjoint, or `width` is 0.
pub(crate) fn for_each<T: Send>(
    threads: &Threads, matrix: &mut [T], columns: usize, row_blocks: &[Range<usize>], width: usize,
    work: impl Fn(Tile<'_, T>) + Sync,
) {
    assert!(row_blocks.windows(2).all(|pair| pair[0].end <= pair[1].start), "runs of rows overlap");
    let num_column_blocks = columns.div_ceil(width);
    let matrix = &Disjoint::new(matrix);
    threads.for_each(row_blocks.len() * num_column_blocks, |index| {
        let (row_block, column_block) = (index / num_column_blocks, index % num_column_blocks);
        let first = column_block * width;
        let (rows, tile_columns) = (row_blocks[row_block].clone(), first..columns.min(first + width));
        work(Tile { matrix, stride: columns, rows, columns: tile_columns });
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_a_matrix_once() {
        let threads = Threads::new(3).unwrap();
        let mut matrix = vec![0u32; 20 * 11];
        for_each(&threads, &mut matrix, 11, &[2..5, 5..6, 10..19], 4, |mut tile| {
            for row in tile.rows() {
                let columns = tile.columns();
                tile.row(row).iter_mut().zip(columns).for_each(|(to, column)| *to += (100 * row + column) as u32 + 1);
            }
        });
        for (index, &value) in matrix.iter().enumerate() {
            let (row, column) = (index / 11, index % 11);
            let covered = (2..6).contains(&row) || (10..19).contains(&row);
            assert_eq!(value, if covered { (100 * row + column) as u32 + 1 } else { 0 });
        }
    }

    #[test]
    fn blocks_of_rows_are_even() {
        assert_eq!(row_blocks(3..103, 40, 12), [3..39, 39..75, 75..103]);
        assert_eq!(row_blocks(5..5, 40, 12), []);
        assert_eq!(row_blocks(0..7, 40, 12), vec![0..7; 1]);
    }
}
