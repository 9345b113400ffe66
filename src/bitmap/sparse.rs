// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A bitmap that takes memory where it has bits.

use super::{BLOCK_WORDS, WORD_BITS, masks};

/// Words that get and lose their memory together: those under one word of the summary, 4 KiB.
pub(crate) const STRETCH_WORDS: usize = WORD_BITS * BLOCK_WORDS;

/// The words that get and lose their memory together.
pub(crate) type Stretch = [u64; STRETCH_WORDS];

/// Bits with the summary of a [`super::Bitmap`], which have memory only in stretches that hold some.
#[derive(Debug, Clone)]
pub(crate) struct SparseBitmap {
    stretches: Vec<Option<Box<Stretch>>>,
    summary: Vec<u64>,
    /// All zero, for the next bits.
    spare: Vec<Box<Stretch>>,
}

impl SparseBitmap {
    /// Makes an all-clear bitmap of at least `words` words.
    pub(crate) fn new(words: usize) -> Self {
        Self::of_stretches(words.div_ceil(STRETCH_WORDS))
    }

    /// Makes an all-clear bitmap of the same length.
    pub(crate) fn new_like(&self) -> Self {
        Self::of_stretches(self.stretches.len())
    }

    fn of_stretches(count: usize) -> Self {
        Self { stretches: vec![None; count], summary: vec![0; count], spare: Vec::new() }
    }

    /// The summary bits of blocks `64 * index ..`.
    pub(crate) fn summary_word(&self, index: usize) -> u64 {
        self.summary[index]
    }

    /// The words of blocks `64 * index ..`, where they have memory.
    #[inline(always)]
    pub(crate) fn stretch(&self, index: usize) -> Option<&Stretch> {
        self.stretches[index].as_deref()
    }

    /// Clears blocks `64 * index ..`, and keeps their memory for other bits.
    #[inline(always)]
    pub(crate) fn clear_stretch(&mut self, index: usize) {
        let Some(mut stretch) = self.stretches[index].take() else { return };
        let (blocks, _) = stretch.as_chunks_mut::<BLOCK_WORDS>();
        let mut touched = std::mem::take(&mut self.summary[index]);
        while touched != 0 {
            blocks[touched.trailing_zeros() as usize] = [0; BLOCK_WORDS];
            touched &= touched - 1;
        }
        self.spare.push(stretch);
    }

    /// Reads one word.
    #[cfg(test)]
    pub(crate) fn word(&self, word: usize) -> u64 {
        self.stretches[word / STRETCH_WORDS].as_ref().map_or(0, |stretch| stretch[word % STRETCH_WORDS])
    }

    /// Sets the bits of `mask` in `word`.
    pub(crate) fn or_word(&mut self, word: usize, mask: u64) {
        if mask != 0 {
            self.block_mut(word / BLOCK_WORDS)[word % BLOCK_WORDS] |= mask;
        }
    }

    /// Sets the bits from `first_word` on that `words` has set; blocks that get none are only read.
    pub(crate) fn or_words(&mut self, first_word: usize, words: &[u64]) {
        let head = first_word.next_multiple_of(BLOCK_WORDS) - first_word;
        let (head, whole) = words.split_at(head.min(words.len()));
        for (offset, &word) in head.iter().enumerate() {
            self.or_word(first_word + offset, word);
        }
        let first_block = (first_word + head.len()) / BLOCK_WORDS;
        for (offset, words) in whole.chunks(BLOCK_WORDS).enumerate() {
            if words.iter().fold(0, |any, word| any | word) != 0 {
                self.block_mut(first_block + offset).iter_mut().zip(words).for_each(|(to, word)| *to |= word);
            }
        }
    }

    /// Sets a run of bits.
    pub(crate) fn set(&mut self, bits: std::ops::Range<usize>) {
        for (word, mask) in masks(bits) {
            self.or_word(word, mask);
        }
    }

    /// The words of `block`, which from now on counts as holding a bit.
    fn block_mut(&mut self, block: usize) -> &mut [u64] {
        let (stretch, offset) = (block / WORD_BITS, block % WORD_BITS);
        self.summary[stretch] |= 1 << offset;
        let Self { stretches, spare, .. } = self;
        let words = stretches[stretch]
            .get_or_insert_with(|| spare.pop().unwrap_or_else(|| Box::new([0; STRETCH_WORDS])));
        &mut words[offset * BLOCK_WORDS..][..BLOCK_WORDS]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const BITS: usize = STRETCH_WORDS * WORD_BITS;

    fn stretches_with_memory(bitmap: &SparseBitmap) -> usize {
        bitmap.stretches.iter().flatten().count()
    }

    proptest! {
        #[test]
        fn stretches_equal_a_set_of_bits(
            rounds in prop::collection::vec(prop::collection::vec((0..3 * BITS - 700, 0..700usize, any::<bool>()), 0..6), 1..5),
        ) {
            let mut bitmap = SparseBitmap::new(3 * STRETCH_WORDS - BLOCK_WORDS);
            for runs in rounds {
                let mut oracle = BTreeSet::new();
                for (start, len, by_words) in runs {
                    if by_words {
                        let words = [u64::MAX, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 6];
                        bitmap.or_words(start / 64, &words);
                        for (index, word) in words.iter().enumerate() {
                            oracle.extend((0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| (start / 64 + index) * 64 + bit));
                        }
                    } else {
                        bitmap.set(start..start + len);
                        oracle.extend(start..start + len);
                    }
                }
                let touched: BTreeSet<_> = oracle.iter().map(|bit| bit / BITS).collect();
                prop_assert_eq!(stretches_with_memory(&bitmap), touched.len());
                let mut found = BTreeSet::new();
                for index in 0..3 {
                    let summary = bitmap.summary_word(index);
                    for (at, word) in bitmap.stretch(index).into_iter().flatten().enumerate() {
                        let first = (index * STRETCH_WORDS + at) * 64;
                        found.extend((0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| first + bit));
                        prop_assert!(*word == 0 || summary >> (at / BLOCK_WORDS) & 1 == 1, "summary denies a set bit");
                    }
                    bitmap.clear_stretch(index);
                    prop_assert_eq!(bitmap.summary_word(index), 0);
                }
                prop_assert_eq!(found, oracle);
                prop_assert_eq!(stretches_with_memory(&bitmap), 0);
            }
        }
    }

    #[test]
    fn a_stretch_hands_its_memory_on_once_it_is_cleared() {
        let mut bitmap = SparseBitmap::new(2 * STRETCH_WORDS);
        bitmap.or_words(2, &[0; BLOCK_WORDS * 2]);
        bitmap.set(7..7);
        assert_eq!(stretches_with_memory(&bitmap), 0);
        bitmap.or_words(8, &[0, 2]);
        assert_eq!((bitmap.word(9), bitmap.summary_word(0)), (2, 2));
        bitmap.clear_stretch(0);
        assert_eq!((bitmap.word(9), bitmap.spare.len()), (0, 1));
        bitmap.set(BITS..BITS + 1);
        assert_eq!(
            (bitmap.spare.len(), bitmap.word(STRETCH_WORDS), bitmap.word(STRETCH_WORDS + 9)),
            (0, 1, 0)
        );
    }
}
