// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Exit statuses, by class of failure.

use std::process::ExitCode;

use serde::Serialize;

/// Why the tool ends. Documented in `docs/cli.md`; scripts rely on the numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub(crate) enum Exit {
    /// Two snapshots that were compared differ.
    Different = 1,
    /// The command line makes no sense, or asks for more than the host has.
    Usage = 2,
    /// The other side, or the way to it, failed; a source's VM runs on.
    Peer = 3,
    /// Something on this host failed: a file, a process, a socket.
    Io = 4,
    /// What arrived, or lies on disk, is not what was sent or written.
    Verification = 5,
    /// The last message of a migration went unanswered, so that its VM may be on either side; or a VM that got all its memory may have ended.
    OutcomeUnknown = 6,
    /// Given up on request.
    Cancelled = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}
