// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A healthy migration, from the first byte to the last.

use std::thread;
use std::time::Duration;

use vfio_migration::precopy::TimeoutStrategy;
use vfio_migration::transfer::limits::ConnectionCount;
use vfio_migration::transfer::{Phase, SendError, SendOptions, SendOptionsError, SendStep, Sender};

use crate::frames::{COMPLETE, COMPLETE_PAUSED, CONFIG, MEMORY, START, STATE, message, table};
use crate::peer::{Fault, Peer, Seen};
use crate::vm::{self, FakeVm, PAGE, PAGES, note, page_gpa};
use crate::{log_of, options, send};

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
    let options = options(&peer).chunk_bytes(64 << 20).unwrap();
    let sent = Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices).unwrap();
    let (transcript, outcome) = peer.end();
    outcome.unwrap();

    let memory = |ranges: &[(u64, u64)], pages: std::ops::Range<u64>| {
        let bytes: Vec<u8> = pages.flat_map(|page| vm.page(page)).collect();
        [table(ranges), bytes].concat()
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
    assert_eq!(sent.progress.sent_bytes, transcript.raw.len() as u64);
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
    let options = options(&peer)
        .connections(ConnectionCount::new(connections).unwrap())
        .unwrap()
        .downtime(Duration::from_millis(2))
        .max_rounds(Some(8))
        .timeout_strategy(TimeoutStrategy::Ignore);
    let sender = Sender::new(options);
    let migration = sender.handle();
    let sent = sender.send(&mut vm, &machine.tracker, &machine.devices).unwrap();
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
            passes.len() <= sent.progress.round as usize + 1,
            "{} passes in {} rounds",
            passes.len(),
            sent.progress.round
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
    assert!(sent.progress.round >= 2 && sent.unique_dirty_bytes > 0 && sent.downtime < sent.total);
    assert_eq!(sent.progress.sources.len(), 1);
    assert!(sent.progress.sources[0].attribution.pages > 0);
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
fn a_paused_vm_stays_paused_on_both_ends() {
    let mut vm = FakeVm::new(5);
    vfio_migration::vm::Vm::pause(&mut vm).unwrap();
    let machine = vm.machine();
    let refusing = Peer::unix(Fault::Refuse(COMPLETE_PAUSED));
    let first = options(&refusing).complete_paused(true);
    Sender::new(first).send(&mut vm, &machine.tracker, &machine.devices).unwrap_err();
    assert!(!vm.is_running(), "it was paused before");
    let peer = Peer::unix(Fault::None);
    let second = options(&peer).complete_paused(true);
    Sender::new(second).send(&mut vm, &machine.tracker, &machine.devices).unwrap();
    let (transcript, _) = peer.end();
    assert_eq!(transcript.commands().last(), Some(&COMPLETE_PAUSED));
    transcript.assert_equals(&vm);
    assert!(!log_of(&vm.log).contains(&"resume".to_owned()));
}

#[test]
fn options_out_of_bounds_are_named() {
    let options = || SendOptions::new("unix:/tmp/x".parse().unwrap());
    let error = options().connections(ConnectionCount::new(4).unwrap()).unwrap_err();
    assert!(matches!(error, SendOptionsError::OneConnectionOnly { .. }), "{error}");
    assert!(options().connections(ConnectionCount::ONE).is_ok());
    let error = options().chunk_bytes(65 << 20).unwrap_err();
    assert_eq!(error.to_string(), "chunk_bytes is 68157440, but must be from 4096 to 67108864");
    for window in [0, 65] {
        let error = options().window(window).unwrap_err().to_string();
        assert_eq!(error, format!("window is {window}, but must be from 1 to 64"));
    }
    let error = options().rate_limit(Some(0)).unwrap_err().to_string();
    assert!(error.starts_with("rate limit is 0, but must be from 1 to "), "{error}");
}

#[test]
fn a_receiver_that_is_not_there_is_named() {
    let mut vm = FakeVm::new(0);
    let machine = vm.machine();
    let options = SendOptions::new("unix:/nonexistent/socket".parse().unwrap());
    let error = Sender::new(options).send(&mut vm, &machine.tracker, &machine.devices).unwrap_err();
    assert!(matches!(error, SendError::Peer { step: SendStep::Connect, .. }), "{error}");
    note(&vm.log, "untouched");
    assert_eq!(log_of(&vm.log), ["untouched"]);
    assert_eq!(page_gpa(PAGES - 1) + PAGE, vm::HIGH.0 + vm::HIGH.1);
}
