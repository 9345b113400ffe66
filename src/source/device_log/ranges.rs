// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which IOVA ranges a device is asked to log: what is mapped, in as few ranges as the device can hold.

use crate::bitmap::WORD_BITS;
use crate::granule::Granule;
use crate::range::{IovaRange, united};
use crate::source::mapped::joined;

const GIB_4: u64 = 4 << 30;

/// Rounds `wanted`, united, outward to the coarsest granule from `hint` down to `floor` that adds nothing but memory of `mapped`.
///
/// Returns the granule and the ranges, united again; `None` where even `floor` would reach into unmapped space.
pub(super) fn rounded(
    wanted: &[IovaRange],
    mapped: &[IovaRange],
    hint: Granule,
    floor: Granule,
) -> Option<(Granule, Vec<IovaRange>)> {
    let room = united(wanted.iter().chain(mapped).copied());
    let within = |range: IovaRange| room.iter().any(|room| room.covers(range));
    (floor.shift()..=hint.shift().max(floor.shift())).rev().find_map(|shift| {
        let granule = Granule::new(1 << shift).ok()?;
        let outward = wanted.iter().map(|range| range.align_outward(granule.bytes()));
        let outward: Option<Vec<_>> = outward.map(|range| range.filter(|range| within(*range))).collect();
        Some((granule, united(outward?)))
    })
}

/// Bytes that a word of the device's bitmap stands for.
pub(super) fn word_bytes(granule: Granule) -> u64 {
    (WORD_BITS as u64) << granule.shift()
}

/// Grows ascending, disjoint ranges so that no two share a word of a bitmap, whether the driver keeps one for each, or, as pds
/// does, one for all that begins with the lowest.
///
/// Ranges less than a word apart are joined, and each begins where a word of the lowest one's bitmap does.
pub(super) fn in_words(ranges: &[IovaRange], granule: Granule) -> Vec<IovaRange> {
    let word = word_bytes(granule);
    let origin = ranges.first().map_or(0, |first| first.start());
    let apart = joined(ranges.iter().copied(), |open, next| next.start() - open.end() < word);
    let lowered = |range: IovaRange| {
        let start = range.start() - (range.start() - origin) % word;
        IovaRange::from_bounds(start, range.end()).expect("a range that grew")
    };
    apart.into_iter().map(lowered).collect()
}

/// Merges ascending, disjoint ranges into at most `count`, over as little unmapped space as possible.
///
/// The hole below 4 GiB, where a PC keeps its devices, stays out while there may be two ranges: one that reaches from low RAM to high
/// costs more than any other.
pub(super) fn merged(ranges: &[IovaRange], count: usize) -> Vec<IovaRange> {
    let mut gaps: Vec<_> = ranges.windows(2).map(|pair| (pair[0].end(), pair[1].start())).collect();
    gaps.sort_unstable_by_key(|&(end, start)| {
        let around_4_gib = end <= GIB_4 && start >= GIB_4;
        std::cmp::Reverse((around_4_gib, start - end))
    });
    gaps.truncate(count.saturating_sub(1));
    joined(ranges.iter().copied(), |open, next| !gaps.contains(&(open.end(), next.start())))
}

/// The search for a number of ranges that a device accepts, where more of them is too many (`E2BIG`) and fewer of them, merged
/// over gaps, is too much memory (`EOPNOTSUPP`).
#[derive(Debug)]
pub(super) struct Search {
    /// Merged into so many ranges, they span too much; 0 is never tried.
    too_few: usize,
    /// So many are refused.
    too_many: usize,
    next: Option<usize>,
}

impl Search {
    /// Begins with as many ranges as there are, or may be.
    pub(super) fn new(ranges: usize, max_ranges: usize) -> Self {
        let most = ranges.min(max_ranges).max(1);
        Self { too_few: 0, too_many: most + 1, next: Some(most) }
    }

    /// The number to try next; `None` when there is none left.
    pub(super) fn count(&self) -> Option<usize> {
        self.next
    }

    /// Takes in that the device refused the number tried last.
    pub(super) fn refused(&mut self, errno: Option<i32>) {
        let Some(tried) = self.next.take() else { return };
        match errno {
            Some(libc::E2BIG) => self.too_many = tried,
            Some(libc::EOPNOTSUPP) => self.too_few = tried,
            _ => return,
        }
        let room = self.too_many - self.too_few;
        self.next = (room > 1).then(|| self.too_few + room / 2);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, len: u64) -> IovaRange {
        IovaRange::new(start, len).unwrap()
    }

    fn search(ranges: usize, max_ranges: usize, accepts: impl Fn(usize) -> i32) -> (Option<usize>, usize) {
        let (mut search, mut tries) = (Search::new(ranges, max_ranges), 0);
        while let Some(count) = search.count() {
            tries += 1;
            match accepts(count) {
                0 => return (Some(count), tries),
                errno => search.refused(Some(errno)),
            }
        }
        (None, tries)
    }

    #[test]
    fn c10_the_hole_below_4_gib_stays_out_of_two_ranges_however_wide_other_gaps_are() {
        let low = [range(0, 0xa_0000), range(0x10_0000, 0xbff0_0000)];
        let high = [range(4 << 30, 1 << 30), range(1 << 40, 1 << 30)];
        let ranges = [low, high].concat();
        assert_eq!(merged(&ranges, 4), ranges);
        assert_eq!(merged(&ranges, 3), [range(0, 0xc000_0000), high[0], high[1]]);
        assert_eq!(merged(&ranges, 2), [range(0, 0xc000_0000), range(4 << 30, (1 << 40) - (3 << 30))]);
        assert_eq!(merged(&ranges, 1), [range(0, (1 << 40) + (1 << 30))]);
    }

    #[test]
    fn c10_too_many_ranges_are_halved_until_the_device_takes_them() {
        let most = |limit| move |count| if count > limit { libc::E2BIG } else { 0 };
        assert_eq!(search(256, 256, most(3)), (Some(2), 8));
        assert_eq!(search(3, 256, most(3)), (Some(3), 1));
        assert_eq!(search(1000, 256, most(256)), (Some(256), 1));
        assert_eq!(search(9, 4, most(4)), (Some(4), 1));
        assert_eq!(search(9, 0, most(4)), (Some(1), 1));
    }

    #[test]
    fn c10_a_span_too_long_is_answered_with_more_ranges_never_with_as_many_again() {
        let device = |count| match count {
            8.. => libc::E2BIG,
            6..=7 => 0,
            _ => libc::EOPNOTSUPP,
        };
        assert_eq!(search(10, 256, device).0, Some(7));
        assert_eq!(search(10, 256, |_| libc::EOPNOTSUPP), (None, 1));
        assert_eq!(search(10, 256, |_| libc::EBUSY), (None, 1));
        let (found, tries) = search(64, 256, |count| if count > 5 { libc::E2BIG } else { libc::EOPNOTSUPP });
        assert!(found.is_none() && tries < 9, "{tries} tries");
    }

    proptest! {
        #[test]
        fn c43_rounding_adds_nothing_but_mapped_memory_and_is_as_coarse_as_can_be(
            mapped in prop::collection::vec((0..60u64, 1..30u64), 1..5), skip in 0..20u64, take in 1..40u64, hint in 12..17u32,
        ) {
            let mapped = united(mapped.into_iter().map(|(page, pages)| range(page << 12, pages << 12)));
            let cut = range(skip << 12, take << 12);
            let wanted: Vec<_> = mapped.iter().filter_map(|range| range.intersection(cut)).collect();
            prop_assume!(!wanted.is_empty());
            let floor = Granule::KIB_4;
            let (granule, found) = rounded(&wanted, &mapped, Granule::new(1 << hint).unwrap(), floor).unwrap();
            let page_of = |ranges: &[IovaRange], page: u64| ranges.iter().any(|range| range.contains(page << 12));
            for page in 0..128 {
                prop_assert!(!page_of(&wanted, page) || page_of(&found, page));
                prop_assert!(!page_of(&found, page) || page_of(&mapped, page));
            }
            for range in &found {
                prop_assert!(granule.is_aligned(range.start()) && granule.is_aligned(range.end()));
            }
            let coarser_fits = |shift: u32| wanted.iter().all(|range| {
                let (from, to) = (range.start() >> shift, range.end().div_ceil(1 << shift));
                ((from << shift) >> 12..(to << shift) >> 12).all(|page| page_of(&mapped, page))
            });
            prop_assert!((granule.shift() + 1..=hint).all(|shift| !coarser_fits(shift)));
        }

        #[test]
        fn c55_no_two_ranges_share_a_word_of_one_bitmap_for_all(
            steps in prop::collection::vec((0..300u64, 1..200u64), 1..7),
        ) {
            let mut next = 0;
            let ranges = steps.iter().map(|&(gap, pages)| {
                let placed = range((next + gap) << 12, pages << 12);
                next += gap + pages;
                placed
            });
            let ranges = united(ranges);
            let found = in_words(&ranges, Granule::KIB_4);
            let origin = ranges[0].start();
            prop_assert!(ranges.iter().all(|range| found.iter().any(|found| found.covers(*range))));
            prop_assert!(found.iter().all(|found| (found.start() - origin).is_multiple_of(64 << 12)));
            let word_of = |iova: u64| (iova - origin) / (64 << 12);
            prop_assert!(found.windows(2).all(|pair| word_of(pair[0].end() - 1) < word_of(pair[1].start())));
            let added: u64 = found.iter().map(|range| range.len()).sum::<u64>() - ranges.iter().map(|range| range.len()).sum::<u64>();
            prop_assert!(added < ranges.len() as u64 * (64 << 12));
        }

        #[test]
        fn merging_covers_all_with_no_more_than_asked_over_the_least_unmapped_space(
            steps in prop::collection::vec((1..50u64, 1..9u64), 1..7), count in 1..7usize,
        ) {
            let mut next = 0;
            let ranges: Vec<_> = steps.iter().map(|&(gap, len)| {
                let placed = range(next + gap, len);
                next = placed.end();
                placed
            }).collect();
            let found = merged(&ranges, count);
            prop_assert_eq!(found.len(), count.min(ranges.len()));
            prop_assert!(ranges.iter().all(|range| found.iter().any(|found| found.covers(*range))));
            let total = |ranges: &[IovaRange]| ranges.iter().map(|range| range.len()).sum::<u64>();
            let mut gaps: Vec<_> = ranges.windows(2).map(|pair| pair[1].start() - pair[0].end()).collect();
            gaps.sort_unstable();
            let least: u64 = gaps.iter().take(ranges.len() - found.len()).sum();
            prop_assert_eq!(total(&found), total(&ranges) + least);
        }
    }
}
