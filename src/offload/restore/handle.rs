// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What stops and measures a sender from any thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::error::LocalSendError;

/// Stops and measures a [`LocalSender`](super::LocalSender) from any thread.
#[derive(Debug, Clone, Default)]
pub struct LocalSenderHandle(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    stopped: AtomicBool,
    too_late: AtomicBool,
    ram: AtomicU64,
    filled: AtomicU64,
}

/// How far a [`LocalSender`](super::LocalSender) is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct LocalSendProgress {
    /// Bytes of RAM; zero before the first one is read.
    pub ram_bytes: u64,
    /// Bytes of it that were read and written; what is zero in the snapshot is not.
    pub filled_bytes: u64,
}

impl LocalSenderHandle {
    /// Gives up: the receiver drops the VM. Returns whether it is not too late: the VM is not being handed over yet.
    pub fn cancel(&self) -> bool {
        self.0.stopped.store(true, Ordering::SeqCst);
        !self.0.too_late.load(Ordering::SeqCst)
    }

    /// How far the sender is.
    pub fn progress(&self) -> LocalSendProgress {
        let read = |figure: &AtomicU64| figure.load(Ordering::Relaxed);
        LocalSendProgress { ram_bytes: read(&self.0.ram), filled_bytes: read(&self.0.filled) }
    }

    pub(super) fn begin(&self, ram_bytes: u64) {
        self.0.ram.store(ram_bytes, Ordering::Relaxed);
    }

    pub(super) fn add_filled(&self, bytes: u64) {
        self.0.filled.fetch_add(bytes, Ordering::Relaxed);
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
