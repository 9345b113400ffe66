// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `memory-ranges` while it is written: zero pages are holes, and each block is hashed as its bytes pass.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use rustix::fs::FallocateFlags;

use super::sparse_file::{FillError, SparseFile, wanted_runs};
use crate::granule::Granule;
use crate::range::GpaRange;
use crate::snapshot::disk::{is_unsupported, next_data};
use crate::snapshot::format::{BlockTable, Digest, Extent, Placement, block_bytes_of_full, is_zero};
use crate::snapshot::parallel;
use crate::snapshot::reserve::{index, list_of, resize, zeros};
use crate::sync;
use crate::threads::ThreadStart;

/// Smallest part of the file that one thread writes at a time.
const LEAST_CELL_BYTES: u64 = 256 << 10;

/// How many times the blocks of a file there may be while it is written with memory that is left out in the end.
const MOST_BLOCKS_FACTOR: u64 = 2;

/// Bytes moved at once where memory is left out.
const MOVE_BYTES: u64 = 1 << 20;

/// What is known about a block.
#[derive(Debug, Clone, Copy, Default)]
struct Block {
    /// The digest when it was hashed last; `None` for zeros.
    digest: Option<Digest>,
    /// Bytes written since, where that did not replace the whole block.
    unhashed: usize,
}

impl Block {
    fn is_hole(&self) -> bool {
        self.digest.is_none() && self.unhashed == 0
    }
}

/// The file, and the digest of each of its blocks. Blocks of zeros are holes.
#[derive(Debug)]
pub(super) struct FullPages {
    sparse: SparseFile,
    page: Granule,
    page_bytes: usize,
    block_bytes: usize,
    /// Locked while bytes of the block are written, so that digest and bytes agree.
    blocks: Vec<Mutex<Block>>,
    threads: ThreadStart,
}

impl FullPages {
    /// Takes an empty file and makes it one hole, for memory placed as in `placement`, of which probably `expected` bytes are kept.
    pub(super) fn new(
        file: File,
        placement: Placement,
        page: Granule,
        expected: u64,
        threads: ThreadStart,
    ) -> io::Result<Self> {
        let block_bytes = block_bytes_while_written(placement.bytes(), expected, page);
        let blocks = index(placement.bytes().div_ceil(block_bytes));
        let blocks = list_of(blocks, std::iter::repeat_with(Mutex::default))?;
        let sparse = SparseFile::new(file, placement, LEAST_CELL_BYTES.max(block_bytes), threads)?;
        let (page_bytes, block_bytes) = (index(page.bytes()), index(block_bytes));
        Ok(Self { sparse, page, page_bytes, block_bytes, blocks, threads })
    }

    pub(super) fn placement(&self) -> &Placement {
        self.sparse.placement()
    }

    /// Writes the bytes of `range`, which `read` supplies; later bytes replace earlier ones.
    ///
    /// # Errors
    /// `range` is not all memory, or reading or writing failed; then some of the bytes may be written.
    pub(super) fn fill(
        &self,
        range: GpaRange,
        read: impl FnMut(GpaRange, &mut [u8]) -> io::Result<()>,
    ) -> Result<(), FillError> {
        self.sparse.fill(range, read, |piece, bytes| self.store(piece, bytes).map_err(FillError::Write))
    }

    /// Writes those pages of `range`, whose bytes `read` supplies, that differ from what was written; returns how many bytes those are.
    ///
    /// # Errors
    /// As [`FullPages::fill`].
    pub(super) fn update(
        &self,
        range: GpaRange,
        read: impl FnMut(GpaRange, &mut [u8]) -> io::Result<()>,
    ) -> Result<u64, FillError> {
        let (mut before, mut changed) = (Vec::new(), 0);
        self.sparse.fill(range, read, |piece, bytes| {
            resize(&mut before, bytes.len()).map_err(FillError::Read)?;
            let old = &mut before[..bytes.len()];
            self.sparse.file().read_exact_at(old, piece.offset).map_err(FillError::Write)?;
            let mut written = 0;
            for run in differing(old, bytes, self.page_bytes) {
                changed += run.len() as u64;
                written += self.store(piece.slice(&run), &bytes[run]).map_err(FillError::Write)?;
            }
            Ok(written)
        })?;
        Ok(changed)
    }

    pub(super) fn stored(&self) -> io::Result<Vec<GpaRange>> {
        self.sparse.stored()
    }

    /// Has those who write wait for a slow disk no longer than `until`.
    pub(super) fn wait_until(&self, until: Option<Instant>) {
        self.sparse.write_back.wait_until(until);
    }

    /// Brings to disk what was written until now, and waits for it, but no longer than `until`.
    pub(super) fn sync_until(&self, until: Option<Instant>) -> io::Result<()> {
        self.sparse.write_back.sync_until(until)
    }

    /// Puts bytes in their place; returns how many were written, the others being zeros of a hole.
    fn store(&self, piece: Extent, bytes: &[u8]) -> io::Result<u64> {
        let first = index(piece.offset / self.block_bytes as u64);
        let start = index(piece.offset % self.block_bytes as u64);
        // Every thread locks in ascending order, so that no two wait for each other.
        let touched = &self.blocks[first..first + (start + bytes.len()).div_ceil(self.block_bytes)];
        let mut blocks: Vec<_> = touched.iter().map(locked).collect();
        // A zero page is only written where the block may hold something already.
        let pages = cut(start, bytes.len(), self.page_bytes).map(|(at, page)| {
            let skip = blocks[at / self.block_bytes].is_hole() && is_zero(&bytes[page.clone()]);
            (page, !skip)
        });
        let written = self.sparse.write_parts(piece.offset, bytes, pages)?;
        for (at, part) in cut(start, bytes.len(), self.block_bytes) {
            let block = at / self.block_bytes;
            *blocks[block] = self.note(first + block, *blocks[block], &bytes[part])?;
        }
        Ok(written)
    }

    /// Returns what is known about a block after `part` was written to it.
    ///
    /// A block written in parts is hashed whenever as many bytes were written as it has, so that hashing takes no longer than writing,
    /// however small the parts are.
    fn note(&self, block: usize, before: Block, part: &[u8]) -> io::Result<Block> {
        let length = self.block_length(block);
        let after = Block { unhashed: before.unhashed + part.len(), ..before };
        if part.len() == length {
            self.settle(block, before, part)
        } else if before.is_hole() && is_zero(part) {
            Ok(before)
        } else if after.unhashed >= length {
            self.settle_from_file(block, after)
        } else {
            Ok(after)
        }
    }

    fn settle_from_file(&self, block: usize, before: Block) -> io::Result<Block> {
        let mut bytes = zeros(self.block_length(block))?;
        self.sparse.file().read_exact_at(&mut bytes, self.block_offset(block))?;
        self.settle(block, before, &bytes)
    }

    /// Hashes a block from all its bytes, and makes a hole of it where it became zeros.
    fn settle(&self, block: usize, before: Block, bytes: &[u8]) -> io::Result<Block> {
        let digest = BlockTable::entry(bytes);
        if digest.is_none() && !before.is_hole() {
            punch(self.sparse.file(), self.block_offset(block), bytes.len() as u64)?;
        }
        Ok(Block { digest, unhashed: 0 })
    }

    fn block_offset(&self, block: usize) -> u64 {
        block as u64 * self.block_bytes as u64
    }

    /// Bytes of a block: less than the others' at the end of the file.
    fn block_length(&self, block: usize) -> usize {
        index((self.placement().bytes() - self.block_offset(block)).min(self.block_bytes as u64))
    }

    /// Begins to bring to disk what was written until now; does not wait for it.
    pub(super) fn hurry(&self) {
        self.sparse.hurry();
    }

    /// Brings everything to disk and returns the digests.
    ///
    /// # Errors
    /// Bytes handed to [`FullPages::fill`], now or earlier, could not be written.
    pub(super) fn finish(self) -> io::Result<BlockTable> {
        self.sparse.check_written()?;
        // The disk works while the last blocks are hashed.
        self.hurry();
        let digests = self.digests(parallel::processors())?;
        self.sparse.finish(File::sync_all)?;
        Ok(BlockTable { block_bytes: self.block_bytes as u64, digests })
    }

    /// Hashes what was written in part since it was hashed, on at most so many threads, and returns the digests of all blocks.
    fn digests(&self, threads: usize) -> io::Result<Vec<Option<Digest>>> {
        let is_unsettled = |&block: &usize| locked(&self.blocks[block]).unhashed > 0;
        let unsettled = (0..self.blocks.len()).filter(is_unsettled);
        let unsettled = list_of(unsettled.clone().count(), unsettled)?;
        parallel::for_each(&unsettled, threads, self.threads, |&index| {
            let mut block = locked(&self.blocks[index]);
            *block = self.settle_from_file(index, *block)?;
            Ok::<_, io::Error>(())
        })?;
        list_of(self.blocks.len(), self.blocks.iter().map(|block| locked(block).digest))
    }

    /// Leaves out all but `memory`, which is ascending as this file's is; returns how many bytes had to be moved for that: those behind the
    /// first memory that is left out in the middle.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub(super) fn keep(&mut self, memory: Placement) -> io::Result<u64> {
        self.sparse.check_written()?;
        let (mut moved, mut same) = (0, memory.bytes());
        for kept in memory.extents() {
            for old in self.placement().locate(kept.range) {
                let to = kept.offset + (old.range.start() - kept.range.start());
                if to != old.offset {
                    same = same.min(to);
                    moved += self.move_down(old.offset, to, old.range.len())?;
                }
            }
        }
        self.sparse.write_back.wrote(moved)?;
        self.sparse.cut_off(memory)?;
        self.recount_blocks(same)?;
        Ok(moved)
    }

    /// Makes the blocks those of what the file holds now, with the digests of those that end before `same`, up to where nothing has changed.
    fn recount_blocks(&mut self, same: u64) -> io::Result<()> {
        let bytes = self.placement().bytes();
        let block_bytes = index(block_bytes_of_full(bytes, self.page));
        let old_bytes = std::mem::replace(&mut self.block_bytes, block_bytes) as u64;
        let count = index(bytes.div_ceil(block_bytes as u64));
        let old = std::mem::take(&mut self.blocks);
        let blocks = (0..bytes).step_by(block_bytes).map(|offset| {
            let end = bytes.min(offset + block_bytes as u64);
            let parts = &old[index(offset / old_bytes)..index(end.div_ceil(old_bytes))];
            let is_whole = parts.len() == 1 && old_bytes == block_bytes as u64 && end - offset == old_bytes;
            let is_hole = end <= same && parts.iter().all(|block| locked(block).is_hole());
            match end <= same && is_whole {
                true => Mutex::new(*locked(&parts[0])),
                false => Mutex::new(Block { digest: None, unhashed: usize::from(!is_hole) }),
            }
        });
        self.blocks = list_of(count, blocks)?;
        Ok(())
    }

    /// Moves `length` bytes at `from` down to `to`, holes as holes; returns how many bytes that are no holes.
    fn move_down(&self, from: u64, to: u64, length: u64) -> io::Result<u64> {
        let (file, end) = (self.sparse.file(), from + length);
        let mut buffer = zeros(index(MOVE_BYTES.min(length)))?;
        let (mut at, mut moved) = (from, 0);
        while at < end {
            let data = next_data(file, at, end)?.unwrap_or(end..end);
            clear(file, to + (at - from), data.start - at)?;
            at = data.start;
            while at < data.end {
                let bytes = &mut buffer[..index(MOVE_BYTES.min(data.end - at))];
                file.read_exact_at(bytes, at)?;
                file.write_all_at(bytes, to + (at - from))?;
                (at, moved) = (at + bytes.len() as u64, moved + bytes.len() as u64);
            }
        }
        Ok(moved)
    }
}

/// Bytes per block while a file of `announced` bytes is written, of which probably `expected` are kept. However few these are, there are
/// not many more blocks than of all that was announced: a source may announce what it likes.
pub(super) fn block_bytes_while_written(announced: u64, expected: u64, page: Granule) -> u64 {
    let least = block_bytes_of_full(announced, page) / MOST_BLOCKS_FACTOR;
    block_bytes_of_full(expected.min(announced), page).max(least)
}

/// Cuts `length` bytes that begin at `start` of something where they cross multiples of `unit`: where each part begins there, and
/// which bytes it is.
fn cut(start: usize, length: usize, unit: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
    let mut next = 0;
    std::iter::from_fn(move || {
        let (at, from) = (start + next, next);
        next = length.min((at / unit + 1) * unit - start);
        (from < length).then_some((at, from..next))
    })
}

/// The runs of units in which two buffers of one length differ.
fn differing(old: &[u8], new: &[u8], unit: usize) -> Vec<Range<usize>> {
    let units = (0..).step_by(unit).zip(old.chunks(unit).zip(new.chunks(unit)));
    wanted_runs(units.map(|(start, (old, new))| (start..start + new.len(), old != new)))
}

fn locked(block: &Mutex<Block>) -> MutexGuard<'_, Block> {
    sync::lock(block)
}

/// Makes a hole, where the file system knows how; bytes there are zero already.
fn punch(file: &File, offset: u64, length: u64) -> io::Result<()> {
    match make_hole(file, offset, length) {
        Err(error) if is_unsupported(&error) => Ok(()),
        punched => punched,
    }
}

/// Makes `length` bytes zeros: a hole, where the file system knows how.
fn clear(file: &File, offset: u64, length: u64) -> io::Result<()> {
    match make_hole(file, offset, length) {
        Err(error) if is_unsupported(&error) => {
            let zeros = zeros(index(MOVE_BYTES.min(length)))?;
            (0..length).step_by(index(MOVE_BYTES)).try_for_each(|at| {
                file.write_all_at(&zeros[..index(MOVE_BYTES.min(length - at))], offset + at)
            })
        }
        cleared => cleared,
    }
}

fn make_hole(file: &File, offset: u64, length: u64) -> io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(file, flags, offset, length)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustix::io::Errno;

    use super::*;
    use crate::snapshot::disk::WriteBack;
    use crate::snapshot::format::LEAST_BLOCK_BYTES;
    use crate::snapshot::format::SnapshotLimits;
    use crate::snapshot::write::sparse_file::from_stream;

    /// Not whole cells, and in the end not a whole block.
    const BYTES: u64 = 5 * LEAST_CELL_BYTES + 3 * LEAST_BLOCK_BYTES + 4096;

    fn memory_file() -> FullPages {
        let ram = GpaRange::new(0, BYTES).unwrap();
        let placement = Placement::new([ram], &SnapshotLimits::default()).unwrap();
        FullPages::new(tempfile::tempfile().unwrap(), placement, Granule::KIB_4, BYTES, ThreadStart::NOTHING)
            .unwrap()
    }

    proptest! {
        #[test]
        fn any_number_of_threads_hashes_what_one_that_reads_the_file_does(
            writes in prop::collection::vec((0..BYTES, 1..40_000_u64, 0..3_u8), 0..60),
            threads in 1..9_usize,
        ) {
            let memory = memory_file();
            let mut model = vec![0; index(BYTES)];
            for (start, length, byte) in writes {
                let range = GpaRange::from_bounds(start, BYTES.min(start + length)).unwrap();
                memory.fill(range, from_stream(&mut io::repeat(byte))).unwrap();
                model[index(range.start())..index(range.end())].fill(byte);
            }
            let naive: Vec<_> = model.chunks(index(LEAST_BLOCK_BYTES)).map(BlockTable::entry).collect();
            prop_assert_eq!(memory.digests(threads).unwrap(), naive.clone());
            prop_assert!(memory.blocks.iter().all(|block| locked(block).unhashed == 0));
            prop_assert_eq!(memory.finish().unwrap().digests, naive);
        }
    }

    fn fill(memory: &FullPages) {
        memory.fill(GpaRange::new(0, BYTES).unwrap(), from_stream(&mut io::repeat(7))).unwrap();
    }

    #[test]
    fn pages_that_are_as_they_were_are_not_written_again() {
        let (memory, block) = (memory_file(), GpaRange::new(0, LEAST_BLOCK_BYTES).unwrap());
        let page = GpaRange::new(4096, 4096).unwrap();
        let update = |byte| memory.update(block, from_stream(&mut io::repeat(byte))).unwrap();
        memory.fill(block, from_stream(&mut io::repeat(7))).unwrap();
        memory.fill(page, from_stream(&mut io::repeat(8))).unwrap();
        assert_eq!(update(7), 4096);
        assert_eq!(update(7), 0);
        assert_eq!(update(0), LEAST_BLOCK_BYTES);
        assert_eq!(update(0), 0);
    }

    #[test]
    fn what_was_read_back_of_a_file_that_lost_pages_is_not_trusted() {
        let lost = || Err(io::Error::from(Errno::IO));
        let moved = |mut memory: FullPages| {
            let upper = GpaRange::from_bounds(4096, BYTES).unwrap();
            memory.keep(Placement::new([upper], &SnapshotLimits::default()).unwrap())?;
            memory.finish().map(drop)
        };
        for end in [|memory: FullPages| memory.finish().map(drop), moved] {
            let whole = memory_file();
            fill(&whole);
            end(whole).unwrap();

            let mut unsynced = memory_file();
            unsynced.sparse.write_back = WriteBack::with(Box::new(lost), ThreadStart::NOTHING).unwrap();
            fill(&unsynced);
            unsynced.hurry();
            assert_eq!(end(unsynced).unwrap_err().raw_os_error(), Some(Errno::IO.raw_os_error()));

            let unwritten = memory_file();
            unwritten.sparse.fail();
            assert!(unwritten.sparse.check_written().is_err());
            assert!(end(unwritten).is_err());
        }
    }

    proptest! {
        #[test]
        fn what_is_kept_is_as_it_was_and_only_what_lies_behind_a_gap_moves(
            writes in prop::collection::vec((0..BYTES / 4096, 1..40_u64, 0..3_u8), 0..20),
            kept in prop::collection::btree_set(0..BYTES / 4096, 2..9),
        ) {
            let (mut memory, mut naive) = (memory_file(), vec![0_u8; index(BYTES)]);
            for (page, pages, byte) in writes {
                let range = GpaRange::from_bounds(page * 4096, BYTES.min((page + pages) * 4096)).unwrap();
                memory.fill(range, from_stream(&mut io::repeat(byte))).unwrap();
                naive[index(range.start())..index(range.end())].fill(byte);
            }
            let bounds: Vec<_> = kept.into_iter().map(|page| page * 4096).collect();
            let ranges: Vec<_> = bounds.chunks_exact(2).map(|pair| GpaRange::from_bounds(pair[0], pair[1]).unwrap()).collect();
            let naive: Vec<u8> = ranges.iter().flat_map(|range| &naive[index(range.start())..index(range.end())]).copied().collect();
            let is_prefix = ranges.len() == 1 && ranges[0].start() == 0;
            let kept = Placement::new(ranges, &SnapshotLimits::default()).unwrap();
            let moved = memory.keep(kept).unwrap();
            prop_assert!(moved <= naive.len() as u64 && (moved == 0 || !is_prefix));
            let file = memory.sparse.file().try_clone().unwrap();
            let table = memory.finish().unwrap();
            let mut found = vec![0; naive.len()];
            file.read_exact_at(&mut found, 0).unwrap();
            prop_assert!(found == naive && file.metadata().unwrap().len() == naive.len() as u64);
            let digests: Vec<_> = naive.chunks(index(LEAST_BLOCK_BYTES)).map(BlockTable::entry).collect();
            prop_assert_eq!(table, BlockTable { block_bytes: LEAST_BLOCK_BYTES, digests });
        }
    }

    #[test]
    fn what_was_announced_and_left_out_at_the_end_costs_nothing_where_it_was_expected() {
        const ANNOUNCED: u64 = 17 << 30;
        let kept = GpaRange::new(0, 5 * LEAST_BLOCK_BYTES + 4096).unwrap();
        let placement =
            |bytes| Placement::new([GpaRange::new(0, bytes).unwrap()], &SnapshotLimits::default()).unwrap();
        for (expected, block_bytes) in [(ANNOUNCED, 2 * LEAST_BLOCK_BYTES), (kept.len(), LEAST_BLOCK_BYTES)] {
            let file = tempfile::tempfile().unwrap();
            let mut memory =
                FullPages::new(file, placement(ANNOUNCED), Granule::KIB_4, expected, ThreadStart::NOTHING)
                    .unwrap();
            assert_eq!(memory.block_bytes as u64, block_bytes);
            memory.fill(kept, from_stream(&mut io::repeat(7))).unwrap();
            let digests = vec![Some(Digest::of(&vec![7; index(LEAST_BLOCK_BYTES)])); 5];
            let last = Some(Digest::of(&[7; 4096]));
            assert_eq!(memory.keep(placement(kept.len())).unwrap(), 0);
            let unsettled = memory.blocks.iter().filter(|block| locked(block).unhashed > 0).count();
            assert_eq!(unsettled, if block_bytes == LEAST_BLOCK_BYTES { 1 } else { 6 });
            let table = memory.finish().unwrap();
            assert_eq!(table.digests, [digests, vec![last]].concat());
        }
    }

    #[test]
    fn what_a_source_announces_makes_no_more_blocks_than_twice_the_most() {
        for announced in [1 << 20, 17 << 30, 1 << 40, 16 << 40, 64 << 40] {
            for expected in [0, 1 << 20, announced / 2, announced, u64::MAX] {
                let block_bytes = block_bytes_while_written(announced, expected, Granule::KIB_4);
                assert!(block_bytes.is_power_of_two());
                assert!(announced.div_ceil(block_bytes) <= 2 << 20, "{announced} {expected}");
            }
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_has_no_digests() {
        let memory = memory_file();
        for cell in 0..5 {
            let page = GpaRange::new(cell * LEAST_CELL_BYTES, 4096).unwrap();
            memory.fill(page, from_stream(&mut io::repeat(7))).unwrap();
        }
        memory.sparse.file().set_len(LEAST_CELL_BYTES).unwrap();
        for threads in [1, 4] {
            assert_eq!(memory.digests(threads).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}
