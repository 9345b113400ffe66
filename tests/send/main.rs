// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The sender against a receiver that is not ours: what goes over the wire, and what is left when it breaks off.

#![expect(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests, on a 64-bit host")]

#[path = "../transfer/bare_tls.rs"]
#[expect(dead_code, reason = "the source is ours")]
mod bare_tls;
mod both_ends;
#[path = "../transfer/certificates.rs"]
#[expect(dead_code, reason = "certificates that fail are for the tests of TLS")]
mod certificates;
mod devices;
mod logs;
mod peer;
mod plugging;
mod polled;
mod replugging;
#[path = "../../integration/src/skip.rs"]
#[expect(dead_code, unreachable_pub, reason = "other crates' tests use the rest")]
mod skip;
mod skipping;
mod spreading;
mod userfault;
mod vm;

use std::thread;
use std::time::{Duration, Instant};

use peer::{ABANDON, COMPLETE, COMPLETE_PAUSED, CONFIG, Fault, MEMORY, Peer, START, STATE, Seen};
use vfio_migration::device::{Device, DeviceState};
use vfio_migration::precopy::{Blame, CancelReason, Forecast, TimeoutStrategy};
use vfio_migration::transfer::limits::ConnectionCount;
use vfio_migration::transfer::{
    Migration, PeerError, Phase, SendError, SendOptions, SendOptionsError, SendStep, Sender, Sent, SourceVm,
};
use vm::{FakeDevice, FakeVm, Log, Machine, PAGE, PAGES, Report, ScriptedSource, note, page_gpa};

fn options(peer: &Peer) -> SendOptions {
    let mut options = SendOptions::new(peer.url.clone());
    options.chunk_bytes = 256 << 10;
    options
}

fn send(peer: &Peer, vm: &mut FakeVm, machine: &Machine) -> Result<Sent, SendError> {
    Sender::new(options(peer)).send(vm, &machine.tracker, &machine.devices, &Migration::new())
}

/// A second attempt, to a fresh receiver, that has to bring everything.
fn assert_retry_loses_nothing(vm: &mut FakeVm, machine: &Machine) {
    assert!(vm.is_running(), "VM runs on after a failure");
    let peer = Peer::unix(Fault::None);
    send(&peer, vm, machine).unwrap();
    let (transcript, outcome) = peer.end();
    outcome.unwrap();
    transcript.assert_equals(vm);
}

/// Splits what one connection brought into passes, each ascending.
fn passes(memory: &[&Seen]) -> Vec<Vec<(u64, u64)>> {
    let mut passes: Vec<Vec<(u64, u64)>> = Vec::new();
    for seen in memory {
        let last = passes.last().and_then(|pass| pass.last().copied());
        if last.is_none_or(|(gpa, length)| seen.table[0].0 < gpa + length) {
            passes.push(Vec::new());
        }
        passes.last_mut().unwrap().extend(&seen.table);
    }
    passes
}

#[test]
fn c04_a_quiet_vm_is_sent_byte_for_byte_with_what_its_capture_wrote() {
    let mut vm = FakeVm::new(0);
    let machine = vm.machine();
    let peer = Peer::unix(Fault::None);
    let mut options = options(&peer);
    options.chunk_bytes = 64 << 20;
    let sent =
        Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices, &Migration::new()).unwrap();
    let (transcript, outcome) = peer.end();
    outcome.unwrap();

    let message = |command: u16, payload: &[u8]| {
        let mut bytes = vec![0; 16];
        bytes[..2].copy_from_slice(&command.to_le_bytes());
        bytes[8..].copy_from_slice(&(payload.len() as u64).to_le_bytes());
        [&bytes, payload].concat()
    };
    let memory = |ranges: &[(u64, u64)], pages: std::ops::Range<u64>| {
        let table =
            ranges.iter().flat_map(|(gpa, length)| [gpa.to_le_bytes(), length.to_le_bytes()].concat());
        let bytes: Vec<u8> = pages.flat_map(|page| vm.page(page)).collect();
        [message(MEMORY, &table.collect::<Vec<_>>()), bytes].concat()
    };
    // C4: page 3 is written while the state is captured, after it went over for the first time.
    let mut first = memory(&[vm::LOW, vm::HIGH], 0..PAGES);
    let page_3 = 16 + 32 + 3 * PAGE as usize;
    first[page_3..page_3 + 8].copy_from_slice(&(3u64 ^ 0x5eed).to_le_bytes());
    let expected = [
        message(START, &[]),
        message(CONFIG, br#"{"vm_config":{"memory":{}}}"#),
        first,
        memory(&[(3 * PAGE, PAGE)], 3..4),
        message(STATE, &transcript.of(STATE)[0].payload),
        message(COMPLETE, &[]),
    ];
    assert!(transcript.raw == expected.concat(), "the recorded exchange is not the one described");
    assert_eq!(sent.bytes_sent, transcript.raw.len() as u64);
    assert_eq!(sent.device_state_bytes, 0);
    let state: serde_json::Value = serde_json::from_slice(&transcript.of(STATE)[0].payload).unwrap();
    assert!(state["snapshots"]["devices"].is_object(), "{state}");
}

#[test]
fn the_tracker_is_free_while_the_receiver_thinks_about_the_config() {
    let mut vm = FakeVm::new(0);
    let machine = vm.machine();
    let peer = Peer::unix(Fault::Ignore(CONFIG));
    thread::scope(|scope| {
        let sending = scope.spawn(|| send(&peer, &mut vm, &machine));
        peer.await_command(CONFIG);
        assert!(machine.tracker.try_lock().is_ok(), "a VMM could not plug or unmap until the answer");
        assert!(machine.devices.try_lock().is_ok());
        sending.join().unwrap().unwrap_err();
    });
    drop(peer.end());
}

fn a_busy_vm_moves(peer: Peer, connections: u64) {
    let mut vm = FakeVm::new(40);
    let machine = vm.machine();
    let mut options = options(&peer);
    options.connections = ConnectionCount::new(connections).unwrap();
    options.downtime_ms = 2;
    options.max_rounds = Some(8);
    options.timeout_strategy = TimeoutStrategy::Ignore;
    let migration = Migration::new();
    let sent = Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices, &migration).unwrap();
    let (transcript, outcome) = peer.end();
    outcome.unwrap();
    assert!(!vm.is_running(), "source stays paused");
    transcript.assert_equals(&vm);

    let commands = transcript.commands();
    assert_eq!(commands[..2], [START, CONFIG]);
    assert_eq!(commands[commands.len() - 2..], [STATE, COMPLETE]);
    assert!(commands[2..commands.len() - 2].iter().all(|&command| command == MEMORY));
    assert!(transcript.seen.iter().all(|seen| seen.headers == [0; 6]));
    for seen in transcript.of(MEMORY) {
        assert!(!seen.table.is_empty(), "empty tables are not sent");
        assert!(seen.table.windows(2).all(|pair| pair[0].0 + pair[0].1 < pair[1].0), "sorted, coalesced");
        let bytes: u64 = seen.table.iter().map(|range| range.1).sum();
        assert!(bytes <= 256 << 10, "chunk limit");
    }
    let main: Vec<_> = transcript.of(MEMORY).into_iter().filter(|seen| seen.connection == 0).collect();
    if connections == 1 {
        let passes = passes(&main);
        assert_eq!(passes[0].iter().map(|range| range.1).sum::<u64>(), PAGES * PAGE, "first pass is all RAM");
        // One more for what the capture wrote.
        assert!(
            passes.len() <= sent.rounds as usize + 1,
            "{} passes in {} rounds",
            passes.len(),
            sent.rounds
        );
    } else {
        assert_eq!(main.len(), 1, "only what the capture wrote goes over the control connection");
        assert_eq!(commands[commands.len() - 3], MEMORY);
        assert_eq!(transcript.seen[transcript.seen.len() - 3].connection, 0);
        for lane in 1..=usize::try_from(connections).unwrap() {
            assert!(transcript.of(MEMORY).iter().any(|seen| seen.connection == lane), "lane {lane} is used");
        }
    }
    let progress = migration.progress();
    assert_eq!(progress.phase, Phase::Completed);
    assert_eq!(progress.sent_bytes, progress.acknowledged_bytes);
    assert!(sent.rounds >= 2 && sent.unique_dirty_bytes > 0 && sent.downtime < sent.total);
    assert_eq!(sent.sources.len(), 1);
    assert!(sent.sources[0].attribution.pages > 0);
}

#[test]
fn a_busy_vm_moves_over_unix() {
    a_busy_vm_moves(Peer::unix(Fault::None), 1);
}

#[test]
fn a_busy_vm_moves_over_tcp() {
    a_busy_vm_moves(Peer::tcp(1, Fault::None), 1);
}

#[test]
fn a_busy_vm_moves_over_four_tcp_connections() {
    a_busy_vm_moves(Peer::tcp(4, Fault::None), 4);
}

#[test]
fn a_receiver_that_goes_away_at_any_request_costs_nothing() {
    // C23: what one receiver acknowledged counts for nothing with the next.
    let mut vm = FakeVm::new(5);
    let machine = vm.machine();
    let mut outcomes = Vec::new();
    for request in 0.. {
        let peer = Peer::unix(Fault::CloseAtRequest(request));
        let migration = Migration::new();
        let mut options = options(&peer);
        options.chunk_bytes = 1 << 20;
        let outcome = Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices, &migration);
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
            let mut options = options(&peer);
            options.connections = ConnectionCount::new(connections as u64).unwrap();
            let error = Sender::new(options)
                .send(&mut vm, &machine.tracker, &machine.devices, &Migration::new())
                .unwrap_err();
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
            let mut options = options(&peer);
            options.connections = ConnectionCount::new(connections as u64).unwrap();
            let error = Sender::new(options)
                .send(&mut vm, &machine.tracker, &machine.devices, &Migration::new())
                .unwrap_err();
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

#[test]
fn cancelling_in_any_phase_is_prompt() {
    let mut vm = FakeVm::new(5);
    let machine = vm.machine();
    for command in [START, CONFIG, MEMORY, STATE] {
        let peer = Peer::unix(Fault::Ignore(command));
        let migration = Migration::new();
        let canceller = migration.clone();
        let (took, running) = thread::scope(|scope| {
            let sender = scope.spawn(|| {
                let options = options(&peer);
                let outcome =
                    Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices, &migration);
                (outcome, Instant::now())
            });
            peer.await_command(command);
            thread::sleep(Duration::from_millis(50));
            let asked = Instant::now();
            assert!(canceller.cancel());
            let (outcome, returned) = sender.join().unwrap();
            assert!(matches!(outcome, Err(SendError::Cancelled)), "{outcome:?}");
            (returned - asked, command)
        });
        assert!(took < Duration::from_secs(1), "command {running}: {took:?}");
        assert!(vm.makes_progress());
        assert_eq!(migration.progress().phase, Phase::Abandoned);
    }
    assert_retry_loses_nothing(&mut vm, &machine);
}

#[test]
fn cancelling_a_healthy_migration_tells_the_receiver() {
    for connections in [1, 4] {
        let mut vm = FakeVm::new(5);
        let machine = vm.machine();
        let peer = Peer::tcp(connections, Fault::Slow(Duration::from_millis(20)));
        let migration = Migration::new();
        let canceller = migration.clone();
        thread::scope(|scope| {
            let sender = scope.spawn(|| {
                let mut options = options(&peer);
                options.connections = ConnectionCount::new(connections as u64).unwrap();
                Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices, &migration)
            });
            peer.await_command(MEMORY);
            assert!(canceller.cancel());
            assert!(matches!(sender.join().unwrap(), Err(SendError::Cancelled)));
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
    let migration = Migration::new();
    migration.cancel();
    let options = SendOptions::new("unix:/nonexistent".parse().unwrap());
    let outcome = Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices, &migration);
    assert!(matches!(outcome, Err(SendError::Cancelled)));
    assert!(vm.log.lock().unwrap().is_empty());
}

#[test]
fn a_migration_past_complete_cannot_be_cancelled() {
    let mut vm = FakeVm::new(5);
    let machine = vm.machine();
    let peer = Peer::unix(Fault::Ignore(COMPLETE));
    let migration = Migration::new();
    thread::scope(|scope| {
        let sender = scope.spawn(|| send_with(&peer, &mut vm, &machine, &migration));
        peer.await_command(COMPLETE);
        assert!(!migration.cancel());
        assert_eq!(migration.progress().phase, Phase::Completing);
        let error = sender.join().unwrap().unwrap_err();
        assert!(matches!(error, SendError::OutcomeUnknown { .. }), "{error}");
    });
    assert!(!vm.is_running(), "never two");
}

fn send_with(
    peer: &Peer,
    vm: &mut FakeVm,
    machine: &Machine,
    migration: &Migration,
) -> Result<Sent, SendError> {
    Sender::new(options(peer)).send(vm, &machine.tracker, &machine.devices, migration)
}

#[test]
fn a_migration_that_does_not_converge_is_given_up_in_time() {
    let mut vm = FakeVm::new(2000);
    let machine = vm.machine();
    let peer = Peer::unix(Fault::Slow(Duration::from_millis(10)));
    let mut options = options(&peer);
    (options.downtime_ms, options.timeout_s) = (1, 1);
    let began = Instant::now();
    let error = Sender::new(options)
        .send(&mut vm, &machine.tracker, &machine.devices, &Migration::new())
        .unwrap_err();
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
    let mut options = options(&peer);
    (options.downtime_ms, options.timeout_s) = (1, 1);
    options.timeout_strategy = TimeoutStrategy::Ignore;
    let sent =
        Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices, &Migration::new()).unwrap();
    assert!(sent.total >= Duration::from_secs(1) && sent.downtime > Duration::from_millis(1));
    peer.end().0.assert_equals(&vm);
}

/// Sends to a receiver that holds the stopped VM up as `fault` says, and checks that it gets its time and no more.
fn assert_a_held_switchover_is_given_up(fault: Fault, connections: u64) {
    let mut vm = FakeVm::new(0);
    let source = ScriptedSource::new(&vm.log, [Report::Pages(0..1), Report::Pages(0..8)]);
    let machine = Machine::from(vm.builder().source(Box::new(source)).build().unwrap());
    let peer = Peer::tcp(connections as usize, fault);
    let mut options = options(&peer);
    options.connections = ConnectionCount::new(connections).unwrap();
    options.downtime_ms = 100;
    options.limits.switchover_timeout = Duration::from_millis(300);
    let began = Instant::now();
    let error = Sender::new(options)
        .send(&mut vm, &machine.tracker, &machine.devices, &Migration::new())
        .unwrap_err();
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
    let mut options = options(&peer);
    options.bandwidth = Some(12 << 20);
    let sent =
        Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices, &Migration::new()).unwrap();
    // 6 MiB at 12 MiB/s, the last chunk of a twentieth of a second not waited for.
    assert!(sent.total >= Duration::from_millis(440), "{:?}", sent.total);
    peer.end().0.assert_equals(&vm);
}

#[test]
fn a_failing_source_is_a_degradation_and_loses_nothing() {
    let mut vm = FakeVm::new(20);
    let script = [Report::Fail, Report::Fail, Report::Fail];
    let source = ScriptedSource::new(&vm.log, script);
    let machine = Machine::from(vm.builder().source(Box::new(source)).build().unwrap());
    let peer = Peer::unix(Fault::None);
    let migration = Migration::new();
    let sent = send_with(&peer, &mut vm, &machine, &migration).unwrap();
    peer.end().0.assert_equals(&vm);
    // A busy machine may miss the downtime limit, too.
    for degradations in [sent.degradations, migration.progress().degradations] {
        let told: Vec<_> = degradations.iter().map(ToString::to_string).collect();
        let of_source: Vec<_> = told.iter().filter(|text| text.contains("scripted")).collect();
        assert_eq!(of_source, ["Dirty source scripted cannot report dirty pages (3 times)"]);
    }
}

#[test]
fn a_source_that_is_gone_ends_the_migration_at_once() {
    for before in [0, 2] {
        let mut vm = FakeVm::new(2000);
        let script = (0..before).map(|_| Report::Fail).chain([Report::Gone]);
        let source = ScriptedSource::new(&vm.log, script);
        let machine = Machine::from(vm.builder().source(Box::new(source)).build().unwrap());
        let peer = Peer::unix(Fault::Slow(Duration::from_millis(2)));
        let mut options = options(&peer);
        options.downtime_ms = 1;
        let migration = Migration::new();
        let error =
            Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices, &migration).unwrap_err();
        let SendError::Tracking(cause) = &error else { panic!("{error:?}") };
        let source = std::error::Error::source(cause.as_ref()).unwrap().to_string();
        assert_eq!(source, "Dirty source scripted cannot report dirty pages");
        assert_eq!(migration.progress().round, before + 1);
        assert_eq!(error.source_vm(), SourceVm::AsBefore);
        assert!(vm.makes_progress());
        assert_eq!(peer.end().0.commands().last(), Some(&ABANDON));
    }
}

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
fn a_source_that_does_not_start_stops_the_migration_before_any_page() {
    let mut vm = FakeVm::new(5);
    let mut source = ScriptedSource::new(&vm.log, []);
    source.fail_start = true;
    let machine = Machine::from(vm.builder().source(Box::new(source)).build().unwrap());
    let peer = Peer::unix(Fault::None);
    let error = send(&peer, &mut vm, &machine).unwrap_err();
    assert!(matches!(error, SendError::Tracking(_)), "{error}");
    let (transcript, _) = peer.end();
    assert_eq!(transcript.commands(), [START, CONFIG, ABANDON]);
    assert_retry_loses_nothing(&mut vm, &machine);
}

#[test]
fn a_source_that_cannot_clear_ends_the_migration_and_a_retry_loses_nothing() {
    let mut vm = FakeVm::new(5);
    for chunks in [0, 7, 24] {
        let mut source = ScriptedSource::new(&vm.log, []);
        source.fail_before_read = Some(chunks);
        let machine = Machine::from(vm.builder().source(Box::new(source)).build().unwrap());
        let peer = Peer::unix(Fault::None);
        let error = send(&peer, &mut vm, &machine).unwrap_err();
        assert!(matches!(error, SendError::Tracking(_)), "{error}");
        assert_eq!(peer.end().0.commands().last(), Some(&ABANDON));
        assert_retry_loses_nothing(&mut vm, &machine);
        vfio_migration::vm::Vm::resume(&mut vm).unwrap();
    }
}

/// C1.
#[test]
fn sources_are_on_before_the_first_page_and_off_at_the_end() {
    let mut vm = FakeVm::new(0);
    let source = ScriptedSource::new(&vm.log, []);
    let machine = Machine::from(vm.builder().source(Box::new(source)).build().unwrap());
    send(&Peer::unix(Fault::None), &mut vm, &machine).unwrap();
    assert_eq!(*vm.log.lock().unwrap(), ["source on", "pause", "state", "source off"]);
}

/// A device whose log is the VM's.
fn with_device(vm: &FakeVm, adjust: impl FnOnce(&mut FakeDevice)) -> Machine {
    let mut io = FakeDevice::new(&vm.log, b"sixteen bytes, a");
    adjust(&mut io);
    let device = Device::new("net0", Box::new(io));
    vm.machine().with_device(device)
}

fn log_of(log: &Log) -> Vec<String> {
    log.lock().unwrap().clone()
}

#[test]
fn devices_stop_after_the_vcpus_and_hand_out_all_their_state() {
    let mut vm = FakeVm::new(5);
    let machine = with_device(&vm, |_| ());
    let peer = Peer::unix(Fault::None);
    let sent = send(&peer, &mut vm, &machine).unwrap();
    assert_eq!((sent.device_state_bytes, sent.device_precopy_bytes), (16, 8));
    let log = log_of(&vm.log);
    let expected = ["PRE_COPY", "pause", "PRE_COPY_P2P", "STOP_COPY", "state"];
    assert_eq!(log[..5], expected, "{log:?}");
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
fn pages_of_an_imprecise_source_go_over_once_in_the_last_round() {
    let mut vm = FakeVm::new(0);
    let mut source = ScriptedSource::new(&vm.log, [Report::Pages(0..512)]);
    source.precise = false;
    let machine = Machine::from(vm.builder().source(Box::new(source)).build().unwrap());
    let peer = Peer::unix(Fault::None);
    let mut options = options(&peer);
    options.downtime_ms = 5000;
    let sent =
        Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices, &Migration::new()).unwrap();
    assert_eq!((sent.rounds, sent.back_outs), (2, 0));
    assert_eq!(sent.degradations.len(), 1, "it is named as a degradation");
    assert!(sent.degradations[0].error.to_string().contains("could have written"));
    let (transcript, _) = peer.end();
    let bytes: u64 = transcript.of(MEMORY).iter().flat_map(|seen| &seen.table).map(|range| range.1).sum();
    assert_eq!(
        bytes,
        (PAGES + 512 + 1) * PAGE,
        "all RAM, what the device may have written, what the capture wrote"
    );
    transcript.assert_equals(&vm);
}

#[test]
fn an_imprecise_source_that_covers_more_than_the_limit_allows_never_stops_the_vm() {
    let mut vm = FakeVm::new(0);
    let mut source = ScriptedSource::new(&vm.log, []);
    source.precise = false;
    let machine = Machine::from(vm.builder().source(Box::new(source)).build().unwrap());
    let peer = Peer::unix(Fault::Slow(Duration::from_millis(20)));
    let mut options = options(&peer);
    (options.downtime_ms, options.timeout_s) = (20, 1);
    let error = Sender::new(options)
        .send(&mut vm, &machine.tracker, &machine.devices, &Migration::new())
        .unwrap_err();
    assert!(matches!(error, SendError::GivenUp(_)), "{error}");
    assert!(!log_of(&vm.log).contains(&"pause".to_owned()));
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
    for state in [DeviceState::PreCopyP2p, DeviceState::StopCopy] {
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

#[test]
fn a_switchover_that_turns_out_too_long_is_taken_back() {
    // C38: little is dirty while the VM runs, and everything when it has stopped.
    let mut vm = FakeVm::new(0);
    let source = ScriptedSource::new(&vm.log, [Report::Pages(0..1), Report::Pages(0..PAGES)]);
    let machine = Machine::from(vm.builder().source(Box::new(source)).build().unwrap());
    let peer = Peer::unix(Fault::Slow(Duration::from_millis(10)));
    let mut options = options(&peer);
    options.downtime_ms = 60;
    let sent =
        Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices, &Migration::new()).unwrap();
    assert_eq!(sent.back_outs, 1);
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
    let mut options = options(&peer);
    (options.downtime_ms, options.timeout_strategy) = (1, TimeoutStrategy::Ignore);
    options.max_rounds = Some(8);
    let sent =
        Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices, &Migration::new()).unwrap();
    assert!(sent.downtime_exceeded, "{:?}", sent.downtime);
    assert!(matches!(sent.forecast, Forecast::Stuck(Blame::DeviceState { .. })), "{}", sent.forecast);
    peer.end().0.assert_equals(&vm);
}

#[test]
fn vcpus_that_write_too_fast_are_slowed_down_and_get_their_time_back() {
    let mut vm = FakeVm::new(2000);
    vm.can_throttle = true;
    let machine = vm.machine();
    let peer = Peer::unix(Fault::Slow(Duration::from_millis(10)));
    let mut options = options(&peer);
    options.downtime_ms = 1;
    options.max_rounds = Some(4);
    options.throttle = true;
    let error = Sender::new(options)
        .send(&mut vm, &machine.tracker, &machine.devices, &Migration::new())
        .unwrap_err();
    assert!(matches!(error, SendError::GivenUp(CancelReason::OutOfRounds { max_rounds: 4, .. })), "{error}");
    assert_eq!(log_of(&vm.log), ["throttle 20", "throttle 30", "throttle 0"]);
}

#[test]
fn a_paused_vm_stays_paused_on_both_ends() {
    let mut vm = FakeVm::new(5);
    vfio_migration::vm::Vm::pause(&mut vm).unwrap();
    let machine = vm.machine();
    let refusing = Peer::unix(Fault::Refuse(COMPLETE_PAUSED));
    let mut first = options(&refusing);
    first.complete_paused = true;
    Sender::new(first).send(&mut vm, &machine.tracker, &machine.devices, &Migration::new()).unwrap_err();
    assert!(!vm.is_running(), "it was paused before");
    let peer = Peer::unix(Fault::None);
    let mut second = options(&peer);
    second.complete_paused = true;
    Sender::new(second).send(&mut vm, &machine.tracker, &machine.devices, &Migration::new()).unwrap();
    let (transcript, _) = peer.end();
    assert_eq!(transcript.commands().last(), Some(&COMPLETE_PAUSED));
    transcript.assert_equals(&vm);
    assert!(!log_of(&vm.log).contains(&"resume".to_owned()));
}

#[test]
fn options_out_of_bounds_are_named() {
    let mut vm = FakeVm::new(0);
    let machine = vm.machine();
    let mut options = SendOptions::new("unix:/tmp/x".parse().unwrap());
    options.connections = ConnectionCount::new(4).unwrap();
    let error = Sender::new(options.clone())
        .send(&mut vm, &machine.tracker, &machine.devices, &Migration::new())
        .unwrap_err();
    assert!(matches!(error, SendError::Options(SendOptionsError::OneConnectionOnly { .. })), "{error}");
    options.connections = ConnectionCount::ONE;
    options.chunk_bytes = 65 << 20;
    let error = Sender::new(options)
        .send(&mut vm, &machine.tracker, &machine.devices, &Migration::new())
        .unwrap_err();
    let SendError::Options(source) = error else { panic!("{error}") };
    assert_eq!(source.to_string(), "chunk_bytes is 68157440, but must be from 4096 to 67108864");
}

#[test]
fn a_receiver_that_is_not_there_is_named() {
    let mut vm = FakeVm::new(0);
    let machine = vm.machine();
    let options = SendOptions::new("unix:/nonexistent/socket".parse().unwrap());
    let error = Sender::new(options)
        .send(&mut vm, &machine.tracker, &machine.devices, &Migration::new())
        .unwrap_err();
    assert!(matches!(error, SendError::Peer { step: SendStep::Connect, .. }), "{error}");
    note(&vm.log, "untouched");
    assert_eq!(log_of(&vm.log), ["untouched"]);
    assert_eq!(page_gpa(PAGES - 1) + PAGE, vm::HIGH.0 + vm::HIGH.1);
}
