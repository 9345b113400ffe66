// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How many pages a writer may write, and when.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::worker::Gate;

/// How fast a writer writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rate {
    /// As fast as it can.
    Unlimited,
    /// So many pages a second; 0 writes none.
    PagesPerSecond(u32),
}

/// The most that [`Pace::throttle`] takes away: a guest that never runs cannot answer anything.
const MAX_THROTTLE_PERCENT: u8 = 99;
/// Pages granted at once to a writer without a limit.
const LARGEST_GRANT: u32 = 256;
/// How many grants a second a limited writer gets, where its rate allows.
const GRANTS_PER_SECOND: u32 = 100;
/// How long a wait lasts at most before the rate is read again, which may have changed.
const LONGEST_NAP: Duration = Duration::from_millis(10);

/// A rate and a throttle that other threads may change at any time.
pub(super) struct Pace {
    /// Pages a second, or [`UNLIMITED`].
    pages_per_s: AtomicU64,
    throttle_percent: AtomicU8,
}

const UNLIMITED: u64 = u64::MAX;

impl Pace {
    pub(super) fn new(rate: Rate) -> Self {
        let pace = Self { pages_per_s: AtomicU64::new(0), throttle_percent: AtomicU8::new(0) };
        pace.limit(rate);
        pace
    }

    /// Sets the rate from the next grant on.
    pub(super) fn limit(&self, rate: Rate) {
        let pages_per_s = match rate {
            Rate::Unlimited => UNLIMITED,
            Rate::PagesPerSecond(pages) => u64::from(pages),
        };
        self.pages_per_s.store(pages_per_s, Ordering::Relaxed);
    }

    /// Takes `percent` of the writer's time and of its rate away; 0 gives all back. More than 99 counts as 99.
    pub(super) fn throttle(&self, percent: u8) {
        self.throttle_percent.store(percent.min(MAX_THROTTLE_PERCENT), Ordering::Relaxed);
    }

    /// Decides the next grant of a writer that was busy for `busy` since the last one.
    fn next(&self, busy: Duration) -> Grant {
        let throttle = self.throttle_percent.load(Ordering::Relaxed);
        let idle = busy * u32::from(throttle) / u32::from(100 - throttle);
        let pages_per_s = match self.pages_per_s.load(Ordering::Relaxed) {
            UNLIMITED => return Grant { pages: LARGEST_GRANT, spacing: Duration::ZERO, idle },
            pages => (pages * u64::from(100 - throttle)).div_ceil(100),
        };
        let Ok(pages_per_s @ 1..) = u32::try_from(pages_per_s) else {
            return Grant { pages: 0, spacing: LONGEST_NAP, idle };
        };
        let pages = (pages_per_s / GRANTS_PER_SECOND).clamp(1, LARGEST_GRANT);
        Grant { pages, spacing: Duration::from_secs(1) * pages / pages_per_s, idle }
    }
}

/// So many pages, this long after the grant before it, and after so much enforced idleness.
#[derive(Debug, PartialEq, Eq)]
struct Grant {
    pages: u32,
    spacing: Duration,
    idle: Duration,
}

/// One writer's place in time.
pub(super) struct Pacer {
    granted: Instant,
    woken: Instant,
}

impl Pacer {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self { granted: now, woken: now }
    }

    /// Waits until the writer may go on and returns how many pages it may write; 0 when `gate` wants it to stop.
    pub(super) fn grant(&mut self, pace: &Pace, gate: &Gate) -> u32 {
        let asked = Instant::now();
        let busy = asked.saturating_duration_since(self.woken);
        while gate.wants_run() {
            let grant = pace.next(busy);
            let due = (self.granted + grant.spacing).max(asked + grant.idle);
            let now = Instant::now();
            if now >= due && grant.pages > 0 {
                // A writer that fell behind does not catch up in a burst: at most one grant is owed.
                self.granted = due.max(now.checked_sub(grant.spacing).unwrap_or(now));
                self.woken = now;
                return grant.pages;
            }
            gate.sleep_until(due.min(now + LONGEST_NAP).max(now + Duration::from_micros(100)));
        }
        self.woken = Instant::now();
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUSY: Duration = Duration::from_millis(6);

    #[test]
    fn grants_and_their_spacing_make_the_rate() {
        for rate in [1, 7, 99, 100, 2_000, 25_599] {
            let grant = Pace::new(Rate::PagesPerSecond(rate)).next(BUSY);
            let got = f64::from(grant.pages) / grant.spacing.as_secs_f64();
            assert!((got / f64::from(rate) - 1.0).abs() < 0.001, "{grant:?} for {rate}");
        }
    }

    #[test]
    fn a_rate_of_zero_grants_nothing() {
        assert_eq!(Pace::new(Rate::PagesPerSecond(0)).next(BUSY).pages, 0);
    }

    #[test]
    fn an_unlimited_writer_never_waits() {
        let grant = Pace::new(Rate::Unlimited).next(BUSY);
        assert_eq!(grant, Grant { pages: LARGEST_GRANT, spacing: Duration::ZERO, idle: Duration::ZERO });
    }

    #[test]
    fn throttling_idles_in_proportion_and_scales_the_rate() {
        let pace = Pace::new(Rate::PagesPerSecond(1000));
        pace.throttle(75);
        let grant = pace.next(BUSY);
        assert_eq!(grant.idle, BUSY * 3);
        assert_eq!(grant.spacing / grant.pages, Duration::from_millis(4));
    }

    #[test]
    fn a_throttle_beyond_the_limit_leaves_one_percent() {
        let pace = Pace::new(Rate::Unlimited);
        pace.throttle(250);
        assert_eq!(pace.next(BUSY).idle, BUSY * 99);
    }
}
