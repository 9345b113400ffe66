// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Half-open, never empty, never wrapping address ranges, one type per address space.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::marker::PhantomData;

use thiserror::Error;

/// Marks guest-physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Gpa {}

/// Marks I/O virtual addresses: what a device puts on the bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Iova {}

/// A half-open range of guest-physical bytes.
pub type GpaRange = Range<Gpa>;

/// A half-open range of I/O virtual bytes.
pub type IovaRange = Range<Iova>;

/// Why two numbers are not a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RangeError {
    /// The range would hold no byte.
    #[error("Range at {start:#x} is empty")]
    Empty {
        /// First byte.
        start: u64,
    },
    /// The end lies past the last address.
    #[error("Range at {start:#x} of length {length:#x} wraps around")]
    Wraps {
        /// First byte.
        start: u64,
        /// Bytes asked for.
        length: u64,
    },
}

/// A half-open range `start..end` of bytes in address space `S`; holds at least one byte and does not wrap.
///
/// ```
/// use vfio_migration::range::GpaRange;
/// let low = GpaRange::new(0x1000, 0x2000)?;
/// assert_eq!((low.start(), low.end()), (0x1000, 0x3000));
/// assert!(GpaRange::new(u64::MAX, 2).is_err());
/// # Ok::<(), vfio_migration::range::RangeError>(())
/// ```
pub struct Range<S> {
    start: u64,
    end: u64,
    space: PhantomData<S>,
}

impl<S> Range<S> {
    /// Makes the range of `length` bytes that begins at `start`.
    ///
    /// # Errors
    /// `length` is zero, or the range reaches past `u64::MAX`.
    pub fn new(start: u64, length: u64) -> Result<Self, RangeError> {
        let end = start.checked_add(length).ok_or(RangeError::Wraps { start, length })?;
        Self::from_bounds(start, end)
    }

    /// Makes the range from `start` up to, not including, `end`.
    ///
    /// # Errors
    /// `end` is not above `start`.
    pub fn from_bounds(start: u64, end: u64) -> Result<Self, RangeError> {
        if end > start {
            Ok(Self { start, end, space: PhantomData })
        } else {
            Err(RangeError::Empty { start })
        }
    }

    /// First byte.
    pub fn start(self) -> u64 {
        self.start
    }

    /// First byte after the range.
    pub fn end(self) -> u64 {
        self.end
    }

    /// Bytes in the range; never zero.
    #[expect(clippy::len_without_is_empty, reason = "a range is never empty")]
    pub fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether the byte at `address` lies inside.
    pub fn contains(self, address: u64) -> bool {
        self.start <= address && address < self.end
    }

    /// Whether every byte of `other` lies inside.
    pub fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Returns the bytes in both ranges.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        Self::from_bounds(self.start.max(other.start), self.end.min(other.end)).ok()
    }

    /// Grows the range outward to multiples of `align` (a power of two); `None` where that would wrap.
    #[must_use]
    pub fn align_outward(self, align: u64) -> Option<Self> {
        debug_assert!(align.is_power_of_two());
        let end = self.end.checked_add(align - 1)? & !(align - 1);
        Self::from_bounds(self.start & !(align - 1), end).ok()
    }

    /// Cuts the range into pieces of at most `bytes` bytes, in ascending order.
    ///
    /// # Panics
    /// `bytes` is zero.
    pub fn pieces(self, bytes: u64) -> impl Iterator<Item = Self> + Clone {
        assert!(bytes > 0, "pieces of no bytes");
        let mut next = self.start;
        std::iter::from_fn(move || {
            let end = self.end.min(next.saturating_add(bytes));
            let piece = Self::from_bounds(next, end).ok()?;
            next = end;
            Some(piece)
        })
    }
}

/// Returns the first part of `wanted` that lies outside all of `held`, whatever their order.
pub(crate) fn first_outside<S>(
    wanted: &[Range<S>],
    held: impl IntoIterator<Item = Range<S>>,
) -> Option<Range<S>> {
    let held = united(held);
    wanted.iter().find_map(|range| {
        let mut rest = held[held.partition_point(|holder| holder.end <= range.start)..].iter().copied();
        let first = rest.next();
        let (start, after) = match first.filter(|holder| holder.start <= range.start) {
            Some(holder) => (holder.end, rest.next()),
            None => (range.start, first),
        };
        let end = after.map_or(range.end, |holder| holder.start.min(range.end));
        Range::from_bounds(start, end).ok()
    })
}

/// Unites ranges that touch or overlap; returns them ascending.
pub(crate) fn united<S>(ranges: impl IntoIterator<Item = Range<S>>) -> Vec<Range<S>> {
    let mut ranges: Vec<_> = ranges.into_iter().collect();
    ranges.sort_unstable();
    ranges.dedup_by(|next, last| {
        let touches = next.start <= last.end;
        if touches {
            last.end = last.end.max(next.end);
        }
        touches
    });
    ranges
}

/// Takes the bytes of `gone` out of `ranges`.
pub(crate) fn subtract<S>(ranges: &mut Vec<Range<S>>, gone: Range<S>) {
    let rest = |range: Range<S>| {
        let below = Range::from_bounds(range.start, range.end.min(gone.start)).ok();
        let above = Range::from_bounds(range.start.max(gone.end), range.end).ok();
        below.into_iter().chain(above)
    };
    *ranges = ranges.drain(..).flat_map(rest).collect();
}

impl<S> Clone for Range<S> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<S> Copy for Range<S> {}

impl<S> PartialEq for Range<S> {
    fn eq(&self, other: &Self) -> bool {
        (self.start, self.end) == (other.start, other.end)
    }
}

impl<S> Eq for Range<S> {}

impl<S> PartialOrd for Range<S> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<S> Ord for Range<S> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.start, self.end).cmp(&(other.start, other.end))
    }
}

impl<S> Hash for Range<S> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.start, self.end).hash(state);
    }
}

impl<S> fmt::Debug for Range<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<S> fmt::Display for Range<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn empty_and_wrapping_ranges_are_refused() {
        assert_eq!(GpaRange::new(5, 0), Err(RangeError::Empty { start: 5 }));
        assert_eq!(GpaRange::new(u64::MAX, 2), Err(RangeError::Wraps { start: u64::MAX, length: 2 }));
        assert_eq!(GpaRange::from_bounds(9, 4), Err(RangeError::Empty { start: 9 }));
    }

    #[test]
    fn aligning_at_the_last_page_does_not_wrap() {
        let last = GpaRange::from_bounds(u64::MAX - 1, u64::MAX).unwrap();
        assert_eq!(last.align_outward(1 << 12), None);
    }

    #[test]
    fn c53_a_million_ranges_are_compared_in_no_time() {
        let ranges: Vec<_> = (0..1u64 << 20).map(|at| GpaRange::new(at * 8192, 4096).unwrap()).collect();
        let held = ranges.iter().rev().copied();
        let begun = std::time::Instant::now();
        assert_eq!(first_outside(&ranges, held), None);
        assert!(begun.elapsed() < std::time::Duration::from_secs(20), "{:?}", begun.elapsed());
    }

    proptest! {
        #[test]
        fn the_union_holds_the_same_bytes_in_ranges_that_do_not_touch(
            ranges in prop::collection::vec((0..60u64, 1..12u64), 0..12),
        ) {
            let ranges: Vec<_> = ranges.into_iter().map(|(at, len)| IovaRange::new(at, len).unwrap()).collect();
            let united = united(ranges.iter().copied());
            prop_assert!(united.windows(2).all(|pair| pair[0].end() < pair[1].start()));
            for byte in 0..80 {
                let inside = |ranges: &[IovaRange]| ranges.iter().any(|range| range.contains(byte));
                prop_assert_eq!(inside(&united), inside(&ranges));
            }
        }

        #[test]
        fn pieces_rebuild_the_range(start in 0..1u64 << 40, len in 1..1u64 << 16, bytes in 1..1u64 << 12) {
            let whole = GpaRange::new(start, len).unwrap();
            let mut next = start;
            for piece in whole.pieces(bytes) {
                prop_assert_eq!(piece.start(), next);
                prop_assert!(piece.len() <= bytes);
                next = piece.end();
            }
            prop_assert_eq!(next, whole.end());
        }

        #[test]
        fn the_first_part_outside_equals_a_byte_at_a_time_oracle(
            wanted in prop::collection::vec((0..60u64, 1..20u64), 1..4),
            held in prop::collection::vec((0..60u64, 1..20u64), 0..6),
        ) {
            let range = |&(start, len): &(u64, u64)| GpaRange::new(start, len).unwrap();
            let (wanted, held): (Vec<_>, Vec<_>) = (wanted.iter().map(range).collect(), held.iter().map(range).collect());
            let is_held = |byte: u64| held.iter().any(|range| range.contains(byte));
            let expected = wanted.iter().find_map(|range| {
                let start = (range.start()..range.end()).find(|&byte| !is_held(byte))?;
                let end = (start..range.end()).find(|&byte| is_held(byte)).unwrap_or(range.end());
                GpaRange::from_bounds(start, end).ok()
            });
            prop_assert_eq!(first_outside(&wanted, held.iter().copied()), expected);

            let mut rest = wanted.clone();
            held.iter().for_each(|&gone| subtract(&mut rest, gone));
            for byte in 0..90 {
                let expected = wanted.iter().any(|range| range.contains(byte)) && !is_held(byte);
                prop_assert_eq!(rest.iter().any(|range| range.contains(byte)), expected);
            }
        }

        #[test]
        fn intersection_holds_just_the_common_bytes(a in 0..64u64, b in 1..64u64, c in 0..64u64, d in 1..64u64) {
            let (x, y) = (GpaRange::new(a, b).unwrap(), GpaRange::new(c, d).unwrap());
            let both = x.intersection(y);
            for byte in 0..130 {
                prop_assert_eq!(both.is_some_and(|r| r.contains(byte)), x.contains(byte) && y.contains(byte));
            }
        }
    }
}
