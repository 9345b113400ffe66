// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a ledger is asked for, and what it tells.

/// Names one cursor of one ledger; never used again after the cursor is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CursorId(pub(super) u64);

/// What a new cursor's receiver already holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Nothing: every page is pending.
    Empty,
    /// A copy of all RAM, made or to be made by somebody else after the sources were started: no page is pending.
    Copied,
}

/// The most one chunk may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkLimits {
    /// Bytes of guest memory; rounded down to whole pages, at least one page.
    pub bytes: u64,
    /// Ranges in its table; at least one.
    pub ranges: usize,
}

impl ChunkLimits {
    /// No limit: one chunk is the whole round.
    pub const NONE: Self = Self { bytes: u64::MAX, ranges: usize::MAX };
}

/// How much a cursor's receiver still lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Outstanding {
    /// Bytes changed since the receiver's last copy.
    pub pending_bytes: u64,
    /// Bytes on their way.
    pub in_flight_bytes: u64,
}

/// Pages one source reported, summed over all collects since the ledger was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attribution {
    /// Pages reported.
    pub pages: u64,
    /// Pages that no other source reported in the same collect.
    pub exclusive_pages: u64,
}

#[cfg(feature = "transfer")]
impl Attribution {
    /// Returns what was reported since `before`; all, where the count began anew in between.
    pub(crate) fn since(self, before: Self) -> Self {
        if before.pages > self.pages || before.exclusive_pages > self.exclusive_pages {
            return self;
        }
        Self {
            pages: self.pages - before.pages,
            exclusive_pages: self.exclusive_pages - before.exclusive_pages,
        }
    }
}
