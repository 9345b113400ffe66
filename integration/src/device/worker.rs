// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The thread that drives the engine at its rate, beside the one that answers requests.

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::engine::Engine;

/// How often a running engine writes.
const TICK: Duration = Duration::from_millis(1);
/// Most pages written with the lock held once; what is due beyond it is dropped: the engine is as fast as it can.
const PAGES_PER_TICK: u64 = 512;

/// Holds the device for its two threads.
#[derive(Debug)]
pub(super) struct Shared {
    engine: Mutex<Engine>,
    changed: Condvar,
    ended: Mutex<bool>,
}

impl Shared {
    pub(super) fn new(engine: Engine) -> Self {
        Shared { engine: Mutex::new(engine), changed: Condvar::new(), ended: Mutex::new(false) }
    }

    /// Lets `act` look at the device or change it; no DMA happens meanwhile.
    pub(super) fn change<T>(&self, act: impl FnOnce(&mut Engine) -> T) -> T {
        let outcome = act(&mut self.lock());
        self.changed.notify_all();
        outcome
    }

    /// Makes [`Shared::drive`] return.
    pub(super) fn end(&self) {
        let engine = self.lock();
        *self.ended.lock().expect("no thread panics with this lock") = true;
        drop(engine);
        self.changed.notify_all();
    }

    /// Writes pages at the engine's rate until [`Shared::end`].
    pub(super) fn drive(&self) {
        let (mut pace, mut churn) = (Pace::new(0, Instant::now()), Pace::new(0, Instant::now()));
        let mut engine = self.lock();
        while !*self.ended.lock().expect("no thread panics with this lock") {
            let (rate, now) = (engine.pages_per_second(), Instant::now());
            if rate != pace.rate {
                pace = Pace::new(rate, now);
            }
            let changes = engine.changes_per_second();
            if changes != churn.rate {
                churn = Pace::new(changes, now);
            }
            if rate == 0 && changes == 0 {
                engine = self.changed.wait(engine).expect(UNPOISONED);
                continue;
            }
            if rate > 0 {
                engine.advance(pace.due(now).min(PAGES_PER_TICK));
            }
            if changes > 0 {
                engine.churn(churn.due(now));
            }
            drop(engine);
            std::thread::sleep(TICK);
            engine = self.lock();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().expect(UNPOISONED)
    }
}

const UNPOISONED: &str = "the engine does not panic";

/// Says how many pages are due.
#[derive(Debug)]
struct Pace {
    rate: u64,
    since: Instant,
    issued: u64,
}

impl Pace {
    fn new(rate: u64, now: Instant) -> Self {
        Pace { rate, since: now, issued: 0 }
    }

    /// Returns how many pages became due since the last call.
    fn due(&mut self, now: Instant) -> u64 {
        let elapsed = now.saturating_duration_since(self.since).as_nanos();
        let total = u64::try_from(elapsed * u128::from(self.rate) / 1_000_000_000).unwrap_or(u64::MAX);
        let due = total.saturating_sub(self.issued);
        self.issued = total;
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pace_keeps_the_rate_over_uneven_ticks() {
        let begun = Instant::now();
        let mut pace = Pace::new(1500, begun);
        let ticks = [1, 2, 10, 11, 999, 1000, 1000, 2000].map(|ms| begun + Duration::from_millis(ms));
        assert_eq!(ticks.map(|now| pace.due(now)), [1, 2, 12, 1, 1482, 2, 0, 1500]);
    }
}
