// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What stops and measures a sender from any thread.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::error::LocalSendError;
use super::latency::Latencies;
use super::memory::VmMemory;
use crate::transfer::connection::ConnectionHandle;

/// Stops and measures a [`LocalSender`](super::LocalSender) from any thread.
#[derive(Debug, Clone, Default)]
pub struct LocalSenderHandle(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    stopped: AtomicBool,
    too_late: AtomicBool,
    aborted: AtomicBool,
    /// What is taken away when the VM is to end.
    hold: Mutex<Option<Hold>>,
    began: OnceLock<Instant>,
    ram: AtomicU64,
    filled: AtomicU64,
    present: AtomicU64,
    asked: AtomicU64,
    handed_over: OnceLock<Duration>,
    last_page: OnceLock<Duration>,
    in_order: Latencies,
    jumps: Latencies,
    /// When the request came that is being answered.
    asked_at: Mutex<Option<Instant>>,
}

/// The memory of a VM that is served on demand, and the connection that it is asked for on.
#[derive(Debug)]
pub(super) struct Hold {
    pub(super) memory: VmMemory,
    pub(super) faults: ConnectionHandle,
}

impl Hold {
    /// The memory goes first: a vCPU that the end of the connection wakes finds none.
    fn take_away(&self) {
        if let Err(error) = self.memory.take_away() {
            log::error!("Cannot take the memory away from the receiver: {error}");
        }
        self.faults.close();
    }
}

/// How far a [`LocalSender`](super::LocalSender) is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct LocalSendProgress {
    /// Bytes of RAM; zero before the first one is read.
    pub ram_bytes: u64,
    /// Bytes of it that were read and written; what is zero in the snapshot is not.
    pub filled_bytes: u64,
    /// When the receiver got the VM, from the first connection on.
    pub handed_over: Option<Duration>,
    /// What became of memory that is asked for on demand.
    pub faults: FaultProgress,
}

/// What became of memory that a receiver asks for on demand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct FaultProgress {
    /// Requests for a page that were answered.
    pub served: u64,
    /// Those among them out of order: pages that the guest waited for.
    pub jumps: u64,
    /// Half of the requests out of order were answered in this time; the figures are an eighth too large at most.
    pub jump_median: Duration,
    /// All but a hundredth of the requests out of order were answered in this time.
    pub jump_99th: Duration,
    /// Half of all requests were answered in this time.
    pub median: Duration,
    /// All but a hundredth of all requests were answered in this time.
    pub percentile_99th: Duration,
    /// Bytes that were asked for.
    pub asked_bytes: u64,
    /// Bytes that are in memory, and were not asked for yet.
    pub ahead_bytes: u64,
    /// When the last page was in memory, from the first connection on.
    pub last_page: Option<Duration>,
    /// How long the receiver has waited for the page that it asked for last; `None` while it waits for none. The VM may stand still as long.
    pub waiting: Option<Duration>,
}

impl LocalSenderHandle {
    /// Gives up: the receiver drops the VM. Returns whether it is not too late: the VM is not being handed over yet.
    pub fn cancel(&self) -> bool {
        self.0.stopped.store(true, Ordering::SeqCst);
        !self.0.too_late.load(Ordering::SeqCst)
    }

    /// Gives up even if the receiver runs the VM, and needs memory that is not there: the memory is taken away from it, and the VM ends.
    /// When this returns, that is done, whatever the sender waits for. A VM that is not served on demand, or no more, keeps its memory.
    pub fn abort(&self) {
        self.cancel();
        if let Some(hold) = &*self.hold() {
            self.0.aborted.store(true, Ordering::SeqCst);
            hold.take_away();
        }
    }

    /// Whether the VM is being handed over, or was: it is too late to [`cancel`](Self::cancel).
    pub fn is_too_late(&self) -> bool {
        self.0.too_late.load(Ordering::SeqCst)
    }

    /// How far the sender is.
    pub fn progress(&self) -> LocalSendProgress {
        let shared = &*self.0;
        let read = |figure: &AtomicU64| figure.load(Ordering::Relaxed);
        let all = shared.in_order.with(&shared.jumps);
        let asked_bytes = read(&shared.asked);
        let faults = FaultProgress {
            served: all.count(),
            jumps: shared.jumps.count(),
            jump_median: shared.jumps.percentile(50),
            jump_99th: shared.jumps.percentile(99),
            median: all.percentile(50),
            percentile_99th: all.percentile(99),
            asked_bytes,
            ahead_bytes: read(&shared.present).saturating_sub(asked_bytes),
            last_page: shared.last_page.get().copied(),
            waiting: self.asked_at().map(|asked| asked.elapsed()),
        };
        LocalSendProgress {
            ram_bytes: read(&shared.ram),
            filled_bytes: read(&shared.filled),
            handed_over: shared.handed_over.get().copied(),
            faults,
        }
    }

    pub(super) fn begin(&self, ram_bytes: u64) {
        self.0.ram.store(ram_bytes, Ordering::Relaxed);
    }

    /// Begins to measure time.
    pub(super) fn begin_time(&self) {
        let _it_began_before = self.0.began.set(Instant::now());
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.0.began.get().map_or(Duration::ZERO, Instant::elapsed)
    }

    pub(super) fn add_filled(&self, bytes: u64) {
        self.0.filled.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn add_present(&self, bytes: u64) {
        self.0.present.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn note_asked(&self, bytes: u64) {
        self.0.asked.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A request came.
    pub(super) fn begin_fault(&self, at: Instant) {
        *self.asked_at() = Some(at);
    }

    /// The request was answered.
    pub(super) fn note_fault(&self, is_jump: bool, took: Duration) {
        *self.asked_at() = None;
        if is_jump { self.0.jumps.add(took) } else { self.0.in_order.add(took) }
    }

    fn asked_at(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.asked_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a request has come that was not answered yet.
    pub(super) fn is_asked(&self) -> bool {
        self.asked_at().is_some()
    }

    /// Whether a request was answered.
    pub(super) fn has_served(&self) -> bool {
        self.0.in_order.count() + self.0.jumps.count() > 0
    }

    pub(super) fn note_last_page(&self) {
        let _it_is_the_only_one = self.0.last_page.set(self.elapsed());
    }

    pub(super) fn note_handed_over(&self) {
        let _it_is_the_only_time = self.0.handed_over.set(self.elapsed());
    }

    /// Has `new` taken away when the VM is to end.
    pub(super) fn hold_on(&self, new: Hold) {
        *self.hold() = Some(new);
    }

    /// Leaves its memory to the VM for good. Returns whether it was not taken away before.
    pub(super) fn let_go(&self) -> bool {
        let mut hold = self.hold();
        *hold = None;
        !self.is_aborted()
    }

    fn hold(&self) -> MutexGuard<'_, Option<Hold>> {
        self.0.hold.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the memory was taken away on request.
    pub(super) fn is_aborted(&self) -> bool {
        self.0.aborted.load(Ordering::SeqCst)
    }

    /// Fails where the sender was given up.
    pub(super) fn check(&self) -> Result<(), LocalSendError> {
        if self.0.stopped.load(Ordering::SeqCst) { Err(LocalSendError::Stopped) } else { Ok(()) }
    }

    /// Passes the point of no return.
    ///
    /// # Errors
    /// The sender was given up before.
    pub(super) fn pass_the_point_of_no_return(&self) -> Result<(), LocalSendError> {
        self.0.too_late.store(true, Ordering::SeqCst);
        // Whoever gave up before heard that it was in time.
        self.check().inspect_err(|_| self.0.too_late.store(false, Ordering::SeqCst))
    }
}
