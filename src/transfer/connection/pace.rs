// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! When a peer has been waited for long enough: pure, fed with instants and bytes.

use std::io;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::transfer::limits::Pace;
use crate::units::Count;

/// A peer that let its time pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Stall {
    /// What was waited for did not come in time.
    #[error("Peer was silent for {:.3} s", .waited.as_secs_f64())]
    Silent {
        /// How long it was waited for.
        waited: Duration,
    },
    /// The time set for all that is said on the connection is over.
    #[error("Time of {:.3} s for the exchange is over", .allowed.as_secs_f64())]
    Late {
        /// How long it was, when it was set.
        allowed: Duration,
    },
    /// Bytes come or go too slowly in the middle of a message.
    #[error("Peer stalled: {} in {:.3} s of waiting", Count(.bytes, "byte"), .waited.as_secs_f64())]
    Slow {
        /// Bytes that moved.
        bytes: u64,
        /// How long they were waited for.
        waited: Duration,
    },
}

impl Stall {
    /// Returns the stall behind an I/O error, if that is what it is.
    pub fn of(error: &io::Error) -> Option<Self> {
        error.get_ref()?.downcast_ref().copied()
    }
}

impl From<Stall> for io::Error {
    fn from(stall: Stall) -> Self {
        Self::new(io::ErrorKind::TimedOut, stall)
    }
}

/// Tells, wait by wait, whether the peer may be waited for any longer.
#[derive(Debug)]
pub(super) struct Stopwatch {
    pace: Pace,
    waited: Duration,
    bytes: u64,
    until: Option<Deadline>,
    /// Past which no wait begins, whatever the others say.
    end: Option<Deadline>,
}

#[derive(Debug, Clone, Copy)]
struct Deadline {
    begun: Instant,
    at: Instant,
}

impl Deadline {
    fn new(now: Instant, within: Duration) -> Self {
        // A deadline past the end of time is none that matters: a year stands for it.
        let year = Duration::from_secs(365 * 24 * 60 * 60);
        Self { begun: now, at: now + within.min(year) }
    }
}

impl Stopwatch {
    pub(super) fn new(pace: Pace) -> Self {
        Self { pace, waited: Duration::ZERO, bytes: 0, until: None, end: None }
    }

    /// Lets waits last until `within` from `now`, whatever moves meanwhile.
    pub(super) fn wait_until(&mut self, now: Instant, within: Duration) {
        self.until = Some(Deadline::new(now, within));
    }

    /// Lets no wait last longer than `within` from `now`, neither at the pace nor with a deadline of its own.
    pub(super) fn end_at(&mut self, now: Instant, within: Option<Duration>) {
        self.end = within.map(|within| Deadline::new(now, within));
    }

    /// Asks for the pace again.
    pub(super) fn keep_pace(&mut self) {
        self.until = None;
    }

    /// Notes a wait of `time` that moved `bytes`.
    pub(super) fn note(&mut self, time: Duration, bytes: usize) {
        if self.until.is_some() {
            return;
        }
        self.waited += time;
        self.bytes = self.bytes.saturating_add(bytes as u64);
        if self.bytes >= self.pace.bytes {
            (self.waited, self.bytes) = (Duration::ZERO, 0);
        }
    }

    /// Checks whether another wait may begin at `now`.
    pub(super) fn check(&self, now: Instant) -> Result<(), Stall> {
        if let Some(Deadline { begun, at }) = self.end
            && now >= at
        {
            return Err(Stall::Late { allowed: at - begun });
        }
        match self.until {
            Some(Deadline { begun, at }) if now >= at => Err(Stall::Silent { waited: now - begun }),
            None if self.waited >= self.pace.window => {
                Err(Stall::Slow { bytes: self.bytes, waited: self.waited })
            }
            _ => Ok(()),
        }
    }

    /// How often a wait has to be broken off to look at the time.
    pub(super) fn tick(&self) -> Duration {
        (self.pace.window / 4).clamp(Duration::from_millis(10), Duration::from_millis(100))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PACE: Pace = Pace { window: Duration::from_secs(10), bytes: 1000 };

    #[test]
    fn a_trickle_of_a_byte_a_second_is_a_stall() {
        let mut stopwatch = Stopwatch::new(PACE);
        let now = Instant::now();
        for _ in 0..10 {
            assert_eq!(stopwatch.check(now), Ok(()));
            stopwatch.note(Duration::from_secs(1), 1);
        }
        let slow = Stall::Slow { bytes: 10, waited: Duration::from_secs(10) };
        assert_eq!(stopwatch.check(now), Err(slow));
        assert_eq!(slow.to_string(), "Peer stalled: 10 bytes in 10.000 s of waiting");
    }

    #[test]
    fn a_deadline_holds_however_much_moves() {
        let mut stopwatch = Stopwatch::new(PACE);
        let now = Instant::now();
        stopwatch.wait_until(now, Duration::from_secs(3));
        stopwatch.note(Duration::from_secs(60), 0);
        assert_eq!(stopwatch.check(now + Duration::from_secs(2)), Ok(()));
        stopwatch.note(Duration::from_secs(1), 1 << 20);
        let silent = Stall::Silent { waited: Duration::from_secs(3) };
        assert_eq!(stopwatch.check(now + Duration::from_secs(3)), Err(silent));
        stopwatch.keep_pace();
        assert_eq!(
            stopwatch.check(now + Duration::from_secs(3)),
            Ok(()),
            "waits with a deadline do not count"
        );
    }

    #[test]
    fn an_end_is_the_end_of_waits_of_either_kind() {
        let mut stopwatch = Stopwatch::new(PACE);
        let now = Instant::now();
        let late = Err(Stall::Late { allowed: Duration::from_secs(3) });
        stopwatch.end_at(now, Some(Duration::from_secs(3)));
        assert_eq!(stopwatch.check(now + Duration::from_secs(2)), Ok(()));
        assert_eq!(stopwatch.check(now + Duration::from_secs(3)), late);
        stopwatch.wait_until(now, Duration::from_secs(60));
        assert_eq!(stopwatch.check(now + Duration::from_secs(3)), late);
        stopwatch.end_at(now, None);
        assert_eq!(stopwatch.check(now + Duration::from_secs(3)), Ok(()));
    }

    #[test]
    fn an_endless_deadline_does_not_overflow() {
        let mut stopwatch = Stopwatch::new(PACE);
        stopwatch.wait_until(Instant::now(), Duration::MAX);
        assert_eq!(stopwatch.check(Instant::now()), Ok(()));
    }

    proptest! {
        #[test]
        fn who_keeps_the_pace_is_never_stalled(moves in prop::collection::vec((0..2000u64, 1000..5000usize), 1..50)) {
            let mut stopwatch = Stopwatch::new(PACE);
            for (millis, bytes) in moves {
                stopwatch.note(Duration::from_millis(millis), bytes);
                prop_assert_eq!(stopwatch.check(Instant::now()), Ok(()));
            }
        }

        #[test]
        fn waiting_is_bounded_by_the_bytes_it_brought(moves in prop::collection::vec((0..5000u64, 0..100usize), 1..500)) {
            let mut stopwatch = Stopwatch::new(PACE);
            let (mut waited, mut bytes) = (Duration::ZERO, 0);
            for (millis, moved) in moves {
                if stopwatch.check(Instant::now()).is_err() {
                    break;
                }
                stopwatch.note(Duration::from_millis(millis), moved);
                waited += Duration::from_millis(millis);
                bytes += moved as u64;
            }
            let windows = u32::try_from(bytes / PACE.bytes + 1).unwrap();
            prop_assert!(waited <= (PACE.window + Duration::from_secs(5)) * windows);
        }
    }
}
