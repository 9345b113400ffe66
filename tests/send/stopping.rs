// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Devices and a VM that are stopped, captured, and set going again.

use std::time::{Duration, Instant};

use vfio_migration::device::DeviceState;
use vfio_migration::transfer::{SendError, SourceVm};

use crate::frames::{ABANDON, COMPLETE, STATE};
use crate::peer::{Fault, Peer};
use crate::vm::{FakeVm, page_gpa};
use crate::{assert_retry_loses_nothing, log_of, send, with_device};

#[test]
fn a_device_that_is_gone_ends_the_migration_at_once_with_its_name() {
    for questions in [0, 1, 2, 4, 5, 6] {
        let mut vm = FakeVm::new(20);
        let machine = with_device(&vm, |io| io.gone_after = Some(questions));
        let peer = Peer::unix(Fault::None);
        let began = Instant::now();
        let error = send(&peer, &mut vm, &machine).unwrap_err();
        let mut causes =
            std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source());
        let named = causes.any(|cause| cause.to_string().contains("device \"net0\""));
        assert!(named, "after {questions} questions: {error}");
        assert_eq!(error.source_vm(), SourceVm::Stuck, "a device is missing: {error}");
        assert!(vm.makes_progress(), "vCPUs run on");
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
        assert_eq!(peer.end().0.commands().last(), Some(&ABANDON));
    }
}

#[test]
fn to_a_plain_receiver_devices_enter_no_pre_copy_and_hand_out_all_their_state_once_stopped() {
    let mut vm = FakeVm::new(5);
    let machine = with_device(&vm, |_| ());
    let peer = Peer::unix(Fault::None);
    let sent = send(&peer, &mut vm, &machine).unwrap();
    assert_eq!((sent.device_state_bytes, sent.device_precopy_bytes), (16, 0));
    let log = log_of(&vm.log);
    let expected = ["pause", "RUNNING_P2P", "STOP_COPY", "state"];
    assert_eq!(log[..4], expected, "{log:?}");
    let (transcript, _) = peer.end();
    let state = String::from_utf8(transcript.of(STATE)[0].payload.clone()).unwrap();
    assert!(state.contains("c2l4dGVlbiBieXRlcywgYQ=="), "the device's stream in base64: {state}");
}

#[test]
fn c03_what_a_device_writes_while_it_stops_arrives() {
    // C3: the last collect comes after vCPUs and devices have stopped.
    let mut vm = FakeVm::new(5);
    let memory = vm.memory.clone();
    let machine = with_device(&vm, |io| io.writes = Some((memory, 7)));
    let peer = Peer::unix(Fault::None);
    send(&peer, &mut vm, &machine).unwrap();
    let (transcript, _) = peer.end();
    assert_eq!(transcript.pages[&page_gpa(7)][..4], (DeviceState::StopCopy as u32).to_le_bytes());
    transcript.assert_equals(&vm);
}

#[test]
fn devices_run_again_before_the_vcpus_after_a_failure() {
    for command in [STATE, COMPLETE] {
        let mut vm = FakeVm::new(5);
        let machine = with_device(&vm, |_| ());
        let peer = Peer::unix(Fault::Refuse(command));
        send(&peer, &mut vm, &machine).unwrap_err();
        let log = log_of(&vm.log);
        let running = log.iter().rposition(|entry| entry == "RUNNING").expect("device runs again");
        assert_eq!(log[running + 1..], ["resume"], "{log:?}");
        assert_retry_loses_nothing(&mut vm, &machine);
    }
}

#[test]
fn a_device_that_does_not_stop_ends_the_migration_with_all_running() {
    for state in [DeviceState::RunningP2p, DeviceState::StopCopy] {
        let mut vm = FakeVm::new(5);
        let machine = with_device(&vm, |io| io.fail = Some(state));
        let peer = Peer::unix(Fault::None);
        let error = send(&peer, &mut vm, &machine).unwrap_err();
        assert!(matches!(error, SendError::Devices(_)), "{error}");
        assert!(vm.makes_progress());
        assert_eq!(peer.end().0.commands().last(), Some(&ABANDON));
        assert_retry_loses_nothing(&mut vm, &machine);
    }
}

#[test]
fn a_vm_that_cannot_be_captured_runs_on() {
    let mut vm = FakeVm::new(5);
    vm.fail_state = true;
    let machine = vm.machine();
    let peer = Peer::unix(Fault::None);
    let error = send(&peer, &mut vm, &machine).unwrap_err();
    assert_eq!(error.to_string(), "VM cannot tell its state");
    assert_eq!(peer.end().0.commands().last(), Some(&ABANDON));
    vm.fail_state = false;
    assert_retry_loses_nothing(&mut vm, &machine);
}
