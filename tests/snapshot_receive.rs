// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A VM received into a directory, from a source whose bytes are spelled out here.

#![expect(clippy::unwrap_used, reason = "a test may end at any surprise")]

#[expect(dead_code, reason = "other tests use the rest")]
mod frames;

use std::error::Error;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use frames::{
    ABANDON, COMPLETE, CONFIG, ERROR, MEMORY_FD, OK, START, STATE, config_document, message, state_document,
    table,
};
use tempfile::TempDir;
use vfio_migration::snapshot::{
    Base, DestinationError, DestinationOptions, Differential, FullSnapshot, MEMORY_FILE, STATE_FILE,
    SnapshotChain, SnapshotDestination, SnapshotLimits, WriteError, apply, verify,
};
use vfio_migration::transfer;
use vfio_migration::transfer::connection::Listener;
use vfio_migration::transfer::limits::Pace;
use vfio_migration::transfer::receive::{Completion, ReceiveError, Received, Receiver};

const REGION: usize = 1 << 20;
const HIGH: u64 = 4 << 30;
const VM_CONFIG: &str = r#"{"memory":{"size":2097152},"disks":null}"#;

const RAM: [(u64, u64); 2] = [(0, REGION as u64), (HIGH, REGION as u64)];

fn config(vm_config: &str) -> String {
    config_document(vm_config, &RAM)
}

fn state() -> String {
    state_document(&RAM)
}

/// A Memory with `ranges`, each filled with one byte.
fn memory(ranges: &[(u64, usize, u8)]) -> Vec<u8> {
    let spans: Vec<_> = ranges.iter().map(|&(gpa, length, _)| (gpa, length as u64)).collect();
    let pages = ranges.iter().flat_map(|&(_, length, byte)| vec![byte; length]);
    table(&spans).into_iter().chain(pages).collect()
}

/// The messages of a migration up to the State.
fn precopy(vm_config: &str) -> Vec<Vec<u8>> {
    vec![
        message(START, b""),
        message(CONFIG, config(vm_config).as_bytes()),
        memory(&[(0, REGION, 1), (HIGH, REGION, 2)]),
        // Unsorted, overlapping, repeated: the last bytes stay.
        memory(&[(HIGH + 4096, 8192, 9), (0, 4096, 3), (HIGH + 8192, 4096, 4), (0, 4096, 0)]),
    ]
}

fn migration(vm_config: &str) -> Vec<Vec<u8>> {
    let end = [message(STATE, state().as_bytes()), message(COMPLETE, b"")];
    precopy(vm_config).into_iter().chain(end).collect()
}

/// `memory-ranges` as it must come out.
fn memory_file() -> Vec<u8> {
    let mut bytes = [vec![1; REGION], vec![2; REGION]].concat();
    bytes[..4096].fill(0);
    bytes[REGION + 4096..REGION + 8192].fill(9);
    bytes[REGION + 8192..REGION + 12288].fill(4);
    bytes
}

struct Place {
    dir: TempDir,
    target: PathBuf,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("snapshot");
        Self { dir, target }
    }

    fn destination(&self, options: DestinationOptions) -> SnapshotDestination {
        SnapshotDestination::create(&self.target, options).unwrap()
    }

    /// Whether neither the directory nor anything beside it is there.
    fn is_empty(&self) -> bool {
        fs::read_dir(self.dir.path()).unwrap().all(|entry| entry.unwrap().file_name() == "socket")
    }

    /// Sends `messages` one after the other for as long as they are answered with Ok; returns the last answer.
    fn receive(
        &self,
        destination: &mut SnapshotDestination,
        messages: Vec<Vec<u8>>,
    ) -> (Result<Received, ReceiveError>, Option<u16>) {
        let socket = self.dir.path().join("socket");
        let listener = Listener::bind(&format!("unix:{}", socket.display()).parse().unwrap()).unwrap();
        let source = std::thread::spawn(move || {
            let mut stream = UnixStream::connect(socket).unwrap();
            let mut last = None;
            for message in messages {
                // Refused half way, the rest of a message finds no reader.
                let _ = stream.write_all(&message);
                let mut answer = [0; 16];
                last =
                    stream.read_exact(&mut answer).ok().map(|()| u16::from_le_bytes([answer[0], answer[1]]));
                if last != Some(OK) {
                    break;
                }
            }
            last
        });
        let pace = Pace { bytes: 1, window: Duration::from_millis(500) };
        let limits = transfer::limits::PeerLimits { pace, ..Default::default() };
        let received = Receiver::new(limits, None).receive(&listener, destination);
        (received, source.join().unwrap())
    }
}

fn assert_clean(dir: &Path) {
    let report = verify(dir, &SnapshotLimits::default()).unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
}

/// The error and all its sources, as a user sees them.
fn chain(error: &dyn Error) -> String {
    let next = error.source().map(chain);
    next.map_or(error.to_string(), |next| format!("{error}: {next}"))
}

#[test]
fn a_vm_is_received_into_a_snapshot_before_complete_is_answered() {
    let place = Place::new();
    let mut destination = place.destination(DestinationOptions::default());
    let (received, last) = place.receive(&mut destination, migration(VM_CONFIG));
    assert!(received.is_ok() && last == Some(OK));
    assert!(fs::read(place.target.join(MEMORY_FILE)).unwrap() == memory_file());
    assert_eq!(fs::read(place.target.join(STATE_FILE)).unwrap(), state().as_bytes());
    assert_clean(&place.target);
    let dir = FullSnapshot::open(&place.target, &SnapshotLimits::default()).unwrap();
    assert_eq!(dir.config().text(), VM_CONFIG);
    assert_eq!(destination.kept(), dir.digest());
}

#[test]
fn a_checkpoint_is_whole_when_its_source_is_told_to_run_on() {
    let place = Place::new();
    let mut destination = place.destination(DestinationOptions { checkpoint: true, ..Default::default() });
    let (received, last) = place.receive(&mut destination, migration(VM_CONFIG));
    assert_eq!(last, Some(ERROR));
    assert_eq!(received.unwrap().completion, Completion::Checkpointed);
    assert!(destination.kept().is_some());
    assert!(fs::read(place.target.join(MEMORY_FILE)).unwrap() == memory_file());
    assert_clean(&place.target);
}

#[test]
fn a_differential_is_received_against_its_base() {
    let place = Place::new();
    let (base, applied) = (place.dir.path().join("base"), place.dir.path().join("applied"));
    let mut first = SnapshotDestination::create(&base, DestinationOptions::default()).unwrap();
    let messages = precopy(VM_CONFIG).into_iter().enumerate().filter(|(at, _)| *at != 3).map(|(_, m)| m);
    let end = [message(STATE, state().as_bytes()), message(COMPLETE, b"")];
    place.receive(&mut first, messages.chain(end).collect()).0.unwrap();
    fs::remove_file(place.dir.path().join("socket")).ok();

    let options = DestinationOptions {
        base: Some(Base::open([&base], &SnapshotLimits::default()).unwrap()),
        checkpoint: true,
        ..Default::default()
    };
    place.receive(&mut place.destination(options), migration(VM_CONFIG)).0.unwrap();
    let differential = Differential::open(&place.target, &SnapshotLimits::default()).unwrap();
    assert_eq!(Some(differential.base()), first.kept());
    assert_eq!(differential.changed().bytes(), 8192);
    let all = SnapshotChain::open([&base, &place.target], &SnapshotLimits::default()).unwrap();
    apply(&all, &applied, &SnapshotLimits::default()).unwrap();
    assert!(fs::read(applied.join(MEMORY_FILE)).unwrap() == memory_file());
}

#[test]
fn a_page_that_no_source_sends_is_zero_whatever_the_base_holds() {
    let place = Place::new();
    let (base, applied) = (place.dir.path().join("base"), place.dir.path().join("applied"));
    let mut first = SnapshotDestination::create(&base, DestinationOptions::default()).unwrap();
    place.receive(&mut first, migration(VM_CONFIG)).0.unwrap();

    let base_of = Base::open([&base], &SnapshotLimits::default()).unwrap();
    let options = DestinationOptions { base: Some(base_of), ..Default::default() };
    // One page as in the base, one that is not; a source leaves the rest out, for a receiver's memory reads zero.
    let messages = vec![
        message(START, b""),
        message(CONFIG, config(VM_CONFIG).as_bytes()),
        memory(&[(8192, 4096, 1), (HIGH, 4096, 5)]),
        message(STATE, state().as_bytes()),
        message(COMPLETE, b""),
    ];
    place.receive(&mut place.destination(options), messages).0.unwrap();
    let all = SnapshotChain::open([&base, &place.target], &SnapshotLimits::default()).unwrap();
    apply(&all, &applied, &SnapshotLimits::default()).unwrap();
    let mut expected = vec![0; 2 * REGION];
    expected[8192..12288].fill(1);
    expected[REGION..REGION + 4096].fill(5);
    assert!(fs::read(applied.join(MEMORY_FILE)).unwrap() == expected);
    assert_eq!(all.differentials()[0].changed().bytes(), 4096);
}

#[test]
fn what_a_snapshot_would_be_no_use_of_is_refused_at_config() {
    let disks = r#"{"memory":{"size":1},"disks":[{"path":"/disk.raw"}]}"#;
    let vdpa = r#"{"memory":{"size":1},"vdpa":[{"path":"/dev/vhost-vdpa-0"}]}"#;
    let zones = r#"{"memory":{"size":1,"zones":[{"id":"m0","file":"/m","shared":true}]}}"#;
    let obeyed = r#"{"memory":{"size":1},"disks":[{"path":"/\u001b[2Jdisk.raw\r\n"}]}"#;
    for (vm_config, expected) in [
        (disks, "/disk.raw"),
        (vdpa, "vDPA devices /dev/vhost-vdpa-0"),
        (zones, "m0"),
        (obeyed, r"/\u{1b}[2Jdisk.raw\r\n"),
    ] {
        let place = Place::new();
        let mut destination = place.destination(DestinationOptions::default());
        let (received, last) = place.receive(&mut destination, migration(vm_config));
        let error = received.unwrap_err();
        assert!(chain(&error).contains(expected), "{}", chain(&error));
        assert_eq!(last, Some(ERROR));
        assert!(place.is_empty());
    }
    let place = Place::new();
    let mut destination = place.destination(DestinationOptions { memory_only: true, ..Default::default() });
    place.receive(&mut destination, migration(disks)).0.unwrap();
    assert_clean(&place.target);
}

#[test]
fn the_hook_runs_once_while_the_vm_is_paused_and_its_failure_ends_it() {
    let disks = r#"{"memory":{"size":1},"disks":[{"path":"/disk.raw"}]}"#;
    let place = Place::new();
    let calls = Arc::new(AtomicUsize::new(0));
    let (counted, target) = (Arc::clone(&calls), place.target.clone());
    let hook = move || {
        assert!(!target.exists(), "Complete comes later");
        counted.fetch_add(1, Ordering::Relaxed);
        Ok(())
    };
    let options = DestinationOptions { on_paused: Some(Box::new(hook)), ..Default::default() };
    place.receive(&mut place.destination(options), migration(disks)).0.unwrap();
    assert_eq!(calls.load(Ordering::Relaxed), 1);

    let place = Place::new();
    let hook = || Err("No space for the disk's snapshot".into());
    let options = DestinationOptions { on_paused: Some(Box::new(hook)), ..Default::default() };
    let (received, last) = place.receive(&mut place.destination(options), migration(disks));
    let error = received.unwrap_err();
    assert!(chain(&error).contains("No space for the disk's snapshot"), "{}", chain(&error));
    assert_eq!(last, Some(ERROR));
    assert!(place.is_empty());
}

/// Each goes wrong at another step; nothing may stay.
#[test]
fn a_migration_that_fails_leaves_nothing() {
    let cut_off = |mut messages: Vec<Vec<u8>>| {
        let last = messages.last_mut().unwrap();
        last.truncate(last.len() - 100);
        messages
    };
    let with = |from: &[u8]| precopy(VM_CONFIG).into_iter().chain([from.to_vec()]).collect::<Vec<_>>();
    let outside = memory(&[(REGION as u64 - 4096, 8192, 1)]);
    let unlisted = state().replace(&HIGH.to_string(), "1048576");
    let cases = [
        ("closed", precopy(VM_CONFIG)),
        ("Peer stalled", cut_off(precopy(VM_CONFIG))),
        ("abandoned", with(&message(ABANDON, b""))),
        ("not in the VM's RAM", with(&outside)),
        ("came with 0 descriptors", vec![message(START, b""), message(MEMORY_FD, &[0; 4])]),
        ("state.json", with(&message(STATE, b"{}"))),
        ("not announced as RAM", with(&message(STATE, unlisted.as_bytes()))),
        ("Memory", vec![message(START, b""), memory(&[(0, 4096, 1)])]),
        ("Config", vec![message(START, b""), message(CONFIG, b"{}")]),
    ];
    for (name, messages) in cases {
        let place = Place::new();
        let mut destination = place.destination(DestinationOptions::default());
        let (received, last) = place.receive(&mut destination, messages);
        let error = chain(&received.unwrap_err());
        assert!(error.contains(name), "{name}: {error}");
        assert_ne!(last, None, "{name}: no answer");
        assert_eq!(destination.kept(), None);
        assert!(place.is_empty(), "{name}: {error}");
    }
}

#[test]
fn a_name_that_is_taken_is_refused_before_a_source_comes() {
    let place = Place::new();
    fs::create_dir(&place.target).unwrap();
    fs::write(place.target.join("x"), "x").unwrap();
    let refused = SnapshotDestination::create(&place.target, DestinationOptions::default());
    assert!(matches!(refused, Err(WriteError::Occupied { .. })));
    let out_of_turn = DestinationError::OutOfTurn { message: "State" };
    assert_eq!(out_of_turn.to_string(), "State came twice or too early");
}
