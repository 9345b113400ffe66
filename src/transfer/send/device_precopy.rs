// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a migration reads of its devices' state while they run, and whether what they say fits the way it goes.

use super::error::SendError;
use super::payload::StatePayload;
use super::phases::Session;
use crate::device::saved::text_bytes;
use crate::device::{Basis, Estimate};
use crate::precopy::DeviceLeft;
use crate::vm::Vm;

/// Bytes of device state read in one round while the devices run.
const DEVICE_BUDGET_BYTES: u64 = 64 << 20;

/// Bytes of device state read between two looks whether the migration was cancelled.
const DEVICE_PIECE_BYTES: u64 = 4 << 20;

impl<V: Vm> Session<'_, V> {
    /// Lets devices begin to hand out their state.
    ///
    /// # Errors
    /// A device failed, or says that it has more state than may be moved.
    pub(super) fn start_device_precopy(&mut self) -> Result<(), SendError> {
        self.undo.devices_touched = true;
        self.devices().start_precopy()?;
        self.estimate_devices().map(drop)
    }

    /// Reads what running devices have that is worth reading, within the round's budget.
    ///
    /// A device whose PRE_COPY fails hands out its whole state in the downtime; one that is gone ends the migration.
    pub(super) fn step_device_precopy(&mut self) -> Result<(), SendError> {
        for _ in 0..DEVICE_BUDGET_BYTES / DEVICE_PIECE_BYTES {
            self.migration.check()?;
            let stepped = self.devices().precopy_step(DEVICE_PIECE_BYTES);
            match stepped {
                Ok(step) if step.drained || step.bytes == 0 => return Ok(()),
                Ok(_) => {}
                Err(error) if error.tells_of_lost_device() => return Err(error.into()),
                Err(error) => self.migration.degrade(error),
            }
        }
        Ok(())
    }

    /// Estimates the devices' state, after a round.
    ///
    /// # Errors
    /// A device is gone, or says that it has more state than may be moved.
    pub(super) fn estimate_devices(&mut self) -> Result<Estimate, SendError> {
        let estimate = self.devices().estimate()?;
        self.check_state_fits(estimate)
    }

    /// Estimates the devices' state, before a switchover that hangs on it.
    ///
    /// # Errors
    /// As [`Session::estimate_devices`].
    pub(super) fn estimate_devices_anew(&mut self) -> Result<Estimate, SendError> {
        let estimate = self.devices().estimate_anew()?;
        self.check_state_fits(estimate)
    }

    /// Compares what is known of the devices' state with what State may hold: there, four bytes of text carry three of theirs.
    pub(super) fn check_state_fits(&self, estimate: Estimate) -> Result<Estimate, SendError> {
        self.check_limit(text_bytes(estimate.known_bytes), estimate.known_bytes)?;
        Ok(estimate)
    }

    /// Compares a captured State with what it may hold.
    pub(super) fn check_captured(&mut self, state: StatePayload) -> Result<StatePayload, SendError> {
        let device_bytes = self.devices().state_bytes();
        self.check_limit(state.bytes(), device_bytes)?;
        Ok(state)
    }

    fn check_limit(&self, state_bytes: u64, device_bytes: u64) -> Result<(), SendError> {
        let limit_bytes = self.options.limits.state_bytes;
        match state_bytes > limit_bytes {
            true => Err(SendError::StateTooLarge { state_bytes, device_bytes, limit_bytes }),
            false => Ok(()),
        }
    }
}

/// What State will carry of the devices: all their state, what PRE_COPY brought too.
pub(super) fn device_left(estimate: Estimate) -> DeviceLeft {
    match estimate.basis {
        Basis::Told => DeviceLeft::Exact(estimate.state_bytes),
        Basis::Guessed => DeviceLeft::Estimate(estimate.state_bytes),
        Basis::Unknown => DeviceLeft::Unknown,
    }
}
