// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`DeviceSetError`]: why the devices of a VM cannot do what was asked, and of which.

use derive_more::Display;
use thiserror::Error;

use crate::device::failure::DeviceFailure;
use crate::device::saved::NAME_LIMIT_BYTES;

/// Why a set of devices cannot be made, moved, saved or loaded.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DeviceSetError {
    /// One device failed.
    #[error("Cannot {attempt} device {name:?}")]
    Device {
        /// Its name.
        name: String,
        /// What was being done with it.
        attempt: Attempt,
        /// What went wrong.
        source: DeviceFailure,
    },
    /// A device that can reach other devices has no P2P-quiescent state, and there are other devices.
    #[error(
        "Device {name:?} cannot be made P2P-quiescent and maps more than RAM, so it cannot move together with others"
    )]
    PeerToPeer {
        /// Its name.
        name: String,
    },
    /// Two devices have one name.
    #[error("Two devices are named {name:?}")]
    DuplicateName {
        /// That name.
        name: String,
    },
    /// The set cannot change while its devices are stopped.
    #[error("Device {name:?} cannot come or go while the devices are stopped")]
    Stopped {
        /// Its name.
        name: String,
    },
    /// There is no such device.
    #[error("No device is named {name:?}")]
    NoSuchDevice {
        /// The name looked for.
        name: String,
    },
    /// A device's name or kind is longer than its saved state can hold, or it has no name.
    #[error("Name or kind of device {name:?} is not of 1 to {NAME_LIMIT_BYTES} bytes")]
    Name {
        /// Its name.
        name: String,
    },
    /// A snapshot has no state for a device of this VM.
    #[error("Snapshot has no state for device {name:?}")]
    Missing {
        /// Its name.
        name: String,
    },
    /// A snapshot has a state for a device that this VM does not have.
    #[error("Snapshot has a state for device {name:?}, which this VM does not have")]
    Unclaimed {
        /// Its name.
        name: String,
    },
}

impl DeviceSetError {
    /// Whether it tells of a device that is gone for good: nothing can be asked of it any more.
    pub fn tells_of_lost_device(&self) -> bool {
        matches!(self, Self::Device { source, .. } if source.tells_of_lost_device())
    }
}

/// What was being done with a device that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Display)]
#[non_exhaustive]
pub enum Attempt {
    /// Entering PRE_COPY.
    #[display("start precopy of")]
    StartPrecopy,
    /// Reading its state while it runs.
    #[display("read state of running")]
    Precopy,
    /// Asking how much state it has left.
    #[display("estimate state of")]
    Estimate,
    /// Stopping it.
    #[display("stop")]
    Stop,
    /// Saving its state.
    #[display("save state of")]
    Save,
    /// Loading a saved state.
    #[display("load state of")]
    Load,
    /// Setting it going.
    #[display("run")]
    Run,
    /// Ending its session after the move.
    #[display("retire")]
    Retire,
}
