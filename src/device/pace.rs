// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The minimum rate at which a device must hand out or accept its state. Pure: bytes and clock readings come in.

use std::time::{Duration, Instant};

/// Bytes of state that a device has to move in each second.
pub(super) const LEAST_BYTES_PER_SECOND: u64 = 1 << 20;
/// How long a device may fall behind that before it is given up, as for a pause to gather its state.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// The time that one stream of state still has: each byte adds some, up to the patience.
#[derive(Debug)]
pub(super) struct Pace {
    patience: Duration,
    left: Duration,
    last: Instant,
}

impl Pace {
    pub(super) fn new(patience: Duration, now: Instant) -> Self {
        Self { patience, left: patience, last: now }
    }

    /// Restarts the clock after a delay that the device did not cause.
    pub(super) fn go_on(&mut self, now: Instant) {
        self.last = now;
    }

    /// Counts `bytes` that were moved since the last call, and tells whether the stream is still fast enough.
    pub(super) fn keeps_up(&mut self, bytes: usize, now: Instant) -> bool {
        let earned = Duration::from_secs_f64(bytes as f64 / LEAST_BYTES_PER_SECOND as f64);
        let passed = now.saturating_duration_since(self.last);
        self.last = now;
        match (self.left + earned).checked_sub(passed) {
            Some(left) => {
                self.left = left.min(self.patience);
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    /// Moves `pieces` of bytes and milliseconds, and returns after how many the stream was too slow.
    fn given_up(pieces: impl IntoIterator<Item = (usize, u64)>) -> Option<usize> {
        let mut now = Instant::now();
        let mut pace = Pace::new(PATIENCE, now);
        pieces.into_iter().position(|(bytes, ms)| {
            now += Duration::from_millis(ms);
            !pace.keeps_up(bytes, now)
        })
    }

    #[test]
    fn c61_a_byte_each_half_second_is_given_up_after_ten() {
        assert_eq!(given_up(std::iter::repeat_n((1, 500), 100)), Some(20));
    }

    #[test]
    fn a_slow_start_and_a_steady_least_rate_are_borne() {
        assert_eq!(given_up([(1, 9_999)]), None);
        assert_eq!(given_up(std::iter::repeat_n((MIB, 1_000), 10_000)), None);
        assert_eq!(given_up(std::iter::repeat_n((MIB / 2, 1_000), 100)), Some(20));
    }

    #[test]
    fn what_came_fast_buys_no_long_stall_later() {
        assert_eq!(given_up([(4096 * MIB, 1_000), (1, 9_900)]), None);
        assert_eq!(given_up([(4096 * MIB, 1_000), (1, 10_100)]), Some(1));
    }
}
