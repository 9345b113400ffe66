// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What really maps a VM's memory, compared with what is tracked.

use thiserror::Error;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::attached::Attached;
use crate::layout::{Layout, Region};
use crate::range::{GpaRange, first_outside};
use crate::source::Reports;

/// What maps a VM's memory at one moment: what the VMM has registered, not what the layout says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VmMappings {
    /// The VM's RAM, as its guest memory has it.
    pub ram: Vec<GpaRange>,
    /// Parts of `ram` that the guest does not have now, such as unplugged virtio-mem blocks. The layout leaves them
    /// out.
    pub absent: Vec<GpaRange>,
    /// The vCPUs' memory slots; none where the VMM tracks their writes itself. Where there are slots, a session begins only
    /// with a source for the vCPUs, and one for the VMM's own writes or that of a component.
    pub vcpu_slots: Vec<GpaRange>,
    /// The guest memory that each pass-through device reaches through its IOMMU, which may be none. What of it is not
    /// RAM is ignored. Every device that a source reports must be listed.
    pub devices: Vec<DeviceMappings>,
}

impl VmMappings {
    /// The RAM that is in `memory`, and nothing else that maps it: for a VM whose vCPUs' and devices' writes are not tracked here.
    pub fn of_memory<M: GuestMemoryBackend>(memory: &M) -> Self {
        let ram =
            memory.iter().flat_map(|region| GpaRange::new(region.start_addr().raw_value(), region.len()));
        Self { ram: ram.collect(), ..Self::default() }
    }
}

/// The guest memory that one device reaches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceMappings {
    /// The device's name.
    pub device: String,
    /// What is mapped for it.
    pub gpa: Vec<GpaRange>,
}

/// The tracked memory differs from the memory that can be written.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Disagreement {
    /// The VM has memory that the layout lacks.
    #[error("VM has RAM at {gpa} that is not tracked")]
    Untracked {
        /// The first such range.
        gpa: GpaRange,
    },
    /// The layout has RAM that the VM lacks.
    #[error("RAM at {gpa} is tracked, and VM has none there")]
    NoMemory {
        /// The first such range.
        gpa: GpaRange,
    },
    /// The layout has RAM that no memory slot holds.
    #[error("No memory slot of the vCPUs holds the RAM at {gpa}")]
    NoSlot {
        /// The first such range.
        gpa: GpaRange,
    },
    /// The sources of one kind do not cover all memory that their writer reaches.
    #[error("{writer} can write RAM at {gpa}, which no dirty source covers for them")]
    Uncovered {
        /// Whose writes would be missed.
        writer: String,
        /// The first such range.
        gpa: GpaRange,
    },
    /// A source reports a device that [`VmMappings::devices`] lacks.
    #[error("Dirty source {id} speaks for device {device}, and the VM's mappings do not have that device")]
    DeviceNotMapped {
        /// The source.
        id: String,
        /// The device.
        device: String,
    },
    /// A source reports devices' writes, but no devices were named for it.
    #[error("Dirty source {id} reports devices' writes: name the devices that it speaks for (source_of)")]
    NoDevices {
        /// The source.
        id: String,
    },
}

const VCPUS: &str = "vCPUs";
const VMM: &str = "The VMM's own threads";

/// Checks that the VM's RAM is the layout's.
pub(super) fn check_memory(
    layout: &Layout,
    memory: &[GpaRange],
    absent: &[GpaRange],
) -> Result<(), Disagreement> {
    let tracked = ranges_of(layout);
    if let Some(gpa) = first_outside(memory, tracked.iter().chain(absent).copied()) {
        return Err(Disagreement::Untracked { gpa });
    }
    match first_outside(&tracked, memory.iter().copied()) {
        Some(gpa) => Err(Disagreement::NoMemory { gpa }),
        None => Ok(()),
    }
}

/// Checks that the sources, which run, cover all that vCPUs and the VMM can write.
pub(super) fn check_covers(
    layout: &Layout,
    sources: &[Attached],
    mappings: &VmMappings,
) -> Result<(), Disagreement> {
    let ram = ranges_of(layout);
    let has = |kind| sources.iter().any(|attached| attached.source.reports() == kind);
    let with_vcpus = has(Reports::Vcpus) || !mappings.vcpu_slots.is_empty();
    if with_vcpus {
        if let Some(gpa) = first_outside(&ram, mappings.vcpu_slots.iter().copied()) {
            return Err(Disagreement::NoSlot { gpa });
        }
        check_cover(&ram, sources, VCPUS, |attached| attached.source.reports() == Reports::Vcpus)?;
    }
    if has(Reports::Vmm) || with_vcpus && !has(Reports::Component) {
        check_cover(&ram, sources, VMM, |attached| attached.source.reports() == Reports::Vmm)?;
    }
    Ok(())
}

/// Checks that the sources, which run, cover all that each device can write, and that it is known what that is.
pub(super) fn check_devices(
    layout: &Layout,
    sources: &[Attached],
    mappings: &VmMappings,
) -> Result<(), Disagreement> {
    let of_devices = sources.iter().filter(|attached| attached.source.reports() == Reports::Devices);
    for attached in of_devices {
        let id = || attached.source.id().to_owned();
        if attached.devices.is_empty() {
            return Err(Disagreement::NoDevices { id: id() });
        }
        let is_mapped = |name: &&String| mappings.devices.iter().any(|mapped| mapped.device == **name);
        if let Some(device) = attached.devices.iter().find(|name| !is_mapped(name)) {
            return Err(Disagreement::DeviceNotMapped { id: id(), device: device.clone() });
        }
    }
    mappings.devices.iter().try_for_each(|DeviceMappings { device, gpa }| {
        let reached = gpa.iter().flat_map(|&gpa| layout.parts(gpa)).map(|(_, part)| part);
        let reached: Vec<_> = reached.collect();
        check_cover(&reached, sources, &format!("Device {device}"), |attached| {
            attached.devices.iter().any(|name| name == device)
        })
    })
}

fn check_cover(
    reached: &[GpaRange],
    sources: &[Attached],
    writer: &str,
    which: impl Fn(&&Attached) -> bool,
) -> Result<(), Disagreement> {
    let covers = sources.iter().filter(which).flat_map(|attached| attached.source.cover().ranges);
    match first_outside(reached, covers) {
        Some(gpa) => Err(Disagreement::Uncovered { writer: writer.to_owned(), gpa }),
        None => Ok(()),
    }
}

fn ranges_of(layout: &Layout) -> Vec<GpaRange> {
    layout.regions().iter().map(Region::range).collect()
}
