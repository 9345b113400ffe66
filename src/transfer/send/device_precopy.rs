// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a migration reads of its devices' state while they run and once they are stopped, and whether it fits into State.

use std::sync::{Mutex, MutexGuard};

use vm_migration::Snapshot;

use super::error::SendError;
use super::payload::StatePayload;
use super::progress::SenderHandle;
use super::sent::DeviceDowntime;
use crate::device::saved::text_bytes;
use crate::device::{
    DeviceSet, DeviceSetError, Estimate, StateRead, StateReader, StreamIdentity, StreamLeft,
};
use crate::sync::lock;
use crate::transfer::frame::{MOST_DEVICES, ReceiverLimits};

/// What devices have left to hand over.
#[derive(Debug, Clone)]
pub(super) struct DevicesLeft {
    /// Of all.
    pub(super) estimate: Estimate,
    /// The device that has most of it, or of which nobody can tell; empty where there is none.
    pub(super) largest: String,
    /// Of each device whose state streams.
    pub(super) streams: Vec<StreamLeft>,
}

/// The VM's pass-through devices, locked for one step at a time.
pub(super) struct DevicePrecopy<'a> {
    devices: &'a Mutex<DeviceSet>,
    migration: &'a SenderHandle,
    /// Bytes that State may hold.
    limit_bytes: u64,
    /// What the receiver says that it takes.
    receiver_limits: Option<ReceiverLimits>,
    /// Whether they have to be set back when the migration fails.
    touched: bool,
    /// Whether their states are streams of their own.
    streams: bool,
    /// What each handed over once it was stopped.
    in_downtime: Vec<DeviceDowntime>,
}

impl<'a> DevicePrecopy<'a> {
    pub(super) fn new(devices: &'a Mutex<DeviceSet>, migration: &'a SenderHandle, limit_bytes: u64) -> Self {
        let (touched, streams, in_downtime) = (false, false, Vec::new());
        Self { devices, migration, limit_bytes, receiver_limits: None, touched, streams, in_downtime }
    }

    fn devices(&self) -> MutexGuard<'a, DeviceSet> {
        lock(self.devices)
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.devices().is_empty()
    }

    /// Who they are to a receiver of this crate; none where their states cannot stream.
    pub(super) fn stream_identities(&self) -> Vec<StreamIdentity> {
        let mut own = self.devices().stream_identities();
        own.truncate(if own.len() > MOST_DEVICES { 0 } else { own.len() });
        own
    }

    /// Keeps to what the receiver says that it takes.
    pub(super) fn heed_limits(&mut self, limits: ReceiverLimits) {
        self.receiver_limits = Some(limits);
    }

    /// What the receiver says that it takes.
    pub(super) fn limits(&self) -> Option<ReceiverLimits> {
        self.receiver_limits
    }

    /// Has the states of these devices go to the receiver as streams of their own; one plugged in later stays in State.
    pub(super) fn begin_streams(&mut self, listed: &[StreamIdentity]) {
        self.streams = true;
        self.touched = true;
        self.devices().begin_streaming(listed);
    }

    /// Returns what reads the running devices' states on, for one round.
    ///
    /// A device whose PRE_COPY fails hands out its whole state in the downtime; one that is gone ends the migration.
    pub(super) fn readers(&self) -> Result<Vec<StateReader>, SendError> {
        if !self.streams {
            return Ok(Vec::new());
        }
        let (readers, failures) = self.devices().precopy_readers();
        failures.into_iter().try_for_each(|failure| self.tolerate(failure))?;
        Ok(readers)
    }

    /// Returns what reads the stopped devices' states to their ends.
    pub(super) fn final_readers(&self) -> Result<Vec<StateReader>, SendError> {
        if !self.streams {
            return Ok(Vec::new());
        }
        Ok(self.devices().final_readers()?)
    }

    /// Takes in what was read of the running devices' states in a round, and looks whether something has reset one since.
    pub(super) fn finish_round(&self, reads: Vec<StateRead>) -> Result<(), SendError> {
        for read in reads {
            let finished = self.devices().finish_read(read);
            finished.or_else(|error| self.tolerate(error))?;
        }
        let restarted = self.devices().restart_after_resets();
        restarted.or_else(|error| self.tolerate(error))
    }

    /// Takes in what was read of the stopped devices' states: all there was.
    pub(super) fn finish(&mut self, reads: Vec<StateRead>) -> Result<(), SendError> {
        let mut devices = self.devices();
        self.in_downtime = reads.iter().filter_map(|read| downtime_of(&devices, read)).collect();
        Ok(reads.into_iter().try_for_each(|read| devices.finish_read(read))?)
    }

    /// Notes that a device's PRE_COPY failed, unless the device is gone.
    fn tolerate(&self, error: DeviceSetError) -> Result<(), SendError> {
        if error.tells_of_lost_device() {
            return Err(error.into());
        }
        self.migration.degrade(error);
        Ok(())
    }

    /// Lets devices begin to hand out their state, where it streams. In State it travels once the VM stands still, and PRE_COPY would only
    /// bring more of it.
    ///
    /// # Errors
    /// A device failed, or says that it has more state than may be moved.
    pub(super) fn start(&mut self) -> Result<(), SendError> {
        self.touched = true;
        if self.streams {
            self.devices().start_precopy()?;
        }
        self.estimate().map(drop)
    }

    /// Estimates the devices' state, after a round.
    ///
    /// # Errors
    /// A device is gone, or says that it has more state than may be moved.
    pub(super) fn estimate(&self) -> Result<DevicesLeft, SendError> {
        self.ask(DeviceSet::estimate)
    }

    fn ask(
        &self,
        how: impl FnOnce(&mut DeviceSet) -> Result<Estimate, DeviceSetError>,
    ) -> Result<DevicesLeft, SendError> {
        let mut devices = self.devices();
        let estimate = how(&mut devices)?;
        let largest = devices.largest_left().unwrap_or_default().to_owned();
        let streams = devices.streams_left().collect();
        self.check_fits(&devices)?;
        drop(devices);
        Ok(DevicesLeft { estimate, largest, streams })
    }

    /// Estimates the devices' state, before a switchover that hangs on it.
    ///
    /// # Errors
    /// As [`DevicePrecopy::estimate`].
    pub(super) fn estimate_anew(&self) -> Result<DevicesLeft, SendError> {
        self.ask(DeviceSet::estimate_anew)
    }

    /// Stops all devices, quiescent first, and asks for the sizes that are certain now (C38).
    ///
    /// # Errors
    /// As [`DevicePrecopy::estimate`].
    pub(super) fn stop(&self) -> Result<DevicesLeft, SendError> {
        self.ask(DeviceSet::stop_for_copy)
    }

    /// Lets the devices run again, since the switchover is taken back.
    pub(super) fn run_on(&self) -> Result<(), SendError> {
        Ok(self.devices().run()?)
    }

    /// Saves the stopped devices' state.
    pub(super) fn save(&self) -> Result<Snapshot, SendError> {
        Ok(self.devices().save()?)
    }

    /// Compares a captured State with what it may hold.
    pub(super) fn check_captured(&self, state: StatePayload) -> Result<StatePayload, SendError> {
        let device_bytes = self.devices().state_bytes();
        self.check_limit(state.bytes(), device_bytes)?;
        Ok(state)
    }

    /// Ends what the VM that has moved has of device state here; returns the bytes of it, and those that PRE_COPY brought.
    pub(super) fn retire(&self) -> (u64, u64) {
        let mut devices = self.devices();
        let bytes = (devices.state_bytes(), devices.precopy_bytes());
        devices.end_streaming();
        if let Err(error) = devices.retire() {
            self.migration.degrade(error);
        }
        bytes
    }

    /// What each device handed over as a stream once it was stopped.
    pub(super) fn take_downtimes(&mut self) -> Vec<DeviceDowntime> {
        std::mem::take(&mut self.in_downtime)
    }

    /// Has the devices' states go into State again: a later migration, or a save, reads them anew.
    pub(super) fn end_streams(&self) {
        self.devices().end_streaming();
    }

    /// Makes the devices run again after a failure, or stand still where the VM `stays_paused`.
    pub(super) fn restore(&self, stays_paused: bool) -> Result<(), SendError> {
        match (self.touched, stays_paused) {
            (false, _) => Ok(()),
            (true, false) => Ok(self.devices().run()?),
            (true, true) => Ok(self.devices().stop()?),
        }
    }

    /// Compares what is known of the devices' states with what a stream may have and with what State may hold: there, four bytes of text
    /// carry three of theirs.
    fn check_fits(&self, devices: &DeviceSet) -> Result<(), SendError> {
        let in_state_bytes = devices.known_bytes_in_state();
        self.check_limit(text_bytes(in_state_bytes), in_state_bytes)?;
        let limit_bytes = self.receiver_limits.map_or(u64::MAX, |limits| limits.device_stream_bytes);
        match devices.longest_stream().filter(|&(_, stream_bytes)| stream_bytes > limit_bytes) {
            Some((device, stream_bytes)) => {
                Err(SendError::StreamTooLong { device: device.to_owned(), stream_bytes, limit_bytes })
            }
            None => Ok(()),
        }
    }

    fn check_limit(&self, state_bytes: u64, device_bytes: u64) -> Result<(), SendError> {
        let told_bytes = self.receiver_limits.map_or(u64::MAX, |limits| limits.state_bytes);
        let (limit_bytes, of_receiver) = (self.limit_bytes.min(told_bytes), told_bytes < self.limit_bytes);
        match state_bytes > limit_bytes {
            true => Err(SendError::StateTooLarge { state_bytes, device_bytes, limit_bytes, of_receiver }),
            false => Ok(()),
        }
    }
}

fn downtime_of(devices: &DeviceSet, read: &StateRead) -> Option<DeviceDowntime> {
    let device = devices.name_of_stream(read.device())?.to_owned();
    Some(DeviceDowntime { device, bytes: read.bytes(), took: read.arrived_after })
}
