// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`SendError`]: why a VM did not move, and where that leaves it.

use std::io;

use derive_more::Display;
use thiserror::Error;

use super::exchange::PeerError;
use super::progress::Cancelled;
use crate::device::{DeviceSetError, IdentityMismatch};
use crate::error::Chain;
use crate::precopy::CancelReason;
use crate::tracker::TrackerError;
use crate::units::Count;
use crate::vm::{UnreadableMemory, UserfaultError, VmError};

/// What the sender was doing with its peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Display)]
#[non_exhaustive]
pub enum SendStep {
    /// Reaching it.
    #[display("connect to the receiver")]
    Connect,
    /// Agreeing on the protocol.
    #[display("agree with the receiver on the protocol")]
    Start,
    /// Comparing devices with the receiver's.
    #[display("compare devices with the receiver's")]
    Devices,
    /// Describing the VM.
    #[display("describe VM to the receiver")]
    Config,
    /// Copying guest memory.
    #[display("copy memory to the receiver")]
    Memory,
    /// Handing over the VM's state.
    #[display("hand VM state to the receiver")]
    State,
    /// Handing over the VM.
    #[display("hand VM over to the receiver")]
    Complete,
}

/// What a VM was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Display)]
#[non_exhaustive]
pub enum VmOperation {
    /// Describing itself.
    #[display("describe itself")]
    Config,
    /// Standing still.
    #[display("pause")]
    Pause,
    /// Letting go of what the receiver takes.
    #[display("let go of what the receiver takes")]
    Release,
    /// Taking that back.
    #[display("take back what it let go of")]
    Reclaim,
    /// Running again.
    #[display("resume")]
    Resume,
    /// Telling its state.
    #[display("tell its state")]
    State,
}

/// Why a VM did not move. See [`SendError::source_vm`] for where that leaves it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SendError {
    /// [`SenderHandle::cancel`](super::SenderHandle::cancel) was called.
    #[error("Migration was cancelled")]
    Cancelled,
    /// The policy gave up.
    #[error("Migration was given up: {0}")]
    GivenUp(CancelReason),
    /// The VM stood still for too long before the receiver could be told to run it.
    #[error("VM stood still for {limit_ms} ms, and the receiver did not have all of it yet")]
    SwitchoverTimedOut {
        /// How long it may: see [`PeerLimits::switchover_timeout`](crate::transfer::limits::PeerLimits::switchover_timeout).
        limit_ms: u128,
    },
    /// The connection failed, or the receiver broke the protocol or refused.
    #[error("Cannot {step}")]
    Peer {
        /// What was being done.
        step: SendStep,
        /// What went wrong.
        source: PeerError,
    },
    /// The VM failed.
    #[error("VM cannot {operation}")]
    Vm {
        /// What it was asked.
        operation: VmOperation,
        /// Its own error.
        source: VmError,
    },
    /// A source could not be switched on or cleared.
    #[error("Dirty pages cannot be tracked")]
    Tracking(#[source] Box<TrackerError>),
    /// Pages may be missing from memory that only a userfaultfd's handler can fill in.
    #[error("Memory cannot be read as it is")]
    Userfault(#[from] UserfaultError),
    /// Memory that has no address in this process, as that of a stored VM, cannot be read. The receiver is not to blame.
    #[error(transparent)]
    Memory(#[from] UnreadableMemory),
    /// A device failed.
    #[error("Devices cannot be moved")]
    Devices(#[source] Box<DeviceSetError>),
    /// The receiver has other devices; no page was copied.
    #[error("Receiver does not have the same devices")]
    OtherDevices(#[from] IdentityMismatch),
    /// State is larger than it may be; where devices say so themselves, the VM was not stopped for it.
    #[error(
        "State takes {} or more, of which {} in base64 are device state, and the limit is {} (PeerLimits::state_bytes{})",
        Count(.state_bytes, "byte"),
        Count(.device_bytes, "byte"),
        Count(.limit_bytes, "byte"),
        if *of_receiver { " of the receiver" } else { "" }
    )]
    StateTooLarge {
        /// Bytes of its text, as far as they are known.
        state_bytes: u64,
        /// Bytes of device state in it, before they are put into base64.
        device_bytes: u64,
        /// The limit.
        limit_bytes: u64,
        /// Whether it is the receiver that says so; else it is what this side was told of its receiver.
        of_receiver: bool,
    },
    /// A device has more state than the receiver takes in one stream; the VM was not stopped.
    #[error(
        "Stream of device {device:?} has {} or more, and the receiver takes {} (PeerLimits::device_stream_bytes of the receiver)",
        Count(.stream_bytes, "byte"),
        Count(.limit_bytes, "byte")
    )]
    StreamTooLong {
        /// The device.
        device: String,
        /// Bytes of its stream, as far as they are known.
        stream_bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// The State message could not be written down.
    #[error("VM state is not valid JSON")]
    State(#[from] serde_json::Error),
    /// No thread could be had for a connection, or what it does first panicked.
    #[error("Cannot start a thread for a connection")]
    Thread(#[source] io::Error),
    /// A thread of a connection ended without a word.
    #[error("A connection's thread died")]
    ThreadDied,
    /// The receiver was told to run the VM and did not answer.
    #[error(
        "Outcome unknown: receiver did not answer whether it runs VM, which stays paused here; look there first: \
         where it runs, end it here; where it does not and never will, resume it here"
    )]
    OutcomeUnknown {
        /// How the answer failed to come.
        source: PeerError,
    },
    /// The migration failed, and the VM could not be set going again.
    #[error("Migration failed ({}), and VM is not running as before", Chain(&**.failure))]
    Stuck {
        /// Why the migration failed.
        failure: Box<SendError>,
        /// What failed after that.
        #[source]
        recovery: Box<SendError>,
    },
}

impl From<Cancelled> for SendError {
    fn from(_: Cancelled) -> Self {
        Self::Cancelled
    }
}

impl From<TrackerError> for SendError {
    fn from(error: TrackerError) -> Self {
        Self::Tracking(error.into())
    }
}

impl From<DeviceSetError> for SendError {
    fn from(error: DeviceSetError) -> Self {
        Self::Devices(error.into())
    }
}

/// Where a failed migration leaves the VM at the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceVm {
    /// As it was before; it may be sent again.
    AsBefore,
    /// Paused, because it may be running at the receiver.
    PausedForSafety,
    /// Its vCPUs or devices could not be set going again.
    Stuck,
}

impl SendError {
    /// What kept a chunk of memory from being sent.
    pub(super) fn of_memory(source: PeerError) -> Self {
        let unreadable = match source {
            PeerError::Io(error) => error.downcast::<UnreadableMemory>().map_err(PeerError::Io),
            other => Err(other),
        };
        unreadable.map_or_else(|source| Self::Peer { step: SendStep::Memory, source }, Self::Memory)
    }

    /// Where the failure leaves the VM.
    pub fn source_vm(&self) -> SourceVm {
        match self {
            Self::OutcomeUnknown { .. } => SourceVm::PausedForSafety,
            Self::Stuck { .. } => SourceVm::Stuck,
            _ => SourceVm::AsBefore,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Attempt, DeviceFailure};

    #[test]
    fn a_stuck_vm_tells_the_failure_and_the_device_behind_the_recovery_each_once() {
        let broken = || io::Error::from(io::ErrorKind::BrokenPipe);
        let failure = SendError::Peer { step: SendStep::Memory, source: PeerError::Io(broken()) };
        let name = "dma0".to_owned();
        let lost = DeviceSetError::Device { name, attempt: Attempt::Run, source: DeviceFailure::Reset };
        let stuck = SendError::Stuck { failure: failure.into(), recovery: Box::new(lost.into()) };
        assert_eq!(
            Chain(&stuck).to_string(),
            "Migration failed (Cannot copy memory to the receiver: Connection failed: broken pipe), and VM is not \
             running as before: Devices cannot be moved: Cannot run device \"dma0\": Device was reset, its state is lost"
        );
    }
}
