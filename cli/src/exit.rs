// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Exit statuses, by class of failure.

use std::process::ExitCode;

/// Why the tool ends. Documented in the README; scripts rely on the numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// The command line makes no sense, or asks for more than the host has.
    Usage = 2,
    /// The other side, or the way to it, failed; a source's VM runs on.
    Peer = 3,
    /// Something on this host failed: a file, a process, a socket.
    Io = 4,
    /// What arrived is not what was sent.
    Verification = 5,
    /// Given up on request.
    Cancelled = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}
