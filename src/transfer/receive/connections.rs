// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The connections that are open, to count, to measure and to close them from any thread.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::sync;
use crate::transfer::connection::{Connection, ConnectionHandle};
use crate::transfer::frame::Command;

/// How long to wait for a caller that has to go before the next one has to go as well.
const PATIENCE: Duration = Duration::from_millis(10);

/// How far a caller has proved to be the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// Nothing: anybody can call.
    Caller,
    /// Nothing, and it has to go.
    Dismissed,
    /// It says that it is the source's, and nothing has shown it yet.
    Announced,
    /// It is the source.
    Admitted,
}

#[derive(Debug)]
struct Open {
    handle: ConnectionHandle,
    standing: Standing,
}

#[derive(Debug, Default)]
struct Table {
    /// By the order they came in.
    open: BTreeMap<u64, Open>,
    next: u64,
    /// The source's main connection.
    main: Option<u64>,
    /// Bytes that the source's connections received which are no longer open.
    past_bytes: u64,
    /// The destination takes the State, and the source waits for the answer.
    taking_state: bool,
    stopped: bool,
    committed: bool,
}

impl Table {
    fn enter(&mut self, handle: ConnectionHandle, standing: Standing) -> u64 {
        if self.stopped {
            handle.close();
        }
        let id = self.next;
        self.next += 1;
        self.open.insert(id, Open { handle, standing });
        id
    }

    fn callers(&self) -> usize {
        self.count(Standing::Caller) + self.count(Standing::Dismissed)
    }

    fn count(&self, standing: Standing) -> usize {
        self.open.values().filter(|open| open.standing == standing).count()
    }

    /// Closes the connection of the caller that is heard longest.
    fn dismiss_oldest(&mut self) {
        if let Some(open) = self.open.values_mut().find(|open| open.standing == Standing::Caller) {
            open.standing = Standing::Dismissed;
            open.handle.close();
        }
    }
}

#[derive(Debug, Default)]
struct Connections {
    table: Mutex<Table>,
    /// A connection was closed.
    left: Condvar,
}

/// Stops and measures a [`Receiver`](super::Receiver) from any thread.
#[derive(Debug, Clone, Default)]
pub struct ReceiverHandle(Arc<Connections>);

impl ReceiverHandle {
    /// Closes every connection and ends the wait for one, for good; whoever receives gets
    /// [`ReceiveError::Stopped`](super::ReceiveError::Stopped).
    ///
    /// Returns `false` and does nothing where it is too late: the destination is completing the VM, and a source that
    /// gets no answer to that could not know whether its VM runs here.
    #[must_use = "it may be too late to stop"]
    pub fn stop(&self) -> bool {
        let mut table = self.lock();
        if table.committed {
            return false;
        }
        table.stopped = true;
        table.open.values().for_each(|open| open.handle.close());
        true
    }

    /// Whether [`ReceiverHandle::stop`] has stopped it.
    pub fn is_stopped(&self) -> bool {
        self.lock().stopped
    }

    /// Bytes that came from the source's sockets so far.
    pub fn received_bytes(&self) -> u64 {
        let table = self.lock();
        let admitted = table.open.values().filter(|open| open.standing == Standing::Admitted);
        table.past_bytes + admitted.map(|open| open.handle.received_bytes()).sum::<u64>()
    }

    /// Whether the source has closed its main connection, or that has failed, or it gives the migration up while its State is
    /// being taken; `false` where there is no source.
    ///
    /// Tells a [`Destination`](super::Destination) that takes its time that nobody waits for it any more.
    pub fn source_has_gone(&self) -> bool {
        let table = self.lock();
        let main = table.main.and_then(|id| table.open.get(&id));
        main.is_some_and(|Open { handle, .. }| {
            handle.peer_has_gone() || (table.taking_state && handle.peek().is_some_and(is_no_way_on))
        })
    }

    /// Notes that the destination takes the State, until what is returned is dropped.
    pub(super) fn take_state(&self) -> TakingState<'_> {
        self.lock().taking_state = true;
        TakingState(self)
    }

    /// Makes it too late to stop; `false` where that has happened.
    pub(super) fn commit(&self) -> bool {
        let mut table = self.lock();
        table.committed = !table.stopped;
        table.committed
    }

    /// Forgets what the migration before this one brought.
    pub(super) fn begin(&self) {
        let mut table = self.lock();
        table.past_bytes = 0;
        table.committed = false;
    }

    /// Closes every connection that is open.
    pub(super) fn close_all(&self) {
        self.lock().open.values().for_each(|open| open.handle.close());
    }

    /// Notes the source's connection until what is returned is dropped; one that comes after the stop is closed at once.
    pub(super) fn enter(&self, connection: &Connection) -> Entry {
        let id = self.lock().enter(connection.handle(), Standing::Admitted);
        Entry { connections: self.clone(), id }
    }

    /// Notes a caller's connection, as [`ReceiverHandle::enter`] does, when fewer than `most` are heard.
    ///
    /// Those that are heard longest have to go for it.
    pub(super) fn enter_caller(&self, connection: &Connection, most: usize) -> Entry {
        let mut table = self.lock();
        while table.callers() >= most {
            table.dismiss_oldest();
            let left = self.0.left.wait_timeout(table, PATIENCE);
            table = left.unwrap_or_else(PoisonError::into_inner).0;
        }
        let id = table.enter(connection.handle(), Standing::Caller);
        Entry { connections: self.clone(), id }
    }

    /// Lets the caller go that is heard longest, and waits a moment for one to be gone; `false` where there is none.
    pub(super) fn dismiss_caller(&self) -> bool {
        let mut table = self.lock();
        table.dismiss_oldest();
        let heard = table.callers() > 0;
        if heard {
            let _gone = self.0.left.wait_timeout(table, PATIENCE);
        }
        heard
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // The table holds together after every statement, so also after a panic of one who held it.
        sync::lock(&self.0.table)
    }
}

/// Whether a source that says this before its State is answered gives up.
///
/// No source that goes on has anything to say, but one may say early what comes next. What TLS carries cannot be told, and is
/// none of the commands.
fn is_no_way_on(command: [u8; 2]) -> bool {
    matches!(Command::try_from(u16::from_le_bytes(command)), Ok(Command::Abandon) | Err(_))
}

/// A State that the destination takes.
pub(super) struct TakingState<'a>(&'a ReceiverHandle);

impl Drop for TakingState<'_> {
    fn drop(&mut self) {
        self.0.lock().taking_state = false;
    }
}

/// A connection's place among the open ones.
#[derive(Debug)]
pub(super) struct Entry {
    connections: ReceiverHandle,
    id: u64,
}

impl Entry {
    /// Notes that it may be one of the source's, which has all the time it wants; `false` where there are `most` already.
    ///
    /// Those that came first stay, for the source opens its connections as soon as it may.
    pub(super) fn announce(&self, most: usize) -> bool {
        let mut table = self.connections.lock();
        let has_room = table.count(Standing::Announced) < most;
        if let Some(open) = table.open.get_mut(&self.id).filter(|_| has_room) {
            open.standing = Standing::Announced;
        }
        has_room
    }

    /// Notes that it is one of the source's.
    pub(super) fn admit(&self) {
        if let Some(open) = self.connections.lock().open.get_mut(&self.id) {
            open.standing = Standing::Admitted;
        }
    }

    /// Notes that it is the source's main one.
    pub(super) fn admit_main(&self) {
        self.admit();
        self.connections.lock().main = Some(self.id);
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut table = self.connections.lock();
        if let Some(Open { handle, standing: Standing::Admitted }) = table.open.remove(&self.id) {
            table.past_bytes += handle.received_bytes();
        }
        self.connections.0.left.notify_all();
    }
}
