// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads memory here and there, each block checked against its digest when it is first read.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::range::GpaRange;
use crate::snapshot::disk::files::read_named;
use crate::snapshot::format::blocks::BlockTable;
use crate::snapshot::format::manifest::Manifest;
use crate::snapshot::format::placement::{Extent, Placement};
use crate::snapshot::read::altered::Altered;
use crate::snapshot::reserve::resize;

/// One bit for each block of a file: whether it was found to be as it was written.
#[derive(Debug)]
pub(crate) struct CheckedBits(Vec<AtomicU64>);

impl CheckedBits {
    /// No block of `table` is checked yet.
    pub(crate) fn none(table: &BlockTable) -> Self {
        Self((0..table.digests.len().div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn has(&self, block: usize) -> bool {
        self.0[block / 64].load(Ordering::Relaxed) >> (block % 64) & 1 == 1
    }

    fn set(&self, block: usize) {
        self.0[block / 64].fetch_or(1 << (block % 64), Ordering::Relaxed);
    }
}

/// A file of memory and what its bytes should be.
pub(crate) struct CheckedMemory<'a> {
    pub(crate) dir: &'a Path,
    pub(crate) name: &'static str,
    pub(crate) file: &'a File,
    pub(crate) placement: &'a Placement,
    pub(crate) manifest: &'a Manifest,
    pub(crate) checked: &'a CheckedBits,
}

impl CheckedMemory<'_> {
    /// Reads the memory of `range`; parts that the file does not hold are left as they are in `buffer`.
    ///
    /// A block that nobody read before is read whole. What others do to the file after that passes unseen.
    ///
    /// # Errors
    /// The file cannot be read or was cut off; or a block was altered, then the error holds [`Altered`].
    pub(crate) fn read(&self, range: GpaRange, buffer: &mut [u8]) -> io::Result<()> {
        let mut scratch = Vec::new();
        for extent in self.placement.locate(range) {
            let at = index(extent.range.start() - range.start());
            let bytes = &mut buffer[at..at + index(extent.range.len())];
            self.read_at(bytes, extent.offset)?;
            self.check(extent, bytes, &mut scratch)?;
        }
        Ok(())
    }

    /// Checks the blocks that hold any of `range` and were not checked yet, holes of the file included.
    ///
    /// # Errors
    /// As [`CheckedMemory::read`].
    pub(crate) fn check_blocks(&self, range: GpaRange) -> io::Result<()> {
        let block_bytes = self.manifest.blocks.block_bytes;
        let mut bytes = Vec::new();
        for extent in self.placement.locate(range) {
            let end = extent.offset + extent.range.len();
            let blocks = extent.offset / block_bytes..end.div_ceil(block_bytes);
            for block in blocks.filter(|&block| !self.checked.has(index(block))) {
                self.load(block, &mut bytes)?;
            }
        }
        Ok(())
    }

    /// Reads and checks a whole block.
    fn load(&self, block: u64, bytes: &mut Vec<u8>) -> io::Result<()> {
        let whole = self.whole(block);
        resize(bytes, index(whole.end - whole.start))?;
        self.read_at(bytes, whole.start)?;
        self.compare(block, &whole, bytes)
    }

    /// Where a block is in the file.
    fn whole(&self, block: u64) -> std::ops::Range<u64> {
        let block_bytes = self.manifest.blocks.block_bytes;
        block * block_bytes..((block + 1) * block_bytes).min(self.placement.bytes())
    }

    /// Checks the blocks that `extent` touches; its `bytes` are those that were checked.
    fn check(&self, extent: Extent, bytes: &mut [u8], scratch: &mut Vec<u8>) -> io::Result<()> {
        let block_bytes = self.manifest.blocks.block_bytes;
        let end = extent.offset + extent.range.len();
        for block in extent.offset / block_bytes..end.div_ceil(block_bytes) {
            if self.checked.has(index(block)) {
                continue;
            }
            let whole = self.whole(block);
            let part = whole.start.max(extent.offset)..whole.end.min(end);
            let in_bytes = index(part.start - extent.offset)..index(part.end - extent.offset);
            if part == whole {
                self.compare(block, &whole, &bytes[in_bytes])?;
            } else {
                self.load(block, scratch)?;
                let in_block = index(part.start - whole.start)..index(part.end - whole.start);
                bytes[in_bytes].copy_from_slice(&scratch[in_block]);
            }
        }
        Ok(())
    }

    fn compare(&self, block: u64, whole: &std::ops::Range<u64>, bytes: &[u8]) -> io::Result<()> {
        if BlockTable::entry(bytes) != self.manifest.blocks.digests[index(block)] {
            let ranges = self.placement.gpas(whole.start, whole.end - whole.start);
            return Err(Altered::new(self.path(), ranges).into());
        }
        self.checked.set(index(block));
        Ok(())
    }

    /// Returns the memory of the blocks that are not all zeros, in the order of the file, wherever it has holes.
    pub(crate) fn populated(&self) -> impl Iterator<Item = GpaRange> {
        let BlockTable { block_bytes, digests } = &self.manifest.blocks;
        let blocks = (0..).step_by(index(*block_bytes)).zip(digests).filter(|(_, digest)| digest.is_some());
        blocks.flat_map(|(offset, _)| self.placement.gpas(offset, *block_bytes))
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        read_named(self.file, || self.path(), bytes, offset)
    }

    fn path(&self) -> PathBuf {
        self.dir.join(self.name)
    }
}

fn index(number: u64) -> usize {
    usize::try_from(number).expect("blocks fit memory")
}
