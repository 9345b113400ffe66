// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can go wrong with a vfio-user device, each kind with the device's name.

use std::io;

use super::decode::DecodeError;
use super::message::VfioUserCommand;
use crate::range::IovaRange;

/// Says what made a client drop its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BrokenBy {
    /// A request was not answered in time.
    #[error("{0} was not answered in time")]
    Timeout(VfioUserCommand),
    /// The server hung up.
    #[error("The server closed the connection during {0}")]
    Disconnected(VfioUserCommand),
    /// The socket failed.
    #[error("The socket failed during {0}")]
    Socket(VfioUserCommand),
    /// An answer was not what the protocol says.
    #[error("{0} was answered with a malformed message")]
    Malformed(VfioUserCommand),
    /// A request of the server could not be served.
    #[error("A request of the server could not be served")]
    Serving,
    /// The thread that made a request panicked before it had the answer.
    #[error("{0} was left unfinished")]
    Interrupted(VfioUserCommand),
}

/// Says why a request of the server could not be served. A request that is merely refused is served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The rest of the request did not come, or its reply was not taken, in time.
    #[error("It was not complete within {timeout_ms} ms")]
    Timeout {
        /// The time it had.
        timeout_ms: u128,
    },
    /// The server's end of the socket is gone.
    #[error("The server closed its connection")]
    Disconnected,
    /// The socket failed in another way.
    #[error("The socket failed")]
    Socket(#[source] io::Error),
    /// The message is no request.
    #[error("It is a malformed message")]
    Malformed(#[source] DecodeError),
}

/// Describes a request to a vfio-user device that failed.
///
/// Only where [`Error::leaves_connection_usable`] is the connection still in step with the server. After any other kind it
/// is shut down, and each further request fails with [`Error::Broken`], which says what came first.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The server answered with an error; zero when it named none.
    #[error("vfio-user device {device} refused {command} with {}", errno_text(*.errno))]
    Refused {
        /// The device's name.
        device: String,
        /// The request.
        command: VfioUserCommand,
        /// The server's errno.
        errno: i32,
    },
    /// The answer was not complete in time.
    #[error("vfio-user device {device} did not answer {command} within {timeout_ms} ms")]
    Timeout {
        /// The device's name.
        device: String,
        /// The request.
        command: VfioUserCommand,
        /// The time it had.
        timeout_ms: u128,
    },
    /// The server's end of the socket is gone.
    #[error("vfio-user device {device} closed its connection during {command}")]
    Disconnected {
        /// The device's name.
        device: String,
        /// The request.
        command: VfioUserCommand,
    },
    /// The socket failed in another way.
    #[error("Cannot exchange {command} with vfio-user device {device}")]
    Socket {
        /// The device's name.
        device: String,
        /// The request.
        command: VfioUserCommand,
        /// The failed system call's error.
        source: io::Error,
    },
    /// The answer is not what the protocol says.
    #[error("vfio-user device {device} answered {command} with a malformed message")]
    Malformed {
        /// The device's name.
        device: String,
        /// The request.
        command: VfioUserCommand,
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
    /// The memory to map is not made of whole pages; nothing was sent.
    #[error(
        "vfio-user device {device} cannot be given {iova}: it is not made of whole pages of {page_bytes} bytes"
    )]
    NotWholePages {
        /// The device's name.
        device: String,
        /// The memory.
        iova: IovaRange,
        /// The page size proposed when the client connected.
        page_bytes: u64,
    },
    /// A part of the memory to map is mapped already; nothing was sent.
    #[error("vfio-user device {device} cannot be given {iova}: it has {mapped} already")]
    AlreadyMapped {
        /// The device's name.
        device: String,
        /// The memory.
        iova: IovaRange,
        /// What it shares IOVAs with.
        mapped: IovaRange,
    },
    /// A request that the server made could not be served.
    #[error("Cannot serve a request of vfio-user device {device}")]
    Serve {
        /// The device's name.
        device: String,
        /// Why.
        source: ServeError,
    },
    /// The connection was dropped earlier; nothing was sent.
    #[error("vfio-user device {device} is lost: its connection was dropped")]
    Broken {
        /// The device's name.
        device: String,
        /// Why it was dropped.
        source: BrokenBy,
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
        self.broken_by().is_none()
    }

    /// Returns what a later request is told, when the connection carries none any more.
    pub(super) fn broken_by(&self) -> Option<BrokenBy> {
        match self {
            Error::Refused { .. }
            | Error::TooLarge { .. }
            | Error::NotWholePages { .. }
            | Error::AlreadyMapped { .. } => None,
            Error::Timeout { command, .. } => Some(BrokenBy::Timeout(*command)),
            Error::Disconnected { command, .. } => Some(BrokenBy::Disconnected(*command)),
            Error::Socket { command, .. } => Some(BrokenBy::Socket(*command)),
            Error::Malformed { command, .. } => Some(BrokenBy::Malformed(*command)),
            Error::Serve { .. } => Some(BrokenBy::Serving),
            Error::Broken { source, .. } => Some(*source),
        }
    }
}

fn errno_text(errno: i32) -> String {
    match errno {
        0 => "an error it did not name".to_owned(),
        errno => io::Error::from_raw_os_error(errno).to_string(),
    }
}
