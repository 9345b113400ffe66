// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The signatures that code written against Cloud Hypervisor v53's crate relies on.
//!
//! This compiles against either crate; a signature that drifts does not.

use std::fmt::Debug;
use std::io::{self, Read, Write};
use std::ops::RangeInclusive;

use serde::{Serialize, de::DeserializeOwned};
use vm_migration::protocol::{
    CURRENT_PROTOCOL_VERSION, Command, ConnectionRole, MemoryRange, MemoryRangeTable, Request, Response,
    Status, supported_protocol_versions,
};
use vm_migration::{
    Migratable, MigratableError, Pausable, Snapshot, SnapshotData, Snapshottable, Transportable,
    snapshot_from_id, state_from_id,
};

type Outcome<T> = Result<T, MigratableError>;
type ReadFrom<T> = fn(&mut dyn Read) -> Outcome<T>;
type WriteTo<T> = fn(&T, &mut dyn Write) -> Outcome<()>;

/// Names every variant, without a wildcard, as a VMM's own match may.
fn operation(error: &MigratableError) -> &'static str {
    match error {
        MigratableError::Pause(_) => "pause",
        MigratableError::Resume(_) => "resume",
        MigratableError::Snapshot(_) => "snapshot",
        MigratableError::Restore(_) => "restore",
        MigratableError::MigrateSend(_) => "send",
        MigratableError::MigrateReceive(_) => "receive",
        MigratableError::MigrateSocket(_) => "socket",
        MigratableError::StartDirtyLog(_) => "start dirty log",
        MigratableError::StopDirtyLog(_) => "stop dirty log",
        MigratableError::DirtyLog(_) => "dirty log",
        MigratableError::StartMigration(_) => "start migration",
        MigratableError::CompleteMigration(_) => "complete migration",
        MigratableError::UnlockError(_) => "unlock",
        MigratableError::DeviceDisconnected(_) => "disconnected",
    }
}

/// Overrides every method, with the parameter types an implementor has to write.
struct Component;

impl Pausable for Component {
    fn pause(&mut self) -> Outcome<()> {
        Ok(())
    }

    fn resume(&mut self) -> Outcome<()> {
        Ok(())
    }
}

impl Snapshottable for Component {
    fn id(&self) -> String {
        "component".to_string()
    }

    fn snapshot(&mut self) -> Outcome<Snapshot> {
        Snapshot::new_from_state(&())
    }
}

impl Transportable for Component {
    fn send(&self, _snapshot: &Snapshot, _destination_url: &str) -> Outcome<()> {
        Err(MigratableError::DeviceDisconnected(self.id()))
    }

    fn recv(&self, _source_url: &str) -> Outcome<Snapshot> {
        Err(MigratableError::MigrateSocket(io::ErrorKind::TimedOut.into()))
    }
}

impl Migratable for Component {
    fn start_dirty_log(&mut self) -> Outcome<()> {
        Ok(())
    }

    fn stop_dirty_log(&mut self) -> Outcome<()> {
        Ok(())
    }

    fn dirty_log(&mut self) -> Outcome<MemoryRangeTable> {
        Ok(MemoryRangeTable::from_dirty_bitmap(vec![1], 0, 4096))
    }

    fn start_migration(&mut self) -> Outcome<()> {
        Ok(())
    }

    fn complete_migration(&mut self) -> Outcome<()> {
        Ok(())
    }
}

#[test]
fn a_component_can_override_every_method() {
    let mut component: Box<dyn Migratable> = Box::new(Component);
    assert_eq!(component.dirty_log().unwrap().effective_size(), 4096);
    let mut parent = Snapshot::default();
    parent.add_snapshot(component.id(), component.snapshot().unwrap());
    let error = component.send(&parent, "tcp:peer:1").unwrap_err();
    assert_eq!(operation(&error), "disconnected");
    assert_eq!(operation(&component.recv("tcp:peer:1").err().unwrap()), "socket");
}

#[test]
fn the_snapshot_functions_have_their_signatures() {
    let _: fn(&'static SnapshotData) -> Outcome<&'static str> = SnapshotData::to_state;
    let _: fn(&'static Snapshot) -> Outcome<&'static str> = Snapshot::to_state;
    let _: fn(Option<&'static Snapshot>, &str) -> Outcome<Option<&'static str>> = state_from_id;
    let _: fn(Option<&'static Snapshot>, &str) -> Option<&'static Snapshot> = snapshot_from_id;
    let _: fn(&u32) -> Outcome<SnapshotData> = SnapshotData::new_from_state;
    let _: fn(SnapshotData) -> Snapshot = Snapshot::from_data;
    let _: fn(&u32) -> Outcome<Snapshot> = Snapshot::new_from_state;
    let _: fn(&mut Snapshot, String, Snapshot) = Snapshot::add_snapshot;
}

#[test]
fn the_messages_have_their_signatures() {
    let _: RangeInclusive<u16> = supported_protocol_versions();
    let _: u16 = CURRENT_PROTOCOL_VERSION;
    let _: fn(Command, u64) -> Request = Request::new;
    let _: [fn() -> Request; 5] =
        [Request::start, Request::complete, Request::complete_paused, Request::abandon, Request::page_fault];
    let _: [fn(u64) -> Request; 4] = [Request::state, Request::config, Request::memory, Request::memory_fd];
    let _: fn(&Request) -> Command = Request::command;
    let _: fn(&Request) -> u64 = Request::length;
    let _: fn(&Request) -> &[u8; 6] = Request::command_headers;
    let _: fn(&Request) -> Outcome<u16> = Request::sender_protocol_version;
    let _: (ReadFrom<Request>, WriteTo<Request>) = (Request::read_from, Request::write_to);

    let _: fn(Status, u64) -> Response = Response::new;
    let _: [fn() -> Response; 2] = [Response::ok, Response::error];
    let _: fn(&Response) -> Status = Response::status;
    let _: fn(&Response) -> u64 = Response::length;
    let _: fn(Response, MigratableError) -> Outcome<Response> = Response::ok_or_fatal_error;
    let _: (ReadFrom<Response>, WriteTo<Response>) = (Response::read_from, Response::write_to);

    let _: fn(ConnectionRole, &mut dyn Write) -> Outcome<()> = ConnectionRole::write_to;
    let _: ReadFrom<ConnectionRole> = ConnectionRole::read_from;
    let _: fn(u16) -> Outcome<ConnectionRole> = ConnectionRole::try_from;
}

#[test]
fn the_tables_have_their_signatures() {
    let _: (ReadFrom<MemoryRange>, WriteTo<MemoryRange>) = (MemoryRange::read_from, MemoryRange::write_to);
    let _: [fn(&MemoryRangeTable) -> &[MemoryRange]; 2] =
        [MemoryRangeTable::ranges, MemoryRangeTable::regions];
    let _: fn(&mut MemoryRangeTable, MemoryRange) = MemoryRangeTable::push;
    let _: fn(&mut MemoryRangeTable, MemoryRangeTable) = MemoryRangeTable::extend;
    let _: fn(Vec<MemoryRangeTable>) -> MemoryRangeTable = MemoryRangeTable::new_from_tables;
    let _: fn(&mut dyn Read, u64) -> Outcome<MemoryRangeTable> = MemoryRangeTable::read_from;
    let _: WriteTo<MemoryRangeTable> = MemoryRangeTable::write_to;
    let _: [fn(&MemoryRangeTable) -> u64; 2] = [MemoryRangeTable::length, MemoryRangeTable::effective_size];
    let _: fn(&MemoryRangeTable) -> bool = MemoryRangeTable::is_empty;
    let _: Vec<MemoryRangeTable> = MemoryRangeTable::default().partition(1).collect();
}

/// A second conversion into `MigratableError`, even a private type's, leaves the error of these closures open.
#[test]
fn the_error_of_a_closure_is_inferred_from_the_question_mark_behind_it() {
    fn pause_all(components: &mut [Box<dyn Migratable>]) -> Outcome<()> {
        components.iter_mut().try_for_each(|component| {
            component.pause()?;
            Ok(())
        })?;
        (|| {
            components.first_mut().map_or(Ok(()), |component| component.pause())?;
            Ok(())
        })()?;
        Ok(())
    }

    pause_all(&mut [Box::new(Component)]).unwrap();
}

#[test]
fn the_types_have_their_traits() {
    fn message<T: Copy + Default>() {}
    fn code<T: Debug + Copy + Default + Eq>() {}
    fn tree<T: Clone + Default + Serialize + DeserializeOwned>() {}

    message::<Request>();
    message::<Response>();
    code::<Command>();
    code::<Status>();
    code::<ConnectionRole>();
    code::<MemoryRange>();
    tree::<MemoryRange>();
    tree::<MemoryRangeTable>();
    tree::<Snapshot>();
    tree::<SnapshotData>();
}
