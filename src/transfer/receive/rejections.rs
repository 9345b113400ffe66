// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rejections: callers that are not the source. All are counted; a rate limit keeps them from filling the log.

use std::io;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::error::{Part, ReceiveError};
use crate::error::Chain;
use crate::sync;
use crate::transfer::connection::Stall;
use crate::units::Count;

/// Rejections that may be logged at once.
const BURST: u32 = 10;

/// Time after which another rejection may be logged.
const PERIOD: Duration = Duration::from_secs(10);

/// Why a caller was rejected.
#[derive(Debug, Error)]
pub(super) enum Reason {
    /// Another source's VM is being received.
    #[error("Another source's migration is under way")]
    Occupied,
    /// It was closed to make room before it said who it is, or there was no room.
    #[error("Connection dropped: more than {callers} callers that have not identified themselves")]
    Crowd {
        /// How many there may be.
        callers: usize,
    },
    /// Its time ran out before its greeting was complete.
    #[error("Caller did not identify itself within {:.1} s", .allowed.as_secs_f64())]
    Late {
        /// How long it had.
        allowed: Duration,
    },
    /// What came cannot be a source's.
    #[error(transparent)]
    Failed(#[from] ReceiveError),
}

impl Reason {
    /// Returns the reason for a rejection from the error of reading a caller's first bytes.
    pub(super) fn of_reading(part: Part, source: io::Error) -> Self {
        match Stall::of(&source) {
            Some(Stall::Late { allowed }) => Self::Late { allowed },
            _ => ReceiveError::Read { part, source }.into(),
        }
    }
}

/// Counts callers that were rejected, from any thread.
#[derive(Debug, Default)]
pub(super) struct Rejections(Mutex<Tally>);

impl Rejections {
    /// Counts a rejected caller, and logs who it was and why, within the rate limit.
    pub(super) fn count(&self, peer: &str, reason: &Reason) {
        let reason = Chain(reason);
        // Not in the match: the lock would be held for as long as the log takes.
        let told = self.lock().count(Instant::now());
        match told {
            Some(0) => log::warn!("Turned {peer} away: {reason}"),
            Some(untold) => {
                log::warn!("Turned {peer} away, and {} before: {reason}", Count(&untold, "other"));
            }
            None => log::debug!("Turned {peer} away: {reason}"),
        }
    }

    /// Counts a caller that this host is too short of descriptors, threads or memory to serve.
    pub(super) fn count_unserved(&self, peer: &str, error: ReceiveError) {
        let reason = Reason::from(error);
        self.count(peer, &reason);
        if let Reason::Failed(error) = reason {
            self.lock().unserved = Some(error);
        }
    }

    /// Says of a migration that failed for its source that this host may have been too short of something to serve it.
    pub(super) fn explain(&self, error: ReceiveError) -> ReceiveError {
        let unserved = if error.is_of_source() { self.lock().unserved.take() } else { None };
        match unserved {
            Some(source) => {
                ReceiveError::Short { outcome: Chain(&error).to_string(), source: Box::new(source) }
            }
            None => error,
        }
    }

    /// How many there were.
    pub(super) fn callers(&self) -> u64 {
        self.lock().callers
    }

    fn lock(&self) -> MutexGuard<'_, Tally> {
        sync::lock(&self.0)
    }
}

#[derive(Debug)]
struct Tally {
    callers: u64,
    /// Those since the last one that was told of.
    untold: u64,
    /// How many more may be told of.
    budget: u32,
    /// When the budget grew last; `None` while it is full.
    grown: Option<Instant>,
    /// Why the last one was rejected that this host was to blame for.
    unserved: Option<ReceiveError>,
}

impl Default for Tally {
    fn default() -> Self {
        Self { callers: 0, untold: 0, budget: BURST, grown: None, unserved: None }
    }
}

impl Tally {
    /// Counts a caller; where it is to be told of, returns how many before it were not.
    fn count(&mut self, now: Instant) -> Option<u64> {
        self.callers += 1;
        self.grow(now);
        if self.budget == 0 {
            self.untold += 1;
            return None;
        }
        self.budget -= 1;
        self.grown.get_or_insert(now);
        Some(std::mem::take(&mut self.untold))
    }

    fn grow(&mut self, now: Instant) {
        while let Some(grown) = self.grown
            && now.duration_since(grown) >= PERIOD
        {
            self.budget += 1;
            self.grown = (self.budget < BURST).then_some(grown + PERIOD);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::error::Step;
    use super::*;

    #[test]
    fn who_is_late_is_not_told_of_as_a_connection_that_failed() {
        let text = |source| Chain(&Reason::of_reading(Part::Role, source)).to_string();
        let late = Stall::Late { allowed: Duration::from_secs(10) };
        assert_eq!(text(late.into()), "Caller did not identify itself within 10.0 s");
        let cut = text(io::ErrorKind::UnexpectedEof.into());
        assert_eq!(cut, "Cannot read the role of a connection: unexpected end of file");
    }

    #[test]
    fn what_this_host_was_short_of_is_told_of_with_a_source_that_failed_and_with_nothing_else() {
        let rejections = Rejections::default();
        let closed = || ReceiveError::Closed { step: Step::Config };
        assert!(matches!(rejections.explain(closed()), ReceiveError::Closed { .. }));
        let thread = ReceiveError::Thread { source: io::Error::from_raw_os_error(libc::EAGAIN) };
        rejections.count_unserved("a caller", thread);
        assert!(matches!(rejections.explain(ReceiveError::Stopped), ReceiveError::Stopped));
        let text = Chain(&rejections.explain(closed())).to_string();
        assert!(
            text.starts_with("Source closed the connection after Config; connections could not be served"),
            "{text}"
        );
        assert!(text.contains("Cannot start a thread for a connection: Resource temporarily"), "{text}");
    }

    #[test]
    fn a_few_are_told_of_and_the_others_counted_until_time_has_passed() {
        let (mut tally, begun) = (Tally::default(), Instant::now());
        let told = (0..1000).filter_map(|_| tally.count(begun)).collect::<Vec<_>>();
        assert_eq!(told, [0; BURST as usize]);
        assert_eq!(tally.count(begun + PERIOD), Some(990));
        assert_eq!(tally.count(begun + PERIOD), None);
        assert_eq!(tally.callers, 1002);
    }

    #[test]
    fn who_comes_now_and_then_is_told_of_each_time() {
        let (mut tally, begun) = (Tally::default(), Instant::now());
        assert!((0..1000).all(|number| tally.count(begun + number * PERIOD) == Some(0)));
    }

    #[test]
    fn quiet_times_are_not_saved_up() {
        let (mut tally, begun) = (Tally::default(), Instant::now());
        tally.count(begun);
        let later = begun + 1_000_000 * PERIOD;
        assert_eq!((0..1000).filter_map(|_| tally.count(later)).count(), BURST as usize);
    }
}
