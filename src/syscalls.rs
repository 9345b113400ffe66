// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the library asks the kernel for: a list for each source and each part, for a VMM that confines its threads with seccomp.
//!
//! A thread that uses a part may make the calls of its list, those of [`RUNTIME`], and those of the sources and devices the part is
//! given. Threads that the library starts make no others, and inherit the filter of the thread that starts them. A list holds what
//! the part does with objects that it was given: opening, and making the VM, is the VMM's. So [`probe`](crate::probe) has no list: it
//! opens every device itself. Call it before the VMM is confined, or in another process.
//!
//! ```
//! use vfio_migration::syscalls::{self, Syscall};
//! let of_the_dirty_log = [syscalls::KVM_LOG_MANUAL, syscalls::RUNTIME].concat();
//! let ioctls: Vec<u32> = of_the_dirty_log.iter().filter_map(Syscall::request).collect();
//! assert!(ioctls.contains(&0xc018_aec0), "KVM_CLEAR_DIRTY_LOG");
//! ```
//!
//! The lists hold with the GNU C library on a kernel that has the calls; an older one that lacks `clone3`, say, is asked again by
//! other names. A TCP host's name is looked up by the C library, which opens whatever files and sockets the host is set up for: give an
//! address where connections are filtered.

use libc::c_long;

use crate::sys::{ioctl, iommufd, kvm, kvm_ring, vfio};

/// A system call: one number, and of `ioctl` one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Syscall {
    number: c_long,
    request: Option<u32>,
}

impl Syscall {
    const fn new(number: c_long) -> Self {
        Self { number, request: None }
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the kernel takes 32 bits of a request, and checks below"
    )]
    const fn ioctl(request: ioctl::Opcode) -> Self {
        assert!(request <= u32::MAX as ioctl::Opcode, "a request has 32 bits");
        Self { number: libc::SYS_ioctl, request: Some(request as u32) }
    }

    /// Its number on this architecture, as `SYS_ioctl`.
    pub const fn number(&self) -> c_long {
        self.number
    }

    /// Of an `ioctl`, the request: its second argument.
    pub const fn request(&self) -> Option<u32> {
        self.request
    }
}

/// Calls that newer architectures have under another name only.
#[cfg(feature = "transfer")]
mod renamed {
    use super::Syscall;

    #[cfg(target_arch = "x86_64")]
    pub(super) const NAMES: [Syscall; 3] =
        [Syscall::new(libc::SYS_poll), Syscall::new(libc::SYS_readlink), Syscall::new(libc::SYS_open)];
    #[cfg(not(target_arch = "x86_64"))]
    pub(super) const NAMES: [Syscall; 3] =
        [Syscall::new(libc::SYS_ppoll), Syscall::new(libc::SYS_readlinkat), Syscall::new(libc::SYS_openat)];
}
#[cfg(feature = "transfer")]
const POLL: Syscall = renamed::NAMES[0];
#[cfg(feature = "snapshot")]
const READLINK: Syscall = renamed::NAMES[1];
#[cfg(feature = "snapshot")]
const OPEN: Syscall = renamed::NAMES[2];

/// [`KvmLog`](crate::source::KvmLog) in the mode `AtReport`, the only one that fits a filter made for Cloud Hypervisor's own loop.
pub const KVM_LOG_AT_REPORT: &[Syscall] =
    &[Syscall::ioctl(kvm::KVM_SET_USER_MEMORY_REGION), Syscall::ioctl(kvm::KVM_GET_DIRTY_LOG)];

/// [`KvmLog`](crate::source::KvmLog) in the modes `ManualAtReport` and `ManualAtRead`.
pub const KVM_LOG_MANUAL: &[Syscall] = &[
    Syscall::ioctl(kvm::KVM_SET_USER_MEMORY_REGION),
    Syscall::ioctl(kvm::KVM_GET_DIRTY_LOG),
    Syscall::ioctl(kvm::KVM_CLEAR_DIRTY_LOG),
    Syscall::ioctl(kvm::KVM_CHECK_EXTENSION),
    Syscall::ioctl(kvm::KVM_ENABLE_CAP),
];

/// [`KvmRing`](crate::source::KvmRing), its harvester included.
#[cfg(not(target_arch = "aarch64"))]
pub const KVM_RING: &[Syscall] =
    &[Syscall::ioctl(kvm::KVM_SET_USER_MEMORY_REGION), Syscall::ioctl(kvm_ring::KVM_RESET_DIRTY_RINGS)];

/// [`KvmRing`](crate::source::KvmRing), its harvester included, and the bitmap beside the rings.
#[cfg(target_arch = "aarch64")]
pub const KVM_RING: &[Syscall] = &[
    Syscall::ioctl(kvm::KVM_SET_USER_MEMORY_REGION),
    Syscall::ioctl(kvm_ring::KVM_RESET_DIRTY_RINGS),
    Syscall::ioctl(kvm::KVM_GET_DIRTY_LOG),
];

/// [`GuestMemoryLog`](crate::source::GuestMemoryLog): its bitmap is in this process.
pub const GUEST_MEMORY_LOG: &[Syscall] = &[];

/// [`MigratableLog`](crate::source::MigratableLog), beside what the component itself calls: it waits for a lock, no more.
pub const MIGRATABLE_LOG: &[Syscall] = &[];

/// [`VhostUserLog`](crate::source::VhostUserLog), beside what the VMM's own connection to the back end calls.
pub const VHOST_USER_LOG: &[Syscall] = &[
    Syscall::new(libc::SYS_memfd_create),
    Syscall::new(libc::SYS_ftruncate),
    Syscall::new(libc::SYS_fcntl),
    Syscall::new(libc::SYS_close),
];

/// [`ContainerLog`](crate::source::ContainerLog).
pub const CONTAINER_LOG: &[Syscall] = &[
    Syscall::ioctl(vfio::container::IOMMU_GET_INFO),
    Syscall::ioctl(vfio::container::IOMMU_DIRTY_PAGES),
    Syscall::ioctl(vfio::container::IOMMU_UNMAP_DMA),
];

/// [`DeviceLog`](crate::source::DeviceLog).
pub const DEVICE_LOG: &[Syscall] = &[Syscall::ioctl(vfio::device::DEVICE_FEATURE)];

/// [`HwptLog`](crate::source::HwptLog).
pub const HWPT_LOG: &[Syscall] =
    &[Syscall::ioctl(iommufd::HWPT_SET_DIRTY_TRACKING), Syscall::ioctl(iommufd::HWPT_GET_DIRTY_BITMAP)];

/// The state of a kernel device: [`KernelDevice`](crate::device::KernelDevice).
pub const KERNEL_DEVICE: &[Syscall] = &[
    Syscall::ioctl(vfio::device::DEVICE_FEATURE),
    Syscall::ioctl(vfio::device::MIG_GET_PRECOPY_INFO),
    Syscall::ioctl(vfio::device::DEVICE_RESET),
    Syscall::new(libc::SYS_read),
    Syscall::new(libc::SYS_write),
    Syscall::new(libc::SYS_close),
];

/// A client of a device in another process, its dirty log and its state: [`vfio_user`](crate::vfio_user).
#[cfg(feature = "vfio-user")]
pub const VFIO_USER: &[Syscall] = &[
    Syscall::new(libc::SYS_setsockopt),
    Syscall::new(libc::SYS_recvmsg),
    Syscall::new(libc::SYS_recvfrom),
    Syscall::new(libc::SYS_sendto),
    Syscall::new(libc::SYS_sendmsg),
    Syscall::new(libc::SYS_shutdown),
    Syscall::new(libc::SYS_close),
];

/// What such a client calls beside [`VFIO_USER`] when the server may read and write memory by message.
#[cfg(feature = "vfio-user")]
pub const VFIO_USER_MEMORY: &[Syscall] = &[Syscall::new(libc::SYS_ppoll), Syscall::ioctl(libc::FIONREAD)];

/// [`Sender`](crate::transfer::Sender), with TLS or without.
#[cfg(feature = "transfer")]
pub const SENDER: &[Syscall] = &[
    Syscall::new(libc::SYS_socket),
    Syscall::new(libc::SYS_connect),
    Syscall::new(libc::SYS_getsockopt),
    Syscall::new(libc::SYS_setsockopt),
    Syscall::new(libc::SYS_fcntl),
    POLL,
    Syscall::new(libc::SYS_recvfrom),
    Syscall::new(libc::SYS_sendto),
    Syscall::new(libc::SYS_sendmsg),
    Syscall::new(libc::SYS_shutdown),
    Syscall::new(libc::SYS_close),
    Syscall::new(libc::SYS_openat),
    Syscall::new(libc::SYS_read),
    Syscall::new(libc::SYS_lseek),
    Syscall::new(libc::SYS_pread64),
    Syscall::new(libc::SYS_fstat),
    Syscall::new(libc::SYS_getdents64),
    Syscall::new(libc::SYS_readlinkat),
];

/// [`Receiver`](crate::transfer::receive::Receiver), with TLS or without.
#[cfg(feature = "transfer")]
pub const RECEIVER: &[Syscall] = &[
    Syscall::new(libc::SYS_fcntl),
    Syscall::new(libc::SYS_accept4),
    Syscall::new(libc::SYS_ppoll),
    Syscall::new(libc::SYS_getsockopt),
    Syscall::new(libc::SYS_setsockopt),
    Syscall::new(libc::SYS_recvfrom),
    Syscall::new(libc::SYS_recvmsg),
    Syscall::new(libc::SYS_sendto),
    Syscall::new(libc::SYS_sendmsg),
    Syscall::new(libc::SYS_shutdown),
    Syscall::new(libc::SYS_close),
    Syscall::new(libc::SYS_prlimit64),
    Syscall::new(libc::SYS_madvise),
    Syscall::new(libc::SYS_fstatfs),
    Syscall::new(libc::SYS_lseek),
    Syscall::new(libc::SYS_pwrite64),
];

/// Writing snapshots: [`SnapshotWriter`](crate::snapshot::SnapshotWriter),
/// [`SnapshotDestination`](crate::snapshot::SnapshotDestination), and [`apply`](crate::snapshot::apply), [`subtract`](crate::snapshot::subtract)
/// and [`seal`](crate::snapshot::seal), which read snapshots too; memory that comes as descriptors included.
#[cfg(feature = "snapshot")]
pub const SNAPSHOT_WRITE: &[Syscall] = &[
    Syscall::new(libc::SYS_fcntl),
    OPEN,
    Syscall::new(libc::SYS_openat),
    Syscall::new(libc::SYS_close),
    Syscall::new(libc::SYS_read),
    Syscall::new(libc::SYS_pread64),
    Syscall::new(libc::SYS_write),
    Syscall::new(libc::SYS_pwrite64),
    Syscall::new(libc::SYS_lseek),
    Syscall::new(libc::SYS_ftruncate),
    Syscall::new(libc::SYS_fallocate),
    Syscall::new(libc::SYS_fsync),
    Syscall::new(libc::SYS_fdatasync),
    Syscall::new(libc::SYS_flock),
    Syscall::new(libc::SYS_statx),
    Syscall::new(libc::SYS_fstat),
    Syscall::new(libc::SYS_newfstatat),
    Syscall::new(libc::SYS_getdents64),
    Syscall::new(libc::SYS_mkdirat),
    Syscall::new(libc::SYS_renameat),
    Syscall::new(libc::SYS_unlinkat),
    READLINK,
    Syscall::new(libc::SYS_readlinkat),
];

/// Reading snapshots: opening, [`verify`](crate::snapshot::verify), [`compare`](crate::snapshot::compare),
/// [`describe`](crate::snapshot::describe), and [`SnapshotSource`](crate::snapshot::SnapshotSource).
#[cfg(feature = "snapshot")]
pub const SNAPSHOT_READ: &[Syscall] = &[
    Syscall::new(libc::SYS_fcntl),
    Syscall::new(libc::SYS_openat),
    Syscall::new(libc::SYS_close),
    Syscall::new(libc::SYS_read),
    Syscall::new(libc::SYS_pread64),
    Syscall::new(libc::SYS_lseek),
    Syscall::new(libc::SYS_statx),
];

/// Handing a stored VM over as descriptors, on demand too: [`LocalSender`](crate::offload::LocalSender), beside [`SNAPSHOT_READ`]. The other
/// way round, memory that comes as descriptors is in [`SNAPSHOT_WRITE`].
#[cfg(feature = "snapshot")]
pub const LOCAL_SENDER: &[Syscall] = &[
    Syscall::new(libc::SYS_memfd_create),
    Syscall::new(libc::SYS_ftruncate),
    Syscall::new(libc::SYS_fcntl),
    Syscall::new(libc::SYS_fallocate),
    Syscall::new(libc::SYS_pwrite64),
    Syscall::new(libc::SYS_pwritev),
    Syscall::new(libc::SYS_socket),
    Syscall::new(libc::SYS_connect),
    Syscall::new(libc::SYS_getsockopt),
    Syscall::new(libc::SYS_setsockopt),
    Syscall::new(libc::SYS_recvfrom),
    Syscall::new(libc::SYS_sendto),
    Syscall::new(libc::SYS_sendmsg),
    Syscall::new(libc::SYS_shutdown),
    Syscall::new(libc::SYS_close),
];

/// What the standard library and the C library ask for on their own: memory, threads, locks, sleep, random seeds, clocks.
///
/// The allocator of the GNU C library looks at `/proc/sys/vm/overcommit_memory` when a thread gives memory back (`openat`, `read`,
/// `close`); a build with debug assertions asks whether a descriptor is open that is to be closed (`fcntl`, of which a part's own
/// list has what that part needs in any build).
pub const RUNTIME: &[Syscall] = &[
    Syscall::new(libc::SYS_brk),
    Syscall::new(libc::SYS_mmap),
    Syscall::new(libc::SYS_mremap),
    Syscall::new(libc::SYS_munmap),
    Syscall::new(libc::SYS_mprotect),
    Syscall::new(libc::SYS_madvise),
    Syscall::new(libc::SYS_futex),
    Syscall::new(libc::SYS_sched_yield),
    Syscall::new(libc::SYS_sched_getaffinity),
    Syscall::new(libc::SYS_clone3),
    Syscall::new(libc::SYS_clone),
    Syscall::new(libc::SYS_set_robust_list),
    Syscall::new(libc::SYS_rseq),
    Syscall::new(libc::SYS_prctl),
    Syscall::new(libc::SYS_sigaltstack),
    Syscall::new(libc::SYS_rt_sigprocmask),
    Syscall::new(libc::SYS_rt_sigreturn),
    Syscall::new(libc::SYS_restart_syscall),
    Syscall::new(libc::SYS_gettid),
    Syscall::new(libc::SYS_getpid),
    Syscall::new(libc::SYS_exit),
    Syscall::new(libc::SYS_exit_group),
    Syscall::new(libc::SYS_getrandom),
    Syscall::new(libc::SYS_clock_gettime),
    Syscall::new(libc::SYS_clock_nanosleep),
    Syscall::new(libc::SYS_fcntl),
    Syscall::new(libc::SYS_openat),
    Syscall::new(libc::SYS_read),
    Syscall::new(libc::SYS_close),
];
