// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What one receiver still needs.

use std::sync::Arc;

use super::terms::{ChunkLimits, CursorId, Outstanding};
use crate::bitmap::{BLOCK_WORDS, Bitmap, WORD_BITS, masks};
use crate::layout::{Layout, Region};
use crate::range::{GpaRange, subtract};
use crate::sys::cpu;

mod recent;
mod take;

use recent::Recent;
use take::{Take, TakeRecent};

/// Pages in flight to one receiver: sorted, disjoint, coalesced ranges.
///
/// Ends in [`super::Ledger::commit`] or [`super::Ledger::roll_back`]; dropped, its pages stay in flight until their cursor is closed.
#[derive(Debug)]
#[must_use = "pages of a chunk stay in flight until it is committed or rolled back"]
pub struct Chunk {
    pub(super) cursor: CursorId,
    flight: usize,
    ranges: Arc<Vec<GpaRange>>,
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
}

#[derive(Debug)]
pub(super) struct Cursor {
    pub(super) id: CursorId,
    /// Pending pages, unless they are in `recent`: one of the two is empty. Made when it is needed first.
    pending: Bitmap,
    recent: Recent,
    /// Whether the collect under way goes into `recent`.
    is_listing: bool,
    /// Entries of `recent` that the collect under way would take; more than it takes, where words of ones become one.
    entries: usize,
    /// Pages of the VM's RAM.
    ram_pages: u64,
    pending_pages: u64,
    /// Pages reported since the cursor was opened.
    dirtied: Bitmap,
    dirtied_pages: u64,
    /// Bits below were offered to this round.
    position: usize,
    /// Chunks on their way, by [`Chunk::flight`].
    flights: Vec<Option<Flight>>,
    free_flights: Vec<usize>,
    /// Pages of chunks that were taken in this round: behind the position, so that no bitmap has to know them.
    fresh_pages: u64,
    /// Pages of chunks that were on their way when the round began. Made when there first are any.
    carried: Option<Bitmap>,
    carried_pages: u64,
    /// Pages on their way of RAM that was unplugged since: RAM plugged in at their address waits for them, or an old page could
    /// arrive after a new one.
    departed: Vec<GpaRange>,
    /// RAM plugged in since the cursor was opened, there or not by now.
    plugged: Vec<GpaRange>,
    /// How often RAM was plugged in: more than there are ranges, where it comes and goes at one address.
    plugs: u64,
    spare: Vec<Arc<Vec<GpaRange>>>,
}

/// A chunk on its way.
#[derive(Debug)]
struct Flight {
    ranges: Arc<Vec<GpaRange>>,
    pages: u64,
    /// Since before the round began: its pages are in the bitmap.
    carried: bool,
}

impl Cursor {
    pub(super) fn new(id: CursorId, layout: &Layout) -> Self {
        Self {
            id,
            pending: Bitmap::new(0),
            recent: Recent::new(layout.words()),
            is_listing: false,
            entries: 0,
            ram_pages: layout.pages(),
            pending_pages: 0,
            dirtied: Bitmap::new(layout.words()),
            dirtied_pages: 0,
            position: 0,
            flights: Vec::new(),
            free_flights: Vec::new(),
            fresh_pages: 0,
            carried: None,
            carried_pages: 0,
            departed: Vec::new(),
            plugged: Vec::new(),
            plugs: 0,
            spare: Vec::new(),
        }
    }

    pub(super) fn outstanding(&self, layout: &Layout) -> Outstanding {
        let shift = layout.host_page().shift();
        Outstanding {
            pending_bytes: self.pending_pages << shift,
            in_flight_bytes: (self.fresh_pages + self.carried_pages) << shift,
        }
    }

    pub(super) fn dirtied_bytes(&self, layout: &Layout) -> u64 {
        self.dirtied_pages << layout.host_page().shift()
    }

    pub(super) fn plugged(&self) -> &[GpaRange] {
        &self.plugged
    }

    pub(super) fn plugs(&self) -> u64 {
        self.plugs
    }

    pub(super) fn mark(&mut self, layout: &Layout, range: GpaRange) {
        self.spill();
        for bits in layout.bits_of(range) {
            for (word, mask) in masks(bits) {
                self.pending_pages += u64::from((mask & !self.pending.word(word)).count_ones());
                self.pending.or_word(word, mask);
            }
        }
    }

    /// Begins to take in what a collect brings, in ascending order.
    pub(super) fn begin_absorb(&mut self) {
        self.is_listing = self.pending_pages == 0 && self.recent.is_worthwhile();
        if self.is_listing {
            self.recent.clear();
        } else {
            self.spill();
        }
        self.entries = 0;
    }

    /// Moves the pages of the list into the bitmap.
    fn spill(&mut self) {
        if self.pending.blocks() == 0 {
            self.pending = Bitmap::new(self.dirtied.blocks() * BLOCK_WORDS);
        }
        self.recent.move_into(&mut self.pending);
    }

    pub(super) fn end_absorb(&mut self) {
        if !self.is_listing {
            self.recent.learn(self.entries);
        }
    }

    /// Fetches what absorbing these blocks of a stretch will touch: one after the other, each would be waited for.
    #[inline(always)]
    pub(super) fn fetch(&self, stretch: usize, mut blocks: u64) {
        while blocks != 0 {
            let block = stretch * WORD_BITS + blocks.trailing_zeros() as usize;
            blocks &= blocks - 1;
            cpu::fetch(self.dirtied.block(block));
            if !self.is_listing {
                cpu::fetch(self.pending.block(block));
            }
        }
    }

    /// Makes the pages of `dirty` pending, which has some.
    #[inline(always)]
    pub(super) fn absorb_block(&mut self, block: usize, dirty: &[u64; BLOCK_WORDS]) {
        let first = block * BLOCK_WORDS;
        if dirty.iter().fold(u64::MAX, |all, word| all & word) == u64::MAX {
            self.list(first, BLOCK_WORDS, u64::MAX);
        } else if self.is_listing {
            for (index, &dirty) in dirty.iter().enumerate().filter(|(_, dirty)| **dirty != 0) {
                self.list(first + index, 1, dirty);
            }
        } else {
            let pending = self.pending.block_mut(block);
            let mut pages = 0;
            for (word, dirty) in pending.iter_mut().zip(dirty) {
                pages += u64::from((dirty & !*word).count_ones());
                *word |= dirty;
            }
            self.pending_pages += pages;
            self.entries += BLOCK_WORDS;
        }
        if self.dirtied_pages < self.ram_pages {
            self.dirtied_pages += add(&mut self.dirtied, block, dirty);
        }
    }

    /// Makes the pages of `dirty` in one word pending; it has some.
    #[inline(always)]
    pub(super) fn absorb_word(&mut self, word: usize, dirty: u64) {
        self.list(word, 1, dirty);
        if dirty & !self.dirtied.word(word) != 0 {
            self.dirtied_pages += self.dirtied.add_word(word, dirty);
        }
    }

    /// Adds pages of `count` words to the list, or to the bitmap once the list is full.
    #[inline(always)]
    fn list(&mut self, first: usize, count: usize, dirty: u64) {
        self.entries += 1;
        if self.is_listing {
            if self.recent.push(first, count, dirty) {
                self.pending_pages += count as u64 * u64::from(dirty.count_ones());
                return;
            }
            self.is_listing = false;
            self.spill();
        }
        for word in first..first + count {
            self.pending_pages += self.pending.add_word(word, dirty);
        }
    }

    /// Begins a round: all that is on its way is known by the bitmap from now on, and the lowest page is offered next.
    pub(super) fn begin_round(&mut self, layout: &Layout) {
        self.carry(layout);
        self.position = 0;
    }

    fn carry(&mut self, layout: &Layout) {
        if self.fresh_pages == 0 {
            return;
        }
        let carried = self.carried.get_or_insert_with(|| Bitmap::new(layout.words()));
        for flight in self.flights.iter_mut().flatten().filter(|flight| !flight.carried) {
            flight.carried = true;
            for bits in flight.ranges.iter().flat_map(|&range| layout.bits_of(range)) {
                carried.set(bits);
            }
        }
        self.carried_pages += std::mem::take(&mut self.fresh_pages);
    }

    /// Takes the next pages into flight; `None` if there is none.
    pub(super) fn take(&mut self, layout: &Layout, limits: ChunkLimits) -> Option<Chunk> {
        let mut ranges = self.spare.pop().unwrap_or_default();
        // Only the cursor holds spare ones, unless their chunk was kept for its ranges: then another is made.
        if Arc::strong_count(&ranges) > 1 {
            ranges = Arc::default();
        }
        let list = Arc::get_mut(&mut ranges)?;
        list.clear();
        if self.carried_pages > 0 || self.recent.begins_before(self.position) {
            self.spill();
        }
        let carried = self.carried.as_ref().filter(|_| self.carried_pages > 0);
        let taken = if self.recent.is_empty() {
            let (pending, position) = (&mut self.pending, self.position);
            cpu::run(Take { pending, carried, position, layout, limits, ranges: list })
        } else {
            cpu::run(TakeRecent { recent: &mut self.recent, layout, limits, ranges: list })
        };
        if taken.pages == 0 {
            self.spare.push(ranges);
            return None;
        }
        self.position = taken.position;
        self.pending_pages -= taken.pages;
        self.fresh_pages += taken.pages;
        let flight = self.fly(Flight { ranges: Arc::clone(&ranges), pages: taken.pages, carried: false });
        Some(Chunk { cursor: self.id, flight, ranges, bytes: taken.pages << layout.host_page().shift() })
    }

    fn fly(&mut self, flight: Flight) -> usize {
        let Some(free) = self.free_flights.pop() else {
            self.flights.push(Some(flight));
            return self.flights.len() - 1;
        };
        self.flights[free] = Some(flight);
        free
    }

    /// Ends the flight of a chunk.
    pub(super) fn land(&mut self, layout: &Layout, chunk: Chunk) {
        let flight = self.flights.get_mut(chunk.flight).and_then(Option::take);
        let Some(Flight { ranges, pages, carried }) = flight else { return };
        self.free_flights.push(chunk.flight);
        drop(chunk);
        if carried {
            self.land_carried(layout, &ranges);
        } else {
            self.fresh_pages -= pages;
        }
        self.spare.push(ranges);
    }

    fn land_carried(&mut self, layout: &Layout, ranges: &[GpaRange]) {
        for &range in ranges {
            subtract(&mut self.departed, range);
            let Some(carried) = &mut self.carried else { continue };
            for bits in layout.bits_of(range) {
                self.carried_pages -= carried.count(bits.clone());
                carried.clear(bits);
            }
        }
    }

    /// Makes the pages of a chunk whose copy did not arrive pending again.
    pub(super) fn roll_back(&mut self, layout: &Layout, chunk: Chunk) {
        for &range in chunk.ranges() {
            self.mark(layout, range);
        }
        self.land(layout, chunk);
    }

    pub(super) fn change_layout(&mut self, old: &Layout, new: &Layout) {
        self.carry(old);
        self.spill();
        self.recent = Recent::new(new.words());
        self.ram_pages = new.pages();
        let moved = |bits: &Bitmap| {
            let mut moved = Bitmap::new(new.words());
            old.ranges_in(bits).flat_map(|range| new.bits_of(range)).for_each(|bits| moved.set(bits));
            moved
        };
        let flying = self.carried.iter().flat_map(|carried| old.ranges_in(carried));
        let mut departed: Vec<_> = flying.chain(self.departed.iter().copied()).collect();
        let mut carried = Bitmap::new(if departed.is_empty() { 0 } else { new.words() });
        for bits in departed.iter().flat_map(|&range| new.bits_of(range)) {
            carried.set(bits);
        }
        new.regions().iter().for_each(|region| subtract(&mut departed, region.range()));
        let position = old.gpa_from(self.position).map_or(usize::MAX, |gpa| new.bit_from(gpa));
        self.position = position.min(new.words() * WORD_BITS);
        (self.pending, self.dirtied) = (moved(&self.pending), moved(&self.dirtied));
        (self.pending_pages, self.dirtied_pages) =
            (pages_in(new, &self.pending), pages_in(new, &self.dirtied));
        self.carried = (carried.blocks() > 0).then_some(carried);
        self.carried_pages = self.carried.as_ref().map_or(0, |carried| pages_in(new, carried));
        self.departed = departed;
        let mut plugged: Vec<_> = new.regions().iter().map(Region::range).collect();
        old.regions().iter().for_each(|region| subtract(&mut plugged, region.range()));
        for range in plugged {
            self.mark(new, range);
            self.plugs += 1;
            if !self.plugged.iter().any(|known| known.covers(range)) {
                self.plugged.push(range);
            }
        }
    }
}

/// Adds bits to a block; returns how many it did not have.
#[inline(always)]
fn add(bitmap: &mut Bitmap, block: usize, dirty: &[u64; BLOCK_WORDS]) -> u64 {
    let (mut any, mut pages) = (0, 0);
    for (word, dirty) in bitmap.block(block).iter().zip(dirty) {
        any |= dirty & !word;
    }
    if any == 0 {
        return 0;
    }
    for (word, dirty) in bitmap.block_mut(block).iter_mut().zip(dirty) {
        pages += u64::from((dirty & !*word).count_ones());
        *word |= dirty;
    }
    pages
}

fn pages_in(layout: &Layout, bits: &Bitmap) -> u64 {
    layout.ranges_in(bits).map(|range| range.len() >> layout.host_page().shift()).sum()
}
