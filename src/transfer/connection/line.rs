// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A socket whose waits are bounded and whose bytes are counted.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
#[cfg(feature = "snapshot")]
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recv, recvmsg};
#[cfg(feature = "snapshot")]
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use socket2::{Domain, Socket};
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use super::pace::Stopwatch;
use crate::sys::socket::{receive_slices, send_slices};
use crate::transfer::limits::Pace;

/// Descriptors taken with one message: one more than any may bring.
const DESCRIPTORS_AT_ONCE: usize = 2;

#[derive(Debug)]
struct Shared {
    socket: Socket,
    received: AtomicU64,
    sent: AtomicU64,
    closed: AtomicBool,
}

/// What is there to be read without a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Nothing yet.
    Silence,
    /// At least one byte.
    Bytes,
    /// The peer has closed the connection.
    End,
}

/// Measures and closes a connection from any thread.
#[derive(Debug, Clone)]
pub struct ConnectionHandle(Arc<Shared>);

impl ConnectionHandle {
    /// Closes the connection at once; whoever waits on it gets a [`io::ErrorKind::ConnectionAborted`].
    pub fn close(&self) {
        self.0.closed.store(true, Ordering::Release);
        // It fails where the peer closed first, which is as good.
        let _ = self.0.socket.shutdown(Shutdown::Both);
    }

    /// Whether [`ConnectionHandle::close`] has closed it.
    pub(crate) fn is_closed(&self) -> bool {
        self.0.closed.load(Ordering::Acquire)
    }

    /// Whether the peer will send nothing more, because it closed the connection or that failed. Takes no bytes off it:
    /// some may still be there to read.
    pub(crate) fn peer_has_gone(&self) -> bool {
        // Errors and a connection closed in both directions are reported unasked.
        let mut polled = [PollFd::new(&self.0.socket, PollFlags::RDHUP)];
        poll(&mut polled, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
    }

    /// Returns the first `N` bytes that are there to be read, as they came, and leaves them there; `None` where there are
    /// fewer.
    pub(crate) fn peek<const N: usize>(&self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let (_, length) = recv(&self.0.socket, &mut bytes[..], flags).ok()?;
        (length == N).then_some(bytes)
    }

    /// Bytes that came from the socket, those of TLS and of refused messages included.
    pub fn received_bytes(&self) -> u64 {
        self.0.received.load(Ordering::Relaxed)
    }

    /// Bytes that the socket took, those of TLS included.
    pub fn sent_bytes(&self) -> u64 {
        self.0.sent.load(Ordering::Relaxed)
    }
}

/// One end of a socket, under TLS if there is TLS.
#[derive(Debug)]
pub(in crate::transfer) struct Line {
    shared: Arc<Shared>,
    stopwatch: Stopwatch,
}

impl Line {
    pub(in crate::transfer) fn new(socket: Socket, pace: Pace) -> io::Result<Self> {
        let stopwatch = Stopwatch::new(pace);
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(Some(stopwatch.tick()))?;
        socket.set_write_timeout(Some(stopwatch.tick()))?;
        let closed = AtomicBool::new(false);
        let shared = Shared { socket, received: AtomicU64::new(0), sent: AtomicU64::new(0), closed };
        Ok(Self { shared: Arc::new(shared), stopwatch })
    }

    pub(in crate::transfer) fn handle(&self) -> ConnectionHandle {
        ConnectionHandle(Arc::clone(&self.shared))
    }

    /// Lets reads and writes take until `within` from now.
    pub(in crate::transfer) fn wait_until(&mut self, within: Duration) {
        self.stopwatch.wait_until(Instant::now(), within);
    }

    /// Lets no read or write last longer than `within` from now, until this is taken back with `None`.
    pub(in crate::transfer) fn end_at(&mut self, within: Option<Duration>) {
        self.stopwatch.end_at(Instant::now(), within);
    }

    /// Asks reads and writes to keep the pace.
    pub(in crate::transfer) fn keep_pace(&mut self) {
        self.stopwatch.keep_pace();
    }

    pub(in crate::transfer) fn send_slices<B: BitmapSlice>(
        &mut self,
        slices: &[VolatileSlice<'_, B>],
    ) -> io::Result<usize> {
        self.send(|socket| send_slices(socket, slices))
    }

    pub(in crate::transfer) fn receive_slices<B: BitmapSlice>(
        &mut self,
        slices: &[VolatileSlice<'_, B>],
    ) -> io::Result<usize> {
        self.receive(|socket| receive_slices(socket, slices))
    }

    /// Whether descriptors can come over it.
    pub(in crate::transfer) fn carries_descriptors(&self) -> bool {
        self.shared.socket.domain().is_ok_and(|domain| domain == Domain::UNIX)
    }

    /// Receives into `bytes`, and no further, what comes with descriptors; these are added to `descriptors`.
    ///
    /// # Errors
    /// As any read; or more descriptors came than are taken, or than this process may open.
    pub(in crate::transfer) fn receive_descriptors(
        &mut self,
        bytes: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
    ) -> io::Result<usize> {
        self.receive(|socket| {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_AT_ONCE))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(bytes)];
            let came = recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    descriptors.extend(rights);
                }
            }
            if came.flags.contains(ReturnFlags::CTRUNC) {
                return Err(io::Error::other("More descriptors came than can be taken"));
            }
            Ok(came.bytes)
        })
    }

    /// Sends `bytes` with a descriptor.
    #[cfg(feature = "snapshot")]
    pub(in crate::transfer) fn send_descriptor(
        &mut self,
        bytes: &[u8],
        descriptor: BorrowedFd<'_>,
    ) -> io::Result<usize> {
        self.send(|socket| {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let rights = [descriptor];
            control.push(SendAncillaryMessage::ScmRights(&rights));
            Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
        })
    }

    /// Looks whether anything is there to be read, without a wait and without taking it.
    pub(in crate::transfer) fn look(&self) -> io::Result<Look> {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match retry_on_intr(|| recv(&self.shared.socket, &mut [0; 1][..], flags)) {
            Ok((_, 0)) => Ok(Look::End),
            Ok(_) => Ok(Look::Bytes),
            Err(Errno::WOULDBLOCK) => Ok(Look::Silence),
            Err(error) => Err(error.into()),
        }
    }

    /// Shuts down writing, and discards input until the peer closes its end too or `within` is over.
    pub(in crate::transfer) fn hang_up(&mut self, within: Duration) {
        if self.shared.socket.shutdown(Shutdown::Write).is_err() {
            return;
        }
        self.wait_until(within);
        let mut rest = [0; 16 << 10];
        while self.read(&mut rest).is_ok_and(|bytes| bytes > 0) {}
    }

    fn receive(&mut self, operation: impl FnMut(&Socket) -> io::Result<usize>) -> io::Result<usize> {
        let bytes = self.attempt(operation)?;
        self.shared.received.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(bytes)
    }

    fn send(&mut self, operation: impl FnMut(&Socket) -> io::Result<usize>) -> io::Result<usize> {
        let bytes = self.attempt(operation)?;
        self.shared.sent.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(bytes)
    }

    /// Repeats `operation`, which the socket breaks off at every tick, until it moves bytes, fails or took too long.
    fn attempt(&mut self, mut operation: impl FnMut(&Socket) -> io::Result<usize>) -> io::Result<usize> {
        loop {
            let begun = Instant::now();
            self.stopwatch.check(begun)?;
            let outcome = operation(&self.shared.socket);
            let bytes = outcome.as_ref().map_or(0, |&bytes| bytes);
            self.stopwatch.note(begun.elapsed(), bytes);
            if bytes == 0 && self.shared.closed.load(Ordering::Acquire) {
                return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "Connection was closed here"));
            }
            match outcome {
                Err(error) if is_tick(&error) => {}
                outcome => return outcome,
            }
        }
    }
}

/// Whether an operation only has to be tried again.
fn is_tick(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

impl Read for Line {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.receive(|mut socket| socket.read(bytes))
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.send(|socket| socket.send_with_flags(bytes, libc::MSG_NOSIGNAL))
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.send(|socket| socket.send_vectored_with_flags(pieces, libc::MSG_NOSIGNAL))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
