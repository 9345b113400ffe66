// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One collect: what all sources report is united, counted and handed to every cursor, a block of words at a time.

use super::cursor::Cursor;
use super::terms::Attribution;
use crate::bitmap::{BLOCK_WORDS, WORD_BITS};
use crate::iova::IovaMap;
use crate::layout::Layout;
use crate::source::{Marks, Sink, emptied};
use crate::sys::cpu::{self, Work};

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
    spare: &'a mut Vec<Report<'static>>,
    reports: Vec<Report<'a>>,
}

/// What one source reported, and of that what lies in the blocks at hand.
#[derive(Debug)]
pub(super) struct Report<'a> {
    sink: Sink<'a>,
    /// Loans before this one lie behind.
    next: usize,
    /// Of the 64 blocks at hand, those that may hold a bit.
    touched: u64,
    dirty: [u64; BLOCK_WORDS],
    repeated: [u64; BLOCK_WORDS],
    /// Whether `repeated` has a bit.
    repeats: bool,
}

impl<'a> Report<'a> {
    fn new(sink: Sink<'a>) -> Self {
        Self {
            sink,
            next: 0,
            touched: 0,
            dirty: [0; BLOCK_WORDS],
            repeated: [0; BLOCK_WORDS],
            repeats: false,
        }
    }
}

impl<'a> Collection<'a> {
    /// Begins one over a ledger's marks and counts, one of each for a source, and its cursors. `spare` has memory of the last one.
    pub(super) fn new(
        layout: &'a Layout,
        marks: &'a mut [Marks],
        attribution: &'a mut [Attribution],
        cursors: &'a mut [Cursor],
        spare: &'a mut Vec<Report<'static>>,
    ) -> Self {
        let reports = emptied(std::mem::take(spare));
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
        cpu::run(Absorb { collection: &mut self });
        self.reports.iter_mut().for_each(|report| report.sink.give_back(true));
    }
}

impl Drop for Collection<'_> {
    fn drop(&mut self) {
        self.reports.iter_mut().for_each(|report| report.sink.give_back(false));
        *self.spare = emptied(std::mem::take(&mut self.reports));
    }
}

struct Absorb<'c, 'a> {
    collection: &'c mut Collection<'a>,
}

impl Work for Absorb<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let blocks = self.collection.layout.words() / BLOCK_WORDS;
        let Collection { reports, attribution, cursors, .. } = self.collection;
        for first_block in (0..blocks).step_by(WORD_BITS) {
            let (mut touched, mut shared) = (0, 0);
            for report in reports.iter_mut() {
                report.look(first_block);
                shared |= touched & report.touched;
                touched |= report.touched;
            }
            while touched != 0 {
                let offset = touched.trailing_zeros();
                if shared >> offset & 1 == 1 {
                    absorb_shared(first_block, offset, reports, attribution, cursors);
                } else {
                    absorb_sole(first_block, offset, reports, attribution, cursors);
                }
                touched &= touched - 1;
            }
            for report in reports.iter_mut().filter(|report| report.touched != 0) {
                report.sink.marks.release(first_block / WORD_BITS);
            }
        }
    }
}

/// Absorbs the block that is `offset` behind `first_block`, of which just one source tells.
#[inline(always)]
fn absorb_sole(
    first_block: usize,
    offset: u32,
    reports: &mut [Report<'_>],
    attribution: &mut [Attribution],
    cursors: &mut [Cursor],
) {
    let block = first_block + offset as usize;
    for (report, attribution) in reports.iter_mut().zip(attribution) {
        if !report.touches(offset) {
            continue;
        }
        report.load(block);
        let pages = report.fresh_pages();
        attribution.pages += pages;
        attribution.exclusive_pages += pages;
        let set = if report.repeats { ones(&report.dirty) } else { pages };
        for cursor in cursors {
            cursor.absorb_block(block, &report.dirty, set);
        }
        return;
    }
}

/// Absorbs the block that is `offset` behind `first_block`, of which several sources tell.
#[inline(always)]
fn absorb_shared(
    first_block: usize,
    offset: u32,
    reports: &mut [Report<'_>],
    attribution: &mut [Attribution],
    cursors: &mut [Cursor],
) {
    let block = first_block + offset as usize;
    let (mut once, mut twice) = ([0u64; BLOCK_WORDS], [0u64; BLOCK_WORDS]);
    for report in reports.iter_mut() {
        if !report.touches(offset) {
            continue;
        }
        report.load(block);
        for (i, word) in report.dirty.iter().enumerate() {
            twice[i] |= once[i] & word;
            once[i] |= word;
        }
    }
    for (report, attribution) in reports.iter().zip(attribution) {
        if report.touches(offset) {
            let pages = report.fresh_pages();
            attribution.pages += pages;
            attribution.exclusive_pages += pages - report.fresh_pages_in(&twice);
        }
    }
    let set = ones(&once);
    for cursor in cursors {
        cursor.absorb_block(block, &once, set);
    }
}

#[inline(always)]
fn ones(words: &[u64; BLOCK_WORDS]) -> u64 {
    words.iter().fold(0, |ones, word| ones + u64::from(word.count_ones()))
}

impl Report<'_> {
    /// Finds which of the 64 blocks from `first_block` on may hold a bit.
    #[inline(always)]
    fn look(&mut self, first_block: usize) {
        let quiet = self.touched == 0;
        self.touched = self.sink.marks.dirty.summary_word(first_block / WORD_BITS);
        let Some(lent) = &self.sink.lent else { return };
        let (first, end) = (first_block * BLOCK_WORDS, (first_block + WORD_BITS) * BLOCK_WORDS);
        while lent.get(self.next).is_some_and(|lent| lent.words().end <= first) {
            self.next += 1;
        }
        for lent in lent[self.next..].iter().take_while(|lent| lent.words().start < end) {
            self.touched |= lent.touched(first_block, quiet);
        }
    }

    #[inline(always)]
    fn touches(&self, offset: u32) -> bool {
        self.touched >> offset & 1 == 1
    }

    /// Moves the block's bits out of the marks, and adds those lent.
    #[inline(always)]
    fn load(&mut self, block: usize) {
        if self.repeats {
            self.repeated = [0; BLOCK_WORDS];
        }
        let Marks { dirty, repeated, .. } = &mut *self.sink.marks;
        self.dirty = dirty.take_block(block).unwrap_or_default();
        let mut repeats = false;
        if let Some(block) = repeated.as_mut().and_then(|repeated| repeated.take_block(block)) {
            repeats = true;
            self.repeated = block;
        }
        if let Some(lent) = &self.sink.lent {
            let end = (block + 1) * BLOCK_WORDS;
            for lent in &lent[self.next..] {
                if lent.words().start >= end {
                    break;
                }
                repeats |= lent.add_to(block, &mut self.dirty, &mut self.repeated);
            }
        }
        self.repeats = repeats;
    }

    /// Pages of the block that were not counted before.
    #[inline(always)]
    fn fresh_pages(&self) -> u64 {
        if self.repeats { self.fresh_pages_in(&[u64::MAX; BLOCK_WORDS]) } else { ones(&self.dirty) }
    }

    #[inline(always)]
    fn fresh_pages_in(&self, mask: &[u64; BLOCK_WORDS]) -> u64 {
        let mut pages = 0;
        for ((dirty, repeated), mask) in self.dirty.iter().zip(&self.repeated).zip(mask) {
            pages += u64::from((dirty & !repeated & mask).count_ones());
        }
        pages
    }
}
