// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One collect: what all sources report is united, counted and handed to every cursor, a stretch of words at a time.

use super::cursor::Cursor;
use super::terms::Attribution;
use crate::bitmap::{BLOCK_WORDS, STRETCH_WORDS, Stretch, WORD_BITS};
use crate::iova::IovaMap;
use crate::layout::Layout;
use crate::source::{Marks, NONE_STANDING, Sink, emptied, touched};
use crate::sys::cpu::{self, Work, filled_words};

static IDENTITY: IovaMap = IovaMap::Identity;

/// A collect under way: sources report one after the other, and may lend the words they have it in.
///
/// Dropped before [`Collection::absorb`], what was reported is in the ledger's marks.
#[derive(Debug)]
pub(crate) struct Collection<'a> {
    layout: &'a Layout,
    marks: std::slice::IterMut<'a, Marks>,
    attribution: &'a mut [Attribution],
    cursors: &'a mut [Cursor],
    spare: &'a mut Spare,
    reports: Vec<Report<'a>>,
}

/// Memory of the last collect.
#[derive(Debug, Default)]
pub(super) struct Spare {
    reports: Vec<Report<'static>>,
    views: Vec<View<'static>>,
}

/// What one source reported.
#[derive(Debug)]
pub(super) struct Report<'a> {
    sink: Sink<'a>,
    /// Loans before this one lie behind.
    next: usize,
    /// Of the stretch at hand, the blocks that may hold a bit.
    touched: u64,
    /// Whether the stretch at hand is lent as it is, by loan number `next`; else it is in the marks.
    is_lent: bool,
}

impl<'a> Report<'a> {
    fn new(sink: Sink<'a>) -> Self {
        Self { sink, next: 0, touched: 0, is_lent: false }
    }
}

/// What a source tells of the stretch at hand, and where it is counted.
#[derive(Debug)]
pub(super) struct View<'v> {
    words: &'v Stretch,
    /// Of these words, what was counted before.
    repeated: &'v Stretch,
    attribution: &'v mut Attribution,
}

impl<'a> Collection<'a> {
    /// Begins one over a ledger's marks and counts, one of each for a source, and its cursors. `spare` has memory of the last one.
    pub(super) fn new(
        layout: &'a Layout,
        marks: &'a mut [Marks],
        attribution: &'a mut [Attribution],
        cursors: &'a mut [Cursor],
        spare: &'a mut Spare,
    ) -> Self {
        let reports = emptied(std::mem::take(&mut spare.reports));
        Self { layout, marks: marks.iter_mut(), attribution, cursors, spare, reports }
    }

    /// Returns where the next source reports to, whose IOVAs lead where `iova` says.
    ///
    /// # Panics
    /// There is no such source.
    pub(crate) fn next_sink(&mut self, iova: &'a IovaMap) -> &mut Sink<'a> {
        let marks = self.marks.next().expect("a call for each source");
        self.reports.push(Report::new(Sink::lending(self.layout, iova, marks)));
        &mut self.reports.last_mut().expect("it was just added").sink
    }

    /// Unites what was reported, adds it to every cursor's pending pages, and clears the marks; loans end.
    pub(crate) fn absorb(mut self) {
        for marks in self.marks.by_ref() {
            self.reports.push(Report::new(Sink::new(self.layout, &IDENTITY, marks)));
        }
        for lent in self.reports.iter_mut().filter_map(|report| report.sink.lent.as_mut()) {
            lent.sort_unstable_by_key(|lent| lent.words().start);
        }
        self.cursors.iter_mut().for_each(Cursor::begin_absorb);
        cpu::run(Absorb { collection: &mut self });
        self.cursors.iter_mut().for_each(Cursor::end_absorb);
        self.reports.iter_mut().for_each(|report| report.sink.give_back(true));
    }
}

impl Drop for Collection<'_> {
    fn drop(&mut self) {
        self.reports.iter_mut().for_each(|report| report.sink.give_back(false));
        self.spare.reports = emptied(std::mem::take(&mut self.reports));
    }
}

struct Absorb<'c, 'a> {
    collection: &'c mut Collection<'a>,
}

impl Work for Absorb<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let stretches = self.collection.layout.words().div_ceil(STRETCH_WORDS);
        let Collection { reports, attribution, cursors, spare, .. } = self.collection;
        for stretch in 0..stretches {
            // Loops, not closures: what is not inlined is compiled for every processor.
            let mut touched = 0;
            for report in reports.iter_mut() {
                touched |= report.look(stretch);
            }
            if touched == 0 {
                continue;
            }
            cursors.iter().for_each(|cursor| cursor.fetch(stretch, touched));
            let mut views = emptied(std::mem::take(&mut spare.views));
            let told = reports.iter().zip(attribution.iter_mut()).filter(|(report, _)| report.touched != 0);
            views.extend(told.map(|(report, attribution)| report.view(stretch, attribution)));
            absorb_stretch(stretch, touched, &mut views, cursors);
            spare.views = emptied(views);
            for report in reports.iter_mut().filter(|report| report.touched != 0 && !report.is_lent) {
                report.sink.marks.clear_stretch(stretch);
            }
        }
    }
}

/// Blocks with more words that hold a bit are counted as a whole.
const SPARSE_WORDS: u32 = 3;

/// Absorbs the blocks of a stretch that may hold a bit.
#[inline(always)]
fn absorb_stretch(stretch: usize, mut touched: u64, views: &mut [View<'_>], cursors: &mut [Cursor]) {
    while touched != 0 {
        let offset = touched.trailing_zeros() as usize;
        touched &= touched - 1;
        let (mut once, mut twice) = ([0; BLOCK_WORDS], [0; BLOCK_WORDS]);
        for view in views.iter() {
            for (i, word) in block_of(view.words, offset).iter().enumerate() {
                twice[i] |= once[i] & word;
                once[i] |= word;
            }
        }
        let block = stretch * WORD_BITS + offset;
        let mut filled = filled_words(&once);
        if filled.count_ones() > SPARSE_WORDS {
            for view in views.iter_mut() {
                view.count_block(offset, &twice);
            }
            for cursor in cursors.iter_mut() {
                cursor.absorb_block(block, &once);
            }
            continue;
        }
        while filled != 0 {
            let index = filled.trailing_zeros() as usize / 2;
            filled &= filled - 1;
            let (dirty, several) = (once[index], twice[index]);
            for view in views.iter_mut() {
                view.count_word(offset * BLOCK_WORDS + index, several);
            }
            for cursor in cursors.iter_mut() {
                cursor.absorb_word(block * BLOCK_WORDS + index, dirty);
            }
        }
    }
}

#[inline(always)]
fn block_of(words: &Stretch, offset: usize) -> &[u64; BLOCK_WORDS] {
    &words.as_chunks().0[offset]
}

impl View<'_> {
    /// Counts the pages of a block, of which other sources told of those in `several` too.
    #[inline(always)]
    fn count_block(&mut self, offset: usize, several: &[u64; BLOCK_WORDS]) {
        let (mut pages, mut exclusive) = (0, 0);
        let both = block_of(self.words, offset).iter().zip(block_of(self.repeated, offset));
        for ((word, repeated), several) in both.zip(several) {
            let fresh = word & !repeated;
            pages += u64::from(fresh.count_ones());
            exclusive += u64::from((fresh & !several).count_ones());
        }
        self.attribution.pages += pages;
        self.attribution.exclusive_pages += exclusive;
    }

    /// Counts the pages of one word.
    #[inline(always)]
    fn count_word(&mut self, index: usize, several: u64) {
        let fresh = self.words[index] & !self.repeated[index];
        self.attribution.pages += u64::from(fresh.count_ones());
        self.attribution.exclusive_pages += u64::from((fresh & !several).count_ones());
    }
}

impl Report<'_> {
    /// Finds which blocks of a stretch may hold a bit.
    ///
    /// A stretch that is lent only in part, or has marks beside, is brought together in the marks.
    #[inline(always)]
    fn look(&mut self, stretch: usize) -> u64 {
        let quiet = self.touched == 0;
        self.touched = self.sink.marks.dirty.summary_word(stretch);
        self.is_lent = false;
        let Some(lent) = &self.sink.lent else { return self.touched };
        let (first, end) = (stretch * STRETCH_WORDS, (stretch + 1) * STRETCH_WORDS);
        while lent.get(self.next).is_some_and(|lent| lent.words().end <= first) {
            self.next += 1;
        }
        let alone = lent.get(self.next + 1).is_none_or(|lent| lent.words().start >= end);
        if self.touched == 0
            && alone
            && let Some((words, _)) = lent.get(self.next).and_then(|lent| lent.stretch(first))
        {
            if !quiet {
                lent[self.next].fetch(end);
            }
            self.touched = touched(words, quiet);
            self.is_lent = true;
            return self.touched;
        }
        for lent in lent[self.next..].iter().take_while(|lent| lent.words().start < end) {
            self.sink.marks.copy(&lent.within(first));
        }
        self.touched = self.sink.marks.dirty.summary_word(stretch);
        self.touched
    }

    /// What was told of a stretch that was just looked at and may hold a bit.
    #[inline(always)]
    fn view<'v>(&'v self, stretch: usize, attribution: &'v mut Attribution) -> View<'v> {
        let lent = self.sink.lent.as_ref().filter(|_| self.is_lent).map(|lent| &lent[self.next]);
        let marks = &*self.sink.marks;
        let marked = || {
            let repeated = marks.repeated.as_ref().and_then(|repeated| repeated.stretch(stretch));
            Some((marks.dirty.stretch(stretch)?, repeated.unwrap_or(&NONE_STANDING)))
        };
        let told = lent.map_or_else(marked, |lent| lent.stretch(stretch * STRETCH_WORDS));
        let (words, repeated) = told.expect("it was found there");
        View { words, repeated, attribution }
    }
}
