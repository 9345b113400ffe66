// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use std::io;
use std::time::Duration;

use derive_more::Display;
use thiserror::Error;

use super::piece_error::PieceError;
use crate::device::{DeviceFailure, DeviceSetError, IdentityMismatch};
use crate::transfer::connection::ConnectionError;
use crate::transfer::frame::{Command, DeviceFrameError, FrameError};
use crate::transfer::limits::ConnectionCount;
use crate::units::Count;
use crate::vm::VmError;

/// How far a migration has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Display)]
pub enum Step {
    /// Nothing was taken yet.
    #[display("before Start")]
    Nothing,
    /// Start was taken.
    #[display("after Start")]
    Start,
    /// Config was taken, and perhaps memory.
    #[display("after Config")]
    Config,
    /// State was taken: memory is complete.
    #[display("after State")]
    State,
}

/// A part of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Display)]
pub enum Part {
    /// The 16 bytes at its head.
    #[display("the head of a message")]
    Head,
    /// The role of an additional connection.
    #[display("the role of a connection")]
    Role,
    /// The JSON text of a Config or State.
    #[display("the payload of {_0}")]
    Payload(Command),
    /// The table of a Memory.
    #[display("the table of Memory")]
    Table,
    /// The guest memory after the table of a Memory.
    #[display("the pages of Memory")]
    Pages,
}

/// Why no VM was received.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReceiveError {
    /// Listening, accepting or a TLS handshake failed.
    #[error("Cannot receive a migration")]
    Connection {
        /// What failed.
        #[from]
        source: ConnectionError,
    },
    /// Nobody began a migration in time.
    #[error(
        "No source began a migration in {:.0} s; {rejected} caller{} rejected",
        .waited.as_secs_f64(), if *.rejected == 1 { " was" } else { "s were" }
    )]
    NoSource {
        /// How long one was waited for.
        waited: Duration,
        /// How many others came.
        rejected: u64,
    },
    /// A source that is connected already does not begin.
    #[error("Source said nothing for {:.1} s", .waited.as_secs_f64())]
    Silent {
        /// How long it was waited for.
        waited: Duration,
    },
    /// Nothing came on any connection for too long.
    #[error("Source was silent for {:.1} s {step}", .waited.as_secs_f64())]
    Idle {
        /// How long it was waited for.
        waited: Duration,
        /// How far it came.
        step: Step,
    },
    /// The source closed the connection before the migration was complete.
    #[error("Source closed the connection {step}")]
    Closed {
        /// How far it came.
        step: Step,
    },
    /// The source gave the migration up.
    #[error("Source abandoned the migration {step}")]
    Abandoned {
        /// How far it came.
        step: Step,
    },
    /// The migration was stopped on this side.
    #[error("Migration was stopped here")]
    Stopped,
    /// A message could not be read to its end: it was cut off, or the peer stalled.
    #[error("Cannot read {part}")]
    Read {
        /// What was being read.
        part: Part,
        /// Why not.
        source: io::Error,
    },
    /// An answer could not be sent.
    #[error("Cannot answer {command}")]
    Answer {
        /// What was to be answered.
        command: Command,
        /// Why not.
        source: io::Error,
    },
    /// The source's bytes are not the protocol's.
    #[error("Cannot parse {part}")]
    Frame {
        /// What was being read.
        part: Part,
        /// What is wrong with it.
        source: FrameError,
    },
    /// The source does not begin as this side can go on.
    #[error("Cannot begin a migration with this source")]
    Start {
        /// What is wrong.
        source: FrameError,
    },
    /// A message that has no place here.
    #[error("{command} came {step}")]
    OutOfOrder {
        /// The message.
        command: Command,
        /// How far the migration had come.
        step: Step,
    },
    /// Another message than Memory on an additional connection.
    #[error("{command} came on a connection for Memory")]
    NotMemory {
        /// The message.
        command: Command,
    },
    /// A message that has no payload announces one.
    #[error("{command} announces a payload of {} and may have none", Count(.length, "byte"))]
    Payload {
        /// The message.
        command: Command,
        /// Bytes announced.
        length: u64,
    },
    /// A message announces more bytes than its limit.
    #[error("{command} announces {length} bytes, more than the limit {name} = {limit}")]
    TooLong {
        /// The message.
        command: Command,
        /// Bytes announced.
        length: u64,
        /// The field of [`PeerLimits`](crate::transfer::limits::PeerLimits).
        name: &'static str,
        /// Its value.
        limit: u64,
    },
    /// A table is too long beside those of other connections.
    #[error(
        "Memory announces a table of {}, and those under way take {taken} of the limit table_bytes = {limit}",
        Count(.length, "byte")
    )]
    Tables {
        /// Bytes announced.
        length: u64,
        /// Bytes that tables under way announced.
        taken: u64,
        /// What [`PeerLimits::table_bytes`](crate::transfer::limits::PeerLimits::table_bytes) says.
        limit: u64,
    },
    /// A table has more ranges than the VM has pages, so that it names some twice.
    #[error("Memory announces a table of {} for a VM of {}", Count(.ranges, "range"), Count(.pages, "page"))]
    TooManyRanges {
        /// Ranges announced.
        ranges: u64,
        /// Pages of [`GUEST_PAGE_BYTES`](crate::transfer::limits::GUEST_PAGE_BYTES) that the VM has.
        pages: u64,
    },
    /// The source opened more connections than the protocol knows.
    #[error("Source opened more than {limit} additional connection{}", if limit.count() == 1 { "" } else { "s" })]
    Connections {
        /// The most there may be.
        limit: ConnectionCount,
    },
    /// A MemoryFd came without its descriptor, or with several.
    #[error("MemoryFd for slot {slot} came with {} instead of one", Count(&(*found as u64), "descriptor"))]
    SlotDescriptors {
        /// The slot.
        slot: u32,
        /// Descriptors that came.
        found: usize,
    },
    /// The source passes guest memory as descriptors.
    #[error("Source passes guest memory as descriptors (local=on), which this receiver does not support")]
    LocalMemory,
    /// The source wants to send memory when it is asked for.
    #[error(
        "Source wants postcopy, which this receiver does not support: the DMA of pass-through devices cannot wait for a page"
    )]
    Postcopy,
    /// The source has other devices than the destination.
    #[error("Source does not have the same devices")]
    OtherDevices {
        /// The first difference.
        #[from]
        source: IdentityMismatch,
    },
    /// What the source says of devices is not the protocol's.
    #[error("Cannot parse the source's device list")]
    DeviceFrame {
        /// What is wrong with it.
        #[from]
        source: DeviceFrameError,
    },
    /// A piece of a device's state has no place here.
    #[error("Cannot take device state in")]
    Piece {
        /// What is wrong with it.
        #[from]
        source: PieceError,
    },
    /// A device does not take its state in.
    #[error("Device {name:?} cannot take its state in")]
    DeviceState {
        /// The device.
        name: String,
        /// Why not.
        source: Box<DeviceFailure>,
    },
    /// The destination took State, and a device did not load the state that came ahead of it.
    #[error(
        "Destination took State, and device {name:?} has not loaded what came ahead of it (DeviceSet::load)"
    )]
    NotLoaded {
        /// The device.
        name: String,
    },
    /// The destination's devices cannot be readied for their states.
    #[error("Devices cannot be readied for their states")]
    Devices {
        /// Why not.
        source: Box<DeviceSetError>,
    },
    /// The destination did not take a message.
    #[error("Destination cannot take {command}")]
    Destination {
        /// The message.
        command: Command,
        /// Why not.
        source: VmError,
    },
    /// The destination could not keep guest memory.
    #[error("Destination cannot keep the pages of Memory")]
    Store {
        /// Why not.
        source: io::Error,
    },
    /// The destination took a table and left pages of it unread.
    #[error("Destination left {} of Memory unread", Count(.bytes, "byte"))]
    Unread {
        /// How many.
        bytes: u64,
    },
    /// The system gives no more threads, or what they do first panicked.
    #[error("Cannot start a thread for a connection")]
    Thread {
        /// Why not.
        source: io::Error,
    },
    /// A thread of a connection, or the one that lets connections in, panicked.
    #[error("A thread of the receiver died")]
    ThreadDied,
    /// This process may open too few files to hear a single source.
    #[error("Cannot open as many files as a connection takes")]
    Descriptors {
        /// Why not.
        source: io::Error,
    },
    /// The source failed, or did not come, and connections could not be served here before.
    #[error("{outcome}; connections could not be served here before")]
    Short {
        /// How the migration ended.
        outcome: String,
        /// Why the last of the connections was not served.
        source: Box<ReceiveError>,
    },
}

impl ReceiveError {
    /// Whether it was the source that failed, or its absence: this side did nothing wrong that it knows of.
    pub(super) fn is_of_source(&self) -> bool {
        matches!(
            self,
            Self::NoSource { .. }
                | Self::Silent { .. }
                | Self::Idle { .. }
                | Self::Closed { .. }
                | Self::Abandoned { .. }
                | Self::Read { .. }
                | Self::Answer { .. }
        )
    }

    /// Whether it was the destination that could not complete the VM.
    pub(super) fn is_of_completing(&self) -> bool {
        let complete = [Command::Complete, Command::CompletePaused];
        matches!(self, Self::Destination { command, .. } if complete.contains(command))
    }
}
