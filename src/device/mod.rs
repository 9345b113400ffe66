// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Device state: moving a device through VFIO migration v2, and its state from one host to the other.
//!
//! A back end implements [`DeviceIo`] for one device. A [`DeviceSet`] moves all devices of a VM in the order they
//! need, reads their states in bounded pieces, makes them run again after a failure, and converts their states to and
//! from a Snapshot tree.
//!
//! - `set`, `member`: the order across devices, and one device in it; `failure`: what sets them back;
//! - `state`: which move leads where (pure); `stream`, `reader`, `sink`, `blob`: bytes of state out of a device and into one;
//! - `outgoing`, `incoming`, `pace`, `size`, `changes`: how far a state has come, how much is left, and how fast that changes;
//! - `identity`, `saved`, `without_state`: whose state it is, and its form in a Snapshot;
//! - `kernel`, `vfio_user`, `shared`: back ends.

use std::error::Error;

use derive_more::Display;
use thiserror::Error;

use crate::sys::tells_of_lost_device;

mod kernel;
#[cfg_attr(
    not(any(test, feature = "device-state")),
    expect(dead_code, reason = "what only a set of devices asks of the arcs")
)]
mod state;
#[cfg(feature = "vfio-user")]
mod vfio_user;

pub use kernel::{KernelDevice, KernelDeviceError};
pub use state::{ArcError, next_state, path};
#[cfg(feature = "vfio-user")]
pub use vfio_user::{VfioUserDevice, VfioUserDeviceError};

#[cfg(feature = "device-state")]
mod blob;
#[cfg(feature = "device-state")]
mod changes;
#[cfg(feature = "device-state")]
mod failure;
#[cfg(feature = "device-state")]
mod identity;
#[cfg(feature = "device-state")]
mod incoming;
#[cfg(feature = "device-state")]
mod member;
#[cfg(feature = "device-state")]
#[cfg_attr(not(feature = "transfer"), expect(dead_code, reason = "states stream in a transfer only"))]
mod outgoing;
#[cfg(feature = "device-state")]
mod pace;
#[cfg(feature = "device-state")]
#[cfg_attr(not(feature = "transfer"), expect(dead_code, reason = "states stream in a transfer only"))]
mod reader;
#[cfg(feature = "device-state")]
pub mod saved;
#[cfg(feature = "device-state")]
#[cfg_attr(not(feature = "transfer"), expect(dead_code, reason = "states stream in a transfer only"))]
mod set;
#[cfg(feature = "device-state")]
mod shared;
#[cfg(feature = "device-state")]
#[cfg_attr(not(feature = "transfer"), expect(dead_code, reason = "states stream in a transfer only"))]
mod sink;
#[cfg(feature = "device-state")]
mod size;
#[cfg(feature = "device-state")]
mod stream;
#[cfg(test)]
#[cfg(feature = "device-state")]
pub(crate) mod tests;
#[cfg(not(feature = "device-state"))]
mod without_state;

#[cfg(feature = "transfer")]
pub(crate) use {
    outgoing::StreamLeft,
    reader::{Piece, StateRead, StateReader},
    sink::StateSink,
};

#[cfg(not(feature = "device-state"))]
pub use without_state::{DeviceSet, DeviceSetError};
#[cfg(feature = "device-state")]
pub use {
    failure::DeviceFailure,
    identity::{IdentityField, IdentityMismatch, StreamIdentity, compare_identities},
    member::{Device, UNASKABLE_STATE_BYTES, UNKNOWN_STATE_BYTES},
    saved::{Identity, Nesting, SavedStateError, SavedVersion},
    set::{Attempt, DeviceSet, DeviceSetError},
    stream::{CHUNK_BYTES, StreamError},
};

/// Default of `Device::state_limit`: the most state that fits 4 GiB of base64 with room for the rest of the VM's
/// state.
pub const STATE_LIMIT_BYTES: usize = (3 << 30) - (64 << 20);

/// States of `enum vfio_device_mig_state` in `linux/vfio.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Display)]
#[display(rename_all = "SCREAMING_SNAKE_CASE")]
#[repr(u32)]
pub enum DeviceState {
    /// The device failed; only a reset helps.
    Error = 0,
    /// No DMA, no interrupts, registers frozen.
    Stop = 1,
    /// Normal operation.
    Running = 2,
    /// Stopped, and its state can be read.
    StopCopy = 3,
    /// Stopped, and its state can be written.
    Resuming = 4,
    /// Running, but starts no DMA to other devices: P2P-quiescent.
    #[display("RUNNING_P2P")]
    RunningP2p = 5,
    /// Running, and early parts of its state can be read.
    PreCopy = 6,
    /// P2P-quiescent, and early parts of its state can be read.
    #[display("PRE_COPY_P2P")]
    PreCopyP2p = 7,
}

impl DeviceState {
    /// Every state, by number.
    pub const ALL: [Self; 8] = [
        Self::Error,
        Self::Stop,
        Self::Running,
        Self::StopCopy,
        Self::Resuming,
        Self::RunningP2p,
        Self::PreCopy,
        Self::PreCopyP2p,
    ];

    /// Returns the state with this uAPI number.
    pub fn from_uapi(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|&state| state as u32 == number)
    }
}

/// Optional parts of migration v2 a device offers; STOP_COPY is what makes it migratable at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Capabilities {
    /// RUNNING_P2P, and PRE_COPY_P2P where there is PRE_COPY.
    pub p2p: bool,
    /// PRE_COPY.
    pub pre_copy: bool,
}

/// What a read of a device's state brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataRead {
    /// So many bytes, at least one.
    Bytes(usize),
    /// Nothing now, maybe more later: the temporary end in PRE_COPY (`ENOMSG`).
    NothingNow,
    /// The state is complete: the end in STOP_COPY.
    End,
}

/// How much state is left to read in PRE_COPY (`struct vfio_precopy_info`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PrecopyInfo {
    /// Bytes that should be read before PRE_COPY is left.
    pub initial_bytes: u64,
    /// Bytes that may change again.
    pub dirty_bytes: u64,
}

/// What reading running devices' state brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrecopyStep {
    /// Bytes read.
    pub bytes: u64,
    /// Whether no device has more worth reading for now.
    pub drained: bool,
}

/// How reliable an [`Estimate`] is: as reliable as its least reliable part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Basis {
    /// The devices told it.
    Told,
    /// A device's interface cannot report it; guessed from the state read before.
    Guessed,
    /// A device failed to report it; assumed so large that no switchover happens.
    Unknown,
}

/// How much state devices have, and how much of it is left to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// Bytes of their whole state, including what was already read; an upper estimate.
    pub state_bytes: u64,
    /// Of these, bytes that are known: the sizes devices reported, and for the others what was read or is known to be
    /// left.
    pub known_bytes: u64,
    /// Of these, bytes to read once the devices are stopped, in the downtime.
    pub stop_copy_bytes: u64,
    /// Bytes that should be read before PRE_COPY is left. May grow again.
    pub initial_bytes: u64,
    /// Of the bytes to read once the devices are stopped, those that PRE_COPY may bring before, where states stream.
    pub early_bytes: u64,
    /// How well this is known.
    pub basis: Basis,
}

impl Estimate {
    /// There is nothing to hand over.
    pub const NOTHING: Self = Self {
        state_bytes: 0,
        known_bytes: 0,
        stop_copy_bytes: 0,
        initial_bytes: 0,
        early_bytes: 0,
        basis: Basis::Told,
    };

    #[cfg(feature = "device-state")]
    fn plus(self, other: Self) -> Self {
        Self {
            state_bytes: self.state_bytes.saturating_add(other.state_bytes),
            known_bytes: self.known_bytes.saturating_add(other.known_bytes),
            stop_copy_bytes: self.stop_copy_bytes.saturating_add(other.stop_copy_bytes),
            initial_bytes: self.initial_bytes.saturating_add(other.initial_bytes),
            early_bytes: self.early_bytes.saturating_add(other.early_bytes),
            basis: self.basis.max(other.basis),
        }
    }
}

/// What a device was asked to do when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Display)]
#[non_exhaustive]
pub enum DeviceOperation {
    /// Telling its state.
    #[display("tell its state")]
    State,
    /// Moving to a state.
    #[display("move to {_0}")]
    SetState(DeviceState),
    /// Reading its migration data.
    #[display("hand out its migration data")]
    ReadData,
    /// Taking its migration data.
    #[display("take in its migration data")]
    WriteData,
    /// Telling how much data is left.
    #[display("tell how much migration data is left")]
    PrecopyInfo,
    /// Estimating its data's size.
    #[display("estimate the size of its migration data")]
    DataSize,
    /// Resetting.
    #[display("reset")]
    Reset,
}

/// A device that failed, at what, and why. The caller knows which device it is.
#[derive(Debug, Error)]
#[error("Device cannot {operation}")]
#[non_exhaustive]
pub struct DeviceError {
    /// What it was asked.
    pub operation: DeviceOperation,
    /// The interface's own error.
    #[source]
    pub cause: Box<dyn Error + Send + Sync>,
    /// The device is gone for good: nothing can be asked of it any more.
    pub gone: bool,
}

impl DeviceError {
    /// Names the operation that failed with `cause`. An `ENODEV` of the kernel in it means that the device is gone.
    pub fn new(operation: DeviceOperation, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        let cause = cause.into();
        let gone = tells_of_lost_device(&*cause);
        Self { operation, cause, gone }
    }

    /// Records what the back end knows about the cause: `gone` means that the device will not come back.
    #[must_use]
    pub fn or_gone(self, gone: bool) -> Self {
        Self { gone: self.gone || gone, ..self }
    }
}

/// The migration interface of one device: kernel VFIO, a vfio-user process, a fake.
///
/// State numbers and rules are those of `linux/vfio.h`; a back end is never asked for an optional state it lacks.
pub trait DeviceIo: Send {
    /// What the device offers; does not change while it is open.
    fn capabilities(&self) -> Capabilities;

    /// Reads the device's state.
    ///
    /// # Errors
    /// The device does not answer.
    fn state(&mut self) -> Result<DeviceState, DeviceError>;

    /// Moves the device to `state`, through whatever lies between; returns when it is there.
    ///
    /// # Errors
    /// The device stopped somewhere on the way: ask [`DeviceIo::state`] where. Also when a move within the saving group
    /// began a new data session, where the old one should have gone on: a reset came in between.
    fn set_state(&mut self, state: DeviceState) -> Result<(), DeviceError>;

    /// Reads the next bytes of the device's state into `buffer`, which is not empty. For PRE_COPY and STOP_COPY.
    ///
    /// # Errors
    /// The session is over: leave the state.
    fn read_data(&mut self, buffer: &mut [u8]) -> Result<DataRead, DeviceError>;

    /// Writes the next bytes of a saved state, all of them. For RESUMING.
    ///
    /// # Errors
    /// The device refused them: only a reset helps.
    fn write_data(&mut self, data: &[u8]) -> Result<(), DeviceError>;

    /// Asks how much is left to read in PRE_COPY; `None` if the interface cannot report it.
    ///
    /// # Errors
    /// The device is not in PRE_COPY, or does not answer.
    fn precopy_info(&mut self) -> Result<Option<PrecopyInfo>, DeviceError>;

    /// Asks for an estimate of the bytes STOP_COPY would bring now; `None` if the interface cannot report it.
    ///
    /// # Errors
    /// The device does not answer.
    fn data_size(&mut self) -> Result<Option<u64>, DeviceError>;

    /// Resets the device: it is RUNNING afterwards, with nothing of its state left.
    ///
    /// # Errors
    /// The reset failed. Back ends whose reset keeps the migration state then move the device to RUNNING and check.
    fn reset(&mut self) -> Result<(), DeviceError>;
}
