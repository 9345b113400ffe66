// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The pages of a differential while it is written, from any number of threads.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, MutexGuard, OnceLock};
use std::time::Instant;

use thiserror::Error;

use super::laid_out::{LaidOut, SettleError};
use super::page_cells::{CELL_PAGES, Cell, Cells};
use super::sparse_file::{FillError, SparseFile, wanted_runs};
use crate::granule::Granule;
use crate::range::GpaRange;
use crate::snapshot::disk::WriteError;
use crate::snapshot::format::{BlockTable, Changes, Digest, Extent, Placement, SnapshotLimits, is_zero};
use crate::snapshot::parallel;
use crate::snapshot::read::SnapshotChain;
use crate::snapshot::reserve::{index, push, resize};
use crate::threads::ThreadStart;

/// A range that begins or ends inside a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{range} is not of whole pages, which a differential is made of")]
struct PartialPage {
    range: GpaRange,
}

/// Pages in a sparse work file, each at its place, until it is known which of them differ.
#[derive(Debug)]
pub(super) struct ChangedPages {
    work: SparseFile,
    page: Granule,
    cells: Cells,
    /// The base to compare with, if there is one.
    base: Option<Arc<SnapshotChain>>,
    /// Where pages are that differ, instead of the work file, once they were laid out.
    laid_out: OnceLock<LaidOut>,
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
        Ok(Self { work, page, cells, base, laid_out: OnceLock::new(), threads })
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
        self.work.fill(range, read, |piece, bytes| self.wrote(self.store(piece, bytes, &mut before)?))
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
            self.wrote(more)
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
        let mut parts = Vec::new();
        for (bit, at) in (first..).zip((0..bytes.len()).step_by(page_bytes)) {
            let page = at..at + page_bytes;
            let is_kept = match (data >> bit & 1, zero >> bit & 1, self.place(piece, &page)) {
                (.., Some((laid_out, place))) => {
                    laid_out.read(place, &mut kept[page.clone()]).map_err(FillError::Write)?;
                    kept[page.clone()] == bytes[page.clone()]
                }
                (1, ..) => kept[page.clone()] == bytes[page.clone()],
                (_, 1, _) => is_zero(&bytes[page.clone()]),
                _ => false,
            };
            parts.push((page, !is_kept));
        }
        Ok(wanted_runs(parts.into_iter()))
    }

    /// Where a page of a piece is laid out.
    fn place(&self, piece: Extent, page: &Range<usize>) -> Option<(&LaidOut, u64)> {
        let laid_out = self.laid_out.get()?;
        Some((laid_out, laid_out.place(piece.slice(page).range)?))
    }

    /// The memory that may differ from zeros as it is now: what came, and, as a page that came may be the same as there, what the base has.
    pub(super) fn stored(&self) -> io::Result<Vec<GpaRange>> {
        let mut stored =
            self.laid_out.get().map_or_else(|| self.work.stored(), |laid_out| Ok(laid_out.stored()))?;
        let base = self.base.as_ref().map(|base| base.populated_as_written()).transpose()?;
        for range in base.into_iter().flatten() {
            let Some(range) = range.align_outward(self.page.bytes()) else { continue };
            for extent in self.placement().locate(range) {
                push(&mut stored, extent.range)?;
            }
        }
        Ok(stored)
    }

    /// Has those who write wait for a slow disk no longer than `until`.
    pub(super) fn wait_until(&self, until: Option<Instant>) {
        self.work.write_back.wait_until(until);
        self.laid_out.get().into_iter().for_each(|laid_out| laid_out.wait_until(until));
    }

    /// Brings to disk what was written until now, and waits for it, but no longer than `until`.
    pub(super) fn sync_until(&self, until: Option<Instant>) -> io::Result<()> {
        match self.laid_out.get() {
            Some(laid_out) => laid_out.sync_until(until),
            None => self.work.write_back.sync_until(until),
        }
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
            let differs = !same && !zero;
            cell.data = with_bit(cell.data, bit, differs && self.laid_out.get().is_none());
            // What is laid out holds zeros, too.
            cell.zero = with_bit(cell.zero, bit, zero && self.place(piece, &page).is_none());
            cell.presumed = with_bit(cell.presumed, bit, false);
            (page, differs)
        });
        let written = match self.laid_out.get() {
            Some(laid_out) => laid_out.store(piece, bytes, pages),
            None => self.work.write_parts(piece.offset, bytes, pages),
        };
        written.map_err(FillError::Write)
    }

    /// Has the file that holds it wait for the disk, if it is too far behind; returns what of it the work file has to wait for.
    fn wrote(&self, bytes: u64) -> Result<u64, FillError> {
        match self.laid_out.get() {
            Some(laid_out) => laid_out.wrote(bytes).map(|()| 0).map_err(FillError::Write),
            None => Ok(bytes),
        }
    }

    /// Begins to bring to disk what was written until now; does not wait for it.
    pub(super) fn hurry(&self) {
        match self.laid_out.get() {
            Some(laid_out) => laid_out.hurry(),
            None => self.work.hurry(),
        }
    }

    /// Lays the pages that have come out in `into`, an empty file, which takes no longer than `until`; then those that come later change
    /// only what is theirs. Returns whether they were.
    ///
    /// # Errors
    /// The pages cannot be read back or written.
    pub(super) fn lay_out(&self, into: File, until: Option<Instant>) -> Result<bool, SettleError> {
        let Some(laid_out) = self.laid_out_of(self.placement(), into, until)? else { return Ok(false) };
        self.cells.used().for_each(|(_, mut cell)| cell.data = 0);
        let _first = self.laid_out.set(laid_out);
        // Nothing is read of it any more.
        self.work.file().set_len(0).map_err(SettleError::Work)?;
        Ok(true)
    }

    fn laid_out_of(
        &self,
        kept: &Placement,
        into: File,
        until: Option<Instant>,
    ) -> Result<Option<LaidOut>, SettleError> {
        self.work.check_written().map_err(SettleError::Work)?;
        let runs = self.runs(kept, |cell| cell.data).map_err(SettleError::Work)?;
        let known = Placement::new(runs, &self.limits())?;
        LaidOut::new(into, known, self.page, self.threads, until, |range, bytes| {
            let mut parts = self.placement().parts_of(range);
            parts.try_for_each(|(extent, part)| {
                self.work.file().read_exact_at(&mut bytes[part], extent.offset)
            })
        })
    }

    /// What bounds lists of pages: there are no more of them than memory has.
    fn limits(&self) -> SnapshotLimits {
        let limits = SnapshotLimits { ranges: usize::MAX, ..SnapshotLimits::default() };
        SnapshotLimits { memory_bytes: self.placement().bytes(), ..limits }
    }

    /// Lays the pages that differ from the snapshot that `base` names, and lie in `kept`, out in `into`, back to back, unless they are
    /// laid out already, and brings them to disk. Returns how many bytes were moved because pages were left out, too.
    ///
    /// The work file is synced although it is removed later: only a sync after the last read shows that no page of it was lost. That sync
    /// has little to write, because the write-back throttle syncs the file all along.
    pub(super) fn settle(
        mut self,
        base: Digest,
        kept: &Placement,
        into: impl FnOnce() -> Result<File, WriteError>,
    ) -> Result<(Changes, BlockTable, u64), SettleError> {
        self.work.check_written().map_err(SettleError::Work)?;
        self.settle_presumed().map_err(SettleError::Work)?;
        let limits = self.limits();
        let zero_runs = self.runs(kept, |cell| cell.zero).map_err(SettleError::Work)?;
        let zero_runs = Placement::new(zero_runs, &limits)?;
        let laid_out = match self.laid_out.take() {
            Some(laid_out) => laid_out,
            None => {
                self.work.hurry();
                let laid_out = self.laid_out_of(kept, into()?, None)?;
                laid_out.expect("there is no end to the time it may take")
            }
        };
        self.work.finish(File::sync_data).map_err(SettleError::Work)?;
        let (runs, blocks, moved) = laid_out.finish(kept, &limits)?;
        Ok((Changes { base, runs, zero_runs }, blocks, moved))
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
            pages.settle(Digest::ZERO, &placement, || Ok(tempfile::tempfile().unwrap()))
        };
        assert_eq!(settle(written()).unwrap().0.runs, placement);

        let lost = || Err(io::Error::from(Errno::IO));
        let mut unsynced = written();
        unsynced.work.write_back = WriteBack::with(Box::new(lost), ThreadStart::NOTHING).unwrap();
        let error = settle(unsynced).unwrap_err();
        let io_error = Some(Errno::IO.raw_os_error());
        assert!(matches!(&error, SettleError::Work(source) if source.raw_os_error() == io_error), "{error}");

        let mut unsynced = written();
        unsynced.fill(ram, from_stream(&mut io::repeat(7))).unwrap();
        assert!(unsynced.lay_out(tempfile::tempfile().unwrap(), None).unwrap());
        unsynced.work.write_back = WriteBack::with(Box::new(lost), ThreadStart::NOTHING).unwrap();
        unsynced.work.hurry();
        let error =
            unsynced.settle(Digest::ZERO, &placement, || unreachable!("they are laid out")).unwrap_err();
        assert!(matches!(&error, SettleError::Work(_)), "{error}");

        let unwritten = written();
        unwritten.work.fail();
        assert!(matches!(settle(unwritten), Err(SettleError::Work(_))));
    }
}
