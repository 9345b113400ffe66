// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Two sides that were told different ways for memory to go: bytes, descriptors, or on demand. What mends it is named.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::frames::{COMPLETE, ERROR, FOR_FAULTS, OK, STATE, message, request};
use crate::local::{Source, config, guest};
use crate::local_send::{memory_of, text};
use crate::raw::{NO_DISKS, RAM, state};
use crate::stored::{Place, assert_sound};
use crate::tool::{Ended, Tool};

/// Takes bytes, as a VMM does, and answers all with Ok, but `refused` with an error.
fn take_bytes(mut stream: &UnixStream, refused: u16) {
    let mut head = [0; 16];
    while stream.read_exact(&mut head).is_ok() {
        let command = u16::from_le_bytes([head[0], head[1]]);
        let length = u64::from_le_bytes(head[8..].try_into().unwrap());
        let mut payload = Vec::new();
        stream.take(length).read_to_end(&mut payload).unwrap();
        if command == 4 {
            let lengths = payload.chunks(16).map(|entry| u64::from_le_bytes(entry[8..].try_into().unwrap()));
            std::io::copy(&mut stream.take(lengths.sum()), &mut std::io::sink()).unwrap();
        }
        let status = if command == refused { ERROR } else { OK };
        stream.write_all(&request(status, 0)).unwrap();
    }
}

/// Sends bytes to a VMM that refuses one request.
fn send_bytes(refused: u16) -> Ended {
    let place = Place::new();
    let listener = UnixListener::bind(place.path("socket")).unwrap();
    let vmm = thread::spawn(move || take_bytes(&listener.accept().unwrap().0, refused));
    let url = format!("unix:{}", place.path("socket").display());
    let ended = Tool::send(&url, &place.stored("from", 1), &[]).end();
    vmm.join().unwrap();
    ended
}

#[test]
fn bytes_for_a_receiver_on_demand() {
    send_bytes(STATE).failed(3, "memory_mode=postcopy takes no bytes: --local --on-demand sends it so");
    let ended = send_bytes(COMPLETE).failed(3, "refused");
    assert!(!ended.stderr.contains("postcopy"), "that is not why: {ended:?}");
}

/// Sends from a directory to this tool's own receiver.
fn to_receiver(place: &Place, from: &Path, options: &[&str]) -> (Ended, Ended) {
    let url = format!("unix:{}", place.path("socket").display());
    let (receiver, _) = Tool::receive(&url, &place.path("into"), &["--memory-only"]);
    let sender = Tool::start([&["send", &url, "--from", text(from), "--json"][..], options].concat());
    (sender.end(), receiver.end())
}

#[test]
fn descriptors_for_a_receiver_that_keeps_the_vm() {
    let place = Place::new();
    let from = place.stored("from", 1);
    let (sent, kept) = to_receiver(&place, &from, &["--local"]);
    sent.succeeded();
    kept.succeeded();
    assert_sound(&place.path("into"));
    assert!(memory_of(&place.path("into")) == memory_of(&from), "memory differs");
}

#[test]
fn memory_on_demand_for_a_receiver_that_keeps_the_vm() {
    let place = Place::new();
    let from = place.stored("from", 1);
    let (sent, kept) = to_receiver(&place, &from, &["--local", "--on-demand"]);
    // It is refused with State, or where it waits for the first request.
    assert!(matches!(sent.code, Some(2 | 3)) && sent.stderr.contains("memory_mode=postcopy"), "{sent:?}");
    kept.failed(3, "postcopy");
    assert!(!place.path("into").exists());
}

/// Passes memory, and then goes on as `play` does; returns how the receiver ended.
fn pass_and(play: impl FnOnce(&mut Source, &Place)) -> Ended {
    let place = Place::new();
    let url = format!("unix:{}", place.path("socket").display());
    let (receiver, _) = Tool::receive(&url, &place.path("into"), &[]);
    let (mut source, passed) = (Source::try_start(&place.path("socket")).unwrap(), guest());
    assert_eq!(source.pass(0, &[passed.as_fd()]), Some(OK));
    play(&mut source, &place);
    drop(source);
    let ended = receiver.end();
    assert!(!place.path("into").exists());
    ended
}

#[test]
fn descriptors_and_a_connection_to_ask_for_pages_on() {
    let ended = pass_and(|source, place| {
        assert_eq!(source.ask(&config(NO_DISKS, &[(0, 0, RAM, 0)])), Some(OK));
        let mut faults = UnixStream::connect(place.path("socket")).unwrap();
        faults.write_all(&FOR_FAULTS).unwrap();
        thread::sleep(Duration::from_millis(300));
        assert_eq!(source.ask(&state()), Some(ERROR));
    });
    ended.failed(3, "postcopy");
}

#[test]
fn descriptors_and_then_a_request_for_a_page() {
    let ended = pass_and(|source, _| {
        assert_eq!(source.ask(&message(9, &[0; 16])), Some(ERROR));
    });
    ended.failed(3, "postcopy");
}
