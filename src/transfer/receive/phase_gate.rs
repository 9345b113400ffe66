// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The phase gate: the state that the connections of one migration share, and which message may come in which phase.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::device_streams::DeviceStreams;
use super::error::{ReceiveError, Step};
use super::store::PageStore;
use super::tables::Tables;
use crate::sync;
use crate::transfer::frame::Command;
use crate::transfer::limits::ConnectionCount;

/// What additional connections may do.
#[derive(Default)]
enum Phase {
    /// No source has begun.
    #[default]
    Waiting,
    /// A source has begun, and its memory is not laid out.
    Begun,
    /// Memory may come.
    Open(Arc<dyn PageStore>),
    /// All memory has come.
    Sealed,
    /// The migration is over, one way or the other.
    Over,
}

#[derive(Default)]
struct State {
    phase: Phase,
    /// Where the states of devices go; `None` where they come in State.
    devices: Option<Arc<DeviceStreams>>,
    /// Memory and DeviceState messages under way on additional connections.
    under_way: usize,
    /// Additional connections that brought Memory.
    connections: usize,
    /// Connections for page faults that are open.
    faults: usize,
    failure: Option<ReceiveError>,
    memory: MemoryCount,
}

impl State {
    /// Keeps the first failure. After the end of the migration nobody would read one.
    fn fail(&mut self, error: ReceiveError) {
        if !matches!(self.phase, Phase::Over) {
            self.failure.get_or_insert(error);
        }
    }

    /// Whether the source keeps the memory for a postcopy: there is State and a connection for page faults, and no memory.
    ///
    /// Neither alone proves it: a stranger can open such a connection, and a VM whose memory is all zero sends none.
    fn is_postcopy(&self) -> bool {
        matches!(self.phase, Phase::Sealed) && self.faults > 0 && self.memory.messages == 0
    }
}

/// Memory that came so far.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct MemoryCount {
    pub(super) messages: u64,
    pub(super) ranges: u64,
    pub(super) bytes: u64,
}

/// Who a new caller can be.
#[derive(Clone, Copy)]
pub(super) enum Caller {
    /// The source, on its main connection.
    Source,
    /// The source, on an additional connection.
    Additional,
}

/// Lets Memory in between Config and State, and State in when no Memory is under way.
#[derive(Default)]
pub(super) struct PhaseGate {
    state: Mutex<State>,
    changed: Condvar,
    pub(super) tables: Tables,
}

impl PhaseGate {
    /// Which connection a caller can be at this point; `None` when the migration is over.
    pub(super) fn caller(&self) -> Option<Caller> {
        match self.lock().phase {
            Phase::Waiting | Phase::Begun => Some(Caller::Source),
            Phase::Open(_) | Phase::Sealed => Some(Caller::Additional),
            Phase::Over => None,
        }
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.lock().phase, Phase::Over)
    }

    /// Notes that a source has begun; `false` where another one has.
    pub(super) fn begin(&self) -> bool {
        let mut state = self.lock();
        let first = matches!(state.phase, Phase::Waiting);
        if first {
            state.phase = Phase::Begun;
        }
        first
    }

    /// Lets Memory go to `store` from now on, and the states of devices to `devices`.
    pub(super) fn open(&self, store: Arc<dyn PageStore>, devices: Option<Arc<DeviceStreams>>) {
        let mut state = self.lock();
        (state.phase, state.devices) = (Phase::Open(store), devices);
    }

    /// Where the states of devices go; `None` where they come in State.
    pub(super) fn devices(&self) -> Option<Arc<DeviceStreams>> {
        self.lock().devices.clone()
    }

    /// Counts an additional connection in, whose first Memory has come.
    ///
    /// # Errors
    /// There are `limit` already.
    pub(super) fn connect(&self, limit: ConnectionCount) -> Result<(), ReceiveError> {
        let mut state = self.lock();
        if state.connections == limit.count() {
            return Err(ReceiveError::Connections { limit });
        }
        state.connections += 1;
        Ok(())
    }

    /// Notes a connection for page faults, until what is returned is dropped.
    pub(super) fn enter_fault(&self) -> Fault<'_> {
        let mut state = self.lock();
        state.faults += 1;
        if state.is_postcopy() {
            state.fail(ReceiveError::Postcopy);
        }
        Fault { gate: self }
    }

    /// Lets a Memory of an additional connection in, which is under way until what is returned is done or dropped.
    ///
    /// # Errors
    /// State has come, or the migration is over.
    pub(super) fn enter(&self) -> Result<Ticket<'_>, ReceiveError> {
        let mut state = self.lock();
        let Phase::Open(store) = &state.phase else {
            return Err(ReceiveError::OutOfOrder { command: Command::Memory, step: Step::State });
        };
        let store = Arc::clone(store);
        state.under_way += 1;
        Ok(Ticket { gate: self, store, done: false })
    }

    /// Whether a Memory is under way on an additional connection.
    pub(super) fn is_taking_memory(&self) -> bool {
        self.lock().under_way > 0
    }

    /// Waits until no Memory is under way on an additional connection.
    ///
    /// The wait ends, because each of them keeps the minimum pace or fails.
    ///
    /// # Errors
    /// One of them failed.
    pub(super) fn drain(&self) -> Result<(), ReceiveError> {
        self.wait_drained(self.lock())
    }

    /// Lets no more Memory in, and waits until none is under way.
    ///
    /// # Errors
    /// As [`PhaseGate::drain`], or the source wants postcopy.
    pub(super) fn seal(&self) -> Result<(), ReceiveError> {
        let mut state = self.lock();
        state.phase = Phase::Sealed;
        self.wait_drained(state)?;
        if self.lock().is_postcopy() { Err(ReceiveError::Postcopy) } else { Ok(()) }
    }

    fn wait_drained(&self, state: MutexGuard<'_, State>) -> Result<(), ReceiveError> {
        let under_way = |state: &mut State| state.under_way > 0 && state.failure.is_none();
        let drained = self.changed.wait_while(state, under_way);
        take_failure(&mut drained.unwrap_or_else(PoisonError::into_inner))
    }

    /// Keeps the first failure of an additional connection, for the main one to find.
    pub(super) fn fail(&self, error: ReceiveError) {
        self.lock().fail(error);
        self.changed.notify_all();
    }

    /// Returns the failure of an additional connection, once.
    pub(super) fn check(&self) -> Result<(), ReceiveError> {
        take_failure(&mut self.lock())
    }

    pub(super) fn count(&self, ranges: usize, bytes: u64) {
        let memory = &mut self.lock().memory;
        memory.messages += 1;
        memory.ranges += ranges as u64;
        memory.bytes = memory.bytes.saturating_add(bytes);
    }

    pub(super) fn memory(&self) -> MemoryCount {
        self.lock().memory
    }

    pub(super) fn connections(&self) -> usize {
        self.lock().connections
    }

    pub(super) fn end(&self) {
        self.lock().phase = Phase::Over;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is consistent after every statement, so a poisoned lock is safe to use.
        sync::lock(&self.state)
    }
}

fn take_failure(state: &mut State) -> Result<(), ReceiveError> {
    state.failure.take().map_or(Ok(()), Err)
}

/// A Memory that is under way. Dropped before it is done, it ends the migration.
///
/// Report the reason with [`PhaseGate::fail`] before dropping it.
pub(super) struct Ticket<'a> {
    gate: &'a PhaseGate,
    pub(super) store: Arc<dyn PageStore>,
    done: bool,
}

impl Ticket<'_> {
    /// Notes that all of the Memory is in place.
    pub(super) fn done(mut self) {
        self.done = true;
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        // Under one lock with the failure: otherwise State could see that no Memory is under way before it sees the failure.
        state.under_way -= 1;
        if !self.done {
            state.fail(ReceiveError::Store { source: io::Error::other("Memory was taken in part") });
        }
        self.gate.changed.notify_all();
    }
}

/// A connection for page faults.
pub(super) struct Fault<'a> {
    gate: &'a PhaseGate,
}

impl Drop for Fault<'_> {
    fn drop(&mut self) {
        self.gate.lock().faults -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use crate::transfer::frame::MemoryTable;
    use crate::transfer::receive::store::Pages;

    struct NoStore;

    impl PageStore for NoStore {
        fn layout(&self) -> &Layout {
            unreachable!("no Memory is read")
        }

        fn fill(&self, _table: &MemoryTable, _pages: &mut Pages<'_>) -> io::Result<()> {
            unreachable!("no Memory is read")
        }
    }

    fn opened() -> PhaseGate {
        let gate = PhaseGate::default();
        gate.open(Arc::new(NoStore), None);
        gate
    }

    #[test]
    fn memory_that_is_done_lets_state_in() {
        let gate = opened();
        gate.enter().unwrap().done();
        gate.seal().unwrap();
        gate.check().unwrap();
    }

    #[test]
    fn memory_that_is_not_done_keeps_state_out() {
        let gate = opened();
        drop(gate.enter().unwrap());
        assert!(matches!(gate.seal(), Err(ReceiveError::Store { .. })));
    }

    #[test]
    fn state_after_page_faults_and_no_memory_is_postcopy_in_whatever_order_they_come() {
        let gate = opened();
        let fault = gate.enter_fault();
        assert!(matches!(gate.seal(), Err(ReceiveError::Postcopy)));
        drop(fault);
        gate.seal().unwrap();
        let _late = gate.enter_fault();
        assert!(matches!(gate.check(), Err(ReceiveError::Postcopy)));
    }

    #[test]
    fn page_faults_of_a_caller_beside_a_source_that_sends_memory_do_not_end_its_migration() {
        let gate = opened();
        let _fault = gate.enter_fault();
        gate.count(1, 4096);
        gate.seal().unwrap();
        let _late = gate.enter_fault();
        gate.check().unwrap();
    }

    #[test]
    fn the_failure_that_stopped_memory_is_reported_when_it_is_sealed() {
        let gate = opened();
        let ticket = gate.enter().unwrap();
        gate.fail(ReceiveError::Postcopy);
        drop(ticket);
        assert!(matches!(gate.seal(), Err(ReceiveError::Postcopy)));
    }
}
