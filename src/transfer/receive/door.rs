// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who comes in: the source first, its additional connections later, strangers never.
//!
//! Every caller is heard on a thread of its own, so that one who says nothing does not keep the source out.

use std::io;
use std::sync::mpsc::Sender;
use std::thread::{Builder, Scope};

use super::additional;
use super::error::{Part, ReceiveError};
use super::gate::Caller;
use super::message::{decode, refuse};
use super::roster::Entry;
use super::session::{Context, Source, TICK};
use crate::transfer::connection::{Connection, Head, Listener};
use crate::transfer::frame::ConnectionRole;
use crate::transfer::tls::ServerTls;

/// Callers that may be heard at a time beside the source's own connections.
const STRANGERS: usize = 32;

/// The place callers come to.
#[derive(Clone, Copy)]
pub(super) struct Door<'env> {
    pub(super) listener: &'env Listener,
    pub(super) tls: Option<&'env ServerTls>,
    pub(super) context: Context<'env>,
}

/// A caller before the migration began: its source, or the reason why it is none.
pub(super) type First = Result<Source, ReceiveError>;

impl<'env> Door<'env> {
    /// Lets callers in until the migration is over; a listener that fails ends it.
    pub(super) fn keep<'scope>(self, scope: &'scope Scope<'scope, 'env>, first: &Sender<First>) {
        let Context { gate, limits, .. } = self.context;
        while !gate.is_over() {
            let outcome = match self.listener.accept(TICK, limits) {
                Ok(None) => Ok(()),
                Ok(Some(connection)) => self.let_in(scope, connection, first),
                Err(error) => Err(error.into()),
            };
            if let Err(error) = outcome {
                gate.fail(error);
                return;
            }
        }
    }

    /// Hears `connection` on a thread of its own, unless too many are heard already.
    fn let_in<'scope>(
        self,
        scope: &'scope Scope<'scope, 'env>,
        connection: Connection,
        first: &Sender<First>,
    ) -> Result<(), ReceiveError> {
        let Context { roster, limits, .. } = self.context;
        let callers = roster.open();
        if callers > limits.connections.count() + STRANGERS {
            turn_away(connection.peer(), ReceiveError::Crowd { callers }, first);
            return Ok(());
        }
        let first = first.clone();
        Builder::new()
            .name("migration-in".into())
            .spawn_scoped(scope, move || self.hear(connection, &first))
            .map_err(|source| ReceiveError::Thread { source })?;
        Ok(())
    }

    /// Finds out who calls, and serves who may come in.
    fn hear(self, connection: Connection, first: &Sender<First>) {
        let peer = connection.peer().to_owned();
        let entry = self.context.roster.enter(&connection);
        let outcome = self.secure(connection).and_then(|connection| match self.context.gate.caller()? {
            Caller::Source => self.hear_source(connection, entry, first),
            Caller::Additional => self.hear_additional(connection, entry),
        });
        match outcome {
            Err(_) if self.context.gate.is_over() => {}
            Err(error) => turn_away(&peer, error, first),
            Ok(()) => {}
        }
    }

    fn secure(self, connection: Connection) -> Result<Connection, ReceiveError> {
        match self.tls {
            Some(tls) => Ok(connection.secure_server(tls, self.context.limits)?),
            None => Ok(connection),
        }
    }

    /// Hands who makes a request to the main thread, if it is the first to do so.
    fn hear_source(
        self,
        mut connection: Connection,
        entry: Entry,
        first: &Sender<First>,
    ) -> Result<(), ReceiveError> {
        let Context { gate, limits, .. } = self.context;
        let head = self.read_first(&mut connection, Part::Head)?;
        let admitted = decode(head)
            .and_then(|request| if gate.begin() { Ok(request) } else { Err(ReceiveError::Occupied) });
        match admitted {
            Ok(first_request) => {
                // Nobody listens only where the wait for a source is over.
                let _ = first.send(Ok(Source { connection, entry, first: first_request }));
                Ok(())
            }
            Err(error) => {
                refuse(&mut connection, limits.linger);
                connection.close(limits.linger);
                Err(error)
            }
        }
    }

    fn hear_additional(self, mut connection: Connection, entry: Entry) -> Result<(), ReceiveError> {
        let role = self.read_first(&mut connection, Part::Role)?;
        let role = ConnectionRole::from_bytes(role);
        match role.map_err(|source| ReceiveError::Frame { part: Part::Role, source })? {
            ConnectionRole::PrecopyMemory => additional::serve(connection, entry, self.context),
            ConnectionRole::Fault => self.context.gate.fail(ReceiveError::Postcopy),
        }
        Ok(())
    }

    /// Reads a caller's first bytes, which have to come within the time for handshakes.
    fn read_first<const N: usize>(
        self,
        connection: &mut Connection,
        part: Part,
    ) -> Result<[u8; N], ReceiveError> {
        let within = self.context.limits.handshake_timeout;
        let read = |source| ReceiveError::Read { part, source };
        match connection.await_head(within).map_err(read)? {
            Head::Bytes(bytes) => Ok(bytes),
            Head::Silence => Err(ReceiveError::Silent { waited: within }),
            Head::End => Err(read(io::ErrorKind::UnexpectedEof.into())),
        }
    }
}

/// Says who was not let in and why; before the migration began, also to the main thread, which counts them.
fn turn_away(peer: &str, error: ReceiveError, first: &Sender<First>) {
    log::warn!("Turned {peer} away: {}", error.in_full());
    let _ = first.send(Err(error));
}
