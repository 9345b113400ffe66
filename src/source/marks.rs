// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One source's report before it is merged with the others': bits of its own, and words that it lends.

use std::ops::Range;

use crate::bitmap::{BLOCK_WORDS, STRETCH_WORDS, SparseBitmap, Stretch};
use crate::layout::Layout;
use crate::sys::cpu;

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

    /// Clears the marks of blocks `64 * index ..`, and keeps their memory for others.
    #[inline(always)]
    pub(crate) fn clear_stretch(&mut self, index: usize) {
        self.dirty.clear_stretch(index);
        if let Some(repeated) = &mut self.repeated {
            repeated.clear_stretch(index);
        }
    }

    /// Adds what is lent to the marks.
    pub(crate) fn copy(&mut self, lent: &Lent<'_>) {
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

    /// Returns the part that lies in the stretch from `first_word` on.
    pub(crate) fn within(&self, first_word: usize) -> Lent<'_> {
        let words = self.words();
        let from = words.start.max(first_word).min(words.end);
        let to = words.end.min(first_word + STRETCH_WORDS).max(from);
        let part = from - words.start..to - words.start;
        Lent {
            first_word: from,
            words: &self.words[part.clone()],
            tail: if to == words.end { self.tail } else { u64::MAX },
            standing: self.standing.map(|standing| &standing[part]),
        }
    }

    /// Fetches the stretch from `first_word` on, while the one before is gone through: by itself the processor does so up to the end of a
    /// page only.
    #[inline(always)]
    pub(crate) fn fetch(&self, first_word: usize) {
        let ahead = self.words.get(first_word.wrapping_sub(self.first_word)..).unwrap_or_default();
        for line in ahead.chunks_exact(BLOCK_WORDS).take(STRETCH_WORDS / BLOCK_WORDS) {
            cpu::fetch(&line[0]);
        }
    }

    /// Returns the words of the stretch from `first_word` on, with those of them that were reported before, if all of its bits are
    /// lent and stand for pages.
    #[inline(always)]
    pub(crate) fn stretch(&self, first_word: usize) -> Option<(&Stretch, &Stretch)> {
        let (words, end) = (self.words(), first_word + STRETCH_WORDS);
        let all = end < words.end || (end == words.end && self.tail == u64::MAX);
        if first_word < words.start || !all {
            return None;
        }
        let at = first_word - words.start;
        let standing = self.standing.map_or(Some(&NONE_STANDING), |standing| standing[at..].first_chunk());
        Some((self.words[at..].first_chunk()?, standing?))
    }
}

/// No page was reported before.
pub(crate) static NONE_STANDING: Stretch = [0; STRETCH_WORDS];

/// Returns the blocks of a stretch that hold a bit; where that is likely to be none, `quiet` says so.
#[inline(always)]
pub(crate) fn touched(words: &Stretch, quiet: bool) -> u64 {
    if quiet && words.iter().fold(0, |any, word| any | word) == 0 {
        return 0;
    }
    let mut touched = 0;
    let (blocks, _) = words.as_chunks::<BLOCK_WORDS>();
    for (index, block) in blocks.iter().enumerate() {
        let any = block.iter().fold(0, |any, word| any | word);
        touched |= u64::from(any != 0) << index;
    }
    touched
}

/// Empties a vector, and hands its memory on where the two kinds differ in a lifetime only.
pub(crate) fn emptied<A, B>(mut vector: Vec<A>) -> Vec<B> {
    vector.clear();
    vector.into_iter().map(|_| unreachable!("it was emptied")).collect()
}
