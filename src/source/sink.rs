// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where a source's report lands: what it read turns into bits of host pages.

use std::ops::Range;

use thiserror::Error;

use super::marks::{Lent, Marks};
use crate::bitmap::{self, WORD_BITS};
use crate::granule::Granule;
use crate::iova::{IovaMap, Mapping};
use crate::layout::Layout;
use crate::range::{GpaRange, IovaRange};
use crate::units::Count;

/// A bitmap is too short for its range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("Bitmap of {} is too short for {}", Count(.words, "word"), Count(.bits, "bit"))]
#[non_exhaustive]
pub struct ShortBitmap {
    /// Words given.
    pub words: usize,
    /// Bits the range takes.
    pub bits: u64,
}

/// Where one source's report lands: marks on host pages, in the layout's order.
///
/// Marks only add up. Bytes that are not RAM are ignored; a bit that stands for more than a host page marks every host page
/// it touches, one that stands for less marks the page it lies in.
#[derive(Debug)]
pub struct Sink<'a> {
    layout: &'a Layout,
    iova: &'a IovaMap,
    pub(crate) marks: &'a mut Marks,
    /// Lent words, to be read when all sources have reported; `None` where lending is off and all is copied into the
    /// marks.
    pub(crate) lent: Option<Vec<Lent<'a>>>,
}

impl<'a> Sink<'a> {
    /// Makes a sink that copies every report into `marks`.
    pub(crate) fn new(layout: &'a Layout, iova: &'a IovaMap, marks: &'a mut Marks) -> Self {
        Self { layout, iova, marks, lent: None }
    }

    /// Makes a sink that also accepts lent words, for the ledger that unites all reports.
    pub(crate) fn lending(layout: &'a Layout, iova: &'a IovaMap, marks: &'a mut Marks) -> Self {
        let lent = Some(marks.room_for_loans());
        Self { layout, iova, marks, lent }
    }

    /// Ends all loans: what was lent is in the marks, unless `read` tells that it was made use of.
    pub(crate) fn give_back(&mut self, read: bool) {
        let Some(lent) = self.lent.take() else { return };
        if !read {
            lent.iter().for_each(|lent| self.marks.copy(lent));
        }
        self.marks.keep_room(lent);
    }

    /// The VM's RAM.
    pub fn layout(&self) -> &'a Layout {
        self.layout
    }

    /// Where the source's IOVAs lead.
    pub fn iova(&self) -> &'a IovaMap {
        self.iova
    }

    /// Marks every page that holds a byte of `range`.
    pub fn gpa_range(&mut self, range: GpaRange) {
        for bits in self.layout.bits_of(range) {
            self.marks.dirty.set(bits);
        }
    }

    /// Marks every page that a byte of `range` leads to.
    pub fn iova_range(&mut self, range: IovaRange) {
        for mapping in self.iova.translate(range) {
            self.gpa_range(mapping.gpa());
        }
    }

    /// Marks the pages of the bits set in `words`, whose bit 0 stands for the first granule of `range`.
    ///
    /// Bits past the end of `range` are ignored, whatever they say.
    ///
    /// # Errors
    /// `words` does not reach to the end of `range`.
    pub fn gpa_words(&mut self, range: GpaRange, granule: Granule, words: &[u64]) -> Result<(), ShortBitmap> {
        match self.in_layout(range, granule, words, None)? {
            Some(in_layout) => self.marks.copy(&in_layout),
            None => self.gpa_runs(range, granule, words),
        }
        Ok(())
    }

    /// Marks as [`Sink::gpa_words`] does, without a copy: `words` are read when all sources have reported.
    ///
    /// Of `standing`, as many words, the bits set are those that the source reported before and left standing: see
    /// [`Sink::counted_before`].
    ///
    /// # Errors
    /// As [`Sink::gpa_words`], of either.
    pub fn lend_gpa_words(
        &mut self,
        range: GpaRange,
        granule: Granule,
        words: &'a [u64],
        standing: Option<&'a [u64]>,
    ) -> Result<(), ShortBitmap> {
        match (self.in_layout(range, granule, words, standing)?, &mut self.lent) {
            (Some(in_layout), Some(lent)) => lent.push(in_layout),
            (Some(in_layout), None) => self.marks.copy(&in_layout),
            (None, _) => {
                self.gpa_runs(range, granule, words);
                standing.map_or(Ok(()), |standing| self.repeat(range, granule, words, standing))?;
            }
        }
        Ok(())
    }

    /// Marks the pages that the bits set in `words` lead to; bit 0 stands for the first granule of `range`.
    ///
    /// # Errors
    /// As [`Sink::gpa_words`].
    pub fn iova_words(
        &mut self,
        range: IovaRange,
        granule: Granule,
        words: &[u64],
    ) -> Result<(), ShortBitmap> {
        if *self.iova == IovaMap::Identity {
            let gpa = Mapping::identity(
                GpaRange::from_bounds(range.start(), range.end()).expect("same bounds as a range"),
            );
            return self.gpa_words(gpa.gpa(), granule, words);
        }
        let bits = bits_needed(range.len(), granule, words)?;
        self.for_each_run(range.start(), range.len(), granule, words, bits, |sink, start, len| {
            sink.iova_range(IovaRange::new(start, len).expect("a run inside a range"));
        });
        Ok(())
    }

    /// Declares that the bits set in `words` were reported and counted before, and left set in the kernel.
    ///
    /// # Errors
    /// As [`Sink::gpa_words`].
    pub fn counted_before(
        &mut self,
        range: GpaRange,
        granule: Granule,
        words: &[u64],
    ) -> Result<(), ShortBitmap> {
        self.marks.exchange();
        let marked = self.gpa_words(range, granule, words);
        self.marks.exchange();
        marked
    }

    /// Tells that of the pages of `words` those in `standing` were counted before, through a buffer of a few words.
    fn repeat(
        &mut self,
        range: GpaRange,
        granule: Granule,
        words: &[u64],
        standing: &[u64],
    ) -> Result<(), ShortBitmap> {
        const WORDS: usize = 64;
        let pieces = range.pieces(((WORDS * WORD_BITS) as u64) << granule.shift());
        for ((piece, words), standing) in pieces.zip(words.chunks(WORDS)).zip(standing.chunks(WORDS)) {
            let mut both = [0; WORDS];
            for ((both, word), standing) in both.iter_mut().zip(words).zip(standing) {
                *both = word & standing;
            }
            self.counted_before(piece, granule, &both)?;
        }
        Ok(())
    }

    fn gpa_runs(&mut self, range: GpaRange, granule: Granule, words: &[u64]) {
        let bits = usize::try_from(granule.bits_for(range.len())).expect("as many as the words have");
        self.for_each_run(range.start(), range.len(), granule, words, bits, |sink, start, len| {
            sink.gpa_range(GpaRange::new(start, len).expect("a run inside a range"));
        });
    }

    /// Returns `words` as words of the layout, if they are such.
    fn in_layout<'b>(
        &self,
        range: GpaRange,
        granule: Granule,
        words: &'b [u64],
        standing: Option<&'b [u64]>,
    ) -> Result<Option<Lent<'b>>, ShortBitmap> {
        let bits = bits_needed(range.len(), granule, words)?;
        standing.map_or(Ok(bits), |standing| bits_needed(range.len(), granule, standing))?;
        let target = self.aligned_words(range).filter(|_| granule == self.layout.host_page());
        Ok(target.map(|target| Lent {
            first_word: target.start,
            words: &words[..target.len()],
            tail: bitmap::low_bits(bits - (target.len() - 1) * WORD_BITS),
            standing: standing.map(|standing| &standing[..target.len()]),
        }))
    }

    /// Returns the words that hold just the pages of `range`, if there are such words.
    fn aligned_words(&self, range: GpaRange) -> Option<Range<usize>> {
        let region = self.layout.region_of(range.start())?;
        let page = self.layout.host_page();
        if !region.range().covers(range) || !page.is_aligned(range.start() | range.end()) {
            return None;
        }
        let first = (range.start() - region.range().start()) >> page.shift();
        let end = (range.end() - region.range().start()) >> page.shift();
        let word = WORD_BITS as u64;
        let whole =
            first.is_multiple_of(word) && (end.is_multiple_of(word) || range.end() == region.range().end());
        let index = |bit: u64| usize::try_from(bit.div_ceil(word)).ok().map(|w| region.words().start + w);
        whole.then(|| Some(index(first)?..index(end)?)).flatten()
    }

    /// Calls `mark` with the first address and length of each run of set bits, cut to the span's end.
    fn for_each_run(
        &mut self,
        start: u64,
        len: u64,
        granule: Granule,
        words: &[u64],
        bits: usize,
        mark: impl Fn(&mut Self, u64, u64),
    ) {
        for run in bitmap::runs(words, bits) {
            let from = (run.start as u64) << granule.shift();
            let to = ((run.end as u64) << granule.shift()).min(len);
            mark(self, start + from, to - from);
        }
    }
}

fn bits_needed(bytes: u64, granule: Granule, words: &[u64]) -> Result<usize, ShortBitmap> {
    let bits = granule.bits_for(bytes);
    match usize::try_from(bits) {
        Ok(needed) if needed <= words.len().saturating_mul(WORD_BITS) => Ok(needed),
        _ => Err(ShortBitmap { words: words.len(), bits }),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::bitmap::SparseBitmap;

    /// Four regions, two of them adjacent, in units of `page`.
    fn layout_of(page: Granule) -> Layout {
        let regions = [(0u64, 130u64), (200, 64), (264, 7), (300, 257)];
        let bytes = |units: u64| units << page.shift();
        let ranges = regions.map(|(first, pages)| GpaRange::new(bytes(first), bytes(pages)).unwrap());
        Layout::new(ranges, page).unwrap()
    }

    fn layout() -> Layout {
        layout_of(Granule::KIB_4)
    }

    fn marked(layout: &Layout, marks: &SparseBitmap) -> BTreeSet<u64> {
        let page = layout.host_page().bytes();
        let pages = layout.regions().iter().flat_map(|region| region.range().pieces(page));
        pages
            .filter(|page| {
                layout.bits_of(*page).any(|bits| marks.word(bits.start / 64) >> (bits.start % 64) & 1 == 1)
            })
            .map(GpaRange::start)
            .collect()
    }

    fn marks_outside_ram(layout: &Layout, marks: &SparseBitmap) -> bool {
        (0..layout.words()).any(|word| marks.word(word) & !layout.valid_bits(word) != 0)
    }

    proptest! {
        #[test]
        fn c19_widening_equals_a_page_at_a_time_oracle(
            start in 0..400u64, len in 1..400u64, shift in prop_oneof![Just(12u32), Just(16), Just(21), 9..22u32],
            host_shift in prop_oneof![Just(12u32), Just(16), Just(21)], host_units in any::<bool>(),
            seed in prop::collection::vec(any::<u64>(), 64), extra in any::<bool>(),
        ) {
            let (granule, page) = (Granule::new(1 << shift).unwrap(), Granule::new(1 << host_shift).unwrap());
            let unit = if host_units { host_shift } else { shift };
            let range = GpaRange::new(start << unit, len << unit).unwrap();
            let bits = granule.bits_for(range.len());
            prop_assume!(bits <= 8192);
            let mut words: Vec<u64> = (0..bits.div_ceil(64)).map(|i| seed[usize::try_from(i).unwrap() % 64]).collect();
            if extra { words.push(u64::MAX); }
            let layout = layout_of(page);
            let mut marks = Marks::new(&layout);
            Sink::new(&layout, &IovaMap::Identity, &mut marks).gpa_words(range, granule, &words).unwrap();

            let mut oracle = BTreeSet::new();
            for bit in (0..bits).filter(|bit| words[usize::try_from(bit / 64).unwrap()] >> (bit % 64) & 1 == 1) {
                let from = range.start() + (bit << shift);
                let to = (from + granule.bytes()).min(range.end());
                for number in (from >> host_shift)..to.div_ceil(page.bytes()) {
                    if layout.region_of(number << host_shift).is_some() { oracle.insert(number << host_shift); }
                }
            }
            prop_assert_eq!(marked(&layout, &marks.dirty), oracle);
            prop_assert!(!marks_outside_ram(&layout, &marks.dirty));
        }

        #[test]
        fn marking_is_a_union(
            first in prop::collection::vec((0..600u64, 1..40u64), 0..8), second in prop::collection::vec((0..600u64, 1..40u64), 0..8),
        ) {
            let layout = layout();
            let mark = |order: &[&[(u64, u64)]]| {
                let mut marks = Marks::new(&layout);
                for &(page, pages) in order.iter().copied().flatten() {
                    Sink::new(&layout, &IovaMap::Identity, &mut marks).gpa_range(GpaRange::new(page << 12, pages << 12).unwrap());
                }
                marked(&layout, &marks.dirty)
            };
            let both = mark(&[&first, &second]);
            prop_assert_eq!(&both, &mark(&[&second, &first]), "commutative");
            prop_assert_eq!(&both, &mark(&[&first, &second, &first]), "idempotent");
            prop_assert!(both.is_superset(&mark(&[&first])), "monotone");
            prop_assert_eq!(both, mark(&[&first]).union(&mark(&[&second])).copied().collect::<BTreeSet<_>>(), "exact");
        }

        #[test]
        fn c18_journalled_iovas_land_where_they_lead(
            words in prop::collection::vec(any::<u64>(), 2), gpa in 0..300u64, cut in 1..64u64,
        ) {
            let layout = layout();
            let mut map = IovaMap::journal();
            let at = |iova: u64, gpa: u64, pages: u64| Mapping::new(
                IovaRange::new(iova << 12, pages << 12).unwrap(), GpaRange::new(gpa << 12, pages << 12).unwrap()).unwrap();
            map.map(at(1000, gpa, cut)).unwrap();
            map.map(at(1000 + cut, 7, 20)).unwrap();
            let mut marks = Marks::new(&layout);
            let range = IovaRange::new(1000 << 12, 128 << 12).unwrap();
            Sink::new(&layout, &map, &mut marks).iova_words(range, Granule::KIB_4, &words).unwrap();
            let mut oracle = BTreeSet::new();
            for bit in (0..128u64).filter(|bit| words[usize::try_from(bit / 64).unwrap()] >> (bit % 64) & 1 == 1) {
                let page = if bit < cut { gpa + bit } else if bit < cut + 20 { 7 + bit - cut } else { continue };
                if layout.region_of(page << 12).is_some() { oracle.insert(page << 12); }
            }
            prop_assert_eq!(marked(&layout, &marks.dirty), oracle);
        }
    }

    #[test]
    fn c11_tail_bits_past_the_last_page_are_rejected() {
        let layout = layout();
        let mut marks = Marks::new(&layout);
        let whole = layout.regions()[0].range();
        let mut sink = Sink::new(&layout, &IovaMap::Identity, &mut marks);
        sink.gpa_words(whole, Granule::KIB_4, &[0, 0, u64::MAX]).unwrap();
        sink.gpa_words(layout.regions()[2].range(), Granule::KIB_4, &[u64::MAX]).unwrap();
        assert!(!marks_outside_ram(&layout, &marks.dirty));
        assert_eq!(marked(&layout, &marks.dirty).len(), 2 + 7);
    }

    #[test]
    fn c20_a_4_kib_bit_marks_its_host_page_of_64_kib() {
        let layout = layout_of(Granule::new(64 << 10).unwrap());
        let mut marks = Marks::new(&layout);
        let range = GpaRange::new(0, 128 << 10).unwrap();
        Sink::new(&layout, &IovaMap::Identity, &mut marks)
            .gpa_words(range, Granule::KIB_4, &[1 << 17])
            .unwrap();
        assert_eq!(marked(&layout, &marks.dirty), BTreeSet::from([64 << 10]));
    }

    #[test]
    fn a_short_bitmap_is_an_error_and_marks_nothing() {
        let layout = layout();
        let mut marks = Marks::new(&layout);
        let whole = layout.regions()[0].range();
        let short = Sink::new(&layout, &IovaMap::Identity, &mut marks).gpa_words(
            whole,
            Granule::KIB_4,
            &[u64::MAX; 2],
        );
        assert_eq!(short, Err(ShortBitmap { words: 2, bits: 130 }));
        assert!(marked(&layout, &marks.dirty).is_empty());
    }
}
