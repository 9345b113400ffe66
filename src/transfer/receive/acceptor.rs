// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The acceptor: accepts the source first, then its additional connections, and never a stranger.
//!
//! Each caller is read on a thread of its own, for [`PeerLimits::handshake_timeout`](crate::transfer::limits::PeerLimits) and no
//! longer. When there are too many, the oldest one is closed. So however many strangers connect and stay, each caller has
//! the time in which [`CALLERS`] others connect.
//!
//! A caller that announces an additional connection counts as the source's only from its first Memory on, because what
//! other sources send begins with the same bytes.

use std::io;
use std::sync::mpsc::Sender;
use std::thread::{self, Scope};
use std::time::Duration;

use rustix::process::{Resource, getrlimit};

use super::additional;
use super::connections::Entry;
use super::context::{Context, Source, TICK};
use super::error::{Part, ReceiveError};
use super::message::{decode, refuse_and_close};
use super::phase_gate::Caller;
use super::rejections::{Reason, Rejections};
use crate::transfer::connection::{Connection, ConnectionError, Head, Listener};
use crate::transfer::frame::{Command, ConnectionRole, Request};
use crate::transfer::tls::ServerTls;

/// Callers that are read at a time, if this process may open enough files: all connections of a source, and as many
/// strangers. The same number again may have announced a connection.
const CALLERS: usize = 256;

/// The part of its descriptors that this process leaves to callers.
const DESCRIPTORS_SHARE: u64 = 4;

/// Accepts callers from the listener.
#[derive(Clone, Copy)]
pub(super) struct Acceptor<'env> {
    listener: &'env Listener,
    tls: Option<&'env ServerTls>,
    rejections: &'env Rejections,
    context: Context<'env>,
    /// Callers that are read at a time.
    callers: usize,
}

impl<'env> Acceptor<'env> {
    pub(super) fn new(
        listener: &'env Listener,
        tls: Option<&'env ServerTls>,
        rejections: &'env Rejections,
        context: Context<'env>,
    ) -> Self {
        let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let callers =
            usize::try_from(descriptors / DESCRIPTORS_SHARE).unwrap_or(usize::MAX).clamp(1, CALLERS);
        Self { listener, tls, rejections, context, callers }
    }

    /// Accepts callers until the migration is over; a listener that fails ends the migration.
    pub(super) fn run<'scope>(self, scope: &'scope Scope<'scope, 'env>, first: &Sender<Source>) {
        let Context { gate, limits, .. } = self.context;
        while !gate.is_over() {
            match self.listener.accept(TICK, limits) {
                Ok(None) => {}
                Ok(Some(connection)) => self.let_in(scope, connection, first),
                Err(error @ ConnectionError::Socket { .. }) => {
                    self.rejections.count_unserved("a caller", error.into());
                }
                Err(error) if error.is_of_descriptors() => self.make_room(error),
                Err(error) => {
                    gate.fail(error.into());
                    return;
                }
            }
        }
    }

    /// Closes the oldest caller, so that there is a descriptor for the next one, which waits in the listener's queue.
    fn make_room(self, error: ConnectionError) {
        if !self.context.connections.dismiss_caller() {
            self.rejections.count_unserved("a caller", error.into());
            thread::sleep(TICK);
        }
    }

    /// Reads `connection` on a thread of its own.
    fn let_in<'scope>(
        self,
        scope: &'scope Scope<'scope, 'env>,
        connection: Connection,
        first: &Sender<Source>,
    ) {
        let Context { gate, connections, .. } = self.context;
        let entry = connections.enter_caller(&connection, self.callers);
        // Only after it is on the list: ending the migration closes every connection on it.
        let Some(caller) = gate.caller() else { return };
        let (peer, first) = (connection.peer().to_owned(), first.clone());
        let hear = move || self.hear(caller, connection, entry, &first);
        if let Err(error) = self.context.spawn(scope, "migration-in", hear) {
            self.rejections.count_unserved(&peer, error);
        }
    }

    /// Finds out who the caller is, and serves it if it is the source.
    fn hear(self, caller: Caller, mut connection: Connection, entry: Entry, first: &Sender<Source>) {
        let Context { gate, connections, limits, .. } = self.context;
        let (peer, handle) = (connection.peer().to_owned(), connection.handle());
        // One limit for all of the greeting, however slowly its bytes arrive.
        connection.end_at(Some(limits.handshake_timeout));
        let secured = self.secure(connection).map_err(Reason::from);
        let outcome = secured.and_then(|connection| match caller {
            Caller::Source => self.hear_source(connection, entry, first),
            Caller::Additional => self.hear_additional(connection, entry),
        });
        match outcome {
            Ok(()) => {}
            Err(_) if gate.is_over() || connections.is_stopped() => {}
            Err(_) if handle.is_closed() => {
                self.rejections.count(&peer, &Reason::Crowd { callers: self.callers });
            }
            Err(reason) => self.rejections.count(&peer, &reason),
        }
    }

    fn secure(self, connection: Connection) -> Result<Connection, ReceiveError> {
        match self.tls {
            Some(tls) => Ok(connection.secure_server(tls, self.context.limits)?),
            None => Ok(connection),
        }
    }

    /// Hands the first caller that sends Start to the main thread.
    fn hear_source(
        self,
        mut connection: Connection,
        entry: Entry,
        first: &Sender<Source>,
    ) -> Result<(), Reason> {
        let head = self.read_first(&mut connection, Part::Head)?;
        match decode(head).map_err(Reason::from).and_then(|request| self.admit(request)) {
            Ok(request) => {
                connection.end_at(None);
                // Nobody listens only where the wait for a source is over.
                let _ = first.send(Source { connection, entry, first: request });
                Ok(())
            }
            Err(reason) => {
                self.refuse(connection, &reason);
                Ok(())
            }
        }
    }

    /// Rejects a caller that is told so. It is counted first: until it hears that, and goes, the migration may be over.
    fn refuse(self, connection: Connection, reason: &Reason) {
        let Context { gate, connections, limits, .. } = self.context;
        if !gate.is_over() && !connections.is_stopped() {
            self.rejections.count(connection.peer(), reason);
        }
        refuse_and_close(connection, limits.linger);
    }

    /// Begins the migration with a caller that sent Start, of whatever version.
    fn admit(self, request: Request) -> Result<Request, Reason> {
        if request.command() != Command::Start {
            request.version().map_err(|source| ReceiveError::Start { source })?;
        }
        if self.context.gate.begin() { Ok(request) } else { Err(Reason::Occupied) }
    }

    fn hear_additional(self, mut connection: Connection, entry: Entry) -> Result<(), Reason> {
        let role = self.read_first(&mut connection, Part::Role)?;
        let role = ConnectionRole::from_bytes(role);
        let role = role.map_err(|source| ReceiveError::Frame { part: Part::Role, source })?;
        connection.end_at(None);
        if !entry.announce(self.callers) {
            self.refuse(connection, &Reason::Crowd { callers: self.callers });
            return Ok(());
        }
        let served = match role {
            ConnectionRole::PrecopyMemory => additional::serve(connection, entry, self.context),
            // No stranger has a certificate.
            ConnectionRole::Fault if self.tls.is_some() => {
                self.context.gate.fail(ReceiveError::Postcopy);
                Ok(())
            }
            ConnectionRole::Fault => additional::keep_fault(connection, self.context),
        };
        if let Err(stranger) = served {
            let (connection, error) = *stranger;
            self.refuse(connection, &error.into());
        }
        Ok(())
    }

    /// Reads a caller's first bytes; the time for them is set already.
    fn read_first<const N: usize>(self, connection: &mut Connection, part: Part) -> Result<[u8; N], Reason> {
        match connection.await_head(Duration::MAX) {
            Ok(Head::Bytes(bytes)) => Ok(bytes),
            Ok(Head::Silence) => Err(Reason::Late { allowed: self.context.limits.handshake_timeout }),
            Ok(Head::End) => Err(Reason::of_reading(part, io::ErrorKind::UnexpectedEof.into())),
            Err(source) => Err(Reason::of_reading(part, source)),
        }
    }
}
