// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`MigratableDevice`]: the `vm-migration` traits over a [`Tracker`] and a [`DeviceSet`].

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex};

use thiserror::Error;
use vm_migration::protocol::MemoryRangeTable;
use vm_migration::{
    Migratable, MigratableError, Pausable, Snapshot, Snapshottable, Transportable, snapshot_from_id,
};

use crate::device::{DeviceSet, DeviceSetError};
use crate::error::Chain;
use crate::sync::lock;
use crate::tracker::{TableLog, Tracker, TrackerError, locked};

/// Why a call of [`MigratableDevice`] failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MigratableDeviceError {
    /// Dirty pages could not be tracked.
    #[error(transparent)]
    Tracker(#[from] TrackerError),
    /// Devices could not be moved, saved or restored.
    #[error("Cannot move the devices' state")]
    Devices(#[source] Box<DeviceSetError>),
    /// The snapshot holds nothing of these devices.
    #[error("Snapshot has no child {id}")]
    NoSnapshot {
        /// The child looked for.
        id: String,
    },
    /// No dirty log runs.
    #[error("Dirty log is not running")]
    NotLogging,
    /// There is no table to hand back.
    #[error(
        "No table to hand back: none was given since the log started, or it was handed back or followed by a call since"
    )]
    NoTable,
    /// The migration to complete was never started.
    #[error("No migration was started")]
    NotMigrating,
    /// The migration cannot complete: the devices still run.
    #[error("Devices still run: pause them before the migration completes")]
    DevicesRun,
    /// The migration cannot complete: the last table was not read.
    #[error(
        "Pages are owed to the destination: ask for a table (dirty_log) after the devices' stop, and again after hand_back, before \
         the migration completes"
    )]
    PagesOwed,
    /// An imprecise source counts once its devices have stopped, and [`StopsToldBy`] was not set, so this value could
    /// not learn of the stop.
    #[error(
        "Dirty source {id} is imprecise and counts once its devices have stopped: say how that is told (StopsToldBy), or that \
         they have stopped already (devices_stopped)"
    )]
    StopIsNotTold {
        /// The source.
        id: String,
    },
}

impl From<DeviceSetError> for MigratableDeviceError {
    fn from(error: DeviceSetError) -> Self {
        Self::Devices(Box::new(error))
    }
}

/// How a [`MigratableDevice`] learns that the pass-through devices have stopped, where a source depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopsToldBy {
    /// The VMM calls [`Pausable::pause`] of this value when it stops the devices, in every migration and before the last table.
    Pause,
    /// The VMM calls [`MigratableDevice::devices_stopped`] once it has stopped the devices itself.
    Call,
}

/// What the devices do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// They run.
    Running,
    /// They run, and are to go to STOP_COPY when they are stopped.
    Migrating,
    /// They are stopped.
    Stopped,
    /// They are stopped, their state ready to be read for a migration.
    StoppedToMigrate,
}

impl State {
    fn is_stopped(self) -> bool {
        matches!(self, Self::Stopped | Self::StoppedToMigrate)
    }

    fn stopped(self) -> Self {
        match self {
            Self::Running | Self::Stopped => Self::Stopped,
            Self::Migrating | Self::StoppedToMigrate => Self::StoppedToMigrate,
        }
    }

    fn migrating(self) -> Self {
        if self.is_stopped() { Self::StoppedToMigrate } else { Self::Migrating }
    }
}

/// The `vm-migration` traits over what a VM's [`Tracker`] knows and what its pass-through devices hold, for a VMM with a
/// migration loop of its own.
///
/// Both are shared: the VMM maps, unmaps and plugs through its own handles, and may also pass them to
/// [`crate::transfer::Sender`]. Sessions of the two do not disturb each other.
///
/// ```
/// use std::sync::{Arc, Mutex};
/// use vfio_migration::{device::DeviceSet, granule::Granule, layout::Layout, migratable::MigratableDevice, range::GpaRange, tracker::Tracker};
/// use vm_migration::Migratable;
/// let layout = Layout::new([GpaRange::new(0, 1 << 20)?], Granule::KIB_4)?;
/// let tracker = Arc::new(Mutex::new(Tracker::builder(layout).build()?));
/// let devices = Arc::new(Mutex::new(DeviceSet::default()));
/// let mut pass_through = MigratableDevice::new("pass-through", tracker, devices);
/// pass_through.start_dirty_log()?;
/// // ... all RAM is copied ...
/// assert!(pass_through.dirty_log()?.is_empty(), "nothing writes");
/// pass_through.stop_dirty_log()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct MigratableDevice {
    id: String,
    tracker: Arc<Mutex<Tracker>>,
    devices: Arc<Mutex<DeviceSet>>,
    stops_told_by: Option<StopsToldBy>,
    state: State,
    log: Option<TableLog>,
}

impl MigratableDevice {
    /// Puts the traits over `tracker` and `devices`, which run; `id` names them in the VM's snapshot.
    pub fn new(id: impl Into<String>, tracker: Arc<Mutex<Tracker>>, devices: Arc<Mutex<DeviceSet>>) -> Self {
        Self { id: id.into(), tracker, devices, stops_told_by: None, state: State::Running, log: None }
    }

    /// Sets how this value learns that the devices have stopped. Required with imprecise sources, see
    /// [`Tracker::imprecise_sources`]: their bits count only after the stop.
    #[must_use]
    pub fn with_stops_told_by(self, told: StopsToldBy) -> Self {
        Self { stops_told_by: Some(told), ..self }
    }

    /// What tracks the dirty pages.
    pub fn tracker(&self) -> &Arc<Mutex<Tracker>> {
        &self.tracker
    }

    /// The devices whose state moves.
    pub fn devices(&self) -> &Arc<Mutex<DeviceSet>> {
        &self.devices
    }

    /// Records that the VMM has stopped the pass-through devices itself: the memory that imprecise sources cover is
    /// in the next table.
    pub fn devices_stopped(&mut self) {
        self.state = self.state.stopped();
    }

    /// Records that the VMM has resumed the pass-through devices itself.
    pub fn devices_run(&mut self) {
        if let Some(log) = &mut self.log {
            log.devices_run();
        }
        self.state = State::Running;
    }

    /// Takes back the table that [`Migratable::dirty_log`] returned last: its pages are in the next one, once, with what was written
    /// meanwhile.
    ///
    /// For a caller that holds an unsent table when it decides to stop the VM, as Cloud Hypervisor's loop does: pages
    /// in both this table and the next one would be sent twice, in the downtime. Drop the table after this call; the
    /// next one has all its pages. Call it before the next `dirty_log`, which counts the table as received, and
    /// before any of the table was sent. The first pass over all RAM is the caller's own table and is not handed
    /// back.
    ///
    /// # Errors
    /// No log runs, or no table is out: none was returned since the log started, or it was handed back, or the log was
    /// asked again since. Nothing changed.
    pub fn hand_back(&mut self) -> Result<(), MigratableDeviceError> {
        let log = self.log.as_mut().ok_or(MigratableDeviceError::NotLogging)?;
        let mut tracker = locked(&self.tracker)?;
        log.hand_back(&mut tracker).ok_or(MigratableDeviceError::NoTable)
    }

    /// Restores the devices from a snapshot that [`Snapshottable::snapshot`] made, or the `vm-migration` tree around it.
    /// They stay stopped until [`Pausable::resume`].
    ///
    /// # Errors
    /// The snapshot is not of these devices, or a device refuses its state.
    pub fn restore(&mut self, snapshot: &Snapshot) -> Result<(), MigratableDeviceError> {
        lock(&self.devices).load(snapshot)?;
        self.devices_stopped();
        Ok(())
    }

    /// Restores the devices from the child of `parent` that carries this value's id.
    ///
    /// # Errors
    /// There is no such child; else as [`MigratableDevice::restore`].
    pub fn restore_child(&mut self, parent: &Snapshot) -> Result<(), MigratableDeviceError> {
        let missing = || MigratableDeviceError::NoSnapshot { id: self.id.clone() };
        let child = snapshot_from_id(Some(parent), &self.id).ok_or_else(missing)?;
        self.restore(child)
    }

    /// Checks that every page was in a table: call it after the last table was sent, before the destination is told
    /// to run the VM. After it succeeds, [`Migratable::complete_migration`] does too.
    ///
    /// # Errors
    /// No migration was started, its devices still run, or the log runs and owes pages: no table was asked for since
    /// the devices stopped, or one was handed back and none asked for since. Keep the VM running here.
    pub fn check_all_sent(&self) -> Result<(), MigratableDeviceError> {
        match self.state {
            State::Running | State::Stopped => Err(MigratableDeviceError::NotMigrating),
            State::Migrating => Err(MigratableDeviceError::DevicesRun),
            State::StoppedToMigrate if self.owes_pages() => Err(MigratableDeviceError::PagesOwed),
            State::StoppedToMigrate => Ok(()),
        }
    }

    fn owes_pages(&self) -> bool {
        self.log.as_ref().is_some_and(|log| log.owes(&lock(&self.tracker)))
    }

    fn start_log(&mut self) -> Result<(), MigratableDeviceError> {
        self.stop_log();
        let mut tracker = locked(&self.tracker)?;
        self.check_stop_is_told(&tracker)?;
        self.log = Some(TableLog::start(&mut tracker)?);
        Ok(())
    }

    /// Ends the session, if there is one. A source that cannot be stopped counts as off and is only logged: nothing
    /// more is needed from it.
    fn stop_log(&mut self) {
        let Some(log) = self.log.take() else { return };
        let ended = log.stop(&mut lock(&self.tracker));
        if let Err(error) = ended {
            log::warn!("Dirty log has ended, and not all of it is off: {}", Chain(&error));
        }
    }

    /// Refuses imprecise sources unless it is known how the devices' stop will be told.
    fn check_stop_is_told(&self, tracker: &Tracker) -> Result<(), MigratableDeviceError> {
        if self.stops_told_by.is_some() || self.state.is_stopped() {
            return Ok(());
        }
        let untold = tracker.imprecise_sources().next();
        untold.map_or(Ok(()), |source| Err(MigratableDeviceError::StopIsNotTold { id: source.id }))
    }

    fn next_table(&mut self) -> Result<MemoryRangeTable, MigratableDeviceError> {
        let mut tracker = locked(&self.tracker)?;
        // Sources may have come since the log was started.
        let stop_is_told = self.check_stop_is_told(&tracker);
        let log = self.log.as_mut().ok_or(MigratableDeviceError::NotLogging)?;
        stop_is_told?;
        Ok(log.next(&mut tracker, self.state.is_stopped())?)
    }

    fn stop_devices(&mut self) -> Result<(), MigratableDeviceError> {
        let mut devices = lock(&self.devices);
        match self.state {
            State::Running => devices.stop()?,
            State::Migrating => drop(devices.stop_for_copy()?),
            State::Stopped | State::StoppedToMigrate => {}
        }
        drop(devices);
        self.devices_stopped();
        Ok(())
    }

    fn end_migration(&mut self) -> Result<(), MigratableDeviceError> {
        self.check_all_sent()?;
        self.state = State::Stopped;
        self.stop_log();
        // The VM may run at its destination: what fails now must not look like a reason to run it here.
        let retired = lock(&self.devices).retire();
        if let Err(error) = retired {
            log::warn!("Devices of a VM that has moved stay in their sessions: {}", Chain(&error));
        }
        Ok(())
    }

    /// Drops the log; takes devices that still run out of the migration.
    fn give_up(&mut self) -> Result<(), MigratableDeviceError> {
        if self.state == State::StoppedToMigrate && self.owes_pages() {
            log::warn!("Dirty log ends with pages that no table had: right only if the migration has failed");
        }
        self.stop_log();
        if self.state == State::Migrating {
            self.state = State::Running;
            lock(&self.devices).abort_to_running()?;
        }
        Ok(())
    }
}

impl Pausable for MigratableDevice {
    /// Stops all devices, P2P-quiescent first; call it when the vCPUs are paused. Stopped ones stay as they are.
    fn pause(&mut self) -> Result<(), MigratableError> {
        self.stop_devices().map_err(|error| MigratableError::Pause(error.into()))
    }

    /// Lets all devices run, P2P-quiescent first; call it before the vCPUs run. Ends a migration that was begun.
    ///
    /// After an error some devices may run, so all count as running: [`Pausable::pause`] stops them again.
    fn resume(&mut self) -> Result<(), MigratableError> {
        let ran = lock(&self.devices).run();
        self.devices_run();
        ran.map_err(|error| MigratableError::Resume(error.into()))
    }
}

impl Snapshottable for MigratableDevice {
    fn id(&self) -> String {
        self.id.clone()
    }

    /// Reads the stopped devices' state: a child for each device.
    fn snapshot(&mut self) -> Result<Snapshot, MigratableError> {
        lock(&self.devices).save().map_err(|error| MigratableError::Snapshot(error.into()))
    }
}

/// The VMM's own files and sockets carry the snapshot.
impl Transportable for MigratableDevice {}

impl Migratable for MigratableDevice {
    /// Switches every source on for a caller that then copies all RAM itself. A log that runs is dropped.
    ///
    /// Refused where a source is imprecise and nobody has said how the devices' stop will be told.
    fn start_dirty_log(&mut self) -> Result<(), MigratableError> {
        self.start_log().map_err(|error| MigratableError::StartDirtyLog(error.into()))
    }

    /// Drops the session: the next one starts without regard to its tables. Devices that still run are taken out of
    /// the migration; stopped ones wait for [`Pausable::resume`] or [`Migratable::complete_migration`].
    ///
    /// A source that cannot be switched off is a warning in the log and no error: callers stop the log of a migration that
    /// succeeded, too, and resume the VM after an error. The one error is a running device that cannot be taken out.
    fn stop_dirty_log(&mut self) -> Result<(), MigratableError> {
        self.give_up().map_err(|error| MigratableError::StopDirtyLog(error.into()))
    }

    /// Returns the pages written since the call before, sorted, disjoint, coalesced; that call's table counts as received.
    ///
    /// What imprecise sources cover is in the first table after the devices have stopped, and not again until they have run. One
    /// that was added since the log started is refused as [`Migratable::start_dirty_log`] does, and nothing is lost.
    fn dirty_log(&mut self) -> Result<MemoryRangeTable, MigratableError> {
        self.next_table().map_err(|error| MigratableError::DirtyLog(error.into()))
    }

    /// Has the next pause take the devices to STOP_COPY.
    ///
    /// They run on and do not enter PRE_COPY: their states go in the Snapshot, read once they have stopped, and what PRE_COPY hands out
    /// would only make it longer.
    fn start_migration(&mut self) -> Result<(), MigratableError> {
        self.state = self.state.migrating();
        Ok(())
    }

    /// Ends the session of a migration that succeeded, and the devices' sessions with it. The devices are stopped by now.
    ///
    /// Refused, with nothing changed, where [`MigratableDevice::check_all_sent`] fails. Call that one first, while
    /// the VM may still run on here.
    ///
    /// The destination may run the VM: a source that cannot be switched off, or a device that cannot end its session, is a
    /// warning in the log and no error.
    fn complete_migration(&mut self) -> Result<(), MigratableError> {
        self.end_migration().map_err(|error| MigratableError::CompleteMigration(error.into()))
    }
}
