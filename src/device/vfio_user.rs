// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device in another process: its migration states and data as vfio-user messages.

use thiserror::Error;

use super::{Capabilities, DataRead, DeviceError, DeviceIo, DeviceOperation, DeviceState, PrecopyInfo, path};
use crate::vfio_user::feature::{MIGRATION_P2P, MIGRATION_PRE_COPY, MIGRATION_STOP_COPY};
use crate::vfio_user::{self, Client, SharedClient};

/// Why a vfio-user device cannot be migrated, or cannot go on.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VfioUserDeviceError {
    /// A request failed.
    #[error(transparent)]
    Client(#[from] vfio_user::Error),
    /// The device's server does not take part in migration.
    #[error("vfio-user device {device} does not support migration")]
    NotMigratable {
        /// The device's name.
        device: String,
    },
    /// The device is in a state the protocol does not know.
    #[error("vfio-user device {device} says it is in state {state}")]
    UnknownState {
        /// The device's name.
        device: String,
        /// What it said.
        state: u32,
    },
    /// Data was asked for in a state that has none.
    #[error("vfio-user device {device} has no data to read in {state}")]
    NotSaving {
        /// The device's name.
        device: String,
        /// The state.
        state: DeviceState,
    },
    /// The device was reset, its state is another than RUNNING, and it does not go there.
    #[error("vfio-user device {device} is in {state} after a reset")]
    NotReset {
        /// The device's name.
        device: String,
        /// Where it is.
        state: DeviceState,
    },
}

impl VfioUserDeviceError {
    /// Names what the error stopped. A connection that carries no more requests takes the device with it.
    fn during(self, operation: DeviceOperation) -> DeviceError {
        let gone = matches!(&self, Self::Client(error) if !error.leaves_connection_usable());
        DeviceError::new(operation, self).or_gone(gone)
    }
}

/// The migration interface of a vfio-user device.
///
/// The protocol cannot ask for the bytes left, so [`DeviceIo::precopy_info`] and [`DeviceIo::data_size`] return
/// `None`.
#[derive(Debug)]
pub struct VfioUserDevice {
    client: SharedClient,
    capabilities: Capabilities,
    /// The state last set or seen, which tells a temporary end of the data from the end.
    state: DeviceState,
}

impl VfioUserDevice {
    /// Asks the device what of migration it supports.
    ///
    /// # Errors
    /// It supports none, is in no known state, or does not answer.
    pub fn new(client: SharedClient) -> Result<Self, VfioUserDeviceError> {
        let (flags, state) = {
            let client = &mut *vfio_user::lock(&client);
            let flags = client.migration_flags()?.filter(|flags| flags & MIGRATION_STOP_COPY != 0);
            let device = || client.device().to_owned();
            (flags.ok_or_else(|| VfioUserDeviceError::NotMigratable { device: device() })?, state(client)?)
        };
        let capabilities =
            Capabilities { p2p: flags & MIGRATION_P2P != 0, pre_copy: flags & MIGRATION_PRE_COPY != 0 };
        Ok(Self { client, capabilities, state })
    }

    fn end_of_data(&self, client: &Client) -> Result<DataRead, VfioUserDeviceError> {
        match self.state {
            DeviceState::StopCopy => Ok(DataRead::End),
            DeviceState::PreCopy | DeviceState::PreCopyP2p => Ok(DataRead::NothingNow),
            state => Err(VfioUserDeviceError::NotSaving { device: client.device().to_owned(), state }),
        }
    }

    /// Reads one piece. Whatever its size, only no bytes at all are the end of what there is.
    fn try_read(&mut self, buffer: &mut [u8]) -> Result<DataRead, VfioUserDeviceError> {
        let mut client = vfio_user::lock(&self.client);
        let end = self.end_of_data(&client)?;
        Ok(match client.read_migration_data(buffer)? {
            0 => end,
            read => DataRead::Bytes(read),
        })
    }

    /// Resets the device, and moves it to RUNNING where the reset left its state as it was or was refused in it.
    ///
    /// It is reset there once more: what it was given in RESUMING has become its state on the way.
    fn try_reset(&mut self) -> Result<(), VfioUserDeviceError> {
        let client = &mut *vfio_user::lock(&self.client);
        let mut reset = if_usable(client.reset())?;
        self.state = state(client)?;
        if self.state != DeviceState::Running {
            self.state = run(client, self.state, self.capabilities)?;
            reset = if_usable(client.reset())?;
            self.state = state(client)?;
        }
        match self.state {
            DeviceState::Running => Ok(reset?),
            state => Err(VfioUserDeviceError::NotReset { device: client.device().to_owned(), state }),
        }
    }
}

impl DeviceIo for VfioUserDevice {
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn state(&mut self) -> Result<DeviceState, DeviceError> {
        let state = state(&mut vfio_user::lock(&self.client));
        self.state = state.map_err(|cause| cause.during(DeviceOperation::State))?;
        Ok(self.state)
    }

    fn set_state(&mut self, state: DeviceState) -> Result<(), DeviceError> {
        let set = vfio_user::lock(&self.client).set_device_state(state as u32);
        set.map_err(|cause| VfioUserDeviceError::from(cause).during(DeviceOperation::SetState(state)))?;
        self.state = state;
        Ok(())
    }

    fn read_data(&mut self, buffer: &mut [u8]) -> Result<DataRead, DeviceError> {
        self.try_read(buffer).map_err(|cause| cause.during(DeviceOperation::ReadData))
    }

    fn write_data(&mut self, data: &[u8]) -> Result<(), DeviceError> {
        let written = vfio_user::lock(&self.client).write_migration_data(data);
        written.map_err(|cause| VfioUserDeviceError::from(cause).during(DeviceOperation::WriteData))
    }

    fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError> {
        Ok(None)
    }

    fn data_size(&mut self) -> Result<Option<u64>, DeviceError> {
        Ok(None)
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.try_reset().map_err(|cause| cause.during(DeviceOperation::Reset))
    }
}

/// Passes a refusal on as a value, and a lost connection as an error.
fn if_usable(
    outcome: Result<(), vfio_user::Error>,
) -> Result<Result<(), vfio_user::Error>, vfio_user::Error> {
    match outcome {
        Err(error) if !error.leaves_connection_usable() => Err(error),
        outcome => Ok(outcome),
    }
}

/// Moves the device towards RUNNING, state by state until it refuses one, and returns where it is then.
fn run(
    client: &mut Client,
    from: DeviceState,
    capabilities: Capabilities,
) -> Result<DeviceState, VfioUserDeviceError> {
    for next in path(from, DeviceState::Running, capabilities).into_iter().flatten() {
        if if_usable(client.set_device_state(next as u32))?.is_err() {
            break;
        }
    }
    state(client)
}

fn state(client: &mut Client) -> Result<DeviceState, VfioUserDeviceError> {
    let state = client.device_state()?;
    DeviceState::from_uapi(state)
        .ok_or_else(|| VfioUserDeviceError::UnknownState { device: client.device().to_owned(), state })
}
