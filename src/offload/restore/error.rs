// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why a stored VM was not handed over.

use std::io;
use std::time::Duration;

use thiserror::Error;

use crate::range::GpaRange;
use crate::snapshot::{Elsewhere, FormatError};
use crate::transfer::connection::ConnectionError;
use crate::transfer::frame::{Command, FrameError};

/// Why a stored VM was not handed over.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LocalSendError {
    /// The snapshot's documents are not those of a VM.
    #[error("Cannot make a Config of the snapshot")]
    Document(#[from] FormatError),
    /// Part of the memory is not in the snapshot.
    #[error("Snapshot lacks memory that the VM has: {elsewhere}")]
    Elsewhere {
        /// Where it is.
        elsewhere: Elsewhere,
    },
    /// The snapshot has memory that no slot of its configuration has.
    #[error("Snapshot has memory {range}, which is in no slot of the VM")]
    NoSlot {
        /// The memory.
        range: GpaRange,
    },
    /// The state names a slot twice.
    #[error("State names memory slot {slot} twice")]
    SlotTwice {
        /// The slot.
        slot: u32,
    },
    /// No memory can be made for a slot.
    #[error("Cannot make memory for slot {slot}")]
    Make {
        /// The slot.
        slot: u32,
        /// Why not.
        source: io::Error,
    },
    /// The snapshot cannot be read, is damaged, or there is no memory left for it.
    #[error("Cannot read the snapshot into memory")]
    Fill(#[source] io::Error),
    /// The receiver cannot be connected to.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// The connection failed.
    #[error("Cannot send {command}")]
    Line {
        /// What was sent.
        command: Command,
        /// What failed.
        source: io::Error,
    },
    /// The receiver's answer is none.
    #[error("Cannot make sense of the answer to {command}")]
    Frame {
        /// What was answered.
        command: Command,
        /// What is wrong with it.
        source: FrameError,
    },
    /// The receiver's answer has a payload, which none may have.
    #[error("Receiver answered {command} with {bytes} bytes, which nobody asked for")]
    Payload {
        /// What was answered.
        command: Command,
        /// Bytes that it claims.
        bytes: u64,
    },
    /// The receiver answered with an error.
    #[error("Receiver refused {command}")]
    Refused {
        /// What it refused.
        command: Command,
    },
    /// The receiver went away.
    #[error("Receiver closed the connection instead of answering {command}")]
    Closed {
        /// What it did not answer.
        command: Command,
    },
    /// The receiver took too long.
    #[error("Receiver did not answer {command} in {:.0} s", .waited.as_secs_f64())]
    Silent {
        /// What it did not answer.
        command: Command,
        /// How long it was waited for.
        waited: Duration,
    },
    /// It was given up here.
    #[error("Sending was given up here")]
    Stopped,
}

impl LocalSendError {
    /// Whether the receiver may run the VM although it did not say so.
    pub fn is_outcome_unknown(&self) -> bool {
        let command = match self {
            Self::Line { command, .. }
            | Self::Closed { command }
            | Self::Silent { command, .. }
            | Self::Frame { command, .. }
            | Self::Payload { command, .. } => *command,
            _ => return false,
        };
        matches!(command, Command::Complete | Command::CompletePaused)
    }
}
