// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A userfaultfd, and the thread that fills the pages it asks for: `linux/userfaultfd.h`.
#![expect(unsafe_code, reason = "userfaultfd has no safe wrapper among our dependencies")]

use std::fs::File;
use std::io::{self, PipeWriter, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};
use vfio_migration::granule::Granule;

/// `_IOWR(UFFDIO, number, argument)`.
const fn iowr<T>(number: libc::c_ulong) -> libc::c_ulong {
    (3 << 30) | ((size_of::<T>() as libc::c_ulong) << 16) | (0xaa << 8) | number
}

/// `struct uffdio_api`.
#[repr(C)]
#[derive(Default)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

impl Api {
    const VERSION: u64 = 0xaa;
    const OPCODE: libc::c_ulong = iowr::<Self>(0x3f);
}

/// `struct uffdio_register`.
#[repr(C)]
#[derive(Default)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

impl Register {
    const MISSING: u64 = 1;
    const OPCODE: libc::c_ulong = iowr::<Self>(0x00);
}

/// `struct uffdio_copy`.
#[repr(C)]
#[derive(Default)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

impl Copy {
    const OPCODE: libc::c_ulong = iowr::<Self>(0x03);
}

/// Bytes of `struct uffd_msg`, whose first says what it is, and whose third word is the address that a fault is at.
const MESSAGE_BYTES: usize = 32;
const PAGE_FAULT: u8 = 0x12;

/// Fills missing pages from a thread of its own, until it is dropped.
pub(crate) struct Handler {
    /// Closed to end the thread.
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Handler {
    /// Registers the mappings, each an address and a length, and fills their pages with `filling` as they are touched; `None`,
    /// loudly, where no userfaultfd is to be had.
    pub(crate) fn serve(mappings: &[(u64, u64)], filling: u8) -> Option<Self> {
        let uffd = match open() {
            Ok(uffd) => uffd,
            Err(error) => {
                crate::skip::skip(format!("cannot have a userfaultfd here: {error}"));
                return None;
            }
        };
        for &(start, len) in mappings {
            let mut register = Register { start, len, mode: Register::MISSING, ioctls: 0 };
            // SAFETY: the kernel writes only to the structure; the mapping is that of memory made to be written by others.
            unsafe { ioctl(&uffd, Register::OPCODE, &mut register) }.unwrap();
        }
        let (stopped, stop) = io::pipe().unwrap();
        let thread = thread::spawn(move || {
            while is_asked(&uffd, &stopped) {
                fill(&uffd, filling);
            }
        });
        Some(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn open() -> io::Result<File> {
    // SAFETY: the call reads no memory of ours.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    let fd = i32::try_from(fd).ok().filter(|&fd| fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the descriptor is new, and nobody else's.
    let uffd = unsafe { File::from_raw_fd(fd) };
    // SAFETY: the kernel writes only to the structure.
    unsafe { ioctl(&uffd, Api::OPCODE, &mut Api { api: Api::VERSION, ..Api::default() }) }?;
    Ok(uffd)
}

/// # Safety
/// `opcode` reads and writes a `T`, and what it does through addresses in it is sound.
unsafe fn ioctl<T>(uffd: &File, opcode: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: the borrow lives through the call; the caller vouches for the rest.
    let answer = unsafe { libc::ioctl(uffd.as_raw_fd(), opcode, std::ptr::from_mut(argument)) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Waits until a page is asked for; false once it is time to end.
fn is_asked(uffd: &File, stopped: &impl AsFd) -> bool {
    let mut fds = [PollFd::new(uffd, PollFlags::IN), PollFd::new(stopped, PollFlags::IN)];
    poll(&mut fds, None).unwrap();
    fds[1].revents().is_empty()
}

fn fill(mut uffd: &File, filling: u8) {
    let mut message = [0; MESSAGE_BYTES];
    match uffd.read(&mut message) {
        // Another read of the same page was answered, and this one with it.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
        read => assert_eq!((read.unwrap(), message[0]), (MESSAGE_BYTES, PAGE_FAULT)),
    }
    let address = u64::from_ne_bytes(message[16..24].try_into().unwrap());
    let len = Granule::host_page().bytes();
    let page = vec![filling; usize::try_from(len).unwrap()];
    let (dst, src) = (address & !(len - 1), page.as_ptr() as u64);
    // SAFETY: the kernel reads a page of ours, and fills one that is registered and missing.
    match unsafe { ioctl(uffd, Copy::OPCODE, &mut Copy { dst, src, len, ..Copy::default() }) } {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
        filled => filled.unwrap(),
    }
}
