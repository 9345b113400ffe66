// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which pages a receiver has asked for, and where in memory it is: pure.

use crate::range::{GpaRange, united};
use crate::transfer::limits::GUEST_PAGE_BYTES;

/// The pages that a receiver asks for, and its cursor: it asks for all of them in order, and in between for those that the guest waits for.
#[derive(Debug)]
pub(super) struct Asked {
    /// Ascending and apart, each with the number of its first page.
    ranges: Vec<(GpaRange, u64)>,
    words: Vec<u64>,
    left: u64,
    /// Up to here it has asked for everything in order.
    cursor: u64,
    last_end: u64,
}

impl Asked {
    /// Nothing of `ram` was asked for yet.
    pub(super) fn nothing(ram: impl IntoIterator<Item = GpaRange>) -> Self {
        let mut pages = 0;
        let number = |range: GpaRange| {
            let first = pages;
            pages += range.len().div_ceil(GUEST_PAGE_BYTES);
            (range, first)
        };
        let ranges: Vec<_> = united(ram).into_iter().map(number).collect();
        let words = usize::try_from(pages.div_ceil(64)).expect("memory of this host has a bit for each page");
        let cursor = ranges.first().map_or(0, |(range, _)| range.start());
        Self { ranges, words: vec![0; words], left: pages, cursor, last_end: cursor }
    }

    /// Pages that were not asked for.
    pub(super) fn left(&self) -> u64 {
        self.left
    }

    /// Notes that a page was asked for, and tells what that means.
    pub(super) fn note(&mut self, page: GpaRange) -> Place {
        self.skip_what_was_asked();
        let at_cursor = page.start() == self.cursor;
        let follows = page.start() == self.last_end;
        let fresh = self.mark(page);
        self.last_end = page.end();
        if at_cursor {
            self.cursor = page.end();
        }
        Place { at_cursor, is_jump: !at_cursor && !follows, fresh_bytes: fresh * GUEST_PAGE_BYTES }
    }

    /// Moves the cursor past pages that the guest has asked for, and from the end of a range to the next one.
    fn skip_what_was_asked(&mut self) {
        loop {
            let at = self.ranges.partition_point(|(range, _)| range.end() <= self.cursor);
            let Some(&(range, first)) = self.ranges.get(at) else { return };
            self.cursor = self.cursor.max(range.start());
            let number = first + (self.cursor - range.start()) / GUEST_PAGE_BYTES;
            if !self.has(number) {
                return;
            }
            self.cursor += GUEST_PAGE_BYTES;
        }
    }

    fn has(&self, number: u64) -> bool {
        let (word, bit) = place_of(number);
        self.words[word] >> bit & 1 == 1
    }

    /// Marks the pages of `page`; returns how many were not marked before.
    fn mark(&mut self, page: GpaRange) -> u64 {
        let mut fresh = 0;
        let at = self.ranges.partition_point(|(range, _)| range.end() <= page.start());
        for &(range, first) in &self.ranges[at..] {
            let Some(part) = range.intersection(page) else { break };
            let begin = first + (part.start() - range.start()) / GUEST_PAGE_BYTES;
            for number in begin..begin + part.len().div_ceil(GUEST_PAGE_BYTES) {
                let (word, bit) = place_of(number);
                fresh += u64::from(self.words[word] >> bit & 1 == 0);
                self.words[word] |= 1 << bit;
            }
        }
        self.left -= fresh;
        fresh
    }
}

fn place_of(number: u64) -> (usize, u64) {
    (usize::try_from(number / 64).expect("within the list"), number % 64)
}

/// What a request for a page means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Whether it is the next page of those that are asked for in order.
    pub(super) at_cursor: bool,
    /// Whether it does not follow the request before it either: then the guest waits for it.
    pub(super) is_jump: bool,
    /// Bytes that were not asked for before.
    pub(super) fresh_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(number: u64) -> GpaRange {
        GpaRange::new(number << 12, 4096).unwrap()
    }

    fn asked() -> Asked {
        Asked::nothing(
            [(0x10_0000, 0x4000), (0, 0x4000)].map(|(at, bytes)| GpaRange::new(at, bytes).unwrap()),
        )
    }

    #[test]
    fn pages_in_order_are_told_from_those_that_the_guest_waits_for() {
        let mut asked = asked();
        let mut order = |number| asked.note(page(number)).at_cursor;
        assert!(order(0));
        assert!(!order(2), "a jump");
        assert!(order(1), "the cursor stayed where it was");
        assert!(order(3), "the cursor skips what was asked for");
        assert!(!order(0x102));
        assert!(order(0x100), "the next range");
        assert!(order(0x101) && order(0x103));
        assert_eq!(asked.left(), 0);
    }

    #[test]
    fn a_page_counts_once_however_often_it_is_asked_for() {
        let mut asked = asked();
        let fresh: Vec<_> = (0..10_000).map(|_| asked.note(page(3)).fresh_bytes).collect();
        assert_eq!((fresh[0], fresh.iter().sum::<u64>()), (4096, 4096));
        assert_eq!(asked.left(), 7);
        let huge = GpaRange::new(0, 0x4000).unwrap();
        assert_eq!(asked.note(huge).fresh_bytes, 0x3000);
        assert_eq!(asked.note(huge).fresh_bytes, 0);
    }

    #[test]
    fn what_follows_a_jump_is_no_jump_and_leaves_the_cursor() {
        let mut asked = asked();
        let places = [0x100, 0x101, 0x102, 0x103, 0, 1].map(|number| asked.note(page(number)));
        assert_eq!(places.map(|place| place.is_jump), [true, false, false, false, false, false]);
        assert_eq!(places.map(|place| place.at_cursor), [false, false, false, false, true, true]);
        assert_eq!(asked.left(), 2);
    }
}
