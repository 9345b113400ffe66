// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VMM's own `vm-migration`: the part of Cloud Hypervisor's that the library uses, and nothing else.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Tells this crate from the library's.
pub const OF_THE_VMM: bool = true;

pub mod protocol {
    #[repr(C)]
    #[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
    pub struct MemoryRange {
        pub gpa: u64,
        pub length: u64,
    }

    #[derive(Debug, Default, Clone)]
    pub struct MemoryRangeTable {
        data: Vec<MemoryRange>,
    }

    impl MemoryRangeTable {
        pub fn regions(&self) -> &[MemoryRange] {
            &self.data
        }

        pub fn push(&mut self, range: MemoryRange) {
            self.data.push(range);
        }
    }
}

/// All of its variants: a match may name each.
#[derive(Error, Debug)]
pub enum MigratableError {
    #[error("Failed to pause migratable component")]
    Pause(#[source] anyhow::Error),
    #[error("Failed to resume migratable component")]
    Resume(#[source] anyhow::Error),
    #[error("Failed to snapshot migratable component")]
    Snapshot(#[source] anyhow::Error),
    #[error("Failed to restore migratable component")]
    Restore(#[source] anyhow::Error),
    #[error("Failed to send migratable component")]
    MigrateSend(#[source] anyhow::Error),
    #[error("Failed to receive migratable component")]
    MigrateReceive(#[source] anyhow::Error),
    #[error("Failed to start dirty log of migratable component")]
    StartDirtyLog(#[source] anyhow::Error),
    #[error("Failed to stop dirty log of migratable component")]
    StopDirtyLog(#[source] anyhow::Error),
    #[error("Failed to read dirty log of migratable component")]
    DirtyLog(#[source] anyhow::Error),
    #[error("Failed to start migration of migratable component")]
    StartMigration(#[source] anyhow::Error),
    #[error("Failed to complete migration of migratable component")]
    CompleteMigration(#[source] anyhow::Error),
    #[error("Failed to release a disk lock")]
    UnlockError(#[source] anyhow::Error),
    #[error("Socket error")]
    MigrateSocket(#[source] std::io::Error),
    #[error("Device {0} disconnected")]
    DeviceDisconnected(String),
}

pub trait Pausable {
    fn pause(&mut self) -> Result<(), MigratableError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MigratableError> {
        Ok(())
    }
}

#[derive(Clone, Default, Deserialize, Serialize)]
pub struct SnapshotData {
    state: String,
}

impl SnapshotData {
    pub fn to_state<'a, T: Deserialize<'a>>(&'a self) -> Result<T, MigratableError> {
        serde_json::from_str(&self.state).map_err(|error| MigratableError::Restore(error.into()))
    }

    pub fn new_from_state<T: Serialize>(state: &T) -> Result<Self, MigratableError> {
        let state = serde_json::to_string(state).map_err(|error| MigratableError::Snapshot(error.into()))?;
        Ok(Self { state })
    }
}

#[derive(Clone, Default, Deserialize, Serialize)]
pub struct Snapshot {
    pub snapshots: BTreeMap<String, Snapshot>,
    pub snapshot_data: Option<SnapshotData>,
}

impl Snapshot {
    pub fn from_data(data: SnapshotData) -> Self {
        Self { snapshot_data: Some(data), ..Default::default() }
    }

    pub fn new_from_state<T: Serialize>(state: &T) -> Result<Self, MigratableError> {
        Ok(Self::from_data(SnapshotData::new_from_state(state)?))
    }

    pub fn add_snapshot(&mut self, id: String, snapshot: Snapshot) {
        self.snapshots.insert(id, snapshot);
    }

    pub fn to_state<'a, T: Deserialize<'a>>(&'a self) -> Result<T, MigratableError> {
        let data = self.snapshot_data.as_ref();
        data.ok_or_else(|| MigratableError::Restore(anyhow::anyhow!("Missing snapshot data")))?.to_state()
    }
}

pub fn snapshot_from_id<'a>(snapshot: Option<&'a Snapshot>, id: &str) -> Option<&'a Snapshot> {
    snapshot.and_then(|snapshot| snapshot.snapshots.get(id))
}

pub fn state_from_id<'a, T: Deserialize<'a>>(
    snapshot: Option<&'a Snapshot>,
    id: &str,
) -> Result<Option<T>, MigratableError> {
    snapshot_from_id(snapshot, id).map(Snapshot::to_state).transpose()
}

pub trait Snapshottable: Pausable {
    fn id(&self) -> String {
        String::new()
    }

    fn snapshot(&mut self) -> Result<Snapshot, MigratableError> {
        Ok(Snapshot::default())
    }
}

pub trait Transportable: Pausable + Snapshottable {
    fn send(&self, _snapshot: &Snapshot, _destination_url: &str) -> Result<(), MigratableError> {
        Ok(())
    }

    fn recv(&self, _source_url: &str) -> Result<Snapshot, MigratableError> {
        Ok(Snapshot::default())
    }
}

pub trait Migratable: Send + Pausable + Snapshottable + Transportable {
    fn start_dirty_log(&mut self) -> Result<(), MigratableError> {
        Ok(())
    }

    fn stop_dirty_log(&mut self) -> Result<(), MigratableError> {
        Ok(())
    }

    fn dirty_log(&mut self) -> Result<protocol::MemoryRangeTable, MigratableError> {
        Ok(protocol::MemoryRangeTable::default())
    }

    fn start_migration(&mut self) -> Result<(), MigratableError> {
        Ok(())
    }

    fn complete_migration(&mut self) -> Result<(), MigratableError> {
        Ok(())
    }
}
