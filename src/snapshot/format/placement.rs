// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where each byte of guest memory lies in a file that holds ranges back to back.

use std::ops::Range;

use thiserror::Error;

use super::limits::SnapshotLimits;
use crate::granule::Granule;
use crate::layout::Layout;
use crate::range::{GpaRange, RangeError};
use crate::snapshot::reserve::index;
use crate::units::Count;

/// Why a list of ranges is not a placement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PlacementError {
    /// An entry that is not a range.
    #[error("Memory range {index} is not a valid range")]
    Range {
        /// Position in the list.
        index: usize,
        /// What is wrong with it.
        source: RangeError,
    },
    /// Two ranges share bytes.
    #[error("Memory ranges {first} and {second} overlap")]
    Overlap {
        /// The lower one.
        first: GpaRange,
        /// The higher one.
        second: GpaRange,
    },
    /// A range that begins or ends inside a page.
    #[error("Memory range {range} is not of whole pages of {page}")]
    Unaligned {
        /// The range.
        range: GpaRange,
        /// The page size.
        page: Granule,
    },
    /// More ranges than are read.
    #[error("Memory has more than {}, the limit", Count(.limit, "range"))]
    TooManyRanges {
        /// The limit.
        limit: usize,
    },
    /// More bytes than are read.
    #[error("Memory has more than {}, the limit", Count(.limit, "byte"))]
    TooLarge {
        /// The limit.
        limit: u64,
    },
}

impl PlacementError {
    /// Whether the list is only larger than the caller allows, and may be sound.
    pub fn is_limit(&self) -> bool {
        matches!(self, Self::TooManyRanges { .. } | Self::TooLarge { .. })
    }
}

/// A range of guest memory and the offset of its first byte in a file; its other bytes follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Guest-physical bytes.
    pub range: GpaRange,
    /// Offset of the first one.
    pub offset: u64,
}

impl Extent {
    /// Returns the part of the extent that holds `range`.
    fn part(self, range: GpaRange) -> Option<Self> {
        let range = self.range.intersection(range)?;
        Some(Self { range, offset: self.offset + (range.start() - self.range.start()) })
    }

    /// Returns these of the extent's bytes.
    ///
    /// # Panics
    /// They are none, or not all in it.
    pub(crate) fn slice(self, bytes: &Range<usize>) -> Self {
        let (start, length) = (bytes.start as u64, bytes.len() as u64);
        assert!(start + length <= self.range.len(), "{bytes:?} are not in {}", self.range);
        let range = GpaRange::new(self.range.start() + start, length).expect("it is a part of a range");
        Self { range, offset: self.offset + start }
    }

    /// Cuts the extent where its offsets cross multiples of `bytes`.
    pub(crate) fn cut(self, bytes: u64) -> impl Iterator<Item = Self> {
        let mut next = Some(self);
        std::iter::from_fn(move || {
            let whole = next?;
            let room = bytes - whole.offset % bytes;
            let end = whole.range.end().min(whole.range.start().saturating_add(room));
            let piece = GpaRange::from_bounds(whole.range.start(), end).ok()?;
            let rest = GpaRange::from_bounds(end, whole.range.end()).ok();
            next = rest.map(|range| Self { range, offset: whole.offset + piece.len() });
            Some(Self { range: piece, offset: whole.offset })
        })
    }
}

/// Disjoint ranges of guest memory, one after the other in a file, in any order.
///
/// ```
/// use vfio_migration::range::GpaRange;
/// use vfio_migration::snapshot::{SnapshotLimits, Placement};
/// let (low, high) = (GpaRange::new(0, 0x4000)?, GpaRange::new(0x10000, 0x4000)?);
/// let placement = Placement::new([high, low], &SnapshotLimits::default())?;
/// let found: Vec<_> = placement.locate(GpaRange::new(0x3000, 0x1000)?).collect();
/// assert_eq!(found[0].offset, 0x7000);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Placement {
    by_offset: Vec<Extent>,
    by_gpa: Vec<Extent>,
    bytes: u64,
}

impl Placement {
    /// Places `ranges` one after the other, in their order.
    ///
    /// # Errors
    /// Two overlap, or they exceed `limits`.
    pub fn new(
        ranges: impl IntoIterator<Item = GpaRange>,
        limits: &SnapshotLimits,
    ) -> Result<Self, PlacementError> {
        let mut placement = Self::default();
        for range in ranges {
            placement.append(range, limits)?;
        }
        placement.by_gpa = placement.by_offset.clone();
        placement.by_gpa.sort_unstable_by_key(|extent| extent.range);
        let overlap = placement.by_gpa.windows(2).find(|pair| pair[0].range.end() > pair[1].range.start());
        match overlap {
            Some(pair) => Err(PlacementError::Overlap { first: pair[0].range, second: pair[1].range }),
            None => Ok(placement),
        }
    }

    /// Places what a file claims to be ranges: pairs of first address and length.
    ///
    /// # Errors
    /// As [`Placement::new`], or a pair is not a range.
    pub fn from_pairs(
        pairs: impl IntoIterator<Item = (u64, u64)>,
        limits: &SnapshotLimits,
    ) -> Result<Self, PlacementError> {
        let ranges: Result<Vec<_>, _> = pairs
            .into_iter()
            .enumerate()
            .map(|(index, (gpa, length))| {
                GpaRange::new(gpa, length).map_err(|source| PlacementError::Range { index, source })
            })
            .collect();
        Self::new(ranges?, limits)
    }

    /// Places the regions of `layout` in ascending order.
    ///
    /// # Errors
    /// They exceed `limits`.
    pub fn of_layout(layout: &Layout, limits: &SnapshotLimits) -> Result<Self, PlacementError> {
        Self::new(layout.regions().iter().map(|region| region.range()), limits)
    }

    fn append(&mut self, range: GpaRange, limits: &SnapshotLimits) -> Result<(), PlacementError> {
        if self.by_offset.len() >= limits.ranges {
            return Err(PlacementError::TooManyRanges { limit: limits.ranges });
        }
        let bytes = self.bytes.checked_add(range.len()).filter(|&bytes| bytes <= limits.memory_bytes);
        let bytes = bytes.ok_or(PlacementError::TooLarge { limit: limits.memory_bytes })?;
        self.by_offset.push(Extent { range, offset: self.bytes });
        self.bytes = bytes;
        Ok(())
    }

    /// Returns the largest page, no larger than `most` and no smaller than 4 KiB, that every range is made of.
    ///
    /// A host with pages of 64 KiB reads what one with pages of 4 KiB wrote.
    ///
    /// # Errors
    /// [`PlacementError::Unaligned`]: a range is not of whole pages of 4 KiB.
    pub fn page(&self, most: Granule) -> Result<Granule, PlacementError> {
        let ends =
            self.by_offset.iter().fold(0, |bits, extent| bits | extent.range.start() | extent.range.end());
        let shift = ends.trailing_zeros().min(most.shift()).max(Granule::KIB_4.shift());
        let page = Granule::new(1 << shift).unwrap_or(Granule::KIB_4);
        self.check_pages(page).map(|()| page)
    }

    /// Checks that every range is of whole `page`s.
    pub(crate) fn check_pages(&self, page: Granule) -> Result<(), PlacementError> {
        let aligned = |range: GpaRange| page.is_aligned(range.start()) && page.is_aligned(range.end());
        let odd = self.ranges().find(|&range| !aligned(range));
        odd.map_or(Ok(()), |range| Err(PlacementError::Unaligned { range, page }))
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Ranges in the order of the file.
    pub fn ranges(&self) -> impl Iterator<Item = GpaRange> + Clone {
        self.by_offset.iter().map(|extent| extent.range)
    }

    /// Extents in the order of the file.
    pub(crate) fn extents(&self) -> &[Extent] {
        &self.by_offset
    }

    /// Extents in ascending order of their addresses.
    pub fn ascending(&self) -> &[Extent] {
        &self.by_gpa
    }

    /// Returns the parts of `range` that the file holds, ascending by address.
    pub fn locate(&self, range: GpaRange) -> impl Iterator<Item = Extent> {
        let first = self.by_gpa.partition_point(|extent| extent.range.end() <= range.start());
        self.by_gpa[first..].iter().map_while(move |extent| extent.part(range))
    }

    /// Returns the parts of `range` that the file holds, ascending by address, each with its place in a buffer that holds `range`.
    pub(crate) fn parts_of(&self, range: GpaRange) -> impl Iterator<Item = (Extent, Range<usize>)> {
        self.locate(range).map(move |extent| {
            let at = |gpa: u64| index(gpa - range.start());
            (extent, at(extent.range.start())..at(extent.range.end()))
        })
    }

    /// Whether the file holds every byte of `range`.
    pub fn holds(&self, range: GpaRange) -> bool {
        self.locate(range).map(|extent| extent.range.len()).sum::<u64>() == range.len()
    }

    /// Returns the parts of `range` that the file lacks, ascending.
    pub fn missing(&self, range: GpaRange) -> Vec<GpaRange> {
        let mut missing = Vec::new();
        let mut next = range.start();
        for extent in self.locate(range) {
            missing.extend(GpaRange::from_bounds(next, extent.range.start()).ok());
            next = extent.range.end();
        }
        missing.extend(GpaRange::from_bounds(next, range.end()).ok());
        missing
    }

    /// Returns the guest memory in the `length` bytes at `offset` of the file, in the order of the file.
    pub fn gpas(&self, offset: u64, length: u64) -> impl Iterator<Item = GpaRange> {
        let end = offset.saturating_add(length);
        let first = self.by_offset.partition_point(|extent| extent.offset + extent.range.len() <= offset);
        self.by_offset[first..].iter().map_while(move |extent| {
            let base = extent.range.start();
            let from = base + offset.saturating_sub(extent.offset);
            let to = extent.range.end().min(base.saturating_add(end.saturating_sub(extent.offset)));
            GpaRange::from_bounds(from, to).ok()
        })
    }

    /// Whether both hold the same memory, in any order and pieces.
    pub fn same_memory(&self, other: &Self) -> bool {
        self.bytes == other.bytes && self.ranges().all(|range| other.holds(range))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, len: u64) -> GpaRange {
        GpaRange::new(start, len).unwrap()
    }

    #[test]
    fn overlapping_wrapping_and_empty_ranges_are_refused() {
        let limits = SnapshotLimits::default();
        let overlap = Placement::from_pairs([(0x2000, 0x2000), (0, 0x2001)], &limits);
        assert!(matches!(overlap, Err(PlacementError::Overlap { .. })));
        let wraps = Placement::from_pairs([(0, 0x1000), (u64::MAX, 0x1000)], &limits);
        assert!(matches!(wraps, Err(PlacementError::Range { index: 1, .. })));
        assert!(matches!(Placement::from_pairs([(0, 0)], &limits), Err(PlacementError::Range { .. })));
    }

    #[test]
    fn limits_hold_before_the_ranges_do() {
        let limits = SnapshotLimits { ranges: 1, memory_bytes: 0x2000, ..SnapshotLimits::default() };
        let many = Placement::new([range(0, 1), range(4, 1)], &limits);
        assert_eq!(many, Err(PlacementError::TooManyRanges { limit: 1 }));
        let large = Placement::new([range(0, 0x2001)], &limits);
        assert_eq!(large, Err(PlacementError::TooLarge { limit: 0x2000 }));
    }

    #[test]
    fn c52_a_page_is_found_that_all_ranges_are_made_of_or_the_odd_one_named() {
        let kib_64 = Granule::new(64 << 10).unwrap();
        let page = |pairs: &[(u64, u64)]| {
            Placement::from_pairs(pairs.iter().copied(), &SnapshotLimits::default()).unwrap().page(kib_64)
        };
        assert_eq!(page(&[(0, 1 << 20), (4 << 30, 64 << 10)]), Ok(kib_64));
        assert_eq!(page(&[(0, 1 << 20), (4 << 30, 0x3000)]), Ok(Granule::KIB_4));
        assert_eq!(page(&[(0x8000, 1 << 20)]).unwrap().bytes(), 0x8000);
        assert_eq!(page(&[]), Ok(kib_64));
        let odd = range(0x2000, 0x1800);
        assert_eq!(
            page(&[(0, 0x1000), (0x2000, 0x1800)]),
            Err(PlacementError::Unaligned { range: odd, page: Granule::KIB_4 })
        );
    }

    proptest! {
        #[test]
        fn every_byte_is_found_where_the_order_puts_it(
            sizes in prop::collection::vec((1..40u64, 0..9u64), 1..6),
            seed in any::<u64>(),
            probe in (0..300u64, 1..90u64),
            cut in 1..17u64,
        ) {
            let mut next = 0;
            let mut ranges: Vec<_> = sizes.iter().map(|&(len, gap)| {
                let made = range(next + gap, len);
                next = made.end();
                made
            }).collect();
            let turn = usize::try_from(seed % 6).unwrap() % ranges.len();
            ranges.rotate_left(turn);
            let placement = Placement::new(ranges.iter().copied(), &SnapshotLimits::default()).unwrap();
            let file: Vec<u64> = ranges.iter().flat_map(|range| range.start()..range.end()).collect();

            let probe = range(probe.0, probe.1);
            let mut found = Vec::new();
            for extent in placement.locate(probe).flat_map(|extent| extent.cut(cut)) {
                prop_assert!(extent.offset % cut + extent.range.len() <= cut);
                for byte in 0..extent.range.len() {
                    prop_assert_eq!(file[usize::try_from(extent.offset + byte).unwrap()], extent.range.start() + byte);
                    found.push(extent.range.start() + byte);
                }
            }
            let inside: Vec<u64> = (probe.start()..probe.end()).filter(|gpa| file.contains(gpa)).collect();
            prop_assert_eq!(&found, &inside);
            prop_assert_eq!(placement.holds(probe), inside.len() as u64 == probe.len());
            let missing: u64 = placement.missing(probe).iter().map(|range| range.len()).sum();
            prop_assert_eq!(missing + inside.len() as u64, probe.len());

            let back: Vec<u64> = placement.gpas(probe.start(), probe.len())
                .flat_map(|range| range.start()..range.end()).collect();
            let expected: Vec<u64> = file.iter().copied()
                .skip(usize::try_from(probe.start()).unwrap())
                .take(usize::try_from(probe.len()).unwrap()).collect();
            prop_assert_eq!(back, expected);
        }
    }
}
