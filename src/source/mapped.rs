// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The mappings a source reads the bits of, and the fewest requests that read them.

use std::collections::BTreeMap;

use crate::iova::{IovaMap, Mapping};
use crate::layout::Layout;
use crate::range::{GpaRange, IovaRange, Range};

/// The current mappings, as one source knows them: disjoint in IOVA.
#[derive(Debug, Default)]
pub(super) struct Mapped {
    by_iova: BTreeMap<u64, Mapping>,
}

impl Mapped {
    /// Returns what a device reaches at the start of a migration: the RAM regions, or the mappings of a virtual IOMMU.
    pub(super) fn at_start(layout: &Layout, iova: &IovaMap) -> Self {
        let mut mapped = Self::default();
        match iova {
            IovaMap::Identity => {
                layout.regions().iter().for_each(|region| mapped.add(Mapping::identity(region.range())));
            }
            IovaMap::Journal(journal) => journal.mappings().for_each(|&mapping| mapped.add(mapping)),
        }
        mapped
    }

    /// Takes in a mapping.
    pub(super) fn add(&mut self, mapping: Mapping) {
        self.by_iova.insert(mapping.iova().start(), mapping);
    }

    /// Drops the mappings that lie wholly inside `iova`.
    pub(super) fn remove(&mut self, iova: IovaRange) {
        let inside = self.by_iova.range(iova.start()..iova.end());
        let inside: Vec<_> =
            inside.filter(|(_, mapping)| iova.covers(mapping.iova())).map(|(&start, _)| start).collect();
        for start in inside {
            self.by_iova.remove(&start);
        }
    }

    /// Mappings that stand, ascending by IOVA.
    pub(super) fn iter(&self) -> impl Iterator<Item = Mapping> {
        self.by_iova.values().copied()
    }

    /// Returns the guest memory they lead to.
    pub(super) fn gpa_ranges(&self) -> Vec<GpaRange> {
        self.iter().map(|mapping| mapping.gpa()).collect()
    }
}

/// Puts ascending, disjoint ranges into as few spans as there can be without skipping more than `gap` unwanted bytes inside one, or
/// making one longer than `limit` where each range alone is not. No span cuts a range.
pub(super) fn spans(ranges: impl IntoIterator<Item = IovaRange>, gap: u64, limit: u64) -> Vec<IovaRange> {
    joined(ranges, |open, next| next.start() - open.end() <= gap && next.end() - open.start() <= limit)
}

/// Joins each range to the one before it where `near` says so.
pub(super) fn joined<S>(
    ranges: impl IntoIterator<Item = Range<S>>,
    near: impl Fn(Range<S>, Range<S>) -> bool,
) -> Vec<Range<S>> {
    let mut joined: Vec<Range<S>> = Vec::new();
    for next in ranges {
        match joined.last_mut() {
            Some(open) if near(*open, next) => {
                let end = open.end().max(next.end());
                *open = Range::from_bounds(open.start(), end).expect("the union of two ranges");
            }
            _ => joined.push(next),
        }
    }
    joined
}

/// Returns the first `count` words of `buffer`, all zero.
pub(super) fn zeroed(buffer: &mut Vec<u64>, count: usize) -> &mut [u64] {
    if buffer.len() < count {
        buffer.resize(count, 0);
    }
    let words = &mut buffer[..count];
    words.fill(0);
    words
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, len: u64) -> IovaRange {
        IovaRange::new(start, len).unwrap()
    }

    /// Ascending disjoint ranges from (gap, length) pairs.
    fn ascending(steps: &[(u64, u64)]) -> Vec<IovaRange> {
        let mut next = 0;
        let place = |&(gap, len): &(u64, u64)| {
            let placed = range(next + gap, len);
            next = placed.end();
            placed
        };
        steps.iter().map(place).collect()
    }

    #[test]
    fn a_removed_span_takes_only_whole_mappings_with_it() {
        let mut mapped = Mapped::default();
        for start in [0x1000, 0x2000, 0x4000] {
            mapped.add(Mapping::identity(GpaRange::new(start, 0x1000).unwrap()));
        }
        mapped.remove(range(0x1000, 0x2000));
        assert_eq!(mapped.gpa_ranges(), [GpaRange::new(0x4000, 0x1000).unwrap()]);
    }

    proptest! {
        #[test]
        fn spans_hold_every_range_whole_and_keep_both_limits(
            steps in prop::collection::vec((0..20u64, 1..30u64), 1..20), gap in 0..15u64, limit in 1..80u64,
        ) {
            let ranges = ascending(&steps);
            let spans = spans(ranges.iter().copied(), gap, limit);
            for &range in &ranges {
                prop_assert_eq!(spans.iter().filter(|span| span.covers(range)).count(), 1);
            }
            for span in &spans {
                let held: Vec<_> = ranges.iter().filter(|range| span.covers(**range)).collect();
                prop_assert!(span.len() <= limit || held.len() == 1);
                prop_assert!(held.windows(2).all(|pair| pair[1].start() - pair[0].end() <= gap));
                prop_assert_eq!((span.start(), span.end()), (held[0].start(), held[held.len() - 1].end()));
            }
        }
    }
}
