// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

// The words of a `SummaryBitmap`. Included by the module that uses it, and by a test that looks at every order in which threads can
// get to them: whoever includes it says what an `AtomicU64` is.

use std::sync::atomic::Ordering;

use crate::bitmap::{BLOCK_WORDS, WORD_BITS};

/// Bits, and above each block of words one that says whether it may hold any.
#[derive(Debug, Default)]
pub(super) struct Levels {
    words: Vec<AtomicU64>,
    summary: Vec<AtomicU64>,
}

impl Levels {
    pub(super) fn new(words: usize) -> Self {
        let words = words.next_multiple_of(BLOCK_WORDS);
        let zeros = |count| std::iter::repeat_with(AtomicU64::default).take(count).collect();
        Self { words: zeros(words), summary: zeros((words / BLOCK_WORDS).div_ceil(WORD_BITS)) }
    }

    /// Bits there are.
    pub(super) fn bits(&self) -> usize {
        self.words.len() * WORD_BITS
    }

    /// Reads a word; one past the end is 0.
    pub(super) fn word(&self, index: usize) -> u64 {
        self.words.get(index).map_or(0, |word| word.load(Ordering::SeqCst))
    }

    /// Sets bits of a word.
    ///
    /// The word is marked before the summary and always by a read-modify-write: that orders the guest-memory write before
    /// whoever takes the bit.
    #[inline(always)]
    pub(super) fn mark(&self, word: usize, mask: u64) {
        self.words[word].fetch_or(mask, Ordering::SeqCst);
        let block = word / BLOCK_WORDS;
        let (above, bit) = (&self.summary[block / WORD_BITS], 1 << (block % WORD_BITS));
        if above.load(Ordering::SeqCst) & bit == 0 {
            above.fetch_or(bit, Ordering::SeqCst);
        }
    }

    /// Hands over all bits and clears them, a block at a time.
    ///
    /// The summary is taken before the words under it: a mark that comes in between is taken now or reported next time.
    pub(super) fn take(&self, report: &mut dyn FnMut(usize, &[u64])) {
        for (index, above) in self.summary.iter().enumerate() {
            // Most are zero, and to read a word costs less than to exchange it.
            if above.load(Ordering::SeqCst) == 0 {
                continue;
            }
            let mut blocks = above.swap(0, Ordering::SeqCst);
            while blocks != 0 {
                let first = (index * WORD_BITS + blocks.trailing_zeros() as usize) * BLOCK_WORDS;
                let words: [u64; BLOCK_WORDS] =
                    std::array::from_fn(|word| self.words[first + word].swap(0, Ordering::SeqCst));
                report(first, &words);
                blocks &= blocks - 1;
            }
        }
    }
}
