// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How fast a running device changes the state that is read of it, and what that means for the switchover. Pure: counts and instants in,
//! bytes out.
//!
//! A device in PRE_COPY hands out what it has, and pauses once there is no more: at that moment the receiver has all of it. What it hands
//! out between two pauses is what it changed meanwhile.

use std::time::{Duration, Instant};

/// How often a state may be read over without rest: a device that changes it faster than it is read gains nothing by PRE_COPY.
const READINGS: u64 = 2;

/// What one turn of reading a device in PRE_COPY brought.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turn {
    pub(super) bytes: u64,
    /// Whether the device has no more for now.
    pub(super) drained: bool,
    /// How long it was read.
    pub(super) took: Duration,
    /// When the turn ended.
    pub(super) ended: Instant,
}

/// What the turns of one session tell.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Changes {
    /// Bytes read before the first pause: all of the state, once at least.
    first: Option<u64>,
    paused: Option<Instant>,
    /// Bytes, and the time it took to read them, since the last pause.
    since_pause: u64,
    reading: Duration,
    /// Bytes per second that changed between the last two pauses, and between the two before those.
    rates: [Option<u64>; 2],
    /// When the last turn ended.
    ended: Option<Instant>,
    /// Bytes read in a row, turn after turn, without what is left becoming less.
    restless: u64,
}

impl Changes {
    /// Takes in the next turn.
    pub(super) fn read(&mut self, turn: Turn) {
        self.since_pause = self.since_pause.saturating_add(turn.bytes);
        self.reading += turn.took;
        let since_turn =
            self.ended.replace(turn.ended).map(|before| turn.ended.saturating_duration_since(before));
        // Where memory takes most of the time, the device cannot be read as fast as it could be.
        if since_turn.is_none_or(|since| turn.took * 2 > since) {
            self.restless = self.restless.saturating_add(turn.bytes);
        }
        if !turn.drained {
            return;
        }
        let (bytes, reading) = (std::mem::take(&mut self.since_pause), std::mem::take(&mut self.reading));
        let Some(before) = self.paused.replace(turn.ended) else {
            (self.first, self.restless) = (Some(bytes), 0);
            return;
        };
        let since = turn.ended.saturating_duration_since(before);
        self.rates = [Some(rate(bytes, since)), self.rates[0]];
        let is_small = self.first.is_some_and(|first| bytes < first / 2);
        if is_small || reading * 2 <= since {
            self.restless = 0;
        }
    }

    /// Bytes that the whole state has at most, by what was read; `None` before the device paused.
    pub(super) fn most(&self) -> Option<u64> {
        self.first
    }

    /// Bytes that the device has changed by now since it last paused, if it goes on as before. `None` where that cannot be told: it
    /// has not paused twice, or has more than was read.
    pub(super) fn left(&self, now: Instant) -> Option<u64> {
        let rate = self.rates.into_iter().flatten().max()?;
        let since = now.saturating_duration_since(self.paused.filter(|_| self.since_pause == 0)?);
        let bytes = u128::from(rate) * since.as_nanos() / 1_000_000_000;
        Some(u64::try_from(bytes).unwrap_or(u64::MAX))
    }

    /// Whether the device changes its state, of `most` bytes, as fast as it is read.
    pub(super) fn are_as_fast_as_reading(&self, most: u64) -> bool {
        self.restless > most.saturating_mul(READINGS)
    }
}

/// Bytes per second for `bytes` in `time`.
pub(super) fn rate(bytes: u64, time: Duration) -> u64 {
    let nanos = time.as_nanos().max(1);
    u64::try_from(u128::from(bytes) * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A device of `state` bytes that changes `rate` bytes a second and is read at `speed`, in turns of 250 ms, with a pause after each;
    /// returns what the turns told and what was left in truth at their end.
    fn simulate(state: u64, rate: u64, speed: u64, pause: Duration, turns: u32) -> (Changes, Instant, u64) {
        let (mut changes, mut now, mut left) = (Changes::default(), Instant::now(), state);
        // A part of the changes hits what is left anyway.
        let changed = |left: u64, time: Duration| {
            let read = u128::from(state - left);
            let fresh = read * u128::from(rate) * time.as_micros() / u128::from(state) / 1_000_000;
            left + u64::try_from(fresh.min(read)).unwrap()
        };
        let step = Duration::from_millis(5);
        for _ in 0..turns {
            let (mut bytes, mut took) = (0, Duration::ZERO);
            while took < Duration::from_millis(250) && left > 0 {
                let read = left.min(speed / 200);
                (bytes, took, left) = (bytes + read, took + step, changed(left - read, step));
                if left <= rate / 200 {
                    (bytes, left) = (bytes + left, 0);
                }
            }
            now += took.max(Duration::from_micros(100));
            changes.read(Turn { bytes, drained: left == 0, took, ended: now });
            left = changed(left, pause);
            now += pause;
        }
        (changes, now, left)
    }

    #[test]
    fn what_is_left_of_a_busy_device_is_what_it_changed_since_its_pause() {
        for (rate, pause) in [(0, 10), (100 * MIB, 10), (100 * MIB, 100), (200 * MIB, 20)] {
            let (changes, now, truth) =
                simulate(1024 * MIB, rate, 400 * MIB, Duration::from_millis(pause), 40);
            let left = changes.left(now).unwrap_or_else(|| panic!("{rate} {pause}: {changes:?}"));
            assert!(left >= truth / 2 && left <= truth * 2 + MIB, "{left} for {truth}: {rate} {pause}");
            assert!(!changes.are_as_fast_as_reading(changes.most().unwrap()), "{rate} {pause}");
        }
    }

    #[test]
    fn a_device_that_never_pauses_is_as_fast_as_its_reading_and_nothing_is_known_of_it() {
        let (changes, now, truth) = simulate(1024 * MIB, 1000 * MIB, 400 * MIB, Duration::ZERO, 40);
        assert!(truth > 500 * MIB);
        assert_eq!((changes.left(now), changes.most()), (None, None));
        assert!(changes.are_as_fast_as_reading(1024 * MIB));
        assert!(!changes.are_as_fast_as_reading(5 << 30), "it may be this long");
    }

    #[test]
    fn one_pause_tells_the_size_and_nothing_of_the_rate() {
        let (changes, now, _) = simulate(64 * MIB, 0, 400 * MIB, Duration::ZERO, 1);
        assert_eq!((changes.most(), changes.left(now)), (Some(64 * MIB), None));
    }

    #[test]
    fn long_rounds_of_memory_make_no_device_fast() {
        // All of the state changes in each round: it is read in a tenth of it, or there is no time to.
        for speed in [640 * MIB, 160 * MIB] {
            let (changes, _, _) = simulate(64 * MIB, 64 * MIB, speed, Duration::from_secs(5), 40);
            assert!(!changes.are_as_fast_as_reading(64 * MIB), "{speed}");
        }
    }
}
