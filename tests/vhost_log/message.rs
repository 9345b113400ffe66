// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The few messages of the vhost-user protocol that logging takes; each is answered.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};

/// The feature bit that makes a back end log the buffers it writes.
pub(crate) const VHOST_F_LOG_ALL: u64 = 1 << 26;

/// The flag of a ring that makes a back end log the used ring.
pub(crate) const VHOST_VRING_F_LOG: u64 = 1;

/// What a front end asks; the numbers are the protocol's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Request {
    SetFeatures = 2,
    SetMemTable = 5,
    SetLogBase = 6,
    SetVringAddr = 9,
    GetVringBase = 11,
    SetVringEnable = 18,
}

impl Request {
    fn from_number(number: u32) -> io::Result<Self> {
        use Request::*;
        let all = [SetFeatures, SetMemTable, SetLogBase, SetVringAddr, GetVringBase, SetVringEnable];
        let unknown = || io::Error::other(format!("no such request: {number}"));
        all.into_iter().find(|&request| request as u32 == number).ok_or_else(unknown)
    }
}

/// A message of at most two words; a descriptor comes with some.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) request: Request,
    pub(crate) payload: [u64; 2],
    pub(crate) fd: Option<OwnedFd>,
}

/// Version 1, with an answer wanted.
const FLAGS: u32 = 1 | 1 << 3;

/// Request, flags, bytes of payload.
const HEADER_BYTES: usize = 12;

pub(crate) fn send(
    socket: &UnixStream,
    request: Request,
    payload: &[u64],
    fd: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let payload: Vec<u8> = payload.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let size = u32::try_from(payload.len()).map_err(io::Error::other)?;
    let header: Vec<u8> = [request as u32, FLAGS, size].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = fd.into_iter().collect();
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)), "there is room for one");
    }
    let parts = [IoSlice::new(&header), IoSlice::new(&payload)];
    let sent = rustix::net::sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL)?;
    assert_eq!(sent, header.len() + payload.len(), "so little fits a socket's buffer");
    Ok(())
}

/// Receives a message; none when the other side has hung up.
pub(crate) fn receive(mut socket: &UnixStream) -> io::Result<Option<Message>> {
    let mut header = [0; HEADER_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut header)];
    let received = rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes;
    if received == 0 {
        return Ok(None);
    }
    assert_eq!(received, HEADER_BYTES, "a header comes in one piece");
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let number = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
    let mut words = [0; 16];
    socket.read_exact(&mut words[..usize::try_from(number(8)).map_err(io::Error::other)?])?;
    let word = |at: usize| u64::from_ne_bytes(words[at..at + 8].try_into().unwrap());
    Ok(Some(Message { request: Request::from_number(number(0))?, payload: [word(0), word(8)], fd }))
}

/// Whether a message has come; waits for one if `block`.
pub(crate) fn waits(socket: &UnixStream, block: bool) -> bool {
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut polled = [PollFd::new(socket, PollFlags::IN)];
    poll(&mut polled, (!block).then_some(&at_once)).unwrap() > 0
}
