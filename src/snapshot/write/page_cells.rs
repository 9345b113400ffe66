// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is known about the pages of a differential: a cell for each 64 of them, made when the first of them comes.
//!
//! A source may announce far more memory than it has; that costs one pointer for each 4096 pages.

use std::io;
use std::sync::{Mutex, MutexGuard, OnceLock};

use crate::snapshot::reserve::{expect_headroom, list_of};
use crate::sync;

/// Pages per cell: one bit of a word each.
pub(super) const CELL_PAGES: u64 = u64::BITS as u64;

/// Cells that are made at a time.
const GROUP_CELLS: usize = 64;

/// Which pages of a cell differ from the base; locked while their bytes are compared and written.
#[derive(Debug, Default)]
pub(super) struct Cell {
    /// Pages whose bytes are in the work file.
    pub(super) data: u64,
    /// Pages that are zero and were not, or perhaps were not, in the base.
    pub(super) zero: u64,
    /// Pages that never came and so are zero; whether they were in the base is not known yet.
    pub(super) presumed: u64,
}

impl Cell {
    /// Counts the pages presumed to be zero as those that are.
    pub(super) fn take_presumed(&mut self) {
        self.zero |= std::mem::take(&mut self.presumed);
    }
}

/// All cells of a differential; those that were never locked have no bit set.
#[derive(Debug)]
pub(super) struct Cells {
    groups: Vec<OnceLock<Vec<Mutex<Cell>>>>,
}

impl Cells {
    /// Makes room for so many cells.
    pub(super) fn new(count: u64) -> io::Result<Self> {
        let groups = usize::try_from(count.div_ceil(GROUP_CELLS as u64)).unwrap_or(usize::MAX);
        Ok(Self { groups: list_of(groups, std::iter::repeat_with(OnceLock::new))? })
    }

    /// Locks a cell.
    ///
    /// # Errors
    /// There is no memory for the cell.
    pub(super) fn lock(&self, index: usize) -> io::Result<MutexGuard<'_, Cell>> {
        let group = &self.groups[index / GROUP_CELLS];
        if group.get().is_none() {
            expect_headroom()?;
            let made = list_of(GROUP_CELLS, std::iter::repeat_with(Mutex::default))?;
            // Where another thread was faster, its own counts.
            let _second = group.set(made);
        }
        let cells = group.get().expect("it was made");
        Ok(locked(&cells[index % GROUP_CELLS]))
    }

    /// The cells that may have a bit set, ascending, each with its index.
    pub(super) fn used(&self) -> impl Iterator<Item = (usize, MutexGuard<'_, Cell>)> {
        let made = (0..).step_by(GROUP_CELLS).zip(&self.groups);
        let made = made.filter_map(|(first, group)| Some((first, group.get()?)));
        made.flat_map(|(first, cells)| (first..).zip(cells.iter().map(locked)))
    }
}

fn locked(cell: &Mutex<Cell>) -> MutexGuard<'_, Cell> {
    sync::lock(cell)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_cells_that_were_asked_for_are_made() {
        let cells = Cells::new(1 << 26).unwrap();
        assert_eq!(cells.used().count(), 0);
        for index in [70, (1 << 26) - 1, 70] {
            cells.lock(index).unwrap().data |= 1;
        }
        assert_eq!(cells.used().count(), 2 * GROUP_CELLS);
        let set: Vec<_> = cells.used().filter(|(_, cell)| cell.data != 0).map(|(index, _)| index).collect();
        assert_eq!(set, [70, (1 << 26) - 1]);
    }
}
