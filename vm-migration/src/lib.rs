// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Migration traits, the [`Snapshot`] tree and the wire types of a virtual machine monitor.
//!
//! The crate is source-compatible with the `vm-migration` crate of Cloud Hypervisor v53: the same
//! names, signatures and derived traits, and nothing public beyond them. Code that compiles against
//! this crate therefore compiles against Cloud Hypervisor's own, and a VMM chooses between the two
//! by pointing the package name `vm-migration` at one or the other.
//!
//! | module | what is there |
//! |---|---|
//! | crate root | the life cycle of a component ([`Pausable`], [`Snapshottable`], [`Transportable`], [`Migratable`]), its state ([`Snapshot`]) and its failures ([`MigratableError`]) |
//! | [`protocol`] | what crosses the wire: requests, responses and tables of memory ranges |
//!
//! # Example
//!
//! ```
//! use vm_migration::protocol::MemoryRangeTable;
//! use vm_migration::{Migratable, MigratableError, Pausable, Snapshot, Snapshottable, Transportable};
//!
//! /// A timer whose one register is its state.
//! struct Timer {
//!     deadline_ns: u64,
//! }
//!
//! impl Pausable for Timer {}
//! impl Snapshottable for Timer {
//!     fn id(&self) -> String {
//!         "timer".to_string()
//!     }
//!
//!     fn snapshot(&mut self) -> Result<Snapshot, MigratableError> {
//!         Snapshot::new_from_state(&self.deadline_ns)
//!     }
//! }
//! impl Transportable for Timer {}
//! impl Migratable for Timer {}
//!
//! let mut timer = Timer { deadline_ns: 250 };
//! let mut machine = Snapshot::default();
//! machine.add_snapshot(timer.id(), timer.snapshot()?);
//!
//! let deadline_ns: Option<u64> = vm_migration::state_from_id(Some(&machine), "timer")?;
//! assert_eq!(deadline_ns, Some(250));
//! assert!(timer.dirty_log()?.is_empty());
//! # Ok::<(), MigratableError>(())
//! ```

mod error;
pub mod protocol;
mod snapshot;

pub use error::MigratableError;
pub use snapshot::{Snapshot, SnapshotData, snapshot_from_id, state_from_id};

use protocol::MemoryRangeTable;

/// Describes a component that can be stopped and set going again.
///
/// Both methods default to doing nothing, for components that have no activity of their own.
pub trait Pausable {
    /// Stops the component; afterwards it changes neither its own state nor guest memory.
    ///
    /// # Errors
    ///
    /// [`MigratableError::Pause`] when the component could not be stopped.
    fn pause(&mut self) -> Result<(), MigratableError> {
        Ok(())
    }

    /// Sets a paused component going again.
    ///
    /// # Errors
    ///
    /// [`MigratableError::Resume`] when the component stays paused.
    fn resume(&mut self) -> Result<(), MigratableError> {
        Ok(())
    }
}

/// Describes a component whose state can be captured as a [`Snapshot`].
pub trait Snapshottable: Pausable {
    /// Returns the name under which the parent files this component's snapshot; empty by default.
    fn id(&self) -> String {
        String::new()
    }

    /// Captures the state of the paused component; an empty [`Snapshot`] by default.
    ///
    /// The capture itself may write guest memory, so the dirty log is read once more after it.
    ///
    /// # Errors
    ///
    /// [`MigratableError::Snapshot`] when the state could not be read or serialised.
    fn snapshot(&mut self) -> Result<Snapshot, MigratableError> {
        Ok(Snapshot::default())
    }
}

/// Describes a component with a transport of its own for its snapshot.
///
/// Both methods default to moving nothing: most components travel inside their parent's snapshot.
pub trait Transportable: Pausable + Snapshottable {
    /// Sends `snapshot` to `destination_url`.
    ///
    /// # Errors
    ///
    /// [`MigratableError::MigrateSend`] when the snapshot could not be delivered.
    fn send(&self, snapshot: &Snapshot, destination_url: &str) -> Result<(), MigratableError> {
        let _ = (snapshot, destination_url);
        Ok(())
    }

    /// Fetches a snapshot from `source_url`; an empty [`Snapshot`] by default.
    ///
    /// # Errors
    ///
    /// [`MigratableError::MigrateReceive`] when no snapshot could be fetched.
    fn recv(&self, source_url: &str) -> Result<Snapshot, MigratableError> {
        let _ = source_url;
        Ok(Snapshot::default())
    }
}

/// Describes a component that takes part in a live migration.
///
/// The VMM calls [`start_dirty_log`](Self::start_dirty_log) before it copies any memory, then
/// [`dirty_log`](Self::dirty_log) once per round and once more after the pause, and in the end
/// either [`complete_migration`](Self::complete_migration) or, when the migration failed,
/// [`stop_dirty_log`](Self::stop_dirty_log). Every method defaults to doing nothing, for components
/// that never write guest memory.
pub trait Migratable: Send + Pausable + Snapshottable + Transportable {
    /// Arms the component's dirty log.
    ///
    /// # Errors
    ///
    /// [`MigratableError::StartDirtyLog`]; the log is then not armed.
    fn start_dirty_log(&mut self) -> Result<(), MigratableError> {
        Ok(())
    }

    /// Disarms the component's dirty log.
    ///
    /// # Errors
    ///
    /// [`MigratableError::StopDirtyLog`] when the log could not be disarmed.
    fn stop_dirty_log(&mut self) -> Result<(), MigratableError> {
        Ok(())
    }

    /// Drains the dirty log: returns the guest memory written since the last call, and clears it.
    ///
    /// # Errors
    ///
    /// [`MigratableError::DirtyLog`] when the log could not be read; nothing about dirty memory is
    /// known then.
    fn dirty_log(&mut self) -> Result<MemoryRangeTable, MigratableError> {
        Ok(MemoryRangeTable::default())
    }

    /// Tells the component that a migration begins.
    ///
    /// # Errors
    ///
    /// [`MigratableError::StartMigration`] when the component cannot be migrated now.
    fn start_migration(&mut self) -> Result<(), MigratableError> {
        Ok(())
    }

    /// Tells the component that the destination runs the virtual machine from now on.
    ///
    /// # Errors
    ///
    /// [`MigratableError::CompleteMigration`] when the component could not be wound up.
    fn complete_migration(&mut self) -> Result<(), MigratableError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Inert;

    impl Pausable for Inert {}
    impl Snapshottable for Inert {}
    impl Transportable for Inert {}
    impl Migratable for Inert {}

    #[test]
    fn a_component_without_overrides_migrates_as_nothing_at_all() {
        let mut inert: Box<dyn Migratable> = Box::new(Inert);

        inert.start_migration().unwrap();
        inert.start_dirty_log().unwrap();
        assert!(inert.dirty_log().unwrap().is_empty());
        inert.pause().unwrap();
        let snapshot = inert.snapshot().unwrap();
        assert!(inert.id().is_empty());
        assert!(snapshot.snapshots.is_empty() && snapshot.snapshot_data.is_none());
        inert.send(&snapshot, "unix:/run/peer").unwrap();
        assert!(inert.recv("unix:/run/peer").unwrap().snapshots.is_empty());
        inert.resume().unwrap();
        inert.stop_dirty_log().unwrap();
        inert.complete_migration().unwrap();
    }
}
