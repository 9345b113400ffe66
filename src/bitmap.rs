// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Words of dirty bits with a summary above them, so that looking at an idle VM costs what is dirty, not what exists.

use std::ops::Range;

mod sparse;

pub(crate) use sparse::{STRETCH_WORDS, SparseBitmap, Stretch};

/// Bits in a word.
pub(crate) const WORD_BITS: usize = u64::BITS as usize;

/// Words under one summary bit: a cache line of them.
pub(crate) const BLOCK_WORDS: usize = 8;

/// Returns a word whose `count` lowest bits are set; `count` is at most 64.
pub(crate) fn low_bits(count: usize) -> u64 {
    if count >= WORD_BITS { u64::MAX } else { (1 << count) - 1 }
}

/// Splits a run of bits into (word, mask) pairs.
pub(crate) fn masks(bits: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    let words = bits.start / WORD_BITS..bits.end.div_ceil(WORD_BITS);
    words.map(move |word| {
        let base = word * WORD_BITS;
        let from = bits.start.saturating_sub(base);
        (word, low_bits(bits.end - base) & !low_bits(from))
    })
}

/// Returns the runs of set bits among the first `bits` bits of `words`, ascending, coalesced across words.
///
/// Costs a few instructions per word and per run, whatever the number of set bits.
pub(crate) fn runs(words: &[u64], bits: usize) -> impl Iterator<Item = Range<usize>> {
    let mut next = 0;
    std::iter::from_fn(move || {
        let start = next_bit(words, next, bits, true)?;
        let end = next_bit(words, start, bits, false).unwrap_or(bits);
        next = end;
        Some(start..end)
    })
}

/// Finds the first bit at or after `from` and below `bits` that is set, or clear where `set` is false.
fn next_bit(words: &[u64], from: usize, bits: usize, set: bool) -> Option<usize> {
    let mut mask = !low_bits(from % WORD_BITS);
    let first = from / WORD_BITS;
    for (index, &word) in words.iter().enumerate().take(bits.div_ceil(WORD_BITS)).skip(first) {
        let found = if set { word } else { !word } & mask;
        if found != 0 {
            let bit = index * WORD_BITS + found.trailing_zeros() as usize;
            return (bit < bits).then_some(bit);
        }
        mask = u64::MAX;
    }
    None
}

/// A fixed number of words, with a summary bit for each block of eight that may hold a set bit.
///
/// The summary may say "perhaps" of an empty block, never "no" of a block with a bit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bitmap {
    words: Vec<u64>,
    summary: Vec<u64>,
    blocks: usize,
}

impl Bitmap {
    /// Makes an all-clear bitmap of `words` words, a multiple of the block.
    pub(crate) fn new(words: usize) -> Self {
        assert!(words.is_multiple_of(BLOCK_WORDS), "layouts pad to whole blocks");
        let blocks = words / BLOCK_WORDS;
        Self { words: vec![0; words], summary: vec![0; blocks.div_ceil(WORD_BITS)], blocks }
    }

    /// Returns the first block at or after `block` that may hold a set bit.
    pub(crate) fn next_block(&self, block: usize) -> Option<usize> {
        next_bit(&self.summary, block, self.blocks(), true)
    }

    /// The summary bits of blocks `64 * index ..`.
    pub(crate) fn summary_word(&self, index: usize) -> u64 {
        self.summary[index]
    }

    /// Number of blocks.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    /// The words of `block`.
    pub(crate) fn block(&self, block: usize) -> &[u64; BLOCK_WORDS] {
        self.words[block * BLOCK_WORDS..].first_chunk().expect("whole blocks")
    }

    /// The words of `block`, which from now on counts as holding a bit.
    pub(crate) fn block_mut(&mut self, block: usize) -> &mut [u64; BLOCK_WORDS] {
        self.note(block);
        self.words_of(block)
    }

    /// The words of `block`, of which bits may be cleared.
    pub(crate) fn words_of(&mut self, block: usize) -> &mut [u64; BLOCK_WORDS] {
        self.words[block * BLOCK_WORDS..].first_chunk_mut().expect("whole blocks")
    }

    /// Tells the summary that `block` is empty, which the caller has made so.
    pub(crate) fn mark_empty(&mut self, block: usize) {
        debug_assert!(self.block(block).iter().all(|&word| word == 0));
        self.summary[block / WORD_BITS] &= !(1 << (block % WORD_BITS));
    }

    /// Clears `block`.
    pub(crate) fn clear_block(&mut self, block: usize) {
        self.words[block * BLOCK_WORDS..][..BLOCK_WORDS].fill(0);
        self.mark_empty(block);
    }

    /// Sets the bits of `mask` in `word`; returns how many it did not have.
    #[inline(always)]
    pub(crate) fn add_word(&mut self, word: usize, mask: u64) -> u64 {
        let before = self.words[word];
        self.words[word] = before | mask;
        self.note(word / BLOCK_WORDS);
        u64::from((mask & !before).count_ones())
    }

    /// Reads one word.
    pub(crate) fn word(&self, word: usize) -> u64 {
        self.words[word]
    }

    /// The words of `range`.
    pub(crate) fn words(&self, range: Range<usize>) -> &[u64] {
        &self.words[range]
    }

    /// Counts the set bits of a run.
    pub(crate) fn count(&self, bits: Range<usize>) -> u64 {
        masks(bits).map(|(word, mask)| u64::from((self.words[word] & mask).count_ones())).sum()
    }

    /// Sets the bits of `mask` in `word`.
    pub(crate) fn or_word(&mut self, word: usize, mask: u64) {
        if mask != 0 {
            self.words[word] |= mask;
            self.note(word / BLOCK_WORDS);
        }
    }

    /// Clears the bits of `mask` in `word`.
    pub(crate) fn clear_word(&mut self, word: usize, mask: u64) {
        self.words[word] &= !mask;
    }

    /// Sets a run of bits.
    pub(crate) fn set(&mut self, bits: Range<usize>) {
        for (word, mask) in masks(bits) {
            self.or_word(word, mask);
        }
    }

    /// Clears a run of bits.
    pub(crate) fn clear(&mut self, bits: Range<usize>) {
        for (word, mask) in masks(bits) {
            self.clear_word(word, mask);
        }
    }

    fn note(&mut self, block: usize) {
        self.summary[block / WORD_BITS] |= 1 << (block % WORD_BITS);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn naive_runs(words: &[u64], bits: usize) -> Vec<Range<usize>> {
        let mut out: Vec<Range<usize>> = Vec::new();
        for bit in (0..bits).filter(|bit| words[bit / 64] >> (bit % 64) & 1 == 1) {
            match out.last_mut() {
                Some(last) if last.end == bit => last.end += 1,
                _ => out.push(bit..bit + 1),
            }
        }
        out
    }

    fn dense_words() -> impl Strategy<Value = Vec<u64>> {
        let word = prop_oneof![Just(0), Just(u64::MAX), any::<u64>(), (0..64u32).prop_map(|bit| 1 << bit)];
        prop::collection::vec(word, 1..40)
    }

    proptest! {
        #[test]
        fn runs_equal_a_bit_at_a_time_oracle(words in dense_words(), cut in 0..64usize) {
            let bits = words.len() * 64 - cut;
            prop_assert_eq!(runs(&words, bits).collect::<Vec<_>>(), naive_runs(&words, bits));
        }

        #[test]
        fn set_and_clear_touch_just_their_bits(ops in prop::collection::vec((any::<bool>(), 0..1024usize, 0..300usize), 1..20)) {
            let mut bitmap = Bitmap::new(16);
            let mut oracle = vec![false; 1024];
            for (set, start, len) in ops {
                let bits = start..(start + len).min(1024);
                oracle[bits.clone()].fill(set);
                if set { bitmap.set(bits) } else { bitmap.clear(bits) }
            }
            for (bit, &expected) in oracle.iter().enumerate() {
                prop_assert_eq!(bitmap.word(bit / 64) >> (bit % 64) & 1 == 1, expected);
                if expected {
                    let block = bit / 64 / BLOCK_WORDS;
                    prop_assert_eq!(bitmap.next_block(block), Some(block), "summary denies a set bit");
                }
            }
        }
    }

    #[test]
    fn an_idle_bitmap_has_no_block_to_visit() {
        let mut bitmap = Bitmap::new(BLOCK_WORDS * 200);
        assert_eq!(bitmap.next_block(0), None);
        bitmap.set(BLOCK_WORDS * 64 * 150..BLOCK_WORDS * 64 * 150 + 1);
        assert_eq!(bitmap.next_block(0), Some(150));
        bitmap.clear_block(150);
        assert_eq!(bitmap.next_block(0), None);
    }
}
