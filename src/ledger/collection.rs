// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One collect: what all sources report is united, counted and handed to every cursor, a block of words at a time.

use super::cursor::Cursor;
use super::{Attribution, Ledger};
use crate::bitmap::{BLOCK_WORDS, WORD_BITS};
use crate::iova::IovaMap;
use crate::layout::Layout;
use crate::source::{Marks, Sink};
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
}

impl<'a> Report<'a> {
    fn new(sink: Sink<'a>) -> Self {
        Self { sink, next: 0, touched: 0, dirty: [0; BLOCK_WORDS], repeated: [0; BLOCK_WORDS] }
    }
}

/// Empties a vector whose memory serves reports of another collect.
fn emptied<'b>(mut reports: Vec<Report<'_>>) -> Vec<Report<'b>> {
    reports.clear();
    reports.into_iter().map(|_| unreachable!("it was emptied")).collect()
}

impl<'a> Collection<'a> {
    pub(super) fn new(ledger: &'a mut Ledger) -> Self {
        let reports = emptied(std::mem::take(&mut ledger.spare));
        Self {
            layout: &ledger.layout,
            marks: ledger.marks.iter_mut(),
            attribution: &mut ledger.attribution,
            cursors: &mut ledger.cursors,
            spare: &mut ledger.spare,
            reports,
        }
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
            let mut touched = 0;
            for report in reports.iter_mut() {
                report.look(first_block);
                touched |= report.touched;
            }
            while touched != 0 {
                absorb_block(first_block, touched.trailing_zeros(), reports, attribution, cursors);
                touched &= touched - 1;
            }
        }
    }
}

/// Absorbs the block that is `offset` behind `first_block`.
#[inline(always)]
fn absorb_block(
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
            report.count(&twice, attribution);
        }
    }
    if once != [0; BLOCK_WORDS] {
        for cursor in cursors {
            cursor.absorb_block(block, &once);
        }
    }
}

impl Report<'_> {
    /// Finds which of the 64 blocks from `first_block` on may hold a bit.
    #[inline(always)]
    fn look(&mut self, first_block: usize) {
        self.touched = self.sink.marks.dirty.summary_word(first_block / WORD_BITS);
        let Some(lent) = &self.sink.lent else { return };
        let (first, end) = (first_block * BLOCK_WORDS, (first_block + WORD_BITS) * BLOCK_WORDS);
        while lent.get(self.next).is_some_and(|lent| lent.words().end <= first) {
            self.next += 1;
        }
        for lent in lent[self.next..].iter().take_while(|lent| lent.words().start < end) {
            self.touched |= lent.touched(first_block);
        }
    }

    #[inline(always)]
    fn touches(&self, offset: u32) -> bool {
        self.touched >> offset & 1 == 1
    }

    /// Moves the block's bits out of the marks, and adds those lent.
    #[inline(always)]
    fn load(&mut self, block: usize) {
        (self.dirty, self.repeated) = ([0; BLOCK_WORDS], [0; BLOCK_WORDS]);
        let Marks { dirty, repeated, .. } = &mut *self.sink.marks;
        if dirty.may_hold(block) {
            self.dirty = *dirty.block(block);
            dirty.clear_block(block);
        }
        if let Some(repeated) = repeated.as_mut().filter(|repeated| repeated.may_hold(block)) {
            self.repeated = *repeated.block(block);
            repeated.clear_block(block);
        }
        let Some(lent) = &self.sink.lent else { return };
        let end = (block + 1) * BLOCK_WORDS;
        for lent in lent[self.next..].iter().take_while(|lent| lent.words().start < end) {
            lent.add_to(block, &mut self.dirty, &mut self.repeated);
        }
    }

    #[inline(always)]
    fn count(&self, twice: &[u64; BLOCK_WORDS], attribution: &mut Attribution) {
        for ((dirty, repeated), shared) in self.dirty.iter().zip(&self.repeated).zip(twice) {
            let fresh = dirty & !repeated;
            attribution.pages += u64::from(fresh.count_ones());
            attribution.exclusive_pages += u64::from((fresh & !shared).count_ones());
        }
    }
}
