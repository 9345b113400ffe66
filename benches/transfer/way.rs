// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The ways over loopback: with our sender and receiver, and with plain sockets.

use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use vfio_migration::tracker::Tracker;
use vfio_migration::transfer::connection::Listener;
use vfio_migration::transfer::limits::{ConnectionCount, PeerLimits};
use vfio_migration::transfer::receive::{Destination, Receiver};
use vfio_migration::transfer::url::Url;
use vfio_migration::transfer::{SendOptions, Sender, Sent};
use vfio_migration::vm::Vm;

use crate::certificates::Files;

/// Bytes that plain sockets move in one call.
pub(crate) const PLAIN_BYTES: u64 = 1 << 20;

/// What carries memory, over how many connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Unix,
    Tcp(u64),
    Tls(u64),
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix => f.pad("unix"),
            Self::Tcp(connections) => f.pad(&format!("TCP x{connections}")),
            Self::Tls(connections) => f.pad(&format!("TLS x{connections}")),
        }
    }
}

impl Way {
    pub(crate) const ALL: [Self; 5] = [Self::Unix, Self::Tcp(1), Self::Tcp(4), Self::Tcp(16), Self::Tls(4)];

    fn connections(self) -> u64 {
        match self {
            Self::Unix => 1,
            Self::Tcp(connections) | Self::Tls(connections) => connections,
        }
    }

    /// Sends a VM to `destination`, and tells how long that took.
    pub(crate) fn send(
        self,
        vm: &mut impl Vm,
        tracker: &Mutex<Tracker>,
        destination: &mut (dyn Destination + Send),
    ) -> (Duration, Sent) {
        let folder = tempfile::tempdir().unwrap();
        let listener = Listener::bind(&match self {
            Self::Unix => Url::unix(folder.path().join("socket")).unwrap(),
            Self::Tcp(_) | Self::Tls(_) => Url::tcp("127.0.0.1", 0).unwrap(),
        });
        let listener = listener.unwrap();
        let certificates = matches!(self, Self::Tls(_)).then(Files::good);
        let receiver = Receiver::new(PeerLimits::default(), certificates.as_ref().map(Files::server));
        let options = SendOptions::new(listener.url().clone())
            .connections(ConnectionCount::new(self.connections()).unwrap())
            .unwrap()
            .tls(certificates.as_ref().map(Files::client));
        thread::scope(|scope| {
            let receiving = scope.spawn(move || receiver.receive(&listener, destination));
            let begun = Instant::now();
            let sent = Sender::new(options).send(vm, tracker, &Mutex::default());
            let took = begun.elapsed();
            receiving.join().unwrap().unwrap();
            (took, sent.unwrap())
        })
    }

    /// Moves `bytes` bytes through plain sockets, a stretch of them through each; TLS counts as TCP.
    ///
    /// `write` and `read` move a piece of at most [`PLAIN_BYTES`] into and out of a socket; each has a buffer of its own.
    pub(crate) fn copy_plainly(
        self,
        bytes: u64,
        write: impl Fn(&mut File, Range<u64>, &mut [u8]) + Sync,
        read: impl Fn(&mut File, Range<u64>, &mut [u8]) + Sync,
    ) {
        self.stream_plainly(bytes, |socket| socket, |socket| socket, write, read);
    }

    /// As [`Way::copy_plainly`], through what `near` and `far` make of the ends of a socket, on the threads that use them.
    pub(crate) fn stream_plainly<N: Read + Write, F: Read + Write>(
        self,
        bytes: u64,
        near: impl Fn(File) -> N + Sync,
        far: impl Fn(File) -> F + Sync,
        write: impl Fn(&mut N, Range<u64>, &mut [u8]) + Sync,
        read: impl Fn(&mut F, Range<u64>, &mut [u8]) + Sync,
    ) {
        let stretch = bytes / self.connections();
        let (make_near, make_far, write, read) = (&near, &far, &write, &read);
        thread::scope(|scope| {
            for (index, (near, far)) in (0..).zip(self.plain_sockets()) {
                let pieces = move || {
                    let starts = (index * stretch..(index + 1) * stretch).step_by(PLAIN_BYTES as usize);
                    starts.map(move |start| start..(start + PLAIN_BYTES).min((index + 1) * stretch))
                };
                scope.spawn(move || {
                    let (mut near, mut buffer) = (make_near(near), vec![0; PLAIN_BYTES as usize]);
                    pieces().for_each(|piece| write(&mut near, piece, &mut buffer));
                    near.flush().unwrap();
                    near.read_exact(&mut [0]).unwrap();
                });
                scope.spawn(move || {
                    let (mut far, mut buffer) = (make_far(far), vec![0; PLAIN_BYTES as usize]);
                    pieces().for_each(|piece| read(&mut far, piece, &mut buffer));
                    far.write_all(&[1]).unwrap();
                    far.flush().unwrap();
                });
            }
        });
    }

    /// Both ends of each connection.
    fn plain_sockets(self) -> Vec<(File, File)> {
        let file = |socket: OwnedFd| File::from(socket);
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let ends = (0..self.connections()).map(|_| match self {
            Self::Unix => {
                let (near, far) = UnixStream::pair().unwrap();
                (file(near.into()), file(far.into()))
            }
            Self::Tcp(_) | Self::Tls(_) => {
                let near = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
                (file(near.into()), file(tcp.accept().unwrap().0.into()))
            }
        });
        ends.collect()
    }
}
