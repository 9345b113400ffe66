// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can be wrong with a message.

use std::io;
use std::ops::RangeInclusive;

use thiserror::Error;

use super::Command;
use crate::MigratableError;

/// Says what is wrong with a message that was read.
#[derive(Debug, Error)]
pub(super) enum WireError {
    #[error("Connection closed after {received} of {expected} bytes of {message}")]
    Truncated { message: &'static str, received: u64, expected: u64 },

    #[error("Request has unknown command {command}")]
    UnknownCommand { command: u16 },

    #[error("Response has unknown status {status}")]
    UnknownStatus { status: u16 },

    #[error("Connection announces unknown role {role}")]
    UnknownRole { role: u16 },

    #[error("Sender speaks protocol version {version}, supported are {} to {}", supported.start(), supported.end())]
    UnsupportedVersion { version: u16, supported: RangeInclusive<u16> },

    #[error("Only a Start request carries a protocol version, not {command:?}")]
    NotStart { command: Command },

    #[error("Length of memory range table, {length}, is not a multiple of {range_bytes} bytes")]
    RaggedTable { length: u64, range_bytes: u64 },

    #[error("Length of memory range table, {length}, exceeds limit of {limit} bytes")]
    OversizedTable { length: u64, limit: u64 },
}

impl WireError {
    /// A message that cannot be is the receiver's to refuse.
    ///
    /// No `From`: a second conversion into [`MigratableError`] would leave the error type open in code that counts on the sole
    /// one, from itself.
    pub(super) fn refused(self) -> MigratableError {
        MigratableError::MigrateReceive(self.into())
    }
}

/// Makes the error for a stream that ended inside `message`, after `received` of `expected` bytes.
pub(super) fn truncated(message: &'static str, received: u64, expected: u64) -> MigratableError {
    let error = WireError::Truncated { message, received, expected };
    MigratableError::MigrateSocket(io::Error::new(io::ErrorKind::UnexpectedEof, error))
}
