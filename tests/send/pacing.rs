// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The limits of a migration: its timeout, its downtime, its rate limit, and what is done to keep them.

use std::time::{Duration, Instant};

use vfio_migration::precopy::{Blame, CancelReason, Forecast, TimeoutStrategy};
use vfio_migration::transfer::limits::{ConnectionCount, PeerLimits};
use vfio_migration::transfer::{SendError, Sender, SourceVm};

use crate::frames::STATE;
use crate::peer::{Fault, Peer};
use crate::streams::{Vmm, loaded, moves, pattern, source, takers};
use crate::vm::{FakeVm, Machine, PAGES, Report, ScriptedSource};
use crate::{assert_retry_loses_nothing, log_of, options, send, with_device};

#[test]
fn a_migration_that_does_not_converge_is_given_up_in_time() {
    let mut vm = FakeVm::new(2000);
    let machine = vm.machine();
    let peer = Peer::unix(Fault::Slow(Duration::from_millis(10)));
    let options = options(&peer).downtime(Duration::from_millis(1)).timeout(Duration::from_secs(1));
    let began = Instant::now();
    let error = Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices).unwrap_err();
    assert!(matches!(error, SendError::GivenUp(CancelReason::TimedOut { timeout_ms: 1000, .. })), "{error}");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert!(!vm.log.lock().unwrap().contains(&"pause".to_owned()), "it was never stopped");
    assert_retry_loses_nothing(&mut vm, &machine);
}

#[test]
fn a_migration_told_to_ignore_the_timeout_switches_over() {
    let mut vm = FakeVm::new(2000);
    let machine = vm.machine();
    let peer = Peer::unix(Fault::Slow(Duration::from_millis(10)));
    let options = options(&peer)
        .downtime(Duration::from_millis(1))
        .timeout(Duration::from_secs(1))
        .timeout_strategy(TimeoutStrategy::Ignore);
    let sent = Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices).unwrap();
    assert!(sent.total >= Duration::from_secs(1) && sent.downtime > Duration::from_millis(1));
    peer.end().0.assert_equals(&vm);
}

/// Sends to a receiver that holds the stopped VM up as `fault` says, and checks that it gets its time and no more.
fn assert_a_held_switchover_is_given_up(fault: Fault, connections: u64) {
    let mut vm = FakeVm::new(0);
    let source = ScriptedSource::new(&vm.log, [Report::Pages(0..1), Report::Pages(0..8)]);
    let machine = Machine::from(vm.builder().source(Box::new(source)).build().unwrap());
    let peer = Peer::tcp(connections as usize, fault);
    let options = options(&peer)
        .connections(ConnectionCount::new(connections).unwrap())
        .unwrap()
        .downtime(Duration::from_millis(100))
        .limits(PeerLimits { switchover_timeout: Duration::from_millis(300), ..PeerLimits::default() });
    let began = Instant::now();
    let error = Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices).unwrap_err();
    // Four downtime limits are longer than the timeout.
    assert!(matches!(error, SendError::SwitchoverTimedOut { limit_ms: 400 }), "{fault:?}: {error:?}");
    assert_eq!(error.source_vm(), SourceVm::AsBefore);
    assert!(began.elapsed() < Duration::from_millis(1900), "{fault:?}: {:?}", began.elapsed());
    let log = log_of(&vm.log);
    assert_eq!(log.last().map(String::as_str), Some("resume"), "{log:?}");
    assert_retry_loses_nothing(&mut vm, &machine);
}

#[test]
fn a_receiver_that_holds_the_stopped_vm_up_has_its_time_and_no_more() {
    for connections in [1, 4] {
        assert_a_held_switchover_is_given_up(Fault::Ignore(STATE), connections);
        assert_a_held_switchover_is_given_up(Fault::IgnoreSecondPass, connections);
    }
}

#[test]
fn the_bandwidth_cap_holds_while_the_vm_runs() {
    let mut vm = FakeVm::new(0);
    let machine = vm.machine();
    let peer = Peer::unix(Fault::None);
    let options = options(&peer).rate_limit(Some(12 << 20)).unwrap();
    let sent = Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices).unwrap();
    // 6 MiB at 12 MiB/s, the last chunk of a twentieth of a second not waited for.
    assert!(sent.total >= Duration::from_millis(440), "{:?}", sent.total);
    peer.end().0.assert_equals(&vm);
}

#[test]
fn the_bandwidth_cap_holds_for_memory_and_devices_together_and_neither_waits_for_the_other() {
    const MIB: u64 = 1 << 20;
    for connections in [1, 4] {
        // Half of each state comes in PRE_COPY.
        let states = [pattern(8 << 20, 1), pattern(4 << 20, 2)];
        let mut vm = FakeVm::new(0);
        let machine = source(&vm, &states.each_ref().map(Vec::as_slice), |_, _| ());
        let (takers, devices) = takers(2);
        let mut vmm = Vmm::new(devices);
        takers.iter().for_each(|taker| taker.look().arrivals = vmm.arrivals.clone());
        let (sent, received) = moves(&mut vm, &machine, &mut vmm, |options| {
            let options = options.connections(ConnectionCount::new(connections).unwrap()).unwrap();
            options.rate_limit(Some(12 * MIB)).unwrap().downtime(Duration::from_secs(10))
        });
        let sent = sent.unwrap();
        received.unwrap();
        vmm.assert_equals(&vm);
        assert!(takers.iter().zip(&states).all(|(taker, state)| loaded(taker).as_ref() == Some(state)));
        let bytes = sent.progress.ram_bytes + sent.device_precopy_bytes;
        assert!(bytes >= 12 * MIB, "{bytes}");
        // 12 MiB at 12 MiB/s, the last piece and the last chunk of a twentieth of a second not waited for.
        let running = sent.total - sent.downtime;
        assert!(running >= Duration::from_millis(890), "{connections} connections: {running:?}");
        let arrivals = log_of(&vmm.arrivals);
        let pieces = arrivals.iter().enumerate().filter(|(_, what)| *what == "state");
        let (fourth, _) = pieces.clone().nth(3).unwrap();
        let before = arrivals[..fourth].iter().filter(|what| *what == "memory").count();
        let chunks = arrivals.len() - pieces.count();
        assert!((1..chunks * 9 / 10).contains(&before), "{before} of {chunks} before the fourth piece");
    }
}

#[test]
fn a_switchover_that_turns_out_too_long_is_taken_back() {
    // C38: little is dirty while the VM runs, and everything when it has stopped.
    let mut vm = FakeVm::new(0);
    let source = ScriptedSource::new(&vm.log, [Report::Pages(0..1), Report::Pages(0..PAGES)]);
    let machine = Machine::from(vm.builder().source(Box::new(source)).build().unwrap());
    let peer = Peer::unix(Fault::Slow(Duration::from_millis(10)));
    let options = options(&peer).downtime(Duration::from_millis(60));
    let sent = Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices).unwrap();
    assert_eq!(sent.progress.seen.back_outs, 1);
    let log = log_of(&vm.log);
    assert_eq!(log, ["source on", "pause", "resume", "pause", "state", "source off"]);
    peer.end().0.assert_equals(&vm);
}

#[test]
fn a_device_state_beyond_the_limit_is_refused_early_or_sent_with_a_remark() {
    let heavy = |vm: &FakeVm| with_device(vm, |io| io.size = Some(64 << 20));
    let mut vm = FakeVm::new(5);
    let began = Instant::now();
    let machine = heavy(&vm);
    let error = send(&Peer::unix(Fault::None), &mut vm, &machine).unwrap_err();
    assert!(matches!(error, SendError::GivenUp(CancelReason::DeviceStateTooLong { .. })), "{error}");
    assert!(began.elapsed() < Duration::from_secs(5) && vm.makes_progress(), "{:?}", began.elapsed());

    let peer = Peer::unix(Fault::Slow(Duration::from_millis(2)));
    let options = options(&peer)
        .downtime(Duration::from_millis(1))
        .timeout_strategy(TimeoutStrategy::Ignore)
        .max_rounds(Some(8));
    let sent = Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices).unwrap();
    assert!(sent.downtime_exceeded, "{:?}", sent.downtime);
    assert!(
        matches!(sent.progress.forecast, Forecast::Stuck(Blame::DeviceState { .. })),
        "{}",
        sent.progress.forecast
    );
    peer.end().0.assert_equals(&vm);
}

#[test]
fn vcpus_that_write_too_fast_are_slowed_down_and_get_their_time_back() {
    let mut vm = FakeVm::new(2000);
    vm.can_throttle = true;
    let machine = vm.machine();
    let peer = Peer::unix(Fault::Slow(Duration::from_millis(10)));
    let options = options(&peer).downtime(Duration::from_millis(1)).max_rounds(Some(4)).throttle(true);
    let error = Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices).unwrap_err();
    assert!(matches!(error, SendError::GivenUp(CancelReason::OutOfRounds { max_rounds: 4, .. })), "{error}");
    assert_eq!(log_of(&vm.log), ["throttle 20", "throttle 30", "throttle 0"]);
}
