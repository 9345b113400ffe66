// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `linux/kvm.h`: the dirty log of a memory slot, over any VM descriptor.
//!
//! kvm-ioctls has no CLEAR, and its GET allocates.

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log,
    kvm_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_userspace_memory_region,
};

use crate::bitmap::WORD_BITS;
use crate::granule::Granule;
use crate::range::GpaRange;

use super::ioctl;

const KVM_GET_API_VERSION: ioctl::Opcode = ioctl::io(0xae, 0x00);
pub(crate) const KVM_CHECK_EXTENSION: ioctl::Opcode = ioctl::io(0xae, 0x03);
pub(crate) const KVM_GET_DIRTY_LOG: ioctl::Opcode = ioctl::iow::<kvm_dirty_log>(0xae, 0x42);
pub(crate) const KVM_SET_USER_MEMORY_REGION: ioctl::Opcode =
    ioctl::iow::<kvm_userspace_memory_region>(0xae, 0x46);
pub(crate) const KVM_ENABLE_CAP: ioctl::Opcode = ioctl::iow::<kvm_enable_cap>(0xae, 0xa3);
pub(crate) const KVM_CLEAR_DIRTY_LOG: ioctl::Opcode = ioctl::iowr::<kvm_clear_dirty_log>(0xae, 0xc0);

/// A memory slot as it was registered with `KVM_SET_USER_MEMORY_REGION`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvmSlot {
    id: u32,
    gpa: GpaRange,
    userspace_addr: u64,
    flags: u32,
}

impl KvmSlot {
    /// Describes the slot `id` (address space in the upper 16 bits), which maps `gpa` to `userspace_addr` with `flags`.
    ///
    /// # Safety
    /// The VM whose dirty log is read through this value has exactly this slot, for as long as the value is in use: switching
    /// its log on registers the slot anew with these numbers, and the kernel writes a bitmap of its length.
    #[expect(unsafe_code, reason = "a wrong slot lets the guest and the kernel write into foreign memory")]
    pub unsafe fn new(id: u32, gpa: GpaRange, userspace_addr: u64, flags: u32) -> Self {
        Self { id, gpa, userspace_addr, flags: flags & !KVM_MEM_LOG_DIRTY_PAGES }
    }

    /// Slot number, address space in the upper 16 bits.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Guest-physical range.
    pub fn gpa(&self) -> GpaRange {
        self.gpa
    }

    /// Pages of the slot.
    pub(crate) fn pages(&self) -> u64 {
        Granule::host_page().bits_for(self.gpa.len())
    }

    /// Words its bitmap takes.
    pub(crate) fn words(&self) -> usize {
        usize::try_from(self.pages()).expect("the slot is mapped here").div_ceil(WORD_BITS)
    }

    /// Switches the slot's dirty log on or off.
    pub(crate) fn log_dirty_pages(&self, vm: &impl AsRawFd, on: bool) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: self.id,
            flags: self.flags | if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: self.gpa.start(),
            memory_size: self.gpa.len(),
            userspace_addr: self.userspace_addr,
        };
        // SAFETY: the kernel reads `region` during the call; `KvmSlot::new`'s caller vouches that it only changes the flag.
        unsafe { ioctl::with_ref(vm, KVM_SET_USER_MEMORY_REGION, &region) }.map(drop)
    }

    /// Copies the slot's dirty bits into `words`; clears them in the kernel unless MANUAL_PROTECT is on.
    pub(crate) fn dirty_log(&self, vm: &impl AsRawFd, words: &mut [u64]) -> io::Result<()> {
        assert_eq!(words.len(), self.words(), "the kernel writes one bit per page of the slot");
        let log = kvm_dirty_log {
            slot: self.id,
            padding1: 0,
            __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: words.as_mut_ptr().cast() },
        };
        // SAFETY: the kernel writes ALIGN(pages, 64) bits, which is what `words` was just checked to hold, during the call.
        unsafe { ioctl::with_ref(vm, KVM_GET_DIRTY_LOG, &log) }.map(drop)
    }

    /// Clears the bits of `mask` from word `first_word` on, and protects their pages again.
    ///
    /// `mask` may only hold bits that [`KvmSlot::dirty_log`] returned.
    pub(crate) fn clear_dirty_log(
        &self,
        vm: &impl AsRawFd,
        first_word: usize,
        mask: &[u64],
    ) -> io::Result<()> {
        let first_page = (first_word * WORD_BITS) as u64;
        let rest = self.pages().checked_sub(first_page).expect("words of the slot");
        let pages = ((mask.len() * WORD_BITS) as u64).min(rest);
        let clear = kvm_clear_dirty_log {
            slot: self.id,
            num_pages: u32::try_from(pages).map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
            first_page,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: mask.as_ptr().cast_mut().cast(),
            },
        };
        // SAFETY: the kernel reads ALIGN(num_pages, 64) bits from `mask`, no more than it holds, during the call.
        unsafe { ioctl::with_ref(vm, KVM_CLEAR_DIRTY_LOG, &clear) }.map(drop)
    }
}

/// How GET and CLEAR share the work; per VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protect {
    /// GET clears.
    AtGet,
    /// GET only copies, CLEAR clears.
    Manual {
        /// Every page starts as dirty, so that switching on needs no protection pass.
        initially_set: bool,
    },
}

/// Asks `/dev/kvm` for the version of its interface.
pub(crate) fn api_version(kvm: &impl AsRawFd) -> io::Result<i32> {
    // SAFETY: the call takes no argument.
    unsafe { ioctl::with_val(kvm, KVM_GET_API_VERSION, 0) }
}

/// Returns the flags `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` accepts; 0 where it is missing.
pub(crate) fn manual_protect_flags(vm: &impl AsRawFd) -> u32 {
    // SAFETY: the argument is a number.
    let flags = unsafe { ioctl::with_val(vm, KVM_CHECK_EXTENSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into()) };
    flags.map_or(0, |flags| u32::try_from(flags).unwrap_or(0))
}

/// Chooses how the VM's dirty log is cleared.
pub(crate) fn protect(vm: &impl AsRawFd, how: Protect) -> io::Result<()> {
    let flags = match how {
        Protect::AtGet => 0,
        Protect::Manual { initially_set: false } => KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
        Protect::Manual { initially_set: true } => {
            KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET
        }
    };
    let mut cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
    cap.args[0] = flags.into();
    // SAFETY: the kernel reads `cap` during the call.
    unsafe { ioctl::with_ref(vm, KVM_ENABLE_CAP, &cap) }.map(drop)
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use super::*;

    #[test]
    fn structures_have_the_kernels_layout() {
        assert_eq!(size_of::<kvm_dirty_log>(), 16);
        assert_eq!(offset_of!(kvm_dirty_log, __bindgen_anon_1), 8);
        assert_eq!(size_of::<kvm_clear_dirty_log>(), 24);
        assert_eq!(offset_of!(kvm_clear_dirty_log, num_pages), 4);
        assert_eq!(offset_of!(kvm_clear_dirty_log, first_page), 8);
        assert_eq!(offset_of!(kvm_clear_dirty_log, __bindgen_anon_1), 16);
    }

    #[test]
    fn opcodes_are_the_kernels() {
        assert_eq!(KVM_GET_API_VERSION, 0xae00);
        assert_eq!(KVM_CHECK_EXTENSION, 0xae03);
        assert_eq!(KVM_GET_DIRTY_LOG, 0x4010_ae42);
        assert_eq!(KVM_SET_USER_MEMORY_REGION, 0x4020_ae46);
        assert_eq!(KVM_ENABLE_CAP, 0x4068_aea3);
        assert_eq!(KVM_CLEAR_DIRTY_LOG, 0xc018_aec0);
    }
}
