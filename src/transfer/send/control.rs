// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The first connection: everything but precopied memory goes over it, one request at a time.

use std::io::Write;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use vm_memory::GuestMemoryBackend;

use super::connections::wire_bytes;
use super::downtime::Switchover;
use super::error::{SendError, SendStep};
use super::exchange::{
    PeerError, expect_silence, read_answer, read_devices_answer, read_start_answer, send, send_memory,
    send_state,
};
use super::options::SendOptions;
use super::payload::StatePayload;
use super::progress::{Phase, SenderHandle};
use crate::device::StreamIdentity;
use crate::ledger::Chunk;
use crate::threads::ThreadStart;
use crate::transfer::connection::Connection;
use crate::transfer::frame::{
    Command, ConnectionRole, Features, HEADER_BYTES, ReceiverLimits, Request, Response, encode_devices,
};
use crate::transfer::limits::ConnectionCount;

/// How often somebody who waits for a connection looks whether the migration was cancelled.
const TICK: Duration = Duration::from_millis(20);

/// How long a connection is held open after the last word on it, so that the receiver finds that word.
const FAREWELL: Duration = Duration::from_millis(200);

/// The control connection of one migration.
pub(super) struct Control<'a> {
    options: &'a SendOptions,
    migration: &'a SenderHandle,
    /// `None` while it carries precopied memory, and once an exchange on it was cut short.
    connection: Option<Connection>,
    switchover: Option<Switchover>,
    completing: bool,
}

impl<'a> Control<'a> {
    /// Connects to the receiver.
    pub(super) fn connect(options: &'a SendOptions, migration: &'a SenderHandle) -> Result<Self, SendError> {
        let connection = Some(dial(options, migration, SendStep::Connect)?);
        Ok(Self { options, migration, connection, switchover: None, completing: false })
    }

    /// Cuts every exchange short, from here to the Complete, once the switchover has taken too long.
    pub(super) fn hurry(&mut self, switchover: Option<Switchover>) {
        self.switchover = switchover;
    }

    fn check_switchover(&self) -> Result<(), SendError> {
        self.switchover.map_or(Ok(()), Switchover::check)
    }

    /// Agrees on the protocol, and on what of `offered` a receiver of this crate has, which tells its limits. With nothing to offer it is
    /// any receiver.
    pub(super) fn start(
        &mut self,
        offered: Features,
    ) -> Result<(Features, Option<ReceiverLimits>), SendError> {
        let within = self.options.limits.handshake_timeout;
        let request =
            if offered == Features::NONE { Request::start() } else { Request::start_offering(offered) };
        let say = |connection: &mut Connection| send(connection, request, &[]);
        self.converse(SendStep::Start, HEADER_BYTES as u64, say, |connection| {
            read_start_answer(connection, offered, within)
        })
    }

    /// Lists the devices for the receiver, and returns its own.
    pub(super) fn devices(&mut self, own: &[StreamIdentity]) -> Result<Vec<StreamIdentity>, SendError> {
        let mut list = Vec::new();
        encode_devices(own, &mut list).map_err(|error| failed(SendStep::Devices)(error.into()))?;
        let request = Request::new(Command::Devices, list.len() as u64);
        let (bytes, within) = ((HEADER_BYTES + list.len()) as u64, self.options.limits.answer_timeout);
        let say = |connection: &mut Connection| send(connection, request, &list);
        self.converse(SendStep::Devices, bytes, say, |connection| read_devices_answer(connection, within))
    }

    /// Describes the VM: JSON text. The receiver may take so much longer to answer than other messages.
    pub(super) fn config(&mut self, json: &[u8], longer: Duration) -> Result<(), SendError> {
        let within = self.options.limits.answer_timeout.saturating_add(longer);
        let request = Request::new(Command::Config, json.len() as u64);
        let bytes = (HEADER_BYTES + json.len()) as u64;
        let say = |connection: &mut Connection| send(connection, request, json);
        self.exchange_within(SendStep::Config, bytes, within, say).map(drop)
    }

    /// Hands over the stopped VM's state.
    pub(super) fn state(&mut self, state: &StatePayload) -> Result<(), SendError> {
        let bytes = HEADER_BYTES as u64 + state.bytes();
        self.exchange(SendStep::State, bytes, |connection| send_state(connection, state))
    }

    /// Copies one chunk, and waits for its acknowledgement.
    pub(super) fn memory<M: GuestMemoryBackend>(
        &mut self,
        memory: &M,
        chunk: &Chunk,
    ) -> Result<(), SendError> {
        self.exchange(SendStep::Memory, wire_bytes(chunk.ranges()), |connection| {
            send_memory(connection, memory, chunk.ranges(), &mut Vec::new())
        })
    }

    /// Hands the VM over. From its first byte on nothing can be cancelled, and only the receiver's word tells who runs the VM.
    ///
    /// # Errors
    /// [`SendError::Peer`]: the receiver said that it does not; [`SendError::OutcomeUnknown`]: it did not say.
    pub(super) fn complete(&mut self, paused: bool) -> Result<(), SendError> {
        let command = if paused { Command::CompletePaused } else { Command::Complete };
        self.check_switchover()?;
        self.migration.pass_return()?;
        let mut connection = self.take(SendStep::Complete)?;
        expect_silence(&mut connection).map_err(failed(SendStep::Complete))?;
        self.completing = true;
        self.migration.enter(Phase::Completing);
        let sent = send(&mut connection, Request::new(command, 0), &[]);
        self.migration.count_sent(HEADER_BYTES as u64);
        match sent.and_then(|()| read_answer(&mut connection, self.options.limits.complete_timeout)) {
            Ok(_) => {
                self.migration.count_acknowledged(HEADER_BYTES as u64);
                close_behind(vec![connection], self.options.thread_start);
                Ok(())
            }
            Err(source @ PeerError::Refused) => Err(SendError::Peer { step: SendStep::Complete, source }),
            Err(source) => Err(SendError::OutcomeUnknown { source }),
        }
    }

    /// Returns the connections that are to carry precopied memory: this one, or so many more.
    pub(super) fn open_connections(&mut self) -> Result<Vec<Connection>, SendError> {
        if self.options.connections == ConnectionCount::ONE {
            return Ok(vec![self.take(SendStep::Memory)?]);
        }
        (0..self.options.connections.count()).map(|_| self.open_connection()).collect()
    }

    fn open_connection(&self) -> Result<Connection, SendError> {
        let mut connection = dial(self.options, self.migration, SendStep::Memory)?;
        let announced =
            connection.write_all(&ConnectionRole::PrecopyMemory.to_bytes()).and_then(|()| connection.flush());
        announced.map_err(|error| failed(SendStep::Memory)(error.into()))?;
        Ok(connection)
    }

    /// Takes this connection back from those that carried memory; closes the others, whose end the receiver expects.
    ///
    /// # Errors
    /// One of the others was answered more often than it was asked; this one is looked at before its next request.
    pub(super) fn take_back(&mut self, mut connections: Vec<Connection>) -> Result<(), SendError> {
        if self.options.connections == ConnectionCount::ONE {
            self.connection = connections.pop();
            return Ok(());
        }
        let unasked = connections.iter_mut().find_map(|connection| match expect_silence(connection) {
            Err(source @ PeerError::Unasked) => Some(source),
            // One that has ended meanwhile has done its work.
            _ => None,
        });
        close_behind(connections, self.options.thread_start);
        unasked.map_or(Ok(()), |source| Err(failed(SendStep::Memory)(source)))
    }

    /// Tells the receiver that nothing more will come, if it is in a position to hear it.
    pub(super) fn abandon(&mut self) {
        let Some(mut connection) = self.connection.take() else { return };
        if !self.completing && send(&mut connection, Request::new(Command::Abandon, 0), &[]).is_ok() {
            connection.close(FAREWELL);
        }
    }

    /// Makes an exchange within the time that any message but the first and the last may take.
    fn exchange(
        &mut self,
        step: SendStep,
        bytes: u64,
        say: impl FnOnce(&mut Connection) -> Result<(), PeerError>,
    ) -> Result<(), SendError> {
        self.exchange_within(step, bytes, self.options.limits.answer_timeout, say).map(drop)
    }

    /// As [`Control::exchange`], within another time.
    fn exchange_within(
        &mut self,
        step: SendStep,
        bytes: u64,
        within: Duration,
        say: impl FnOnce(&mut Connection) -> Result<(), PeerError>,
    ) -> Result<Response, SendError> {
        self.converse(step, bytes, say, |connection| read_answer(connection, within))
    }

    /// Makes an exchange that a cancellation, or the end of the time for the switchover, cuts short.
    ///
    /// The connection is kept only if the receiver may be asked again: one that refused is done with the migration.
    fn converse<T>(
        &mut self,
        step: SendStep,
        bytes: u64,
        say: impl FnOnce(&mut Connection) -> Result<(), PeerError>,
        hear: impl FnOnce(&mut Connection) -> Result<T, PeerError>,
    ) -> Result<T, SendError> {
        self.migration.check()?;
        self.check_switchover()?;
        let mut connection = self.take(step)?;
        connection.end_at(self.switchover.map(Switchover::left));
        let handle = connection.handle();
        let answer = self.migration.interruptible(
            move || handle.close(),
            || {
                expect_silence(&mut connection)?;
                say(&mut connection)?;
                self.migration.count_sent(bytes);
                hear(&mut connection)
            },
        )?;
        if answer.is_ok() {
            connection.end_at(None);
            self.connection = Some(connection);
        }
        self.migration.check()?;
        if answer.is_err() {
            self.check_switchover()?;
        }
        let answer = answer.map_err(failed(step))?;
        self.migration.count_acknowledged(bytes);
        Ok(answer)
    }

    fn take(&mut self, step: SendStep) -> Result<Connection, SendError> {
        self.connection.take().ok_or_else(|| failed(step)(PeerError::Closed))
    }
}

fn failed(step: SendStep) -> impl FnOnce(PeerError) -> SendError {
    move |source| SendError::Peer { step, source }
}

/// Connects, in a thread that a cancellation leaves behind: resolving a name cannot be cut short.
fn dial(options: &SendOptions, migration: &SenderHandle, step: SendStep) -> Result<Connection, SendError> {
    migration.check()?;
    let (url, tls, limits) = (options.url.clone(), options.tls.clone(), options.limits.clone());
    let (report, dialled) = mpsc::sync_channel(1);
    let dialling = move || {
        let _cancelled = report.send(Connection::connect(&url, tls.as_ref(), &limits));
    };
    options.thread_start.spawn("migrate-dial", dialling).map_err(SendError::Thread)?;
    loop {
        match dialled.recv_timeout(TICK) {
            Ok(connection) => return connection.map_err(|error| failed(step)(error.into())),
            Err(RecvTimeoutError::Timeout) => migration.check()?,
            Err(RecvTimeoutError::Disconnected) => return Err(SendError::ThreadDied),
        }
    }
}

/// Closes connections without waiting for the receiver to do the same, which would be part of the downtime.
fn close_behind(connections: Vec<Connection>, threads: ThreadStart) {
    let closing = move || connections.into_iter().for_each(|connection| connection.close(FAREWELL));
    // The VM may stand still: nobody waits for a hook here.
    if let Err(error) = threads.detach("migrate-close", closing) {
        log::debug!("Connections are cut, not closed: {error}");
    }
}
