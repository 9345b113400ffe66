// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bits into ranges, up to the limits of a chunk.

use super::recent::Recent;
use crate::bitmap::{BLOCK_WORDS, Bitmap, WORD_BITS, low_bits};
use crate::layout::Layout;
use crate::ledger::terms::ChunkLimits;
use crate::range::GpaRange;
use crate::sys::cpu::{Work, filled_words};

/// Bits of a block.
const BLOCK_BITS: usize = BLOCK_WORDS * WORD_BITS;

/// The most runs a word holds, and one for the run that might have joined the open range but does not.
const WORD_RUNS: usize = WORD_BITS / 2 + 1;

/// Takes pending pages from a position on, except pages still in flight from an earlier round, into `ranges`.
pub(super) struct Take<'a> {
    pub(super) pending: &'a mut Bitmap,
    pub(super) carried: Option<&'a Bitmap>,
    pub(super) position: usize,
    pub(super) layout: &'a Layout,
    pub(super) limits: ChunkLimits,
    pub(super) ranges: &'a mut Vec<GpaRange>,
}

/// What was taken.
pub(super) struct Taken {
    pub(super) pages: u64,
    /// The bit behind the last page.
    pub(super) position: usize,
}

impl Work for Take<'_> {
    type Output = Taken;

    #[inline(always)]
    fn run(self) -> Taken {
        let Self { pending, carried, mut position, layout, limits, ranges } = self;
        let mut filling = Filling::new(limits, layout, ranges);
        let room = filling.room;
        let (first_block, mut region) =
            (position / BLOCK_BITS, layout.region_index_of_word(position / WORD_BITS));
        let mut skip = position % BLOCK_BITS;
        let mut group = first_block / WORD_BITS;
        let mut blocks = !low_bits(first_block % WORD_BITS);
        'full: while group * WORD_BITS < pending.blocks() {
            blocks &= pending.summary_word(group);
            while blocks != 0 {
                let block = group * WORD_BITS + blocks.trailing_zeros() as usize;
                blocks &= blocks - 1;
                let skipped = if block == first_block { std::mem::take(&mut skip) } else { 0 };
                region = layout.region_index_from(region, block * BLOCK_WORDS);
                let base = layout.gpa_of(region, block * BLOCK_BITS);
                let words = pending.words_of(block);
                let plain = carried.is_none() && skipped == 0;
                if plain && let Some(end) = filling.take_whole_block(base, words) {
                    *words = [0; BLOCK_WORDS];
                    pending.mark_empty(block);
                    position = if end > 0 { block * BLOCK_BITS + end } else { position };
                    if filling.room == 0 {
                        break 'full;
                    }
                    continue;
                }
                let (end, full) =
                    filling.take_block(base, words, skipped, carried.map(|carried| carried.block(block)));
                if *words == [0; BLOCK_WORDS] {
                    pending.mark_empty(block);
                }
                if end > 0 {
                    position = block * BLOCK_BITS + end;
                }
                if full {
                    break 'full;
                }
            }
            (group, blocks) = (group + 1, u64::MAX);
        }
        Taken { pages: room - filling.end(), position }
    }
}

/// Takes the pages of a list, from its start on, into `ranges`.
pub(super) struct TakeRecent<'a> {
    pub(super) recent: &'a mut Recent,
    pub(super) layout: &'a Layout,
    pub(super) limits: ChunkLimits,
    pub(super) ranges: &'a mut Vec<GpaRange>,
}

impl Work for TakeRecent<'_> {
    type Output = Taken;

    #[inline(always)]
    fn run(self) -> Taken {
        let Self { recent, layout, limits, ranges } = self;
        let mut filling = Filling::new(limits, layout, ranges);
        let (room, mut region, mut position) = (filling.room, 0, 0);
        while let Some((word, count, offered)) = recent.first() {
            region = layout.region_index_from(region, word);
            let base = layout.gpa_of(region, word * WORD_BITS);
            let whole = count.min(layout.regions()[region].words().end - word);
            let whole = whole.min(usize::try_from(filling.room).unwrap_or(usize::MAX) / WORD_BITS);
            if whole > 1 && filling.fits(base, 1) {
                filling.take_run(base, whole * WORD_BITS);
                recent.take_words(whole);
                position = (word + whole) * WORD_BITS;
            } else {
                let taken = filling.take_word(base, offered);
                if taken != 0 {
                    position = (word + 1) * WORD_BITS - taken.leading_zeros() as usize;
                    recent.take_bits(taken);
                }
                if taken != offered {
                    break;
                }
            }
            if filling.room == 0 {
                break;
            }
        }
        Taken { pages: room - filling.end(), position }
    }
}

/// A chunk that is being filled.
struct Filling<'a> {
    ranges: &'a mut Vec<GpaRange>,
    most_ranges: usize,
    /// Pages that still fit.
    room: u64,
    shift: u32,
    /// The last range, which the next run may join; not in `ranges` yet. Both `u64::MAX` where there is none.
    open: (u64, u64),
}

const NONE: (u64, u64) = (u64::MAX, u64::MAX);

impl<'a> Filling<'a> {
    fn new(limits: ChunkLimits, layout: &Layout, ranges: &'a mut Vec<GpaRange>) -> Self {
        let shift = layout.host_page().shift();
        let (most_ranges, room) = (limits.ranges.max(1), (limits.bytes >> shift).max(1));
        Self { ranges, most_ranges, room, shift, open: NONE }
    }

    /// Takes all pages of the block at address `base`, if they are sure to fit; returns the bit behind the last.
    #[inline(always)]
    fn take_whole_block(&mut self, base: u64, words: &[u64; BLOCK_WORDS]) -> Option<usize> {
        let mut left = filled_words(words);
        let filled = left.count_ones() as usize;
        if self.room < (filled * WORD_BITS) as u64
            || self.most_ranges - self.ranges.len() < filled * WORD_RUNS + 1
        {
            return None;
        }
        if words.iter().fold(u64::MAX, |all, word| all & word) == u64::MAX {
            self.take_run(base, BLOCK_BITS);
            return Some(BLOCK_BITS);
        }
        let mut end = 0;
        while left != 0 {
            let index = left.trailing_zeros() as usize / 2;
            left &= left - 1;
            self.take_whole_word(base + (((index * WORD_BITS) as u64) << self.shift), words[index]);
            end = (index + 1) * WORD_BITS - words[index].leading_zeros() as usize;
        }
        Some(end)
    }

    /// Takes pages of the block at address `base`, behind the first `skipped`; returns the bit behind the last, and whether the
    /// chunk is full.
    #[inline(always)]
    fn take_block(
        &mut self,
        base: u64,
        words: &mut [u64; BLOCK_WORDS],
        skipped: usize,
        carried: Option<&[u64; BLOCK_WORDS]>,
    ) -> (usize, bool) {
        let (mut end, mut left) = (0, filled_words(words));
        while left != 0 {
            let index = left.trailing_zeros() as usize / 2;
            let word = &mut words[index];
            left &= left - 1;
            let first = index * WORD_BITS;
            let standing = carried.map_or(0, |carried| carried[index]);
            let offered = *word & !standing & !low_bits(skipped.saturating_sub(first));
            let taken = self.take_word(base + ((first as u64) << self.shift), offered);
            *word &= !taken;
            if taken != 0 {
                end = first + WORD_BITS - taken.leading_zeros() as usize;
            }
            if taken != offered || self.room == 0 {
                return (end, true);
            }
        }
        (end, false)
    }

    /// Takes pages of the word at address `base`; returns their bits.
    #[inline(always)]
    fn take_word(&mut self, base: u64, offered: u64) -> u64 {
        if self.room < WORD_BITS as u64 || !self.fits(base, WORD_RUNS) {
            return self.take_some(base, offered);
        }
        self.take_whole_word(base, offered);
        offered
    }

    /// Takes `pages` pages one after the other, which fit.
    #[inline(always)]
    fn take_run(&mut self, base: u64, pages: usize) {
        self.add(base, base + ((pages as u64) << self.shift));
        self.room -= pages as u64;
    }

    /// Takes all pages of the word at address `base`, which fit.
    #[inline(always)]
    fn take_whole_word(&mut self, base: u64, offered: u64) {
        let mut left = offered;
        while left != 0 {
            let first = left.trailing_zeros();
            // The carry runs through the lowest run of ones, and stops behind it.
            let behind = left.wrapping_add(left & left.wrapping_neg());
            let end = behind.trailing_zeros();
            self.add(base + (u64::from(first) << self.shift), base + (u64::from(end) << self.shift));
            left &= behind;
        }
        self.room -= u64::from(offered.count_ones());
    }

    /// Takes as many pages as fit.
    fn take_some(&mut self, base: u64, mut offered: u64) -> u64 {
        let mut taken = 0;
        while offered != 0 && self.room > 0 {
            let first = offered.trailing_zeros();
            let run = (offered >> first).trailing_ones();
            let run = u32::try_from(self.room).map_or(run, |room| run.min(room));
            let start = base + (u64::from(first) << self.shift);
            if !self.fits(start, 1) {
                break;
            }
            self.add(start, start + (u64::from(run) << self.shift));
            self.room -= u64::from(run);
            let mask = low_bits(run as usize) << first;
            taken |= mask;
            offered &= !mask;
        }
        taken
    }

    /// Whether `runs` more runs fit, of which the first begins at `start`.
    #[inline(always)]
    fn fits(&self, start: u64, runs: usize) -> bool {
        let used = self.ranges.len() + usize::from(self.open != NONE) - usize::from(self.open.1 == start);
        self.most_ranges - used >= runs
    }

    #[inline(always)]
    fn add(&mut self, start: u64, end: u64) {
        if start == self.open.1 {
            self.open.1 = end;
        } else {
            self.close();
            self.open = (start, end);
        }
    }

    /// Puts the open range into the list; no range is none.
    #[inline(always)]
    fn close(&mut self) {
        if let Ok(range) = GpaRange::from_bounds(self.open.0, self.open.1) {
            self.ranges.push(range);
        }
    }

    /// Ends the chunk; returns the room that is left.
    fn end(mut self) -> u64 {
        self.close();
        self.room
    }
}
