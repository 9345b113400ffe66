// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sources that stall, lie and break the rules: a clear error, soon, and nothing left behind.

use std::thread;
use std::time::{Duration, Instant};

use crate::frames::{
    COMPLETE, CONFIG, ERROR, MEMORY, MEMORY_FD, OK, PAGE_FAULT, START, STATE, message, request, table,
};
use crate::raw::{NO_DISKS, Source, Target, config, memory, migration, precopy, state};
use crate::stored::{Place, assert_same};
use crate::tool::Tool;

/// Checks that a receiver refuses the last of `messages` and names `what`.
#[track_caller]
fn refused(messages: &[Vec<u8>], what: &str) {
    refused_with(&[], messages, what);
}

#[track_caller]
fn refused_with(options: &[&str], messages: &[Vec<u8>], what: &str) {
    let target = Target::new(options);
    let (_source, last) = target.tell(messages);
    assert_eq!(last, Some(ERROR));
    target.refuses(what);
}

fn started() -> Vec<u8> {
    message(START, b"")
}

#[test]
fn another_protocol_version_is_refused() {
    let mut start = started();
    start[2..4].copy_from_slice(&9u16.to_le_bytes());
    refused(&[start], "version 9");
}

#[test]
fn messages_out_of_order_are_refused() {
    refused(&[started(), memory(1)], "Memory came after Start");
    refused(&[precopy(NO_DISKS), vec![message(COMPLETE, b"")]].concat(), "Complete came after Config");
    refused(&[started(), request(77, 0)], "77");
}

#[test]
fn json_of_another_version_is_refused() {
    refused(
        &[started(), message(CONFIG, b"<xml/>")],
        "Config message, which another version may have written",
    );
    refused(&[started(), message(CONFIG, br#"{"vm_config":{}}"#)], "memory_manager_data");
    refused(&[precopy(NO_DISKS), vec![message(STATE, b"{}")]].concat(), "state");
}

#[test]
fn lies_about_lengths_are_refused_and_cost_no_memory() {
    let after_config = [started(), config(NO_DISKS)];
    let refused_then = |lie: Vec<u8>, what: &str| refused(&[&after_config[..], &[lie]].concat(), what);
    refused(&[started(), request(CONFIG, 1 << 62)], "Config announces 4611686018427387904 bytes");
    refused_then(request(STATE, 1 << 45), "State announces 35184372088832 bytes");
    refused_then(request(MEMORY, 1 << 62), "Memory announces 4611686018427387904 bytes");
    refused_then(request(MEMORY, 17), "17");
    refused_then(table(&[(0x10_0000, 0x1000)]), "0x100000");
    refused_then(table(&[(u64::MAX - 0xfff, 0x2000)]), "0xfffffffffffff000");
    refused(&[request(START, 5)], "payload of 5 bytes");
}

#[test]
fn the_state_limit_is_an_option() {
    let longer = state();
    let messages = [precopy(NO_DISKS), vec![longer]].concat();
    refused_with(
        &["--state-limit", "64"],
        &messages,
        "more than the limit state_bytes = 64 (--state-limit sets",
    );
}

#[test]
fn memory_as_descriptors_is_refused_by_name() {
    refused(&[started(), request(MEMORY_FD, 4)], "local=on");
}

#[test]
fn postcopy_is_refused_with_the_reason() {
    refused(&[started(), config(NO_DISKS), request(PAGE_FAULT, 16)], "DMA of pass-through devices");
    let target = Target::new(&[]);
    let (mut main, last) = target.tell(&[started(), config(NO_DISKS)]);
    assert_eq!(last, Some(OK));
    let mut faults = target.connect();
    faults.send(&2u16.to_le_bytes()).unwrap();
    thread::sleep(Duration::from_millis(200));
    assert_ne!(main.ask(&state()), Some(OK));
    target.refuses("DMA of pass-through devices");
}

#[test]
fn one_connection_too_many_ends_the_migration() {
    for (options, most) in [(&[][..], 128), (&["--connections", "2"], 2)] {
        let target = Target::new(options);
        let (_main, last) = target.tell(&[started(), config(NO_DISKS)]);
        assert_eq!(last, Some(OK));
        let page = [table(&[(0, 0x1000)]), vec![7; 0x1000]].concat();
        let mut sources = Vec::new();
        for number in 0..=most {
            let mut source = target.connect();
            source.send(&1u16.to_le_bytes()).unwrap();
            assert_eq!(source.ask(&page), Some(if number < most { OK } else { ERROR }));
            sources.push(source);
        }
        target.refuses(&format!("more than {most} additional connections"));
    }
}

#[test]
fn a_source_that_goes_away_is_named() {
    let target = Target::new(&[]);
    drop(target.tell(&precopy(NO_DISKS)));
    target.refuses("Source closed the connection after Config");

    let target = Target::new(&[]);
    let (mut source, _) = target.tell(&[started(), config(NO_DISKS)]);
    source.send(&memory(1)[..1000]).unwrap();
    drop(source);
    target.refuses("Cannot read the pages of Memory");
}

#[test]
fn a_source_that_stalls_is_given_up() {
    let patience = ["--idle-timeout", "1"];
    let target = Target::new(&patience);
    let (_source, _) = target.tell(&precopy(NO_DISKS));
    target.refuses(" s after Config (--idle-timeout sets the limit)");

    let target = Target::new(&patience);
    let (mut source, _) = target.tell(&[started(), config(NO_DISKS)]);
    source.send(&memory(1)[..1000]).unwrap();
    target.refuses("Cannot read the pages of Memory");
}

#[test]
fn a_source_that_trickles_is_given_up() {
    let target = Target::new(&["--idle-timeout", "1"]);
    let (mut source, _) = target.tell(&[started()]);
    let trickle = thread::spawn(move || {
        let bytes = config(NO_DISKS);
        let mut sent = bytes.chunks(1).take_while(|byte| {
            thread::sleep(Duration::from_millis(200));
            source.send(byte).is_ok()
        });
        while sent.next().is_some() {}
    });
    target.refuses("Cannot read");
    trickle.join().unwrap();
}

#[test]
fn two_hundred_strangers_keep_no_source_out() {
    let begun = Instant::now();
    let place = Place::new();
    let (from, into) = (place.stored("from", 1), place.path("into"));
    let (receiver, url) = Tool::receive("tcp:127.0.0.1:0", &into, &[]);
    let connect = || Source::connect(url.strip_prefix("tcp:").unwrap());
    let mut staying = Vec::new();
    for _ in 0..40 {
        drop(connect());
        staying.push(connect());
        for greeting in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\x16", &config(NO_DISKS)] {
            let mut stranger = connect();
            // It may have had to go already.
            let _ = stranger.send(greeting);
            staying.push(stranger);
        }
    }
    Tool::send(&url, &from, &["--connections", "4"]).end().succeeded();
    let ended = receiver.end().succeeded();
    assert_same(&from, &into);
    assert!(ended.stderr.lines().count() < 30, "they fill no log: {}", ended.stderr);
    assert!(ended.stderr.contains("away: "), "but are told of: {}", ended.stderr);
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
}

#[test]
fn a_caller_that_does_not_say_start_is_refused_and_another_waited_for() {
    let target = Target::new(&[]);
    let (_stranger, last) = target.tell(&[config(NO_DISKS)]);
    assert_eq!(last, Some(ERROR));
    let (source, last) = target.tell(&migration(NO_DISKS));
    assert_eq!(last, Some(OK));
    // The migration is over while the stranger still holds its connection.
    drop(source);
    let ended = target.end().0.succeeded();
    assert!(ended.stderr.contains("begins with Config instead of Start"), "{ended:?}");
}
