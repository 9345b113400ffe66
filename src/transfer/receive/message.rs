// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Reads messages from a connection, checking each length against its limit first, and answers them.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::device_streams::DeviceStreams;
use super::error::{Part, ReceiveError};
use super::phase_gate::PhaseGate;
use super::store::{PageStore, Pages};
use super::tables::kept;
use crate::device::StreamIdentity;
use crate::transfer::connection::Connection;
use crate::transfer::frame::{
    Command, DEVICE_LIST_LIMIT_BYTES, HEADER_BYTES, MemoryTable, PIECE_HEAD_BYTES, RANGE_BYTES, Request,
    Response, Status, decode_devices, open_piece,
};
use crate::transfer::limits::{GUEST_PAGE_BYTES, PeerLimits};

/// Bytes of the payload of a MemoryFd: the slot.
const SLOT_BYTES: usize = 4;

pub(super) fn decode(head: [u8; HEADER_BYTES]) -> Result<Request, ReceiveError> {
    Request::from_bytes(head).map_err(|source| ReceiveError::Frame { part: Part::Head, source })
}

/// Checks that a message without a payload announces none.
pub(super) fn check_empty(request: Request) -> Result<(), ReceiveError> {
    let (command, length) = (request.command(), request.length());
    if length == 0 { Ok(()) } else { Err(ReceiveError::Payload { command, length }) }
}

/// Reads the JSON text of a Config or State.
pub(super) fn read_text(
    connection: &mut Connection,
    request: Request,
    limits: &PeerLimits,
) -> Result<Vec<u8>, ReceiveError> {
    let (name, limit) = match request.command() {
        Command::Config => ("config_bytes", limits.config_bytes),
        _ => ("state_bytes", limits.state_bytes),
    };
    check_length(request, name, limit)?;
    let mut text = Vec::new();
    let part = Part::Payload(request.command());
    let read = connection.read_payload(request.length(), &mut text);
    read.map_err(|source| ReceiveError::Read { part, source })?;
    Ok(text)
}

/// Reads the slot and the descriptor of a MemoryFd.
pub(super) fn read_descriptor(
    connection: &mut Connection,
    request: Request,
) -> Result<(u32, OwnedFd), ReceiveError> {
    let (command, length) = (request.command(), request.length());
    if length != SLOT_BYTES as u64 {
        return Err(ReceiveError::Payload { command, length });
    }
    let read = connection.read_with_descriptors::<SLOT_BYTES>();
    let (slot, descriptors) =
        read.map_err(|source| ReceiveError::Read { part: Part::Payload(command), source })?;
    let (slot, found) = (u32::from_le_bytes(slot), descriptors.len());
    match <[OwnedFd; 1]>::try_from(descriptors) {
        Ok([memory]) => Ok((slot, memory)),
        Err(_) => Err(ReceiveError::SlotDescriptors { slot, found }),
    }
}

/// Reads the list of the source's devices.
pub(super) fn read_devices(
    connection: &mut Connection,
    request: Request,
) -> Result<Vec<StreamIdentity>, ReceiveError> {
    check_length(request, "DEVICE_LIST_LIMIT_BYTES", DEVICE_LIST_LIMIT_BYTES)?;
    let mut list = Vec::new();
    let part = Part::Payload(request.command());
    let read = connection.read_payload(request.length(), &mut list);
    read.map_err(|source| ReceiveError::Read { part, source })?;
    Ok(decode_devices(&list)?)
}

/// Takes one piece of a device's state.
pub(super) fn take_device_state(
    connection: &mut Connection,
    request: Request,
    devices: &DeviceStreams,
    limits: &PeerLimits,
) -> Result<(), ReceiveError> {
    let limit = limits.device_piece_bytes.saturating_add(PIECE_HEAD_BYTES as u64);
    check_length(request, "device_piece_bytes", limit)?;
    let mut payload = devices.admit(request.length())?;
    let part = Part::Payload(request.command());
    let read = connection.read_payload(request.length(), &mut payload);
    read.map_err(|source| ReceiveError::Read { part, source })?;
    devices.take(open_piece(&payload)?, payload)
}

/// Takes one Memory: its table into `buffer`, its pages into `store`.
pub(super) fn take_memory(
    connection: &mut Connection,
    request: Request,
    store: &dyn PageStore,
    gate: &PhaseGate,
    limits: &PeerLimits,
    buffer: &mut Vec<u8>,
) -> Result<(), ReceiveError> {
    let bad_table = |source| ReceiveError::Frame { part: Part::Table, source };
    check_length(request, "table_bytes", limits.table_bytes)?;
    MemoryTable::check_length(request.length()).map_err(bad_table)?;
    check_ranges(request, store)?;
    let _share = gate.tables.take(request.length(), limits.table_bytes)?;
    let read = connection.read_payload(request.length(), buffer);
    read.map_err(|source| ReceiveError::Read { part: Part::Table, source })?;
    let table = MemoryTable::parse(std::mem::take(buffer), store.layout()).map_err(bad_table)?;
    take_pages(connection, &table, store)?;
    gate.count(table.ranges().len(), table.memory_bytes());
    *buffer = kept(table.into_buffer());
    Ok(())
}

fn take_pages(
    connection: &mut Connection,
    table: &MemoryTable,
    store: &dyn PageStore,
) -> Result<(), ReceiveError> {
    let mut pages = Pages::new(connection, table.memory_bytes());
    match store.fill(table, &mut pages) {
        Err(source) if pages.failed() => Err(ReceiveError::Read { part: Part::Pages, source }),
        Err(source) => Err(ReceiveError::Store { source }),
        Ok(()) if pages.left() > 0 => Err(ReceiveError::Unread { bytes: pages.left() }),
        Ok(()) => Ok(()),
    }
}

/// Answers a request; `payload` follows the answer.
pub(super) fn answer(
    connection: &mut Connection,
    command: Command,
    answer: Response,
    payload: &[u8],
) -> Result<(), ReceiveError> {
    let answer = answer.with_payload(payload.len() as u64).to_bytes();
    let sent = connection.write_all(&[&answer, payload].concat()).and_then(|()| connection.flush());
    sent.map_err(|source| ReceiveError::Answer { command, source })
}

/// Answers a request with Error. If that cannot be sent, the end of the connection tells the peer.
///
/// A peer that stalled has used up its time, so the answer has a limit of its own: `within`.
pub(super) fn refuse(connection: &mut Connection, within: Duration) {
    let _ = connection.send_within(&Response::new(Status::Error).to_bytes(), within);
}

/// Answers a request with Error, and closes the connection.
pub(super) fn refuse_and_close(mut connection: Connection, linger: Duration) {
    refuse(&mut connection, linger);
    connection.close(linger);
}

/// Checks that a table has at most a range for each page, before it takes memory.
fn check_ranges(request: Request, store: &dyn PageStore) -> Result<(), ReceiveError> {
    let ranges = request.length() / RANGE_BYTES as u64;
    let pages = store.layout().bytes() / GUEST_PAGE_BYTES;
    if ranges <= pages { Ok(()) } else { Err(ReceiveError::TooManyRanges { ranges, pages }) }
}

fn check_length(request: Request, name: &'static str, limit: u64) -> Result<(), ReceiveError> {
    let (command, length) = (request.command(), request.length());
    if length <= limit { Ok(()) } else { Err(ReceiveError::TooLong { command, length, name, limit }) }
}
