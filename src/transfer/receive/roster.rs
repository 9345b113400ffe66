// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The connections that are open, to count and to close them from any thread.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::transfer::connection::{Connection, ConnectionHandle};

#[derive(Debug, Default)]
struct Names {
    open: BTreeMap<u64, ConnectionHandle>,
    next: u64,
    /// Bytes that connections received which are no longer open.
    past_bytes: u64,
    stopped: bool,
    committed: bool,
}

/// Stops and measures a [`Receiver`](super::Receiver) from any thread.
#[derive(Debug, Clone, Default)]
pub struct ReceiverHandle(Arc<Mutex<Names>>);

impl ReceiverHandle {
    /// Closes every connection and ends the wait for one, for good; whoever receives gets
    /// [`ReceiveError::Stopped`](super::ReceiveError::Stopped).
    ///
    /// Returns `false` and does nothing where it is too late: the destination is completing the VM, and a source that
    /// gets no answer to that could not know whether its VM runs here.
    #[must_use = "it may be too late to stop"]
    pub fn stop(&self) -> bool {
        let mut names = self.lock();
        if names.committed {
            return false;
        }
        names.stopped = true;
        names.open.values().for_each(ConnectionHandle::close);
        true
    }

    /// Bytes that came from all sockets so far.
    pub fn received_bytes(&self) -> u64 {
        let names = self.lock();
        names.past_bytes + names.open.values().map(ConnectionHandle::received_bytes).sum::<u64>()
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.lock().stopped
    }

    /// Makes it too late to stop; `false` where that has happened.
    pub(super) fn commit(&self) -> bool {
        let mut names = self.lock();
        names.committed = !names.stopped;
        names.committed
    }

    /// Forgets what the migration before this one brought.
    pub(super) fn begin(&self) {
        let mut names = self.lock();
        names.past_bytes = 0;
        names.committed = false;
    }

    /// Closes every connection that is open.
    pub(super) fn close_all(&self) {
        self.lock().open.values().for_each(ConnectionHandle::close);
    }

    /// Connections that are open.
    pub(super) fn open(&self) -> usize {
        self.lock().open.len()
    }

    /// Notes a connection until what is returned is dropped; one that comes after the stop is closed at once.
    pub(super) fn enter(&self, connection: &Connection) -> Entry {
        let handle = connection.handle();
        let mut names = self.lock();
        if names.stopped {
            handle.close();
        }
        let id = names.next;
        names.next += 1;
        names.open.insert(id, handle);
        Entry { roster: self.clone(), id }
    }

    fn lock(&self) -> MutexGuard<'_, Names> {
        // The names hold together after every statement, so also after a panic of one who held them.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's place among the open ones.
#[derive(Debug)]
pub(super) struct Entry {
    roster: ReceiverHandle,
    id: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut names = self.roster.lock();
        if let Some(handle) = names.open.remove(&self.id) {
            names.past_bytes += handle.received_bytes();
        }
    }
}
