// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the destination answers.

use std::io::{Read, Write};

use super::error::WireError;
use super::header::Header;
use super::{read_message, write_message};
use crate::MigratableError;

/// Names the outcome of a [`Request`](super::Request).
#[repr(u16)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Status {
    /// Nothing; keeps a zeroed message from having a meaning.
    #[default]
    Invalid = 0,
    /// The request was carried out.
    Ok = 1,
    /// The request failed, and the migration with it.
    Error = 2,
}

impl Status {
    fn from_wire(status: u16) -> Result<Self, WireError> {
        Ok(match status {
            0 => Self::Invalid,
            1 => Self::Ok,
            2 => Self::Error,
            status => return Err(WireError::UnknownStatus { status }),
        })
    }
}

/// Heads every message from the destination: a status and the length of the payload after it.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Response {
    status: Status,
    padding: [u8; 6],
    length: u64,
}

impl Response {
    /// Makes a response with a payload of `length` bytes.
    pub fn new(status: Status, length: u64) -> Self {
        Self { status, padding: [0; 6], length }
    }

    /// Makes the response to a request that was carried out.
    pub fn ok() -> Self {
        Self::new(Status::Ok, 0)
    }

    /// Makes the response to a request that failed.
    pub fn error() -> Self {
        Self::new(Status::Error, 0)
    }

    /// Returns the outcome.
    pub fn status(&self) -> Status {
        self.status
    }

    /// Returns the length of the payload in bytes, as the peer claims it.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Reads one response of 16 bytes; the padding may hold anything.
    ///
    /// # Errors
    ///
    /// [`MigratableError::MigrateSocket`] when reading fails or the stream ends before the last byte,
    /// [`MigratableError::MigrateReceive`] when the status is unknown.
    pub fn read_from(fd: &mut dyn Read) -> Result<Response, MigratableError> {
        let header = Header::from_bytes(read_message(fd, "response")?);
        let status = Status::from_wire(header.code).map_err(WireError::refused)?;
        Ok(Self { status, padding: header.extra, length: header.length })
    }

    /// Returns the response if its status is [`Status::Ok`].
    ///
    /// # Errors
    ///
    /// `error` on any other status: what the source was doing is all it knows, since a response
    /// carries no reason.
    pub fn ok_or_fatal_error(self, error: MigratableError) -> Result<Response, MigratableError> {
        match self.status {
            Status::Ok => Ok(self),
            Status::Invalid | Status::Error => Err(error),
        }
    }

    /// Writes the 16 bytes of the response, in one call.
    ///
    /// # Errors
    ///
    /// [`MigratableError::MigrateSocket`] when writing fails; a part may have been written.
    pub fn write_to(&self, fd: &mut dyn Write) -> Result<(), MigratableError> {
        let header = Header { code: self.status as u16, extra: self.padding, length: self.length };
        write_message(fd, &header.to_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_is_read_as_it_is_written_and_no_other_is_known() {
        let known: Vec<u16> = (0..=u16::MAX)
            .filter(|&code| Status::from_wire(code).is_ok_and(|status| status as u16 == code))
            .collect();
        assert_eq!(known, [0, 1, 2]);
        assert!((3..=u16::MAX).all(|code| Status::from_wire(code).is_err()));
    }

    #[test]
    fn only_an_ok_passes_and_everything_else_is_the_callers_error() {
        let sending = || MigratableError::MigrateSend(anyhow::anyhow!("sending state"));
        assert_eq!(Response::new(Status::Ok, 7).ok_or_fatal_error(sending()).ok().unwrap().length(), 7);
        for status in [Status::Invalid, Status::Error] {
            let error = Response::new(status, 0).ok_or_fatal_error(sending()).err().unwrap();
            assert!(
                matches!(error, MigratableError::MigrateSend(cause) if cause.to_string() == "sending state")
            );
        }
    }

    #[test]
    fn a_response_has_the_size_it_has_on_the_wire() {
        assert_eq!(size_of::<Response>(), Header::BYTES);
    }
}
