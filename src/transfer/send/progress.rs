// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A migration seen, and cancelled, from any thread.

use std::error::Error;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use derive_more::Display;

use super::zero_filter::Skipped;
use crate::ledger::Attribution;
use crate::precopy::{Forecast, Observation};
use crate::sync::lock;

/// Where a migration stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Display)]
#[non_exhaustive]
pub enum Phase {
    /// Not begun.
    #[default]
    #[display("idle")]
    Idle,
    /// Reaching the receiver and describing the VM to it.
    #[display("connecting")]
    Connecting,
    /// Copying memory while the VM runs.
    #[display("precopy")]
    Precopy,
    /// The VM stands still; the rest is on its way.
    #[display("switchover")]
    SwitchOver,
    /// The receiver was told to run the VM, and has not answered.
    #[display("completing")]
    Completing,
    /// The VM runs, or stands paused as asked, at the receiver.
    #[display("completed")]
    Completed,
    /// Failed or cancelled; the VM runs on at the source.
    #[display("abandoned")]
    Abandoned,
    /// The receiver may run the VM; it stands still at the source.
    #[display("outcome unknown")]
    OutcomeUnknown,
}

/// What one source reported since its device was first migrated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceProgress {
    /// The source's id.
    pub id: String,
    /// Its pages.
    pub attribution: Attribution,
}

/// Something that failed while the migration went on: a source, whose pages then all count as dirty, or a device's PRE_COPY.
#[derive(Debug, Clone)]
pub struct SendDegradation {
    /// The failure, as it came the last time.
    pub error: Arc<dyn Error + Send + Sync>,
    /// How often it came.
    pub times: u64,
}

impl fmt::Display for SendDegradation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.times {
            1 => self.error.fmt(f),
            times => write!(f, "{} ({times} times)", self.error),
        }
    }
}

/// One look at a migration. Bytes of memory are guest memory; bytes sent and acknowledged include framing.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Progress {
    /// Where it stands.
    pub phase: Phase,
    /// The pass over memory being made, from 1; 0 before the first.
    pub round: u32,
    /// The VM's memory.
    pub ram_bytes: u64,
    /// Bytes handed to the connections.
    pub sent_bytes: u64,
    /// Bytes the receiver acknowledged.
    pub acknowledged_bytes: u64,
    /// Pages left out because nobody ever wrote them.
    pub skipped_hole_bytes: u64,
    /// Pages left out because they read zero.
    pub skipped_zero_bytes: u64,
    /// What was measured when a round last ended; what is left, and how fast it goes, as of now.
    pub seen: Observation,
    /// Who dirtied what, as of the last round.
    pub sources: Vec<SourceProgress>,
    /// What failed on the way.
    pub degradations: Vec<SendDegradation>,
    /// Whether it will come to the switchover; as of the last round.
    pub forecast: Forecast,
}

impl Progress {
    /// Bytes of guest memory that the receiver lacks, as far as is known: 0 at the end of a round, before the next collect.
    pub fn left_bytes(&self) -> u64 {
        self.seen.pending_bytes.saturating_add(self.seen.in_flight_bytes)
    }

    /// Bytes of guest memory that were left out of the first pass, for they are zero at both ends.
    pub fn skipped_bytes(&self) -> u64 {
        self.skipped_hole_bytes + self.skipped_zero_bytes
    }

    /// The downtime if the VM were stopped now, in milliseconds; `None` where it cannot be told.
    pub fn expected_downtime_ms(&self) -> Option<u64> {
        self.seen.expected_downtime_ms().filter(|_| self.round > 0)
    }
}

/// The migration was cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cancelled;

type Interrupt = Box<dyn Fn() + Send>;

#[derive(Default)]
struct Control {
    past_return: bool,
    interrupt: Option<Interrupt>,
}

#[derive(Default)]
struct Shared {
    cancelled: AtomicBool,
    control: Mutex<Control>,
    sent_bytes: AtomicU64,
    acknowledged_bytes: AtomicU64,
    skipped_hole_bytes: AtomicU64,
    skipped_zero_bytes: AtomicU64,
    seen: Mutex<Progress>,
}

/// The handle on one migration: cancels it and tells how it goes, from any thread. Clones are the same migration.
///
/// One handle serves one attempt; a second attempt takes a new one.
///
/// ```
/// use vfio_migration::transfer::{SenderHandle, Phase};
/// let migration = SenderHandle::new();
/// let watcher = migration.clone();
/// assert!(std::thread::spawn(move || watcher.cancel()).join().unwrap());
/// assert_eq!(migration.progress().phase, Phase::Idle);
/// ```
#[derive(Clone, Default)]
pub struct SenderHandle {
    shared: Arc<Shared>,
}

impl SenderHandle {
    /// Makes the handle for one attempt.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks for the migration to be abandoned: the sender returns with the VM running at the source.
    ///
    /// That takes less than a second where the sender waits for the receiver, and between two pieces of work: chunks of memory,
    /// pieces of device state that streams. What is asked of a device, a source or the VM itself cannot be interrupted: one report of
    /// the dirty pages, a move of the devices to another state, one read of their state, all reads of a state that travels in State, the
    /// VM's capture. A device that stalls over one of these delays the return by as long as its back end is patient.
    ///
    /// Returns whether that is still possible: not once the receiver was told to run the VM, nor after the end.
    pub fn cancel(&self) -> bool {
        let control = lock(&self.shared.control);
        if control.past_return || lock(&self.shared.seen).phase == Phase::Abandoned {
            return false;
        }
        self.shared.cancelled.store(true, Ordering::Release);
        if let Some(interrupt) = &control.interrupt {
            interrupt();
        }
        true
    }

    /// Looks at the migration.
    pub fn progress(&self) -> Progress {
        let mut progress = lock(&self.shared.seen).clone();
        progress.sent_bytes = self.shared.sent_bytes.load(Ordering::Relaxed);
        progress.acknowledged_bytes = self.shared.acknowledged_bytes.load(Ordering::Relaxed);
        progress.skipped_hole_bytes = self.shared.skipped_hole_bytes.load(Ordering::Relaxed);
        progress.skipped_zero_bytes = self.shared.skipped_zero_bytes.load(Ordering::Relaxed);
        progress
    }

    /// Whether [`SenderHandle::cancel`] was called in time.
    pub fn is_cancelled(&self) -> bool {
        self.shared.cancelled.load(Ordering::Acquire)
    }

    pub(crate) fn check(&self) -> Result<(), Cancelled> {
        if self.is_cancelled() { Err(Cancelled) } else { Ok(()) }
    }

    /// Runs `work`, which may block; a cancellation meanwhile calls `interrupt`, which must make `work` return.
    pub(crate) fn interruptible<T>(
        &self,
        interrupt: impl Fn() + Send + 'static,
        work: impl FnOnce() -> T,
    ) -> Result<T, Cancelled> {
        {
            let mut control = lock(&self.shared.control);
            self.check()?;
            control.interrupt = Some(Box::new(interrupt));
        }
        let outcome = work();
        lock(&self.shared.control).interrupt = None;
        Ok(outcome)
    }

    /// Rules out cancellation from here on.
    pub(crate) fn pass_return(&self) -> Result<(), Cancelled> {
        let mut control = lock(&self.shared.control);
        self.check()?;
        control.past_return = true;
        Ok(())
    }

    pub(crate) fn count_sent(&self, bytes: u64) {
        self.shared.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn count_acknowledged(&self, bytes: u64) {
        self.shared.acknowledged_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn count_skipped(&self, skipped: Skipped) {
        self.shared.skipped_hole_bytes.fetch_add(skipped.hole_bytes, Ordering::Relaxed);
        self.shared.skipped_zero_bytes.fetch_add(skipped.zero_bytes, Ordering::Relaxed);
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut lock(&self.shared.seen));
    }

    pub(crate) fn enter(&self, phase: Phase) {
        self.update(|progress| progress.phase = phase);
    }

    /// Adds a failure that the migration survives; one with the same message is the same.
    pub(crate) fn degrade(&self, error: impl Error + Send + Sync + 'static) {
        let mut progress = lock(&self.shared.seen);
        let message = error.to_string();
        match progress.degradations.iter_mut().find(|known| known.error.to_string() == message) {
            Some(known) => {
                known.times += 1;
                known.error = Arc::new(error);
            }
            None => {
                log::warn!("{message}; the migration goes on");
                progress.degradations.push(SendDegradation { error: Arc::new(error), times: 1 });
            }
        }
    }
}

impl fmt::Debug for SenderHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Migration");
        debug.field("cancelled", &self.is_cancelled()).field("progress", &self.progress()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::source::{Operation, SourceError};

    #[test]
    fn cancel_interrupts_blocking_work() {
        let migration = SenderHandle::new();
        let (wake, asleep) = mpsc::channel::<()>();
        let canceller = migration.clone();
        let outcome = migration.interruptible(
            move || wake.send(()).unwrap(),
            || {
                let thread = thread::spawn(move || canceller.cancel());
                let woken = asleep.recv_timeout(Duration::from_secs(10));
                (woken.is_ok(), thread.join().unwrap())
            },
        );
        assert_eq!(outcome, Ok((true, true)));
        assert_eq!(migration.interruptible(|| (), || ()), Err(Cancelled));
    }

    #[test]
    fn past_the_point_of_no_return_cancel_does_nothing() {
        let migration = SenderHandle::new();
        migration.pass_return().unwrap();
        assert!(!migration.cancel());
        assert!(!migration.is_cancelled());
        let cancelled = SenderHandle::new();
        assert!(cancelled.cancel());
        assert_eq!(cancelled.pass_return(), Err(Cancelled));
    }

    #[test]
    fn repeated_failures_of_a_source_are_one_degradation() {
        let migration = SenderHandle::new();
        for operation in [Operation::Collect, Operation::Collect, Operation::BeforeRead] {
            migration.degrade(SourceError::new("kvm-log", operation, "broken"));
        }
        let times: Vec<_> = migration.progress().degradations.iter().map(|entry| entry.times).collect();
        assert_eq!(times, [2, 1]);
    }
}
