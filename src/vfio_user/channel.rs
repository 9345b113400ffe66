// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One request and its reply: identifiers, limits, the deadline, and what a failure leaves behind.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use zerocopy::IntoBytes;

use super::decode::DecodeError;
use super::dma::DmaServer;
use super::error::{BrokenBy, Error, ServeError};
use super::message::{HEADER_BYTES, Header, MAX_REQUEST_DATA_BYTES, MessageKind, VfioUserCommand};
use super::transport::{Deadline, Stopped, Transport, first_can_be_read};

/// Room in every reply for its fixed part, whatever newer servers append to it, in bytes.
const FIXED_REPLY_BYTES: usize = 4096;
/// Largest payload of a request, in bytes: its data and the fixed part before it.
const MAX_REQUEST_BYTES: usize = MAX_REQUEST_DATA_BYTES + 256;
/// Longest time any request may take, so that a deadline is always a time.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);
/// Bytes that a transfer of several requests moves at least in each second beyond the time of one.
const LEAST_BYTES_PER_SECOND: usize = 1 << 20;
/// Most requests of the server that are served in one go while nothing is asked of it.
const MAX_SERVED: usize = 64;

/// Carries requests to one server and keeps the buffers, reused, of the last request and reply.
#[derive(Debug)]
pub(super) struct Channel {
    device: String,
    main: Transport,
    /// Where the server's own requests come, if it passed such a socket along.
    twin: Option<Transport>,
    twin_ended: bool,
    pub(super) dma: DmaServer,
    timeout: Duration,
    next_id: u16,
    broken: Option<BrokenBy>,
    request: Vec<u8>,
    reply: Vec<u64>,
    /// The descriptor that came with the last reply.
    passed: Option<OwnedFd>,
    served: Served,
}

/// The buffers of a request of the server and its reply.
#[derive(Debug, Default)]
struct Served {
    request: Vec<u8>,
    reply: Vec<u8>,
}

impl Channel {
    pub(super) fn new(stream: UnixStream, device: String, timeout: Duration, dma: DmaServer) -> Self {
        Channel {
            device,
            main: Transport::new(stream),
            twin: None,
            twin_ended: false,
            dma,
            timeout: timeout.min(LONGEST_TIMEOUT),
            next_id: 0,
            broken: None,
            request: Vec::new(),
            reply: Vec::new(),
            passed: None,
            served: Served::default(),
        }
    }

    pub(super) fn device(&self) -> &str {
        &self.device
    }

    /// Returns when a transfer of `bytes` in several requests has to be over if it begins now.
    pub(super) fn deadline(&self, bytes: usize) -> Deadline {
        let longer = Duration::from_secs((bytes / LEAST_BYTES_PER_SECOND) as u64);
        Deadline::after(self.timeout.saturating_add(longer).min(LONGEST_TIMEOUT))
    }

    /// Sends one request and waits for its reply, whose payload of the returned size is then in the reply buffer.
    ///
    /// The reply may hold `data_bytes` of data besides its fixed part.
    pub(super) fn exchange(
        &mut self,
        command: VfioUserCommand,
        parts: &[&[u8]],
        fd: Option<BorrowedFd<'_>>,
        data_bytes: usize,
    ) -> Result<usize, Error> {
        self.compose(command, parts)?;
        self.converse(command, fd, data_bytes, self.deadline(0))
    }

    /// Makes one of several requests, which all end before `deadline`; else as [`Channel::exchange`].
    pub(super) fn exchange_before(
        &mut self,
        deadline: Deadline,
        command: VfioUserCommand,
        parts: &[&[u8]],
        data_bytes: usize,
    ) -> Result<usize, Error> {
        self.compose(command, parts)?;
        self.converse(command, None, data_bytes, deadline)
    }

    /// Puts the next request into its buffer.
    fn compose(&mut self, command: VfioUserCommand, parts: &[&[u8]]) -> Result<(), Error> {
        self.check_usable()?;
        let payload_bytes = parts.iter().map(|part| part.len()).sum();
        if payload_bytes > MAX_REQUEST_BYTES {
            return Err(self.too_large("request", payload_bytes as u64, MAX_REQUEST_BYTES as u64));
        }
        let header = Header::new(
            self.next_id,
            command.to_wire(),
            MessageKind::Command { no_reply: false },
            payload_bytes,
        )
        .expect("a request is far smaller than the largest message");
        self.request.clear();
        self.request.extend_from_slice(&header.encode());
        parts.iter().for_each(|part| self.request.extend_from_slice(part));
        Ok(())
    }

    fn converse(
        &mut self,
        command: VfioUserCommand,
        fd: Option<BorrowedFd<'_>>,
        data_bytes: usize,
        deadline: Deadline,
    ) -> Result<usize, Error> {
        self.broken = Some(BrokenBy::Interrupted(command));
        let limit = data_bytes.saturating_add(FIXED_REPLY_BYTES);
        let outcome = self.try_converse(command, fd, limit, deadline);
        self.settle(outcome.map_err(|failure| self.name(command, failure, deadline)))
    }

    fn try_converse(
        &mut self,
        command: VfioUserCommand,
        fd: Option<BorrowedFd<'_>>,
        limit: usize,
        deadline: Deadline,
    ) -> Result<usize, Failure> {
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        self.main.send(&self.request, fd, deadline)?;
        let header = self.await_reply(deadline)?;
        let reply = self.receive_reply(&header, id, command, limit, deadline);
        self.serve_what_came_before(deadline).map_err(Failure::Serving)?;
        reply
    }

    /// Receives the header of the reply; requests of the server that come before it are served.
    fn await_reply(&mut self, deadline: Deadline) -> Result<Header, Failure> {
        loop {
            if self.is_twin_next(deadline)? {
                self.serve_twin(deadline).map_err(Failure::Serving)?;
                continue;
            }
            let (header, passed) = receive_header(&mut self.main, deadline)?;
            let MessageKind::Command { .. } = header.kind() else {
                self.passed = passed;
                return Ok(header);
            };
            let served = serve(&mut self.main, &header, &mut self.dma, &mut self.served, deadline);
            served.map_err(Failure::Serving)?;
        }
    }

    /// Waits for a message where there is a twin socket, and tells whether it is a request of the server alone.
    fn is_twin_next(&self, deadline: Deadline) -> Result<bool, Fault> {
        match &self.twin {
            Some(twin) if !self.twin_ended => Ok(!first_can_be_read(&self.main, twin, deadline)?),
            _ => Ok(false),
        }
    }

    fn receive_reply(
        &mut self,
        header: &Header,
        id: u16,
        command: VfioUserCommand,
        limit: usize,
        deadline: Deadline,
    ) -> Result<usize, Failure> {
        let payload_bytes = checked_payload(header, limit)?;
        let words = payload_bytes.div_ceil(size_of::<u64>());
        if self.reply.len() < words {
            self.reply.resize(words, 0);
        }
        self.main.receive(&mut self.reply.as_mut_bytes()[..payload_bytes], deadline)?;
        echoed("message id of the reply", header.id(), id)?;
        echoed("command of the reply", header.command(), command.to_wire())?;
        match header.kind() {
            MessageKind::ErrorReply { errno } => Err(Failure::Refused(errno)),
            _ => Ok(payload_bytes),
        }
    }

    /// Serves the twin socket's requests that were there when the reply came: writes that want no reply must not be overtaken
    /// by the news that the device has stopped.
    fn serve_what_came_before(&mut self, deadline: Deadline) -> Result<(), Fault> {
        let Some(twin) = &self.twin else { return Ok(()) };
        let mut waiting = twin.waiting_bytes()?;
        while waiting > 0 {
            waiting = waiting.saturating_sub(self.serve_twin(deadline)? as u64);
        }
        Ok(())
    }

    /// Serves one request that comes over the twin socket and returns its bytes.
    fn serve_twin(&mut self, deadline: Deadline) -> Result<usize, Fault> {
        let Some(twin) = &mut self.twin else { return Ok(usize::MAX) };
        match serve_next(twin, &mut self.dma, &mut self.served, deadline) {
            // The main socket's end is awaited, to say what the server did not answer.
            Err(Fault::Stopped(Stopped::Closed)) => {
                self.twin_ended = true;
                Ok(usize::MAX)
            }
            served => served,
        }
    }

    /// Serves the requests of the server that wait, at most [`MAX_SERVED`], and returns how many that were.
    pub(super) fn serve_pending(&mut self) -> Result<usize, Error> {
        self.check_usable()?;
        self.broken = Some(BrokenBy::Serving);
        let deadline = self.deadline(0);
        let served = self.try_serve_pending(deadline);
        self.settle(served.map_err(|fault| self.name_served(fault, deadline)))
    }

    fn try_serve_pending(&mut self, deadline: Deadline) -> Result<usize, Fault> {
        let line = self.twin.as_mut().unwrap_or(&mut self.main);
        let mut count = 0;
        while count < MAX_SERVED && line.can_be_read()? {
            serve_next(line, &mut self.dma, &mut self.served, deadline)?;
            count += 1;
        }
        Ok(count)
    }

    /// Returns what to poll for requests of the server.
    pub(super) fn requests_fd(&self) -> BorrowedFd<'_> {
        self.twin.as_ref().unwrap_or(&self.main).as_fd()
    }

    /// Takes requests of the server from `twin` from now on.
    pub(super) fn serve_over(&mut self, twin: OwnedFd) {
        self.twin = Some(Transport::new(twin.into()));
    }

    /// Takes the descriptor that came with the last reply.
    pub(super) fn take_passed(&mut self) -> Option<OwnedFd> {
        self.passed.take()
    }

    /// Returns the payload of the last reply, whose size [`Channel::exchange`] returned.
    pub(super) fn payload(&self, bytes: usize) -> &[u8] {
        &self.reply.as_bytes()[..bytes]
    }

    /// Lends `words` words of the reply's payload, from word `first` on.
    pub(super) fn words(&self, first: usize, words: usize) -> &[u64] {
        &self.reply[first..first + words]
    }

    /// Passes on what a reply was decoded to; one that could not be ends the connection.
    pub(super) fn checked<T>(
        &mut self,
        command: VfioUserCommand,
        decoded: Result<T, DecodeError>,
    ) -> Result<T, Error> {
        let device = &self.device;
        let named = decoded.map_err(|source| Error::Malformed { device: device.clone(), command, source });
        self.settle(named)
    }

    /// Ends the connection after a failure that leaves it out of step, and remembers why.
    fn settle<T>(&mut self, outcome: Result<T, Error>) -> Result<T, Error> {
        self.broken = outcome.as_ref().err().and_then(Error::broken_by);
        if self.broken.is_some() {
            self.main.shut_down();
            self.twin.iter().for_each(Transport::shut_down);
        }
        outcome
    }

    fn check_usable(&self) -> Result<(), Error> {
        match self.broken {
            Some(source) => Err(Error::Broken { device: self.device.clone(), source }),
            None => Ok(()),
        }
    }

    fn name(&self, command: VfioUserCommand, failure: Failure, deadline: Deadline) -> Error {
        let device = self.device.clone();
        match failure {
            Failure::Refused(errno) => Error::Refused { device, command, errno },
            Failure::Serving(fault) => self.name_served(fault, deadline),
            Failure::Reply(Fault::Malformed(source)) => Error::Malformed { device, command, source },
            Failure::Reply(Fault::Stopped(Stopped::Closed)) => Error::Disconnected { device, command },
            Failure::Reply(Fault::Stopped(Stopped::Failed(source))) => {
                Error::Socket { device, command, source }
            }
            Failure::Reply(Fault::Stopped(Stopped::Late)) => {
                Error::Timeout { device, command, timeout_ms: deadline.allowed_ms() }
            }
        }
    }

    fn name_served(&self, fault: Fault, deadline: Deadline) -> Error {
        let source = match fault {
            Fault::Malformed(source) => ServeError::Malformed(source),
            Fault::Stopped(Stopped::Closed) => ServeError::Disconnected,
            Fault::Stopped(Stopped::Failed(source)) => ServeError::Socket(source),
            Fault::Stopped(Stopped::Late) => ServeError::Timeout { timeout_ms: deadline.allowed_ms() },
        };
        Error::Serve { device: self.device.clone(), source }
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

fn receive_header(line: &mut Transport, deadline: Deadline) -> Result<(Header, Option<OwnedFd>), Fault> {
    let mut bytes = [0; HEADER_BYTES];
    let passed = line.receive_first(&mut bytes, deadline)?;
    Ok((Header::decode(&bytes)?, passed))
}

fn checked_payload(header: &Header, limit: usize) -> Result<usize, DecodeError> {
    let (value, limit) = (header.payload_bytes() as u64, limit as u64);
    match value > limit {
        true => Err(DecodeError::OverLimit { what: "payload size", value, limit }),
        false => Ok(header.payload_bytes()),
    }
}

/// Serves the next message on `line`, which must be a request, and returns its bytes.
fn serve_next(
    line: &mut Transport,
    dma: &mut DmaServer,
    buffers: &mut Served,
    deadline: Deadline,
) -> Result<usize, Fault> {
    let (header, _) = receive_header(line, deadline)?;
    let MessageKind::Command { .. } = header.kind() else {
        let (what, value) = ("reply to no request, of message id", header.id().into());
        return Err(DecodeError::Invalid { what, value }.into());
    };
    serve(line, &header, dma, buffers, deadline)?;
    Ok(HEADER_BYTES + header.payload_bytes())
}

/// Receives the rest of the server's request that `header` begins, does what it asks or declines it, and replies if it wants that.
fn serve(
    line: &mut Transport,
    header: &Header,
    dma: &mut DmaServer,
    buffers: &mut Served,
    deadline: Deadline,
) -> Result<(), Fault> {
    let payload_bytes = checked_payload(header, dma.max_request_bytes() + FIXED_REPLY_BYTES)?;
    buffers.request.resize(payload_bytes, 0);
    line.receive(&mut buffers.request, deadline)?;
    buffers.reply.clear();
    buffers.reply.resize(HEADER_BYTES, 0);
    let kind = match dma.answer(header.command(), &buffers.request, &mut buffers.reply) {
        Ok(()) => MessageKind::Reply,
        Err(errno) => MessageKind::ErrorReply { errno },
    };
    if header.kind() == (MessageKind::Command { no_reply: true }) {
        return Ok(());
    }
    if kind != MessageKind::Reply {
        buffers.reply.truncate(HEADER_BYTES);
    }
    let answered = buffers.reply.len() - HEADER_BYTES;
    let reply = Header::new(header.id(), header.command(), kind, answered)?;
    buffers.reply[..HEADER_BYTES].copy_from_slice(&reply.encode());
    Ok(line.send(&buffers.reply, None, deadline)?)
}

/// Says why a message did not get through.
#[derive(Debug)]
enum Fault {
    Malformed(DecodeError),
    Stopped(Stopped),
}

impl From<DecodeError> for Fault {
    fn from(error: DecodeError) -> Self {
        Fault::Malformed(error)
    }
}

impl From<Stopped> for Fault {
    fn from(stopped: Stopped) -> Self {
        Fault::Stopped(stopped)
    }
}

/// Says why an exchange failed, before it is given the device's name.
#[derive(Debug)]
enum Failure {
    Refused(i32),
    Reply(Fault),
    Serving(Fault),
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Failure::Reply(fault)
    }
}

impl From<DecodeError> for Failure {
    fn from(error: DecodeError) -> Self {
        Fault::from(error).into()
    }
}

impl From<Stopped> for Failure {
    fn from(stopped: Stopped) -> Self {
        Fault::from(stopped).into()
    }
}

/// Checks a field of a reply that repeats one of the request.
pub(super) fn echoed<T: Into<u64>>(what: &'static str, value: T, expected: T) -> Result<(), DecodeError> {
    let (value, expected) = (value.into(), expected.into());
    if value == expected { Ok(()) } else { Err(DecodeError::Unexpected { what, value, expected }) }
}
