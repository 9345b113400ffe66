// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tables of guest memory ranges.

use std::io::{Read, Write};
use std::ops::Range;
use std::vec;

use serde::{Deserialize, Serialize};

use super::error::{self, WireError};
use super::runs::Runs;
use super::{fill, read_message, write_message};
use crate::MigratableError;

/// Size of one [`MemoryRange`] on the wire.
pub(super) const RANGE_BYTES: usize = 16;

/// Longest table that is read from a peer: 1 GiB, 64 Mi ranges.
///
/// Enough for 512 GiB of guest memory in which every other 4 KiB page is dirty, the table that has
/// the most ranges.
const MAX_TABLE_BYTES: u64 = 1 << 30;

/// Number of ranges that are read or written in one go, which makes a buffer of 64 KiB.
const BLOCK_RANGES: usize = 4096;

/// Names `length` bytes of guest memory from the guest physical address `gpa` on.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRange {
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Number of bytes.
    pub length: u64,
}

impl MemoryRange {
    /// Reads one range of 16 bytes, whatever memory it names.
    ///
    /// # Errors
    ///
    /// [`MigratableError::MigrateSocket`] when reading fails or the stream ends before the last byte.
    pub fn read_from(fd: &mut dyn Read) -> Result<MemoryRange, MigratableError> {
        Ok(Self::from_bytes(&read_message(fd, "memory range")?))
    }

    /// Writes the 16 bytes of the range, in one call.
    ///
    /// # Errors
    ///
    /// [`MigratableError::MigrateSocket`] when writing fails; a part may have been written.
    pub fn write_to(&self, fd: &mut dyn Write) -> Result<(), MigratableError> {
        write_message(fd, &self.to_bytes())
    }

    fn from_bytes(bytes: &[u8; RANGE_BYTES]) -> Self {
        let [gpa @ .., _, _, _, _, _, _, _, _] = *bytes;
        let [_, _, _, _, _, _, _, _, length @ ..] = *bytes;
        Self { gpa: u64::from_le_bytes(gpa), length: u64::from_le_bytes(length) }
    }

    fn to_bytes(self) -> [u8; RANGE_BYTES] {
        let mut bytes = [0; RANGE_BYTES];
        bytes[..8].copy_from_slice(&self.gpa.to_le_bytes());
        bytes[8..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    /// Cuts the first `length` bytes off; `length` is less than the range has.
    ///
    /// A peer's range may wrap around the address space, and so do its halves.
    fn split_at(self, length: u64) -> (Self, Self) {
        let rest = Self { gpa: self.gpa.wrapping_add(length), length: self.length - length };
        (Self { length, ..self }, rest)
    }
}

/// Lists guest memory ranges, in the order in which their bytes follow on the wire.
///
/// Nothing is promised of the ranges themselves: a peer's table may hold ranges that overlap,
/// repeat, are empty or wrap around.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct MemoryRangeTable {
    data: Vec<MemoryRange>,
}

impl MemoryRangeTable {
    /// Returns the ranges; the same as [`regions`](Self::regions).
    pub fn ranges(&self) -> &[MemoryRange] {
        &self.data
    }

    /// Returns the ranges; the same as [`ranges`](Self::ranges).
    pub fn regions(&self) -> &[MemoryRange] {
        &self.data
    }

    /// Appends `range`.
    pub fn push(&mut self, range: MemoryRange) {
        self.data.push(range);
    }

    /// Appends the ranges of `table`, as they are.
    pub fn extend(&mut self, table: Self) {
        self.data.extend(table.data);
    }

    /// Joins `tables` end to end; ranges that overlap stay as they are.
    pub fn new_from_tables(tables: Vec<Self>) -> Self {
        Self { data: tables.into_iter().flat_map(|table| table.data).collect() }
    }

    /// Lists the dirty memory of a bitmap: one range for each run of set bits, in ascending order.
    ///
    /// Bit `n % 64` of word `n / 64` stands for the `page_size` bytes from `start_addr + n *
    /// page_size` on. The cost is one step per word and one per run.
    ///
    /// ```
    /// use vm_migration::protocol::{MemoryRange, MemoryRangeTable};
    ///
    /// let table = MemoryRangeTable::from_dirty_bitmap([1 << 63, 0b101], 0x10_0000, 0x1000);
    /// let runs = [
    ///     MemoryRange { gpa: 0x13_f000, length: 0x2000 },
    ///     MemoryRange { gpa: 0x14_2000, length: 0x1000 },
    /// ];
    /// assert_eq!(table.ranges(), runs);
    /// ```
    ///
    /// # Panics
    ///
    /// When `page_size` is 0, or when the bitmap marks a page beyond the end of the 64-bit address
    /// space: then bitmap, address and page size do not belong together, and no table would be true.
    pub fn from_dirty_bitmap(bitmap: impl IntoIterator<Item = u64>, start_addr: u64, page_size: u64) -> Self {
        assert_ne!(page_size, 0, "Page size of a dirty bitmap is 0");
        let data = Runs::new(bitmap.into_iter()).map(|pages| pages_to_range(&pages, start_addr, page_size));
        Self { data: data.collect() }
    }

    /// Cuts the table, lazily, into tables of at most `chunk_size` bytes of guest memory each.
    ///
    /// The chunks come in the order of the table and are full but for the last; empty ranges are
    /// left out. A range is split wherever a chunk is full: within a page too, when `chunk_size` or
    /// the range is not a multiple of one.
    ///
    /// ```
    /// use vm_migration::protocol::{MemoryRange, MemoryRangeTable};
    ///
    /// let mut table = MemoryRangeTable::default();
    /// table.push(MemoryRange { gpa: 0x1000, length: 0x3000 });
    /// let lengths: Vec<_> = table.partition(0x2000).map(|chunk| chunk.effective_size()).collect();
    /// assert_eq!(lengths, [0x2000, 0x1000]);
    /// ```
    ///
    /// # Panics
    ///
    /// When `chunk_size` is 0: no chunk could carry anything, and the memory would be lost.
    pub fn partition(self, chunk_size: u64) -> impl Iterator<Item = MemoryRangeTable> {
        assert_ne!(chunk_size, 0, "Chunk size of a partition is 0");
        Partition { chunk_size, head: None, rest: self.data.into_iter() }
    }

    /// Reads a table of `length` bytes, as a peer claims it.
    ///
    /// Memory is taken as the bytes arrive, never on the strength of the claim.
    ///
    /// # Errors
    ///
    /// [`MigratableError::MigrateReceive`], before anything is read, when `length` is not a multiple
    /// of 16 or exceeds 1 GiB; [`MigratableError::MigrateSocket`] when reading fails or the stream
    /// ends before the last byte.
    pub fn read_from(fd: &mut dyn Read, length: u64) -> Result<MemoryRangeTable, MigratableError> {
        let mut wanted = checked_table_bytes(length).map_err(WireError::refused)?;
        let mut block = vec![0; wanted.min(BLOCK_RANGES * RANGE_BYTES)];
        let mut data = Vec::new();
        while wanted > 0 {
            let block_bytes = wanted.min(block.len());
            let received = fill(fd, &mut block[..block_bytes])?;
            let (ranges, _) = block[..received].as_chunks();
            data.extend(ranges.iter().map(MemoryRange::from_bytes));
            wanted -= received;
            if received < block_bytes {
                return Err(error::truncated("memory range table", length - wanted as u64, length));
            }
        }
        Ok(Self { data })
    }

    /// Writes the [`length`](Self::length) bytes of the table, up to 64 KiB in one call.
    ///
    /// # Errors
    ///
    /// [`MigratableError::MigrateSocket`] when writing fails; a part may have been written.
    pub fn write_to(&self, fd: &mut dyn Write) -> Result<(), MigratableError> {
        let mut block = Vec::with_capacity(self.data.len().min(BLOCK_RANGES) * RANGE_BYTES);
        for ranges in self.data.chunks(BLOCK_RANGES) {
            block.clear();
            block.extend(ranges.iter().flat_map(|range| range.to_bytes()));
            write_message(fd, &block)?;
        }
        Ok(())
    }

    /// Returns the number of bytes the table takes on the wire, 16 for each range.
    pub fn length(&self) -> u64 {
        (self.data.len() * RANGE_BYTES) as u64
    }

    /// Returns the number of bytes of guest memory, `u64::MAX` when a peer's ranges sum to more.
    pub fn effective_size(&self) -> u64 {
        self.data.iter().fold(0, |bytes, range| bytes.saturating_add(range.length))
    }

    /// Tells whether there is no range at all, not even an empty one.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }
}

/// Returns the claimed `length` of a table if a table can have it.
fn checked_table_bytes(length: u64) -> Result<usize, WireError> {
    let range_bytes = RANGE_BYTES as u64;
    if !length.is_multiple_of(range_bytes) {
        return Err(WireError::RaggedTable { length, range_bytes });
    }
    match usize::try_from(length) {
        Ok(bytes) if length <= MAX_TABLE_BYTES => Ok(bytes),
        _ => Err(WireError::OversizedTable { length, limit: MAX_TABLE_BYTES }),
    }
}

fn pages_to_range(pages: &Range<u64>, start_addr: u64, page_size: u64) -> MemoryRange {
    let gpa = pages.start.checked_mul(page_size).and_then(|offset| start_addr.checked_add(offset));
    let length = (pages.end - pages.start).checked_mul(page_size);
    match (gpa, length) {
        (Some(gpa), Some(length)) if gpa.checked_add(length - 1).is_some() => MemoryRange { gpa, length },
        _ => panic!(
            "Dirty pages {pages:?} of {page_size} bytes from {start_addr:#x} on exceed the address space"
        ),
    }
}

/// Yields what [`MemoryRangeTable::partition`] promises.
#[derive(Debug)]
struct Partition {
    chunk_size: u64,
    /// What is left of the range that the last chunk ended in.
    head: Option<MemoryRange>,
    rest: vec::IntoIter<MemoryRange>,
}

impl Iterator for Partition {
    type Item = MemoryRangeTable;

    fn next(&mut self) -> Option<MemoryRangeTable> {
        let mut chunk = MemoryRangeTable::default();
        let mut room = self.chunk_size;
        while room > 0 {
            let Some(range) = self.head.take().or_else(|| self.rest.next()) else { break };
            let fitting = if range.length > room {
                let (fitting, left) = range.split_at(room);
                self.head = Some(left);
                fitting
            } else {
                range
            };
            if fitting.length > 0 {
                chunk.push(fitting);
            }
            room -= fitting.length;
        }
        (!chunk.is_empty()).then_some(chunk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(gpa: u64, length: u64) -> MemoryRange {
        MemoryRange { gpa, length }
    }

    fn table(ranges: &[MemoryRange]) -> MemoryRangeTable {
        MemoryRangeTable { data: ranges.to_vec() }
    }

    #[test]
    fn a_range_has_the_size_and_layout_it_has_on_the_wire() {
        assert_eq!(size_of::<MemoryRange>(), RANGE_BYTES);
        assert_eq!(std::mem::offset_of!(MemoryRange, gpa), 0);
        assert_eq!(std::mem::offset_of!(MemoryRange, length), 8);
    }

    #[test]
    fn tables_are_joined_end_to_end() {
        let (a, b) = (range(0x2000, 0x1000), range(0x1000, 0x2000));
        let mut extended = table(&[a]);
        extended.extend(table(&[b, a]));
        assert_eq!(extended.ranges(), [a, b, a]);
        let joined = MemoryRangeTable::new_from_tables(vec![table(&[a]), table(&[]), table(&[b, a])]);
        assert_eq!(joined.ranges(), extended.regions());
        assert!(MemoryRangeTable::new_from_tables(vec![]).is_empty());
    }

    #[test]
    fn length_counts_the_wire_and_effective_size_the_memory() {
        let two = table(&[range(0, 0x1000), range(0x10_0000, 0x3000)]);
        assert_eq!((two.length(), two.effective_size()), (32, 0x4000));
        assert_eq!(table(&[range(0, u64::MAX), range(0, 2)]).effective_size(), u64::MAX);
    }

    #[test]
    fn the_last_page_of_the_address_space_can_be_dirty() {
        let top = MemoryRangeTable::from_dirty_bitmap([0b11], u64::MAX - 0x1fff, 0x1000);
        assert_eq!(top.ranges(), [range(u64::MAX - 0x1fff, 0x2000)]);
    }

    #[test]
    #[should_panic(
        expected = "Dirty pages 0..3 of 4096 bytes from 0xffffffffffffe000 on exceed the address space"
    )]
    fn a_dirty_page_beyond_the_address_space_is_a_bug() {
        MemoryRangeTable::from_dirty_bitmap([0b111], u64::MAX - 0x1fff, 0x1000);
    }

    #[test]
    #[should_panic(expected = "Chunk size of a partition is 0")]
    fn chunks_of_nothing_are_a_bug() {
        drop(table(&[range(0, 1)]).partition(0));
    }

    #[test]
    fn chunks_are_full_but_for_the_last_and_keep_the_order() {
        let chunks: Vec<_> = table(&[range(0, 0x3000), range(0x8000, 0), range(0x5000, 0x2000)])
            .partition(0x2000)
            .map(|chunk| chunk.data)
            .collect();
        assert_eq!(
            chunks,
            [
                vec![range(0, 0x2000)],
                vec![range(0x2000, 0x1000), range(0x5000, 0x1000)],
                vec![range(0x6000, 0x1000)]
            ]
        );
    }

    #[test]
    fn a_hostile_range_is_partitioned_lazily_and_without_overflow() {
        let mut chunks = table(&[range(u64::MAX - 1, u64::MAX)]).partition(4);
        assert_eq!(chunks.next().unwrap().data, [range(u64::MAX - 1, 4)]);
        assert_eq!(chunks.next().unwrap().data, [range(2, 4)]);
    }

    #[test]
    fn a_table_longer_than_a_block_is_written_and_read_whole() {
        let ranges: Vec<_> = (0..2 * BLOCK_RANGES as u64 + 3).map(|n| range(n << 13, n)).collect();
        let mut bytes = Vec::new();
        table(&ranges).write_to(&mut bytes).unwrap();
        assert_eq!(bytes.len() as u64, table(&ranges).length());
        let read = MemoryRangeTable::read_from(&mut bytes.as_slice(), bytes.len() as u64).unwrap();
        assert_eq!(read.ranges(), ranges);
    }

    #[test]
    fn exactly_the_lengths_a_table_can_have_pass() {
        for length in [0, 16, MAX_TABLE_BYTES - 16, MAX_TABLE_BYTES] {
            assert_eq!(checked_table_bytes(length).unwrap() as u64, length);
        }
        for length in [1, 15, 17, MAX_TABLE_BYTES - 1, u64::MAX] {
            assert!(matches!(checked_table_bytes(length), Err(WireError::RaggedTable { .. })));
        }
        for length in [MAX_TABLE_BYTES + 16, 1 << 45, 1 << 62, u64::MAX - 15] {
            assert!(matches!(checked_table_bytes(length), Err(WireError::OversizedTable { .. })));
        }
    }
}
