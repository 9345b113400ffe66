// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Why a stored VM was not handed over.

use std::io;
use std::time::Duration;

use thiserror::Error;

use crate::range::GpaRange;
use crate::snapshot::{Elsewhere, FormatError};
use crate::transfer::connection::ConnectionError;
use crate::transfer::frame::{Command, FrameError};
use crate::units::Count;

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
    /// The receiver waited for requests for pages to be possible, for it was started so.
    #[error(
        "Receiver refused State after {:.0} s: it may wait for memory on demand (memory_mode=postcopy), and this is all of it at once",
        .waited.as_secs_f64()
    )]
    OnDemandReceiver {
        /// How long it waited.
        waited: Duration,
    },
    /// The receiver does not ask for pages.
    #[error(
        "Receiver asks for no page: it does not wait for memory on demand (memory_mode=postcopy), and would run the VM on zeros"
    )]
    NotOnDemand,
    /// The VM has devices, or back ends, that reach its memory without a fault.
    #[error("Memory on demand is not for this VM: {devices} cannot wait for a page, as a vCPU does")]
    CannotFault {
        /// What they are called, one after the other.
        devices: String,
    },
    /// Where a request for a page had to come, there was something else.
    #[error("Receiver sent {command} with {bytes} bytes where it may only ask for a page")]
    NoFault {
        /// What it sent.
        command: Command,
        /// Bytes of its payload.
        bytes: u64,
    },
    /// The receiver asked for what is no page of the VM.
    #[error("Receiver asked for {length:#x} bytes at GPA {gpa:#x}, which is no page of the VM's memory")]
    OutsideRam {
        /// Where.
        gpa: u64,
        /// How much.
        length: u64,
    },
    /// The receiver closed the connection while it lacked memory.
    #[error("Receiver, or its VM, ended before it had all memory: {} not asked for", Count(.pages, "page"))]
    Gone {
        /// Pages of 4 KiB.
        pages: u64,
    },
    /// The receiver closed the connection before it had asked for all memory, though it had all: its VM has ended, unless the receiver is one
    /// that never asks for some.
    #[error(
        "Receiver, or its VM, ended before it had asked for all memory, which was written: {} not asked for",
        Count(.pages, "page")
    )]
    Unasked {
        /// Pages of 4 KiB.
        pages: u64,
    },
    /// It was given up here although the receiver ran the VM.
    #[error("Sending was given up here, and the VM ended: {} not asked for", Count(.pages, "page"))]
    Aborted {
        /// Pages of 4 KiB.
        pages: u64,
    },
    /// The system gives no more threads.
    #[error("Cannot start the thread that serves page faults")]
    Thread(#[source] io::Error),
    /// It was given up here.
    #[error("Sending was given up here")]
    Stopped,
}

impl LocalSendError {
    /// Whether the receiver may run the VM although it did not say so.
    pub fn is_outcome_unknown(&self) -> bool {
        let command = match self {
            Self::Unasked { .. } => return true,
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
