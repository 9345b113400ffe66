// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`PieceError`]: why a piece of a device's state cannot be taken in.

use thiserror::Error;

use crate::transfer::limits::PIECES_AHEAD;
use crate::units::Count;

/// What is wrong with a piece of a device's state, or with all of them together.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PieceError {
    /// It is of a device that was not listed.
    #[error("Piece is of device {device}, and {} listed", Count(.devices, "device"))]
    NoSuchDevice {
        /// The device's number.
        device: u16,
        /// How many were listed.
        devices: usize,
    },
    /// It is of another version than was agreed on.
    #[error("Piece of device {name:?} has stream version {version} and should have {expected}")]
    Version {
        /// The device.
        name: String,
        /// What it says.
        version: u32,
        /// What was agreed on.
        expected: u32,
    },
    /// It is of a session that another one has followed.
    #[error("Piece of device {name:?} is of session {session}, and session {now} has begun")]
    OldSession {
        /// The device.
        name: String,
        /// What it says.
        session: u32,
        /// The latest.
        now: u32,
    },
    /// It came before.
    #[error("Piece {index} of device {name:?} came twice")]
    Twice {
        /// The device.
        name: String,
        /// Its index.
        index: u64,
    },
    /// It is further ahead than a source may send it: one before it was dropped, or is very late.
    #[error(
        "Piece {index} of device {name:?} came while piece {next} is missing, which is more than {PIECES_AHEAD} before it"
    )]
    TooFarAhead {
        /// The device.
        name: String,
        /// Its index.
        index: u64,
        /// The first that did not come.
        next: u64,
    },
    /// It does not begin where the one before it ended.
    #[error(
        "Piece {index} of device {name:?} begins at byte {position}, and {expected} bytes came before it"
    )]
    Position {
        /// The device.
        name: String,
        /// Its index.
        index: u64,
        /// Where it says to begin.
        position: u64,
        /// Where it should.
        expected: u64,
    },
    /// It follows the last one.
    #[error("Piece {index} of device {name:?} follows its last one")]
    AfterEnd {
        /// The device.
        name: String,
        /// Its index.
        index: u64,
    },
    /// The stream is longer than allowed.
    #[error("Stream of device {name:?} is longer than {} (PeerLimits::device_stream_bytes)", Count(.limit_bytes, "byte"))]
    TooLong {
        /// The device.
        name: String,
        /// The limit.
        limit_bytes: u64,
    },
    /// The stream began more often than allowed.
    #[error("Stream of device {name:?} begins anew, and it has begun {} (PeerLimits::device_sessions)", Count(.limit, "time"))]
    TooManySessions {
        /// The device.
        name: String,
        /// The limit.
        limit: u32,
    },
    /// More are held, those that wait for their turn among them, than may be.
    #[error("Pieces of device state that are held have more than {} (PeerLimits::device_queue_bytes)", Count(.limit_bytes, "byte"))]
    QueueFull {
        /// The limit.
        limit_bytes: u64,
    },
    /// State came, and pieces did not.
    #[error("Piece {next} of device {name:?} never came")]
    Missing {
        /// The device.
        name: String,
        /// The first that did not come.
        next: u64,
    },
}
