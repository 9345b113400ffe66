// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `memory-ranges` while it is written: zero pages are holes, and each block is hashed as its bytes pass.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard};

use rustix::fs::FallocateFlags;

use super::sparse_file::{FillError, SparseFile, wanted_runs};
use crate::granule::Granule;
use crate::range::GpaRange;
use crate::snapshot::disk::{data_parts, is_unsupported};
use crate::snapshot::format::{BlockTable, Digest, Extent, Placement, block_bytes_of_full, is_zero};
use crate::snapshot::parallel;
use crate::snapshot::reserve::{index, list_of, resize, zeros};
use crate::sync;
use crate::threads::ThreadStart;

/// Smallest part of the file that one thread writes at a time.
const LEAST_CELL_BYTES: u64 = 256 << 10;

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
    page_bytes: usize,
    block_bytes: usize,
    /// Locked while bytes of the block are written, so that digest and bytes agree.
    blocks: Vec<Mutex<Block>>,
    threads: ThreadStart,
}

impl FullPages {
    /// Takes an empty file and makes it one hole, for memory placed as in `placement`.
    pub(super) fn new(
        file: File,
        placement: Placement,
        page: Granule,
        threads: ThreadStart,
    ) -> io::Result<Self> {
        let block_bytes = block_bytes_of_full(placement.bytes(), page);
        let blocks = index(placement.bytes().div_ceil(block_bytes));
        let blocks = list_of(blocks, std::iter::repeat_with(Mutex::default))?;
        let sparse = SparseFile::new(file, placement, LEAST_CELL_BYTES.max(block_bytes), threads)?;
        let (page_bytes, block_bytes) = (index(page.bytes()), index(block_bytes));
        Ok(Self { sparse, page_bytes, block_bytes, blocks, threads })
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
    /// Blocks are compared by their digests, and only those that differ, or that were written in part, with what is in the file: most of
    /// it is not read, and need not be in memory any more.
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
            let mut written = 0;
            for part in self.perhaps_changed(piece, bytes) {
                resize(&mut before, part.len()).map_err(FillError::Read)?;
                let (old, offset) = (&mut before[..part.len()], piece.offset + part.start as u64);
                self.sparse.file().read_exact_at(old, offset).map_err(FillError::Write)?;
                for run in differing(old, &bytes[part.clone()], self.page_bytes) {
                    let run = part.start + run.start..part.start + run.end;
                    changed += run.len() as u64;
                    written += self.store(piece.slice(&run), &bytes[run]).map_err(FillError::Write)?;
                }
            }
            Ok(written)
        })?;
        Ok(changed)
    }

    /// The parts of `bytes` that are not whole blocks with the digests that these were written with.
    fn perhaps_changed(&self, piece: Extent, bytes: &[u8]) -> Vec<Range<usize>> {
        let first = index(piece.offset / self.block_bytes as u64);
        let start = index(piece.offset % self.block_bytes as u64);
        let parts = cut(start, bytes.len(), self.block_bytes).map(|(at, part)| {
            let number = first + at / self.block_bytes;
            let block = *locked(&self.blocks[number]);
            let is_known = block.unhashed == 0 && part.len() == self.block_length(number);
            let is_same = is_known && BlockTable::entry(&bytes[part.clone()]) == block.digest;
            (part, !is_same)
        });
        wanted_runs(parts)
    }

    pub(super) fn stored(&self) -> io::Result<Vec<GpaRange>> {
        self.sparse.stored()
    }

    /// Brings to disk what was written until now, and waits for it.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.sparse.file().sync_data()
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

    /// Moves the memory of `smaller`, whose every range this file holds, to that file; this one has no use after it.
    pub(super) fn move_to(self, smaller: &Self) -> Result<(), FillError> {
        self.sparse.check_written().map_err(FillError::Read)?;
        for part in data_parts(self.sparse.file(), self.placement().bytes()) {
            let part = part.map_err(FillError::Read)?;
            for range in self.placement().gpas(part.start, part.end - part.start) {
                for kept in smaller.placement().locate(range) {
                    smaller.fill(kept.range, |piece, buffer| self.read(piece, buffer))?;
                }
            }
        }
        self.sparse.finish(File::sync_data).map_err(FillError::Read)
    }

    fn read(&self, range: GpaRange, buffer: &mut [u8]) -> io::Result<()> {
        let mut parts = self.placement().parts_of(range);
        parts
            .try_for_each(|(extent, part)| self.sparse.file().read_exact_at(&mut buffer[part], extent.offset))
    }
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
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, flags, offset, length).map_err(io::Error::from) {
        Err(error) if is_unsupported(&error) => Ok(()),
        punched => punched,
    }
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
        FullPages::new(tempfile::tempfile().unwrap(), placement, Granule::KIB_4, ThreadStart::NOTHING)
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
    fn a_block_that_was_written_in_part_since_it_was_hashed_is_compared_with_the_file() {
        let (memory, block) = (memory_file(), GpaRange::new(0, LEAST_BLOCK_BYTES).unwrap());
        let page = GpaRange::new(4096, 4096).unwrap();
        let update = |byte| memory.update(block, from_stream(&mut io::repeat(byte))).unwrap();
        memory.fill(block, from_stream(&mut io::repeat(7))).unwrap();
        memory.fill(page, from_stream(&mut io::repeat(8))).unwrap();
        assert_eq!(update(7), 4096);
        assert_eq!(update(7), 0);
        assert_eq!(update(0), LEAST_BLOCK_BYTES);
        assert_eq!(update(0), 0);
        // What is known by its digest is not read.
        memory.sparse.file().set_len(0).unwrap();
        assert_eq!(update(0), 0);
    }

    #[test]
    fn what_was_read_back_of_a_file_that_lost_pages_is_not_trusted() {
        let lost = || Err(io::Error::from(Errno::IO));
        let moved = |memory: FullPages| {
            memory.move_to(&memory_file()).map_err(|error| match error {
                FillError::Read(error) => error,
                FillError::Write(error) => panic!("{error}"),
            })
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
