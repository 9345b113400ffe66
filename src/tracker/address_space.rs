// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Address spaces of VFIO devices: asks the kernel what can track the devices' writes, chooses sources and attaches
//! them.

use std::os::fd::{AsRawFd, OwnedFd};

use thiserror::Error;
use vfio_bindings::bindings::vfio::VFIO_TYPE1v2_IOMMU;

use super::{Attached, SpaceId, TrackerBuilder};
use crate::iova::IovaMap;
use crate::layout::Region;
use crate::source::choose::{Blocker, Choice, DeviceFacts, Imprecise, OwnLog, SpaceTracker, Writer, choose};
use crate::source::{
    ContainerInfo, ContainerLog, ContainerLogError, DeviceLog, DeviceLogError, DirtyBitmapInfo, HwptLog,
    Meaning,
};

/// One IOVA address space, its devices, and the container or page table that maps memory for them.
#[derive(Debug)]
pub struct AddressSpace {
    /// Where its IOVAs lead: [`IovaMap::Identity`] without a virtual IOMMU.
    pub map: IovaMap,
    /// The devices that write through it.
    pub devices: Vec<SpaceDevice>,
    /// What maps memory for them.
    pub below: SpaceTable,
    /// Whether a source may be used that calls every mapped page dirty, if there is no other.
    pub imprecise: Imprecise,
}

/// A device of an address space.
#[derive(Debug)]
pub struct SpaceDevice {
    /// Its name, as in [`super::VmMappings::devices`].
    pub name: String,
    /// Its VFIO descriptor.
    pub file: OwnedFd,
    /// Who performs its writes.
    pub writer: Writer,
}

/// What maps the memory of an address space.
#[derive(Debug)]
pub enum SpaceTable {
    /// A type1 container.
    Container {
        /// Its descriptor.
        file: OwnedFd,
        /// What it was given with `VFIO_SET_IOMMU`.
        model: u32,
    },
    /// A page table of an iommufd, which the VMM allocated itself.
    PageTable {
        /// The iommufd.
        iommufd: OwnedFd,
        /// The page table's id.
        hwpt_id: u32,
    },
}

/// Why an address space cannot be tracked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AddressSpaceError {
    /// No available source sees all writes of the devices.
    #[error("{blocker}; {}", .blocker.remedy())]
    Blocked {
        /// What is missing.
        blocker: Blocker,
    },
    /// The container could not be asked.
    #[error("Cannot use the container of the address space")]
    Container(#[source] Box<ContainerLogError>),
    /// A device's log could not be used.
    #[error("Cannot use the log of device {device}")]
    DeviceLog {
        /// The device.
        device: String,
        /// What went wrong.
        source: Box<DeviceLogError>,
    },
}

impl TrackerBuilder {
    /// Adds an address space: asks its devices and their container or page table what they can track, chooses the
    /// sources that together see all writes, and attaches them. Degradations are in
    /// [`super::Tracker::space_degradations`].
    ///
    /// Each device's log, or the page table's tracking, is switched on and off again for a moment: nobody else may use it yet.
    ///
    /// # Errors
    /// Some device's writes would be missed, or only an imprecise source sees them and that was refused. Nothing was
    /// added.
    pub fn address_space(&mut self, space: AddressSpace) -> Result<SpaceId, AddressSpaceError> {
        let AddressSpace { map, devices, below, imprecise } = space;
        let facts: Vec<_> = devices.iter().map(facts_of).collect();
        let tracked_below = self.probe_below(&below, &map);
        let choice = choose(&facts, tracked_below, imprecise)
            .map_err(|blocker| AddressSpaceError::Blocked { blocker })?;
        let is_identity = map == IovaMap::Identity;
        let id = if is_identity { SpaceId::IDENTITY } else { SpaceId(self.spaces.len()) };
        let chosen = attach(&choice, id, devices, below)?;
        // Nothing fails from here on.
        if !is_identity {
            self.spaces.push(map);
        }
        self.sources.extend(chosen);
        self.allow_imprecise |= choice.container == Some(Meaning::Mapped);
        self.degradations.extend(choice.degradations);
        Ok(id)
    }

    /// Asks the container or page table below the devices whether it tracks writes.
    fn probe_below(&self, below: &SpaceTable, map: &IovaMap) -> SpaceTracker {
        match below {
            SpaceTable::Container { file, model } => {
                let info = ContainerLog::<OwnedFd>::info(file).ok();
                SpaceTracker::Container {
                    bitmap: info.and_then(|info| bitmap_of(*model, info)),
                    largest_mapping: self.largest_mapping(map),
                }
            }
            SpaceTable::PageTable { iommufd, hwpt_id } => {
                SpaceTracker::PageTable { tracks: HwptLog::new("", iommufd.as_raw_fd(), *hwpt_id).tracks() }
            }
        }
    }

    fn largest_mapping(&self, map: &IovaMap) -> u64 {
        let regions = self.layout.regions().iter().map(Region::range).map(|range| range.len());
        let mapped = match map {
            IovaMap::Identity => None,
            IovaMap::Journal(journal) => journal.mappings().map(|mapping| mapping.iova().len()).max(),
        };
        mapped.or_else(|| regions.max()).unwrap_or(0)
    }
}

/// The dirty bitmap of a container that says this; none but those of type 1 version 2 have one that could be read.
fn bitmap_of(model: u32, info: ContainerInfo) -> Option<DirtyBitmapInfo> {
    info.dirty_bitmap.filter(|_| model == VFIO_TYPE1v2_IOMMU)
}

fn facts_of(device: &SpaceDevice) -> DeviceFacts {
    let own_log = match DeviceLog::new(&device.name, device.file.as_raw_fd()) {
        Err(_) => OwnLog::Absent,
        Ok(log) => match log.trial() {
            Ok(()) => OwnLog::Works,
            Err(DeviceLogError::NoReport(_)) => OwnLog::Unreportable,
            Err(_) => OwnLog::Absent,
        },
    };
    DeviceFacts { id: device.name.clone(), writer: device.writer, own_log }
}

/// Makes the sources that were chosen.
fn attach(
    choice: &Choice,
    space: SpaceId,
    devices: Vec<SpaceDevice>,
    below: SpaceTable,
) -> Result<Vec<Attached>, AddressSpaceError> {
    let mut chosen = Vec::new();
    let (logged, rest): (Vec<_>, Vec<_>) =
        devices.into_iter().partition(|device| choice.device_logs.contains(&device.name));
    for SpaceDevice { name, file, .. } in logged {
        let log = DeviceLog::new(format!("device-log:{name}"), file);
        let log = log
            .map_err(|source| AddressSpaceError::DeviceLog { device: name.clone(), source: source.into() })?;
        chosen.push(Attached::new(space, vec![name], Box::new(log)));
    }
    let names: Vec<_> = rest.iter().map(|device| device.name.clone()).collect();
    let id = |kind: &str| format!("{kind}:{}", names.join("+"));
    match (below, choice.container) {
        (SpaceTable::Container { file, model }, Some(meaning)) => {
            let log = ContainerLog::new(id("container"), file, model, meaning)
                .map_err(|error| AddressSpaceError::Container(error.into()))?;
            chosen.push(Attached::new(space, names, Box::new(log)));
        }
        (SpaceTable::PageTable { iommufd, hwpt_id }, _) if choice.page_table => {
            let log = HwptLog::new(id("page-table"), iommufd, hwpt_id);
            chosen.push(Attached::new(space, names, Box::new(log)));
        }
        _ => {}
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::error::Chain;
    use crate::granule::Granule;
    use crate::layout::Layout;
    use crate::range::GpaRange;
    use crate::tracker::{Tracker, VmMappings};

    /// What answers no ioctl.
    fn mute() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    fn space(below: SpaceTable, imprecise: Imprecise) -> AddressSpace {
        let device = SpaceDevice { name: "net0".to_owned(), file: mute(), writer: Writer::Hardware };
        AddressSpace { map: IovaMap::Identity, devices: vec![device], below, imprecise }
    }

    #[test]
    fn a_container_of_another_model_has_no_bitmap_to_choose() {
        let bitmap = DirtyBitmapInfo { page_sizes: 0x1000, max_bytes: 1 << 28 };
        let info = ContainerInfo { page_sizes: 0x1000, dirty_bitmap: Some(bitmap) };
        assert_eq!(bitmap_of(3, info), Some(bitmap));
        for model in [1, 2, 4, 6, 7, 8] {
            assert_eq!(bitmap_of(model, info), None);
        }
    }

    #[test]
    fn a_device_that_nothing_tracks_is_refused_by_name_with_what_would_help() {
        let layout = Layout::new([GpaRange::new(0, 1 << 20).unwrap()], Granule::host_page()).unwrap();
        let mut builder = Tracker::builder(layout).mappings(VmMappings::default);
        let container = SpaceTable::Container { file: mute(), model: 3 };
        let table = SpaceTable::PageTable { iommufd: mute(), hwpt_id: 7 };
        for below in [container, table] {
            let error = builder.address_space(space(below, Imprecise::Allowed)).unwrap_err();
            let said = Chain(&error).to_string();
            assert!(
                said.starts_with("Nothing tracks the writes of net0; use a device whose driver"),
                "{said}"
            );
        }
        assert_eq!(builder.build().unwrap().attribution().count(), 0, "nothing was added");
    }
}
