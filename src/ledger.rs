// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who still needs which page: the exact union of all sources, one cursor per receiver or snapshot base.
//!
//! A page of a cursor is clean, *pending* (changed since the receiver's last copy), *in flight* (a copy is on its way), or
//! both of the latter. [`Ledger::take`] moves pending pages into flight, [`Ledger::commit`] forgets them once the receiver has
//! acknowledged, [`Ledger::roll_back`] makes them pending again.

use crate::bitmap::{BLOCK_WORDS, Bitmap, WORD_BITS, low_bits};
use crate::iova::IovaMap;
use crate::layout::{Layout, Region};
use crate::range::{GpaRange, subtract};
use crate::source::{Marks, Sink};

/// Names one cursor of one ledger; never used again after the cursor is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CursorId(u64);

/// What a new cursor's receiver already holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Nothing: every page is pending.
    Empty,
    /// A copy of all RAM, made or to be made by somebody else after the sources were started: no page is pending.
    Copied,
}

/// The most one chunk may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkLimits {
    /// Bytes of guest memory; rounded down to whole pages, at least one page.
    pub bytes: u64,
    /// Ranges in its table; at least one.
    pub ranges: usize,
}

impl ChunkLimits {
    /// No limit: one chunk is the whole round.
    pub const NONE: Self = Self { bytes: u64::MAX, ranges: usize::MAX };
}

/// Pages in flight to one receiver: sorted, disjoint, coalesced ranges.
///
/// Ends in [`Ledger::commit`] or [`Ledger::roll_back`]; dropped, its pages stay in flight until their cursor is closed.
#[derive(Debug)]
#[must_use = "pages of a chunk stay in flight until it is committed or rolled back"]
pub struct Chunk {
    cursor: CursorId,
    ranges: Vec<GpaRange>,
    bytes: u64,
}

impl Chunk {
    /// Ranges, ascending; no two touch.
    pub fn ranges(&self) -> &[GpaRange] {
        &self.ranges
    }

    /// Bytes of guest memory in the ranges.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn ends_at(&self, gpa: u64) -> bool {
        self.ranges.last().is_some_and(|last| last.end() == gpa)
    }

    fn push(&mut self, gpa: u64, bytes: u64) {
        self.bytes += bytes;
        let joined = if self.ends_at(gpa) { self.ranges.pop() } else { None };
        let start = joined.map_or(gpa, GpaRange::start);
        self.ranges.push(GpaRange::from_bounds(start, gpa + bytes).expect("RAM does not wrap"));
    }
}

/// How much a cursor's receiver still lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Outstanding {
    /// Bytes changed since the receiver's last copy.
    pub pending_bytes: u64,
    /// Bytes on their way.
    pub in_flight_bytes: u64,
}

/// Pages one source reported, summed over all collects since the ledger was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attribution {
    /// Pages reported.
    pub pages: u64,
    /// Pages that no other source reported in the same collect.
    pub exclusive_pages: u64,
}

#[cfg(feature = "transfer")]
impl Attribution {
    /// Returns what was reported since `before`; all, where the count began anew in between.
    pub(crate) fn since(self, before: Self) -> Self {
        if before.pages > self.pages || before.exclusive_pages > self.exclusive_pages {
            return self;
        }
        Self {
            pages: self.pages - before.pages,
            exclusive_pages: self.exclusive_pages - before.exclusive_pages,
        }
    }
}

#[derive(Debug)]
struct Cursor {
    id: CursorId,
    pending: Bitmap,
    pending_pages: u64,
    in_flight: Bitmap,
    in_flight_pages: u64,
    /// Pages reported since the cursor was opened.
    dirtied: Bitmap,
    dirtied_pages: u64,
    /// Bits below were offered to this round.
    position: usize,
    /// Pages on their way of RAM that was unplugged since: RAM plugged in at their address waits for them, or an old page could
    /// arrive after a new one.
    departed: Vec<GpaRange>,
    /// RAM plugged in since the cursor was opened, there or not by now.
    plugged: Vec<GpaRange>,
    spare: Vec<Vec<GpaRange>>,
}

/// The dirty pages of a VM: what its sources reported, and what each receiver still needs of it.
///
/// ```
/// use vfio_migration::{granule::Granule, layout::Layout, ledger::*, range::GpaRange};
/// let ram = GpaRange::new(0, 1 << 20)?;
/// let mut ledger = Ledger::new(Layout::new([ram], Granule::KIB_4)?, 1);
/// let cursor = ledger.open(Start::Copied);
/// ledger.mark(GpaRange::new(0x3000, 0x2000)?);
/// ledger.begin_round(cursor);
/// let chunk = ledger.take(cursor, ChunkLimits::NONE).expect("two pages are pending");
/// assert_eq!(chunk.ranges(), [GpaRange::new(0x3000, 0x2000)?]);
/// ledger.commit(chunk);
/// assert_eq!(ledger.outstanding(cursor), Some(Outstanding::default()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Ledger {
    layout: Layout,
    marks: Vec<Marks>,
    attribution: Vec<Attribution>,
    cursors: Vec<Cursor>,
    next_id: u64,
}

impl Ledger {
    /// Makes a ledger for `sources` sources and no cursor.
    pub fn new(layout: Layout, sources: usize) -> Self {
        Self {
            marks: vec![Marks::new(&layout); sources],
            layout,
            attribution: vec![Attribution::default(); sources],
            cursors: Vec::new(),
            next_id: 0,
        }
    }

    /// The VM's RAM.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Opens a cursor for a receiver that holds what `start` says.
    pub fn open(&mut self, start: Start) -> CursorId {
        let id = CursorId(self.next_id);
        self.next_id += 1;
        let words = self.layout.words();
        let mut cursor = Cursor {
            id,
            pending: Bitmap::new(words),
            pending_pages: 0,
            in_flight: Bitmap::new(words),
            in_flight_pages: 0,
            dirtied: Bitmap::new(words),
            dirtied_pages: 0,
            position: 0,
            departed: Vec::new(),
            plugged: Vec::new(),
            spare: Vec::new(),
        };
        if start == Start::Empty {
            for region in self.layout.regions() {
                cursor.mark(&self.layout, region.range());
            }
        }
        self.cursors.push(cursor);
        id
    }

    /// Closes a cursor; its chunks may still be committed or rolled back, to no effect.
    pub fn close(&mut self, cursor: CursorId) {
        self.cursors.retain(|open| open.id != cursor);
    }

    /// Whether any cursor is open.
    pub fn has_cursors(&self) -> bool {
        !self.cursors.is_empty()
    }

    /// Returns where source number `source` reports to, until the next [`Ledger::absorb`].
    ///
    /// # Panics
    /// There is no such source.
    pub fn sink<'a>(&'a mut self, source: usize, iova: &'a IovaMap) -> Sink<'a> {
        Sink::new(&self.layout, iova, &mut self.marks[source])
    }

    /// Unites what the sources marked, adds it to every cursor's pending pages, and clears the marks.
    ///
    /// One pass, block by block; untouched blocks cost a summary bit each. Allocates nothing.
    pub fn absorb(&mut self) {
        let blocks = self.layout.words() / BLOCK_WORDS;
        for group in 0..blocks.div_ceil(WORD_BITS) {
            let mut touched = self.marks.iter().fold(0, |all, marks| all | marks.dirty.summary_word(group));
            while touched != 0 {
                self.absorb_block(group * WORD_BITS + touched.trailing_zeros() as usize);
                touched &= touched - 1;
            }
        }
    }

    fn absorb_block(&mut self, block: usize) {
        let (mut once, mut twice) = ([0u64; BLOCK_WORDS], [0u64; BLOCK_WORDS]);
        for marks in &self.marks {
            for (i, word) in marks.dirty.block(block).iter().enumerate() {
                twice[i] |= once[i] & word;
                once[i] |= word;
            }
        }
        for (marks, attribution) in self.marks.iter_mut().zip(&mut self.attribution) {
            let words = marks.dirty.block(block).iter().zip(marks.repeated.block(block));
            for ((dirty, repeated), shared) in words.zip(&twice) {
                attribution.pages += u64::from((dirty & !repeated).count_ones());
                attribution.exclusive_pages += u64::from((dirty & !repeated & !shared).count_ones());
            }
            marks.dirty.clear_block(block);
            marks.repeated.clear_block(block);
        }
        if once != [0; BLOCK_WORDS] {
            for cursor in &mut self.cursors {
                cursor.absorb_block(block, &once);
            }
        }
    }

    /// Makes the pages of `range` pending for every cursor, attributed to no source.
    pub fn mark(&mut self, range: GpaRange) {
        for cursor in &mut self.cursors {
            cursor.mark(&self.layout, range);
        }
    }

    /// Changes the RAM: every cursor keeps what it knows of what stays, and new RAM is pending for all.
    ///
    /// Nothing may be marked that was not absorbed.
    pub fn change_layout(&mut self, layout: Layout) {
        for cursor in &mut self.cursors {
            cursor.change_layout(&self.layout, &layout);
        }
        self.marks.iter_mut().for_each(|marks| *marks = Marks::new(&layout));
        self.layout = layout;
    }

    /// Makes room for one source more, which gets the next number.
    pub fn add_source(&mut self) {
        self.marks.push(Marks::new(&self.layout));
        self.attribution.push(Attribution::default());
    }

    /// Forgets source number `source`; those after it move up. Nothing may be marked that was not absorbed.
    ///
    /// # Panics
    /// There is no such source.
    pub fn remove_source(&mut self, source: usize) {
        self.marks.remove(source);
        self.attribution.remove(source);
    }

    /// What each source reported so far, by source number.
    pub fn attribution(&self) -> &[Attribution] {
        &self.attribution
    }

    /// How much the cursor's receiver still lacks; `None` once the cursor is closed.
    pub fn outstanding(&self, cursor: CursorId) -> Option<Outstanding> {
        let cursor = self.cursors.iter().find(|open| open.id == cursor)?;
        let shift = self.layout.host_page().shift();
        Some(Outstanding {
            pending_bytes: cursor.pending_pages << shift,
            in_flight_bytes: cursor.in_flight_pages << shift,
        })
    }

    /// Bytes of pages reported dirty at least once since the cursor was opened; `None` once it is closed.
    pub fn dirtied_bytes(&self, cursor: CursorId) -> Option<u64> {
        let cursor = self.cursors.iter().find(|open| open.id == cursor)?;
        Some(cursor.dirtied_pages << self.layout.host_page().shift())
    }

    /// RAM plugged in since the cursor was opened, whether it is there by now or not. What was known before of what lies behind these
    /// addresses, their holes for one, may be of RAM that is gone.
    pub fn plugged(&self, cursor: CursorId) -> &[GpaRange] {
        self.cursors.iter().find(|open| open.id == cursor).map_or(&[], |open| &open.plugged)
    }

    /// Begins a round: the next [`Ledger::take`] starts again at the lowest page.
    pub fn begin_round(&mut self, cursor: CursorId) {
        if let Some(cursor) = self.cursors.iter_mut().find(|open| open.id == cursor) {
            cursor.position = 0;
        }
    }

    /// Takes the round's next pages into flight; `None` at the end of the round or after the cursor was closed.
    ///
    /// Chunks of one round ascend, so no page is in two of them. Pages still in flight from an earlier round are passed over
    /// and stay pending. Allocates only while the number of chunks in flight grows.
    pub fn take(&mut self, cursor: CursorId, limits: ChunkLimits) -> Option<Chunk> {
        let cursor = self.cursors.iter_mut().find(|open| open.id == cursor)?;
        let mut chunk = Chunk { cursor: cursor.id, ranges: cursor.spare.pop().unwrap_or_default(), bytes: 0 };
        cursor.take(&self.layout, limits, &mut chunk);
        if chunk.ranges.is_empty() {
            cursor.spare.push(chunk.ranges);
            return None;
        }
        Some(chunk)
    }

    /// Forgets pages that the receiver acknowledged. Pages written since they were taken stay pending.
    pub fn commit(&mut self, chunk: Chunk) {
        if let Some(cursor) = self.cursors.iter_mut().find(|open| open.id == chunk.cursor) {
            cursor.land(&self.layout, &chunk);
            cursor.recycle(chunk);
        }
    }

    /// Makes pages pending again whose copy did not arrive, for the same receiver.
    pub fn roll_back(&mut self, chunk: Chunk) {
        if let Some(cursor) = self.cursors.iter_mut().find(|open| open.id == chunk.cursor) {
            cursor.land(&self.layout, &chunk);
            for &range in &chunk.ranges {
                cursor.mark(&self.layout, range);
            }
            cursor.recycle(chunk);
        }
    }
}

impl Cursor {
    fn mark(&mut self, layout: &Layout, range: GpaRange) {
        for bits in layout.bits_of(range) {
            for (word, mask) in crate::bitmap::masks(bits) {
                self.pending_pages += u64::from((mask & !self.pending.word(word)).count_ones());
                self.pending.or_word(word, mask);
            }
        }
    }

    fn absorb_block(&mut self, block: usize, dirty: &[u64; BLOCK_WORDS]) {
        for (pending, dirty) in self.pending.block_mut(block).iter_mut().zip(dirty) {
            self.pending_pages += u64::from((dirty & !*pending).count_ones());
            *pending |= dirty;
        }
        for (dirtied, dirty) in self.dirtied.block_mut(block).iter_mut().zip(dirty) {
            self.dirtied_pages += u64::from((dirty & !*dirtied).count_ones());
            *dirtied |= dirty;
        }
    }

    fn take(&mut self, layout: &Layout, limits: ChunkLimits, chunk: &mut Chunk) {
        let mut room = (limits.bytes >> layout.host_page().shift()).max(1);
        let (mut at, mut region) = (self.position, 0);
        while let Some(word) = self.next_word(at) {
            while layout.regions().get(region + 1).is_some_and(|next| next.words().start <= word) {
                region += 1;
            }
            let mut offered = self.pending.word(word) & !self.in_flight.word(word);
            if word == self.position / WORD_BITS {
                offered &= !low_bits(self.position % WORD_BITS);
            }
            while offered != 0 && room > 0 {
                let first = offered.trailing_zeros() as usize;
                let run = (offered >> first).trailing_ones() as usize;
                let run = run.min(usize::try_from(room).unwrap_or(run));
                let gpa = layout.gpa_of(region, word * WORD_BITS + first);
                if chunk.ranges.len() >= limits.ranges.max(1) && !chunk.ends_at(gpa) {
                    return;
                }
                chunk.push(gpa, (run as u64) << layout.host_page().shift());
                room -= run as u64;
                offered &= !(low_bits(run) << first);
                self.depart(word, low_bits(run) << first);
                self.position = word * WORD_BITS + first + run;
            }
            if room == 0 {
                return;
            }
            self.leave(word);
            at = (word + 1) * WORD_BITS;
        }
    }

    /// Finds the first word at or after the one of bit `at` that may hold a pending page.
    fn next_word(&self, at: usize) -> Option<usize> {
        let word = at / WORD_BITS;
        if !word.is_multiple_of(BLOCK_WORDS) {
            return Some(word);
        }
        let block = self.pending.next_block(word / BLOCK_WORDS)?;
        Some(word.max(block * BLOCK_WORDS))
    }

    fn depart(&mut self, word: usize, mask: u64) {
        self.pending.clear_word(word, mask);
        self.in_flight.or_word(word, mask);
        let pages = u64::from(mask.count_ones());
        self.pending_pages -= pages;
        self.in_flight_pages += pages;
    }

    /// Tells the summary when `word` was the last of a block that turned out empty.
    fn leave(&mut self, word: usize) {
        let block = word / BLOCK_WORDS;
        if (word + 1).is_multiple_of(BLOCK_WORDS) && *self.pending.block(block) == [0; BLOCK_WORDS] {
            self.pending.mark_empty(block);
        }
    }

    fn land(&mut self, layout: &Layout, chunk: &Chunk) {
        for &range in &chunk.ranges {
            subtract(&mut self.departed, range);
            for bits in layout.bits_of(range) {
                self.in_flight_pages -= self.in_flight.count(bits.clone());
                self.in_flight.clear(bits);
            }
        }
    }

    fn change_layout(&mut self, old: &Layout, new: &Layout) {
        let moved = |bits: &Bitmap| {
            let mut moved = Bitmap::new(new.words());
            old.ranges_in(bits).flat_map(|range| new.bits_of(range)).for_each(|bits| moved.set(bits));
            moved
        };
        let mut departed: Vec<_> = old.ranges_in(&self.in_flight).chain(self.departed.drain(..)).collect();
        let mut in_flight = Bitmap::new(new.words());
        for bits in departed.iter().flat_map(|&range| new.bits_of(range)) {
            in_flight.set(bits);
        }
        new.regions().iter().for_each(|region| subtract(&mut departed, region.range()));
        let (pending, dirtied) = (moved(&self.pending), moved(&self.dirtied));
        let position = old.gpa_from(self.position).map_or(usize::MAX, |gpa| new.bit_from(gpa));
        *self = Self {
            pending_pages: pages_in(new, &pending),
            in_flight_pages: pages_in(new, &in_flight),
            dirtied_pages: pages_in(new, &dirtied),
            position: position.min(new.words() * WORD_BITS),
            pending,
            in_flight,
            dirtied,
            departed,
            plugged: std::mem::take(&mut self.plugged),
            spare: std::mem::take(&mut self.spare),
            id: self.id,
        };
        let mut plugged: Vec<_> = new.regions().iter().map(Region::range).collect();
        old.regions().iter().for_each(|region| subtract(&mut plugged, region.range()));
        for range in plugged {
            self.mark(new, range);
            if !self.plugged.iter().any(|known| known.covers(range)) {
                self.plugged.push(range);
            }
        }
    }

    fn recycle(&mut self, chunk: Chunk) {
        let mut ranges = chunk.ranges;
        ranges.clear();
        self.spare.push(ranges);
    }
}

fn pages_in(layout: &Layout, bits: &Bitmap) -> u64 {
    layout.ranges_in(bits).map(|range| range.len() >> layout.host_page().shift()).sum()
}

#[cfg(test)]
mod tests;
