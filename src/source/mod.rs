// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The sources of dirty pages, and the sink they report to.
//!
//! One file per kernel or wire interface. A source knows that interface and nothing else; the [`Sink`] turns what it
//! read into bits of host pages.
//!
//! - `kvm_log`, `kvm_ring`: vCPUs; a source for another hypervisor would stand beside them, its system calls in `sys`;
//! - `guest_memory`: the VMM's own writes; `migratable_log`, `vhost_log`: its components and back ends;
//! - `container`, `device_log`, `hwpt`, `vfio_user`: pass-through devices, which `choose` chooses among; `mapped`: what is mapped for
//!   them;
//! - `sink`, `marks`: where a source reports to, and what it reported until it is merged.

use std::error::Error;

use derive_more::Display;
use thiserror::Error;

use crate::iova::{IovaMap, Mapping};
use crate::layout::Layout;
use crate::range::GpaRange;
use crate::sys::tells_of_lost_device;

pub mod choose;
mod container;
mod device_log;
mod guest_memory;
mod hwpt;
mod kvm_log;
mod kvm_ring;
mod mapped;
mod marks;
mod migratable_log;
mod sink;
#[cfg(feature = "vfio-user")]
mod vfio_user;
mod vhost_log;

pub use container::{ContainerInfo, ContainerLog, ContainerLogError, DirtyBitmapInfo, Meaning};
pub use device_log::{Coverage, DeviceLog, DeviceLogError};
pub use guest_memory::{GuestMemoryLog, SummaryBitmap, SummarySlice, TakeDirtyWords};
pub use hwpt::{HwptLog, HwptLogError};
pub use kvm_log::{KvmLog, KvmLogError, KvmLogMode, KvmSlot};
pub use kvm_ring::{Harvester, KvmRing, KvmRingError, RingSize};
pub(crate) use marks::{Marks, NONE_STANDING, emptied, touched};
pub use migratable_log::{MigratableLog, MigratableLogError};
pub use sink::{ShortBitmap, Sink};
#[cfg(feature = "vfio-user")]
pub use vfio_user::{VfioUserSource, VfioUserSourceError};
pub use vhost_log::{
    LogBase, LogBaseAnswer, VhostUserBackEnd, VhostUserError, VhostUserLog, VhostUserLogError,
};

/// What a source was doing when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Display)]
#[non_exhaustive]
pub enum Operation {
    /// Switching its log on.
    #[display("start logging")]
    Start,
    /// Reading (and perhaps clearing) its log.
    #[display("report dirty pages")]
    Collect,
    /// Clearing the bits of pages about to be read.
    #[display("clear dirty bits before a read")]
    BeforeRead,
    /// Taking in a new mapping.
    #[display("take in a mapping")]
    Mapped,
    /// Reading the bits of a mapping that goes.
    #[display("report the dirty pages of a mapping that goes")]
    Unmapped,
    /// Taking a mapping down, which still stands.
    #[display("take a mapping down")]
    Unmap,
    /// Taking in RAM that is plugged in.
    #[display("take in RAM that is plugged in")]
    Plugged,
    /// Switching its log off.
    #[display("stop logging")]
    Stop,
}

/// A source that failed, at what, and why.
#[derive(Debug, Error)]
#[error("Dirty source {id} cannot {operation}")]
#[non_exhaustive]
pub struct SourceError {
    /// The source's [`DirtySource::id`].
    pub id: String,
    /// What it was doing.
    pub operation: Operation,
    /// The interface's own error.
    #[source]
    pub cause: Box<dyn Error + Send + Sync>,
    /// What the source reports on is gone for good: no later attempt can succeed, and a migration that needs it must end.
    pub gone: bool,
}

impl SourceError {
    /// Names the source and the operation that failed with `cause`. An `ENODEV` of the kernel in it means that the
    /// device is gone.
    pub fn new(id: &str, operation: Operation, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        let cause = cause.into();
        let gone = tells_of_lost_device(&*cause);
        Self { id: id.to_owned(), operation, cause, gone }
    }

    /// Records what the back end knows about the cause: `gone` means that the device or process behind the source
    /// will not come back.
    #[must_use]
    pub fn or_gone(self, gone: bool) -> Self {
        Self { gone: self.gone || gone, ..self }
    }
}

/// The pages a source speaks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cover {
    /// Guest-physical ranges; parts that are not RAM are allowed and ignored.
    pub ranges: Vec<GpaRange>,
    /// Whether a bit means a write, rather than only that the device could have written.
    pub precise: bool,
}

impl Cover {
    /// The cover of a precise source whose writer may write anywhere, including RAM plugged in later.
    pub(crate) fn everything() -> Self {
        let all = GpaRange::from_bounds(0, u64::MAX).expect("0 lies below the last address");
        Self { ranges: vec![all], precise: true }
    }
}

/// Whose writes a source reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reports {
    /// The vCPUs', and the hypervisor's on their behalf. All sources of the kind together cover all RAM.
    Vcpus,
    /// Those of the VMM's own threads. All sources of the kind together cover all RAM.
    Vmm,
    /// Pass-through devices'.
    Devices,
    /// Those of a VMM component that keeps its own dirty log.
    Component,
}

/// When the bits of a mapping that is removed are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Harvest {
    /// Before the unmapping, which drops the bits: page tables, and devices in another process.
    BeforeUnmap,
    /// After the unmapping, when the device can no longer write through it: devices that keep their own log.
    AfterUnmap,
    /// While unmapping, which the source does itself: a type1 container.
    ByUnmapping,
}

/// RAM that is plugged into a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PluggedRam {
    /// Where the guest sees it.
    pub gpa: GpaRange,
    /// KVM's memory slot that holds just it; `None` where vCPUs' writes are not tracked here, or where another hypervisor's
    /// source goes by the addresses.
    pub kvm_slot: Option<KvmSlot>,
}

/// One reporter of dirty pages: a kernel interface, a device's process, the VMM's own bitmap.
///
/// Life: `start`, then any number of `collect`, `before_read`, `mapped` and `unmapped`, then `stop`; then perhaps `start`
/// again. All sources are started before the first full pass.
pub trait DirtySource: Send {
    /// A short name, unique among a VM's sources: `kvm-log`, `device-log:net0`.
    fn id(&self) -> &str;

    /// Whose writes it reports.
    fn reports(&self) -> Reports;

    /// The pages it speaks for, which are marked dirty when it fails: complete while it runs.
    fn cover(&self) -> Cover;

    /// Bytes of pages that every report contains whatever is written, because a mediated device's driver keeps them
    /// pinned. 0 if there are none or it is not known yet.
    fn standing_bytes(&self) -> u64 {
        0
    }

    /// Switches the log on for the VM's RAM. Pages written after it returns are reported.
    ///
    /// # Errors
    /// The interface refused; the source is off.
    fn start(&mut self, layout: &Layout, iova: &IovaMap) -> Result<(), SourceError>;

    /// Reports the pages written since they were last reported.
    ///
    /// May leave bits set in the kernel until [`DirtySource::before_read`]; a page whose bit still stands from an earlier
    /// report is reported again, and [`Sink::counted_before`] keeps it from being counted twice.
    ///
    /// Words that the source keeps may be lent to the sink, which reads them when all sources have reported:
    /// [`Sink::lend_gpa_words`].
    ///
    /// # Errors
    /// The log could not be read, or only in part. What it held may be gone, so the caller marks
    /// [`DirtySource::cover`] dirty; the source stays usable.
    fn collect<'a>(&'a mut self, sink: &mut Sink<'a>) -> Result<(), SourceError>;

    /// Clears the bits of pages whose bytes are about to be read, for sources that left them set in `collect`.
    ///
    /// # Errors
    /// The bits could not be cleared; the caller must not count the read.
    fn before_read(&mut self, _chunk: &[GpaRange]) -> Result<(), SourceError> {
        Ok(())
    }

    /// Adds a new mapping.
    ///
    /// # Errors
    /// The device's writes through it would not be logged.
    fn mapped(&mut self, _mapping: &Mapping) -> Result<(), SourceError> {
        Ok(())
    }

    /// Whether devices may join this source: true for a container or a page table, false for the log of one device.
    fn devices_may_join(&self) -> bool {
        false
    }

    /// When [`DirtySource::unmapped`] is called for a mapping that goes.
    fn harvest(&self) -> Harvest {
        Harvest::BeforeUnmap
    }

    /// Reports the dirty pages of a mapping that is removed, at the time [`DirtySource::harvest`] names. The source
    /// keeps the mapping until [`DirtySource::forget`].
    ///
    /// # Errors
    /// As [`DirtySource::collect`], for the mapping's pages. The mapping is removed nevertheless, unless the source
    /// unmaps by itself and failed: [`Operation::Unmap`].
    fn unmapped(&mut self, _mapping: &Mapping, _sink: &mut Sink<'_>) -> Result<(), SourceError> {
        Ok(())
    }

    /// Forgets a mapping that is gone.
    fn forget(&mut self, _mapping: &Mapping) {}

    /// Adds RAM that is about to be used; its memory slot, if it has one, is registered. Writes to it are reported
    /// from then on.
    ///
    /// Devices' access to it is announced separately, by [`DirtySource::mapped`].
    ///
    /// # Errors
    /// Writes to it would be missed; the source is unchanged.
    fn plugged(&mut self, _ram: &PluggedRam) -> Result<(), SourceError> {
        Ok(())
    }

    /// Forgets RAM that is gone, its slot with it.
    fn unplugged(&mut self, _gpa: GpaRange) {}

    /// Switches the log off; bits not collected are lost. Stopping a stopped source does nothing.
    ///
    /// # Errors
    /// The interface refused; the source counts as off.
    fn stop(&mut self) -> Result<(), SourceError>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::range::IovaRange;

    #[test]
    fn a_kernel_that_has_no_such_device_any_more_tells_that_it_is_gone() {
        let report = |errno| {
            let iova = IovaRange::new(0, 4096).unwrap();
            let source = std::io::Error::from_raw_os_error(errno);
            SourceError::new("device-log", Operation::Collect, DeviceLogError::Report { iova, source }).gone
        };
        assert!(report(libc::ENODEV));
        assert!(!report(libc::EIO));
        assert!(!SourceError::new("kvm-log", Operation::Collect, "broken").gone);
        assert!(SourceError::new("kvm-log", Operation::Collect, "broken").or_gone(true).gone);
    }
}
