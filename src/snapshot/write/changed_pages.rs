// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The pages of a differential while it is written, from any number of threads.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, MutexGuard};

use thiserror::Error;

use super::page_cells::{CELL_PAGES, Cell, Cells};
use super::sparse_file::{FillError, SparseFile, wanted_runs};
use crate::granule::Granule;
use crate::range::GpaRange;
use crate::snapshot::format::{
    BlockHasher, BlockTable, Changes, Digest, Extent, Placement, PlacementError, SnapshotLimits,
    block_bytes_for, is_zero,
};
use crate::snapshot::parallel;
use crate::snapshot::read::SnapshotChain;
use crate::snapshot::reserve::{index, push, resize, zeros};
use crate::threads::ThreadStart;

/// A range that begins or ends inside a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{range} is not of whole pages, which a differential is made of")]
struct PartialPage {
    range: GpaRange,
}

/// Why pages could not be put in order.
#[derive(Debug, Error)]
pub(super) enum SettleError {
    /// The work file is not what was written to it, or cannot be read.
    #[error("Cannot read the pages back from the work file")]
    Work(#[source] io::Error),
    /// The pages could not be written in their order.
    #[error("Cannot copy the pages into ascending order")]
    Copy(#[source] io::Error),
    #[error(transparent)]
    Placement(#[from] PlacementError),
}

/// Pages in a sparse work file, each at its place, until it is known which of them differ.
#[derive(Debug)]
pub(super) struct ChangedPages {
    work: SparseFile,
    page: Granule,
    cells: Cells,
    /// The base to compare with, if there is one.
    base: Option<Arc<SnapshotChain>>,
    threads: ThreadStart,
}

impl ChangedPages {
    /// Takes an empty work file for memory placed, ascending, as in `placement`.
    pub(super) fn new(
        work: File,
        placement: Placement,
        page: Granule,
        base: Option<Arc<SnapshotChain>>,
        threads: ThreadStart,
    ) -> io::Result<Self> {
        let work = SparseFile::new(work, placement, CELL_PAGES * page.bytes(), threads)?;
        let cells = Cells::new(work.cells())?;
        Ok(Self { work, page, cells, base, threads })
    }

    pub(super) fn placement(&self) -> &Placement {
        self.work.placement()
    }

    /// Takes the bytes of `range` from `read`; later bytes replace earlier ones.
    ///
    /// # Errors
    /// `range` is not all memory or not of whole pages, or reading or writing failed.
    pub(super) fn fill(
        &self,
        range: GpaRange,
        read: impl FnMut(GpaRange, &mut [u8]) -> io::Result<()>,
    ) -> Result<(), FillError> {
        if !self.page.is_aligned(range.start()) || !self.page.is_aligned(range.end()) {
            let refused = io::Error::new(ErrorKind::InvalidInput, PartialPage { range });
            return Err(FillError::Read(refused));
        }
        let mut before = Vec::new();
        self.work.fill(range, read, |piece, bytes| self.store(piece, bytes, &mut before))
    }

    /// Counts every page that may not be zero in the base as zero until it comes; does not read the base.
    ///
    /// # Errors
    /// The holes of the base's memory cannot be found.
    pub(super) fn presume_zeros(&self) -> io::Result<()> {
        let populated = match &self.base {
            Some(base) => base.populated_as_written()?,
            None => self.placement().ranges().collect(),
        };
        for range in populated.into_iter().filter_map(|range| range.align_outward(self.page.bytes())) {
            for piece in self.placement().locate(range).flat_map(|extent| extent.cut(self.work.cell_bytes()))
            {
                let first = piece.offset >> self.page.shift() & (CELL_PAGES - 1);
                let pages = piece.range.len() >> self.page.shift();
                let mut cell = self.lock(piece)?;
                cell.presumed |= (u64::MAX >> (CELL_PAGES - pages)) << first;
            }
        }
        Ok(())
    }

    /// Takes the bytes of `range` anew, whole pages; returns how many bytes were written. A page that is in the work file already, or
    /// known to be zero, is compared with that, any other with the base.
    ///
    /// # Errors
    /// As [`ChangedPages::fill`].
    pub(super) fn update(
        &self,
        range: GpaRange,
        read: impl FnMut(GpaRange, &mut [u8]) -> io::Result<()>,
    ) -> Result<u64, FillError> {
        let (mut kept, mut before, mut written) = (Vec::new(), Vec::new(), 0);
        self.work.fill(range, read, |piece, bytes| {
            let mut more = 0;
            for run in self.not_kept(piece, bytes, &mut kept)? {
                more += self.store(piece.slice(&run), &bytes[run], &mut before)?;
            }
            written += more;
            Ok(more)
        })?;
        Ok(written)
    }

    /// The pages of a piece, as parts of its `bytes`, that are not kept as they are there.
    fn not_kept(
        &self,
        piece: Extent,
        bytes: &[u8],
        kept: &mut Vec<u8>,
    ) -> Result<Vec<Range<usize>>, FillError> {
        let Cell { data, zero, .. } = *self.lock(piece).map_err(FillError::Write)?;
        resize(kept, bytes.len()).map_err(FillError::Read)?;
        if data != 0 {
            self.work
                .file()
                .read_exact_at(&mut kept[..bytes.len()], piece.offset)
                .map_err(FillError::Write)?;
        }
        let page_bytes = index(self.page.bytes());
        let first = piece.offset >> self.page.shift() & (CELL_PAGES - 1);
        let pages = (first..).zip((0..bytes.len()).step_by(page_bytes)).map(|(bit, at)| {
            let page = at..at + page_bytes;
            let is_kept = match (data >> bit & 1, zero >> bit & 1) {
                (1, _) => kept[page.clone()] == bytes[page.clone()],
                (_, 1) => is_zero(&bytes[page.clone()]),
                _ => false,
            };
            (page, !is_kept)
        });
        Ok(wanted_runs(pages))
    }

    /// The memory that may differ from zeros as it is now: what came, and, as a page that came may be the same as there, what the base has.
    pub(super) fn stored(&self) -> io::Result<Vec<GpaRange>> {
        let mut stored = self.work.stored()?;
        let base = self.base.as_ref().map(|base| base.populated_as_written()).transpose()?;
        for range in base.into_iter().flatten() {
            let Some(range) = range.align_outward(self.page.bytes()) else { continue };
            for extent in self.placement().locate(range) {
                push(&mut stored, extent.range)?;
            }
        }
        Ok(stored)
    }

    /// Brings to disk what was written until now, and waits for it.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.work.file().sync_data()
    }

    fn lock(&self, piece: Extent) -> io::Result<MutexGuard<'_, Cell>> {
        self.cells.lock(self.work.cell_of(piece))
    }

    /// Writes the pages that differ and are not zero; returns how many bytes that are.
    fn store(&self, piece: Extent, bytes: &[u8], before: &mut Vec<u8>) -> Result<u64, FillError> {
        if let Some(base) = &self.base {
            resize(before, bytes.len()).map_err(FillError::Read)?;
            base.read_checked(piece.range, before).map_err(FillError::Read)?;
        }
        let page_bytes = index(self.page.bytes());
        let mut cell = self.lock(piece).map_err(FillError::Write)?;
        let first = piece.offset >> self.page.shift() & (CELL_PAGES - 1);
        let pages = (first..).zip((0..bytes.len()).step_by(page_bytes)).map(|(bit, at)| {
            let page = at..at + page_bytes;
            let same = self.base.is_some() && before[page.clone()] == bytes[page.clone()];
            let zero = !same && is_zero(&bytes[page.clone()]);
            cell.data = with_bit(cell.data, bit, !same && !zero);
            cell.zero = with_bit(cell.zero, bit, zero);
            cell.presumed = with_bit(cell.presumed, bit, false);
            (page, !same && !zero)
        });
        self.work.write_parts(piece.offset, bytes, pages).map_err(FillError::Write)
    }

    /// Begins to bring to disk what was written until now; does not wait for it.
    pub(super) fn hurry(&self) {
        self.work.hurry();
    }

    /// Copies the pages that differ from the snapshot that `base` names, and lie in `kept`, to `into`, back to back, and brings them to disk.
    ///
    /// The work file is synced although it is removed later: only a sync after the last read shows that no page of it was lost. That sync
    /// has little to write, because the write-back throttle syncs the file all along.
    pub(super) fn settle(
        self,
        base: Digest,
        kept: &Placement,
        into: &File,
    ) -> Result<(Changes, BlockTable), SettleError> {
        self.work.check_written().map_err(SettleError::Work)?;
        let limits = SnapshotLimits { ranges: usize::MAX, ..SnapshotLimits::default() };
        let limits = SnapshotLimits { memory_bytes: self.placement().bytes(), ..limits };
        self.settle_presumed().map_err(SettleError::Work)?;
        let placed = |bits: fn(&Cell) -> u64| -> Result<Placement, SettleError> {
            Ok(Placement::new(self.runs(kept, bits).map_err(SettleError::Work)?, &limits)?)
        };
        let (runs, zero_runs) = (placed(|cell| cell.data)?, placed(|cell| cell.zero)?);
        self.work.hurry();
        let blocks = self.copy_runs(&runs, into)?;
        self.work.finish(File::sync_data).map_err(SettleError::Work)?;
        into.sync_all().map_err(SettleError::Copy)?;
        Ok((Changes { base, runs, zero_runs }, blocks))
    }

    /// Finds which of the pages that never came were zero in the base already, and so do not differ.
    ///
    /// Only populated memory of the base is read, and blocks of it that were not read while pages came. If the base cannot be read, or was
    /// altered, the pages count as different.
    ///
    /// # Errors
    /// There is not enough memory.
    fn settle_presumed(&self) -> io::Result<()> {
        let mut unsettled = Vec::new();
        for (index, _) in self.cells.used().filter(|(_, cell)| cell.presumed != 0) {
            push(&mut unsettled, index)?;
        }
        let base = self.base.as_ref().filter(|_| !unsettled.is_empty());
        let base = base.map(|base| base.populated().map(|populated| (base, populated))).transpose();
        parallel::for_each(&unsettled, parallel::processors(), self.threads, |&index| {
            let mut cell = self.cells.lock(index)?;
            if let Ok(Some((base, populated))) = &base {
                let nonzero = self.nonzero_in(base, populated, index, cell.presumed);
                cell.presumed &= nonzero.unwrap_or_else(|error| {
                    log::warn!("Pages that may be zero in the base count as different: {error}");
                    u64::MAX
                });
            }
            cell.take_presumed();
            Ok(())
        })
    }

    /// Returns those of the pages `bits` of a cell that are not zero in `base`, which reads as zero outside `populated`.
    fn nonzero_in(
        &self,
        base: &SnapshotChain,
        populated: &[GpaRange],
        cell: usize,
        bits: u64,
    ) -> io::Result<u64> {
        let (mut nonzero, mut bytes) = (0, Vec::new());
        for run in set_runs(bits) {
            let offset = cell as u64 * self.work.cell_bytes() + (u64::from(run.start) << self.page.shift());
            let length = u64::from(run.end - run.start) << self.page.shift();
            let mut bit = run.start;
            for range in self.placement().gpas(offset, length) {
                base.check(range)?;
                for page in range.pieces(self.page.bytes()) {
                    resize(&mut bytes, index(page.len()))?;
                    if overlaps(populated, page) {
                        base.read_checked(page, &mut bytes)?;
                        nonzero = with_bit(nonzero, bit.into(), !is_zero(&bytes));
                    }
                    bit += 1;
                }
            }
        }
        Ok(nonzero)
    }

    /// Returns runs of set pages in `kept`, ascending; two that touch are one.
    fn runs(&self, kept: &Placement, bits: impl Fn(&Cell) -> u64) -> io::Result<Vec<GpaRange>> {
        let mut runs: Vec<GpaRange> = Vec::new();
        for (index, cell) in self.cells.used() {
            for run in set_runs(bits(&cell)) {
                let offset =
                    index as u64 * self.work.cell_bytes() + (u64::from(run.start) << self.page.shift());
                let found =
                    self.placement().gpas(offset, u64::from(run.end - run.start) << self.page.shift());
                for part in found.flat_map(|range| kept.locate(range)) {
                    let joined = runs.pop_if(|last| last.end() == part.range.start());
                    let start = joined.map_or(part.range.start(), GpaRange::start);
                    push(&mut runs, GpaRange::from_bounds(start, part.range.end()).expect("it only grows"))?;
                }
            }
        }
        Ok(runs)
    }

    fn copy_runs(&self, runs: &Placement, into: &File) -> Result<BlockTable, SettleError> {
        let mut hasher = BlockHasher::new(runs.bytes(), block_bytes_for(runs.bytes(), self.page.bytes()))
            .map_err(SettleError::Copy)?;
        let mut buffer = zeros(index(self.work.cell_bytes())).map_err(SettleError::Copy)?;
        for run in runs.ranges() {
            for from in self.placement().locate(run).flat_map(|extent| extent.cut(self.work.cell_bytes())) {
                let bytes = &mut buffer[..index(from.range.len())];
                self.work.file().read_exact_at(bytes, from.offset).map_err(SettleError::Work)?;
                io::Write::write_all(&mut &*into, bytes).map_err(SettleError::Copy)?;
                hasher.update(bytes);
            }
        }
        Ok(hasher.finish())
    }
}

/// Returns the runs of set bits, ascending.
fn set_runs(mut bits: u64) -> impl Iterator<Item = std::ops::Range<u32>> {
    std::iter::from_fn(move || {
        let first = bits.trailing_zeros();
        let length = bits.checked_shr(first)?.trailing_ones();
        bits &= !((u64::MAX >> (u64::BITS - length)) << first);
        Some(first..first + length)
    })
}

/// Whether any of the sorted, disjoint `ranges` has a byte of `range`.
fn overlaps(ranges: &[GpaRange], range: GpaRange) -> bool {
    let first = ranges.partition_point(|other| other.end() <= range.start());
    ranges.get(first).is_some_and(|other| other.start() < range.end())
}

fn with_bit(word: u64, bit: u64, set: bool) -> u64 {
    if set { word | 1 << bit } else { word & !(1 << bit) }
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;
    use crate::snapshot::disk::WriteBack;
    use crate::snapshot::write::sparse_file::from_stream;

    #[test]
    fn pages_that_the_disk_did_not_take_are_not_trusted_when_they_are_read_back() {
        let page = Granule::host_page();
        let ram = GpaRange::new(0, 100 * page.bytes()).unwrap();
        let placement = Placement::new([ram], &SnapshotLimits::default()).unwrap();
        let written = || {
            let work = tempfile::tempfile().unwrap();
            ChangedPages::new(work, placement.clone(), page, None, ThreadStart::NOTHING).unwrap()
        };
        let settle = |pages: ChangedPages| {
            pages.fill(ram, from_stream(&mut io::repeat(7))).unwrap();
            pages.settle(Digest::ZERO, &placement, &tempfile::tempfile().unwrap())
        };
        assert_eq!(settle(written()).unwrap().0.runs, placement);

        let lost = || Err(io::Error::from(Errno::IO));
        let mut unsynced = written();
        unsynced.work.write_back = WriteBack::with(Box::new(lost), ThreadStart::NOTHING).unwrap();
        let error = settle(unsynced).unwrap_err();
        let io_error = Some(Errno::IO.raw_os_error());
        assert!(matches!(&error, SettleError::Work(source) if source.raw_os_error() == io_error), "{error}");

        let unwritten = written();
        unwritten.work.fail();
        assert!(matches!(settle(unwritten), Err(SettleError::Work(_))));
    }
}
