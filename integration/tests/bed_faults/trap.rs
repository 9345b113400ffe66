// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Takes a bitmap's buffer away from under the kernel: an allocator that puts one chosen allocation on a page of its own, and a
//! descriptor that, asked for its number right before an ioctl, takes that page away until it is asked again.

#![expect(unsafe_code, reason = "an allocator, and the protection of pages")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

const PAGE_BYTES: usize = 4096;

thread_local! {
    /// Size of the allocation to catch on this thread; 0: none.
    static WANTED_BYTES: Cell<usize> = const { Cell::new(0) };
}

/// Where the caught allocation lies; 0: nowhere.
static CAUGHT: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, but for one allocation.
pub(crate) struct Allocator;

// SAFETY: what is not caught goes to the system's allocator and comes back to it; what is caught lies on a page of its own, which is
// as large and as aligned as asked, and is unmapped when freed.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let wanted = WANTED_BYTES.get();
        if wanted != 0 && wanted == layout.size() && CAUGHT.load(Ordering::SeqCst) == 0 {
            WANTED_BYTES.set(0);
            let page = page();
            CAUGHT.store(page.addr(), Ordering::SeqCst);
            return page;
        }
        // SAFETY: as our caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        let caught = CAUGHT.compare_exchange(pointer.addr(), 0, Ordering::SeqCst, Ordering::SeqCst);
        if caught.is_ok() {
            // SAFETY: the page is ours, and its one allocation has ended.
            unsafe { libc::munmap(pointer.cast(), PAGE_BYTES) };
        } else {
            // SAFETY: as our caller promises; it was not caught, so it is the system's.
            unsafe { System.dealloc(pointer, layout) }
        }
    }
}

fn page() -> *mut u8 {
    let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping takes nothing from anybody.
    let page = unsafe { libc::mmap(ptr::null_mut(), PAGE_BYTES, access, flags, -1, 0) };
    if page == libc::MAP_FAILED { ptr::null_mut() } else { page.cast() }
}

fn protect(access: i32) {
    let page = ptr::without_provenance_mut(CAUGHT.load(Ordering::SeqCst));
    // SAFETY: the page is ours; who owns the allocation on it does not touch it until access is given back.
    let protected = unsafe { libc::mprotect(page, PAGE_BYTES, access) };
    assert_eq!(protected, 0, "no allocation was caught");
}

/// Catches this thread's next allocation of so many bytes.
pub(crate) fn catch(bytes: usize) {
    WANTED_BYTES.set(bytes);
}

/// When a [`Trapped`] descriptor closes its trap.
#[derive(Debug, Default)]
pub(crate) struct Trap {
    /// Ioctls until it closes; 0: it does not.
    uses_left: AtomicUsize,
    closed: AtomicBool,
}

impl Trap {
    /// Takes the buffer away, or write access to it, at ioctl number `use_number` from now, counted from 1.
    pub(crate) fn set(&self, use_number: usize) {
        self.uses_left.store(use_number, Ordering::SeqCst);
    }

    /// Counts an ioctl; tells whether it closes the trap.
    fn closes(&self) -> bool {
        let counted =
            self.uses_left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        counted == Ok(1)
    }

    /// Gives the buffer back, where no ioctl has come in between to do so.
    pub(crate) fn open(&self) {
        if self.closed.swap(false, Ordering::SeqCst) {
            protect(libc::PROT_READ | libc::PROT_WRITE);
        }
    }
}

/// A descriptor with a trap.
#[derive(Debug)]
pub(crate) struct Trapped<F> {
    pub(crate) inner: F,
    /// What may be done with the buffer while the trap is closed: nothing, or only reading.
    pub(crate) readable: bool,
    pub(crate) trap: Arc<Trap>,
}

impl<F: AsRawFd> AsRawFd for Trapped<F> {
    fn as_raw_fd(&self) -> RawFd {
        if self.trap.closes() {
            protect(if self.readable { libc::PROT_READ } else { libc::PROT_NONE });
            self.trap.closed.store(true, Ordering::SeqCst);
        } else {
            self.trap.open();
        }
        self.inner.as_raw_fd()
    }
}
