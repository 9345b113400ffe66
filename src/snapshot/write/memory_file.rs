// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `memory-ranges` while it is written: sparse, from any number of threads, each block hashed as its bytes pass.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::FallocateFlags;

use crate::granule::Granule;
use crate::range::GpaRange;
use crate::snapshot::disk::files::{data_parts, extend, is_unsupported};
use crate::snapshot::disk::flusher::Flusher;
use crate::snapshot::format::blocks::{BlockTable, block_bytes_for, is_zero};
use crate::snapshot::format::digest::Digest;
use crate::snapshot::format::placement::{Extent, Placement};
use crate::snapshot::parallel;
use crate::snapshot::reserve::{list_of, zeros};
use crate::snapshot::write::feed::{Feed, FeedError};
use crate::threads::ThreadStart;

/// Smallest block that gets a digest: as little as is hashed at full speed.
pub(crate) const LEAST_BLOCK_BYTES: u64 = 16 << 10;
/// Smallest part of the file that one thread writes at a time.
const LEAST_CELL_BYTES: u64 = 256 << 10;

/// What is known of a block.
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
pub(crate) struct MemoryFile {
    file: File,
    feed: Feed,
    page_bytes: usize,
    block_bytes: usize,
    /// Locked while bytes of the block are written, so that digest and bytes agree.
    blocks: Vec<Mutex<Block>>,
    flusher: Flusher,
    threads: ThreadStart,
    failed: AtomicBool,
}

impl MemoryFile {
    /// Takes an empty file and makes it one hole, for memory placed as in `placement`.
    pub(crate) fn new(
        file: File,
        placement: Placement,
        page: Granule,
        threads: ThreadStart,
    ) -> io::Result<Self> {
        let bytes = placement.bytes();
        extend(&file, bytes)?;
        let block_bytes = block_bytes_for(bytes, LEAST_BLOCK_BYTES.max(page.bytes()));
        let feed = Feed::new(placement, LEAST_CELL_BYTES.max(block_bytes));
        let blocks = list_of(index(bytes.div_ceil(block_bytes)), std::iter::repeat_with(Mutex::default))?;
        let (flusher, failed) = (Flusher::start(&file, threads)?, AtomicBool::new(false));
        let (page_bytes, block_bytes) = (index(page.bytes()), index(block_bytes));
        Ok(Self { file, feed, page_bytes, block_bytes, blocks, flusher, threads, failed })
    }

    pub(crate) fn placement(&self) -> &Placement {
        self.feed.placement()
    }

    /// Writes the bytes of `range`, which `read` supplies; later bytes replace earlier ones.
    ///
    /// # Errors
    /// `range` is not all memory, or reading or writing failed; then some of the bytes may be written.
    pub(crate) fn fill(
        &self,
        range: GpaRange,
        read: impl FnMut(GpaRange, &mut [u8]) -> io::Result<()>,
    ) -> Result<(), FeedError> {
        self.feed.run(range, read, |piece, bytes| {
            // Waiting for the disk comes after, with no cell locked.
            let stored = self.store(piece, bytes).and_then(|written| self.flusher.wrote(written));
            stored.inspect_err(|_| self.failed.store(true, Ordering::Relaxed)).map_err(FeedError::Write)
        })
    }

    /// Puts bytes in their place; returns how many were written, the others being zeros of a hole.
    fn store(&self, piece: Extent, bytes: &[u8]) -> io::Result<u64> {
        let first = index(piece.offset / self.block_bytes as u64);
        let start = index(piece.offset % self.block_bytes as u64);
        // All of them, ascending, as everybody does: nobody waits for who waits for him.
        let touched = &self.blocks[first..first + (start + bytes.len()).div_ceil(self.block_bytes)];
        let mut blocks: Vec<_> = touched.iter().map(locked).collect();
        let written = self.write_sparsely(&blocks, piece.offset, start, bytes)?;
        let mut rest = bytes;
        while !rest.is_empty() {
            let at = start + bytes.len() - rest.len();
            let block = at / self.block_bytes;
            let (part, after) = rest.split_at(rest.len().min((block + 1) * self.block_bytes - at));
            *blocks[block] = self.note(first + block, *blocks[block], part)?;
            rest = after;
        }
        Ok(written)
    }

    /// Writes pages that hold something, and pages of zeros only where a block may hold something already.
    ///
    /// Returns the number of bytes written.
    fn write_sparsely(
        &self,
        blocks: &[MutexGuard<'_, Block>],
        offset: u64,
        start: usize,
        bytes: &[u8],
    ) -> io::Result<u64> {
        let mut written = 0;
        let mut run = 0..0;
        let mut at = 0;
        while at < bytes.len() {
            let end =
                bytes.len().min((start + at) / self.page_bytes * self.page_bytes + self.page_bytes - start);
            let skip = blocks[(start + at) / self.block_bytes].is_hole() && is_zero(&bytes[at..end]);
            if skip {
                written += self.write_run(offset, bytes, run)?;
                run = end..end;
            } else {
                run.end = end;
            }
            at = end;
        }
        written += self.write_run(offset, bytes, run)?;
        Ok(written)
    }

    fn write_run(&self, offset: u64, bytes: &[u8], run: std::ops::Range<usize>) -> io::Result<u64> {
        let length = run.len() as u64;
        if length > 0 {
            self.file.write_all_at(&bytes[run.clone()], offset + run.start as u64)?;
        }
        Ok(length)
    }

    /// Returns what is known of a block that `part` was just written to.
    ///
    /// A block written in parts is hashed each time that as many bytes were written as it has, however small the parts:
    /// hashing takes no longer than writing does.
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
        self.file.read_exact_at(&mut bytes, self.block_offset(block))?;
        self.settle(block, before, &bytes)
    }

    /// Hashes a block from all its bytes, and makes a hole of it where it became zeros.
    fn settle(&self, block: usize, before: Block, bytes: &[u8]) -> io::Result<Block> {
        let digest = BlockTable::entry(bytes);
        if digest.is_none() && !before.is_hole() {
            punch(&self.file, self.block_offset(block), bytes.len() as u64)?;
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
    pub(crate) fn hurry(&self) {
        self.flusher.hurry();
    }

    /// Brings everything to disk and returns the digests.
    ///
    /// # Errors
    /// Bytes handed to [`MemoryFile::fill`], now or earlier, could not be written.
    pub(crate) fn finish(self) -> io::Result<BlockTable> {
        self.check_written()?;
        // The disk works while the last blocks are hashed.
        self.flusher.hurry();
        let digests = self.digests(parallel::processors())?;
        self.flusher.finish()?;
        self.file.sync_all()?;
        Ok(BlockTable { block_bytes: self.block_bytes as u64, digests })
    }

    /// Fails if bytes handed to [`MemoryFile::fill`] could not be written.
    pub(crate) fn check_written(&self) -> io::Result<()> {
        match self.failed.load(Ordering::Relaxed) {
            true => Err(io::Error::other("Some pages could not be written")),
            false => Ok(()),
        }
    }

    /// Ends the file, of which everything that is wanted was read back.
    ///
    /// Pages that the disk did not take may be dropped from memory and read back as zeros; only a sync after the last read
    /// tells. It takes no longer than what writers may be ahead of the disk does.
    ///
    /// # Errors
    /// Bytes could not be written, so what was read back may be wrong.
    pub(crate) fn give_up(self) -> io::Result<()> {
        self.check_written()?;
        self.flusher.finish()?;
        self.file.sync_data()
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

    /// Writes the memory of `kept`, whose every range this file holds, to `into`, which holds no other.
    pub(crate) fn copy_to(&self, into: &Self) -> Result<(), FeedError> {
        for part in data_parts(&self.file, self.placement().bytes()) {
            let part = part.map_err(FeedError::Read)?;
            for range in self.placement().gpas(part.start, part.end - part.start) {
                for kept in into.placement().locate(range) {
                    into.fill(kept.range, |piece, buffer| self.read(piece, buffer))?;
                }
            }
        }
        Ok(())
    }

    fn read(&self, range: GpaRange, buffer: &mut [u8]) -> io::Result<()> {
        read_placed(self.placement(), range, buffer, |bytes, offset| self.file.read_exact_at(bytes, offset))
    }
}

fn locked(block: &Mutex<Block>) -> MutexGuard<'_, Block> {
    block.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has `read` read the bytes of `range` from a file that holds memory as `placement` says; what it lacks is left as it is.
pub(crate) fn read_placed(
    placement: &Placement,
    range: GpaRange,
    buffer: &mut [u8],
    read: impl Fn(&mut [u8], u64) -> io::Result<()>,
) -> io::Result<()> {
    placement.locate(range).try_for_each(|extent| {
        let from = index(extent.range.start() - range.start());
        let length = index(extent.range.len());
        read(&mut buffer[from..from + length], extent.offset)
    })
}

/// Makes a hole, where the file system knows how; bytes there are zero already.
fn punch(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, flags, offset, length).map_err(io::Error::from) {
        Err(error) if is_unsupported(&error) => Ok(()),
        punched => punched,
    }
}

fn index(number: u64) -> usize {
    usize::try_from(number).expect("sizes within a cell fit memory")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rustix::io::Errno;

    use super::*;
    use crate::snapshot::Limits;
    use crate::snapshot::write::feed::from_stream;

    /// Not whole cells, and in the end not a whole block.
    const BYTES: u64 = 5 * LEAST_CELL_BYTES + 3 * LEAST_BLOCK_BYTES + 4096;

    fn memory_file() -> MemoryFile {
        let ram = GpaRange::new(0, BYTES).unwrap();
        let placement = Placement::new([ram], &Limits::default()).unwrap();
        MemoryFile::new(tempfile::tempfile().unwrap(), placement, Granule::KIB_4, ThreadStart::NOTHING)
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

    fn fill(memory: &MemoryFile) {
        memory.fill(GpaRange::new(0, BYTES).unwrap(), from_stream(&mut io::repeat(7))).unwrap();
    }

    #[test]
    fn what_was_read_back_of_a_file_that_lost_pages_is_not_trusted() {
        let lost = || Err(io::Error::from(Errno::IO));
        for end in [|memory: MemoryFile| memory.finish().map(drop), MemoryFile::give_up] {
            let whole = memory_file();
            fill(&whole);
            end(whole).unwrap();

            let mut unsynced = memory_file();
            unsynced.flusher = Flusher::with(Box::new(lost), ThreadStart::NOTHING).unwrap();
            fill(&unsynced);
            unsynced.hurry();
            assert_eq!(end(unsynced).unwrap_err().raw_os_error(), Some(Errno::IO.raw_os_error()));

            let unwritten = memory_file();
            unwritten.failed.store(true, Ordering::Relaxed);
            assert!(unwritten.check_written().is_err());
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
        memory.file.set_len(LEAST_CELL_BYTES).unwrap();
        for threads in [1, 4] {
            assert_eq!(memory.digests(threads).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}
