// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Work over many words, compiled a second time for processors that count and find bits by one instruction.

use crate::bitmap::BLOCK_WORDS;

/// Work that is worth compiling twice; its parts must be inlined for that to show.
pub(crate) trait Work {
    /// What comes of it.
    type Output;

    /// Does the work.
    fn run(self) -> Self::Output;
}

/// Does `work`, with the instructions that this processor has.
pub(crate) fn run<W: Work>(work: W) -> W::Output {
    #[cfg(target_arch = "x86_64")]
    if has_newer() {
        // SAFETY: this processor has the instructions that the function is compiled for.
        return unsafe { newer(work) };
    }
    work.run()
}

#[cfg(target_arch = "x86_64")]
fn has_newer() -> bool {
    #[cfg(test)]
    if plain::ONLY.get() {
        return false;
    }
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("lzcnt")
        && is_x86_feature_detected!("popcnt")
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
fn newer<W: Work>(work: W) -> W::Output {
    work.run()
}

/// Has the line of memory that `at` begins come from memory while other work goes on.
#[inline(always)]
pub(crate) fn fetch<T>(at: &T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every x86-64 has the instruction, which reads nothing that the program can see.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(at).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Returns which words of a block have a bit set: word `i` by bit `2 * i`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn filled_words(words: &[u64; BLOCK_WORDS]) -> u32 {
    // SAFETY: every x86-64 has SSE2.
    unsafe { filled_words_by_pairs(words) }
}

/// Returns which words of a block have a bit set: word `i` by bit `2 * i`.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
pub(crate) fn filled_words(words: &[u64; BLOCK_WORDS]) -> u32 {
    filled_words_plainly(words)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse2")]
#[inline]
fn filled_words_by_pairs(words: &[u64; BLOCK_WORDS]) -> u32 {
    use std::arch::x86_64::{
        _mm_cmpeq_epi32, _mm_movemask_epi8, _mm_packs_epi16, _mm_packs_epi32, _mm_set_epi64x,
        _mm_setzero_si128,
    };
    let zeros = |low: u64, high: u64| {
        _mm_cmpeq_epi32(_mm_set_epi64x(high.cast_signed(), low.cast_signed()), _mm_setzero_si128())
    };
    let (first, second) = (zeros(words[0], words[1]), zeros(words[2], words[3]));
    let (third, fourth) = (zeros(words[4], words[5]), zeros(words[6], words[7]));
    let all = _mm_packs_epi16(_mm_packs_epi32(first, second), _mm_packs_epi32(third, fourth));
    // Two bits for each word, one for each half that is zero.
    let halves = _mm_movemask_epi8(all).cast_unsigned();
    !(halves & halves >> 1) & 0x5555
}

#[cfg(any(test, not(target_arch = "x86_64")))]
fn filled_words_plainly(words: &[u64; BLOCK_WORDS]) -> u32 {
    words.iter().enumerate().fold(0, |filled, (index, &word)| filled | u32::from(word != 0) << (2 * index))
}

/// Lets a test do without the newer instructions, to compare.
#[cfg(test)]
pub(crate) mod plain {
    use std::cell::Cell;

    thread_local! {
        pub(crate) static ONLY: Cell<bool> = const { Cell::new(false) };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn filled_words_equal_a_word_at_a_time_oracle(
            words in prop::array::uniform8(prop_oneof![Just(0), Just(1 << 63), (0..64u32).prop_map(|bit| 1 << bit), any::<u64>()]),
        ) {
            prop_assert_eq!(filled_words(&words), filled_words_plainly(&words));
        }
    }
}
