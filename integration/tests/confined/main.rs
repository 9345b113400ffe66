// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Each part of the library under a seccomp filter of just its list in `vfio_migration::syscalls`; what needs VFIO is in `bed_confined`.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "memory slots of a real VM"))]

#[expect(dead_code, reason = "the library's own tests use the rest")]
#[path = "../../../tests/transfer/certificates.rs"]
mod certificates;
mod components;
#[expect(dead_code, reason = "the library's own tests use the rest")]
#[path = "../../../tests/frames/mod.rs"]
mod frames;
#[cfg(target_arch = "x86_64")]
#[path = "../../../tests/guest/mod.rs"]
mod guest;
#[cfg(target_arch = "x86_64")]
mod kvm;
mod memory;
mod snapshot;
mod transfer;
#[path = "../../../tests/send/userfault/handler.rs"]
mod userfault;
mod vfio_user;
#[expect(dead_code, reason = "the tool's tests use the rest")]
#[path = "../../../tests/local_send/vmm.rs"]
mod vmm;
/// What the borrowed handler of a userfaultfd skips by.
mod skip {
    pub(crate) use vfio_migration_integration::skip;
}
