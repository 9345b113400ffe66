// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The KVM side of a machine: is KVM usable, the VM, its memory slots, its dirty ring.

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use thiserror::Error;
use vmm_sys_util::errno;

use super::memory::RegionBacking;

const KVM_PATH: &str = "/dev/kvm";
/// Where Intel hosts want three pages of address space for themselves: in the x86 hole.
const TSS_GPA: usize = 0xfffb_d000;

/// Why there is no VM.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KvmError {
    /// The host has no KVM.
    #[error("{KVM_PATH} is absent: this host offers no KVM")]
    Absent {
        /// What opening it answered.
        source: errno::Error,
    },
    /// KVM is there, but not for this user.
    #[error("{KVM_PATH} is there, but this user may not open it")]
    Denied {
        /// What opening it answered.
        source: errno::Error,
    },
    /// KVM is there and does not open for another reason.
    #[error("{KVM_PATH} does not open")]
    Open {
        /// What opening it answered.
        source: errno::Error,
    },
    /// KVM speaks another version of its interface.
    #[error("KVM has API version {found}, not {KVM_API_VERSION}")]
    ApiVersion {
        /// The version it has.
        found: i32,
    },
    /// KVM lacks something that the VMM relies on.
    #[error("KVM lacks {capability}")]
    Lacks {
        /// The missing capability.
        capability: &'static str,
    },
    /// A request to KVM or to the VM failed.
    #[error("{request} failed")]
    Request {
        /// The ioctl.
        request: &'static str,
        /// What the kernel answered.
        source: errno::Error,
    },
    /// A region of RAM was not accepted.
    #[error("Cannot set memory slot {slot} of {len:#x} bytes at {gpa:#x}")]
    Slot {
        /// The slot.
        slot: u32,
        /// First address of the region.
        gpa: u64,
        /// Bytes of the region.
        len: u64,
        /// What the kernel answered.
        source: errno::Error,
    },
    /// The dirty ring was not accepted.
    #[error("Cannot enable a dirty ring of {bytes} bytes, the most is {most}")]
    DirtyRing {
        /// Bytes asked for.
        bytes: u32,
        /// Bytes that KVM offers.
        most: i32,
        /// What the kernel answered.
        source: errno::Error,
    },
}

/// Checks that a VM with a vCPU can be made here, by making one and dropping it.
///
/// # Errors
/// Says whether KVM is absent, denied, or there and not good enough.
pub fn probe_kvm() -> Result<(), KvmError> {
    let kvm = open_kvm()?;
    let vm = create_vm(&kvm)?;
    vm.create_vcpu(0).map(drop).map_err(request("KVM_CREATE_VCPU"))
}

/// A VM with its memory slots, ready for vCPUs.
///
/// Slots are created without `KVM_MEM_LOG_DIRTY_PAGES`: whoever tracks dirty pages sets the flag.
pub(super) struct KvmVm {
    pub(super) kvm: Kvm,
    pub(super) vm: VmFd,
}

impl KvmVm {
    /// Makes a VM over `regions`, with a dirty ring of so many bytes for each vCPU if one is asked for.
    pub(super) fn new(regions: &[RegionBacking], dirty_ring_bytes: Option<u32>) -> Result<Self, KvmError> {
        let kvm = open_kvm()?;
        let vm = create_vm(&kvm)?;
        vm.set_tss_address(TSS_GPA).map_err(request("KVM_SET_TSS_ADDR"))?;
        if let Some(bytes) = dirty_ring_bytes {
            enable_dirty_ring(&vm, bytes)?;
        }
        for region in regions {
            set_slot(&vm, region)?;
        }
        Ok(Self { kvm, vm })
    }
}

pub(super) fn request(request: &'static str) -> impl Fn(errno::Error) -> KvmError {
    move |source| KvmError::Request { request, source }
}

fn open_kvm() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(opening_failed)?;
    let found = kvm.get_api_version();
    if u32::try_from(found) != Ok(KVM_API_VERSION) {
        return Err(KvmError::ApiVersion { found });
    }
    let needed = [(Cap::UserMemory, "KVM_CAP_USER_MEMORY"), (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT")];
    match needed.into_iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, capability)) => Err(KvmError::Lacks { capability }),
        None => Ok(kvm),
    }
}

fn opening_failed(source: errno::Error) -> KvmError {
    match source.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Absent { source },
        libc::EACCES | libc::EPERM => KvmError::Denied { source },
        _ => KvmError::Open { source },
    }
}

fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    loop {
        match kvm.create_vm() {
            // Creating a VM gives up when a signal arrives.
            Err(error) if error.errno() == libc::EINTR => {}
            outcome => return outcome.map_err(request("KVM_CREATE_VM")),
        }
    }
}

fn enable_dirty_ring(vm: &VmFd, bytes: u32) -> Result<(), KvmError> {
    let offers = [KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL]
        .map(|cap| (cap, vm.check_extension_raw(cap.into())));
    let Some((cap, most)) = offers.into_iter().find(|(_, most)| *most > 0) else {
        return Err(KvmError::Lacks { capability: "KVM_CAP_DIRTY_LOG_RING" });
    };
    let mut enable = kvm_enable_cap { cap, ..Default::default() };
    enable.args[0] = u64::from(bytes);
    vm.enable_cap(&enable).map_err(|source| KvmError::DirtyRing { bytes, most, source })
}

#[expect(unsafe_code, reason = "KVM trusts us about where the memory is mapped")]
fn set_slot(vm: &VmFd, region: &RegionBacking) -> Result<(), KvmError> {
    let &RegionBacking { slot, gpa, len, userspace_addr, .. } = region;
    let description = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: gpa,
        memory_size: len,
        userspace_addr,
    };
    // SAFETY: `userspace_addr` is the start of a live shared mapping of exactly `len` bytes, which the machine keeps
    // until its vCPU is gone, and nothing but a vCPU writes through a slot. This process reaches the mapping only
    // through vm-memory's volatile accesses.
    unsafe { vm.set_user_memory_region(description) }.map_err(|source| KvmError::Slot {
        slot,
        gpa,
        len,
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_kvm_and_a_denied_one_are_told_apart() {
        let said = |errno| opening_failed(errno::Error::new(errno)).to_string();
        assert_eq!(said(libc::ENOENT), "/dev/kvm is absent: this host offers no KVM");
        assert_eq!(said(libc::EACCES), "/dev/kvm is there, but this user may not open it");
        assert_eq!(said(libc::EMFILE), "/dev/kvm does not open");
    }
}
