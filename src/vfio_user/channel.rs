// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One request and its reply: identifiers, limits, the deadline, and what a failure leaves behind.

use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use zerocopy::IntoBytes;

use super::error::{DecodeError, Error};
use super::message::{Command, HEADER_BYTES, Header, Kind};
use super::transport::{Stopped, Transport};

/// Room in every reply for its fixed part, whatever newer servers append to it, in bytes.
const FIXED_REPLY_BYTES: usize = 4096;
/// Largest request of a server, which is read to be declined, in bytes.
const MAX_SERVER_REQUEST_BYTES: usize = (16 << 20) + FIXED_REPLY_BYTES;
/// Longest time any request may take, so that a deadline is always a time.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);

/// Carries requests to one server and keeps the buffers, reused, of the last request and reply.
#[derive(Debug)]
pub(super) struct Channel {
    device: String,
    transport: Transport,
    timeout: Duration,
    next_id: u16,
    in_step: bool,
    request: Vec<u8>,
    reply: Vec<u64>,
}

impl Channel {
    pub(super) fn new(stream: UnixStream, device: String, timeout: Duration) -> Self {
        Channel {
            device,
            transport: Transport::new(stream),
            timeout: timeout.min(LONGEST_TIMEOUT),
            next_id: 0,
            in_step: true,
            request: Vec::new(),
            reply: Vec::new(),
        }
    }

    pub(super) fn device(&self) -> &str {
        &self.device
    }

    /// Sends one request and waits for its reply, whose payload of the returned size is then in the reply buffer.
    ///
    /// The reply may hold `data_bytes` of data besides its fixed part.
    pub(super) fn exchange(
        &mut self,
        command: Command,
        parts: &[&[u8]],
        fd: Option<BorrowedFd<'_>>,
        data_bytes: usize,
    ) -> Result<usize, Error> {
        if !self.in_step {
            return Err(Error::Broken { device: self.device.clone(), command });
        }
        let limit = data_bytes.saturating_add(FIXED_REPLY_BYTES);
        self.in_step = false;
        let outcome = self.converse(command, parts, fd, limit).map_err(|failure| self.name(command, failure));
        self.in_step = outcome.as_ref().err().is_none_or(Error::leaves_connection_usable);
        outcome
    }

    fn converse(
        &mut self,
        command: Command,
        parts: &[&[u8]],
        fd: Option<BorrowedFd<'_>>,
        limit: usize,
    ) -> Result<usize, Failure> {
        let deadline = Instant::now() + self.timeout;
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        let payload_bytes = parts.iter().map(|part| part.len()).sum();
        let header = Header::new(id, command.to_wire(), Kind::Command { no_reply: false }, payload_bytes)?;
        self.request.clear();
        self.request.extend_from_slice(&header.encode());
        parts.iter().for_each(|part| self.request.extend_from_slice(part));
        self.transport.send(&self.request, fd, deadline)?;
        self.await_reply(id, command, limit, deadline)
    }

    /// Receives the reply to request `id`; requests of the server that come before it are declined.
    fn await_reply(
        &mut self,
        id: u16,
        command: Command,
        limit: usize,
        deadline: Instant,
    ) -> Result<usize, Failure> {
        loop {
            let mut bytes = [0; HEADER_BYTES];
            self.transport.receive(&mut bytes, deadline)?;
            let header = Header::decode(&bytes)?;
            let payload_bytes = header.payload_bytes();
            let limit = match header.kind() {
                Kind::Command { .. } => MAX_SERVER_REQUEST_BYTES,
                Kind::Reply | Kind::ErrorReply { .. } => limit,
            };
            if payload_bytes > limit {
                let (value, limit) = (payload_bytes as u64, limit as u64);
                return Err(DecodeError::OverLimit { what: "payload size", value, limit }.into());
            }
            self.receive_payload(payload_bytes, deadline)?;
            match header.kind() {
                Kind::Command { no_reply } => self.decline(&header, no_reply, deadline)?,
                kind => {
                    echoed("message id of the reply", header.id(), id)?;
                    echoed("command of the reply", header.command(), command.to_wire())?;
                    return match kind {
                        Kind::ErrorReply { errno } => Err(Failure::Refused(errno)),
                        _ => Ok(payload_bytes),
                    };
                }
            }
        }
    }

    fn receive_payload(&mut self, bytes: usize, deadline: Instant) -> Result<(), Failure> {
        let words = bytes.div_ceil(size_of::<u64>());
        if self.reply.len() < words {
            self.reply.resize(words, 0);
        }
        self.transport.receive(&mut self.reply.as_mut_bytes()[..bytes], deadline)?;
        Ok(())
    }

    /// Answers a request of the server: this client serves none, its memory is shared by descriptor.
    fn decline(&mut self, request: &Header, no_reply: bool, deadline: Instant) -> Result<(), Failure> {
        if no_reply {
            return Ok(());
        }
        let refusal = Kind::ErrorReply { errno: libc::EOPNOTSUPP };
        let header = Header::new(request.id(), request.command(), refusal, 0)?;
        Ok(self.transport.send(&header.encode(), None, deadline)?)
    }

    /// Returns the payload of the last reply, whose size [`Channel::exchange`] returned.
    pub(super) fn payload(&self, bytes: usize) -> &[u8] {
        &self.reply.as_bytes()[..bytes]
    }

    /// Lends `words` words of the reply's payload, from word `first` on.
    pub(super) fn words(&self, first: usize, words: usize) -> &[u64] {
        &self.reply[first..first + words]
    }

    /// Passes on what a reply was decoded to; one that could not be leaves the connection out of step.
    pub(super) fn checked<T>(
        &mut self,
        command: Command,
        decoded: Result<T, DecodeError>,
    ) -> Result<T, Error> {
        decoded.map_err(|source| {
            self.in_step = false;
            self.name(command, source.into())
        })
    }

    fn name(&self, command: Command, failure: Failure) -> Error {
        let device = self.device.clone();
        match failure {
            Failure::Refused(errno) => Error::Refused { device, command, errno },
            Failure::Malformed(source) => Error::Malformed { device, command, source },
            Failure::Stopped(Stopped::Closed) => Error::Disconnected { device, command },
            Failure::Stopped(Stopped::Failed(source)) => Error::Socket { device, command, source },
            Failure::Stopped(Stopped::Late) => {
                Error::Timeout { device, command, timeout_ms: self.timeout.as_millis() }
            }
        }
    }

    pub(super) fn too_large(&self, what: &'static str, value: u64, limit: impl Into<u64>) -> Error {
        Error::TooLarge { device: self.device.clone(), what, value, limit: limit.into() }
    }
}

#[cfg(test)]
impl Channel {
    /// Returns where and how large the buffers of request and reply are, to tell whether they moved or grew.
    pub(super) fn buffers(&self) -> [(usize, usize); 2] {
        let request = (self.request.as_ptr().addr(), self.request.capacity());
        [request, (self.reply.as_ptr().addr(), self.reply.capacity() * size_of::<u64>())]
    }

    pub(super) fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }
}

/// Says why an exchange failed, before it is given the device's name.
#[derive(Debug)]
enum Failure {
    Refused(i32),
    Malformed(DecodeError),
    Stopped(Stopped),
}

impl From<DecodeError> for Failure {
    fn from(error: DecodeError) -> Self {
        Failure::Malformed(error)
    }
}

impl From<Stopped> for Failure {
    fn from(stopped: Stopped) -> Self {
        Failure::Stopped(stopped)
    }
}

/// Checks a field of a reply that repeats one of the request.
pub(super) fn echoed<T: Into<u64>>(what: &'static str, value: T, expected: T) -> Result<(), DecodeError> {
    let (value, expected) = (value.into(), expected.into());
    if value == expected { Ok(()) } else { Err(DecodeError::Unexpected { what, value, expected }) }
}
