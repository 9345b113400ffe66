// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The reader of a file of guest memory: anywhere or in order, each block checked against its digest where there is one.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::altered::Altered;
use crate::granule::Granule;
use crate::range::GpaRange;
use crate::snapshot::disk::{data_parts, expect_length, named, next_data, read_named};
use crate::snapshot::format::{BlockTable, Extent, Placement, block_bytes_of_full};
use crate::snapshot::reserve::{index, list_of, resize};

/// Bytes read at once where blocks are read in order.
const READ_BYTES: u64 = 1 << 20;

/// Bytes of a block where there are no digests.
const UNSEALED_BLOCK_BYTES: u64 = 64 << 10;

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

/// A file of guest memory, and the digests of its blocks if it has any.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MemoryReader<'a> {
    pub(crate) dir: &'a Path,
    pub(crate) name: &'static str,
    pub(crate) file: &'a File,
    pub(crate) placement: &'a Placement,
    pub(crate) digests: Option<(&'a BlockTable, &'a CheckedBits)>,
}

impl<'a> MemoryReader<'a> {
    /// Reads the memory of `range` as it is on disk; parts that the file does not hold are left as they are in `buffer`.
    ///
    /// # Errors
    /// The file cannot be read or was cut off.
    pub(crate) fn read(&self, range: GpaRange, buffer: &mut [u8]) -> io::Result<()> {
        let mut parts = self.placement.parts_of(range);
        parts.try_for_each(|(extent, part)| self.read_at(&mut buffer[part], extent.offset))
    }

    /// Reads as [`MemoryReader::read`] does, and checks each block that was not checked before against its digest.
    ///
    /// A block that was not read before is read whole. Later changes to the file are not noticed.
    ///
    /// # Errors
    /// The file cannot be read or was cut off; or a block was altered, then the error holds [`Altered`].
    pub(crate) fn read_checked(&self, range: GpaRange, buffer: &mut [u8]) -> io::Result<()> {
        let mut scratch = Vec::new();
        self.placement.parts_of(range).try_for_each(|(extent, part)| {
            let bytes = &mut buffer[part];
            self.read_at(bytes, extent.offset)?;
            self.unchecked(extent).try_for_each(|block| {
                let (whole, held) = (self.whole(block), extent.offset..extent.offset + extent.range.len());
                let part = whole.start.max(held.start)..whole.end.min(held.end);
                let in_bytes = index(part.start - held.start)..index(part.end - held.start);
                if part == whole {
                    return self.check(block, Some(&bytes[in_bytes]));
                }
                self.check_from_file(block, &mut scratch)?;
                // These are the bytes that were checked.
                let in_block = index(part.start - whole.start)..index(part.end - whole.start);
                bytes[in_bytes].copy_from_slice(&scratch[in_block]);
                Ok(())
            })
        })
    }

    /// Checks the blocks that hold any of `range` and were not checked before, holes of the file included.
    ///
    /// # Errors
    /// As [`MemoryReader::read_checked`].
    pub(crate) fn check_range(&self, range: GpaRange) -> io::Result<()> {
        let mut bytes = Vec::new();
        let mut blocks = self.placement.locate(range).flat_map(|extent| self.unchecked(extent));
        blocks.try_for_each(|block| self.check_from_file(block, &mut bytes))
    }

    /// Reads all blocks in order. The errors do not name the directory; that is left to the caller.
    pub(crate) fn blocks(self, block_bytes: u64) -> BlockReader<'a> {
        let memory = Self { dir: Path::new(""), ..self };
        BlockReader { memory, block_bytes, next: 0, data: 0..0, buffer: Vec::new(), loaded_at: 0 }
    }

    /// Digests the blocks of a full snapshot's memory.
    pub(crate) fn hash(self, page: Granule) -> io::Result<BlockTable> {
        let bytes = self.placement.bytes();
        let block_bytes = block_bytes_of_full(bytes, page);
        let mut blocks = self.blocks(block_bytes);
        let mut digests = list_of(index(bytes.div_ceil(block_bytes)), std::iter::empty())?;
        while let Some(block) = blocks.next_block()? {
            digests.push(block.bytes.and_then(BlockTable::entry));
        }
        Ok(BlockTable { block_bytes, digests })
    }

    /// Returns the memory that is not a hole of the file, in the order of the file.
    pub(crate) fn populated(self) -> impl Iterator<Item = io::Result<GpaRange>> + use<'a> {
        data_parts(self.file, self.placement.bytes()).flat_map(move |part| {
            let (ranges, failed) = match part {
                Ok(part) => (Some(self.placement.gpas(part.start, part.end - part.start)), None),
                Err(error) => (None, Some(Err(named(|| self.path())(error)))),
            };
            ranges.into_iter().flatten().map(Ok).chain(failed)
        })
    }

    /// Returns the memory of the blocks that were not all zeros when they were written, in the order of the file; `None` if there are no
    /// digests. The file's holes do not matter.
    pub(crate) fn populated_as_written(self) -> Option<impl Iterator<Item = GpaRange> + use<'a>> {
        let BlockTable { block_bytes, digests } = self.digests?.0;
        let blocks = (0..).step_by(index(*block_bytes)).zip(digests).filter(|(_, digest)| digest.is_some());
        Some(blocks.flat_map(move |(offset, _)| self.placement.gpas(offset, *block_bytes)))
    }

    /// Bytes of a block; where there are no digests, of what is read at once.
    pub(crate) fn block_bytes(&self) -> u64 {
        self.digests.map_or(UNSEALED_BLOCK_BYTES, |(table, _)| table.block_bytes)
    }

    /// Whether a block has a digest, and so was not all zeros when it was written.
    pub(crate) fn has_digest(&self, block: u64) -> bool {
        self.digests.is_some_and(|(table, _)| table.digests[index(block)].is_some())
    }

    /// Reads a whole block into `bytes`, and checks it against its digest, even if it was checked before.
    ///
    /// # Errors
    /// As [`MemoryReader::read_checked`].
    pub(crate) fn read_block(&self, block: u64, bytes: &mut Vec<u8>) -> io::Result<()> {
        self.check_from_file(block, bytes)
    }

    /// Reads whole blocks in a row to `buffer` at `begin`, and checks each as [`MemoryReader::read_block`] does; returns how many bytes they have.
    ///
    /// # Errors
    /// As [`MemoryReader::read_checked`].
    pub(crate) fn read_blocks(
        &self,
        blocks: Range<u64>,
        buffer: &mut Vec<u8>,
        begin: usize,
    ) -> io::Result<usize> {
        let (from, to) = (self.whole(blocks.start).start, self.whole(blocks.end - 1).end);
        let length = index(to - from);
        if buffer.len() < begin + length {
            resize(buffer, begin + length)?;
        }
        let bytes = &mut buffer[begin..begin + length];
        self.read_at(bytes, from)?;
        let mut each = blocks.zip(bytes.chunks(index(self.block_bytes())));
        each.try_for_each(|(block, bytes)| self.check(block, Some(bytes)))?;
        Ok(length)
    }

    /// The file, for messages.
    pub(crate) fn path(&self) -> PathBuf {
        self.dir.join(self.name)
    }

    /// The blocks of `extent` that have a digest and were not checked before.
    fn unchecked(&self, extent: Extent) -> impl Iterator<Item = u64> + use<'a> {
        self.digests.into_iter().flat_map(move |(table, bits)| {
            let end = extent.offset + extent.range.len();
            let blocks = extent.offset / table.block_bytes..end.div_ceil(table.block_bytes);
            blocks.filter(|&block| !bits.has(index(block)))
        })
    }

    /// Where a block is in the file.
    fn whole(&self, block: u64) -> Range<u64> {
        let block_bytes = self.block_bytes();
        block * block_bytes..((block + 1) * block_bytes).min(self.placement.bytes())
    }

    /// Reads and checks a whole block.
    fn check_from_file(&self, block: u64, bytes: &mut Vec<u8>) -> io::Result<()> {
        let whole = self.whole(block);
        resize(bytes, index(whole.end - whole.start))?;
        self.read_at(bytes, whole.start)?;
        self.check(block, Some(bytes))
    }

    /// Checks a block against its digest, if it has one; `bytes` are all of it, or `None` for a hole.
    fn check(&self, block: u64, bytes: Option<&[u8]>) -> io::Result<()> {
        let Some((table, bits)) = self.digests else { return Ok(()) };
        if bytes.and_then(BlockTable::entry) != table.digests[index(block)] {
            let whole = self.whole(block);
            let ranges = self.placement.gpas(whole.start, whole.end - whole.start);
            return Err(Altered::new(self.path(), ranges).into());
        }
        bits.set(index(block));
        Ok(())
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        read_named(self.file, || self.path(), bytes, offset)
    }
}

/// A block of a file.
pub(crate) struct Block<'a> {
    pub(crate) offset: u64,
    /// Bytes in the block: fewer than in the others at the end of the file.
    pub(crate) length: u64,
    /// `None` for a hole.
    pub(crate) bytes: Option<&'a [u8]>,
}

/// Reads the blocks of a file in order; holes are not read.
pub(crate) struct BlockReader<'a> {
    memory: MemoryReader<'a>,
    block_bytes: u64,
    next: u64,
    /// The data part that the next block lies in or before; empty at the end of the file when there is none.
    data: Range<u64>,
    buffer: Vec<u8>,
    /// Offset of the bytes in `buffer`.
    loaded_at: u64,
}

impl BlockReader<'_> {
    /// Reads the next block, and checks it if it has a digest; `None` after the last one.
    ///
    /// # Errors
    /// The file cannot be read, or was cut off; or the block was altered, then the error holds [`Altered`]. The next call goes on with the
    /// next block.
    pub(crate) fn next_block(&mut self) -> io::Result<Option<Block<'_>>> {
        let (memory, offset) = (self.memory, self.next);
        let file_bytes = memory.placement.bytes();
        if offset >= file_bytes {
            expect_length(memory.file, file_bytes)?;
            return Ok(None);
        }
        let length = self.block_bytes.min(file_bytes - offset);
        self.next += length;
        let block = offset / self.block_bytes;
        let bytes = if self.is_hole(offset, length)? { None } else { Some(self.load(offset, length)?) };
        memory.check(block, bytes)?;
        Ok(Some(Block { offset, length, bytes }))
    }

    fn is_hole(&mut self, offset: u64, length: u64) -> io::Result<bool> {
        let file_bytes = self.memory.placement.bytes();
        if offset >= self.data.end {
            let end = file_bytes..file_bytes;
            self.data = next_data(self.memory.file, offset, file_bytes)?.unwrap_or(end);
        }
        Ok(offset + length <= self.data.start)
    }

    fn load(&mut self, offset: u64, length: u64) -> io::Result<&[u8]> {
        let loaded_end = self.loaded_at + self.buffer.len() as u64;
        if offset < self.loaded_at || offset + length > loaded_end {
            let ahead = READ_BYTES.min(self.data.end.saturating_sub(offset)).max(length);
            resize(&mut self.buffer, index(ahead))?;
            self.loaded_at = offset;
            if let Err(error) = self.memory.file.read_exact_at(&mut self.buffer, offset) {
                self.buffer.clear();
                return Err(error);
            }
        }
        let from = index(offset - self.loaded_at);
        Ok(&self.buffer[from..from + index(length)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::format::SnapshotLimits;

    fn reader<'a>(file: &'a File, placement: &'a Placement) -> MemoryReader<'a> {
        MemoryReader { dir: Path::new(""), name: "", file, placement, digests: None }
    }

    fn placement(bytes: u64) -> Placement {
        Placement::from_pairs([(0, bytes)], &SnapshotLimits::default()).unwrap()
    }

    #[test]
    fn blocks_come_in_order_with_holes_named_and_a_short_one_at_the_end() {
        let file = tempfile::tempfile().unwrap();
        let block = 64 << 10;
        let bytes = 40 * block + 100;
        file.set_len(bytes).unwrap();
        for at in [0, 17, 18, 40] {
            file.write_all_at(&[at + 1; 100], u64::from(at) * block).unwrap();
        }
        let placement = placement(bytes);
        let mut blocks = reader(&file, &placement).blocks(block);
        let mut data = Vec::new();
        let mut count = 0;
        while let Some(found) = blocks.next_block().unwrap() {
            assert_eq!(found.offset, count * block);
            assert_eq!(found.length, if count == 40 { 100 } else { block });
            if let Some(bytes) = found.bytes {
                assert_eq!(bytes.len() as u64, found.length);
                data.push((count, bytes[99]));
            }
            count += 1;
        }
        assert_eq!(count, 41);
        assert_eq!(data, [(0, 1), (17, 18), (18, 19), (40, 41)]);
    }

    #[test]
    fn a_file_cut_off_while_it_is_read_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 100], 0).unwrap();
        assert!(reader(&file, &placement(101)).blocks(4096).next_block().is_err());

        let bytes = 1 << 20;
        file.set_len(bytes).unwrap();
        let placement = placement(bytes);
        let mut blocks = reader(&file, &placement).blocks(4096);
        blocks.next_block().unwrap();
        file.set_len(100).unwrap();
        let outcome = (1..=bytes / 4096).find_map(|_| blocks.next_block().err());
        assert_eq!(outcome.unwrap().kind(), io::ErrorKind::UnexpectedEof);
    }
}
