// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whole messages over a UNIX socket, each under a deadline.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

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

impl From<io::Error> for Stopped {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => Stopped::Late,
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof => Stopped::Closed,
            _ => Stopped::Failed(error),
        }
    }
}

/// Moves bytes over one socket; file descriptors that come with them are closed by the kernel.
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
        deadline: Instant,
    ) -> Result<(), Stopped> {
        let mut rest = message;
        if let Some(fd) = fd {
            rest = &message[self.send_first(message, fd, deadline)?..];
        }
        while !rest.is_empty() {
            self.stream.set_write_timeout(Some(time_left(deadline)?))?;
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
        deadline: Instant,
    ) -> Result<usize, Stopped> {
        loop {
            self.stream.set_write_timeout(Some(time_left(deadline)?))?;
            let sent = self.stream.send_with_fds(&[message], &[fd.as_raw_fd()]);
            match sent.map_err(|error| io::Error::from_raw_os_error(error.errno())) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                sent => return Ok(sent?),
            }
        }
    }

    /// Fills all of `buf`.
    pub(super) fn receive(&mut self, buf: &mut [u8], deadline: Instant) -> Result<(), Stopped> {
        let mut filled = 0;
        while filled < buf.len() {
            self.stream.set_read_timeout(Some(time_left(deadline)?))?;
            match self.stream.read(&mut buf[filled..]) {
                Ok(0) => return Err(Stopped::Closed),
                Ok(read) => filled += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

fn time_left(deadline: Instant) -> Result<Duration, Stopped> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(Stopped::Late) } else { Ok(left) }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(50)
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
}
