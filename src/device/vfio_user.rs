// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A device in another process: its migration states and data as vfio-user messages.

use thiserror::Error;

use super::{Capabilities, DataRead, DeviceError, DeviceIo, DeviceOperation, DeviceState, PrecopyInfo};
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
/// The protocol has no question for the bytes left, so [`DeviceIo::precopy_info`] and [`DeviceIo::data_size`] are `None`.
#[derive(Debug)]
pub struct VfioUserDevice {
    client: SharedClient,
    capabilities: Capabilities,
    /// The state last set or seen, which tells a temporary end of the data from the end.
    state: DeviceState,
    /// The last read was short: there is nothing more in this state, or not now.
    drained: bool,
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
        Ok(Self { client, capabilities, state, drained: false })
    }

    fn end_of_data(&self, client: &Client) -> Result<DataRead, VfioUserDeviceError> {
        match self.state {
            DeviceState::StopCopy => Ok(DataRead::End),
            DeviceState::PreCopy | DeviceState::PreCopyP2p => Ok(DataRead::NothingNow),
            state => Err(VfioUserDeviceError::NotSaving { device: client.device().to_owned(), state }),
        }
    }

    fn try_read(&mut self, buffer: &mut [u8]) -> Result<DataRead, VfioUserDeviceError> {
        let mut client = vfio_user::lock(&self.client);
        let end = self.end_of_data(&client)?;
        if self.drained {
            self.drained = end == DataRead::End;
            return Ok(end);
        }
        let read = client.read_migration_data(buffer)?;
        self.drained = read < buffer.len() && (read > 0 || end == DataRead::End);
        Ok(if read == 0 { end } else { DataRead::Bytes(read) })
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
        self.drained = false;
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
        let reset = vfio_user::lock(&self.client).reset();
        reset.map_err(|cause| VfioUserDeviceError::from(cause).during(DeviceOperation::Reset))?;
        (self.state, self.drained) = (DeviceState::Running, false);
        Ok(())
    }
}

fn state(client: &mut Client) -> Result<DeviceState, VfioUserDeviceError> {
    let state = client.device_state()?;
    DeviceState::from_uapi(state)
        .ok_or_else(|| VfioUserDeviceError::UnknownState { device: client.device().to_owned(), state })
}
