// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes of the migration protocol, as Cloud Hypervisor speaks it: pure encoding and decoding.
//!
//! A source sends [`Request`]s of 16 bytes, each with the payload its length names; the destination answers each with one
//! [`Response`] of 16 bytes. All numbers are little-endian.
//!
//! ```text
//!            0        2                         8                       16
//!  Request   | command | headers                 | bytes of payload      |
//!  Response  | status  | padding                 | bytes of payload      |
//!  range     | gpa                               | length                |
//! ```
//!
//! A Start carries the protocol version in its first two header bytes. Two ends of this crate may say more in the other
//! four: a magic and a word of [`Features`], which the destination answers in the padding of its Response, with its
//! [`ReceiverLimits`] behind that. A peer that knows nothing of it ignores the one and leaves the other zero.

mod devices;
mod limits;
mod table;
#[cfg(test)]
mod tests;

use std::ops::{BitAnd, BitOr};

use derive_more::Display;
use thiserror::Error;

use crate::range::{GpaRange, RangeError};
use crate::units::Count;

pub use devices::{
    DEVICE_LIST_LIMIT_BYTES, DeviceFrameError, MOST_DEVICES, PIECE_HEAD_BYTES, check_piece, decode_devices,
    encode_devices,
};
pub(crate) use devices::{open_piece, seal_piece};
pub use limits::{RECEIVER_LIMITS_BYTES, ReceiverLimits};
pub use table::{MemoryTable, RANGE_BYTES, encode_ranges};

/// Bytes of a [`Request`] and of a [`Response`].
pub const HEADER_BYTES: usize = 16;

/// Bytes of a [`ConnectionRole`].
pub const ROLE_BYTES: usize = 2;

/// The version of the protocol this crate speaks; the one before it, where there is one, is understood too.
pub const PROTOCOL_VERSION: u16 = 0;

/// What follows the version in the Start of a peer of ours.
const MAGIC: [u8; 2] = *b"vM";

/// Why bytes are not a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FrameError {
    /// A command the protocol does not have.
    #[error("Request has unknown command {command}")]
    Command {
        /// The number found.
        command: u16,
    },
    /// A status the protocol does not have.
    #[error("Response has unknown status {status}")]
    Status {
        /// The number found.
        status: u16,
    },
    /// A role the protocol does not have.
    #[error("Connection announces unknown role {role}")]
    Role {
        /// The number found.
        role: u16,
    },
    /// A protocol version that is neither ours nor the one before.
    #[error("Peer speaks protocol version {version}, this side {PROTOCOL_VERSION}")]
    Version {
        /// The version announced.
        version: u16,
    },
    /// A version was looked for in another message than Start.
    #[error("Migration begins with {command} instead of Start")]
    NotStart {
        /// What came.
        command: Command,
    },
    /// A table that does not end with a range.
    #[error("Memory table of {} is not a multiple of {RANGE_BYTES} bytes", Count(.bytes, "byte"))]
    TableLength {
        /// Bytes of the table.
        bytes: u64,
    },
    /// A table without a range.
    #[error("Memory table is empty")]
    EmptyTable,
    /// An entry of a table that is no range.
    #[error("Entry {index} of the memory table is not a valid range")]
    Range {
        /// Position in the table.
        index: usize,
        /// What is wrong with it.
        source: RangeError,
    },
    /// A range that is not, or not all, RAM.
    #[error("Range {range} in entry {index} of the memory table is not in the VM's RAM")]
    OutsideRam {
        /// Position in the table.
        index: usize,
        /// The range.
        range: GpaRange,
    },
}

/// What a [`Request`] asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Display)]
#[repr(u16)]
pub enum Command {
    /// Begins a migration and announces the protocol version.
    Start = 1,
    /// Describes the VM in JSON.
    Config = 2,
    /// Carries the VM's state in JSON.
    State = 3,
    /// Carries a [`MemoryTable`] and the bytes of its ranges.
    Memory = 4,
    /// Ends the migration; the destination runs the VM.
    Complete = 5,
    /// Gives the migration up.
    Abandon = 6,
    /// Hands a memory region over as a descriptor.
    MemoryFd = 7,
    /// Ends the migration; the destination keeps the VM paused.
    CompletePaused = 8,
    /// Asks for a page, from destination to source.
    PageFault = 9,
    /// Lists the devices whose states will stream; the answer lists the destination's. Between two ends of this crate.
    Devices = 0x8001,
    /// Carries a piece of a device's state. Between two ends of this crate.
    DeviceState = 0x8002,
}

impl Command {
    /// Every command, by number.
    pub const ALL: [Self; 11] = [
        Self::Start,
        Self::Config,
        Self::State,
        Self::Memory,
        Self::Complete,
        Self::Abandon,
        Self::MemoryFd,
        Self::CompletePaused,
        Self::PageFault,
        Self::Devices,
        Self::DeviceState,
    ];
}

impl TryFrom<u16> for Command {
    type Error = FrameError;

    fn try_from(command: u16) -> Result<Self, FrameError> {
        let known = Self::ALL.into_iter().find(|&known| known as u16 == command);
        known.ok_or(FrameError::Command { command })
    }
}

/// Optional behaviour two ends of this crate agree on: a set of bits.
///
/// The destination answers those of the offered bits that it has, so both ends use the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Features(u16);

impl Features {
    /// No feature: the protocol as it is.
    pub const NONE: Self = Self(0);

    /// The states of devices come as streams of their own, ahead of State. Of no use without [`Features::LIMITS`].
    pub const DEVICE_STREAMS: Self = Self(1);

    /// The destination's answer to Start has [`ReceiverLimits`] as its payload.
    pub const LIMITS: Self = Self(2);

    /// The destination makes its devices of the Config: Devices follows that, and not Start.
    pub const DEVICES_OF_CONFIG: Self = Self(4);

    /// Makes the set with these bits, of which this crate need not know every one.
    pub const fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    /// Bits of the set.
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// Whether every feature of `other` is in the set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitAnd for Features {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl BitOr for Features {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Heads every message of the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    command: Command,
    headers: [u8; 6],
    length: u64,
}

impl Request {
    /// Makes the request for `command` with a payload of `length` bytes; of a Memory, only the table counts.
    pub fn new(command: Command, length: u64) -> Self {
        Self { command, headers: [0; 6], length }
    }

    /// Makes the request that begins a migration with any peer.
    pub fn start() -> Self {
        let [low, high] = PROTOCOL_VERSION.to_le_bytes();
        Self { command: Command::Start, headers: [low, high, 0, 0, 0, 0], length: 0 }
    }

    /// Makes the request that begins a migration with any peer and offers `features` to one of ours.
    pub fn start_offering(features: Features) -> Self {
        let mut request = Self::start();
        request.headers[2..4].copy_from_slice(&MAGIC);
        request.headers[4..6].copy_from_slice(&features.0.to_le_bytes());
        request
    }

    /// What is asked for.
    pub fn command(&self) -> Command {
        self.command
    }

    /// The bytes between command and length.
    pub fn headers(&self) -> [u8; 6] {
        self.headers
    }

    /// Bytes of payload, as the peer claims.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Returns the protocol version a Start announces.
    ///
    /// # Errors
    /// The request is no Start, or the version is neither [`PROTOCOL_VERSION`] nor the one before it.
    pub fn version(&self) -> Result<u16, FrameError> {
        if self.command != Command::Start {
            return Err(FrameError::NotStart { command: self.command });
        }
        let version = u16::from_le_bytes([self.headers[0], self.headers[1]]);
        if (PROTOCOL_VERSION.saturating_sub(1)..=PROTOCOL_VERSION).contains(&version) {
            Ok(version)
        } else {
            Err(FrameError::Version { version })
        }
    }

    /// Returns what a Start of a peer of ours offers; `None` for any other message and peer.
    pub fn offered(&self) -> Option<Features> {
        let [0, 0, magic_0, magic_1, low, high] = self.headers else { return None };
        let ours = self.command == Command::Start && [magic_0, magic_1] == MAGIC;
        ours.then(|| Features(u16::from_le_bytes([low, high])))
    }

    /// Encodes the request.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        join(self.command as u16, self.headers, self.length)
    }

    /// Decodes a request; headers and length may be anything.
    ///
    /// # Errors
    /// The command is unknown.
    pub fn from_bytes(bytes: [u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let (command, headers, length) = split(bytes);
        Ok(Self { command: Command::try_from(command)?, headers, length })
    }
}

/// How the destination took a [`Request`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Status {
    /// It did what was asked.
    Ok = 1,
    /// It did not; the migration is over.
    Error = 2,
}

impl TryFrom<u16> for Status {
    type Error = FrameError;

    fn try_from(status: u16) -> Result<Self, FrameError> {
        match status {
            1 => Ok(Self::Ok),
            2 => Ok(Self::Error),
            _ => Err(FrameError::Status { status }),
        }
    }
}

/// The destination's answer to a [`Request`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Response {
    status: Status,
    padding: [u8; 6],
    length: u64,
}

impl Response {
    /// Makes the answer that says what `status` says, without a payload.
    pub fn new(status: Status) -> Self {
        Self { status, padding: [0; 6], length: 0 }
    }

    /// Makes the answer to a Start of a peer of ours: Ok, and the `features` both ends will use.
    pub fn ok_agreeing(features: Features) -> Self {
        let [magic_0, magic_1] = MAGIC;
        let [low, high] = features.0.to_le_bytes();
        Self { padding: [magic_0, magic_1, low, high, 0, 0], ..Self::new(Status::Ok) }
    }

    /// How the request was taken.
    pub fn status(&self) -> Status {
        self.status
    }

    /// Announces a payload of so many bytes after the answer.
    #[must_use]
    pub fn with_payload(self, length: u64) -> Self {
        Self { length, ..self }
    }

    /// Bytes of payload, as the peer claims; zero except in an answer to a PageFault or a Devices, or to the Start of a peer of
    /// ours.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Returns what a destination of ours agrees to in its answer to a Start; `None` for any other answer.
    pub fn agreed(&self) -> Option<Features> {
        let [magic_0, magic_1, low, high, 0, 0] = self.padding else { return None };
        let ours = self.status == Status::Ok && [magic_0, magic_1] == MAGIC;
        ours.then(|| Features(u16::from_le_bytes([low, high])))
    }

    /// Encodes the answer.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        join(self.status as u16, self.padding, self.length)
    }

    /// Decodes an answer; padding and length may be anything.
    ///
    /// # Errors
    /// The status is unknown.
    pub fn from_bytes(bytes: [u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let (status, padding, length) = split(bytes);
        Ok(Self { status: Status::try_from(status)?, padding, length })
    }
}

/// What an additional connection is for: its first two bytes, which are not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum ConnectionRole {
    /// Carries Memory requests.
    PrecopyMemory = 1,
    /// Carries PageFault requests of a postcopy.
    Fault = 2,
}

impl ConnectionRole {
    /// Encodes the role.
    pub fn to_bytes(self) -> [u8; ROLE_BYTES] {
        (self as u16).to_le_bytes()
    }

    /// Decodes a role.
    ///
    /// # Errors
    /// The role is unknown.
    pub fn from_bytes(bytes: [u8; ROLE_BYTES]) -> Result<Self, FrameError> {
        match u16::from_le_bytes(bytes) {
            1 => Ok(Self::PrecopyMemory),
            2 => Ok(Self::Fault),
            role => Err(FrameError::Role { role }),
        }
    }
}

fn join(kind: u16, between: [u8; 6], length: u64) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[2..8].copy_from_slice(&between);
    bytes[8..].copy_from_slice(&length.to_le_bytes());
    bytes
}

fn split(bytes: [u8; HEADER_BYTES]) -> (u16, [u8; 6], u64) {
    let [k0, k1, b0, b1, b2, b3, b4, b5, length @ ..] = bytes;
    (u16::from_le_bytes([k0, k1]), [b0, b1, b2, b3, b4, b5], u64::from_le_bytes(length))
}
