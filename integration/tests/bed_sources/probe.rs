// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The probe, in every scenario of the bed.

use std::path::Path;
use std::process::Command;

use crate::kernel::bed;
use vfio_migration::probe::{
    BusKind, LogFacts, ProbeFinding, ProbeReport, ProbedDevice, Roots, Seen, evaluate, read,
};
use vfio_migration_integration::skipped;

fn codes<'a>(findings: &'a [ProbeFinding], subject: &str) -> Vec<&'a str> {
    let about = findings.iter().filter(|finding| finding.subject == subject);
    about.map(|finding| finding.code.as_str()).collect()
}

fn report() -> ProbeReport {
    evaluate(read(&Roots::default()))
}

/// The devices of a kind that the bed says it has.
fn devices<'a>(report: &'a ProbeReport, names: Option<&String>) -> Vec<&'a ProbedDevice> {
    let names: Vec<_> = names.map_or(Vec::new(), |names| names.split_whitespace().collect());
    let found = |name: &&str| report.facts.devices.iter().find(|device| device.name == *name);
    names.iter().map(|name| found(name).unwrap_or_else(|| panic!("{name} is not listed"))).collect()
}

#[test]
fn kvm_and_vfio_are_told_of_as_they_are() {
    let Some(bed) = bed("probe of the host") else { return };
    let report = report();
    let blockers = codes(&report.blockers, "host");
    assert_eq!(blockers.contains(&"no-kvm"), bed["scenario"] == "no-kvm");
    assert_eq!(blockers.contains(&"no-vfio"), bed["scenario"] == "no-vfio");
    if let Seen::Seen(kvm) = &report.facts.kvm {
        assert!(kvm.manual_protect && kvm.initially_set);
        assert_eq!(kvm.ring_max_bytes, Some(1 << 20));
    }
    if bed["scenario"] != "no-vfio" {
        assert!(report.facts.container.found().is_some_and(|container| container.type1v2));
        assert!(report.facts.iommufd.found().is_some());
    }
    assert!(report.unseen.is_empty(), "{:?}", report.unseen);
}

#[test]
fn each_device_is_told_of_as_it_is() {
    let Some(bed) = bed("probe of devices") else { return };
    let report = report();
    for device in devices(&report, bed.get("dirty_mdev")) {
        let probe = device.probe.found().unwrap();
        assert_eq!(device.bus, BusKind::Mediated);
        assert!(probe.migration.is_some_and(|migration| migration.flags == 7));
        assert_eq!(probe.log, LogFacts::Works { granule_bytes: 4096 });
        assert_eq!(probe.container_bitmap.map(|bitmap| bitmap.max_bytes), Some(256 << 20));
        assert!(codes(&report.blockers, &device.name).is_empty());
        assert!(codes(&report.degradations, &device.name).is_empty());
    }
    for device in devices(&report, bed.get("mtty")) {
        let migration = device.probe.found().unwrap().migration.unwrap();
        assert_eq!((migration.flags, migration.stop_copy_bytes), (7, Some(60)));
        assert!(codes(&report.blockers, &device.name).is_empty());
        assert!(codes(&report.degradations, &device.name).is_empty(), "it has a log of its own");
    }
    for device in devices(&report, bed.get("edu_vfio")) {
        assert_eq!(device.bus, BusKind::Pci);
        assert!(codes(&report.blockers, &device.name).is_empty());
        assert!(codes(&report.degradations, &device.name).is_empty());
    }
    let plain = devices(&report, bed.get("vfio-pci"));
    if bed["scenario"] == "plain-pci" && bed["kernel"] == "stock" && bed["iommu"] == "intel" {
        assert_eq!(plain.len(), 2);
    }
    for device in plain {
        assert_eq!(device.driver.as_deref(), Some("vfio-pci"));
        assert_eq!(codes(&report.blockers, &device.name), ["not-migratable"]);
        assert_eq!(codes(&report.degradations, &device.name), ["imprecise-dirty-tracking"]);
    }
}

#[test]
fn probing_twice_tells_the_same() {
    if bed("probe twice").is_some() {
        assert_eq!(report(), report());
    }
}

const TOOL: &str = "/bin/vfio-migrate";

/// What the tool's probe prints. It has to be asked while no device is open: those in use tell it nothing.
fn printed(arguments: &[&str]) -> String {
    let output = Command::new(TOOL).arg("probe").args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_tool_prints_the_same_report() {
    let test = "probe by the tool";
    if bed(test).is_none() {
        return;
    }
    if !Path::new(TOOL).exists() {
        return skipped(test, format!("no {TOOL} (integration/testbed/run --bin vfio-migrate)"));
    }
    let report = report();
    assert_eq!(serde_json::from_str::<ProbeReport>(&printed(&["--json"])).unwrap(), report);
    let text = printed(&[]);
    for finding in [&report.blockers, &report.degradations, &report.unseen].into_iter().flatten() {
        let named = format!("{} ({})", finding.code, finding.subject);
        assert!(text.contains(&named), "{named} is missing:\n{text}");
    }
    for device in &report.facts.devices {
        assert!(text.contains(&device.name), "{} is missing:\n{text}", device.name);
    }
}
