// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests to a receiver, each answered before the next.

use std::io::Write;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::error::LocalSendError;
use super::handle::LocalSenderHandle;
use crate::transfer::connection::{Connection, Head};
use crate::transfer::frame::{Command, HEADER_BYTES, Request, Response, Status};
use crate::transfer::limits::PeerLimits;

/// How often a wait for an answer looks whether the VM is still to be sent.
const TICK: Duration = Duration::from_millis(50);

/// A receiver that refuses State after that long has waited for the connection to ask for pages on; Cloud Hypervisor does for 30 s.
const WAITED_FOR_FAULTS: Duration = Duration::from_secs(25);

/// The main connection to a receiver.
pub(super) struct Exchange<'a> {
    pub(super) connection: Connection,
    pub(super) limits: &'a PeerLimits,
    pub(super) handle: &'a LocalSenderHandle,
}

impl Exchange<'_> {
    /// Begins a migration.
    pub(super) fn start(&mut self) -> Result<(), LocalSendError> {
        self.send(Request::start(), &[])
    }

    /// Passes the memory of a slot; the descriptor rides on the payload's bytes.
    pub(super) fn memory(&mut self, slot: u32, memory: BorrowedFd<'_>) -> Result<(), LocalSendError> {
        let command = Command::MemoryFd;
        let number = slot.to_le_bytes();
        let head = Request::new(command, number.len() as u64).to_bytes();
        self.connection
            .write_all(&head)
            .and_then(|()| self.connection.write_with_descriptor(&number, memory))
            .map_err(|source| LocalSendError::Line { command, source })?;
        self.await_ok(command)
    }

    /// Sends a request with its payload and waits until it is answered with Ok.
    pub(super) fn ask(&mut self, command: Command, payload: &[u8]) -> Result<(), LocalSendError> {
        self.send(Request::new(command, payload.len() as u64), payload)
    }

    /// Tells the receiver to drop the VM, whether or not it hears of it.
    pub(super) fn abandon(&mut self) {
        let _it_may_be_gone = self.connection.write_all(&Request::new(Command::Abandon, 0).to_bytes());
    }

    fn send(&mut self, request: Request, payload: &[u8]) -> Result<(), LocalSendError> {
        let (command, connection) = (request.command(), &mut self.connection);
        let sent = connection.write_all(&request.to_bytes()).and_then(|()| connection.write_all(payload));
        sent.map_err(|source| LocalSendError::Line { command, source })?;
        self.await_ok(command)
    }

    fn await_ok(&mut self, command: Command) -> Result<(), LocalSendError> {
        let is_last = matches!(command, Command::Complete | Command::CompletePaused);
        let limit = if is_last { self.limits.complete_timeout } else { self.limits.answer_timeout };
        let began = Instant::now();
        loop {
            if !is_last || self.handle.is_aborted() {
                self.handle.check()?;
            }
            let head = self.connection.await_head::<HEADER_BYTES>(TICK);
            match head.map_err(|source| LocalSendError::Line { command, source })? {
                Head::Bytes(bytes) => return check_answer(command, bytes, began.elapsed()),
                Head::End => return Err(LocalSendError::Closed { command }),
                Head::Silence if began.elapsed() >= limit => {
                    return Err(LocalSendError::Silent { command, waited: began.elapsed() });
                }
                Head::Silence => {}
            }
        }
    }
}

fn check_answer(command: Command, bytes: [u8; HEADER_BYTES], waited: Duration) -> Result<(), LocalSendError> {
    let answer = Response::from_bytes(bytes).map_err(|source| LocalSendError::Frame { command, source })?;
    match answer.status() {
        Status::Ok if answer.length() == 0 => Ok(()),
        Status::Ok => Err(LocalSendError::Payload { command, bytes: answer.length() }),
        Status::Error if command == Command::State && waited >= WAITED_FOR_FAULTS => {
            Err(LocalSendError::OnDemandReceiver { waited })
        }
        Status::Error => Err(LocalSendError::Refused { command }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_receiver_that_refuses_state_after_half_a_minute_has_waited_for_faults() {
        let refusal = |command, seconds| {
            let answer = Response::new(Status::Error).to_bytes();
            check_answer(command, answer, Duration::from_secs(seconds)).unwrap_err()
        };
        let error = refusal(Command::State, 30);
        assert!(matches!(error, LocalSendError::OnDemandReceiver { .. }), "{error}");
        assert!(error.to_string().contains("memory_mode=postcopy"), "{error}");
        for (command, seconds) in [(Command::State, 10), (Command::Config, 30), (Command::Complete, 30)] {
            assert!(matches!(refusal(command, seconds), LocalSendError::Refused { .. }));
        }
    }
}
