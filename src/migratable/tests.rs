// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

#[cfg(feature = "device-state")]
mod devices;

use super::*;
use crate::source::Operation;
use crate::tracker::SpaceId;
use crate::tracker::tests::{PAGES, Scripted, with};

/// The traits over these sources, and no device.
fn over(sources: &[&Scripted]) -> MigratableDevice {
    MigratableDevice::new("vm", Arc::new(Mutex::new(with(sources))), Arc::default())
}

fn dirty_pages(vm: &mut MigratableDevice) -> u64 {
    vm.dirty_log().unwrap().effective_size() >> 12
}

fn text(error: &MigratableError) -> String {
    crate::error::Chain(error).to_string()
}

#[test]
fn c23_the_traits_session_commits_a_table_only_by_the_next_call() {
    let kvm = Scripted::new("kvm");
    let mut vm = over(&[&kvm]);
    vm.start_dirty_log().unwrap();
    kvm.write(4);
    let table = vm.dirty_log().unwrap();
    assert_eq!((table.regions()[0].gpa, table.effective_size()), (4 << 12, 1 << 12));
    kvm.fail_next(Operation::BeforeRead);
    kvm.write(5);
    assert!(vm.dirty_log().is_err());
    kvm.write(6);
    assert_eq!(vm.dirty_log().unwrap().effective_size(), 2 << 12, "what failed is in the next table");
    vm.stop_dirty_log().unwrap();
    assert!(vm.dirty_log().is_err());
}

#[test]
fn a_table_handed_back_is_in_the_next_one_once_with_what_was_written_meanwhile() {
    let (kvm, device) = (Scripted::new("kvm"), Scripted::new("device"));
    let mut vm = over(&[&kvm, &device]);
    vm.start_dirty_log().unwrap();
    kvm.write(4);
    kvm.write(5);
    device.write(5);
    assert_eq!(dirty_pages(&mut vm), 2);
    vm.hand_back().unwrap();
    kvm.write(5);
    device.write(6);
    let table = vm.dirty_log().unwrap();
    assert_eq!((table.regions()[0].gpa, table.effective_size()), (4 << 12, 3 << 12));
    assert_eq!(table.regions().len(), 1);
    assert_eq!(dirty_pages(&mut vm), 0, "and counts as received then");
}

#[test]
fn a_table_is_handed_back_once_and_only_before_the_next_call() {
    let kvm = Scripted::new("kvm");
    let mut vm = over(&[&kvm]);
    assert!(matches!(vm.hand_back(), Err(MigratableDeviceError::NotLogging)));
    vm.start_dirty_log().unwrap();
    assert!(matches!(vm.hand_back(), Err(MigratableDeviceError::NoTable)), "none was given");
    assert_eq!(dirty_pages(&mut vm), 0);
    vm.hand_back().unwrap();
    assert!(matches!(vm.hand_back(), Err(MigratableDeviceError::NoTable)), "it was handed back");
    kvm.write(7);
    assert_eq!(dirty_pages(&mut vm), 1);
    kvm.fail_next(Operation::BeforeRead);
    kvm.write(8);
    vm.dirty_log().unwrap_err();
    assert!(matches!(vm.hand_back(), Err(MigratableDeviceError::NoTable)), "it counts as received");
    assert_eq!(dirty_pages(&mut vm), 1, "page 8");
    vm.stop_dirty_log().unwrap();
    assert!(matches!(vm.hand_back(), Err(MigratableDeviceError::NotLogging)));
}

#[test]
fn an_imprecise_source_is_refused_until_it_is_said_how_the_devices_stop_is_told() {
    let container = Scripted::imprecise("container");
    let mut vm = over(&[&container]);
    let refused = text(&vm.start_dirty_log().unwrap_err());
    assert!(refused.contains("Dirty source container is imprecise"), "{refused}");
    vm.devices_stopped();
    vm.start_dirty_log().unwrap();
    vm.stop_dirty_log().unwrap();
    vm.devices_run();
    assert!(vm.start_dirty_log().is_err(), "they run again");
    vm = vm.with_stops_told_by(StopsToldBy::Call);
    vm.start_dirty_log().unwrap();
}

#[test]
fn an_imprecise_source_added_while_the_log_runs_is_refused_at_the_next_table() {
    let (kvm, container) = (Scripted::new("kvm"), Scripted::imprecise("container"));
    let mut vm = over(&[&kvm]);
    vm.start_dirty_log().unwrap();
    let added = lock(vm.tracker()).add_source(SpaceId::IDENTITY, ["card"], Box::new(container.clone()));
    added.unwrap();
    kvm.write(4);
    let refused = text(&vm.dirty_log().unwrap_err());
    assert!(refused.contains("Dirty source container is imprecise"), "{refused}");
    container.write(5);
    vm.devices_stopped();
    assert_eq!(dirty_pages(&mut vm), 2, "the stop is told, and nothing was lost");
    vm.devices_run();
    assert!(vm.dirty_log().is_err(), "they run again");
    vm = vm.with_stops_told_by(StopsToldBy::Call);
    assert_eq!(dirty_pages(&mut vm), 0);
}

#[test]
fn what_an_imprecise_source_covers_is_in_the_first_table_after_the_stop_and_in_no_other() {
    let container = Scripted::imprecise("container");
    for told in [StopsToldBy::Pause, StopsToldBy::Call] {
        let mut vm = over(&[&container]).with_stops_told_by(told);
        vm.start_dirty_log().unwrap();
        for stop in 0..2 {
            (0..PAGES).for_each(|page| container.write(page));
            assert_eq!(dirty_pages(&mut vm), 0, "devices run");
            match told {
                StopsToldBy::Pause => vm.pause().unwrap(),
                StopsToldBy::Call => vm.devices_stopped(),
            }
            assert_eq!(dirty_pages(&mut vm), PAGES, "stop {stop}");
            (0..PAGES).for_each(|page| container.write(page));
            assert_eq!(dirty_pages(&mut vm), 0, "they were told of");
            vm.resume().unwrap();
        }
    }
}

#[test]
fn a_paused_vm_hands_its_imprecise_sources_over_in_the_first_table() {
    let container = Scripted::imprecise("container");
    let mut vm = over(&[&container]);
    vm.devices_stopped();
    vm.start_migration().unwrap();
    vm.start_dirty_log().unwrap();
    (0..PAGES).for_each(|page| container.write(page));
    assert_eq!((dirty_pages(&mut vm), dirty_pages(&mut vm)), (PAGES, 0));
    vm.complete_migration().unwrap();
}

#[test]
fn a_migration_completes_only_when_a_table_since_the_stop_had_all_pages() {
    let (kvm, container) = (Scripted::new("kvm"), Scripted::imprecise("container"));
    let mut vm = over(&[&kvm, &container]).with_stops_told_by(StopsToldBy::Pause);
    let owes = |vm: &mut MigratableDevice| {
        let asked = vm.check_all_sent().unwrap_err();
        assert!(matches!(asked, MigratableDeviceError::PagesOwed), "{asked}");
        let refused = text(&vm.complete_migration().unwrap_err());
        assert!(refused.contains("Pages are owed to the destination"), "{refused}");
    };
    vm.start_migration().unwrap();
    vm.start_dirty_log().unwrap();
    dirty_pages(&mut vm);
    container.write(3);
    vm.pause().unwrap();
    owes(&mut vm);
    assert_eq!(dirty_pages(&mut vm), 1);
    vm.hand_back().unwrap();
    owes(&mut vm);
    assert_eq!(dirty_pages(&mut vm), 1, "and nothing has changed");
    vm.check_all_sent().unwrap();
    vm.complete_migration().unwrap();
}

#[test]
fn a_log_that_was_stopped_before_keeps_no_migration_from_completing() {
    let mut vm = over(&[&Scripted::new("kvm")]);
    vm.start_migration().unwrap();
    vm.start_dirty_log().unwrap();
    vm.pause().unwrap();
    vm.stop_dirty_log().unwrap();
    vm.complete_migration().unwrap();
}

#[test]
fn calls_that_make_no_sense_are_errors_that_say_so() {
    let mut vm = over(&[]);
    assert!(text(&vm.dirty_log().unwrap_err()).ends_with("Dirty log is not running"));
    assert!(text(&vm.complete_migration().unwrap_err()).ends_with("No migration was started"));
    vm.start_migration().unwrap();
    assert!(text(&vm.complete_migration().unwrap_err()).contains("Devices still run"));
    vm.pause().unwrap();
    vm.complete_migration().unwrap();
    assert!(vm.complete_migration().is_err(), "once is enough");
}

#[test]
fn a_tracker_that_panicked_hands_out_no_more_tables() {
    let mut vm = over(&[]);
    vm.start_dirty_log().unwrap();
    let tracker = Arc::clone(vm.tracker());
    let _panic = std::thread::spawn(move || {
        let _held = tracker.lock().unwrap();
        panic!("a thread dies in the middle of a collect");
    })
    .join();
    assert!(text(&vm.dirty_log().unwrap_err()).contains("cut short by a panic"));
    vm.stop_dirty_log().unwrap();
}
