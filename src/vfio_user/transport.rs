// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whole messages over a UNIX socket, each under a deadline.

use std::io::{self, ErrorKind, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// A point in time, and the time there was until then.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline {
    at: Instant,
    allowed: Duration,
}

impl Deadline {
    pub(super) fn after(allowed: Duration) -> Self {
        Deadline { at: Instant::now() + allowed, allowed }
    }

    pub(super) fn allowed_ms(self) -> u128 {
        self.allowed.as_millis()
    }

    fn left(self) -> Result<Duration, Stopped> {
        let left = self.at.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(Stopped::Late) } else { Ok(left) }
    }
}

/// Says why bytes did not get through.
#[derive(Debug)]
pub(super) enum Stopped {
    /// The deadline passed.
    Late,
    /// The other end is gone.
    Closed,
    /// The socket failed.
    Failed(io::Error),
}

impl From<rustix::io::Errno> for Stopped {
    fn from(errno: rustix::io::Errno) -> Self {
        io::Error::from(errno).into()
    }
}

impl From<io::Error> for Stopped {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => Stopped::Late,
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof => Stopped::Closed,
            _ => Stopped::Failed(error),
        }
    }
}

/// Moves bytes over one socket; file descriptors are taken only where a message begins, at most one, others are closed by the
/// kernel.
#[derive(Debug)]
pub(super) struct Transport {
    stream: UnixStream,
}

impl Transport {
    pub(super) fn new(stream: UnixStream) -> Self {
        Transport { stream }
    }

    /// Sends all of `message`, with `fd` attached to its first byte.
    pub(super) fn send(
        &mut self,
        message: &[u8],
        fd: Option<BorrowedFd<'_>>,
        deadline: Deadline,
    ) -> Result<(), Stopped> {
        let mut rest = message;
        if let Some(fd) = fd {
            rest = &message[self.send_first(message, fd, deadline)?..];
        }
        while !rest.is_empty() {
            self.stream.set_write_timeout(Some(deadline.left()?))?;
            match self.stream.write(rest) {
                Ok(sent) => rest = &rest[sent..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn send_first(
        &mut self,
        message: &[u8],
        fd: BorrowedFd<'_>,
        deadline: Deadline,
    ) -> Result<usize, Stopped> {
        loop {
            self.stream.set_write_timeout(Some(deadline.left()?))?;
            let sent = self.stream.send_with_fds(&[message], &[fd.as_raw_fd()]);
            match sent.map_err(|error| io::Error::from_raw_os_error(error.errno())) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                sent => return Ok(sent?),
            }
        }
    }

    /// Fills all of `buf`, the beginning of a message, and returns the descriptor that came with its first bytes.
    pub(super) fn receive_first(
        &mut self,
        buf: &mut [u8],
        deadline: Deadline,
    ) -> Result<Option<OwnedFd>, Stopped> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        self.stream.set_read_timeout(Some(deadline.left()?))?;
        let received = retry_on_intr(|| {
            recvmsg(&self.stream, &mut [IoSliceMut::new(buf)], &mut control, RecvFlags::CMSG_CLOEXEC)
        })?;
        if received.bytes == 0 {
            return Err(Stopped::Closed);
        }
        let passed = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        self.receive(&mut buf[received.bytes..], deadline)?;
        Ok(passed)
    }

    /// Fills all of `buf`.
    pub(super) fn receive(&mut self, buf: &mut [u8], deadline: Deadline) -> Result<(), Stopped> {
        let mut filled = 0;
        while filled < buf.len() {
            self.stream.set_read_timeout(Some(deadline.left()?))?;
            match self.stream.read(&mut buf[filled..]) {
                Ok(0) => return Err(Stopped::Closed),
                Ok(read) => filled += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Whether there are bytes to read, or the end.
    pub(super) fn can_be_read(&self) -> Result<bool, Stopped> {
        let mut polled = [PollFd::new(&self.stream, PollFlags::IN)];
        Ok(retry_on_intr(|| poll(&mut polled, Some(&Timespec::default())))? > 0)
    }

    /// Bytes that can be read without a wait.
    pub(super) fn waiting_bytes(&self) -> Result<u64, Stopped> {
        Ok(rustix::io::ioctl_fionread(&self.stream)?)
    }

    /// Ends the connection both ways: the server sees its client hang up, whoever holds the socket.
    pub(super) fn shut_down(&self) {
        // It fails where the server hung up first, which is as good.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl AsFd for Transport {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Waits until `first` or `second` can be read, or has ended, and returns whether it is `first`, which goes before.
pub(super) fn first_can_be_read(
    first: &Transport,
    second: &Transport,
    deadline: Deadline,
) -> Result<bool, Stopped> {
    let left = deadline.left()?;
    let timeout = Timespec {
        tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    };
    let mut polled = [PollFd::new(first, PollFlags::IN), PollFd::new(second, PollFlags::IN)];
    match retry_on_intr(|| poll(&mut polled, Some(&timeout)))? {
        0 => Err(Stopped::Late),
        _ => Ok(!polled[0].revents().is_empty()),
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn soon() -> Deadline {
        Deadline::after(Duration::from_millis(50))
    }

    #[test]
    fn slow_drops_of_bytes_do_not_extend_the_deadline() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let drip = thread::spawn(move || {
            while theirs.write_all(&[0]).is_ok() {
                thread::sleep(Duration::from_millis(10));
            }
        });
        let mut transport = Transport::new(ours);
        let begun = Instant::now();
        assert!(matches!(transport.receive(&mut [0; 1000], soon()), Err(Stopped::Late)));
        assert!(begun.elapsed() < Duration::from_secs(5));
        drop(transport);
        drip.join().unwrap();
    }

    #[test]
    fn peer_that_does_not_read_stops_a_large_send_in_time() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut transport = Transport::new(ours);
        assert!(matches!(transport.send(&vec![0; 64 << 20], None, soon()), Err(Stopped::Late)));
        drop(theirs);
        assert!(matches!(transport.send(&[0], None, soon()), Err(Stopped::Closed)));
    }

    #[test]
    fn end_of_file_is_told_from_silence() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut transport = Transport::new(ours);
        assert!(matches!(transport.receive(&mut [0; 1], soon()), Err(Stopped::Late)));
        drop(theirs);
        assert!(matches!(transport.receive(&mut [0; 1], soon()), Err(Stopped::Closed)));
    }
    #[test]
    fn a_descriptor_comes_with_the_first_bytes_and_further_ones_are_closed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (one, other) = UnixStream::pair().unwrap();
        let passed = [theirs.as_raw_fd(), one.as_raw_fd()];
        theirs.send_with_fds(&[&[1_u8, 2][..]], &passed[..1]).unwrap();
        theirs.send_with_fds(&[&[3_u8, 4][..]], &passed[1..]).unwrap();
        theirs.send_with_fds(&[&[5_u8][..]], &[]).unwrap();
        let mut transport = Transport::new(ours);
        let mut bytes = [0; 4];
        assert!(transport.receive_first(&mut bytes, soon()).unwrap().is_some());
        assert_eq!(bytes, [1, 2, 3, 4]);
        assert_eq!(transport.waiting_bytes().unwrap(), 1);
        assert!(transport.receive_first(&mut bytes[..1], soon()).unwrap().is_none());
        drop(one);
        assert_eq!((&other).read(&mut bytes).unwrap(), 0, "the descriptor that nobody took is closed");
    }
}
