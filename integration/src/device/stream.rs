// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the device writes, and where, as pure functions: a test knows every byte without asking the device.
//!
//! The stream is a sequence of positions. Position `p` writes one page, chosen among the windows by
//! [`stream_word`]; the page then carries (magic, position, page index, check word) and 508 words that follow from them.

use std::collections::BTreeMap;

/// Bytes the device writes at each position, and the unit of its windows.
pub const PAGE_BYTES: usize = 4096;
/// Most windows the device has.
pub const MAX_WINDOWS: usize = 16;

const PAGE_MAGIC: u64 = u64::from_le_bytes(*b"DMAstamp");
const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// Returns word `position` of the pseudo-random stream that `seed` begins.
pub fn stream_word(seed: u64, position: u64) -> u64 {
    scramble(seed.wrapping_add(position.wrapping_add(1).wrapping_mul(GOLDEN_GAMMA)))
}

/// Spreads every bit of `word` over all of the result: the finisher of SplitMix64.
pub(super) fn scramble(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Is a range of IOVA space the device writes: whole pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Window {
    iova: u64,
    pages: u64,
}

impl Window {
    /// Returns the window of `length` bytes at `iova`, or `None` when it is not whole pages or wraps.
    pub fn new(iova: u64, length: u64) -> Option<Self> {
        let page = PAGE_BYTES as u64;
        iova.checked_add(length)?;
        (iova.is_multiple_of(page) && length.is_multiple_of(page))
            .then_some(Window { iova, pages: length / page })
    }

    /// Returns the first IOVA.
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// Returns the length in bytes.
    pub fn length(&self) -> u64 {
        self.pages * PAGE_BYTES as u64
    }
}

/// Holds what determines the whole stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    /// The seed of the stream.
    pub seed: u64,
    /// Where the device writes.
    pub windows: Vec<Window>,
}

impl Stream {
    /// Returns the IOVA of the page that `position` writes; `None` without windows.
    pub fn target(&self, position: u64) -> Option<u64> {
        target(self.seed, &self.windows, position)
    }

    /// Returns, for each page written before `position`, the last position that wrote it.
    pub fn last_writes(&self, position: u64) -> BTreeMap<u64, u64> {
        (0..position).filter_map(|at| Some((self.target(at)?, at))).collect()
    }

    /// Writes the page of `position` into `page`.
    pub fn fill_page(&self, position: u64, iova: u64, page: &mut [u8; PAGE_BYTES]) {
        fill_page(self.seed, position, iova, page);
    }

    /// Returns the position that wrote `page` at `iova`, or `None` when it was never written: all zero.
    ///
    /// # Errors
    ///
    /// The page is not what any position of this stream writes there.
    pub fn check_page(&self, iova: u64, page: &[u8; PAGE_BYTES]) -> Result<Option<u64>, BadPage> {
        if page.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let position = word_at(page, 1);
        let mut expected = [0; PAGE_BYTES];
        fill_page(self.seed, position, iova, &mut expected);
        let wrong = (0..PAGE_BYTES / 8).find(|word| word_at(page, *word) != word_at(&expected, *word));
        match wrong {
            None if self.target(position) == Some(iova) => Ok(Some(position)),
            word => Err(BadPage { iova, position, word: word.unwrap_or(1) }),
        }
    }
}

/// Describes a page that no position of the stream writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Page at IOVA {iova:#x} says position {position} and is wrong from word {word} on")]
pub struct BadPage {
    /// The page.
    pub iova: u64,
    /// The position it claims.
    pub position: u64,
    /// The first word that is not what that position writes.
    pub word: usize,
}

pub(super) fn target(seed: u64, windows: &[Window], position: u64) -> Option<u64> {
    let pages: u64 = windows.iter().map(|window| window.pages).sum();
    let mut index = stream_word(seed, position).checked_rem(pages)?;
    let window = windows.iter().find(|window| {
        let inside = index < window.pages;
        index -= if inside { 0 } else { window.pages };
        inside
    })?;
    Some(window.iova + index * PAGE_BYTES as u64)
}

pub(super) fn fill_page(seed: u64, position: u64, iova: u64, page: &mut [u8; PAGE_BYTES]) {
    let index = iova / PAGE_BYTES as u64;
    let check = scramble(stream_word(seed, position) ^ index.wrapping_mul(GOLDEN_GAMMA));
    let (words, _) = page.as_chunks_mut::<8>();
    for (number, word) in words.iter_mut().enumerate() {
        let value = match number {
            0 => PAGE_MAGIC,
            1 => position,
            2 => index,
            number => check.wrapping_mul(2 * number as u64 - 5),
        };
        *word = value.to_le_bytes();
    }
}

fn word_at(page: &[u8; PAGE_BYTES], word: usize) -> u64 {
    u64::from_le_bytes(page.as_chunks::<8>().0[word])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> Stream {
        let windows = vec![Window::new(0x1000, 0x3000).unwrap(), Window::new(1 << 32, 0x2000).unwrap()];
        Stream { seed: 7, windows }
    }

    #[test]
    fn stream_words_are_fixed_forever() {
        assert_eq!(stream_word(0, 0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(stream_word(0, 1), 0x6e78_9e6a_a1b9_65f4);
        assert_eq!(stream_word(GOLDEN_GAMMA, 0), stream_word(0, 1));
    }

    #[test]
    fn targets_reach_every_page_of_every_window_and_nothing_else() {
        let written: Vec<u64> = stream().last_writes(1000).into_keys().collect();
        assert_eq!(written, [0x1000, 0x2000, 0x3000, 1 << 32, (1 << 32) + 0x1000]);
        assert_eq!(Stream { seed: 7, windows: Vec::new() }.target(0), None);
    }

    #[test]
    fn every_changed_bit_of_a_page_is_noticed() {
        let (stream, mut page) = (stream(), [0; PAGE_BYTES]);
        let iova = stream.target(5).unwrap();
        assert_eq!(stream.check_page(iova, &page), Ok(None));
        stream.fill_page(5, iova, &mut page);
        assert_eq!(stream.check_page(iova, &page), Ok(Some(5)));
        for byte in 0..PAGE_BYTES {
            page[byte] ^= 1 << (byte % 8);
            assert!(stream.check_page(iova, &page).is_err(), "byte {byte}");
            page[byte] ^= 1 << (byte % 8);
        }
        assert!(stream.check_page(iova ^ 0x1000, &page).is_err(), "a page at the wrong place");
    }

    #[test]
    fn windows_are_whole_pages() {
        assert!(Window::new(1, 0x1000).is_none());
        assert!(Window::new(0x1000, 0x10).is_none());
        assert!(Window::new(0x1000, 0_u64.wrapping_sub(0x1000)).is_none());
    }
}
