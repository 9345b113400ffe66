// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory tables: which guest memory the bytes after them belong to.

use super::FrameError;
use crate::layout::Layout;
use crate::range::GpaRange;

/// Bytes of a range in a memory table.
pub const RANGE_BYTES: usize = 16;

/// Appends the encoded `ranges` to `bytes`, in their order.
pub fn encode_ranges(ranges: impl IntoIterator<Item = GpaRange>, bytes: &mut Vec<u8>) {
    for range in ranges {
        bytes.extend_from_slice(&range.start().to_le_bytes());
        bytes.extend_from_slice(&range.len().to_le_bytes());
    }
}

/// A memory table as it came: at least one range, each in RAM as a whole.
///
/// Ranges may overlap, repeat and come in any order: whoever writes them does so in the table's order, so that the last
/// bytes win.
///
/// ```
/// use vfio_migration::transfer::frame::{MemoryTable, encode_ranges};
/// use vfio_migration::{granule::Granule, layout::Layout, range::GpaRange};
/// let layout = Layout::new([GpaRange::new(0, 1 << 20)?], Granule::KIB_4)?;
/// let ranges = [GpaRange::new(0x3000, 0x1000)?, GpaRange::new(0x1000, 0x3000)?];
/// let mut bytes = Vec::new();
/// encode_ranges(ranges, &mut bytes);
/// let table = MemoryTable::parse(bytes, &layout)?;
/// assert!(table.ranges().eq(ranges));
/// assert_eq!(table.memory_bytes(), 0x4000);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryTable {
    bytes: Vec<u8>,
    memory_bytes: u64,
}

impl MemoryTable {
    /// Checks a table of `bytes` bytes by its length alone.
    ///
    /// # Errors
    /// The length is zero or not a multiple of [`RANGE_BYTES`].
    pub fn check_length(bytes: u64) -> Result<(), FrameError> {
        if bytes == 0 {
            return Err(FrameError::EmptyTable);
        }
        let whole = bytes.is_multiple_of(RANGE_BYTES as u64);
        if whole { Ok(()) } else { Err(FrameError::TableLength { bytes }) }
    }

    /// Checks every range of the encoded table `bytes` against the RAM of `layout`.
    ///
    /// # Errors
    /// As [`MemoryTable::check_length`]; a range is empty, wraps around or holds a byte that is not RAM.
    pub fn parse(bytes: Vec<u8>, layout: &Layout) -> Result<Self, FrameError> {
        Self::check_length(bytes.len() as u64)?;
        let mut memory_bytes = 0_u64;
        for (index, (gpa, length)) in entries(&bytes).enumerate() {
            let range = GpaRange::new(gpa, length).map_err(|source| FrameError::Range { index, source })?;
            if !layout.holds(range) {
                return Err(FrameError::OutsideRam { index, range });
            }
            memory_bytes = memory_bytes.saturating_add(length);
        }
        Ok(Self { bytes, memory_bytes })
    }

    /// Ranges in the order in which their bytes follow.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = GpaRange> + Clone + '_ {
        entries(&self.bytes)
            .map(|(gpa, length)| GpaRange::new(gpa, length).expect("every entry was parsed as a range"))
    }

    /// Bytes of guest memory that follow the table: its ranges' lengths together.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Gives the table's buffer back, to read the next one into.
    pub fn into_buffer(self) -> Vec<u8> {
        self.bytes
    }
}

fn entries(bytes: &[u8]) -> impl ExactSizeIterator<Item = (u64, u64)> + Clone + '_ {
    let (entries, _) = bytes.as_chunks::<RANGE_BYTES>();
    entries.iter().map(|entry| {
        let entry = u128::from_le_bytes(*entry);
        #[expect(clippy::cast_possible_truncation, reason = "the lower half is the address")]
        (entry as u64, (entry >> 64) as u64)
    })
}
