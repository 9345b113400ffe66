// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Gets a vCPU out of `KVM_RUN` at once, from any thread, without a race.
//!
//! `kvm_run.immediate_exit` alone stops a vCPU that is about to enter the guest, a signal alone one that is in it.
//! Setting the first and then sending the second stops it wherever it is.
#![expect(unsafe_code, reason = "the flag lies in memory that the kernel shares with us")]

use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::memory::PAGE_LEN;

/// A second mapping of the start of a vCPU's `kvm_run`, of which only the flag is used.
pub(super) struct ImmediateExit {
    page: NonNull<libc::c_void>,
}

// SAFETY: The mapping belongs to the process, not to a thread, and the flag is only reached as an atomic.
unsafe impl Send for ImmediateExit {}
// SAFETY: As above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    /// Maps the flag of `vcpu`, and makes sure that the signal that goes with it has a handler.
    pub(super) fn new(vcpu: &VcpuFd) -> errno::Result<Self> {
        register_signal_handler(SIGRTMIN(), nothing)?;
        // SAFETY: A new mapping at an address of the kernel's choosing touches nothing that exists.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE_LEN,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(page) {
            Some(page) if page.as_ptr() != libc::MAP_FAILED => Ok(Self { page }),
            _ => errno::errno_result(),
        }
    }

    /// Makes the next or present `KVM_RUN` finish what is pending and return, until [`Self::clear`].
    pub(super) fn set(&self) {
        self.flag().store(1, Ordering::SeqCst);
    }

    /// Lets `KVM_RUN` run the guest again.
    pub(super) fn clear(&self) {
        self.flag().store(0, Ordering::SeqCst);
    }

    /// Stops the vCPU that `thread` runs.
    pub(super) fn kick(&self, thread: &JoinHandle<()>) {
        self.set();
        if let Err(error) = thread.kill(SIGRTMIN()) {
            log::error!("Cannot signal the vCPU's thread: {error}");
        }
    }

    fn flag(&self) -> &AtomicU8 {
        // SAFETY: The flag lies inside the page that was mapped.
        let flag = unsafe { self.page.cast::<u8>().add(offset_of!(kvm_run, immediate_exit)) };
        // SAFETY: The page stays mapped as long as `self`; a byte is always aligned; the kernel only reads this one
        // (it is an input of KVM_RUN), and this process writes it nowhere else.
        unsafe { AtomicU8::from_ptr(flag.as_ptr()) }
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        // SAFETY: Our own mapping of this length; no reference to the flag outlives `self`.
        unsafe { libc::munmap(self.page.as_ptr(), PAGE_LEN) };
    }
}

/// The signal has done its work when it has interrupted `KVM_RUN`.
extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_is_the_second_byte_of_kvm_run() {
        assert_eq!(offset_of!(kvm_run, immediate_exit), 1);
    }
}
