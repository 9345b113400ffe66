// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How far a device's state has come in as a stream.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What a sink tells the device's set of what came through it.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    bytes: AtomicU64,
    complete: AtomicBool,
    reset: AtomicBool,
}

impl Incoming {
    /// Bytes of the state so far; `None` while it is not complete.
    pub(super) fn complete_bytes(&self) -> Option<u64> {
        self.complete.load(Ordering::Acquire).then(|| self.bytes.load(Ordering::Acquire))
    }

    /// Bytes of the state so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// Takes in that so many bytes were written.
    pub(super) fn add(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::AcqRel);
    }

    /// Takes in that the last byte was written.
    pub(super) fn end(&self) {
        self.complete.store(true, Ordering::Release);
    }

    /// Takes in that the device was reset, for another session.
    pub(super) fn begin_anew(&self) {
        self.complete.store(false, Ordering::Release);
        self.reset.store(true, Ordering::Release);
        self.bytes.store(0, Ordering::Release);
    }

    /// Whether the device was reset for another session.
    pub(super) fn was_reset(&self) -> bool {
        self.reset.load(Ordering::Acquire)
    }
}
