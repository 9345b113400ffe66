// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Streams that begin in the middle of something, or whose migration ends in doubt: no state is cut.

use std::thread;
use std::time::Duration;

use vfio_migration::device::Device;
use vfio_migration::device::saved::SavedState;
use vfio_migration::transfer::limits::PeerLimits;
use vfio_migration::transfer::{SendError, SourceVm};
use vfio_migration::vm::Vm;

use crate::streams::{MIB, Vmm, loaded, moves, pattern, source, takers};
use crate::vm::{FakeDevice, FakeVm};

const DOWNTIME: Duration = Duration::from_secs(10);

#[test]
fn after_an_outcome_in_doubt_the_states_are_read_anew_for_a_save_and_for_a_plain_receiver() {
    for saves in [true, false] {
        let mut vm = FakeVm::new(0);
        let state = pattern(MIB, 1);
        let machine = source(&vm, &[&state], |_, _| ());
        let (_takers, devices) = takers(1);
        let mut vmm = Vmm::new(devices);
        vmm.completing = Duration::from_millis(600);
        let (sent, _received) = moves(&mut vm, &machine, &mut vmm, |options| {
            let limits = PeerLimits { complete_timeout: Duration::from_millis(100), ..PeerLimits::default() };
            options.limits(limits).downtime(DOWNTIME)
        });
        let error = sent.unwrap_err();
        assert!(matches!(error, SendError::OutcomeUnknown { .. }), "{error}");
        assert_eq!(error.source_vm(), SourceVm::PausedForSafety);
        if saves {
            let tree = machine.devices.lock().unwrap().save().unwrap();
            let saved = SavedState::from_snapshot(&tree.snapshots["dev0"]).unwrap();
            assert!(saved.stream == state, "the whole state, {} bytes", saved.stream.len());
        }
        machine.devices.lock().unwrap().run().unwrap();
        vm.resume().unwrap();
        let (takers, devices) = takers(1);
        let mut vmm = Vmm::new(devices);
        vmm.streams = false;
        let (sent, received) = moves(&mut vm, &machine, &mut vmm, |options| options.downtime(DOWNTIME));
        sent.unwrap();
        received.unwrap();
        assert!(loaded(&takers[0]).as_ref() == Some(&state));
    }
}

#[test]
fn a_stream_of_a_device_that_was_read_before_it_began_has_all_of_the_state() {
    let mut vm = FakeVm::new(0);
    let state = pattern(MIB, 1);
    let machine = source(&vm, &[&state], |_, _| ());
    {
        let mut devices = machine.devices.lock().unwrap();
        devices.start_precopy().unwrap();
        assert!(devices.precopy_step(u64::MAX).unwrap().bytes > 0);
    }
    let (takers, devices) = takers(1);
    let mut vmm = Vmm::new(devices);
    let (sent, received) = moves(&mut vm, &machine, &mut vmm, |options| options.downtime(DOWNTIME));
    sent.unwrap();
    assert_eq!(received.unwrap().device_bytes, MIB as u64);
    assert!(loaded(&takers[0]).as_ref() == Some(&state));
}

#[test]
fn a_device_that_never_tells_what_precopy_has_left_keeps_no_other_one_from_streaming() {
    let mut vm = FakeVm::new(0);
    let states = [pattern(MIB, 1), pattern(MIB, 2), pattern(MIB, 3)];
    let machine = source(&vm, &states.each_ref().map(Vec::as_slice), |index, io| io.fail_info = index == 1);
    let (takers, devices) = takers(3);
    let mut vmm = Vmm::new(devices);
    let (sent, received) = moves(&mut vm, &machine, &mut vmm, |options| {
        options.downtime(DOWNTIME).timeout(Duration::from_secs(5))
    });
    let sent = sent.unwrap();
    received.unwrap();
    assert!(sent.device_precopy_bytes >= MIB as u64, "{}", sent.device_precopy_bytes);
    for (taker, state) in takers.iter().zip(&states) {
        assert!(loaded(taker).as_ref() == Some(state));
    }
}

#[test]
fn a_device_unplugged_and_plugged_in_again_while_it_streams_arrives_as_it_is_then() {
    let mut vm = FakeVm::new(0);
    let states = [pattern(MIB, 1), pattern(MIB, 2)];
    let machine = source(&vm, &states.each_ref().map(Vec::as_slice), |_, _| ());
    let (takers, devices) = takers(2);
    let mut vmm = Vmm::new(devices);
    let new = pattern(MIB / 2, 3);
    let mut io = FakeDevice::new(&vm.log, &new);
    io.size = Some(new.len() as u64);
    let device = Device::new("dev0", Box::new(io)).kind("fake");
    let (sent, received) = thread::scope(|scope| {
        let moving = scope.spawn(|| {
            moves(&mut vm, &machine, &mut vmm, |options| {
                options.downtime(DOWNTIME).rate_limit(Some(4 << 20)).unwrap()
            })
        });
        while takers[0].look().written.is_empty() {
            assert!(!moving.is_finished(), "it ended before the device's state came");
            thread::sleep(Duration::from_millis(1));
        }
        let mut devices = machine.devices.lock().unwrap();
        drop(devices.remove("dev0").unwrap());
        devices.add(device).unwrap();
        drop(devices);
        moving.join().unwrap()
    });
    sent.unwrap();
    assert_eq!(received.unwrap().device_bytes, MIB as u64, "of the other one");
    assert!(loaded(&takers[0]).as_ref() == Some(&new));
    assert!(loaded(&takers[1]).as_ref() == Some(&states[1]));
    assert_eq!(takers[0].look().resets, 1);
}
