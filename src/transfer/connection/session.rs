// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A connection under TLS, of either side.

use std::io::{self, Read, Write};
use std::ops::DerefMut;

use rustls::{ClientConnection, ConnectionCommon, ServerConnection, SideData, StreamOwned};

use super::error::ConnectionError;
use super::line::{Line, Look};
use crate::transfer::limits::PeerLimits;
use crate::transfer::tls::{ClientTls, ServerTls, explain};

/// A connection under TLS, its handshake done.
#[derive(Debug)]
pub(super) enum Session {
    Client(Box<StreamOwned<ClientConnection, Line>>),
    Server(Box<StreamOwned<ServerConnection, Line>>),
}

impl Session {
    /// Shakes hands as the source, and checks that the peer is `host`.
    ///
    /// # Errors
    /// The two do not trust each other, or do not come to it within `limits.handshake_timeout`; the peer was told.
    pub(super) fn client(
        tls: &ClientTls,
        host: &str,
        line: Line,
        peer: &str,
        limits: &PeerLimits,
    ) -> Result<Self, ConnectionError> {
        let session = tls.session(host).ok_or_else(|| ConnectionError::ServerName { host: host.into() })?;
        let session = session.map_err(|error| handshake_error(peer, io::Error::other(error)))?;
        let mut stream = Box::new(StreamOwned::new(session, line));
        let outcome = shake_hands(&mut stream, limits);
        settle(outcome, &mut stream.sock, peer, limits)?;
        Ok(Self::Client(stream))
    }

    /// Shakes hands as the destination, and checks who the peer is.
    ///
    /// # Errors
    /// As [`Session::client`].
    pub(super) fn server(
        tls: &ServerTls,
        line: Line,
        peer: &str,
        limits: &PeerLimits,
    ) -> Result<Self, ConnectionError> {
        let session = tls.session().map_err(|error| handshake_error(peer, io::Error::other(error)))?;
        let mut stream = Box::new(StreamOwned::new(session, line));
        let outcome = shake_hands(&mut stream, limits);
        settle(outcome, &mut stream.sock, peer, limits)?;
        Ok(Self::Server(stream))
    }

    /// Looks what the peer said; what TLS says for itself does not count.
    pub(super) fn look(&mut self) -> io::Result<Look> {
        let look = match self {
            Self::Client(stream) => look_through(stream),
            Self::Server(stream) => look_through(stream),
        };
        look.map_err(explain)
    }

    /// Tells the peer that nothing more comes.
    pub(super) fn say_goodbye(&mut self) -> io::Result<()> {
        match self {
            Self::Client(stream) => stream.conn.send_close_notify(),
            Self::Server(stream) => stream.conn.send_close_notify(),
        }
        self.flush()
    }

    pub(super) fn line(&self) -> &Line {
        match self {
            Self::Client(stream) => &stream.sock,
            Self::Server(stream) => &stream.sock,
        }
    }

    pub(super) fn line_mut(&mut self) -> &mut Line {
        match self {
            Self::Client(stream) => &mut stream.sock,
            Self::Server(stream) => &mut stream.sock,
        }
    }
}

impl Read for Session {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = match self {
            Self::Client(stream) => stream.read(bytes),
            Self::Server(stream) => stream.read(bytes),
        };
        read.map_err(explain)
    }
}

impl Write for Session {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = match self {
            Self::Client(stream) => stream.write(bytes),
            Self::Server(stream) => stream.write(bytes),
        };
        written.map_err(explain)
    }

    fn flush(&mut self) -> io::Result<()> {
        let flushed = match self {
            Self::Client(stream) => stream.flush(),
            Self::Server(stream) => stream.flush(),
        };
        flushed.map_err(explain)
    }
}

/// Brings a handshake to its end within its time.
fn shake_hands<C, S>(stream: &mut StreamOwned<C, Line>, limits: &PeerLimits) -> io::Result<()>
where
    C: DerefMut<Target = ConnectionCommon<S>>,
    S: SideData,
{
    stream.sock.wait_until(limits.handshake_timeout);
    while stream.conn.is_handshaking() {
        if stream.conn.complete_io(&mut stream.sock)? == (0, 0) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

/// Takes in what TLS records have come, and looks whether a byte for us was in them.
fn look_through<C, S>(stream: &mut StreamOwned<C, Line>) -> io::Result<Look>
where
    C: DerefMut<Target = ConnectionCommon<S>>,
    S: SideData,
{
    loop {
        let state = stream.conn.process_new_packets().map_err(io::Error::other)?;
        if state.plaintext_bytes_to_read() > 0 {
            return Ok(Look::Bytes);
        }
        match stream.sock.look()? {
            Look::Bytes if !state.peer_has_closed() => stream.conn.read_tls(&mut stream.sock)?,
            Look::Silence if !state.peer_has_closed() => return Ok(Look::Silence),
            _ => return Ok(Look::End),
        };
    }
}

/// Leaves `line` at the pace after a handshake that succeeded, and closed after one that failed.
fn settle(
    outcome: io::Result<()>,
    line: &mut Line,
    peer: &str,
    limits: &PeerLimits,
) -> Result<(), ConnectionError> {
    match outcome {
        Ok(()) => {
            line.keep_pace();
            Ok(())
        }
        Err(error) => {
            line.hang_up(limits.linger);
            Err(handshake_error(peer, explain(error)))
        }
    }
}

fn handshake_error(peer: &str, source: io::Error) -> ConnectionError {
    ConnectionError::Handshake { peer: peer.to_owned(), source }
}
