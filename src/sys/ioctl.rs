// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `asm-generic/ioctl.h`: opcodes, and the ways to issue one.

use std::io;
use std::os::fd::AsRawFd;

/// An ioctl number: direction, argument size, type and number.
pub(crate) type Opcode = libc::c_ulong;

const WRITE: Opcode = 1;
const READ: Opcode = 2;

/// `_IO`: no argument, or one the number does not speak of.
pub(crate) const fn io(kind: u8, number: u8) -> Opcode {
    ((kind as Opcode) << 8) | number as Opcode
}

/// `_IOW`: the kernel reads a `T`.
pub(crate) const fn iow<T>(kind: u8, number: u8) -> Opcode {
    (WRITE << 30) | ((size_of::<T>() as Opcode) << 16) | io(kind, number)
}

/// `_IOWR`: the kernel reads and writes a `T`.
pub(crate) const fn iowr<T>(kind: u8, number: u8) -> Opcode {
    (READ << 30) | iow::<T>(kind, number)
}

/// Issues an ioctl whose argument is a number.
///
/// # Safety
/// `opcode` takes a number, not a pointer, and what it does to the process is sound.
pub(crate) unsafe fn with_val(fd: &impl AsRawFd, opcode: Opcode, value: libc::c_ulong) -> io::Result<i32> {
    // SAFETY: the caller vouches for opcode and value.
    answer(unsafe { libc::ioctl(fd.as_raw_fd(), opcode, value) })
}

/// Issues an ioctl that reads its argument.
///
/// # Safety
/// `opcode` reads no more than a `T` from its argument, and what it does through pointers in it is sound.
pub(crate) unsafe fn with_ref<T>(fd: &impl AsRawFd, opcode: Opcode, argument: &T) -> io::Result<i32> {
    // SAFETY: `argument` lives through the call; the caller vouches for the rest.
    answer(unsafe { libc::ioctl(fd.as_raw_fd(), opcode, std::ptr::from_ref(argument)) })
}

/// Issues an ioctl that reads and writes its argument, which may be a slice.
///
/// # Safety
/// `opcode` reads and writes no more than `argument`, leaves it a valid `T`, and what it does through pointers in it is sound.
pub(crate) unsafe fn with_mut<T: ?Sized>(
    fd: &impl AsRawFd,
    opcode: Opcode,
    argument: &mut T,
) -> io::Result<i32> {
    let argument = std::ptr::from_mut(argument).cast::<libc::c_void>();
    // SAFETY: the borrow lives through the call; the caller vouches for the rest.
    answer(unsafe { libc::ioctl(fd.as_raw_fd(), opcode, argument) })
}

fn answer(returned: i32) -> io::Result<i32> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(returned) }
}
