// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All that makes up the device's state: registers and internal blocks.

use super::stream::{MAX_WINDOWS, Window, scramble, stream_word};

/// Bytes of internal state that change at once.
pub(super) const BLOCK_BYTES: usize = 4096;
/// Bytes of a block's generation, before its bytes when it is saved.
pub(super) const GENERATION_BYTES: usize = 8;
/// Words of the encoded registers.
pub(super) const REGISTER_WORDS: usize = 6 + 2 * MAX_WINDOWS;

/// One internal block changes at every so many positions.
const POSITIONS_PER_CHANGE: u64 = 32;
const BLOCK_SALT: u64 = 0x7374_6174_6562_6c6b;

/// Holds the registers that migrate.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Registers {
    /// Whether the engine is switched on.
    pub(super) run: bool,
    pub(super) seed: u64,
    /// Pages written each second.
    pub(super) rate: u64,
    /// The next position to write.
    pub(super) position: u64,
    /// Positions whose page no mapped region holds.
    pub(super) missed: u64,
    pub(super) window_count: usize,
    pub(super) windows: [Window; MAX_WINDOWS],
}

impl Registers {
    pub(super) fn windows(&self) -> &[Window] {
        &self.windows[..self.window_count]
    }

    pub(super) fn to_words(&self) -> [u64; REGISTER_WORDS] {
        let mut words = [0; REGISTER_WORDS];
        let fixed =
            [u64::from(self.run), self.seed, self.rate, self.position, self.missed, self.window_count as u64];
        words[..6].copy_from_slice(&fixed);
        for (pair, window) in words[6..].chunks_exact_mut(2).zip(&self.windows) {
            pair.copy_from_slice(&[window.iova(), window.length()]);
        }
        words
    }

    /// Returns the registers `words` encode, or `None` when they hold what no register can.
    pub(super) fn from_words(words: &[u64; REGISTER_WORDS]) -> Option<Self> {
        let (&[run, seed, rate, position, missed, window_count], pairs) = words.split_first_chunk::<6>()?;
        let window_count = usize::try_from(window_count).ok().filter(|count| *count <= MAX_WINDOWS)?;
        let mut windows = [Window::default(); MAX_WINDOWS];
        for (window, pair) in windows.iter_mut().zip(pairs.chunks_exact(2)) {
            *window = Window::new(pair[0], pair[1])?;
        }
        let run = match run {
            0 => false,
            1 => true,
            _ => return None,
        };
        Some(Registers { run, seed, rate, position, missed, window_count, windows })
    }
}

/// Is the internal state: blocks of bytes that are made up when they are asked for, each from its number and its generation.
#[derive(Debug)]
pub(super) struct Blocks {
    state_bytes: usize,
    /// By block; 0 after a reset.
    generations: Vec<u64>,
}

/// What one change beside the stream of positions adds to a generation.
const CHURN: u64 = 1 << 40;

impl Blocks {
    /// Returns `state_bytes` of internal state as it is after a reset.
    pub(super) fn new(state_bytes: usize) -> Self {
        Blocks { state_bytes, generations: vec![0; state_bytes.div_ceil(BLOCK_BYTES)] }
    }

    pub(super) fn count(&self) -> usize {
        self.generations.len()
    }

    pub(super) fn bytes(&self) -> usize {
        self.state_bytes
    }

    /// Returns a block as it is saved: its generation, then its bytes.
    pub(super) fn block(&self, block: usize) -> Vec<u8> {
        let generation = self.generations[block];
        let bytes = self.bytes_of(block);
        let mut saved = Vec::with_capacity(GENERATION_BYTES + bytes + 8);
        saved.extend(generation.to_le_bytes());
        let key = stream_word(BLOCK_SALT ^ block as u64, generation);
        (0..bytes.div_ceil(8) as u64).for_each(|word| saved.extend(stream_word(key, word).to_le_bytes()));
        saved.truncate(GENERATION_BYTES + bytes);
        saved
    }

    fn bytes_of(&self, block: usize) -> usize {
        (self.state_bytes - block * BLOCK_BYTES).min(BLOCK_BYTES)
    }

    /// Replaces a block by one that was saved; `false` when there is no such block or its bytes are not those of its generation.
    pub(super) fn replace(&mut self, block: usize, saved: &[u8]) -> bool {
        let Some(generation) = saved.first_chunk().filter(|_| block < self.count()) else { return false };
        let before = std::mem::replace(&mut self.generations[block], u64::from_le_bytes(*generation));
        let same = self.block(block) == saved;
        if !same {
            self.generations[block] = before;
        }
        same
    }

    /// Changes what passing `position` of the stream of `seed` changes and returns which block that was.
    pub(super) fn pass(&mut self, seed: u64, position: u64) -> Option<usize> {
        if !position.is_multiple_of(POSITIONS_PER_CHANGE) {
            return None;
        }
        let pick = stream_word(seed ^ BLOCK_SALT, position).checked_rem(self.count() as u64)?;
        let block = usize::try_from(pick).ok()?;
        self.generations[block] = position + 1;
        Some(block)
    }

    /// Changes a block beside that.
    pub(super) fn churn(&mut self, block: usize) {
        self.generations[block] = self.generations[block].wrapping_add(CHURN);
    }

    /// Returns one number for all of `registers` and the blocks.
    pub(super) fn digest_with(&self, registers: &Registers) -> u64 {
        let words = registers.to_words();
        words.iter().chain(&self.generations).fold(0, |digest, word| scramble(digest ^ word).wrapping_add(1))
    }
}

/// Returns one number for `bytes`.
pub(super) fn digest(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(bytes.len() as u64, |digest, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        scramble(digest ^ u64::from_le_bytes(word)).wrapping_add(1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_survive_their_encoding_and_nonsense_does_not() {
        let mut registers = Registers {
            run: true,
            seed: 1,
            rate: 2,
            position: 3,
            missed: 4,
            window_count: 2,
            ..Registers::default()
        };
        registers.windows[1] = Window::new(0x1000, 0x2000).unwrap();
        let words = registers.to_words();
        assert_eq!(Registers::from_words(&words), Some(registers));
        for (word, value) in [(0, 2), (5, MAX_WINDOWS as u64 + 1), (6, 1), (7, 5)] {
            let mut wrong = words;
            wrong[word] = value;
            assert_eq!(Registers::from_words(&wrong), None, "word {word}");
        }
    }

    #[test]
    fn internal_state_follows_from_the_positions_passed() {
        let registers = Registers::default();
        let (mut one, mut other) = (Blocks::new(10_000), Blocks::new(10_000));
        let fresh = one.digest_with(&registers);
        let changed: Vec<_> = (0..320).filter_map(|position| one.pass(9, position)).collect();
        assert_eq!(changed.len(), 10, "slowly");
        assert_ne!(one.digest_with(&registers), fresh);
        let again: Vec<_> = (0..320).filter_map(|position| other.pass(9, position)).collect();
        assert_eq!(again, changed);
        assert_eq!(one.digest_with(&registers), other.digest_with(&registers));
        assert_eq!(one.block(2).len(), GENERATION_BYTES + 10_000 - 2 * BLOCK_BYTES);
        assert_eq!(one.block(2), other.block(2));
        assert_ne!(one.block(0)[GENERATION_BYTES..], one.block(1)[GENERATION_BYTES..]);
    }

    #[test]
    fn device_without_internal_state_has_nothing_to_change() {
        let mut blocks = Blocks::new(0);
        assert_eq!((blocks.count(), blocks.pass(1, 0)), (0, None));
    }
}
