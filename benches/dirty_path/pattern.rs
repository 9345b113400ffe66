// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which pages are dirty, and which of the logs tells of them.

use std::sync::Arc;

/// How dirty pages lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pattern {
    Idle,
    /// Each page for itself, so many of ten thousand.
    Random(u64),
    Alternating,
    All,
    /// One of a hundred, in runs of 2 MiB.
    Clustered,
}

impl Pattern {
    pub(crate) const ALL: [Self; 7] = [
        Self::Idle,
        Self::Random(10),
        Self::Random(100),
        Self::Random(1000),
        Self::Alternating,
        Self::All,
        Self::Clustered,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Random(10) => "0.1%",
            Self::Random(100) => "1%",
            Self::Random(_) => "10%",
            Self::Alternating => "alternating",
            Self::All => "all",
            Self::Clustered => "clustered",
        }
    }

    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|pattern| pattern.name() == name)
    }
}

/// Pages of a run of the clustered pattern.
const CLUSTER_PAGES: u64 = 512;

/// Pages that the VMM itself writes, unless all is idle; spread over RAM, each dirty by the pattern anyway or not.
const OWN_WRITES: u64 = 1000;

/// What each log holds at every round.
pub(crate) struct Bits {
    pub(crate) ram_bytes: u64,
    /// One log's words, KVM's say.
    pub(crate) first: Arc<Vec<u64>>,
    /// Another's, a device's say.
    pub(crate) second: Arc<Vec<u64>>,
    /// Pages that the VMM wrote.
    pub(crate) own: Vec<usize>,
    /// All of them.
    pub(crate) merged: Vec<u64>,
}

impl Bits {
    /// Half of the dirty pages are told by the first log alone, four in ten by the second alone, the others by both; dense patterns by both.
    pub(crate) fn new(pattern: Pattern, ram_bytes: u64) -> Self {
        let pages = ram_bytes >> 12;
        let words = (pages / 64) as usize;
        let (mut first, mut second) = (zeros(words), zeros(words));
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut tell = |page: u64, by: u64| {
            let (word, bit) = ((page / 64) as usize, 1 << (page % 64));
            first[word] |= if by < 6 { bit } else { 0 };
            second[word] |= if by >= 5 { bit } else { 0 };
        };
        match pattern {
            Pattern::Idle => {}
            Pattern::Random(share) => (0..pages).for_each(|page| {
                if random.below(10_000) < share {
                    tell(page, random.below(10));
                }
            }),
            Pattern::Clustered => (0..pages / CLUSTER_PAGES / 100).for_each(|_| {
                let start = random.below(pages - CLUSTER_PAGES);
                let by = random.below(10);
                (start..start + CLUSTER_PAGES).for_each(|page| tell(page, by));
            }),
            Pattern::Alternating => {
                for words in [&mut first, &mut second] {
                    words.fill(0x5555_5555_5555_5555);
                }
            }
            Pattern::All => {
                for words in [&mut first, &mut second] {
                    words.fill(u64::MAX);
                }
            }
        }
        let writes = if pattern == Pattern::Idle { 0 } else { OWN_WRITES };
        let own: Vec<_> = (0..writes).map(|_| random.below(pages) as usize).collect();
        let mut merged: Vec<_> = first.iter().zip(&second).map(|(first, second)| first | second).collect();
        own.iter().for_each(|page| merged[page / 64] |= 1 << (page % 64));
        Self { ram_bytes, first: Arc::new(first), second: Arc::new(second), own, merged }
    }

    /// As many random pages as [`Bits::new`] has about, found by steps and not by looking at each: for RAM of many TiB.
    pub(crate) fn scattered(share: Pattern, ram_bytes: u64) -> Self {
        let Pattern::Random(share) = share else { unreachable!("a share of random pages") };
        let pages = ram_bytes >> 12;
        let mut bits = Self::new(Pattern::Idle, ram_bytes);
        let (first, second) = (Arc::make_mut(&mut bits.first), Arc::make_mut(&mut bits.second));
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut page = 0;
        loop {
            page += 1 + random.below(2 * 10_000 / share - 1);
            if page >= pages {
                return bits;
            }
            let (word, bit, by) = ((page / 64) as usize, 1 << (page % 64), random.below(10));
            first[word] |= if by < 6 { bit } else { 0 };
            second[word] |= if by >= 5 { bit } else { 0 };
            bits.merged[word] |= bit;
        }
    }

    /// Pages of which the first log tells.
    pub(crate) fn pages_of_first(&self) -> Vec<u64> {
        let mut pages = Vec::new();
        for (index, &word) in self.first.iter().enumerate() {
            let mut left = word;
            while left != 0 {
                pages.push(index as u64 * 64 + u64::from(left.trailing_zeros()));
                left &= left - 1;
            }
        }
        pages
    }

    /// Dirty pages.
    pub(crate) fn pages(&self) -> u64 {
        self.merged.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

/// Words that have memory of their own: reading a page nobody wrote reads one and the same page of zeros, from a cache.
fn zeros(words: usize) -> Vec<u64> {
    let mut zeros = vec![u64::MAX; words];
    std::hint::black_box(&mut zeros).fill(0);
    zeros
}

/// Numbers that look random and are the same in every run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % end
    }
}
