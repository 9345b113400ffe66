// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Derives findings, what stands in a migration's way, from the facts that were read.

use super::facts::{BusKind, DeviceProbe, Facts, KvmFacts, LogFacts, MigrationFacts, ProbedDevice, Seen};
use super::{ProbeFinding, ProbeReport};
use crate::device::STATE_LIMIT_BYTES;
use crate::source::Meaning;
use crate::source::choose::{
    Blocker, DeviceFacts, Imprecise, OwnLog, SpaceDegradation, SpaceTracker, Writer, choose,
};

const HOST: &str = "host";

/// The first kernel whose iommufd reports every dirty bit of a mapping in large pages.
const WHOLE_HUGE_BITS: (u32, u32) = (6, 11);

/// Judges what was read of a host.
pub fn evaluate(facts: Facts) -> ProbeReport {
    let mut verdict = Verdict::default();
    verdict.kvm(&facts.kvm);
    verdict.vfio(&facts);
    for device in &facts.devices {
        verdict.device(device, &facts);
    }
    let Verdict { blockers, degradations, unseen } = verdict;
    ProbeReport { facts, blockers, degradations, unseen }
}

#[derive(Debug, Default)]
struct Verdict {
    blockers: Vec<ProbeFinding>,
    degradations: Vec<ProbeFinding>,
    unseen: Vec<ProbeFinding>,
}

fn finding(code: &str, subject: &str, reason: impl Into<String>, remedy: &str) -> ProbeFinding {
    let (code, subject, remedy) = (code.to_owned(), subject.to_owned(), remedy.to_owned());
    ProbeFinding { code, subject, reason: reason.into(), remedy }
}

impl Verdict {
    fn kvm(&mut self, kvm: &Seen<KvmFacts>) {
        match kvm {
            Seen::Absent => self.blockers.push(finding(
                "no-kvm",
                HOST,
                "This host has no KVM",
                "load the kvm module of this processor, or switch virtualisation on in the firmware",
            )),
            Seen::Unseen { reason } => self.unseen.push(finding(
                "kvm-unseen",
                HOST,
                format!("KVM could not be asked: {reason}"),
                "run as a user who may open the kvm device",
            )),
            Seen::Seen(kvm) if !kvm.manual_protect => self.degradations.push(finding(
                "no-manual-protect",
                HOST,
                "KVM clears dirty bits when it reports them, all at once",
                "use Linux 5.0 or newer",
            )),
            Seen::Seen(_) => {}
        }
    }

    fn vfio(&mut self, facts: &Facts) {
        let interfaces = [
            unseen_reason(&facts.container).map(|reason| ("container-unseen", "The VFIO container", reason)),
            unseen_reason(&facts.iommufd).map(|reason| ("iommufd-unseen", "iommufd", reason)),
        ];
        for (code, name, reason) in interfaces.into_iter().flatten() {
            let remedy = "run as a user who may open VFIO's devices";
            self.unseen.push(finding(code, HOST, format!("{name} could not be asked: {reason}"), remedy));
        }
        if facts.container == Seen::Absent && facts.iommufd == Seen::Absent {
            self.blockers.push(finding(
                "no-vfio",
                HOST,
                "This host has no VFIO: no device can be passed through",
                "load the vfio-pci module, and switch the IOMMU on in the firmware and on the kernel's command line",
            ));
        }
    }

    fn device(&mut self, device: &ProbedDevice, facts: &Facts) {
        match &device.probe {
            Seen::Seen(probe) => {
                self.migration(&device.name, probe.migration, facts.devices.len() > 1);
                self.tracking(device, probe, &facts.kernel);
            }
            Seen::Absent => self.unseen.push(finding(
                "device-gone",
                &device.name,
                "The device has no file to open it by",
                "bind the device to its VFIO driver anew",
            )),
            Seen::Unseen { reason } => self.unseen.push(finding(
                "device-unseen",
                &device.name,
                format!("The device could not be asked: {reason}"),
                "run as a user who may open it, while no VM uses it",
            )),
        }
    }

    fn migration(&mut self, name: &str, migration: Option<MigrationFacts>, among_others: bool) {
        let Some(migration) = migration.filter(|migration| migration.stop_copy) else {
            self.blockers.push(finding(
                "not-migratable",
                name,
                "The device's driver cannot save its state",
                "bind the device to a VFIO driver of its vendor that supports migration",
            ));
            return;
        };
        if !migration.pre_copy {
            self.degradations.push(finding(
                "no-precopy",
                name,
                "The device's whole state is sent while the VM is paused",
                "expect a longer pause, or use a device whose driver has PRE_COPY",
            ));
        }
        if !migration.p2p && among_others {
            self.degradations.push(finding(
                "no-p2p",
                name,
                "The device cannot be made quiescent before others stop",
                "keep other devices' registers out of its reach: do not map them for it",
            ));
        }
        self.state_size(name, migration.stop_copy_bytes);
    }

    fn state_size(&mut self, name: &str, state_bytes: Option<u64>) {
        match state_bytes {
            None => self.degradations.push(finding(
                "state-size-unknown",
                name,
                "The device does not tell how large its state is",
                "leave room in the downtime limit",
            )),
            Some(bytes) if bytes > STATE_LIMIT_BYTES as u64 => self.degradations.push(finding(
                "state-streams-only",
                name,
                format!(
                    "The device has {bytes} bytes of state: it moves to a receiver of this library that takes streams, and {STATE_LIMIT_BYTES} at most to any other receiver, such as Cloud Hypervisor, or into a snapshot"
                ),
                "offer streams at the destination (Destination::device_streams), or raise Device::state_limit on both hosts, and both ends' limit on State to four thirds of it",
            )),
            Some(_) => {}
        }
    }

    /// What is worse than it could be in what was chosen.
    fn chosen(&mut self, degradation: &SpaceDegradation, name: &str, kernel: &str) {
        let reason = match degradation {
            SpaceDegradation::LargePages { .. } => large_pages(kernel),
            other => other.to_string(),
        };
        self.degradations.push(finding(degradation.code(), name, reason, degradation.remedy()));
    }

    /// What a mediated device's driver keeps pinned is reported at every read, whatever is written.
    fn pinned_pages(&mut self, name: &str) {
        self.degradations.push(finding(
            "pinned-pages-stand",
            name,
            "Pages that the device's driver keeps pinned are dirty in every round, and are sent once more in the downtime",
            "leave room for them in the downtime limit",
        ));
    }

    fn tracking(&mut self, device: &ProbedDevice, probe: &DeviceProbe, kernel: &str) {
        if let LogFacts::Fails { reason } = &probe.log {
            let reason = format!("The device's DMA log does not start: {reason}");
            let remedy = "see the kernel's log, and use newer firmware for the device";
            self.degradations.push(finding("dma-log-fails", &device.name, reason, remedy));
        }
        match choose(&[device_facts(device, probe)], tracker(probe), Imprecise::Allowed) {
            Ok(choice) => {
                choice.degradations.iter().for_each(|one| self.chosen(one, &device.name, kernel));
                if choice.container == Some(Meaning::Written) {
                    self.pinned_pages(&device.name);
                }
            }
            Err(blocker) => self.blockers.push(blocked(&blocker, &device.name)),
        }
    }
}

/// What a page table's one dirty bit for each of its entries means on this kernel.
fn large_pages(kernel: &str) -> String {
    if release(kernel).is_none_or(|release| release < WHOLE_HUGE_BITS) {
        format!("Linux {kernel} may lose dirty bits of memory mapped in large pages; 6.11 does not")
    } else {
        "A dirty bit of memory mapped in large pages stands for up to 1 GiB".to_owned()
    }
}

/// The first two numbers of a kernel's release.
fn release(kernel: &str) -> Option<(u32, u32)> {
    let mut numbers = kernel.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse().ok());
    Some((numbers.next()?, numbers.next()?))
}

fn blocked(blocker: &Blocker, name: &str) -> ProbeFinding {
    finding(blocker.code(), name, blocker.to_string(), blocker.remedy())
}

fn device_facts(device: &ProbedDevice, probe: &DeviceProbe) -> DeviceFacts {
    let own_log = match probe.log {
        LogFacts::Absent | LogFacts::Fails { .. } => OwnLog::Absent,
        LogFacts::Unreportable => OwnLog::Unreportable,
        LogFacts::Works { .. } => OwnLog::Works,
    };
    let writer = match device.bus {
        BusKind::Pci => Writer::Hardware,
        BusKind::Mediated => Writer::Kernel,
    };
    DeviceFacts { id: device.name.clone(), writer, own_log }
}

/// Returns the better of the two trackers that the device could be put on.
fn tracker(probe: &DeviceProbe) -> SpaceTracker {
    match (probe.page_table_tracks, probe.container_bitmap) {
        (Some(true), _) => SpaceTracker::PageTable { tracks: true },
        (_, Some(bitmap)) => SpaceTracker::Container { bitmap: Some(bitmap.into()), largest_mapping: 0 },
        (Some(false), None) => SpaceTracker::PageTable { tracks: false },
        (None, None) => SpaceTracker::Container { bitmap: None, largest_mapping: 0 },
    }
}

fn unseen_reason<T>(seen: &Seen<T>) -> Option<&str> {
    match seen {
        Seen::Unseen { reason } => Some(reason),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::facts::{BitmapFacts, ContainerFacts};
    use super::*;

    const BITMAP: BitmapFacts = BitmapFacts { page_sizes: 0x1000, max_bytes: 256 << 20 };

    fn kvm() -> Seen<KvmFacts> {
        Seen::Seen(KvmFacts {
            manual_protect: true,
            initially_set: true,
            ring_max_bytes: Some(1 << 20),
            ring_needs_bitmap: false,
        })
    }

    fn host(devices: Vec<ProbedDevice>) -> Facts {
        let container = Seen::Seen(ContainerFacts { type1v2: true });
        Facts { kernel: "6.12.0".to_owned(), kvm: kvm(), container, iommufd: Seen::Absent, devices }
    }

    fn migration(flags: u64) -> Option<MigrationFacts> {
        let has = |bit| flags & bit != 0;
        let stop_copy_bytes = Some(60);
        Some(MigrationFacts { flags, stop_copy: has(1), p2p: has(2), pre_copy: has(4), stop_copy_bytes })
    }

    fn device(bus: BusKind, migration: Option<MigrationFacts>, log: LogFacts) -> ProbedDevice {
        let container_bitmap = Some(BITMAP);
        let probe = Seen::Seen(DeviceProbe { migration, log, container_bitmap, page_table_tracks: None });
        let (name, driver) = ("0000:00:03.0".to_owned(), Some("vfio-pci".to_owned()));
        ProbedDevice { name, bus, driver, group: Some(3), cdev: None, probe }
    }

    fn works() -> LogFacts {
        LogFacts::Works { granule_bytes: 4096 }
    }

    fn codes(findings: &[ProbeFinding]) -> Vec<&str> {
        findings.iter().map(|finding| finding.code.as_str()).collect()
    }

    fn judged(facts: Facts) -> (Vec<String>, Vec<String>, Vec<String>) {
        let report = evaluate(facts);
        let own = |findings: &[ProbeFinding]| codes(findings).into_iter().map(str::to_owned).collect();
        (own(&report.blockers), own(&report.degradations), own(&report.unseen))
    }

    #[test]
    fn a_plain_pass_through_device_is_blocked_for_its_state_and_imprecise_in_its_writes() {
        let (blockers, degradations, unseen) =
            judged(host(vec![device(BusKind::Pci, None, LogFacts::Absent)]));
        assert_eq!(blockers, ["not-migratable"]);
        assert_eq!(degradations, ["imprecise-dirty-tracking"]);
        assert!(unseen.is_empty());
    }

    #[test]
    fn a_variant_driver_that_does_it_all_has_no_findings() {
        let report = evaluate(host(vec![device(BusKind::Pci, migration(7), works())]));
        assert_eq!((report.blockers.len(), report.degradations.len(), report.unseen.len()), (0, 0, 0));
    }

    #[test]
    fn c54_a_mediated_device_needs_no_log_of_its_own_but_what_it_pins_comes_back() {
        let (blockers, degradations, _) =
            judged(host(vec![device(BusKind::Mediated, migration(7), LogFacts::Absent)]));
        assert!(blockers.is_empty());
        assert_eq!(degradations, ["pinned-pages-stand"]);
    }

    #[test]
    fn c48_a_state_too_large_for_state_is_told_with_the_peers_to_which_it_moves_and_what_to_raise() {
        let judged = |bytes| {
            let mut large = device(BusKind::Pci, migration(7), works());
            if let Seen::Seen(DeviceProbe { migration: Some(migration), .. }) = &mut large.probe {
                migration.stop_copy_bytes = Some(bytes);
            }
            let report = evaluate(host(vec![large]));
            assert!(report.blockers.is_empty(), "it streams between two ends of this library");
            report.degradations
        };
        assert!(judged(STATE_LIMIT_BYTES as u64).is_empty());
        let told = judged(STATE_LIMIT_BYTES as u64 + 1);
        assert_eq!(codes(&told), ["state-streams-only"]);
        let words = ["takes streams", &STATE_LIMIT_BYTES.to_string(), "Cloud Hypervisor", "snapshot"];
        assert!(words.iter().all(|word| told[0].reason.contains(word)), "{}", told[0].reason);
        assert!(told[0].remedy.contains("Device::state_limit") && told[0].remedy.contains("device_streams"));
    }

    #[test]
    fn a_stock_kernels_unreportable_log_is_told_of() {
        let (blockers, degradations, _) =
            judged(host(vec![device(BusKind::Pci, migration(7), LogFacts::Unreportable)]));
        assert!(blockers.is_empty());
        assert_eq!(degradations, ["dma-log-not-reportable", "imprecise-dirty-tracking"]);
    }

    #[test]
    fn each_missing_part_of_migration_is_a_degradation() {
        let log = LogFacts::Fails { reason: "No space".to_owned() };
        let mut first = device(BusKind::Mediated, migration(1), log);
        if let Seen::Seen(DeviceProbe { migration: Some(migration), .. }) = &mut first.probe {
            migration.stop_copy_bytes = None;
        }
        let second = device(BusKind::Pci, migration(7), works());
        let (_, degradations, _) = judged(host(vec![first, second]));
        assert_eq!(
            degradations,
            ["no-precopy", "no-p2p", "state-size-unknown", "dma-log-fails", "pinned-pages-stand",]
        );
        let alone = judged(host(vec![device(BusKind::Pci, migration(5), works())]));
        assert!(alone.1.is_empty(), "a device alone has no peers");
    }

    #[test]
    fn a_page_table_that_tracks_is_better_than_the_container() {
        let mut tracked = device(BusKind::Pci, migration(7), LogFacts::Absent);
        if let Seen::Seen(probe) = &mut tracked.probe {
            probe.page_table_tracks = Some(true);
        }
        assert_eq!(judged(host(vec![tracked.clone()])).1, ["large-iommu-pages"]);
        if let Seen::Seen(probe) = &mut tracked.probe {
            (probe.page_table_tracks, probe.container_bitmap) = (Some(false), None);
        }
        assert_eq!(judged(host(vec![tracked])).0, ["no-dirty-tracking"]);
    }

    #[test]
    fn c65_a_page_tables_large_pages_are_told_of_and_the_bits_old_kernels_lose() {
        let told = |kernel: &str| {
            let mut tracked = device(BusKind::Pci, migration(7), LogFacts::Absent);
            if let Seen::Seen(probe) = &mut tracked.probe {
                probe.page_table_tracks = Some(true);
            }
            let report = evaluate(Facts { kernel: kernel.to_owned(), ..host(vec![tracked]) });
            let finding = &report.degradations[0];
            assert!(finding.remedy.contains("IOMMU_OPTION_HUGE_PAGES"));
            finding.reason.clone()
        };
        for old in ["6.8.0-45-generic", "6.10.14", "5.15.0", "unknown"] {
            assert!(told(old).contains("may lose dirty bits"), "{old}");
        }
        for new in ["6.11.0", "6.12.1-rc1", "7.0"] {
            assert!(told(new).contains("1 GiB"), "{new}");
        }
    }

    #[test]
    fn hosts_without_kvm_or_vfio_are_blocked() {
        let bare = Facts { kvm: Seen::Absent, container: Seen::Absent, ..host(Vec::new()) };
        assert_eq!(judged(bare).0, ["no-kvm", "no-vfio"]);
    }

    #[test]
    fn what_could_not_be_seen_is_neither_blocker_nor_degradation() {
        let denied = || "Permission denied".to_owned();
        let mut hidden = device(BusKind::Pci, None, LogFacts::Absent);
        hidden.probe = Seen::Unseen { reason: denied() };
        let facts = Facts {
            kernel: "6.12.0".to_owned(),
            kvm: Seen::Unseen { reason: denied() },
            container: Seen::Unseen { reason: denied() },
            iommufd: Seen::Unseen { reason: denied() },
            devices: vec![hidden],
        };
        let (blockers, degradations, unseen) = judged(facts);
        assert!(blockers.is_empty() && degradations.is_empty());
        assert_eq!(unseen, ["kvm-unseen", "container-unseen", "iommufd-unseen", "device-unseen"]);
    }

    #[test]
    fn an_old_kvm_is_a_degradation() {
        let mut facts = host(Vec::new());
        facts.kvm = Seen::Seen(KvmFacts {
            manual_protect: false,
            initially_set: false,
            ring_max_bytes: None,
            ring_needs_bitmap: false,
        });
        assert_eq!(judged(facts).1, ["no-manual-protect"]);
    }

    #[test]
    fn the_json_of_a_report_is_stable_and_reads_back() {
        let report = evaluate(host(vec![device(BusKind::Mediated, migration(3), works())]));
        let json = serde_json::to_value(&report).unwrap();
        let expected = serde_json::json!({
            "kernel": "6.12.0",
            "kvm": {"seen": {"manual_protect": true, "initially_set": true, "ring_max_bytes": 1_048_576, "ring_needs_bitmap": false}},
            "container": {"seen": {"type1v2": true}},
            "iommufd": "absent",
            "devices": [{
                "name": "0000:00:03.0", "bus": "mediated", "driver": "vfio-pci", "group": 3, "cdev": null,
                "probe": {"seen": {
                    "migration": {"flags": 3, "stop_copy": true, "p2p": true, "pre_copy": false, "stop_copy_bytes": 60},
                    "log": {"works": {"granule_bytes": 4096}},
                    "container_bitmap": {"page_sizes": 4096, "max_bytes": 268_435_456},
                    "page_table_tracks": null,
                }},
            }],
            "blockers": [],
            "degradations": [{
                "code": "no-precopy", "subject": "0000:00:03.0",
                "reason": "The device's whole state is sent while the VM is paused",
                "remedy": "expect a longer pause, or use a device whose driver has PRE_COPY",
            }],
            "unseen": [],
        });
        assert_eq!(json, expected);
        assert_eq!(serde_json::from_value::<ProbeReport>(json).unwrap(), report);
    }
}
