// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `sys/socket.h`: guest memory to and from a socket, without a copy in between.

use std::io;
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Most slices that one call moves; the kernel's own limit is 1024.
pub(crate) const SLICES: usize = 64;

/// Sends the first [`SLICES`] of `slices` in one call, and returns how many bytes the socket took.
///
/// A closed peer is an error, never a signal.
pub(crate) fn send_slices<B: BitmapSlice>(
    socket: &impl AsRawFd,
    slices: &[VolatileSlice<'_, B>],
) -> io::Result<usize> {
    let guards: Vec<_> = slices.iter().take(SLICES).map(VolatileSlice::ptr_guard).collect();
    let mut vectors: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast_mut().cast(), iov_len: guard.len() })
        .collect();
    let message = message_of(&mut vectors);
    // SAFETY: each vector names a mapping that its guard keeps alive through the call; the kernel only reads from it.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives into the first [`SLICES`] of `slices` in one call, marks what was written, and returns the number of bytes.
pub(crate) fn receive_slices<B: BitmapSlice>(
    socket: &impl AsRawFd,
    slices: &[VolatileSlice<'_, B>],
) -> io::Result<usize> {
    let guards: Vec<_> = slices.iter().take(SLICES).map(VolatileSlice::ptr_guard_mut).collect();
    let mut vectors: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
        .collect();
    let mut message = message_of(&mut vectors);
    // SAFETY: each vector names a mapping that its guard keeps alive through the call and that guest memory allows to change.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_WAITALL) };
    let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    mark_dirty(slices, received);
    Ok(received)
}

/// A message without address and control data; valid as long as `vectors`.
fn message_of(vectors: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all zero is a message without anything.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len();
    message
}

/// Marks the first `bytes` bytes of `slices`, which a pointer was used to write.
fn mark_dirty<B: BitmapSlice>(slices: &[VolatileSlice<'_, B>], bytes: usize) {
    let mut left = bytes;
    for slice in slices {
        let written = left.min(slice.len());
        if written == 0 {
            return;
        }
        slice.bitmap().mark_dirty(0, written);
        left -= written;
    }
}
