// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device's log of its own DMA writes: exact per page, reported at any granule.

use super::Errno;
use super::stream::PAGE_BYTES;

const PAGE: u64 = PAGE_BYTES as u64;
/// Largest span that is logged, in words of its bitmap: 32 TiB of 4 KiB pages.
const MAX_SPAN_WORDS: usize = 1 << 27;

/// Logs DMA writes to a set of spans.
#[derive(Debug)]
pub(super) struct DirtyLog {
    granule: u64,
    spans: Vec<Span>,
}

#[derive(Debug)]
struct Span {
    start: u64,
    end: u64,
    dirty: Vec<u64>,
}

impl DirtyLog {
    /// Starts an empty log whose granule is `granule` bytes.
    pub(super) fn new(granule: u64) -> Self {
        DirtyLog { granule, spans: Vec::new() }
    }

    pub(super) fn granule(&self) -> u64 {
        self.granule
    }

    /// Begins to log `length` bytes at `start` as well; they overlap nothing that is logged.
    pub(super) fn cover(&mut self, start: u64, length: u64) -> Result<(), Errno> {
        let end = start.checked_add(length).ok_or(Errno(libc::EOVERFLOW))?;
        let misaligned = !start.is_multiple_of(PAGE) || !length.is_multiple_of(PAGE);
        if length == 0 || misaligned || self.spans.iter().any(|span| start < span.end && span.start < end) {
            return Err(Errno(libc::EINVAL));
        }
        let words = usize::try_from((length / PAGE).div_ceil(64)).map_err(|_| Errno(libc::E2BIG))?;
        if words > MAX_SPAN_WORDS {
            return Err(Errno(libc::E2BIG));
        }
        self.spans.push(Span { start, end, dirty: vec![0; words] });
        Ok(())
    }

    /// Stops to log the span that is exactly `length` bytes at `start`, if there is one.
    pub(super) fn uncover(&mut self, start: u64, length: u64) {
        self.spans.retain(|span| span.start != start || span.end - span.start != length);
    }

    /// Notes a write to the page at `iova`.
    pub(super) fn mark(&mut self, iova: u64) {
        if let Some(span) = self.spans.iter_mut().find(|span| (span.start..span.end).contains(&iova)) {
            let (word, bit) = place((iova - span.start) / PAGE);
            span.dirty[word] |= bit;
        }
    }

    /// Returns the bitmap of `length` bytes at `iova`, one bit per `page_size`, and clears what it reports.
    ///
    /// A write marks the whole granule of the log it lies in, as far as it was asked for.
    pub(super) fn report(&mut self, iova: u64, length: u64, page_size: u64) -> Result<Vec<u64>, Errno> {
        let end = iova.checked_add(length).ok_or(Errno(libc::EOVERFLOW))?;
        if page_size < PAGE || !page_size.is_power_of_two() || !self.covers(iova, end) {
            return Err(Errno(libc::EINVAL));
        }
        let words =
            usize::try_from(length.div_ceil(page_size).div_ceil(64)).map_err(|_| Errno(libc::E2BIG))?;
        let (mut bitmap, granule) = (vec![0; words], self.granule);
        for span in &mut self.spans {
            span.drain(iova, end, |page| {
                let from = (page - page % granule).max(iova);
                let to = (page - page % granule + granule).min(end);
                for unit in (from - iova) / page_size..=(to - 1 - iova) / page_size {
                    let (word, bit) = place(unit);
                    bitmap[word] |= bit;
                }
            });
        }
        Ok(bitmap)
    }

    fn covers(&self, start: u64, end: u64) -> bool {
        let inside = |span: &Span| span.end.min(end).saturating_sub(span.start.max(start));
        self.spans.iter().map(inside).sum::<u64>() == end - start
    }
}

impl Span {
    /// Calls `found` with the IOVA of each dirty page in `from..to` and cleans it.
    fn drain(&mut self, from: u64, to: u64, mut found: impl FnMut(u64)) {
        let (from, to) = (from.max(self.start), to.min(self.end));
        if from >= to {
            return;
        }
        let mut page = from - from % PAGE;
        while page < to {
            let (word, bit) = place((page - self.start) / PAGE);
            if self.dirty[word] & bit != 0 {
                self.dirty[word] &= !bit;
                found(page);
            }
            page += if self.dirty[word] == 0 { 64 * PAGE - (page - self.start) % (64 * PAGE) } else { PAGE };
        }
    }
}

fn place(page: u64) -> (usize, u64) {
    let word = usize::try_from(page / 64).expect("spans are limited to MAX_SPAN_WORDS");
    (word, 1 << (page % 64))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn log(granule: u64, spans: &[(u64, u64)]) -> DirtyLog {
        let mut log = DirtyLog::new(granule);
        for (start, length) in spans {
            log.cover(*start, *length).unwrap();
        }
        log
    }

    #[test]
    fn report_clears_what_it_reports_and_only_that() {
        let mut log = log(PAGE, &[(0, 128 * PAGE)]);
        log.mark(3 * PAGE);
        log.mark(100 * PAGE);
        assert_eq!(log.report(0, 64 * PAGE, PAGE).unwrap(), [1 << 3]);
        assert_eq!(log.report(0, 128 * PAGE, PAGE).unwrap(), [0, 1 << 36]);
        assert_eq!(log.report(0, 128 * PAGE, PAGE).unwrap(), [0, 0]);
    }

    #[test]
    fn coarse_log_marks_the_whole_granule() {
        let mut log = log(16 * PAGE, &[(0, 64 * PAGE)]);
        log.mark(17 * PAGE);
        assert_eq!(log.report(0, 64 * PAGE, PAGE).unwrap(), [0xffff_0000]);
        log.mark(17 * PAGE);
        assert_eq!(log.report(0, 64 * PAGE, 32 * PAGE).unwrap(), [1]);
    }

    #[test]
    fn ranges_that_overlap_or_are_not_whole_pages_are_refused() {
        let mut log = log(PAGE, &[(0, 4 * PAGE)]);
        for (start, length) in [(3 * PAGE, PAGE), (5 * PAGE + 1, PAGE), (8 * PAGE, 0)] {
            assert_eq!(log.cover(start, length), Err(Errno(libc::EINVAL)), "{start:#x} {length:#x}");
        }
        assert_eq!(log.cover(0_u64.wrapping_sub(PAGE), 2 * PAGE), Err(Errno(libc::EOVERFLOW)));
    }

    #[test]
    fn report_of_what_is_not_logged_is_refused() {
        let mut log = log(PAGE, &[(0, 4 * PAGE), (8 * PAGE, 4 * PAGE)]);
        assert_eq!(log.report(0, 5 * PAGE, PAGE), Err(Errno(libc::EINVAL)));
        assert_eq!(log.report(0, 4 * PAGE, 3000), Err(Errno(libc::EINVAL)));
        log.cover(4 * PAGE, 4 * PAGE).unwrap();
        assert_eq!(log.report(0, 12 * PAGE, PAGE).unwrap(), [0]);
    }

    proptest! {
        #[test]
        fn reports_equal_a_page_at_a_time_oracle(
            writes in proptest::collection::vec((0_u64..300, any::<bool>()), 0..80),
            reports in proptest::collection::vec((0_u64..100, 1_u64..100, 0_u32..6), 1..8), shift in 0_u32..6,
        ) {
            let granule = PAGE << shift;
            let pages = 320_u64;
            let mut log = log(granule, &[(0, pages * PAGE)]);
            let mut oracle = BTreeSet::new();
            let mut writes = writes.into_iter();
            for (start, length, unit) in reports {
                for (page, _) in writes.by_ref().take_while(|(_, go_on)| *go_on) {
                    log.mark(page * PAGE);
                    oracle.insert(page);
                }
                let length = length.min(pages - start);
                let bitmap = log.report(start * PAGE, length * PAGE, PAGE << unit).unwrap();
                let mut expected = vec![0_u64; bitmap.len()];
                for page in start..start + length {
                    let near = page - page % (1 << shift)..page - page % (1 << shift) + (1 << shift);
                    let dirty = near.clone().any(|other| {
                        (start..start + length).contains(&other) && oracle.contains(&other)
                    });
                    let bit = (page - start) >> unit;
                    expected[usize::try_from(bit / 64).unwrap()] |= u64::from(dirty) << (bit % 64);
                }
                oracle.retain(|page| !(start..start + length).contains(page));
                prop_assert_eq!(bitmap, expected);
            }
        }
    }
}
