// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Connections over UNIX sockets, TCP and TLS, and what they bring straight into and out of guest memory.
//!
//! No wait is unbounded: for the first byte of a message the caller says how long ([`Connection::await_head`]), and from
//! then on, in both directions, the peer has to keep the [`Pace`](super::limits::Pace).
//!
//! `line` is a socket, with or without TLS; `pace` its deadlines; `guest` guest memory as buffers; `listener` where callers arrive.

mod error;
mod guest;
mod line;
mod listener;
mod pace;
#[cfg_attr(not(feature = "tls"), path = "without_tls.rs")]
mod session;

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
#[cfg(feature = "snapshot")]
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, Socket, TcpKeepalive, Type};

use super::limits::PeerLimits;
use super::tls::{ClientTls, ServerTls};
use super::url::{Endpoint, Url};

pub use error::ConnectionError;
pub use line::{ConnectionHandle, Look};
pub use listener::Listener;
pub use pace::Stall;

use line::Line;
use session::Session;

/// Bytes taken up at first for a payload that claims more.
const FIRST_BYTES: usize = 64 << 10;

/// Bytes a buffer grows by at most, whatever it holds already.
const GROWTH_BYTES: usize = 16 << 20;

/// What a wait for the first bytes of a message brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head<const N: usize> {
    /// The message's first `N` bytes.
    Bytes([u8; N]),
    /// Nothing yet; the same wait may begin anew.
    Silence,
    /// The peer closed the connection between messages.
    End,
}

/// A stream to a peer: bytes in both directions, with bounded waits, over whatever carries them.
///
/// ```
/// use std::io::Write;
/// use std::os::unix::net::UnixStream;
/// use std::time::Duration;
/// use vfio_migration::transfer::connection::{Connection, Head};
/// use vfio_migration::transfer::limits::PeerLimits;
/// let (near, far) = UnixStream::pair()?;
/// let (mut near, mut far) =
///     (Connection::from_unix(near, &PeerLimits::default())?, Connection::from_unix(far, &PeerLimits::default())?);
/// near.write_all(b"ping")?;
/// assert_eq!(far.await_head(Duration::from_secs(1))?, Head::Bytes(*b"ping"));
/// assert_eq!(far.await_head::<4>(Duration::ZERO)?, Head::Silence);
/// drop(near);
/// assert_eq!(far.await_head::<4>(Duration::from_secs(1))?, Head::End);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    peer: String,
    /// Takes guest memory to and from TLS; empty until it is needed.
    bounce: Vec<u8>,
}

/// What carries the bytes.
#[derive(Debug)]
enum Stream {
    Plain(Line),
    Tls(Session),
}

impl Connection {
    /// Connects to `url`, trying every address of its host in turn, with a TLS handshake where `tls` is given.
    ///
    /// # Errors
    /// The host has no address, none of them lets us in within `limits.connect_timeout`, or the peer's certificate or
    /// ours is not accepted within `limits.handshake_timeout`. A peer that refuses our certificate may say so only when
    /// it is read from.
    pub fn connect(url: &Url, tls: Option<&ClientTls>, limits: &PeerLimits) -> Result<Self, ConnectionError> {
        let connection = Self::new(dial(url, limits)?, url.to_string(), limits)?;
        match (tls, url.endpoint()) {
            (None, _) => Ok(connection),
            (Some(tls), Endpoint::Tcp { host, .. }) => connection.secure_client(tls, host, limits),
            (Some(_), Endpoint::Unix(_)) => Err(ConnectionError::TlsOverUnix { url: url.clone() }),
        }
    }

    /// Takes over a connected UNIX socket.
    ///
    /// # Errors
    /// The socket refuses its settings.
    pub fn from_unix(stream: UnixStream, limits: &PeerLimits) -> Result<Self, ConnectionError> {
        Self::new(stream.into(), "the peer of a UNIX socket".into(), limits)
    }

    /// Takes over a connected TCP socket.
    ///
    /// # Errors
    /// The socket refuses its settings.
    pub fn from_tcp(stream: TcpStream, limits: &PeerLimits) -> Result<Self, ConnectionError> {
        let peer = stream.peer_addr().map_or_else(|_| "a TCP peer".into(), |address| address.to_string());
        Self::new(stream.into(), peer, limits)
    }

    fn new(socket: Socket, peer: String, limits: &PeerLimits) -> Result<Self, ConnectionError> {
        let set_up = || {
            if socket.domain()? != Domain::UNIX {
                socket.set_tcp_nodelay(true)?;
                socket.set_tcp_keepalive(&keepalive(limits.pace.window))?;
            }
            Line::new(socket, limits.pace)
        };
        match set_up() {
            Ok(line) => Ok(Self { stream: Stream::Plain(line), peer, bounce: Vec::new() }),
            Err(source) => Err(ConnectionError::Socket { peer, source }),
        }
    }

    /// Puts TLS on a connection this side asked for, and checks that the peer is `host`.
    ///
    /// A connection that has TLS already stays as it is.
    ///
    /// # Errors
    /// The two do not trust each other, or do not come to it within `limits.handshake_timeout`.
    pub fn secure_client(
        self,
        tls: &ClientTls,
        host: &str,
        limits: &PeerLimits,
    ) -> Result<Self, ConnectionError> {
        let Self { stream: Stream::Plain(line), peer, bounce } = self else { return Ok(self) };
        let session = Session::client(tls, host, line, &peer, limits)?;
        Ok(Self { stream: Stream::Tls(session), peer, bounce })
    }

    /// Puts TLS on a connection the peer asked for, and checks who it is.
    ///
    /// A connection that has TLS already stays as it is.
    ///
    /// # Errors
    /// The two do not trust each other, or do not come to it within `limits.handshake_timeout`. The peer was told.
    pub fn secure_server(self, tls: &ServerTls, limits: &PeerLimits) -> Result<Self, ConnectionError> {
        let Self { stream: Stream::Plain(line), peer, bounce } = self else { return Ok(self) };
        let session = Session::server(tls, line, &peer, limits)?;
        Ok(Self { stream: Stream::Tls(session), peer, bounce })
    }

    /// Who is at the other end, in words.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Returns what measures and closes the connection from any thread.
    pub fn handle(&self) -> ConnectionHandle {
        self.line().handle()
    }

    /// Lets no wait, of whatever kind, last longer than `within` from now; `None` takes that back.
    ///
    /// A wait that is cut short fails with [`Stall::Late`], and leaves the connection in the middle of a message.
    pub fn end_at(&mut self, within: Option<Duration>) {
        self.line_mut().end_at(within);
    }

    /// Waits up to `within` for a message's first byte, then reads its first `N` bytes at the pace.
    ///
    /// # Errors
    /// The connection failed, or ended or stalled after the first byte; an end before it is [`Head::End`].
    pub fn await_head<const N: usize>(&mut self, within: Duration) -> io::Result<Head<N>> {
        let mut bytes = [0; N];
        self.line_mut().wait_until(within);
        let first = self.read(&mut bytes);
        self.line_mut().keep_pace();
        let begun = match first {
            Ok(0) => return Ok(Head::End),
            // TLS ended without a goodbye; between messages that cuts nothing off.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Head::End),
            Err(error) if matches!(Stall::of(&error), Some(Stall::Silent { .. })) => {
                return Ok(Head::Silence);
            }
            begun => begun?,
        };
        self.read_exact(&mut bytes[begun..])?;
        Ok(Head::Bytes(bytes))
    }

    /// Looks what there is to read, without a wait and without taking it.
    ///
    /// Under TLS only what the peer said counts, not what TLS says for itself.
    ///
    /// # Errors
    /// The connection failed.
    pub fn look(&mut self) -> io::Result<Look> {
        match &mut self.stream {
            Stream::Plain(line) => line.look(),
            Stream::Tls(session) => session.look(),
        }
    }

    /// Reads `length` bytes into `payload`, whose own contents are lost and whose buffer is reused.
    ///
    /// The buffer grows as bytes arrive: a peer that claims much and sends little costs little.
    ///
    /// # Errors
    /// The connection failed, stalled or ended ([`io::ErrorKind::UnexpectedEof`]); `payload` holds what came.
    pub fn read_payload(&mut self, length: u64, payload: &mut Vec<u8>) -> io::Result<()> {
        payload.clear();
        while (payload.len() as u64) < length {
            let held = payload.len();
            let left = usize::try_from(length - held as u64).unwrap_or(usize::MAX);
            let more = left.min(held.clamp(FIRST_BYTES, GROWTH_BYTES));
            payload.try_reserve_exact(more)?;
            payload.resize(held + more, 0);
            let outcome = read_fully(self, &mut payload[held..]);
            payload.truncate(held + *outcome.as_ref().unwrap_or(&0));
            if outcome? < more {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    /// Whether descriptors can come over it: it is a UNIX socket.
    pub(crate) fn carries_descriptors(&self) -> bool {
        matches!(&self.stream, Stream::Plain(line) if line.carries_descriptors())
    }

    /// Reads exactly `N` bytes and the descriptors that come with them, over a UNIX socket.
    ///
    /// # Errors
    /// The connection failed, stalled or ended, or more descriptors came than one message may bring.
    pub(crate) fn read_with_descriptors<const N: usize>(&mut self) -> io::Result<([u8; N], Vec<OwnedFd>)> {
        let (mut bytes, mut descriptors, mut filled) = ([0; N], Vec::new(), 0);
        while filled < N {
            let more = match &mut self.stream {
                Stream::Plain(line) => line.receive_descriptors(&mut bytes[filled..], &mut descriptors)?,
                Stream::Tls(session) => session.read(&mut bytes[filled..])?,
            };
            if more == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            filled += more;
        }
        Ok((bytes, descriptors))
    }

    /// Sends `bytes` with a descriptor on the first of them, over a UNIX socket.
    ///
    /// # Errors
    /// The connection failed or stalled, or cannot carry descriptors.
    #[cfg(feature = "snapshot")]
    pub(crate) fn write_with_descriptor(
        &mut self,
        bytes: &[u8],
        descriptor: BorrowedFd<'_>,
    ) -> io::Result<()> {
        let Stream::Plain(line) = &mut self.stream else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let sent = line.send_descriptor(bytes, descriptor)?;
        self.write_all(&bytes[sent..])
    }

    /// Sends all of `bytes`, which may take `within` and need not keep the pace.
    ///
    /// # Errors
    /// The connection failed, or the time is over; part of the bytes may be gone.
    pub fn send_within(&mut self, bytes: &[u8], within: Duration) -> io::Result<()> {
        self.line_mut().wait_until(within);
        let outcome = self.write_all(bytes).and_then(|()| self.flush());
        self.line_mut().keep_pace();
        outcome
    }

    /// Closes the connection so that the peer finds what was sent last, even where it is still sending.
    ///
    /// What comes meanwhile is thrown away, for `linger` at most.
    pub fn close(mut self, linger: Duration) {
        self.line_mut().wait_until(linger);
        let goodbye = match &mut self.stream {
            Stream::Plain(_) => Ok(()),
            Stream::Tls(session) => session.say_goodbye(),
        };
        if goodbye.is_ok() {
            self.line_mut().hang_up(linger);
        }
    }

    fn line(&self) -> &Line {
        match &self.stream {
            Stream::Plain(line) => line,
            Stream::Tls(session) => session.line(),
        }
    }

    fn line_mut(&mut self) -> &mut Line {
        match &mut self.stream {
            Stream::Plain(line) => line,
            Stream::Tls(session) => session.line_mut(),
        }
    }
}

impl Read for Connection {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match &mut self.stream {
            Stream::Plain(line) => line.read(bytes),
            Stream::Tls(session) => session.read(bytes),
        }
    }
}

impl Write for Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.stream {
            Stream::Plain(line) => line.write(bytes),
            Stream::Tls(session) => session.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.stream {
            Stream::Plain(line) => line.flush(),
            Stream::Tls(session) => session.flush(),
        }
    }
}

/// Reads until `bytes` is full or the stream ends, and returns how much came.
fn read_fully(stream: &mut impl Read, bytes: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < bytes.len() {
        match stream.read(&mut bytes[filled..])? {
            0 => break,
            more => filled += more,
        }
    }
    Ok(filled)
}

/// Connects a socket to `url`.
fn dial(url: &Url, limits: &PeerLimits) -> Result<Socket, ConnectionError> {
    let mut failure = None;
    let addresses = resolve(url)?;
    for address in &addresses {
        match dial_one(address, limits.connect_timeout) {
            Ok(socket) => return Ok(socket),
            Err(error) => failure = Some((address, error)),
        }
    }
    let (last, source) = failure.expect("resolving brings an address or fails");
    let address = last.as_socket().map_or_else(|| "its path".into(), |address| address.to_string());
    Err(ConnectionError::Connect { url: url.clone(), address, addresses: addresses.len(), source })
}

fn dial_one(address: &SockAddr, timeout: Duration) -> io::Result<Socket> {
    let protocol = (!address.is_unix()).then_some(Protocol::TCP);
    let socket = Socket::new(address.domain(), Type::STREAM, protocol)?;
    socket.connect_timeout(address, timeout)?;
    Ok(socket)
}

/// Returns the addresses of `url`, at least one.
fn resolve(url: &Url) -> Result<Vec<SockAddr>, ConnectionError> {
    let addresses = match url.endpoint() {
        Endpoint::Unix(path) => SockAddr::unix(path).map(|address| vec![address]),
        Endpoint::Tcp { host, port } => (host, port)
            .to_socket_addrs()
            .map(|addresses| addresses.map(|address: SocketAddr| address.into()).collect()),
    };
    let none = || io::Error::new(io::ErrorKind::NotFound, "The name has no address");
    addresses
        .and_then(|addresses| if addresses.is_empty() { Err(none()) } else { Ok(addresses) })
        .map_err(|source| ConnectionError::Resolve { url: url.clone(), source })
}

/// Probes that notice a host that went away in about the time a stalled one is noticed in.
fn keepalive(window: Duration) -> TcpKeepalive {
    let seconds = |part: u32| Duration::from_secs((window / part).as_secs().max(1));
    TcpKeepalive::new().with_time(seconds(2)).with_interval(seconds(6)).with_retries(3)
}
