// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An additional connection: Memory, one after the other, until its end.

use std::sync::Arc;
use std::time::Duration;

use super::error::{Part, ReceiveError};
use super::gate::Ticket;
use super::message::{answer, decode, refuse, take_memory};
use super::roster::Entry;
use super::session::{Context, TICK};
use crate::transfer::connection::{Connection, Head};
use crate::transfer::frame::{Command, HEADER_BYTES, Request, Response, Status};

/// Serves an additional connection whose role was read; a failure ends the migration.
pub(super) fn serve(mut connection: Connection, entry: Entry, context: Context<'_>) {
    let Context { gate, limits, .. } = context;
    let mut under_way = None;
    let connected = gate.connect(limits.connections);
    let outcome = connected.and_then(|()| take_all(&mut connection, context, &mut under_way));
    // Bounded by itself from here on: the end of the migration need not close it.
    drop(entry);
    match outcome {
        Ok(()) => connection.close(Duration::ZERO),
        Err(error) => {
            log::debug!("Connection from {} failed: {}", connection.peer(), error.in_full());
            // While the Memory it cut off is under way: State does not get in between.
            gate.fail(error);
            drop(under_way);
            refuse(&mut connection, limits.linger);
            connection.close(limits.linger);
        }
    }
}

/// Takes Memory until the source closes the connection or the migration is over.
///
/// A Memory that fails stays `under_way`.
fn take_all<'a>(
    connection: &mut Connection,
    context: Context<'a>,
    under_way: &mut Option<Ticket<'a>>,
) -> Result<(), ReceiveError> {
    let Context { gate, limits, .. } = context;
    let mut buffer = Vec::new();
    while let Some(head) = await_head(connection, context)? {
        let request = memory_of(head)?;
        let store = Arc::clone(&under_way.insert(gate.enter()?).store);
        take_memory(connection, request, store.as_ref(), gate, limits, &mut buffer)?;
        answer(connection, request.command(), Response::new(Status::Ok))?;
        under_way.take().into_iter().for_each(Ticket::done);
    }
    Ok(())
}

/// Waits for a request's head; the main connection sees to it that this ends.
fn await_head(
    connection: &mut Connection,
    context: Context<'_>,
) -> Result<Option<[u8; HEADER_BYTES]>, ReceiveError> {
    while !context.gate.is_over() {
        let head = connection.await_head(TICK);
        match head.map_err(|source| ReceiveError::Read { part: Part::Head, source })? {
            Head::Bytes(head) => return Ok(Some(head)),
            Head::End => return Ok(None),
            Head::Silence => {}
        }
    }
    Ok(None)
}

fn memory_of(head: [u8; HEADER_BYTES]) -> Result<Request, ReceiveError> {
    let request = decode(head)?;
    match request.command() {
        Command::Memory => Ok(request),
        Command::PageFault => Err(ReceiveError::Postcopy),
        command => Err(ReceiveError::NotMemory { command }),
    }
}
