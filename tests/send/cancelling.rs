// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A migration that is cancelled, in any phase.

use std::thread;
use std::time::{Duration, Instant};

use vfio_migration::transfer::limits::ConnectionCount;
use vfio_migration::transfer::{Phase, SendError, SendOptions, Sender};

use crate::frames::{ABANDON, COMPLETE, CONFIG, MEMORY, START, STATE};
use crate::peer::{Fault, Peer};
use crate::vm::FakeVm;
use crate::{assert_retry_loses_nothing, options};

#[test]
fn cancelling_in_any_phase_is_prompt() {
    let mut vm = FakeVm::new(5);
    let machine = vm.machine();
    for command in [START, CONFIG, MEMORY, STATE] {
        let peer = Peer::unix(Fault::Ignore(command));
        let sender = Sender::new(options(&peer));
        let migration = sender.handle();
        let (took, running) = thread::scope(|scope| {
            let sending =
                scope.spawn(|| (sender.send(&mut vm, &machine.tracker, &machine.devices), Instant::now()));
            peer.await_command(command);
            thread::sleep(Duration::from_millis(50));
            let asked = Instant::now();
            assert!(migration.cancel());
            let (outcome, returned) = sending.join().unwrap();
            assert!(matches!(outcome, Err(SendError::Cancelled)), "{outcome:?}");
            (returned - asked, command)
        });
        assert!(took < Duration::from_secs(1), "command {running}: {took:?}");
        assert!(vm.makes_progress());
        assert_eq!(migration.progress().phase, Phase::Abandoned);
        assert!(!migration.cancel(), "it is over");
    }
    assert_retry_loses_nothing(&mut vm, &machine);
}

#[test]
fn cancelling_a_healthy_migration_tells_the_receiver() {
    for connections in [1, 4] {
        let mut vm = FakeVm::new(5);
        let machine = vm.machine();
        let peer = Peer::tcp(connections, Fault::Slow(Duration::from_millis(20)));
        let connections = ConnectionCount::new(connections as u64).unwrap();
        let sender = Sender::new(options(&peer).connections(connections).unwrap());
        let migration = sender.handle();
        thread::scope(|scope| {
            let sending = scope.spawn(|| sender.send(&mut vm, &machine.tracker, &machine.devices));
            peer.await_command(MEMORY);
            assert!(migration.cancel());
            assert!(matches!(sending.join().unwrap(), Err(SendError::Cancelled)));
        });
        let (transcript, outcome) = peer.end();
        outcome.unwrap();
        assert_eq!(transcript.commands().last(), Some(&ABANDON));
        assert_retry_loses_nothing(&mut vm, &machine);
    }
}

#[test]
fn a_handle_cancelled_beforehand_touches_nothing() {
    let mut vm = FakeVm::new(0);
    let machine = vm.machine();
    let sender = Sender::new(SendOptions::new("unix:/nonexistent".parse().unwrap()));
    sender.handle().cancel();
    let outcome = sender.send(&mut vm, &machine.tracker, &machine.devices);
    assert!(matches!(outcome, Err(SendError::Cancelled)));
    assert!(vm.log.lock().unwrap().is_empty());
}

#[test]
fn a_migration_past_complete_cannot_be_cancelled() {
    let mut vm = FakeVm::new(5);
    let machine = vm.machine();
    let peer = Peer::unix(Fault::Ignore(COMPLETE));
    let sender = Sender::new(options(&peer));
    let migration = sender.handle();
    thread::scope(|scope| {
        let sending = scope.spawn(|| sender.send(&mut vm, &machine.tracker, &machine.devices));
        peer.await_command(COMPLETE);
        assert!(!migration.cancel());
        assert_eq!(migration.progress().phase, Phase::Completing);
        let error = sending.join().unwrap().unwrap_err();
        assert!(matches!(error, SendError::OutcomeUnknown { .. }), "{error}");
    });
    assert!(!vm.is_running(), "never two");
}
