// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can be read of a host, as numbers and flags.

use serde::{Deserialize, Serialize};

use crate::source::DirtyBitmapInfo;

/// Something that was looked at, is not there, or could not be looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Seen<T> {
    /// What was found.
    Seen(T),
    /// It is not there.
    Absent,
    /// It could not be looked at.
    Unseen {
        /// Why not.
        reason: String,
    },
}

impl<T> Seen<T> {
    /// What was found, if anything.
    pub fn found(&self) -> Option<&T> {
        match self {
            Self::Seen(found) => Some(found),
            _ => None,
        }
    }
}

/// Everything that was read of a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// The kernel's release, as `uname -r` prints it: `6.8.0-45-generic`.
    pub kernel: String,
    /// KVM.
    pub kvm: Seen<KvmFacts>,
    /// The container interface of VFIO.
    pub container: Seen<ContainerFacts>,
    /// The iommufd interface.
    pub iommufd: Seen<IommufdFacts>,
    /// Devices that a VFIO driver holds.
    pub devices: Vec<ProbedDevice>,
}

/// What KVM has for tracking the vCPUs' writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmFacts {
    /// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`: bits are cleared apart from being read.
    pub manual_protect: bool,
    /// Pages may begin as dirty, so that switching on costs no pass over them.
    pub initially_set: bool,
    /// Bytes a vCPU's dirty ring may take; `None` without rings.
    pub ring_max_bytes: Option<u32>,
    /// Whether the rings need a bitmap beside them for the kernel's own writes.
    pub ring_needs_bitmap: bool,
}

/// What the container interface says before it holds a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerFacts {
    /// Whether it has the model type 1 version 2, the only one with a dirty bitmap.
    pub type1v2: bool,
}

/// What iommufd says before it holds a device: that it is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IommufdFacts {}

/// What kind of device it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BusKind {
    /// A PCI device, whose writes go through an IOMMU.
    Pci,
    /// A mediated device, whose writes the kernel performs.
    Mediated,
}

/// A device that a VFIO driver holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbedDevice {
    /// As sysfs names it.
    pub name: String,
    /// What kind of device it is.
    pub bus: BusKind,
    /// The driver that holds it.
    pub driver: Option<String>,
    /// Its IOMMU group.
    pub group: Option<u32>,
    /// Its own character device, where the kernel has those.
    pub cdev: Option<String>,
    /// What it said when it was opened.
    pub probe: Seen<DeviceProbe>,
}

/// What a device, and what lies below it, said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceProbe {
    /// Migration v2; `None` where the driver has none.
    pub migration: Option<MigrationFacts>,
    /// Its own DMA log.
    pub log: LogFacts,
    /// The dirty bitmap of a type1 container that holds it; `None` where there is none, or no container could be had.
    pub container_bitmap: Option<BitmapFacts>,
    /// Whether its IOMMU keeps dirty bits; `None` where iommufd could not be asked.
    pub page_table_tracks: Option<bool>,
}

/// What a device offers of migration v2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationFacts {
    /// `VFIO_MIGRATION_*`.
    pub flags: u64,
    /// Whether its state can be saved at all.
    pub stop_copy: bool,
    /// Whether it can be made P2P-quiescent.
    pub p2p: bool,
    /// Whether part of its state can be sent while it runs.
    pub pre_copy: bool,
    /// Its estimate of its state's size, in bytes.
    pub stop_copy_bytes: Option<u64>,
}

/// What a device's own DMA log is worth here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFacts {
    /// It has none.
    Absent,
    /// It has one, which this kernel cannot report.
    Unreportable,
    /// It has one that did not start.
    Fails {
        /// What it answered.
        reason: String,
    },
    /// It works.
    Works {
        /// Bytes per bit that it chose when asked for a host page.
        granule_bytes: u64,
    },
}

/// What a container's dirty bitmap can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitmapFacts {
    /// Bytes per bit it can be read at, one bit per size.
    pub page_sizes: u64,
    /// Bytes the bitmap of one read may take.
    pub max_bytes: u64,
}

impl From<DirtyBitmapInfo> for BitmapFacts {
    fn from(info: DirtyBitmapInfo) -> Self {
        Self { page_sizes: info.page_sizes, max_bytes: info.max_bytes }
    }
}

impl From<BitmapFacts> for DirtyBitmapInfo {
    fn from(facts: BitmapFacts) -> Self {
        Self { page_sizes: facts.page_sizes, max_bytes: facts.max_bytes }
    }
}
