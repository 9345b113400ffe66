// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The crate's only unsafe code: one file per uAPI header, for what the rust-vmm crates lack; and what the processor offers.
#![expect(unsafe_code, reason = "system calls and ioctls")]
#![cfg_attr(
    not(all(feature = "probe", feature = "transfer")),
    expect(dead_code, reason = "a feature that is off asks the kernel nothing")
)]

pub(crate) mod cpu;
pub(crate) mod guest;
pub(crate) mod ioctl;
pub(crate) mod iommufd;
pub(crate) mod kvm;
pub(crate) mod kvm_ring;
pub(crate) mod shared_words;
pub(crate) mod socket;
pub(crate) mod vfio;

use std::error::Error;
use std::io;

/// Returns the host's page size in bytes.
pub(crate) fn host_page_bytes() -> u64 {
    // SAFETY: sysconf reads no memory of ours.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(bytes).expect("Linux has a page size")
}

/// Whether a kernel says that the device behind it is no more.
pub(crate) fn tells_of_lost_device(error: &(dyn Error + 'static)) -> bool {
    let mut causes = std::iter::successors(Some(error), |&error| error.source());
    causes.any(|cause| {
        let cause: Option<&io::Error> = cause.downcast_ref();
        cause.and_then(io::Error::raw_os_error) == Some(libc::ENODEV)
    })
}
