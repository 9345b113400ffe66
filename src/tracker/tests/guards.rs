// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use crate::tracker::{DeviceMappings, Disagreement, OnFailure, SpaceId, VmMappings};

/// A VM of 256 pages with one device that reaches all of it.
fn agreed() -> VmMappings {
    let all = vec![pages(0, PAGES)];
    let device = DeviceMappings { device: "net0".to_owned(), gpa: all.clone() };
    VmMappings { ram: all.clone(), absent: Vec::new(), vcpu_slots: all, devices: vec![device] }
}

/// Begins a session of a VM that is mapped like this, with a source for each kind of writer.
fn begin_with(mappings: VmMappings, covers: [(Reports, GpaRange); 3]) -> Result<(), String> {
    let mut builder = Tracker::builder(layout()).mappings(move || mappings.clone());
    let ids = ["kvm", "vmm", "device"];
    let sources = ids.map(Scripted::new);
    for (source, (reports, cover)) in sources.iter().zip(covers) {
        source.script().reports = reports;
        source.script().cover = vec![cover];
        let devices = (reports == Reports::Devices).then_some("net0");
        builder = builder.source_of(SpaceId::IDENTITY, devices, Box::new(source.clone()));
    }
    let mut tracker = builder.build().unwrap();
    let begun = tracker.begin(Start::Empty).map(drop);
    let running = sources.iter().filter(|source| source.script().running).count();
    assert_eq!(running, if begun.is_ok() { 3 } else { 0 }, "a session that does not begin leaves nothing on");
    begun.map_err(|error| crate::error::Chain(&error).to_string())
}

const KINDS: [Reports; 3] = [Reports::Vcpus, Reports::Vmm, Reports::Devices];

#[test]
fn c63_a_session_begins_only_when_memory_slots_and_covers_agree_with_the_layout() {
    let full = KINDS.map(|kind| (kind, pages(0, PAGES)));
    begin_with(agreed(), full).unwrap();
    let refused = |change: &dyn Fn(&mut VmMappings), said: &str| {
        let mut mappings = agreed();
        change(&mut mappings);
        let error = begin_with(mappings, full).unwrap_err();
        assert!(error.ends_with(said), "{error}");
    };
    refused(&|vm| vm.ram.push(pages(PAGES, 1)), "VM has RAM at 0x100000..0x101000 that is not tracked");
    refused(&|vm| vm.ram = vec![pages(0, 255)], "RAM at 0xff000..0x100000 is tracked, and VM has none there");
    refused(
        &|vm| vm.vcpu_slots = vec![pages(0, 9)],
        "No memory slot of the vCPUs holds the RAM at 0x9000..0x100000",
    );
}

#[test]
fn c63_whoever_can_write_where_no_source_looks_is_named() {
    let who = ["vCPUs", "The VMM's own threads", "Device net0"];
    for (at, who) in who.into_iter().enumerate() {
        let mut covers = KINDS.map(|kind| (kind, pages(0, PAGES)));
        covers[at].1 = pages(0, 200);
        let error = begin_with(agreed(), covers).unwrap_err();
        let said = format!("{who} can write RAM at 0xc8000..0x100000, which no dirty source covers for them");
        assert!(error.ends_with(&said), "{error}");
    }
    let mut mappings = agreed();
    mappings.devices[0].gpa = vec![pages(0, 200), pages(1 << 20, 4)];
    let mut covers = KINDS.map(|kind| (kind, pages(0, PAGES)));
    covers[2].1 = pages(0, 200);
    begin_with(mappings, covers).unwrap();
}

#[test]
fn c63_a_kind_of_writer_that_was_left_out_is_named() {
    let all = pages(0, PAGES);
    let without = |left_out: Reports, instead: Reports| {
        begin_with(agreed(), KINDS.map(|kind| (if kind == left_out { instead } else { kind }, all)))
    };
    let error = without(Reports::Vcpus, Reports::Vmm).unwrap_err();
    assert!(
        error.ends_with("vCPUs can write RAM at 0x0..0x100000, which no dirty source covers for them"),
        "{error}"
    );
    let error = without(Reports::Vmm, Reports::Vcpus).unwrap_err();
    assert!(error.contains("The VMM's own threads can write RAM at 0x0..0x100000"), "{error}");
    without(Reports::Vmm, Reports::Component).unwrap();
}

#[test]
fn c63_a_device_that_no_source_speaks_for_is_named() {
    let mut mappings = agreed();
    mappings.devices.push(DeviceMappings { device: "gpu0".to_owned(), gpa: vec![pages(3, 2)] });
    let error = begin_with(mappings, KINDS.map(|kind| (kind, pages(0, PAGES)))).unwrap_err();
    assert!(error.contains("Device gpu0 can write RAM at 0x3000..0x5000"), "{error}");
}

#[test]
fn c63_a_device_whose_mappings_nobody_tells_is_named() {
    let mut mappings = agreed();
    mappings.devices.clear();
    let covers = KINDS.map(|kind| (kind, pages(0, PAGES)));
    let error = begin_with(mappings.clone(), covers).unwrap_err();
    let said = "Dirty source device speaks for device net0, and the VM's mappings do not have that device";
    assert!(error.ends_with(said), "{error}");
    // One that is behind a virtual IOMMU and has no mapping yet.
    mappings.devices.push(DeviceMappings { device: "net0".to_owned(), gpa: Vec::new() });
    begin_with(mappings, covers).unwrap();
}

#[test]
fn c63_a_source_of_devices_says_of_which() {
    let source = Scripted::new("device-log");
    source.script().reports = Reports::Devices;
    let mappings = || VmMappings { vcpu_slots: Vec::new(), ..agreed() };
    let builder = Tracker::builder(layout()).mappings(mappings);
    let mut tracker = builder.source(Box::new(source.clone())).build().unwrap();
    let error = tracker.begin(Start::Empty).unwrap_err();
    assert!(matches!(error, TrackerError::Disagreement(Disagreement::NoDevices { .. })), "{error}");
    assert!(!source.script().running);
}

#[test]
fn c63_ram_that_was_plugged_in_unsaid_is_named_whoever_reports() {
    let ram = Arc::new(Mutex::new(vec![pages(0, PAGES)]));
    let now = Arc::clone(&ram);
    let mappings = move || VmMappings { ram: now.lock().unwrap().clone(), ..VmMappings::default() };
    let component = Scripted::new("back-end");
    let builder = Tracker::builder(layout()).mappings(mappings);
    let mut tracker = builder.source(Box::new(component.clone())).build().unwrap();
    let cursor = tracker.begin(Start::Empty).unwrap();
    tracker.end(cursor).unwrap();
    ram.lock().unwrap().push(pages(PAGES, 1));
    let error = tracker.begin(Start::Empty).unwrap_err();
    assert!(matches!(error, TrackerError::Disagreement(Disagreement::Untracked { .. })), "{error}");
    tracker.add_ram(&PluggedRam { gpa: pages(PAGES, 1), kvm_slot: None }).unwrap();
    tracker.begin(Start::Empty).unwrap();
}

#[test]
fn parts_that_the_guest_does_not_have_are_no_part_of_the_layout() {
    let mut mappings = agreed();
    mappings.ram.push(pages(PAGES, 64));
    mappings.absent.push(pages(PAGES, 64));
    begin_with(mappings, KINDS.map(|kind| (kind, pages(0, PAGES)))).unwrap();
}

#[test]
fn c63_every_source_takes_what_really_maps_the_memory() {
    for kind in [Reports::Vcpus, Reports::Vmm, Reports::Devices, Reports::Component] {
        let source = Scripted::new("source");
        source.script().reports = kind;
        let Err(error) = Tracker::builder(layout()).source(Box::new(source)).build() else {
            panic!("accepted")
        };
        assert!(matches!(error, TrackerError::NoMappings { .. }), "{error}");
    }
}

/// Builds a tracker with an imprecise container for `imprecise` and an exact log for `precise`.
fn mixed(imprecise: &[&str], precise: &[&str]) -> Result<Tracker, TrackerError> {
    let (container, log) = (Scripted::imprecise("container"), Scripted::new("device-log"));
    for source in [&container, &log] {
        source.script().reports = Reports::Devices;
    }
    let builder = Tracker::builder(layout()).mappings(VmMappings::default).allow_imprecise();
    let builder = builder.source_of(SpaceId::IDENTITY, imprecise.iter().copied(), Box::new(container));
    builder.source_of(SpaceId::IDENTITY, precise.iter().copied(), Box::new(log)).build()
}

#[test]
fn c64_an_imprecise_source_never_stands_beside_a_precise_one_for_the_same_device() {
    assert!(mixed(&["net0"], &["net1"]).is_ok());
    let refused = mixed(&["net0", "net1"], &["net1"]);
    assert!(
        matches!(&refused, Err(TrackerError::ImpreciseBesidePrecise { device, .. }) if device == "net1"),
        "{:?}",
        refused.err()
    );
    for unnamed in [mixed(&[], &["net1"]), mixed(&["net0"], &[])] {
        assert!(matches!(unnamed, Err(TrackerError::DevicesNotNamed { .. })), "{:?}", unnamed.err());
    }
}

#[test]
fn c64_an_imprecise_source_that_comes_later_is_refused_too() {
    let log = Scripted::new("device-log");
    log.script().reports = Reports::Devices;
    let builder = Tracker::builder(layout()).mappings(VmMappings::default).allow_imprecise();
    let mut tracker = builder.source_of(SpaceId::IDENTITY, ["net0"], Box::new(log)).build().unwrap();
    let container = Box::new(Scripted::imprecise("container"));
    let refused = tracker.add_source(SpaceId::IDENTITY, ["net0"], container);
    assert!(matches!(refused, Err(TrackerError::ImpreciseBesidePrecise { .. })), "{refused:?}");
}

#[test]
fn c63_a_second_device_joins_a_source_and_leaves_it() {
    let reached = |device: &str| DeviceMappings { device: device.to_owned(), gpa: vec![pages(0, PAGES)] };
    let devices = Arc::new(Mutex::new(vec![reached("net0")]));
    let now = Arc::clone(&devices);
    let ram = vec![pages(0, PAGES)];
    let mappings = move || VmMappings {
        ram: ram.clone(),
        devices: now.lock().unwrap().clone(),
        ..VmMappings::default()
    };
    let container = Scripted::new("container");
    container.script().reports = Reports::Devices;
    let builder = Tracker::builder(layout()).mappings(mappings);
    let builder = builder.source_of(SpaceId::IDENTITY, ["net0"], Box::new(container));
    let mut tracker = builder.build().unwrap();
    tracker.begin(Start::Empty).unwrap();
    devices.lock().unwrap().push(reached("net1"));
    assert!(tracker.begin(Start::Empty).is_err(), "nobody speaks for it");
    tracker.add_device_to("container", "net1").unwrap();
    tracker.add_device_to("container", "net1").unwrap();
    tracker.begin(Start::Empty).unwrap();
    devices.lock().unwrap().remove(0);
    assert!(tracker.begin(Start::Empty).is_err(), "it speaks for one that is gone");
    tracker.remove_device_from("container", "net0").unwrap();
    tracker.begin(Start::Empty).unwrap();
    assert!(matches!(tracker.add_device_to("table", "net2"), Err(TrackerError::NoSuchSource { .. })));
    assert!(matches!(tracker.remove_device_from("table", "net2"), Err(TrackerError::NoSuchSource { .. })));
}

#[test]
fn c63_no_device_joins_a_source_that_sees_its_own_alone() {
    let log = Scripted::new("device-log:net0");
    log.script().reports = Reports::Devices;
    log.script().may_join = false;
    let builder = builder().source_of(SpaceId::IDENTITY, ["net0"], Box::new(log));
    let mut tracker = builder.build().unwrap();
    tracker.add_device_to("device-log:net0", "net0").unwrap();
    let refused = tracker.add_device_to("device-log:net0", "net1").unwrap_err();
    assert!(matches!(refused, TrackerError::CannotJoin { .. }), "{refused}");
    let unknown = tracker.remove_device_from("device-log:net0", "net1");
    assert!(matches!(unknown, Err(TrackerError::NoSuchDevice { .. })), "it has not joined: {unknown:?}");
}

#[test]
fn the_last_device_of_a_source_leaves_with_it() {
    let container = Scripted::new("container");
    container.script().reports = Reports::Devices;
    let builder = builder().source_of(SpaceId::IDENTITY, ["net0", "net1"], Box::new(container));
    let mut tracker = builder.build().unwrap();
    tracker.remove_device_from("container", "net1").unwrap();
    let refused = tracker.remove_device_from("container", "net0").unwrap_err();
    assert!(matches!(refused, TrackerError::LastDevice { .. }), "{refused}");
    tracker.remove_source("container").unwrap();
}

#[test]
fn c64_a_device_joins_no_imprecise_source_that_has_a_precise_one() {
    let mut tracker = mixed(&["net0"], &["net1"]).unwrap();
    let refused = tracker.add_device_to("container", "net1");
    assert!(matches!(refused, Err(TrackerError::ImpreciseBesidePrecise { .. })), "{refused:?}");
    tracker.add_device_to("container", "net2").unwrap();
}

#[test]
fn a_failure_ends_a_migration_where_that_was_asked_for_and_loses_nothing_either_way() {
    for on_failure in [OnFailure::Widen, OnFailure::Fail] {
        let source = Scripted::new("back-end");
        let builder = builder().on_failure(on_failure).source(Box::new(source.clone()));
        let mut tracker = builder.build().unwrap();
        let cursor = tracker.begin(Start::Copied).unwrap();
        source.fail_next(Operation::Collect);
        let failures = tracker.collect();
        assert_eq!(tracker.is_fatal(&failures[0]), on_failure == OnFailure::Fail);
        assert_eq!(drain(&mut tracker, cursor), everything());
    }
}

#[test]
fn a_disagreement_says_what_differs_in_one_sentence() {
    let error = Disagreement::Untracked { gpa: pages(1, 1) };
    assert_eq!(error.to_string(), "VM has RAM at 0x1000..0x2000 that is not tracked");
}
