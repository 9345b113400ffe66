// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where peers connect to.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use socket2::{SockAddr, Socket};

use super::{Connection, ConnectionError};
use crate::transfer::limits::PeerLimits;
use crate::transfer::url::{Endpoint, Url};

/// What accept(2) says of a single connection, be it that none came in time.
const TRANSIENT: [i32; 12] = [
    libc::EAGAIN,
    libc::EINTR,
    libc::ECONNABORTED,
    libc::ECONNRESET,
    libc::ENETDOWN,
    libc::ENETUNREACH,
    libc::EHOSTDOWN,
    libc::EHOSTUNREACH,
    libc::ENONET,
    libc::ENOPROTOOPT,
    libc::EPROTO,
    libc::EPERM,
];

/// Descriptors that a connection takes: its own, and that of its handle.
const DESCRIPTORS: usize = 2;

/// A socket that peers connect to; the file of a UNIX socket that it has bound goes when it is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    url: Url,
    #[expect(dead_code, reason = "is dropped with the listener")]
    file: Option<SocketFile>,
}

impl Listener {
    /// Listens on `url`; with TCP port 0 on a free port, which [`Listener::url`] tells.
    ///
    /// Takes the place of a UNIX socket that nobody listens on any more, as a listener that was killed leaves it.
    ///
    /// # Errors
    /// The name has no address of this host, the port or the path is taken, or may not be used.
    pub fn bind(url: &Url) -> Result<Self, ConnectionError> {
        Self::try_bind(url).map_err(|source| ConnectionError::Listen { url: url.clone(), source })
    }

    /// Listens on a UNIX socket that somebody else has bound, whose file stays when the listener is dropped.
    ///
    /// # Errors
    /// It does not listen, or has no path.
    pub fn from_unix(listener: UnixListener) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let path = address.as_pathname().ok_or_else(|| io::Error::other("The UNIX socket has no path"))?;
        Self::passed(Url::unix(path).map_err(io::Error::other)?, listener.into())
    }

    /// Listens on a TCP socket that somebody else has bound.
    ///
    /// # Errors
    /// It does not listen.
    pub fn from_tcp(listener: TcpListener) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let url = Url::tcp(address.ip().to_string(), address.port()).map_err(io::Error::other)?;
        Self::passed(url, listener.into())
    }

    fn passed(url: Url, socket: Socket) -> io::Result<Self> {
        if !socket.is_listener()? {
            return Err(io::Error::other("The socket is a connection, or waits for none"));
        }
        // Accepting waits by a time of its own.
        socket.set_nonblocking(false)?;
        Ok(Self { socket, url, file: None })
    }

    fn try_bind(url: &Url) -> io::Result<Self> {
        match url.endpoint() {
            Endpoint::Unix(path) => {
                let socket = bind_unix(path)?.into();
                Ok(Self { socket, url: url.clone(), file: Some(SocketFile::new(path)?) })
            }
            Endpoint::Tcp { host, port } => {
                let listener = TcpListener::bind((host, port))?;
                let port = listener.local_addr()?.port();
                let url = Url::tcp(host, port).map_err(io::Error::other)?;
                Ok(Self { socket: listener.into(), url, file: None })
            }
        }
    }

    /// Where peers connect to.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// Waits up to `within` for a peer; `None` where none comes. TLS is up to [`Connection::secure_server`].
    ///
    /// # Errors
    /// The socket failed, or this process has no descriptor left.
    pub fn accept(
        &self,
        within: Duration,
        limits: &PeerLimits,
    ) -> Result<Option<Connection>, ConnectionError> {
        let accepted = self.try_accept(within);
        let accepted =
            accepted.map_err(|source| ConnectionError::Accept { url: self.url.clone(), source })?;
        accepted.map(|(socket, address)| Connection::new(socket, self.name_of(&address), limits)).transpose()
    }

    /// Checks that this process may open as many files as a connection takes.
    pub(crate) fn check_descriptors(&self) -> io::Result<()> {
        let taken: io::Result<Vec<_>> = (0..DESCRIPTORS).map(|_| self.socket.try_clone()).collect();
        taken.map(drop)
    }

    fn try_accept(&self, within: Duration) -> io::Result<Option<(Socket, SockAddr)>> {
        let begun = Instant::now();
        loop {
            // The kernel takes no timeout for none at all.
            let left = within.saturating_sub(begun.elapsed()).max(Duration::from_millis(1));
            self.socket.set_read_timeout(Some(left))?;
            match self.socket.accept() {
                Ok(accepted) => return Ok(Some(accepted)),
                Err(error) if is_transient(&error) && begun.elapsed() < within => {}
                Err(error) if is_transient(&error) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    fn name_of(&self, peer: &SockAddr) -> String {
        peer.as_socket().map_or_else(|| format!("a peer on {}", self.url), |address| address.to_string())
    }
}

/// Binds to `path`, also where a socket lies whose listener is dead.
fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_dead_socket(path) => {
            fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        bound => bound,
    }
}

/// Whether `path` is a socket and nobody listens on it. Another kind of file refuses connections, too.
fn is_dead_socket(path: &Path) -> bool {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    is_socket && UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
}

/// Whether only this attempt failed: nobody came, or went away before being let in.
fn is_transient(error: &io::Error) -> bool {
    error.raw_os_error().is_some_and(|errno| TRANSIENT.contains(&errno))
}

/// The file a UNIX socket is bound to.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(path)? })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Somebody may have put another file there.
        if identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let file = fs::symlink_metadata(path)?;
    Ok((file.dev(), file.ino()))
}
