// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

use super::*;
use crate::device::DeviceState;
use crate::device::tests::{ALL, Effect, World, fail_at_next_call, script, set, states};

/// The traits over these sources and one device.
fn with_a_device(sources: &[&Scripted]) -> (MigratableDevice, Arc<Mutex<World>>) {
    let (devices, world) = set(vec![script(ALL)]);
    let vm = MigratableDevice::new("vm", Arc::new(Mutex::new(with(sources))), Arc::new(Mutex::new(devices)));
    (vm, world)
}

#[test]
fn a_log_that_cannot_be_switched_off_fails_no_migration_that_is_over() {
    for stop_first in [true, false] {
        let kvm = Scripted::new("kvm");
        let (mut vm, world) = with_a_device(&[&kvm]);
        vm.start_migration().unwrap();
        vm.start_dirty_log().unwrap();
        vm.pause().unwrap();
        dirty_pages(&mut vm);
        vm.snapshot().unwrap();
        dirty_pages(&mut vm);
        kvm.fail_next(Operation::Stop);
        if stop_first {
            vm.stop_dirty_log().unwrap();
        }
        vm.complete_migration().unwrap();
        assert_eq!(states(&world), [DeviceState::Stop], "retired all the same");
        assert!(vm.dirty_log().is_err(), "the log is off");
    }
}

#[test]
fn c46_a_device_whose_state_nobody_reads_early_is_not_moved_to_pre_copy() {
    let (mut vm, world) = with_a_device(&[]);
    vm.start_migration().unwrap();
    assert_eq!(states(&world), [DeviceState::Running]);
    vm.pause().unwrap();
    vm.snapshot().unwrap();
    vm.complete_migration().unwrap();
    assert!(
        world
            .lock()
            .unwrap()
            .log
            .iter()
            .all(|(_, state)| !matches!(state, DeviceState::PreCopy | DeviceState::PreCopyP2p))
    );
}

#[test]
fn a_device_that_cannot_end_its_session_fails_no_migration_that_is_over() {
    let (mut vm, world) = with_a_device(&[]);
    vm.start_migration().unwrap();
    vm.pause().unwrap();
    vm.snapshot().unwrap();
    fail_at_next_call(&world, Effect::Fails);
    vm.complete_migration().unwrap();
    assert!(vm.complete_migration().is_err(), "it is over");
}

#[test]
fn a_log_that_cannot_be_switched_off_keeps_no_device_in_a_migration_given_up() {
    let kvm = Scripted::new("kvm");
    let (mut vm, world) = with_a_device(&[&kvm]);
    vm.start_migration().unwrap();
    vm.start_dirty_log().unwrap();
    // The VMM's own code may have moved it.
    lock(&vm.devices).start_precopy().unwrap();
    kvm.fail_next(Operation::Stop);
    vm.stop_dirty_log().unwrap();
    assert_eq!(states(&world), [DeviceState::Running]);
    vm.start_dirty_log().unwrap();
    kvm.fail_next(Operation::Stop);
    vm.start_dirty_log().unwrap();
}

#[test]
fn devices_that_run_after_a_resume_that_failed_are_stopped_by_the_next_pause() {
    let container = Scripted::imprecise("container");
    let (vm, world) = with_a_device(&[&container]);
    let mut vm = vm.with_stops_told_by(StopsToldBy::Pause);
    vm.start_dirty_log().unwrap();
    vm.pause().unwrap();
    dirty_pages(&mut vm);
    fail_at_next_call(&world, Effect::Breaks);
    vm.resume().unwrap_err();
    assert_eq!(states(&world), [DeviceState::Running], "after a reset");
    container.write(5);
    vm.pause().unwrap();
    assert_eq!(states(&world), [DeviceState::Stop]);
    assert_eq!(dirty_pages(&mut vm), 1, "what it wrote meanwhile");
}
