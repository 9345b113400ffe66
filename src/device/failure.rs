// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What goes wrong with one device.

use thiserror::Error;

use super::{ArcError, DeviceError, DeviceState, SavedStateError, StreamError};
use crate::units::Count;

/// What went wrong with one device.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DeviceFailure {
    /// It could not do what it was asked.
    #[error(transparent)]
    Io(#[from] DeviceError),
    /// It is in a state from which it must not be asked.
    #[error(transparent)]
    Arc(#[from] ArcError),
    /// Its state could not be read or written.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// Its saved state could not be put together or taken apart.
    #[error(transparent)]
    Saved(#[from] SavedStateError),
    /// It says that its state is larger than allowed. Nothing of it was read on, and the VM was not stopped for it.
    #[error(
        "Device has {} of state, more than the {limit_bytes} that Device::state_limit allows",
        Count(.state_bytes, "byte")
    )]
    StateTooLarge {
        /// Bytes of its state, as it says.
        state_bytes: u64,
        /// Most bytes allowed.
        limit_bytes: u64,
    },
    /// It runs, and its state can only be saved once it is stopped.
    #[error("Device is in {state} and was not stopped")]
    NotStopped {
        /// Where it is.
        state: DeviceState,
    },
    /// Something outside this library reset it or moved it, and so ended its session.
    #[error("Device left its data session for {state} unasked")]
    SessionLost {
        /// Where it is.
        state: DeviceState,
    },
    /// Its state should have come ahead of the Snapshot tree, and did not, or not all of it.
    #[error("State of {} was to come ahead, and {came_bytes} came", Count(.bytes, "byte"))]
    Incomplete {
        /// Bytes that came.
        came_bytes: u64,
        /// Bytes that were sent.
        bytes: u64,
    },
    /// It holds a part of a saved state.
    #[error("Device is in RESUMING with an unfinished state")]
    Unfinished,
    /// A reset left it in another state than RUNNING.
    #[error("Device is in {state} after a reset")]
    NotReset {
        /// Where it is.
        state: DeviceState,
    },
    /// It runs again, but only after a reset: its state is lost, its PCI command register and interrupts are to be set up anew.
    #[error("Device was reset, its state is lost")]
    Reset,
}

impl DeviceFailure {
    /// The same failure, of a device that still answers and so is not gone.
    pub(super) fn of_present_device(mut self) -> Self {
        match &mut self {
            Self::Io(error) => error.gone = false,
            Self::Stream(StreamError::Read { source, .. } | StreamError::Write { source, .. }) => {
                source.gone = false;
            }
            _ => {}
        }
        self
    }

    /// Whether the device is gone for good.
    pub(super) fn tells_of_lost_device(&self) -> bool {
        match self {
            Self::Io(error) => error.gone,
            Self::Stream(StreamError::Read { source, .. } | StreamError::Write { source, .. }) => source.gone,
            _ => false,
        }
    }
}
