// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What one collect brought, while it is little: a list of words, instead of bits strewn over a bitmap of all RAM.
//!
//! A bitmap of 1 TiB is 32 MiB, and a dirty page in a thousand touches every other line of it: a list of them stays in a cache.

use crate::bitmap::{Bitmap, WORD_BITS};

/// Words of a layout for each that may be listed: beyond, a bitmap costs less.
const LISTED_SHARE: usize = 8;

/// Words that hold pending pages, ascending. What it holds is in no other place.
#[derive(Debug, Default)]
pub(super) struct Recent {
    entries: Vec<Entry>,
    /// Entries before this one were taken.
    next: usize,
    most: usize,
    /// The last collect was too much for the list: the next one is not tried.
    overflowed: bool,
}

/// Words one after the other, all with the same bits; more than one only where each bit of them is set.
#[derive(Debug, Clone, Copy)]
struct Entry {
    first: u32,
    count: u32,
    bits: u64,
}

impl Recent {
    /// Makes an empty list for a layout of `words` words.
    pub(super) fn new(words: usize) -> Self {
        let most = u32::try_from(words).map_or(0, |_| words / LISTED_SHARE);
        Self { most, ..Self::default() }
    }

    #[inline(always)]
    pub(super) fn is_empty(&self) -> bool {
        self.next == self.entries.len()
    }

    /// Whether a collect should be listed.
    pub(super) fn is_worthwhile(&self) -> bool {
        self.most > 0 && !self.overflowed
    }

    /// Takes in how many entries a collect would have taken that was not listed, or only in part.
    pub(super) fn learn(&mut self, entries: usize) {
        self.overflowed = entries > self.most;
    }

    /// Adds `count` words from `first` on, above all that are listed: one that holds a bit, or several of which every bit is set.
    /// Returns false where there is no more room.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "`most` is 0 where an index may not fit")]
    pub(super) fn push(&mut self, first: usize, count: usize, bits: u64) -> bool {
        if bits == u64::MAX
            && let Some(last) = self.entries.last_mut().filter(|last| last.bits == bits)
            && (last.first + last.count) as usize == first
        {
            last.count += count as u32;
            return true;
        }
        if self.entries.len() >= self.most {
            return false;
        }
        self.entries.push(Entry { first: first as u32, count: count as u32, bits });
        true
    }

    /// The lowest words: the first, how many, and the bits of each.
    #[inline(always)]
    pub(super) fn first(&self) -> Option<(usize, usize, u64)> {
        let Entry { first, count, bits } = *self.entries.get(self.next)?;
        Some((first as usize, count as usize, bits))
    }

    /// Whether a page of it is below bit `position`.
    pub(super) fn begins_before(&self, position: usize) -> bool {
        self.first()
            .is_some_and(|(word, _, bits)| word * WORD_BITS + (bits.trailing_zeros() as usize) < position)
    }

    /// Takes the lowest `count` words, several of which every bit is set.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "no more than there are")]
    pub(super) fn take_words(&mut self, count: usize) {
        let entry = &mut self.entries[self.next];
        entry.first += count as u32;
        entry.count -= count as u32;
        self.next += usize::from(entry.count == 0);
    }

    /// Takes `taken`, bits of the lowest word.
    #[inline(always)]
    pub(super) fn take_bits(&mut self, taken: u64) {
        let entry = &mut self.entries[self.next];
        if entry.count > 1 {
            self.split_first();
        }
        let entry = &mut self.entries[self.next];
        entry.bits &= !taken;
        self.next += usize::from(entry.bits == 0);
    }

    /// Makes an entry of its own of the lowest word.
    fn split_first(&mut self) {
        let Entry { first, count, bits } = self.entries[self.next];
        self.entries[self.next] = Entry { first: first + 1, count: count - 1, bits };
        let alone = Entry { first, count: 1, bits };
        match self.next.checked_sub(1) {
            // Where it was taken from before, there is room.
            Some(before) => (self.entries[before], self.next) = (alone, before),
            None => self.entries.insert(0, alone),
        }
    }

    /// Moves all of it into `bitmap`, and gives its memory back.
    pub(super) fn move_into(&mut self, bitmap: &mut Bitmap) {
        for &Entry { first, count, bits } in &self.entries[self.next..] {
            (first..first + count).for_each(|word| bitmap.or_word(word as usize, bits));
        }
        (self.entries, self.next) = (Vec::new(), 0);
    }

    /// Forgets what was taken, which is all of it.
    pub(super) fn clear(&mut self) {
        self.entries.clear();
        self.next = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const WORDS: usize = 256;

    fn bits_of(word: usize, bits: u64) -> impl Iterator<Item = usize> {
        (0..WORD_BITS).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| word * WORD_BITS + bit)
    }

    proptest! {
        #[test]
        fn what_was_listed_is_taken_in_order_or_moved_and_nothing_is_lost(
            words in prop::collection::btree_map(0..WORDS, prop_oneof![4 => Just(u64::MAX), 1 => 1..u64::MAX], 0..200),
            takes in prop::collection::vec((1..6usize, any::<u64>()), 0..100),
        ) {
            let mut recent = Recent::new(WORDS);
            let mut left = BTreeSet::new();
            for (&word, &bits) in &words {
                if recent.push(word, 1, bits) {
                    left.extend(bits_of(word, bits));
                }
            }
            for (count, mask) in takes {
                let Some((first, most, bits)) = recent.first() else { break };
                prop_assert_eq!(left.first().copied(), bits_of(first, bits).next());
                prop_assert!(most == 1 || bits == u64::MAX);
                if count > 1 && most > 1 {
                    let count = count.min(most);
                    (first..first + count).flat_map(|word| bits_of(word, u64::MAX)).for_each(|bit| { left.remove(&bit); });
                    recent.take_words(count);
                } else {
                    let taken = bits & (mask | bits & bits.wrapping_neg());
                    bits_of(first, taken).for_each(|bit| { left.remove(&bit); });
                    recent.take_bits(taken);
                }
            }
            for position in [0, WORDS * WORD_BITS / 2, WORDS * WORD_BITS] {
                prop_assert_eq!(recent.begins_before(position), left.first().is_some_and(|&first| first < position));
            }
            let mut bitmap = Bitmap::new(WORDS);
            recent.move_into(&mut bitmap);
            let moved: Vec<_> = (0..WORDS).flat_map(|word| bits_of(word, bitmap.word(word))).collect();
            prop_assert_eq!(moved, left.into_iter().collect::<Vec<_>>());
            prop_assert!(recent.is_empty());
        }
    }

    #[test]
    fn a_list_that_would_take_more_memory_than_a_bitmap_is_not_made_and_not_tried_again_at_once() {
        let mut recent = Recent::new(WORDS);
        let most = WORDS / LISTED_SHARE;
        assert!((0..most).all(|word| recent.push(2 * word, 1, 1)));
        assert!(!recent.push(2 * most, 1, 1));
        recent.move_into(&mut Bitmap::new(WORDS));
        assert!((0..8).all(|word| Recent::new(8).push(word, 1, u64::MAX)), "words of ones are one entry");
        recent.learn(most + 1);
        assert!(!recent.is_worthwhile());
        recent.learn(most);
        assert!(recent.is_worthwhile());
        assert!(!Recent::new(0).is_worthwhile());
    }
}
