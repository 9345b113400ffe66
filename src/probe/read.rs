// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Looks at a host: its KVM, its VFIO, and the devices that VFIO drivers hold.
//!
//! A device is opened to be asked, which the kernel allows only while nobody else has it open, and which may reset it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use kvm_bindings::{KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE};
use vfio_bindings::bindings::vfio::{
    VFIO_MIGRATION_P2P, VFIO_MIGRATION_PRE_COPY, VFIO_MIGRATION_STOP_COPY, VFIO_TYPE1v2_IOMMU,
};

use super::facts::{
    BitmapFacts, BusKind, ContainerFacts, DeviceProbe, Facts, IommufdFacts, KvmFacts, LogFacts,
    MigrationFacts, ProbedDevice, Seen,
};
use crate::granule::Granule;
use crate::range::IovaRange;
use crate::source::ContainerInfo;
use crate::sys::vfio::{container, device as features, open};
use crate::sys::{iommufd, kvm, kvm_ring};

/// Where the host's device files and sysfs are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    /// `/dev`.
    pub dev: PathBuf,
    /// `/sys`.
    pub sys: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self { dev: PathBuf::from("/dev"), sys: PathBuf::from("/sys") }
    }
}

/// Reads all that can be read of the host below `roots`.
pub fn read(roots: &Roots) -> Facts {
    Facts {
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        kvm: seen(&roots.dev.join("kvm"), |kvm| read_kvm(&kvm)),
        container: seen(&roots.dev.join("vfio/vfio"), |container| read_container(&container)),
        iommufd: seen(&roots.dev.join("iommu"), |_| Ok(IommufdFacts {})),
        devices: read_devices(roots),
    }
}

/// Opens the device file at `path` and asks it.
fn seen<T>(path: &Path, ask: impl FnOnce(File) -> io::Result<T>) -> Seen<T> {
    match open_device(path).and_then(ask) {
        Ok(found) => Seen::Seen(found),
        Err(error) if is_absent(&error) => Seen::Absent,
        Err(error) => Seen::Unseen { reason: reason(&error) },
    }
}

fn open_device(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

/// Whether there is no device file, or no driver behind it.
fn is_absent(error: &io::Error) -> bool {
    error.kind() == ErrorKind::NotFound || matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO))
}

fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EBUSY) => "it is in use".to_owned(),
        _ => error.to_string(),
    }
}

fn read_kvm(kvm: &File) -> io::Result<KvmFacts> {
    kvm::api_version(kvm)?;
    let flags = kvm::manual_protect_flags(kvm);
    let rings = kvm_ring::ring_support(kvm);
    Ok(KvmFacts {
        manual_protect: flags & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0,
        initially_set: flags & KVM_DIRTY_LOG_INITIALLY_SET != 0,
        ring_max_bytes: rings.map(|rings| rings.max_bytes),
        ring_needs_bitmap: rings.is_some_and(|rings| rings.with_bitmap),
    })
}

fn read_container(container: &File) -> io::Result<ContainerFacts> {
    open::api_version(container)?;
    Ok(ContainerFacts { type1v2: open::has_extension(container, VFIO_TYPE1v2_IOMMU)? })
}

fn read_devices(roots: &Roots) -> Vec<ProbedDevice> {
    let buses = [("bus/pci/devices", BusKind::Pci), ("bus/mdev/devices", BusKind::Mediated)];
    let mut devices: Vec<_> = buses
        .into_iter()
        .flat_map(|(folder, bus)| {
            names_in(&roots.sys.join(folder)).into_iter().map(move |name| (folder, bus, name))
        })
        .filter_map(|(folder, bus, name)| read_device(roots, &roots.sys.join(folder).join(&name), bus, name))
        .collect();
    devices.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    devices
}

/// Reads one device; `None` where no VFIO driver holds it.
fn read_device(roots: &Roots, folder: &Path, bus: BusKind, name: String) -> Option<ProbedDevice> {
    let driver = link_name(&folder.join("driver"));
    let cdev = names_in(&folder.join("vfio-dev")).into_iter().next();
    let held = cdev.is_some()
        || match bus {
            BusKind::Pci => driver.as_ref().is_some_and(|driver| driver.contains("vfio")),
            BusKind::Mediated => driver.is_some(),
        };
    let group = link_name(&folder.join("iommu_group")).and_then(|group| group.parse().ok());
    held.then(|| {
        let probe = probe_device(roots, &name, group, cdev.as_deref());
        ProbedDevice { name, bus, driver, group, cdev, probe }
    })
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn link_name(link: &Path) -> Option<String> {
    Some(fs::read_link(link).ok()?.file_name()?.to_str()?.to_owned())
}

/// Opens the device the old way and the new, and asks on each what only it can tell.
fn probe_device(roots: &Roots, name: &str, group: Option<u32>, cdev: Option<&str>) -> Seen<DeviceProbe> {
    let by_group = group.map(|group| probe_in_group(roots, name, group));
    let by_cdev = cdev.map(|cdev| probe_by_cdev(roots, cdev));
    match (by_group, by_cdev) {
        (Some(Ok(old)), new) => {
            let page_table_tracks = new.and_then(Result::ok).and_then(|new| new.page_table_tracks);
            Seen::Seen(DeviceProbe { page_table_tracks, ..old })
        }
        (_, Some(Ok(new))) => Seen::Seen(new),
        (Some(Err(error)), new) => {
            // A node that is there and does not open tells more than one that is not there.
            let other = new.and_then(Result::err).filter(|_| is_absent(&error));
            unprobed(&other.unwrap_or(error))
        }
        (None, Some(Err(error))) => unprobed(&error),
        (None, None) => Seen::Absent,
    }
}

fn unprobed(error: &io::Error) -> Seen<DeviceProbe> {
    if is_absent(error) { Seen::Absent } else { Seen::Unseen { reason: reason(error) } }
}

fn probe_in_group(roots: &Roots, name: &str, group: u32) -> io::Result<DeviceProbe> {
    let group = open_device(&roots.dev.join(format!("vfio/{group}")))?;
    let container = open_device(&roots.dev.join("vfio/vfio"))?;
    if !open::group_is_viable(&group)? {
        return Err(io::Error::other("another device of its IOMMU group is bound to a driver of its own"));
    }
    open::set_container(&group, &container)?;
    open::set_type1v2(&container)?;
    let info = ContainerInfo::parse(&container::iommu_info(&container)?);
    let device = open::group_device(&group, name)?;
    let container_bitmap = info.dirty_bitmap.map(BitmapFacts::from);
    Ok(DeviceProbe { container_bitmap, ..ask_device(&device)? })
}

fn probe_by_cdev(roots: &Roots, cdev: &str) -> io::Result<DeviceProbe> {
    let iommufd = open_device(&roots.dev.join("iommu"))?;
    let device = open_device(&roots.dev.join("vfio/devices").join(cdev))?;
    let id = open::bind_iommufd(&device, &iommufd)?;
    // Fails for a mediated device, which has no IOMMU.
    let page_table_tracks = iommufd::tracks_dirty_pages(&iommufd, id).ok();
    Ok(DeviceProbe { page_table_tracks, ..ask_device(&OwnedFd::from(device))? })
}

fn ask_device(device: &OwnedFd) -> io::Result<DeviceProbe> {
    let migration = match features::migration_flags(device) {
        Ok(flags) => Some(ask_migration(device, flags)),
        Err(error) if features::is_absent(&error) => None,
        Err(error) => return Err(error),
    };
    Ok(DeviceProbe { migration, log: ask_log(device), container_bitmap: None, page_table_tracks: None })
}

fn ask_migration(device: &OwnedFd, flags: u64) -> MigrationFacts {
    let has = |flag: u32| flags & u64::from(flag) != 0;
    MigrationFacts {
        flags,
        stop_copy: has(VFIO_MIGRATION_STOP_COPY),
        p2p: has(VFIO_MIGRATION_P2P),
        pre_copy: has(VFIO_MIGRATION_PRE_COPY),
        stop_copy_bytes: features::stop_copy_length(device).ok(),
    }
}

/// Starts, reads and stops the device's log of one page: only a report tells whether the kernel can report.
fn ask_log(device: &OwnedFd) -> LogFacts {
    if features::probe_dma_logging(device).is_err() {
        return LogFacts::Absent;
    }
    let page = Granule::host_page();
    let range = IovaRange::new(0, page.bytes()).expect("a page is a range");
    let granule_bytes = match features::dma_logging_start(device, page, &[range]) {
        Ok(granule_bytes) => granule_bytes,
        Err(error) => return LogFacts::Fails { reason: reason(&error) },
    };
    let report = features::dma_logging_report(device, range, page, &mut [0]);
    let _closes_with_the_device = features::dma_logging_stop(device);
    match report {
        Ok(()) => LogFacts::Works { granule_bytes },
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => LogFacts::Unreportable,
        Err(error) => LogFacts::Fails { reason: reason(&error) },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::super::evaluate;
    use super::*;

    /// A host's files, with a plain file in place of each device file.
    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn roots(&self) -> Roots {
            Roots { dev: self.0.path().join("dev"), sys: self.0.path().join("sys") }
        }

        fn file(&self, path: &str) -> &Self {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
            self
        }

        fn device(&self, bus: &str, name: &str, driver: Option<&str>, group: u32) -> PathBuf {
            let folder = self.0.path().join("sys/bus").join(bus).join("devices").join(name);
            fs::create_dir_all(&folder).unwrap();
            if let Some(driver) = driver {
                symlink(format!("../../../../bus/{bus}/drivers/{driver}"), folder.join("driver")).unwrap();
            }
            symlink(format!("../../../kernel/iommu_groups/{group}"), folder.join("iommu_group")).unwrap();
            folder
        }
    }

    fn named(facts: &Facts) -> Vec<&str> {
        facts.devices.iter().map(|device| device.name.as_str()).collect()
    }

    #[test]
    fn an_empty_host_has_nothing() {
        let facts = read(&Tree::new().roots());
        assert_eq!(
            (&facts.kvm, &facts.container, &facts.iommufd),
            (&Seen::Absent, &Seen::Absent, &Seen::Absent)
        );
        assert!(facts.devices.is_empty());
    }

    #[test]
    fn files_that_do_not_answer_are_unseen_with_the_reason() {
        let tree = Tree::new();
        tree.file("dev/kvm").file("dev/vfio/vfio");
        let facts = read(&tree.roots());
        assert!(matches!(&facts.kvm, Seen::Unseen { reason } if reason.contains("ioctl")), "{:?}", facts.kvm);
        assert!(matches!(&facts.container, Seen::Unseen { .. }));
    }

    #[test]
    fn only_devices_that_a_vfio_driver_holds_are_listed() {
        let tree = Tree::new();
        tree.device("pci", "0000:00:01.0", Some("e1000"), 1);
        tree.device("pci", "0000:00:02.0", None, 2);
        tree.device("pci", "0000:00:04.0", Some("vfio-pci"), 4);
        let variant = tree.device("pci", "0000:00:03.0", Some("edu_driver"), 3);
        fs::create_dir_all(variant.join("vfio-dev/vfio7")).unwrap();
        tree.device("mdev", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", Some("dirty_mdev"), 5);
        let facts = read(&tree.roots());
        assert_eq!(named(&facts), ["0000:00:03.0", "0000:00:04.0", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"]);
        let [variant, plain, mdev] = &facts.devices[..] else { panic!("three devices") };
        assert_eq!((variant.cdev.as_deref(), variant.driver.as_deref()), (Some("vfio7"), Some("edu_driver")));
        assert_eq!((plain.group, plain.bus, &plain.probe), (Some(4), BusKind::Pci, &Seen::Absent));
        assert_eq!((mdev.group, mdev.bus), (Some(5), BusKind::Mediated));
    }

    #[test]
    fn a_device_whose_file_does_not_answer_is_unseen() {
        let tree = Tree::new();
        tree.device("pci", "0000:00:04.0", Some("vfio-pci"), 4);
        tree.file("dev/kvm").file("dev/vfio/4").file("dev/vfio/vfio");
        let report = evaluate(read(&tree.roots()));
        assert!(report.blockers.is_empty());
        let unseen: Vec<_> = report.unseen.iter().map(|finding| finding.code.as_str()).collect();
        assert_eq!(unseen, ["kvm-unseen", "container-unseen", "device-unseen"]);
    }

    #[test]
    fn this_host_can_be_read_whoever_asks() {
        let report = evaluate(read(&Roots::default()));
        assert!(serde_json::to_string(&report).is_ok());
    }
}
