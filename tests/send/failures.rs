// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Receivers that go away, refuse or say what was not asked: the VM runs on, and a second attempt brings everything.

use vfio_migration::transfer::limits::ConnectionCount;
use vfio_migration::transfer::{PeerError, Phase, SendError, SendStep, Sender, SourceVm};

use crate::frames::{COMPLETE, CONFIG, MEMORY, START, STATE};
use crate::peer::{Fault, Peer};
use crate::vm::FakeVm;
use crate::{assert_retry_loses_nothing, options, send};

#[test]
fn a_receiver_that_goes_away_at_any_request_costs_nothing() {
    // C23: what one receiver acknowledged counts for nothing with the next.
    let mut vm = FakeVm::new(5);
    let machine = vm.machine();
    let mut outcomes = Vec::new();
    for request in 0.. {
        let peer = Peer::unix(Fault::CloseAtRequest(request));
        let sender = Sender::new(options(&peer).chunk_bytes(1 << 20).unwrap());
        let migration = sender.handle();
        let outcome = sender.send(&mut vm, &machine.tracker, &machine.devices);
        let (transcript, _) = peer.end();
        match outcome {
            Ok(_) => {
                // This VM may have needed fewer rounds than the one before.
                assert!(transcript.seen.len() <= request);
                break;
            }
            Err(error @ SendError::OutcomeUnknown { .. }) => {
                assert_eq!(transcript.commands().last(), Some(&COMPLETE));
                assert_eq!(error.source_vm(), SourceVm::PausedForSafety);
                assert!(!vm.is_running(), "never two");
                assert_eq!(migration.progress().phase, Phase::OutcomeUnknown);
                vfio_migration::vm::Vm::resume(&mut vm).unwrap();
            }
            Err(error @ SendError::Peer { .. }) => {
                assert_eq!(error.source_vm(), SourceVm::AsBefore);
                assert!(vm.makes_progress(), "{error}");
                assert_eq!(migration.progress().phase, Phase::Abandoned);
                assert_ne!(transcript.commands().last(), Some(&COMPLETE));
                outcomes.push(error);
            }
            Err(other) => panic!("{other}"),
        }
        if request % 4 == 0 {
            assert_retry_loses_nothing(&mut vm, &machine);
            vfio_migration::vm::Vm::resume(&mut vm).unwrap();
        }
    }
    assert!(outcomes.len() >= 8, "each kind of request was met");
}

#[test]
fn a_receiver_that_goes_away_in_mid_page_costs_nothing() {
    let mut vm = FakeVm::new(5);
    let machine = vm.machine();
    for bytes in [17, 100, 5000, 1_000_003, 5_000_000, 6_000_001] {
        for connections in [1, 4] {
            let peer = Peer::tcp(connections, Fault::CloseAfterBytes(bytes));
            let options =
                options(&peer).connections(ConnectionCount::new(connections as u64).unwrap()).unwrap();
            let error = Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices).unwrap_err();
            assert!(matches!(error, SendError::Peer { .. }), "{bytes} bytes: {error}");
            assert!(vm.makes_progress());
        }
    }
    assert_retry_loses_nothing(&mut vm, &machine);
}

#[test]
fn a_refusal_at_any_command_lets_the_vm_run_on() {
    let mut vm = FakeVm::new(5);
    let machine = vm.machine();
    let steps = [
        (START, SendStep::Start),
        (CONFIG, SendStep::Config),
        (MEMORY, SendStep::Memory),
        (STATE, SendStep::State),
        (COMPLETE, SendStep::Complete),
    ];
    for (command, expected) in steps {
        let peer = Peer::unix(Fault::Refuse(command));
        let error = send(&peer, &mut vm, &machine).unwrap_err();
        assert!(matches!(error, SendError::Peer { step, .. } if step == expected), "{error}");
        assert!(vm.makes_progress());
    }
    assert_retry_loses_nothing(&mut vm, &machine);
}

#[test]
fn answers_to_what_was_not_asked_acknowledge_nothing() {
    let mut vm = FakeVm::new(5);
    let machine = vm.machine();
    for connections in [1, 4] {
        for command in [START, CONFIG, MEMORY, STATE] {
            let peer = Peer::tcp(connections, Fault::AnswerTwice(command));
            let options =
                options(&peer).connections(ConnectionCount::new(connections as u64).unwrap()).unwrap();
            let error = Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices).unwrap_err();
            assert!(
                matches!(error, SendError::Peer { source: PeerError::Unasked, .. }),
                "{command} twice on {connections} connections: {error:?}"
            );
            assert!(vm.makes_progress());
            peer.look(|transcript| assert!(!transcript.commands().contains(&COMPLETE)));
        }
    }
    assert_retry_loses_nothing(&mut vm, &machine);
}
