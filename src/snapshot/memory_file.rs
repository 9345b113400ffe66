// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `memory-ranges` while it is written: sparse, from any number of threads, each block hashed as its bytes pass.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::blocks::{BlockTable, block_bytes_for, is_zero};
use super::digest::Digest;
use super::feed::Feed;
use super::flusher::Flusher;
use super::placement::{Extent, Placement};
use crate::granule::Granule;
use crate::range::GpaRange;

/// Smallest block that gets a digest: as little as is hashed at full speed.
pub(super) const LEAST_BLOCK_BYTES: u64 = 16 << 10;
/// Smallest part of the file that one thread writes at a time.
const LEAST_CELL_BYTES: u64 = 256 << 10;

/// The file, and the digest of each of its blocks. Blocks of zeros are holes.
#[derive(Debug)]
pub(super) struct MemoryFile {
    file: File,
    feed: Feed,
    page_bytes: usize,
    block_bytes: usize,
    /// The digests of the blocks of one cell; locked while bytes of the cell are written, so that digest and bytes agree.
    cells: Vec<Mutex<Vec<Option<Digest>>>>,
    flusher: Flusher,
    failed: AtomicBool,
}

impl MemoryFile {
    /// Takes an empty file and makes it one hole, for memory placed as in `placement`.
    pub(super) fn new(file: File, placement: Placement, page: Granule) -> io::Result<Self> {
        let bytes = placement.bytes();
        file.set_len(bytes)?;
        let block_bytes = block_bytes_for(bytes, LEAST_BLOCK_BYTES.max(page.bytes()));
        let feed = Feed::new(placement, LEAST_CELL_BYTES.max(block_bytes));
        let blocks_of = |cell: u64| {
            let left = bytes - cell * feed.cell_bytes();
            index(left.min(feed.cell_bytes()).div_ceil(block_bytes))
        };
        let cells = (0..feed.cells()).map(|cell| Mutex::new(vec![None; blocks_of(cell)])).collect();
        let flusher = Flusher::start(&file)?;
        let (page_bytes, block_bytes) = (index(page.bytes()), index(block_bytes));
        Ok(Self { file, feed, page_bytes, block_bytes, cells, flusher, failed: AtomicBool::new(false) })
    }

    pub(super) fn placement(&self) -> &Placement {
        self.feed.placement()
    }

    /// Writes the bytes of `range`, which `read` supplies; later bytes replace earlier ones.
    ///
    /// # Errors
    /// `range` is not all memory, or reading or writing failed; then some of the bytes may be written.
    pub(super) fn fill(
        &self,
        range: GpaRange,
        read: impl FnMut(GpaRange, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        self.feed.run(range, read, |piece, bytes| {
            self.store(piece, bytes).inspect_err(|_| self.failed.store(true, Ordering::Relaxed))
        })
    }

    fn store(&self, piece: Extent, bytes: &[u8]) -> io::Result<()> {
        let cell = self.feed.cell_of(piece);
        let mut digests = self.cells[cell].lock().unwrap_or_else(PoisonError::into_inner);
        let start = index(piece.offset % self.feed.cell_bytes());
        self.write_sparsely(&digests, piece.offset, start, bytes)?;
        let blocks = start / self.block_bytes..(start + bytes.len()).div_ceil(self.block_bytes);
        for block in blocks {
            let first = block * self.block_bytes;
            let whole = first
                .checked_sub(start)
                .and_then(|from| bytes.get(from..from + self.block_length(cell, block)));
            digests[block] = self.settle(cell, block, digests[block], whole)?;
        }
        self.flusher.wrote(bytes.len() as u64)
    }

    /// Writes pages that hold something, and pages of zeros only where a block may hold something already.
    fn write_sparsely(
        &self,
        digests: &[Option<Digest>],
        offset: u64,
        start: usize,
        bytes: &[u8],
    ) -> io::Result<()> {
        let mut run = 0..0;
        let mut at = 0;
        while at < bytes.len() {
            let end =
                bytes.len().min((start + at) / self.page_bytes * self.page_bytes + self.page_bytes - start);
            let skip = digests[(start + at) / self.block_bytes].is_none() && is_zero(&bytes[at..end]);
            if skip {
                self.write_run(offset, bytes, run)?;
                run = end..end;
            } else {
                run.end = end;
            }
            at = end;
        }
        self.write_run(offset, bytes, run)
    }

    fn write_run(&self, offset: u64, bytes: &[u8], run: std::ops::Range<usize>) -> io::Result<()> {
        if run.is_empty() {
            return Ok(());
        }
        self.file.write_all_at(&bytes[run.clone()], offset + run.start as u64)
    }

    /// Returns the entry of a block just written: from its bytes where all are at hand, else from the file.
    fn settle(
        &self,
        cell: usize,
        block: usize,
        before: Option<Digest>,
        whole: Option<&[u8]>,
    ) -> io::Result<Option<Digest>> {
        let offset = cell as u64 * self.feed.cell_bytes() + (block * self.block_bytes) as u64;
        let length = self.block_length(cell, block);
        let entry = match whole {
            Some(bytes) => BlockTable::entry(bytes),
            None => {
                let mut bytes = vec![0; length];
                self.file.read_exact_at(&mut bytes, offset)?;
                BlockTable::entry(&bytes)
            }
        };
        if entry.is_none() && before.is_some() {
            punch(&self.file, offset, length as u64)?;
        }
        Ok(entry)
    }

    /// Bytes of a block: less than the others' at the end of the file.
    fn block_length(&self, cell: usize, block: usize) -> usize {
        let offset = cell as u64 * self.feed.cell_bytes() + (block * self.block_bytes) as u64;
        index((self.placement().bytes() - offset).min(self.block_bytes as u64))
    }

    /// Brings everything to disk and returns the digests.
    ///
    /// # Errors
    /// Bytes handed to [`MemoryFile::fill`], now or earlier, could not be written.
    pub(super) fn finish(self) -> io::Result<BlockTable> {
        if self.failed.into_inner() {
            return Err(io::Error::other("Some pages could not be written"));
        }
        self.flusher.finish()?;
        self.file.sync_all()?;
        let cells = self.cells.into_iter();
        let digests =
            cells.flat_map(|cell| cell.into_inner().unwrap_or_else(PoisonError::into_inner)).collect();
        Ok(BlockTable { block_bytes: self.block_bytes as u64, digests })
    }

    /// Writes the memory of `kept`, whose every range this file holds, to `into`, which holds no other.
    pub(super) fn copy_to(&self, into: &Self) -> io::Result<()> {
        for part in super::files::data_parts(&self.file, self.placement().bytes()) {
            let part = part?;
            for range in self.placement().gpas(part.start, part.end - part.start) {
                for kept in into.placement().locate(range) {
                    into.fill(kept.range, |piece, buffer| self.read(piece, buffer))?;
                }
            }
        }
        Ok(())
    }

    fn read(&self, range: GpaRange, buffer: &mut [u8]) -> io::Result<()> {
        read_placed(&self.file, self.placement(), range, buffer)
    }
}

/// Reads the bytes of `range` from a file that holds memory as `placement` says; what it lacks is left as it is.
pub(super) fn read_placed(
    file: &File,
    placement: &Placement,
    range: GpaRange,
    buffer: &mut [u8],
) -> io::Result<()> {
    placement.locate(range).try_for_each(|extent| {
        let from = index(extent.range.start() - range.start());
        let length = index(extent.range.len());
        file.read_exact_at(&mut buffer[from..from + length], extent.offset)
    })
}

/// Makes a hole, where the file system knows how; bytes there are zero already.
fn punch(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, flags, offset, length) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        punched => Ok(punched?),
    }
}

fn index(number: u64) -> usize {
    usize::try_from(number).expect("sizes within a cell fit memory")
}
