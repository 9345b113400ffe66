// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the source asks of the destination.

use std::io::{Read, Write};

use super::error::WireError;
use super::header::Header;
use super::table::RANGE_BYTES;
use super::{CURRENT_PROTOCOL_VERSION, read_message, supported_protocol_versions, write_message};
use crate::MigratableError;

/// Names what a [`Request`] asks for.
#[repr(u16)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Command {
    /// Nothing; keeps a zeroed message from having a meaning.
    #[default]
    Invalid = 0,
    /// Begins a migration and announces the protocol version.
    Start = 1,
    /// Carries the configuration of the virtual machine as JSON.
    Config = 2,
    /// Carries the [`Snapshot`](crate::Snapshot) tree as JSON.
    State = 3,
    /// Carries a [`MemoryRangeTable`](super::MemoryRangeTable) and the bytes of its ranges.
    Memory = 4,
    /// Ends the migration; the destination runs the virtual machine.
    Complete = 5,
    /// Gives the migration up.
    Abandon = 6,
    /// Carries the slot number of a memory region, its file descriptor beside it.
    MemoryFd = 7,
    /// Ends the migration; the destination leaves the virtual machine paused, as it was found.
    CompletePaused = 8,
    /// Asks the source, from the destination, for the bytes of one [`MemoryRange`](super::MemoryRange).
    PageFault = 9,
}

impl Command {
    fn from_wire(command: u16) -> Result<Self, WireError> {
        Ok(match command {
            0 => Self::Invalid,
            1 => Self::Start,
            2 => Self::Config,
            3 => Self::State,
            4 => Self::Memory,
            5 => Self::Complete,
            6 => Self::Abandon,
            7 => Self::MemoryFd,
            8 => Self::CompletePaused,
            9 => Self::PageFault,
            command => return Err(WireError::UnknownCommand { command }),
        })
    }
}

/// Heads every message from the source: a command and the length of the payload after it.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Request {
    command: Command,
    command_headers: [u8; 6],
    length: u64,
}

impl Request {
    /// Makes a request with empty headers and a payload of `length` bytes.
    pub fn new(command: Command, length: u64) -> Self {
        Self { command, command_headers: [0; 6], length }
    }

    /// Makes the request that begins a migration in [`CURRENT_PROTOCOL_VERSION`].
    pub fn start() -> Self {
        let [v0, v1] = CURRENT_PROTOCOL_VERSION.to_le_bytes();
        Self { command: Command::Start, command_headers: [v0, v1, 0, 0, 0, 0], length: 0 }
    }

    /// Makes a request with a state of `length` bytes.
    pub fn state(length: u64) -> Self {
        Self::new(Command::State, length)
    }

    /// Makes a request with a configuration of `length` bytes.
    pub fn config(length: u64) -> Self {
        Self::new(Command::Config, length)
    }

    /// Makes a request with a table of `length` bytes; the bytes of its ranges are not counted.
    pub fn memory(length: u64) -> Self {
        Self::new(Command::Memory, length)
    }

    /// Makes a request with the `length` bytes that go beside a memory file descriptor.
    pub fn memory_fd(length: u64) -> Self {
        Self::new(Command::MemoryFd, length)
    }

    /// Makes the request that ends a migration and sets the virtual machine going.
    pub fn complete() -> Self {
        Self::new(Command::Complete, 0)
    }

    /// Makes the request that ends a migration and leaves the virtual machine paused.
    pub fn complete_paused() -> Self {
        Self::new(Command::CompletePaused, 0)
    }

    /// Makes the request that gives a migration up.
    pub fn abandon() -> Self {
        Self::new(Command::Abandon, 0)
    }

    /// Makes the request for a page; its payload is one [`MemoryRange`](super::MemoryRange).
    pub fn page_fault() -> Self {
        Self::new(Command::PageFault, RANGE_BYTES as u64)
    }

    /// Returns what is asked for.
    pub fn command(&self) -> Command {
        self.command
    }

    /// Returns the length of the payload in bytes, as the peer claims it.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Returns the six bytes between command and length.
    pub fn command_headers(&self) -> &[u8; 6] {
        &self.command_headers
    }

    /// Returns the protocol version that a `Start` request announces.
    ///
    /// Only the first two headers count; the others may hold anything.
    ///
    /// # Errors
    ///
    /// [`MigratableError::MigrateReceive`] when the version is not one of
    /// [`supported_protocol_versions`], or the request is not a `Start`.
    pub fn sender_protocol_version(&self) -> Result<u16, MigratableError> {
        if self.command != Command::Start {
            return Err(WireError::NotStart { command: self.command }.refused());
        }
        let [v0, v1, ..] = self.command_headers;
        let version = u16::from_le_bytes([v0, v1]);
        let supported = supported_protocol_versions();
        if !supported.contains(&version) {
            return Err(WireError::UnsupportedVersion { version, supported }.refused());
        }
        Ok(version)
    }

    /// Reads one request of 16 bytes.
    ///
    /// # Errors
    ///
    /// [`MigratableError::MigrateSocket`] when reading fails or the stream ends before the last byte,
    /// [`MigratableError::MigrateReceive`] when the command is unknown.
    pub fn read_from(fd: &mut dyn Read) -> Result<Request, MigratableError> {
        let header = Header::from_bytes(read_message(fd, "request")?);
        let command = Command::from_wire(header.code).map_err(WireError::refused)?;
        Ok(Self { command, command_headers: header.extra, length: header.length })
    }

    /// Writes the 16 bytes of the request, in one call.
    ///
    /// # Errors
    ///
    /// [`MigratableError::MigrateSocket`] when writing fails; a part may have been written.
    pub fn write_to(&self, fd: &mut dyn Write) -> Result<(), MigratableError> {
        let header = Header { code: self.command as u16, extra: self.command_headers, length: self.length };
        write_message(fd, &header.to_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_is_read_as_it_is_written_and_no_other_is_known() {
        let known: Vec<u16> = (0..=u16::MAX)
            .filter(|&code| Command::from_wire(code).is_ok_and(|command| command as u16 == code))
            .collect();
        assert_eq!(known, (0..=9).collect::<Vec<_>>());
        assert!((10..=u16::MAX).all(|code| Command::from_wire(code).is_err()));
    }

    #[test]
    fn only_a_start_request_of_a_supported_version_has_a_version() {
        let with_headers = |command_headers| Request { command: Command::Start, command_headers, length: 0 };
        let refusal = |request: Request| match request.sender_protocol_version().unwrap_err() {
            MigratableError::MigrateReceive(error) => error.to_string(),
            error => panic!("{error:?}"),
        };

        assert_eq!(Request::start().sender_protocol_version().unwrap(), CURRENT_PROTOCOL_VERSION);
        assert_eq!(with_headers([0, 0, 1, 2, 3, 4]).sender_protocol_version().unwrap(), 0);
        assert_eq!(
            refusal(with_headers([2, 1, 0, 0, 0, 0])),
            "Sender speaks protocol version 258, supported are 0 to 0"
        );
        assert_eq!(
            refusal(Request::abandon()),
            "Only a Start request carries a protocol version, not Abandon"
        );
    }

    #[test]
    fn a_request_has_the_size_it_has_on_the_wire() {
        assert_eq!(size_of::<Request>(), Header::BYTES);
    }
}
