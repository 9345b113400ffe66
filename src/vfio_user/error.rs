// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can go wrong with a vfio-user device, each kind with the device's name.

use std::io;

use super::message::Command;

/// Describes bytes that are not the message they should be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The message ends before its fixed part or its announced data does.
    #[error("{what} needs {needed} bytes, {have} were sent")]
    TooShort {
        /// The structure that was being read.
        what: &'static str,
        /// Bytes it needs.
        needed: usize,
        /// Bytes there were.
        have: usize,
    },
    /// A number in the message is larger than this side accepts.
    #[error("{what} is {value}, the limit is {limit}")]
    OverLimit {
        /// The field.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The limit it exceeds.
        limit: u64,
    },
    /// A field does not hold the one value it may have here.
    #[error("{what} is {value:#x} where {expected:#x} is due")]
    Unexpected {
        /// The field.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The value it should have.
        expected: u64,
    },
    /// A field holds a value that means nothing.
    #[error("{what} {value:#x} is not valid")]
    Invalid {
        /// The field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// The version data is not a JSON object of capabilities.
    #[error("Version data is not a JSON object of capabilities")]
    Capabilities(#[source] serde_json::Error),
}

/// Describes a request to a vfio-user device that failed.
///
/// Only after [`Error::Refused`] and [`Error::TooLarge`] is the connection still in step with the server; after any
/// other kind each further request fails with [`Error::Broken`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The server answered with an error; zero when it named none.
    #[error("vfio-user device {device} refused {command} with {}", errno_text(*.errno))]
    Refused {
        /// The device's name.
        device: String,
        /// The request.
        command: Command,
        /// The server's errno.
        errno: i32,
    },
    /// The answer was not complete in time.
    #[error("vfio-user device {device} did not answer {command} within {timeout_ms} ms")]
    Timeout {
        /// The device's name.
        device: String,
        /// The request.
        command: Command,
        /// The time it had.
        timeout_ms: u128,
    },
    /// The server's end of the socket is gone.
    #[error("vfio-user device {device} closed its connection during {command}")]
    Disconnected {
        /// The device's name.
        device: String,
        /// The request.
        command: Command,
    },
    /// The socket failed in another way.
    #[error("Cannot exchange {command} with vfio-user device {device}")]
    Socket {
        /// The device's name.
        device: String,
        /// The request.
        command: Command,
        /// The failed system call's error.
        source: io::Error,
    },
    /// The answer is not what the protocol says.
    #[error("vfio-user device {device} answered {command} with a malformed message")]
    Malformed {
        /// The device's name.
        device: String,
        /// The request.
        command: Command,
        /// What is wrong with it.
        source: DecodeError,
    },
    /// The request would need more than one message may hold; nothing was sent.
    #[error("{what} of {value} for vfio-user device {device} is over the limit of {limit}")]
    TooLarge {
        /// The device's name.
        device: String,
        /// What is too large.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The limit it exceeds.
        limit: u64,
    },
    /// An earlier request left the connection out of step; nothing was sent.
    #[error("Cannot send {command} to vfio-user device {device}: an earlier request was left unfinished")]
    Broken {
        /// The device's name.
        device: String,
        /// The request.
        command: Command,
    },
}

impl Error {
    /// Returns the server's errno when the server refused the request.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// Tells whether the connection can carry further requests.
    pub fn leaves_connection_usable(&self) -> bool {
        matches!(self, Error::Refused { .. } | Error::TooLarge { .. })
    }
}

fn errno_text(errno: i32) -> String {
    match errno {
        0 => "an error it did not name".to_owned(),
        errno => io::Error::from_raw_os_error(errno).to_string(),
    }
}
