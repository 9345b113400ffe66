// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A relay between a source and a receiver that writes down what each of them says, and in which order.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How long one end is listened to before the other has its turn.
const TURN: Duration = Duration::from_millis(1);

/// One end of a relayed connection.
pub(crate) trait End: Read + Write + Send {
    /// Says that nothing more will come.
    fn finish(&mut self);
}

impl End for UnixStream {
    fn finish(&mut self) {
        let _gone = self.shutdown(Shutdown::Write);
    }
}

impl End for TcpStream {
    fn finish(&mut self) {
        let _gone = self.shutdown(Shutdown::Write);
    }
}

/// Turns a caller's socket into what its bytes are read from, and the socket to the receiver into what they are written to.
pub(crate) type Wrap = Box<dyn Fn(TcpStream, TcpStream) -> io::Result<(Box<dyn End>, Box<dyn End>)> + Send>;

/// Where the relay waits, and where to it passes on what comes.
pub(crate) enum Route {
    /// From a socket of this path to one of that.
    Unix(PathBuf, PathBuf),
    /// From a port of loopback to this one.
    Tcp(TcpListener, u16, Wrap),
}

impl Route {
    pub(crate) fn unix(from: &Path, to: &Path) -> Self {
        Self::Unix(from.to_owned(), to.to_owned())
    }

    /// From the port that is returned to `port`; bytes pass as they are.
    pub(crate) fn tcp(port: u16) -> (Self, u16) {
        Self::wrapped(port, Box::new(|near, far| Ok((Box::new(near), Box::new(far)))))
    }

    /// As [`Route::tcp`], with both sockets wrapped.
    pub(crate) fn wrapped(port: u16, wrap: Wrap) -> (Self, u16) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let own = listener.local_addr().unwrap().port();
        (Self::Tcp(listener, port, wrap), own)
    }
}

/// Bytes that went one way over one connection, in pieces.
#[derive(Debug, Default, Clone)]
pub(crate) struct Said {
    pub(crate) bytes: Vec<u8>,
    /// Up to which byte a piece reached, and its number among the pieces of all connections, both ways.
    pieces: Vec<(usize, usize)>,
}

impl Said {
    /// The number of the piece that the byte at `at` came in.
    pub(crate) fn when(&self, at: usize) -> usize {
        self.pieces[self.pieces.partition_point(|&(end, _)| end <= at)].1
    }
}

/// One connection: what the source said, and what the receiver answered.
#[derive(Debug, Default, Clone)]
pub(crate) struct Spoken {
    pub(crate) by_source: Said,
    pub(crate) by_receiver: Said,
}

/// All connections in the order in which they were opened. A piece is noted before it is passed on: what answers it has a
/// higher number.
#[derive(Default)]
struct Record {
    connections: Vec<Spoken>,
    pieces: usize,
}

impl Record {
    fn note(&mut self, connection: usize, by_source: bool, bytes: &[u8]) {
        let spoken = &mut self.connections[connection];
        let said = if by_source { &mut spoken.by_source } else { &mut spoken.by_receiver };
        said.bytes.extend_from_slice(bytes);
        said.pieces.push((said.bytes.len(), self.pieces));
        self.pieces += 1;
    }
}

/// A relay at work.
pub(crate) struct Relay {
    record: Arc<Mutex<Record>>,
    over: Arc<AtomicBool>,
    door: JoinHandle<Vec<JoinHandle<()>>>,
}

impl Relay {
    pub(crate) fn start(route: Route) -> Self {
        let (record, over) = (Arc::<Mutex<Record>>::default(), Arc::<AtomicBool>::default());
        let door = Door::open(route);
        let (shared, ending) = (Arc::clone(&record), Arc::clone(&over));
        let door = thread::spawn(move || {
            let mut pumps = Vec::new();
            while !ending.load(Ordering::Acquire) {
                match door.accept() {
                    Ok((near, far)) => {
                        shared.lock().unwrap().connections.push(Spoken::default());
                        let (record, connection) = (Arc::clone(&shared), pumps.len());
                        pumps.push(thread::spawn(move || pump(near, far, connection, &record)));
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(TURN),
                    Err(error) => panic!("a connection cannot be relayed: {error}"),
                }
            }
            pumps
        });
        Self { record, over, door }
    }

    /// Waits until both ends have closed every connection, and returns what was said.
    pub(crate) fn end(self) -> Vec<Spoken> {
        self.over.store(true, Ordering::Release);
        self.door.join().unwrap().into_iter().for_each(|pump| pump.join().unwrap());
        std::mem::take(&mut self.record.lock().unwrap().connections)
    }
}

enum Door {
    Unix(UnixListener, PathBuf),
    Tcp(TcpListener, u16, Wrap),
}

impl Door {
    fn open(route: Route) -> Self {
        match route {
            Route::Unix(from, to) => {
                let listener = UnixListener::bind(from).unwrap();
                listener.set_nonblocking(true).unwrap();
                Self::Unix(listener, to)
            }
            Route::Tcp(listener, port, wrap) => {
                listener.set_nonblocking(true).unwrap();
                Self::Tcp(listener, port, wrap)
            }
        }
    }

    fn accept(&self) -> io::Result<(Box<dyn End>, Box<dyn End>)> {
        match self {
            Self::Unix(listener, to) => {
                let (near, far) = (listener.accept()?.0, UnixStream::connect(to)?);
                near.set_nonblocking(false)?;
                near.set_read_timeout(Some(TURN))?;
                far.set_read_timeout(Some(TURN))?;
                Ok((Box::new(near), Box::new(far)))
            }
            Self::Tcp(listener, port, wrap) => {
                let (near, far) = (listener.accept()?.0, TcpStream::connect(("127.0.0.1", *port))?);
                near.set_nonblocking(false)?;
                let (sockets, ends) = ([near.try_clone()?, far.try_clone()?], wrap(near, far)?);
                for socket in sockets {
                    socket.set_nodelay(true)?;
                    socket.set_read_timeout(Some(TURN))?;
                }
                Ok(ends)
            }
        }
    }
}

/// Passes bytes on, both ways, until both ends have closed.
fn pump(mut near: Box<dyn End>, mut far: Box<dyn End>, connection: usize, record: &Mutex<Record>) {
    let (mut source_speaks, mut receiver_speaks) = (true, true);
    while source_speaks || receiver_speaks {
        if source_speaks {
            let note = |bytes: &[u8]| record.lock().unwrap().note(connection, true, bytes);
            source_speaks = pass(near.as_mut(), far.as_mut(), note);
        }
        if receiver_speaks {
            let note = |bytes: &[u8]| record.lock().unwrap().note(connection, false, bytes);
            receiver_speaks = pass(far.as_mut(), near.as_mut(), note);
        }
    }
}

/// Passes on what comes `from` one end until it is silent for a turn; returns whether more may come.
fn pass(from: &mut dyn End, to: &mut dyn End, note: impl Fn(&[u8])) -> bool {
    let mut bytes = vec![0; 1 << 20];
    loop {
        match from.read(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
            // TLS that ends without a goodbye is an end, too.
            Ok(0) | Err(_) => {
                to.finish();
                return false;
            }
            Ok(read) => {
                note(&bytes[..read]);
                // Whoever does not listen any more is heard to the end all the same.
                let _deaf = to.write_all(&bytes[..read]).and_then(|()| to.flush());
            }
        }
    }
}
