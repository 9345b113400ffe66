// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Runs of set bits, found by word arithmetic.

use std::iter::Fuse;
use std::ops::Range;

/// Yields the maximal runs of set bits, in order, as half-open ranges of bit numbers.
///
/// The cost is one step per word and one per run: neither a clean nor a dirty stretch is walked bit
/// by bit.
#[derive(Debug)]
pub(super) struct Runs<I> {
    words: Fuse<I>,
    /// The bits of the word at `base` that no run has covered yet.
    word: u64,
    /// Number of the first bit of `word`.
    base: u64,
    /// Number of the first bit of the word after `word`.
    next_base: u64,
}

impl<I: Iterator<Item = u64>> Runs<I> {
    /// Starts before the first of `words`; bit `n` is bit `n % 64` of word `n / 64`.
    pub(super) fn new(words: I) -> Self {
        Self { words: words.fuse(), word: 0, base: 0, next_base: 0 }
    }

    /// Moves on to the next word, if there is one.
    fn advance(&mut self) -> Option<u64> {
        self.word = self.words.next()?;
        self.base = self.next_base;
        self.next_base += u64::from(u64::BITS);
        Some(self.word)
    }

    /// Returns the end of the run that covers every bit up to the end of the current word.
    fn end_of_open_run(&mut self) -> u64 {
        loop {
            match self.advance() {
                Some(u64::MAX) => {}
                Some(word) => {
                    let ones = word.trailing_ones();
                    self.word &= u64::MAX << ones;
                    return self.base + u64::from(ones);
                }
                None => {
                    self.word = 0;
                    return self.next_base;
                }
            }
        }
    }
}

impl<I: Iterator<Item = u64>> Iterator for Runs<I> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        while self.word == 0 {
            self.advance()?;
        }
        let first = self.word.trailing_zeros();
        let start = self.base + u64::from(first);
        let past = first + (self.word >> first).trailing_ones();
        if past == u64::BITS {
            return Some(start..self.end_of_open_run());
        }
        self.word &= u64::MAX << past;
        Some(start..self.base + u64::from(past))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(words: &[u64]) -> Vec<Range<u64>> {
        Runs::new(words.iter().copied()).collect()
    }

    #[test]
    fn no_words_and_no_bits_make_no_runs() {
        assert!(runs(&[]).is_empty());
        assert!(runs(&[0, 0, 0]).is_empty());
    }

    #[test]
    fn a_run_inside_a_word_ends_with_its_last_bit() {
        assert_eq!(runs(&[0b0110_0001]), [0..1, 5..7]);
    }

    #[test]
    fn a_run_goes_on_across_words() {
        assert_eq!(runs(&[1 << 63, u64::MAX, 0b1011]), [63..130, 131..132]);
    }

    #[test]
    fn a_run_up_to_a_word_boundary_ends_there() {
        assert_eq!(runs(&[u64::MAX, 0, 1]), [0..64, 128..129]);
        assert_eq!(runs(&[u64::MAX << 60, 0b10]), [60..64, 65..66]);
    }

    #[test]
    fn a_run_up_to_the_last_bit_ends_there_once() {
        let mut runs = Runs::new([0, u64::MAX].into_iter());
        assert_eq!(runs.next(), Some(64..128));
        assert_eq!(runs.next(), None);
        assert_eq!(runs.next(), None);
    }

    #[test]
    fn lone_bits_stay_lone() {
        let alternating: Vec<_> = runs(&[0xaaaa_aaaa_aaaa_aaaa, 0x5555_5555_5555_5555]);
        assert_eq!(alternating.len(), 63, "bits 63 and 64 are neighbours");
        assert_eq!(alternating[31], 63..65);
    }
}
