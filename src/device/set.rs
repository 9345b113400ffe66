// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All devices of a VM, moved together and in order.
//!
//! vCPUs are paused first and resumed last; that is the caller's part. In between, no device is stopped before every
//! device is P2P-quiescent, and none leaves that state on resume while another is still stopped, so no device starts
//! DMA to one that cannot answer.

mod error;
mod streaming;

use log::{error, warn};
use vm_migration::{Snapshot, snapshot_from_id};

use super::failure::DeviceFailure;
use super::member::{Asking, Device};
use super::saved::{
    NAME_LIMIT_BYTES, Nesting, SavedStateError, SavedText, SavedVersion, state_node, streamed_bytes,
};
use super::{DeviceState, Estimate, PrecopyStep};
use crate::error::Chain;

pub use error::{Attempt, DeviceSetError};

/// The state in which the devices were last put, to which they return when an operation fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Phase {
    #[default]
    Running,
    Stopped,
    /// Stopped, with a loaded state in them that has not run yet.
    Loaded,
}

/// The devices of one VM. Empty, all its operations succeed and do nothing.
#[derive(Debug, Default)]
pub struct DeviceSet {
    devices: Vec<Device>,
    phase: Phase,
    nesting: Nesting,
}

impl DeviceSet {
    /// Takes the devices of one VM together. They run, or have not been touched yet.
    ///
    /// # Errors
    /// Two have one name, a name is empty or too long, or one of several can reach another's registers and has no
    /// P2P-quiescent state.
    pub fn new(devices: Vec<Device>) -> Result<Self, DeviceSetError> {
        let mut set = Self::default();
        devices.into_iter().try_for_each(|device| set.add(device))?;
        Ok(set)
    }

    /// Adds a device that was plugged in and runs. If added during precopy, it hands out all of its state at the
    /// switchover.
    ///
    /// # Errors
    /// As [`DeviceSet::new`], or the devices are stopped; the set is as it was.
    pub fn add(&mut self, device: Device) -> Result<(), DeviceSetError> {
        let (name, kind) = (device.identity().name.clone(), &device.identity().kind);
        if name.is_empty() || name.len().max(kind.len()) > NAME_LIMIT_BYTES {
            return Err(DeviceSetError::Name { name });
        }
        if self.names().any(|other| other == name) {
            return Err(DeviceSetError::DuplicateName { name });
        }
        if self.phase != Phase::Running {
            return Err(DeviceSetError::Stopped { name });
        }
        let reaching = self.devices.iter().chain([&device]).find(|device| !device.is_quiescible());
        let reaching = reaching.filter(|_| !self.is_empty()).map(|device| device.identity().name.clone());
        if let Some(name) = reaching {
            return Err(DeviceSetError::PeerToPeer { name });
        }
        self.devices.push(device);
        Ok(())
    }

    /// Removes and returns the device `name`, which is about to be unplugged. If possible it runs, outside any
    /// session.
    ///
    /// # Errors
    /// There is no such device, or the devices are stopped; the set is as it was.
    pub fn remove(&mut self, name: &str) -> Result<Device, DeviceSetError> {
        let named = |device: &Device| device.identity().name == name;
        let missing = || DeviceSetError::NoSuchDevice { name: name.to_owned() };
        let index = self.devices.iter().position(named).ok_or_else(missing)?;
        if self.phase != Phase::Running {
            return Err(DeviceSetError::Stopped { name: name.to_owned() });
        }
        let mut device = self.devices.remove(index);
        if let Err(failure) = device.recover().map_err(failed(&device, Attempt::Run)) {
            warn!("{}; it is being unplugged anyway", Chain(&failure));
        }
        Ok(device)
    }

    /// Sets how deep in each device's node its state is saved; [`Nesting::Flat`] by default.
    #[must_use]
    pub fn nesting(self, nesting: Nesting) -> Self {
        Self { nesting, ..self }
    }

    /// Whether there is no device.
    pub fn is_empty(&self) -> bool {
        self.devices.is_empty()
    }

    /// The devices' names, in the order in which they were given.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.devices.iter().map(|device| device.identity().name.as_str())
    }

    /// Bytes of state the devices handed over while they ran, in the latest session.
    pub fn precopy_bytes(&self) -> u64 {
        self.devices.iter().map(Device::precopy_bytes).sum()
    }

    /// Bytes of state the devices handed over in all, in the latest session.
    pub fn state_bytes(&self) -> u64 {
        self.devices.iter().map(Device::state_bytes).sum()
    }

    /// Drains the names of devices reset since the last call: their PCI command register and interrupts are to be set up anew.
    pub fn drain_resets(&mut self) -> Vec<String> {
        let reset = self.devices.iter_mut().filter_map(|device| {
            let was_reset = device.take_was_reset();
            was_reset.then(|| device.identity().name.clone())
        });
        reset.collect()
    }

    /// Moves the running devices that offer it to PRE_COPY; the others stay as they are. Again, it changes nothing.
    ///
    /// # Errors
    /// A device failed. All run again outside PRE_COPY, unless they had been stopped before.
    pub fn start_precopy(&mut self) -> Result<(), DeviceSetError> {
        let started = self.each(Attempt::StartPrecopy, Device::start_precopy);
        self.or_run_on(started)
    }

    /// Reads what of the devices' state is worth reading in PRE_COPY, at most `budget_bytes` in all, shared evenly among those
    /// that have more.
    ///
    /// All that is read travels in State, so it is the initial bytes only: more would be sent twice where it changes again. Of
    /// a device that tells no sizes it is what comes before its first pause, and what follows in shrinking batches.
    ///
    /// Once the devices are stopped there is nothing to read here.
    ///
    /// # Errors
    /// A device failed, or something else moved it. What it handed over is dropped and it runs outside PRE_COPY; its
    /// whole state follows in STOP_COPY, and the next call goes on with the others.
    pub fn precopy_step(&mut self, budget_bytes: u64) -> Result<PrecopyStep, DeviceSetError> {
        let mut step = PrecopyStep { bytes: 0, drained: true };
        if self.phase != Phase::Running {
            return Ok(step);
        }
        let mut waiting = self.devices.iter().filter(|device| device.in_session()).count() as u64;
        for device in self.devices.iter_mut().filter(|device| device.in_session()) {
            let share = (budget_bytes - step.bytes) / waiting;
            waiting -= 1;
            let read = device.read_precopy(share).map_err(failed(device, Attempt::Precopy))?;
            step.bytes += read.bytes;
            step.drained &= read.drained;
        }
        Ok(step)
    }

    /// Estimates what the devices hand over in all, and what is left of it for when they are stopped.
    ///
    /// Each is asked for its size, and in PRE_COPY for its initial bytes as long as it had some the last time. A device that
    /// fails to tell is an estimate, too.
    ///
    /// # Errors
    /// A device is gone for good, or in ERROR, or says that its state is larger than [`Device::state_limit`].
    pub fn estimate(&mut self) -> Result<Estimate, DeviceSetError> {
        self.estimate_asking(Asking::WhileInitial)
    }

    /// Estimates as [`DeviceSet::estimate`] does, asking devices in PRE_COPY anew: their initial bytes may have grown again.
    ///
    /// For right before the switchover. Some devices begin another piece of their state whenever they are asked.
    ///
    /// # Errors
    /// As [`DeviceSet::estimate`].
    pub fn estimate_anew(&mut self) -> Result<Estimate, DeviceSetError> {
        self.estimate_asking(Asking::Anew)
    }

    fn estimate_asking(&mut self, asking: Asking) -> Result<Estimate, DeviceSetError> {
        self.devices.iter_mut().try_fold(Estimate::NOTHING, |sum, device| {
            let estimate = device.estimate(asking).map_err(failed(device, Attempt::Estimate))?;
            device.note_estimate(estimate);
            Ok(sum.plus(estimate))
        })
    }

    /// The device that had most state left for the downtime when all were last asked, one that cannot tell before all others.
    pub(crate) fn largest_left(&self) -> Option<&str> {
        let largest = self.devices.iter().max_by_key(|device| device.last_left())?;
        Some(&largest.identity().name)
    }

    /// Bytes that the states of the devices that do not stream have at least, as far as was known when all were last asked.
    pub(crate) fn known_bytes_in_state(&self) -> u64 {
        let in_state = self.devices.iter().filter(|device| !device.is_streaming());
        in_state.map(Device::known_bytes).sum()
    }

    /// Moves all devices to STOP, for a pause. Ends PRE_COPY and drops what was read in it.
    ///
    /// # Errors
    /// A device failed. All run again, unless they had been stopped before.
    pub fn stop(&mut self) -> Result<(), DeviceSetError> {
        self.stop_all(DeviceState::Stop).map(drop)
    }

    /// Moves all devices to STOP_COPY, for the switchover, and returns what they estimate is left to read.
    ///
    /// The estimate is made when all are P2P-quiescent and none is stopped yet.
    ///
    /// # Errors
    /// A device failed. All run again, unless they had been stopped before.
    pub fn stop_for_copy(&mut self) -> Result<Estimate, DeviceSetError> {
        self.stop_all(DeviceState::StopCopy)
    }

    /// Sets the devices going, from wherever they are.
    ///
    /// # Errors
    /// A device failed. After [`DeviceSet::load`] all are stopped again and hold what was loaded, as far as that can be
    /// had. Else all run that can be made to, one perhaps only after a reset: see [`DeviceSet::drain_resets`].
    pub fn run(&mut self) -> Result<(), DeviceSetError> {
        match (self.try_run(), self.phase) {
            (Ok(()), _) => {
                self.phase = Phase::Running;
                Ok(())
            }
            (Err(failure), Phase::Loaded) => {
                self.stop_again();
                Err(failure)
            }
            (Err(failure), Phase::Running | Phase::Stopped) => {
                warn!("{}; trying harder", Chain(&failure));
                self.abort_to_running()
            }
        }
    }

    /// Makes every device run, whatever state a failed migration left it in, and drops what was read of its state.
    ///
    /// Asks a device again, and resets it where nothing else helps. Goes on with the others when one is lost.
    ///
    /// # Errors
    /// A device had to be reset (see [`DeviceSet::drain_resets`]), or is lost; all others run.
    pub fn abort_to_running(&mut self) -> Result<(), DeviceSetError> {
        self.phase = Phase::Running;
        self.devices.iter_mut().for_each(Device::give_up_loaded);
        let (mut stuck, mut awake) = (Vec::new(), Vec::new());
        for device in &mut self.devices {
            match device.wake() {
                Ok(()) => awake.push(device),
                Err(_) => stuck.push(device),
            }
        }
        let mut outcome = Ok(());
        // Those that are still stopped go first: the awake ones are quiescent meanwhile.
        for device in stuck.into_iter().chain(awake) {
            if let Err(failure) = device.recover().map_err(failed(device, Attempt::Run)) {
                error!("{}", Chain(&failure));
                outcome = outcome.and(Err(failure));
            }
        }
        outcome
    }

    /// Saves the stopped devices' states as [`DeviceSet::save_as`] does, in the latest version.
    ///
    /// # Errors
    /// As [`DeviceSet::save_as`].
    pub fn save(&mut self) -> Result<Snapshot, DeviceSetError> {
        self.save_as(SavedVersion::LATEST)
    }

    /// Saves the stopped devices' states: a tree with a node for each device, by name.
    ///
    /// Devices in STOP go to STOP_COPY first. All are left there, so that the way back is no part of the downtime:
    /// [`DeviceSet::run`] or [`DeviceSet::retire`] ends it. Saving again reads the states again.
    ///
    /// # Errors
    /// A device is not stopped, or failed. None was set going.
    pub fn save_as(&mut self, version: SavedVersion) -> Result<Snapshot, DeviceSetError> {
        self.each(Attempt::Save, Device::read_state)?;
        let mut tree = Snapshot::default();
        for device in &mut self.devices {
            let node = device.take_snapshot(version).map_err(failed(device, Attempt::Save))?;
            tree.add_snapshot(device.identity().name.clone(), self.nesting.wrap(node));
        }
        Ok(tree)
    }

    /// Loads saved states into the devices of a VM that does not run; they are in STOP afterwards, each having accepted its own.
    ///
    /// Everything is checked before any device is touched. It is decoded twice for that, in pieces, and never held as a whole.
    ///
    /// # Errors
    /// The snapshot is malformed, lacks a device or knows another, and no device was touched; or a device failed, and all
    /// that hold a part of it were reset.
    pub fn load(&mut self, tree: &Snapshot) -> Result<(), DeviceSetError> {
        let states = self.decode(tree)?;
        if !self.is_loading() {
            self.each(Attempt::Load, Device::prepare_to_load)?;
            self.try_stop(DeviceState::Stop)?;
        }
        self.phase = Phase::Loaded;
        for (index, state) in states.iter().enumerate() {
            let device = &mut self.devices[index];
            let loaded = match state {
                Saved::Here(state) => device.drop_part().and_then(|()| device.write_state(state)),
                Saved::CameAhead => device.accept_came(),
            };
            if let Err(failure) = loaded.map_err(failed(device, Attempt::Load)) {
                self.devices[..=index].iter_mut().for_each(Device::discard_loaded);
                self.abandon_loading();
                self.phase = Phase::Stopped;
                return Err(failure);
            }
        }
        self.devices.iter_mut().for_each(Device::end_loading);
        Ok(())
    }

    /// Ends the devices' saving sessions once another VM goes on with their states. Others are left as they are.
    ///
    /// # Errors
    /// The first failure; all were asked.
    pub fn retire(&mut self) -> Result<(), DeviceSetError> {
        let retire = |device: &mut Device| device.retire().map_err(failed(device, Attempt::Retire));
        self.devices.iter_mut().map(retire).fold(Ok(()), Result::and)
    }

    fn each(
        &mut self,
        attempt: Attempt,
        mut act: impl FnMut(&mut Device) -> Result<(), DeviceFailure>,
    ) -> Result<(), DeviceSetError> {
        self.devices.iter_mut().try_for_each(|device| act(device).map_err(failed(device, attempt)))
    }

    fn stop_all(&mut self, goal: DeviceState) -> Result<Estimate, DeviceSetError> {
        let stopped = self.try_stop(goal);
        let estimate = self.or_run_on(stopped)?;
        if self.phase == Phase::Running {
            self.phase = Phase::Stopped;
        }
        Ok(estimate)
    }

    fn try_stop(&mut self, goal: DeviceState) -> Result<Estimate, DeviceSetError> {
        self.each(Attempt::Stop, |device| device.quiesce(goal))?;
        let estimate = if goal.is_saving() { self.estimate()? } else { Estimate::NOTHING };
        self.each(Attempt::Stop, |device| device.go(goal))?;
        Ok(estimate)
    }

    fn try_run(&mut self) -> Result<(), DeviceSetError> {
        self.each(Attempt::Run, Device::wake)?;
        self.each(Attempt::Run, |device| device.go(DeviceState::Running))
    }

    /// Passes a success on; after a failure sets all devices going again, unless they were at rest before.
    fn or_run_on<T>(&mut self, result: Result<T, DeviceSetError>) -> Result<T, DeviceSetError> {
        result.inspect_err(|_| {
            if self.phase == Phase::Running
                && let Err(second) = self.abort_to_running()
            {
                error!("Not all is as it was: {}", Chain(&second));
            }
        })
    }

    /// Stops whatever of a loaded set had been set going, as far as possible.
    fn stop_again(&mut self) {
        for device in &mut self.devices {
            let _ = device.quiesce(DeviceState::Stop);
        }
        for device in &mut self.devices {
            if let Err(failure) = device.go(DeviceState::Stop).map_err(failed(device, Attempt::Stop)) {
                error!("{}", Chain(&failure));
            }
        }
    }

    /// Checks the devices' states in `tree`, in the order of the devices.
    fn decode<'a>(&self, tree: &'a Snapshot) -> Result<Vec<Saved<'a>>, DeviceSetError> {
        let claimed = |name: &str| self.names().any(|own| own == name);
        let has_state =
            |node: &Snapshot| state_node(node).is_some() || !matches!(streamed_bytes(node), Ok(None));
        let mut with_state = tree.snapshots.iter().filter(|(_, node)| has_state(node));
        if let Some((name, _)) = with_state.find(|(name, _)| !claimed(name)) {
            return Err(DeviceSetError::Unclaimed { name: name.clone() });
        }
        self.devices.iter().map(|device| decode(device, tree)).collect()
    }
}

/// A device's state in a Snapshot tree.
enum Saved<'a> {
    Here(SavedText<'a>),
    /// It was written to the device already.
    CameAhead,
}

fn decode<'a>(device: &Device, tree: &'a Snapshot) -> Result<Saved<'a>, DeviceSetError> {
    let name = &device.identity().name;
    let node =
        snapshot_from_id(Some(tree), name).ok_or_else(|| DeviceSetError::Missing { name: name.clone() })?;
    let came = streamed_bytes(node).map_err(DeviceFailure::from);
    let came = came.and_then(|bytes| bytes.map(|bytes| device.check_came(bytes)).transpose());
    if came.map_err(failed(device, Attempt::Load))?.is_some() {
        return Ok(Saved::CameAhead);
    }
    let state = match SavedText::check(node, device.limit_bytes()) {
        Err(SavedStateError::NoState) => return Err(DeviceSetError::Missing { name: name.clone() }),
        other => other.and_then(|state| state.check_identity(device.identity()).map(|()| state)),
    };
    match state {
        Ok(state) => Ok(Saved::Here(state)),
        Err(failure) => Err(failed(device, Attempt::Load)(failure.into())),
    }
}

/// Makes an error that names `device`.
fn failed(device: &Device, attempt: Attempt) -> impl FnOnce(DeviceFailure) -> DeviceSetError + use<> {
    let name = device.identity().name.clone();
    move |source| DeviceSetError::Device { name, attempt, source }
}
