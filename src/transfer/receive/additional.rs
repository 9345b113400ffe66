// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An additional connection: Memory, one after the other, until its end.

use std::sync::Arc;
use std::time::Duration;

use super::connections::Entry;
use super::context::{Context, TICK};
use super::error::{Part, ReceiveError, Step};
use super::message::{answer, decode, refuse_and_close, take_device_state, take_memory};
use super::phase_gate::Ticket;
use crate::error::Chain;
use crate::transfer::connection::{Connection, Head};
use crate::transfer::frame::{Command, Request, Response, Status};

/// Serves an additional connection whose role was read; it is the source's from its first message on, and a failure ends the
/// migration.
///
/// # Errors
/// What came first is not a message of an additional connection: the caller is a stranger, such as another source that sends
/// Start. It is still to be refused, and the migration goes on.
pub(super) fn serve(
    mut connection: Connection,
    entry: Entry,
    context: Context<'_>,
) -> Result<(), Box<(Connection, ReceiveError)>> {
    let Context { gate, limits, .. } = context;
    let first = match next_request(&mut connection, context) {
        Ok(Some(first)) => first,
        Ok(None) => {
            connection.close(Duration::ZERO);
            return Ok(());
        }
        Err(error) => return Err(Box::new((connection, error))),
    };
    entry.admit();
    let mut under_way = None;
    let connected = gate.connect(limits.connections);
    let outcome = connected.and_then(|()| take_all(first, &mut connection, context, &mut under_way));
    // From here on its own time limits end it: the end of the migration need not close it.
    drop(entry);
    match outcome {
        Ok(()) => connection.close(Duration::ZERO),
        Err(error) => {
            log::debug!("Connection from {} failed: {}", connection.peer(), Chain(&error));
            // Report the failure while the Memory that was cut off still counts as under way, so that State cannot pass it.
            gate.fail(error);
            drop(under_way);
            refuse_and_close(connection, limits.linger);
        }
    }
    Ok(())
}

/// Keeps a connection for page faults, which anybody can open, until State shows whether the source waits on it.
///
/// # Errors
/// The peer sends something before it is asked to, so it is a stranger, and still to be refused.
pub(super) fn keep_fault(
    mut connection: Connection,
    context: Context<'_>,
) -> Result<(), Box<(Connection, ReceiveError)>> {
    let fault = context.gate.enter_fault();
    let said = next_request(&mut connection, context);
    drop(fault);
    let error = match said {
        Ok(None) => return Ok(()),
        Ok(Some(request)) => ReceiveError::OutOfOrder { command: request.command(), step: Step::Config },
        Err(error) => error,
    };
    Err(Box::new((connection, error)))
}

/// Takes Memory, `first` first, until the source closes the connection or the migration is over.
///
/// A Memory that fails stays `under_way`.
fn take_all<'a>(
    first: Request,
    connection: &mut Connection,
    context: Context<'a>,
    under_way: &mut Option<Ticket<'a>>,
) -> Result<(), ReceiveError> {
    let Context { gate, limits, .. } = context;
    let (mut buffer, mut next) = (Vec::new(), Some(first));
    while let Some(request) = next {
        let devices = gate.devices();
        check_memory(request, devices.is_some())?;
        let store = Arc::clone(&under_way.insert(gate.enter()?).store);
        match devices {
            Some(devices) if request.command() == Command::DeviceState => {
                take_device_state(connection, request, &devices, limits)?;
            }
            _ => take_memory(connection, request, store.as_ref(), gate, limits, &mut buffer)?,
        }
        answer(connection, request.command(), Response::new(Status::Ok), &[])?;
        under_way.take().into_iter().for_each(Ticket::done);
        next = next_request(connection, context)?;
    }
    Ok(())
}

/// Waits for a request, without a limit of its own: the main connection ends the wait. `None` at the end.
fn next_request(connection: &mut Connection, context: Context<'_>) -> Result<Option<Request>, ReceiveError> {
    while !context.gate.is_over() {
        let head = connection.await_head(TICK);
        match head.map_err(|source| ReceiveError::Read { part: Part::Head, source })? {
            Head::Bytes(head) => return decode(head).map(Some),
            Head::End => return Ok(None),
            Head::Silence => {}
        }
    }
    Ok(None)
}

fn check_memory(request: Request, takes_devices: bool) -> Result<(), ReceiveError> {
    match request.command() {
        Command::Memory => Ok(()),
        Command::DeviceState if takes_devices => Ok(()),
        Command::PageFault => Err(ReceiveError::Postcopy),
        command => Err(ReceiveError::NotMemory { command }),
    }
}
