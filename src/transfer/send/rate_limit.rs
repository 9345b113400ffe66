// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The rate limit of the running VM's memory and device state, [`SendOptions::rate_limit`](super::SendOptions::rate_limit). Instants come in; no
//! clock here.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use super::rates::to_float;

/// Where a cap so low, or a chunk so large, stops adding up.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// A rate limit: spreads bytes over time.
#[derive(Debug)]
pub(super) struct RateLimit {
    bytes_per_second: NonZeroU64,
    free_at: Option<Instant>,
}

impl RateLimit {
    pub(super) fn new(bytes_per_second: NonZeroU64) -> Self {
        Self { bytes_per_second, free_at: None }
    }

    /// How long to wait, from `now`, before the next bytes may go.
    pub(super) fn wait(&self, now: Instant) -> Duration {
        self.free_at.map_or(Duration::ZERO, |free| free.saturating_duration_since(now))
    }

    /// Takes in that `bytes` go at `now`. Time left unused does not add up to a burst.
    pub(super) fn spend(&mut self, bytes: u64, now: Instant) {
        let start = self.free_at.map_or(now, |free| free.max(now));
        self.free_at = Some(start + self.time_of(bytes));
    }

    /// Takes in that `bytes` which were spent did not go after all.
    pub(super) fn give_back(&mut self, bytes: u64) {
        let time = self.time_of(bytes);
        self.free_at = self.free_at.and_then(|free| free.checked_sub(time));
    }

    fn time_of(&self, bytes: u64) -> Duration {
        let seconds = to_float(bytes) / to_float(self.bytes_per_second.get());
        Duration::from_secs_f64(seconds.min(LONGEST_WAIT.as_secs_f64()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_limit_is_kept_and_saves_nothing_up() {
        let start = Instant::now();
        let mut limit = RateLimit::new(NonZeroU64::new(1000).unwrap());
        assert_eq!(limit.wait(start), Duration::ZERO);
        limit.spend(500, start);
        limit.spend(700, start);
        limit.give_back(200);
        assert_eq!(limit.wait(start), Duration::from_secs(1));
        let later = start + Duration::from_secs(10);
        assert_eq!(limit.wait(later), Duration::ZERO);
        limit.spend(1000, later);
        assert_eq!(limit.wait(later), Duration::from_secs(1));
    }
}
