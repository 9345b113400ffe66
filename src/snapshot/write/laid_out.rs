// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `memory-changes`: the pages of a differential back to back.
//!
//! They may be laid out before the last ones have come, while the VM runs. What comes for a page that has its place by then goes there,
//! whatever it is; other pages follow behind. So the pause costs what changes late, not all that differs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use thiserror::Error;

use super::sparse_file::wanted_runs;
use crate::granule::Granule;
use crate::range::GpaRange;
use crate::snapshot::disk::{WriteBack, WriteError};
use crate::snapshot::format::{
    BlockTable, Digest, Extent, Placement, PlacementError, SnapshotLimits, block_bytes_for,
};
use crate::snapshot::parallel;
use crate::snapshot::reserve::{index, list_of, push, resize, zeros};
use crate::sync;
use crate::threads::ThreadStart;

/// Bytes that one thread lays out, or hashes, at a time, if no block is larger.
const PIECE_BYTES: u64 = 1 << 20;

/// Why pages could not be put back to back.
#[derive(Debug, Error)]
pub(super) enum SettleError {
    /// The work file is not what was written to it, or cannot be read.
    #[error("Cannot read the pages back from the work file")]
    Work(#[source] io::Error),
    /// The pages could not be written in their order.
    #[error("Cannot put the pages back to back")]
    Copy(#[source] io::Error),
    #[error(transparent)]
    Placement(#[from] PlacementError),
    #[error(transparent)]
    Make(#[from] WriteError),
}

/// The file, with the pages that were known when they were laid out, and those that came later.
#[derive(Debug)]
pub(super) struct LaidOut {
    file: File,
    /// Pages that were known, ascending.
    known: Placement,
    page: Granule,
    block_bytes: u64,
    /// Of the blocks of `known`.
    digests: Vec<Mutex<Option<Digest>>>,
    late: Mutex<Late>,
    write_back: WriteBack,
    threads: ThreadStart,
}

/// What came after the pages were laid out.
#[derive(Debug, Default)]
struct Late {
    /// Pages behind the known ones, in the order of the file; two that touch are one range.
    appended: Vec<GpaRange>,
    /// Where each of them is, by its address.
    places: BTreeMap<u64, u64>,
    /// End of the file.
    end: u64,
    /// Blocks that were written since they were hashed.
    unhashed: BTreeSet<u64>,
}

impl LaidOut {
    /// Lays the pages of `known` out in an empty file, on all processors; `read` supplies them. Returns `None`, and leaves the file empty,
    /// where that would take longer than `until`.
    ///
    /// # Errors
    /// `read` failed, or the file could not be written.
    pub(super) fn new(
        file: File,
        known: Placement,
        page: Granule,
        threads: ThreadStart,
        until: Option<Instant>,
        read: impl Fn(GpaRange, &mut [u8]) -> io::Result<()> + Sync,
    ) -> Result<Option<Self>, SettleError> {
        let block_bytes = block_bytes_for(known.bytes(), page.bytes());
        let blocks = index(known.bytes().div_ceil(block_bytes));
        let digests = list_of(blocks, std::iter::repeat_with(Mutex::default)).map_err(SettleError::Copy)?;
        let late = Mutex::new(Late { end: known.bytes(), ..Late::default() });
        let write_back = WriteBack::start(&file, threads).map_err(SettleError::Copy)?;
        write_back.wait_until(until);
        let laid = Self { file, known, page, block_bytes, digests, late, write_back, threads };
        let pieces: Vec<_> = (0..laid.known.bytes()).step_by(index(PIECE_BYTES.max(block_bytes))).collect();
        let is_late = || until.is_some_and(|until| Instant::now() >= until);
        parallel::for_each(&pieces, parallel::processors(), threads, |&offset| {
            if is_late() { Ok(()) } else { laid.lay_out(offset, &read) }
        })?;
        if is_late() {
            laid.file.set_len(0).map_err(SettleError::Copy)?;
            return Ok(None);
        }
        laid.write_back.wait_until(None);
        Ok(Some(laid))
    }

    /// Lays out the piece at `offset`, and hashes its blocks.
    fn lay_out(
        &self,
        offset: u64,
        read: &impl Fn(GpaRange, &mut [u8]) -> io::Result<()>,
    ) -> Result<(), SettleError> {
        let length = PIECE_BYTES.max(self.block_bytes).min(self.known.bytes() - offset);
        let mut bytes = zeros(index(length)).map_err(SettleError::Copy)?;
        let mut at = 0;
        for range in self.known.gpas(offset, length) {
            let end = at + index(range.len());
            read(range, &mut bytes[at..end]).map_err(SettleError::Work)?;
            at = end;
        }
        let first = index(offset / self.block_bytes);
        for (block, bytes) in (first..).zip(bytes.chunks(index(self.block_bytes))) {
            *sync::lock(&self.digests[block]) = BlockTable::entry(bytes);
        }
        let written = self.file.write_all_at(&bytes, offset).and_then(|()| self.write_back.wrote(length));
        written.map_err(SettleError::Copy)
    }

    /// Where a page is in the file.
    pub(super) fn place(&self, page: GpaRange) -> Option<u64> {
        let known = self.known.locate(page).next().map(|extent| extent.offset);
        known.or_else(|| self.late().places.get(&page.start()).copied())
    }

    /// Reads the page at `place`.
    pub(super) fn read(&self, place: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, place)
    }

    /// Writes those `pages` of a piece, ascending parts of its `bytes`, that have a place, and behind all others those that differ and have
    /// none; returns how many bytes those are.
    pub(super) fn store(
        &self,
        piece: Extent,
        bytes: &[u8],
        pages: impl Iterator<Item = (Range<usize>, bool)>,
    ) -> io::Result<u64> {
        let (mut written, mut placeless) = (0, Vec::new());
        for (page, differs) in pages {
            let place = self.place(piece.slice(&page).range);
            if let Some(place) = place {
                self.replace(place, &bytes[page.clone()])?;
                written += page.len() as u64;
            }
            placeless.push((page, differs && place.is_none()));
        }
        for run in wanted_runs(placeless.into_iter()) {
            written += run.len() as u64;
            self.append(piece.slice(&run).range, &bytes[run])?;
        }
        Ok(written)
    }

    /// Writes a page at its `place`.
    fn replace(&self, place: u64, bytes: &[u8]) -> io::Result<()> {
        self.late().unhashed.insert(place / self.block_bytes);
        self.file.write_all_at(bytes, place)
    }

    /// Writes pages that have no place behind all others, in a row.
    fn append(&self, range: GpaRange, bytes: &[u8]) -> io::Result<()> {
        let mut late = self.late();
        let place = late.end;
        late.end += range.len();
        let pages = range.pieces(self.page.bytes());
        late.places.extend(pages.map(|page| (page.start(), place + (page.start() - range.start()))));
        let end = late.end.div_ceil(self.block_bytes);
        late.unhashed.extend(place / self.block_bytes..end);
        let joined = late.appended.pop_if(|last| last.end() == range.start());
        let start = joined.map_or(range.start(), GpaRange::start);
        push(&mut late.appended, GpaRange::from_bounds(start, range.end()).expect("it only grows"))?;
        drop(late);
        self.file.write_all_at(bytes, place)
    }

    /// The pages that have a place.
    pub(super) fn stored(&self) -> Vec<GpaRange> {
        self.known.ranges().chain(self.late().appended.iter().copied()).collect()
    }

    /// Takes in that so many bytes were stored, and waits where the disk is too far behind.
    pub(super) fn wrote(&self, bytes: u64) -> io::Result<()> {
        self.write_back.wrote(bytes)
    }

    /// Has those who write wait for a slow disk no longer than `until`.
    pub(super) fn wait_until(&self, until: Option<Instant>) {
        self.write_back.wait_until(until);
    }

    pub(super) fn hurry(&self) {
        self.write_back.hurry();
    }

    /// Brings to disk what was written until now, and waits for it, but no longer than `until`.
    pub(super) fn sync_until(&self, until: Option<Instant>) -> io::Result<()> {
        self.write_back.sync_until(until)
    }

    /// Leaves out all but the pages in `kept`, hashes what was not, and brings everything to disk.
    ///
    /// Returns the pages in the order of the file, its digests, and how many bytes had to be moved because others were left out.
    ///
    /// # Errors
    /// The file cannot be read or written, or there are too many runs of pages.
    pub(super) fn finish(
        self,
        kept: &Placement,
        limits: &SnapshotLimits,
    ) -> Result<(Placement, BlockTable, u64), SettleError> {
        let all = Placement::new(self.stored(), limits)?;
        let runs =
            Placement::new(all.ranges().flat_map(|run| kept.locate(run)).map(|part| part.range), limits)?;
        let settle = || {
            let (moved, same) = self.move_down(&all, &runs)?;
            self.file.set_len(runs.bytes())?;
            self.hurry();
            let table = self.digest(&runs, same)?;
            Ok((moved, table))
        };
        let (moved, table) = settle().map_err(SettleError::Copy)?;
        self.write_back.finish().map_err(SettleError::Copy)?;
        self.file.sync_all().map_err(SettleError::Copy)?;
        Ok((runs, table, moved))
    }

    /// Moves the pages of `runs`, which are some of `all` in their order, to where `runs` has them; returns how many bytes that were, and
    /// the offset before which none was.
    fn move_down(&self, all: &Placement, runs: &Placement) -> io::Result<(u64, u64)> {
        let (mut moved, mut same, mut buffer) = (0, runs.bytes(), Vec::new());
        for run in runs.extents() {
            for from in all.locate(run.range).flat_map(|extent| extent.cut(PIECE_BYTES)) {
                let to = run.offset + (from.range.start() - run.range.start());
                if to == from.offset {
                    continue;
                }
                resize(&mut buffer, index(from.range.len()))?;
                let bytes = &mut buffer[..index(from.range.len())];
                self.file.read_exact_at(bytes, from.offset)?;
                self.file.write_all_at(bytes, to)?;
                (moved, same) = (moved + from.range.len(), same.min(to));
            }
        }
        Ok((moved, same))
    }

    /// Returns the digests of the file, which holds `runs` and is as it was up to `same`.
    fn digest(&self, runs: &Placement, same: u64) -> io::Result<BlockTable> {
        let block_bytes = block_bytes_for(runs.bytes(), self.page.bytes());
        let blocks = runs.bytes().div_ceil(block_bytes);
        let late = self.late();
        // Where a block ends tells whether it has as many bytes as when it was hashed.
        let end = |block: u64, bytes: u64| bytes.min((block + 1) * block_bytes);
        let is_known = |block: u64| {
            let ends = end(block, runs.bytes());
            let is_same = ends <= same && ends == end(block, self.known.bytes());
            block_bytes == self.block_bytes && is_same && !late.unhashed.contains(&block)
        };
        let entry = |block| if is_known(block) { *sync::lock(&self.digests[index(block)]) } else { None };
        let digests = list_of(index(blocks), (0..blocks).map(|block| Mutex::new(entry(block))))?;
        let unknown = (0..blocks).filter(|&block| !is_known(block));
        let unknown: Vec<_> = list_of(unknown.clone().count(), unknown)?;
        parallel::for_each(&unknown, parallel::processors(), self.threads, |&block| {
            let offset = block * block_bytes;
            let mut bytes = zeros(index(block_bytes.min(runs.bytes() - offset)))?;
            self.file.read_exact_at(&mut bytes, offset)?;
            *sync::lock(&digests[index(block)]) = BlockTable::entry(&bytes);
            Ok::<_, io::Error>(())
        })?;
        let digests = list_of(digests.len(), digests.iter().map(|digest| *sync::lock(digest)))?;
        Ok(BlockTable { block_bytes, digests })
    }

    fn late(&self) -> MutexGuard<'_, Late> {
        sync::lock(&self.late)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;
    const PAGE_BYTES: usize = 4096;

    fn pages(first: u64, count: u64) -> GpaRange {
        GpaRange::new(first * PAGE, count * PAGE).unwrap()
    }

    fn placement(ranges: &[GpaRange]) -> Placement {
        Placement::new(ranges.iter().copied(), &SnapshotLimits::default()).unwrap()
    }

    /// Pages 4..8 and 20..22, each full of its number.
    fn laid_out(until: Option<Instant>) -> Option<LaidOut> {
        let fill = |range: GpaRange, bytes: &mut [u8]| {
            let page = |at: usize| u8::try_from(range.start() / PAGE).unwrap() + u8::try_from(at).unwrap();
            bytes.chunks_mut(PAGE_BYTES).enumerate().for_each(|(at, bytes)| bytes.fill(page(at)));
            Ok(())
        };
        let known = placement(&[pages(4, 4), pages(20, 2)]);
        let file = tempfile::tempfile().unwrap();
        LaidOut::new(file, known, Granule::KIB_4, ThreadStart::NOTHING, until, fill).unwrap()
    }

    fn finish(laid_out: LaidOut, kept: &[GpaRange]) -> (Vec<GpaRange>, Vec<u8>, Vec<Option<Digest>>, u64) {
        let file = laid_out.file.try_clone().unwrap();
        let (runs, table, moved) = laid_out.finish(&placement(kept), &SnapshotLimits::default()).unwrap();
        let mut bytes = vec![0; index(runs.bytes())];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!((file.metadata().unwrap().len(), table.block_bytes), (runs.bytes(), PAGE));
        let first = bytes.chunks(PAGE_BYTES).map(|page| page[0]).collect();
        (runs.ranges().collect(), first, table.digests, moved / PAGE)
    }

    fn store(laid_out: &LaidOut, page: GpaRange, bytes: &[u8]) {
        let stored = match laid_out.place(page) {
            Some(place) => laid_out.replace(place, bytes),
            None => laid_out.append(page, bytes),
        };
        stored.unwrap();
    }

    fn digests(pages: &[u8]) -> Vec<Option<Digest>> {
        pages.iter().map(|&byte| BlockTable::entry(&[byte; PAGE_BYTES])).collect()
    }

    #[test]
    fn pages_that_come_late_go_to_their_places_and_new_ones_behind() {
        let laid_out = laid_out(None).unwrap();
        for (page, byte) in [(5, 50), (30, 30), (31, 31), (2, 2), (21, 0), (30, 32)] {
            store(&laid_out, pages(page, 1), &[byte; PAGE_BYTES]);
        }
        // Neither written nor hashed again.
        laid_out.file.write_all_at(&[99; PAGE_BYTES], 0).unwrap();
        let (runs, bytes, table, moved) = finish(laid_out, &[pages(0, 64)]);
        assert_eq!(runs, [pages(4, 4), pages(20, 2), pages(30, 2), pages(2, 1)]);
        assert_eq!(bytes, [99, 50, 6, 7, 20, 0, 32, 31, 2]);
        assert_eq!(table, digests(&[4, 50, 6, 7, 20, 0, 32, 31, 2]));
        assert_eq!(moved, 0);
    }

    #[test]
    fn pages_that_are_left_out_in_the_end_make_those_behind_them_move_down() {
        let laid_out = laid_out(None).unwrap();
        store(&laid_out, pages(30, 1), &[30; PAGE_BYTES]);
        let (runs, bytes, table, moved) = finish(laid_out, &[pages(0, 5), pages(7, 40)]);
        assert_eq!(runs, [pages(4, 1), pages(7, 1), pages(20, 2), pages(30, 1)]);
        assert_eq!(bytes, [4, 7, 20, 21, 30]);
        assert_eq!((table, moved), (digests(&bytes), 4));
    }

    #[test]
    fn pages_that_the_disk_did_not_take_are_not_trusted() {
        let mut laid_out = laid_out(None).unwrap();
        let lost = || Err(io::Error::from(rustix::io::Errno::IO));
        laid_out.write_back = WriteBack::with(Box::new(lost), ThreadStart::NOTHING).unwrap();
        store(&laid_out, pages(5, 1), &[50; PAGE_BYTES]);
        let error = laid_out.finish(&placement(&[pages(0, 64)]), &SnapshotLimits::default()).unwrap_err();
        assert!(
            matches!(&error, SettleError::Copy(source) if source.raw_os_error() == Some(libc::EIO)),
            "{error}"
        );
    }

    #[test]
    fn what_would_take_too_long_is_left_for_later() {
        assert!(laid_out(Some(Instant::now())).is_none());
    }
}
