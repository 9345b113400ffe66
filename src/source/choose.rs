// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which sources speak for the devices of an IOVA address space.
//!
//! Best is each device's own log; then a page table that keeps dirty bits; last the container's bitmap, which is exact only where
//! the kernel itself performs the devices' writes. With a pass-through device behind it, that bitmap calls every mapped page
//! dirty at every read, and would drown any exact source beside it: it is used alone, if at all.

use thiserror::Error;

use super::{DirtyBitmapInfo, Meaning};

/// Who performs a device's writes to guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Writer {
    /// The hardware, through an IOMMU.
    Hardware,
    /// The kernel, on a mediated device's behalf; an IOMMU page table does not see it.
    Kernel,
}

/// What a device's own log is worth here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OwnLog {
    /// The device has none.
    Absent,
    /// The device has one, which this kernel cannot report.
    Unreportable,
    /// It works.
    Works,
}

/// A device, as far as its writes go.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DeviceFacts {
    /// The device's name.
    pub id: String,
    /// Who performs its writes.
    pub writer: Writer,
    /// What its own log is worth.
    pub own_log: OwnLog,
}

/// What tracks writes below the devices of an address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpaceTracker {
    /// A type1 container.
    Container {
        /// Its dirty bitmap, if it has one.
        bitmap: Option<DirtyBitmapInfo>,
        /// Bytes of the largest mapping it will hold: the largest RAM region, most often.
        largest_mapping: u64,
    },
    /// A page table of an iommufd.
    PageTable {
        /// Whether it was, or can be, allocated with dirty tracking.
        tracks: bool,
    },
}

/// The sources that speak for an address space.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Choice {
    /// Devices whose own logs to arm.
    pub device_logs: Vec<String>,
    /// Whether to switch on the page table's tracking.
    pub page_table: bool,
    /// Whether to use the container's bitmap, and what a bit of it means.
    pub container: Option<Meaning>,
    /// What is worse than it could be.
    pub degradations: Vec<SpaceDegradation>,
}

/// Something that makes a migration slower, or, where it says so, wrong on an old kernel.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SpaceDegradation {
    /// Nothing but the container's bitmap sees the devices' writes, and it sees every mapped page.
    #[error("Cannot tell which pages {} wrote: every page mapped for them is sent in the final round", .devices.join(", "))]
    Imprecise {
        /// Devices without a log of their own.
        devices: Vec<String>,
    },
    /// A page table keeps one dirty bit for each of its entries, however large. Whether it has large ones cannot be told.
    #[error(
        "Writes of {} to memory mapped in large pages are told by the large page, up to 1 GiB of it, and kernels before \
         Linux 6.11 may lose some", .devices.join(", ")
    )]
    LargePages {
        /// Devices whose writes the page table tracks.
        devices: Vec<String>,
    },
    /// A device's log is of no use on this kernel.
    #[error("Device {device} logs its DMA, but the kernel cannot report it")]
    Unreportable {
        /// The device.
        device: String,
    },
}

/// Why the VM's memory cannot be tracked.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Blocker {
    /// Nothing sees the devices' writes.
    #[error("Nothing tracks the writes of {}", .devices.join(", "))]
    NoSource {
        /// The devices.
        devices: Vec<String>,
    },
    /// Only an imprecise source sees them, which the caller did not allow.
    #[error("Cannot tell which pages {} wrote, and sending every page mapped for them was not allowed", .devices.join(", "))]
    ImpreciseNotAllowed {
        /// Devices without a log of their own.
        devices: Vec<String>,
    },
    /// A mapping's bitmap exceeds what the container hands out at once.
    #[error(
        "Container reads bitmaps of up to {max_bytes} bytes, too few for a mapping of {mapping_bytes:#x} bytes"
    )]
    MappingTooLarge {
        /// Bytes of the largest mapping.
        mapping_bytes: u64,
        /// The container's limit.
        max_bytes: u64,
    },
}

impl SpaceDegradation {
    /// A short name for machines; does not change.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Imprecise { .. } => "imprecise-dirty-tracking",
            Self::LargePages { .. } => "large-iommu-pages",
            Self::Unreportable { .. } => "dma-log-not-reportable",
        }
    }

    /// What would help.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Imprecise { .. } => {
                "use a device whose driver logs DMA, or an IOMMU with dirty tracking through iommufd"
            }
            Self::LargePages { .. } => {
                "set IOMMU_OPTION_HUGE_PAGES of the address space to 0 before anything is mapped in it"
            }
            Self::Unreportable { .. } => "boot a kernel built with CONFIG_IOMMUFD",
        }
    }
}

impl Blocker {
    /// A short name for machines; does not change.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoSource { .. } => "no-dirty-tracking",
            Self::ImpreciseNotAllowed { .. } => "imprecise-not-allowed",
            Self::MappingTooLarge { .. } => "mapping-too-large",
        }
    }

    /// What would help.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NoSource { .. } => {
                "use a device whose driver logs DMA, an IOMMU with dirty tracking, or a container of type 1 version 2"
            }
            Self::ImpreciseNotAllowed { .. } => "allow imprecise sources, and expect a long pause",
            Self::MappingTooLarge { .. } => "map the VM's memory in smaller pieces",
        }
    }
}

/// Whether a source may be used that calls every mapped page dirty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Imprecise {
    /// No: rather do not migrate.
    Refused,
    /// Yes, in the final round.
    Allowed,
}

/// Chooses the sources that speak for all devices of one address space.
///
/// # Errors
/// Some device's writes would go unseen, or be seen only in a way that is refused.
pub fn choose(
    devices: &[DeviceFacts],
    tracker: SpaceTracker,
    imprecise: Imprecise,
) -> Result<Choice, Blocker> {
    let unlogged = names(devices.iter().filter(|device| device.own_log != OwnLog::Works));
    if unlogged.is_empty() {
        return Ok(Choice { device_logs: names(devices.iter()), ..Choice::default() });
    }
    let mut degradations: Vec<_> = devices
        .iter()
        .filter(|device| device.own_log == OwnLog::Unreportable)
        .map(|device| SpaceDegradation::Unreportable { device: device.id.clone() })
        .collect();
    match tracker {
        SpaceTracker::PageTable { tracks } => choose_page_table(devices, tracks, degradations),
        SpaceTracker::Container { bitmap, largest_mapping } => {
            check_bitmap(bitmap, largest_mapping, &unlogged)?;
            let exact = devices.iter().all(|device| device.writer == Writer::Kernel);
            let meaning = if exact { Meaning::Written } else { Meaning::Mapped };
            if !exact {
                if imprecise == Imprecise::Refused {
                    return Err(Blocker::ImpreciseNotAllowed { devices: unlogged });
                }
                degradations.push(SpaceDegradation::Imprecise { devices: unlogged });
            }
            Ok(Choice { container: Some(meaning), degradations, ..Choice::default() })
        }
    }
}

/// Tracks the hardware's writes in the page table; the kernel's, which that does not see, in the devices' own logs.
fn choose_page_table(
    devices: &[DeviceFacts],
    tracks: bool,
    mut degradations: Vec<SpaceDegradation>,
) -> Result<Choice, Blocker> {
    let seen = |device: &&DeviceFacts| tracks && device.writer == Writer::Hardware;
    let logged = |device: &&DeviceFacts| device.own_log == OwnLog::Works;
    let unseen = names(devices.iter().filter(|device| !seen(device) && !logged(device)));
    if !unseen.is_empty() {
        return Err(Blocker::NoSource { devices: unseen });
    }
    let device_logs = names(devices.iter().filter(|device| !seen(device)));
    degradations.push(SpaceDegradation::LargePages { devices: names(devices.iter().filter(seen)) });
    Ok(Choice { device_logs, page_table: true, container: None, degradations })
}

fn check_bitmap(
    bitmap: Option<DirtyBitmapInfo>,
    mapping_bytes: u64,
    unlogged: &[String],
) -> Result<(), Blocker> {
    let Some(bitmap) = bitmap else { return Err(Blocker::NoSource { devices: unlogged.to_vec() }) };
    let page_bytes = bitmap.page_sizes & bitmap.page_sizes.wrapping_neg();
    let most = (u128::from(bitmap.max_bytes / 8) * 64).saturating_mul(page_bytes.into());
    if u128::from(mapping_bytes) > most {
        return Err(Blocker::MappingTooLarge { mapping_bytes, max_bytes: bitmap.max_bytes });
    }
    Ok(())
}

fn names<'a>(devices: impl Iterator<Item = &'a DeviceFacts>) -> Vec<String> {
    devices.map(|device| device.id.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITERS: [Writer; 2] = [Writer::Hardware, Writer::Kernel];
    const LOGS: [OwnLog; 3] = [OwnLog::Absent, OwnLog::Unreportable, OwnLog::Works];
    const BITMAP: DirtyBitmapInfo = DirtyBitmapInfo { page_sizes: 0x4020_1000, max_bytes: 256 << 20 };

    fn trackers() -> [SpaceTracker; 4] {
        [
            SpaceTracker::Container { bitmap: Some(BITMAP), largest_mapping: 1 << 40 },
            SpaceTracker::Container { bitmap: None, largest_mapping: 1 << 40 },
            SpaceTracker::PageTable { tracks: true },
            SpaceTracker::PageTable { tracks: false },
        ]
    }

    /// Every way to put up to three devices behind one tracker.
    fn device_sets() -> Vec<Vec<DeviceFacts>> {
        let kinds: Vec<_> =
            WRITERS.into_iter().flat_map(|writer| LOGS.map(|own_log| (writer, own_log))).collect();
        let mut sets = vec![Vec::new()];
        for round in 0..3 {
            let longer: Vec<_> = sets
                .iter()
                .filter(|set| set.len() == round)
                .flat_map(|set| {
                    kinds.iter().map(|&(writer, own_log)| {
                        let mut set = set.clone();
                        set.push(DeviceFacts { id: format!("dev{}", set.len()), writer, own_log });
                        set
                    })
                })
                .collect();
            sets.extend(longer);
        }
        sets
    }

    /// Whether the choice sees what the device writes.
    fn sees(choice: &Choice, device: &DeviceFacts) -> bool {
        let own = choice.device_logs.contains(&device.id) && device.own_log == OwnLog::Works;
        own || choice.container.is_some() || (choice.page_table && device.writer == Writer::Hardware)
    }

    fn for_each_case(
        mut check: impl FnMut(&[DeviceFacts], SpaceTracker, Imprecise, Result<Choice, Blocker>),
    ) {
        let sets = device_sets();
        assert_eq!(sets.len(), 1 + 6 + 36 + 216);
        for devices in &sets {
            for tracker in trackers() {
                for imprecise in [Imprecise::Refused, Imprecise::Allowed] {
                    check(devices, tracker, imprecise, choose(devices, tracker, imprecise));
                }
            }
        }
    }

    #[test]
    fn every_device_is_seen_by_whatever_is_chosen() {
        for_each_case(|devices, tracker, _, chosen| {
            if let Ok(choice) = chosen {
                assert!(
                    devices.iter().all(|device| sees(&choice, device)),
                    "{devices:?} {tracker:?} {choice:?}"
                );
            }
        });
    }

    #[test]
    fn an_imprecise_source_stands_alone_and_only_where_it_is_allowed_and_told_of() {
        for_each_case(|devices, _, imprecise, chosen| {
            let Ok(choice) = chosen else { return };
            let told =
                choice.degradations.iter().any(|one| matches!(one, SpaceDegradation::Imprecise { .. }));
            assert_eq!(told, choice.container == Some(Meaning::Mapped));
            if told {
                assert_eq!(imprecise, Imprecise::Allowed);
            }
            if choice.container.is_some() {
                assert!(choice.device_logs.is_empty() && !choice.page_table);
                let hardware = devices.iter().any(|device| device.writer == Writer::Hardware);
                assert_eq!(choice.container, Some(if hardware { Meaning::Mapped } else { Meaning::Written }));
            }
        });
    }

    #[test]
    fn c65_large_pages_are_told_of_wherever_a_page_table_tracks_and_nowhere_else() {
        for_each_case(|devices, _, _, chosen| {
            let Ok(choice) = chosen else { return };
            let told = choice.degradations.iter().find_map(|one| match one {
                SpaceDegradation::LargePages { devices } => Some(devices.clone()),
                _ => None,
            });
            let hardware = names(devices.iter().filter(|device| device.writer == Writer::Hardware));
            assert_eq!(told, choice.page_table.then_some(hardware));
        });
    }

    #[test]
    fn where_every_device_logs_nothing_else_is_switched_on() {
        for_each_case(|devices, _, _, chosen| {
            if devices.iter().all(|device| device.own_log == OwnLog::Works) {
                let device_logs = names(devices.iter());
                assert_eq!(chosen, Ok(Choice { device_logs, ..Choice::default() }));
            }
        });
    }

    #[test]
    fn it_is_refused_only_for_a_device_that_nothing_could_see_or_only_imprecisely() {
        for_each_case(|devices, tracker, imprecise, chosen| {
            let Err(blocker) = chosen else { return };
            let unlogged = || devices.iter().filter(|device| device.own_log != OwnLog::Works);
            match blocker {
                Blocker::NoSource { devices: named } => {
                    assert!(!named.is_empty());
                    let unseen = unlogged().filter(|device| match tracker {
                        SpaceTracker::PageTable { tracks } => !tracks || device.writer == Writer::Kernel,
                        SpaceTracker::Container { bitmap, .. } => bitmap.is_none(),
                    });
                    assert_eq!(named, names(unseen));
                }
                Blocker::ImpreciseNotAllowed { devices: named } => {
                    assert_eq!((imprecise, named), (Imprecise::Refused, names(unlogged())));
                    assert!(devices.iter().any(|device| device.writer == Writer::Hardware));
                }
                Blocker::MappingTooLarge { .. } => panic!("1 TiB fits 256 MiB of bits"),
            }
        });
    }

    #[test]
    fn a_log_the_kernel_cannot_report_is_told_of_wherever_it_is_made_up_for() {
        for_each_case(|devices, _, _, chosen| {
            let Ok(choice) = chosen else { return };
            for device in devices {
                let told = choice
                    .degradations
                    .contains(&SpaceDegradation::Unreportable { device: device.id.clone() });
                assert_eq!(told, device.own_log == OwnLog::Unreportable);
            }
        });
    }

    #[test]
    fn c16_a_mapping_beyond_the_containers_limit_is_a_blocker() {
        let mdev = [DeviceFacts { id: "m".to_owned(), writer: Writer::Kernel, own_log: OwnLog::Absent }];
        let with = |largest_mapping| {
            let tracker = SpaceTracker::Container { bitmap: Some(BITMAP), largest_mapping };
            choose(&mdev, tracker, Imprecise::Refused)
        };
        assert!(with(8 << 40).is_ok());
        let (mapping_bytes, max_bytes) = ((8 << 40) + 1, 256 << 20);
        assert_eq!(with(mapping_bytes), Err(Blocker::MappingTooLarge { mapping_bytes, max_bytes }));
    }
}
