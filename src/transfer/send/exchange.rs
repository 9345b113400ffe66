// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The source's half of an exchange: a request goes out, an answer comes back.

use std::io::{self, BufWriter, Read, Write};
use std::time::Duration;

use thiserror::Error;
use vm_memory::GuestMemoryBackend;

use super::payload::StatePayload;
use crate::device::StreamIdentity;
use crate::range::GpaRange;
use crate::transfer::connection::{Connection, ConnectionError, Head, Look};
use crate::transfer::frame::{
    Command, DEVICE_LIST_LIMIT_BYTES, DeviceFrameError, Features, FrameError, HEADER_BYTES, RANGE_BYTES,
    RECEIVER_LIMITS_BYTES, ReceiverLimits, Request, Response, Status, decode_devices, encode_ranges,
};
use crate::units::Count;

/// Payloads up to this size go out in one piece with their header.
const SMALL_BYTES: usize = 64 << 10;

/// Why an exchange with a receiver failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PeerError {
    /// There is no connection.
    #[error("Receiver cannot be reached")]
    Connection(#[from] ConnectionError),
    /// The connection failed or stalled.
    #[error("Connection failed")]
    Io(#[from] io::Error),
    /// The receiver closed the connection instead of answering.
    #[error("Receiver closed the connection without an answer")]
    Closed,
    /// The receiver did not answer in time.
    #[error("Receiver did not answer for {:.3} s", .waited.as_secs_f64())]
    Silent {
        /// How long it was waited for.
        waited: Duration,
    },
    /// The receiver answered with an Error.
    #[error("Receiver refused")]
    Refused,
    /// The answer is none.
    #[error("Receiver answered with something else")]
    Frame(#[from] FrameError),
    /// What is said of devices is none.
    #[error("List of devices makes no sense")]
    Devices(#[from] DeviceFrameError),
    /// The receiver spoke while no request was waiting for its answer: what it says next could answer anything.
    #[error("Receiver answered what was not asked")]
    Unasked,
    /// The answer claims a payload that it cannot have.
    #[error("Receiver's answer claims a payload of {}", Count(.bytes, "byte"))]
    Payload {
        /// What it claims.
        bytes: u64,
    },
}

/// Sends `request` with its payload.
pub(super) fn send(connection: &mut Connection, request: Request, payload: &[u8]) -> Result<(), PeerError> {
    let header = request.to_bytes();
    if payload.len() <= SMALL_BYTES {
        connection.write_all(&[&header, payload].concat())?;
    } else {
        connection.write_all(&header)?;
        connection.write_all(payload)?;
    }
    Ok(connection.flush()?)
}

/// Sends a State, small pieces of it together.
pub(super) fn send_state(connection: &mut Connection, state: &StatePayload) -> Result<(), PeerError> {
    let request = Request::new(Command::State, state.bytes());
    let mut pieces = BufWriter::with_capacity(SMALL_BYTES, &mut *connection);
    let sent = pieces.write_all(&request.to_bytes()).and_then(|()| state.write_to(&mut pieces));
    let sent = sent.and_then(|()| pieces.flush());
    // What a failure left over is not to be sent once more.
    drop(pieces.into_parts());
    Ok(sent?)
}

/// Sends a Memory: the table of `ranges` and their bytes, straight from `memory`. `table` is a buffer to reuse.
pub(super) fn send_memory<M: GuestMemoryBackend>(
    connection: &mut Connection,
    memory: &M,
    ranges: &[GpaRange],
    table: &mut Vec<u8>,
) -> Result<(), PeerError> {
    let table_bytes = (ranges.len() * RANGE_BYTES) as u64;
    table.clear();
    table.extend_from_slice(&Request::new(Command::Memory, table_bytes).to_bytes());
    encode_ranges(ranges.iter().copied(), table);
    connection.write_all(table)?;
    connection.send_guest(memory, ranges.iter().copied())?;
    Ok(connection.flush()?)
}

/// Checks that the receiver has said nothing, where no request of this side is without its answer.
///
/// An answer too many would pass for the one to the next request, and so, in the end, for the one to the Complete.
pub(super) fn expect_silence(connection: &mut Connection) -> Result<(), PeerError> {
    match connection.look()? {
        Look::Silence => Ok(()),
        Look::Bytes => Err(PeerError::Unasked),
        Look::End => Err(PeerError::Closed),
    }
}

/// Reads the answer to the oldest request that has none, and waits no longer than `within` for it to begin.
///
/// # Errors
/// [`PeerError::Refused`] is an answer, too; after any other error nobody knows what the receiver did.
pub(super) fn read_answer(connection: &mut Connection, within: Duration) -> Result<Response, PeerError> {
    let response = read_response(connection, within)?;
    match response.length() {
        0 => Ok(response),
        bytes => Err(PeerError::Payload { bytes }),
    }
}

/// Reads the answer to a Start that offers `offered`: what of it the receiver agrees to, and the limits that it tells with it.
///
/// # Errors
/// As [`read_answer`].
pub(super) fn read_start_answer(
    connection: &mut Connection,
    offered: Features,
    within: Duration,
) -> Result<(Features, Option<ReceiverLimits>), PeerError> {
    let response = read_response(connection, within)?;
    let agreed = response.agreed().unwrap_or_default() & offered;
    match (agreed.contains(Features::LIMITS), response.length()) {
        (false, 0) => Ok((agreed, None)),
        (true, bytes) if bytes == RECEIVER_LIMITS_BYTES as u64 => {
            let mut limits = [0; RECEIVER_LIMITS_BYTES];
            connection.read_exact(&mut limits)?;
            Ok((agreed, Some(ReceiverLimits::from_bytes(limits))))
        }
        (_, bytes) => Err(PeerError::Payload { bytes }),
    }
}

/// Reads the answer to a Devices: the receiver's devices.
///
/// # Errors
/// As [`read_answer`], or they are too many, or not a list.
pub(super) fn read_devices_answer(
    connection: &mut Connection,
    within: Duration,
) -> Result<Vec<StreamIdentity>, PeerError> {
    let bytes = read_response(connection, within)?.length();
    if bytes > DEVICE_LIST_LIMIT_BYTES {
        return Err(PeerError::Payload { bytes });
    }
    let mut list = Vec::new();
    connection.read_payload(bytes, &mut list)?;
    Ok(decode_devices(&list)?)
}

/// Reads an answer that is no refusal; its payload, if there is one, follows.
fn read_response(connection: &mut Connection, within: Duration) -> Result<Response, PeerError> {
    let bytes = match connection.await_head::<HEADER_BYTES>(within)? {
        Head::Bytes(bytes) => bytes,
        Head::Silence => return Err(PeerError::Silent { waited: within }),
        Head::End => return Err(PeerError::Closed),
    };
    let response = Response::from_bytes(bytes)?;
    match response.status() {
        Status::Error => Err(PeerError::Refused),
        Status::Ok => Ok(response),
    }
}
