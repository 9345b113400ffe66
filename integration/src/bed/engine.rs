// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `dirty_mdev`'s engine: see `resources/modules/dirty_mdev.h`.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use super::pass_through::{Bus, PassThrough};
use crate::device::stream_word;
use crate::vmm::Memory;

const CONTROL: u64 = 0x08;
const SEED: u64 = 0x10;
const POSITION: u64 = 0x18;
const ERRORS: u64 = 0x28;
const RATE: u64 = 0x30;
const BURST: u64 = 0x38;
const WRITE_AT: u64 = 0x40;
const PIN: u64 = 0x48;
const UNPIN: u64 = 0x50;
const WINDOW: u64 = 0x100;
const WINDOWS: usize = 16;
const WORD_BYTES: u64 = 8;

/// An open `dirty_mdev`.
pub struct Engine {
    device: PassThrough,
}

impl Engine {
    /// Opens the mediated device `uuid`, which is idle and has no window.
    ///
    /// # Errors
    /// As [`PassThrough::open`].
    pub fn open(uuid: &str, memory: &Memory) -> anyhow::Result<Self> {
        Ok(Self { device: PassThrough::open(Bus::Mdev, uuid, memory)? })
    }

    /// The device behind it.
    pub fn pass_through(&self) -> &PassThrough {
        &self.device
    }

    /// Sets the stream, from its first word on, and how many words a second the engine writes while it runs.
    ///
    /// # Errors
    /// The device's errno, as for all below.
    pub fn program(&self, stream: &EngineStream, words_per_second: u64) -> io::Result<()> {
        assert!(stream.windows.len() <= WINDOWS, "{} windows", stream.windows.len());
        for (window, register) in stream.windows.iter().zip((WINDOW..).step_by(16)) {
            self.device.write(register, window.start)?;
            self.device.write(register + 8, window.end - window.start)?;
        }
        self.device.write(RATE, words_per_second)?;
        self.device.write(SEED, stream.seed)
    }

    /// Starts or stops the engine.
    ///
    /// # Errors
    /// The device's errno.
    pub fn run(&self, run: bool) -> io::Result<()> {
        self.device.write(CONTROL, run.into())
    }

    /// Writes the stream's next `words` now.
    ///
    /// # Errors
    /// The device's errno.
    pub fn burst(&self, words: u64) -> io::Result<()> {
        self.device.write(BURST, words)
    }

    /// Writes one word at `iova`, apart from the stream.
    ///
    /// # Errors
    /// The device's errno.
    pub fn write_at(&self, iova: u64) -> io::Result<()> {
        self.device.write(WRITE_AT, iova)
    }

    /// Pins the page at `iova`.
    ///
    /// # Errors
    /// The device's errno.
    pub fn pin(&self, iova: u64) -> io::Result<()> {
        self.device.write(PIN, iova)
    }

    /// Unpins the page at `iova`.
    ///
    /// # Errors
    /// The device's errno.
    pub fn unpin(&self, iova: u64) -> io::Result<()> {
        self.device.write(UNPIN, iova)
    }

    /// Words drawn from the stream so far.
    ///
    /// # Errors
    /// The device's errno.
    pub fn position(&self) -> io::Result<u64> {
        self.device.read(POSITION)
    }

    /// Words of the stream that were refused.
    ///
    /// # Errors
    /// The device's errno.
    pub fn errors(&self) -> io::Result<u64> {
        self.device.read(ERRORS)
    }
}

/// What an engine writes, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineStream {
    /// What the words depend on.
    pub seed: u64,
    /// Ranges of IOVA space, whole words, 16 at most.
    pub windows: Vec<Range<u64>>,
}

impl EngineStream {
    /// Addresses and values of the `count` words from number `first` on.
    pub fn words(&self, first: u64, count: u64) -> impl Iterator<Item = (u64, u64)> {
        let slots = self.windows.iter().map(|window| (window.end - window.start) / WORD_BYTES).sum::<u64>();
        (first..first + count).map(move |number| {
            let slot = stream_word(self.seed, 2 * number) % slots;
            (self.iova_of(slot), stream_word(self.seed, 2 * number + 1))
        })
    }

    /// What stands in each word that was written, after the first `count` of them.
    pub fn last_words(&self, count: u64) -> BTreeMap<u64, u64> {
        self.words(0, count).collect()
    }

    fn iova_of(&self, mut slot: u64) -> u64 {
        for window in &self.windows {
            let slots = (window.end - window.start) / WORD_BYTES;
            if slot < slots {
                return window.start + slot * WORD_BYTES;
            }
            slot -= slots;
        }
        unreachable!("the slot was taken modulo their number")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_reaches_every_window_and_nothing_else() {
        let stream = EngineStream { seed: 5, windows: vec![0x1000..0x1010, 1 << 32..(1 << 32) + 8] };
        let reached: Vec<u64> = stream.last_words(100).into_keys().collect();
        assert_eq!(reached, [0x1000, 0x1008, 1 << 32]);
        let all: Vec<_> = stream.words(0, 20).collect();
        assert_eq!(stream.words(7, 13).collect::<Vec<_>>(), all[7..]);
    }
}
