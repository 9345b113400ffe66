// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages that every report of a container contains, because a mediated device's driver keeps them pinned (C54).
//!
//! The kernel sets their bits again after every read, since it cannot see whether they are written.

use crate::granule::Granule;

/// Reports that a page must be in, one after the other, before it counts as coming back.
const TELLING_REPORTS: u32 = 3;

/// Reports after which the count begins anew, so that pages pinned later are found too.
const WINDOW_REPORTS: u32 = 8;

/// The bits that all of the last reports had.
#[derive(Debug, Default)]
pub(super) struct Steady {
    /// Of this window, in the order in which a report is read.
    words: Vec<u64>,
    /// Words of the report being read.
    read: usize,
    reports: u32,
    bits: u64,
}

impl Steady {
    /// Forgets what was seen: what is mapped has changed.
    pub(super) fn restart(&mut self) {
        let bits = self.bits;
        *self = Self { words: std::mem::take(&mut self.words), bits, ..Self::default() };
        self.words.clear();
    }

    /// Takes in the words that a report goes on with.
    pub(super) fn see(&mut self, words: &[u64]) {
        match self.words.get_mut(self.read..self.read + words.len()) {
            Some(seen) if self.reports > 0 => {
                seen.iter_mut().zip(words).for_each(|(seen, word)| *seen &= word);
            }
            _ => {
                self.words.truncate(self.read);
                self.words.extend_from_slice(words);
            }
        }
        self.read += words.len();
    }

    /// Takes in that a report is complete.
    pub(super) fn end_report(&mut self) {
        self.read = 0;
        self.reports += 1;
        if self.reports >= TELLING_REPORTS {
            self.bits = self.words.iter().map(|word| u64::from(word.count_ones())).sum();
        }
        if self.reports == WINDOW_REPORTS {
            self.restart();
        }
    }

    /// Bytes of the pages that come back; 0 as long as there were too few reports.
    pub(super) fn bytes(&self, granule: Granule) -> u64 {
        self.bits << granule.shift()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(steady: &mut Steady, words: [u64; 2]) -> u64 {
        steady.see(&words[..1]);
        steady.see(&words[1..]);
        steady.end_report();
        steady.bytes(Granule::KIB_4) >> 12
    }

    #[test]
    fn c54_pages_in_every_report_stand_and_pages_written_now_and_then_do_not() {
        let mut steady = Steady::default();
        let pinned = 0b1010;
        let bytes: Vec<_> =
            (0..20).map(|n| report(&mut steady, [pinned | 1 << (10 + n), pinned << 4])).collect();
        assert_eq!(bytes[..2], [0, 0], "two reports say nothing");
        assert!(bytes[2..].iter().all(|&pages| pages == 4), "{bytes:?}");
    }

    #[test]
    fn c54_pages_pinned_and_let_go_later_are_found_within_two_windows() {
        let mut steady = Steady::default();
        let first: Vec<_> = (0..5).map(|_| report(&mut steady, [0, 1])).collect();
        assert_eq!(first.last(), Some(&1));
        let later: Vec<_> = (0..12).map(|_| report(&mut steady, [7, 1])).collect();
        assert_eq!(later.last(), Some(&4));
        let gone: Vec<_> = (0..16).map(|_| report(&mut steady, [0, 0])).collect();
        assert_eq!(gone.last(), Some(&0));
        steady.restart();
        assert_eq!(report(&mut steady, [1, 1]), 0, "what was known holds until more is known");
    }
}
