// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `sys/mman.h`: words in a memory file that another process sets bits in.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::fs::{MemfdFlags, SealFlags};

/// Zeroed words in a memory file of their own, mapped here and shared with whoever gets its descriptor.
///
/// The file is sealed: nobody can shrink it, which would make reading it fatal here, or grow it.
#[derive(Debug)]
pub(crate) struct SharedWords {
    memory: NonNull<AtomicU64>,
    count: usize,
    file: File,
}

// SAFETY: the mapping belongs to this value alone, and its words are atomics.
unsafe impl Send for SharedWords {}

impl SharedWords {
    /// Makes `count` words, more than none, in a file that shows as `name` in `/proc`.
    pub(crate) fn new(name: &str, count: usize) -> io::Result<Self> {
        let bytes = count.checked_mul(size_of::<u64>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create(name, flags)?);
        file.set_len(bytes as u64)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let none = std::ptr::null_mut();
        // SAFETY: a new mapping, where the kernel has room for it, touches no memory that is in use.
        let address = unsafe { libc::mmap(none, bytes, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = NonNull::new(address.cast()).ok_or(io::Error::from_raw_os_error(libc::EFAULT))?;
        Ok(Self { memory, count, file })
    }

    /// The words, which others may change at any time.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping starts at a page, holds `count` words that any bits are a value of, all of them atomics, stands as
        // long as `self`, and is backed throughout: the file has that size and is sealed against shrinking.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.count) }
    }

    /// Bytes of the words.
    pub(crate) fn bytes(&self) -> u64 {
        size_of_val(self.words()) as u64
    }
}

impl AsFd for SharedWords {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this address and length, and nothing borrows from it any more.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), self.count * size_of::<u64>()) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn what_others_write_into_the_file_is_in_the_words() {
        let words = SharedWords::new("words", 600).unwrap();
        assert_eq!(words.bytes(), 4800);
        assert!(words.words().iter().all(|word| word.load(Ordering::SeqCst) == 0));
        let file = File::from(words.as_fd().try_clone_to_owned().unwrap());
        file.write_all_at(&[0x80], 599 * 8 + 7).unwrap();
        assert_eq!(u64::from_le(words.words()[599].load(Ordering::SeqCst)), 1 << 63);
    }

    #[test]
    fn nobody_can_shrink_or_grow_the_file_nor_lift_the_seals() {
        let words = SharedWords::new("words", 512).unwrap();
        let file = File::from(words.as_fd().try_clone_to_owned().unwrap());
        for length in [0, 4095, 8192] {
            assert_eq!(file.set_len(length).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        }
        rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE).unwrap_err();
    }

    #[test]
    fn more_words_than_there_are_addresses_are_an_error() {
        SharedWords::new("words", usize::MAX).unwrap_err();
        SharedWords::new("words", usize::MAX / 16).unwrap_err();
    }
}
