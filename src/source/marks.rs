// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One source's report before it is merged with the others': bits of its own, and words that it lends.

use std::ops::Range;

use crate::bitmap::{BLOCK_WORDS, SparseBitmap, WORD_BITS};
use crate::layout::Layout;

/// What one source reported since the last absorb: the pages, and which of them it had reported before.
#[derive(Debug, Clone)]
pub(crate) struct Marks {
    pub(crate) dirty: SparseBitmap,
    /// Made when a source first tells of such pages.
    pub(crate) repeated: Option<SparseBitmap>,
    spare: Vec<Lent<'static>>,
}

/// Words of a source's own, in the layout's order.
#[derive(Debug, Clone)]
pub(crate) struct Lent<'a> {
    pub(super) first_word: usize,
    pub(super) words: &'a [u64],
    /// Of the last word, the bits that stand for pages.
    pub(super) tail: u64,
    /// Bits that the source reported before, as many words.
    pub(super) standing: Option<&'a [u64]>,
}

impl Marks {
    pub(crate) fn new(layout: &Layout) -> Self {
        Self { dirty: SparseBitmap::new(layout.words()), repeated: None, spare: Vec::new() }
    }

    /// Returns an empty list for words that are lent; see [`Marks::keep_room`].
    pub(super) fn room_for_loans<'b>(&mut self) -> Vec<Lent<'b>> {
        emptied(std::mem::take(&mut self.spare))
    }

    /// Keeps a list's memory for the next loans.
    pub(super) fn keep_room(&mut self, lent: Vec<Lent<'_>>) {
        self.spare = emptied(lent);
    }

    fn repeated(&mut self) -> &mut SparseBitmap {
        self.repeated.get_or_insert_with(|| self.dirty.new_like())
    }

    /// Exchanges the marks for those of pages that were reported before.
    pub(super) fn exchange(&mut self) {
        self.repeated();
        let Self { dirty, repeated: Some(repeated), .. } = self else { return };
        std::mem::swap(dirty, repeated);
    }

    /// Keeps the memory of blocks `64 * index ..`, which were taken, for other marks.
    #[inline(always)]
    pub(crate) fn release(&mut self, index: usize) {
        self.dirty.release(index);
        if let Some(repeated) = &mut self.repeated {
            repeated.release(index);
        }
    }

    /// Adds what is lent to the marks.
    pub(super) fn copy(&mut self, lent: &Lent<'_>) {
        let Some((&last, words)) = lent.words.split_last() else { return };
        self.dirty.or_words(lent.first_word, words);
        self.dirty.or_word(lent.first_word + words.len(), last & lent.tail);
        let Some(standing) = lent.standing else { return };
        for (offset, (word, standing)) in lent.words.iter().zip(standing).enumerate() {
            if word & standing != 0 {
                self.repeated().or_word(lent.first_word + offset, word & standing);
            }
        }
    }
}

impl Lent<'_> {
    pub(crate) fn words(&self) -> Range<usize> {
        self.first_word..self.first_word + self.words.len()
    }

    /// Returns the blocks among the 64 from `first_block` on that may hold a bit; where that is likely to be none, `quiet` says so.
    #[inline(always)]
    pub(crate) fn touched(&self, first_block: usize, quiet: bool) -> u64 {
        let first = first_block * BLOCK_WORDS;
        let (from, to) =
            (first.max(self.first_word), (first + WORD_BITS * BLOCK_WORDS).min(self.words().end));
        if from >= to {
            return 0;
        }
        let words = &self.words[from - self.first_word..to - self.first_word];
        if quiet && words.iter().fold(0, |any, word| any | word) == 0 {
            return 0;
        }
        let head = (from.next_multiple_of(BLOCK_WORDS) - from).min(words.len());
        let (head, whole) = words.split_at(head);
        let mut touched = 0;
        if head.iter().any(|&word| word != 0) {
            touched |= 1 << (from / BLOCK_WORDS - first_block);
        }
        let first_whole = (from + head.len()) / BLOCK_WORDS - first_block;
        let (blocks, rest) = whole.as_chunks::<BLOCK_WORDS>();
        for (offset, block) in blocks.iter().enumerate() {
            let any = block.iter().fold(0, |any, word| any | word);
            touched |= u64::from(any != 0) << (first_whole + offset);
        }
        if rest.iter().any(|&word| word != 0) {
            touched |= 1 << (first_whole + blocks.len());
        }
        touched
    }

    /// Adds the bits of `block` to `dirty`, and those that were reported before to `repeated`; returns whether there may be such.
    #[inline(always)]
    pub(crate) fn add_to(
        &self,
        block: usize,
        dirty: &mut [u64; BLOCK_WORDS],
        repeated: &mut [u64; BLOCK_WORDS],
    ) -> bool {
        let first = block * BLOCK_WORDS;
        let words = self.words();
        if words.start <= first && first + BLOCK_WORDS < words.end {
            let at = first - words.start;
            for (to, word) in dirty.iter_mut().zip(&self.words[at..at + BLOCK_WORDS]) {
                *to |= word;
            }
            let Some(standing) = self.standing else { return false };
            let both = self.words[at..at + BLOCK_WORDS].iter().zip(&standing[at..at + BLOCK_WORDS]);
            for (to, (word, standing)) in repeated.iter_mut().zip(both) {
                *to |= word & standing;
            }
            return true;
        }
        for word in first.max(words.start)..(first + BLOCK_WORDS).min(words.end) {
            let at = word - words.start;
            let mask = if word + 1 == words.end { self.tail } else { u64::MAX };
            let bits = self.words[at] & mask;
            dirty[word - first] |= bits;
            repeated[word - first] |= self.standing.map_or(0, |standing| bits & standing[at]);
        }
        self.standing.is_some()
    }
}

/// Empties a vector, and hands its memory on where the two kinds differ in a lifetime only.
pub(crate) fn emptied<A, B>(mut vector: Vec<A>) -> Vec<B> {
    vector.clear();
    vector.into_iter().map(|_| unreachable!("it was emptied")).collect()
}
