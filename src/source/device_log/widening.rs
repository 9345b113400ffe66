// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Mappings that a running log does not cover: when the log is restarted over more, and over how much more.
//!
//! A restart makes all that is mapped dirty once. A virtual IOMMU that maps ever new IOVAs, a thousand times a second, must not cause as
//! many: after the first one the log covers more than is mapped, and each further one waits longer.

use std::time::{Duration, Instant};

use crate::range::IovaRange;

/// How long after the first restart the next may follow. Each further one doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// How often the pause is doubled at most: up to 12.8 s.
const MOST_DOUBLINGS: u32 = 7;

/// The restarts that mappings outside the log have caused.
#[derive(Debug)]
pub(super) struct Widening {
    first_pause: Duration,
    last: Option<Instant>,
    restarts: u32,
}

impl Default for Widening {
    fn default() -> Self {
        Self { first_pause: FIRST_PAUSE, last: None, restarts: 0 }
    }
}

impl Widening {
    /// Lets the first pause last this long.
    #[cfg(test)]
    pub(super) fn pausing(first_pause: Duration) -> Self {
        Self { first_pause, ..Self::default() }
    }

    /// Forgets the restarts of an earlier session.
    pub(super) fn restart(&mut self) {
        (self.last, self.restarts) = (None, 0);
    }

    /// Whether the log may be restarted now.
    pub(super) fn is_due(&self) -> bool {
        let doublings = self.restarts.saturating_sub(1).min(MOST_DOUBLINGS);
        self.last.is_none_or(|last| last.elapsed() >= self.first_pause * (1 << doublings))
    }

    /// Whether the log was restarted before.
    pub(super) fn has_been(&self) -> bool {
        self.last.is_some()
    }

    /// Counts a restart, now.
    pub(super) fn count(&mut self) {
        (self.last, self.restarts) = (Some(Instant::now()), self.restarts + 1);
    }
}

/// Ranges that hold all of `ranges`, which ascend, with room for as much again: on both sides, below, above; and without.
pub(super) fn with_room(ranges: &[IovaRange]) -> Vec<IovaRange> {
    let (Some(first), Some(last)) = (ranges.first(), ranges.last()) else { return Vec::new() };
    let (start, end) = (first.start(), last.end());
    let (lower, higher) = (start.saturating_sub(end - start), end.checked_add(end - start).unwrap_or(end));
    let around = [(lower, higher), (lower, end), (start, higher), (start, end)];
    around.into_iter().filter_map(|(start, end)| IovaRange::from_bounds(start, end).ok()).collect()
}
