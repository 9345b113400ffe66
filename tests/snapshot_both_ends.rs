// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A snapshot sent by our sender to our receiver is the same snapshot.

#![expect(clippy::unwrap_used, reason = "a test may end at any surprise")]

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;

use vfio_migration::granule::Granule;
use vfio_migration::layout::Layout;
use vfio_migration::range::GpaRange;
use vfio_migration::snapshot::{
    Announced, CONFIG_FILE, DestinationOptions, Limits, MANIFEST_FILE, MEMORY_FILE, STATE_FILE,
    SnapshotDestination, SnapshotDir, SnapshotSource, SnapshotWriter, verify,
};
use vfio_migration::threads::ThreadStart;
use vfio_migration::tracker::Tracker;
use vfio_migration::transfer::connection::Listener;
use vfio_migration::transfer::limits::ConnectionCount;
use vfio_migration::transfer::receive::Receiver;
use vfio_migration::transfer::url::Url;
use vfio_migration::transfer::{self, Migration, SendOptions, Sender};

const REGION: u64 = 8 << 20;
const HIGH: u64 = 4 << 30;

fn ram() -> [GpaRange; 2] {
    [0, HIGH].map(|start| GpaRange::new(start, REGION).unwrap())
}

fn state() -> String {
    let range = |gpa| format!(r#"{{\"gpa\":{gpa},\"length\":{REGION}}}"#);
    let mapping = |gpa| format!(r#"{{\"slot\":0,\"gpa\":{gpa},\"size\":{REGION},\"virtio_mem\":false}}"#);
    let ranges = format!(r#"\"memory_ranges\":{{\"data\":[{},{}]}}"#, range(0), range(HIGH));
    let mappings = format!(r#"\"guest_ram_mappings\":[{},{}]"#, mapping(0), mapping(HIGH));
    let child = format!(r#"{{"snapshots":{{}},"snapshot_data":{{"state":"{{{ranges},{mappings}}}"}}}}"#);
    let root = r#"{"state":"{\"common_cpuid\":[{\"function\":1}]}"}"#;
    format!(r#"{{"snapshots":{{"memory-manager":{child}}},"snapshot_data":{root}}}"#)
}

/// A guest with holes, zeros and pages of many kinds.
fn write(target: &Path) {
    let layout = Layout::new(ram(), Granule::host_page()).unwrap();
    let writer = SnapshotWriter::create(target, Announced::all(layout), Limits::default()).unwrap();
    for range in ram() {
        let pieces = range.pieces(Granule::host_page().bytes());
        for (piece, number) in pieces.zip(0u64..).filter(|(_, number)| number % 5 < 2) {
            let bytes = (0..piece.len()).map(|at| (at.wrapping_mul(number | 1) >> 3).to_le_bytes()[0]);
            let bytes: Vec<u8> = bytes.collect();
            writer.fill(piece, &mut &bytes[..]).unwrap();
        }
        let zeros = GpaRange::new(range.start() + (1 << 20), 1 << 20).unwrap();
        writer.fill(zeros, &mut std::io::repeat(0).take(1 << 20)).unwrap();
    }
    writer.finish(br#"{"memory":{"size":16777216},"cpus":{"boot_vcpus":2}}"#, state().as_bytes()).unwrap();
}

/// Sends and receives, on threads that do `thread_start` first.
fn send(from: &Path, into: &Path, url: &Url, connections: u64, thread_start: ThreadStart) {
    let listener = Listener::bind(url).unwrap();
    let limits = Limits { thread_start, ..Limits::default() };
    let destination = DestinationOptions { limits, ..DestinationOptions::default() };
    let mut destination = SnapshotDestination::create(into, destination).unwrap();
    let mut options = SendOptions::new(listener.url().clone());
    options.thread_start = thread_start;
    options.connections = ConnectionCount::new(connections).unwrap();
    let mut source = SnapshotSource::new(SnapshotDir::open(from, &limits).unwrap()).unwrap();
    let tracker = Mutex::new(Tracker::builder(source.layout().clone()).build().unwrap());
    let receiver = Receiver::new(transfer::limits::Limits::default(), None).thread_start(thread_start);
    thread::scope(|scope| {
        let received = scope.spawn(|| receiver.receive(&listener, &mut destination).map(drop));
        Sender::new(options).send(&mut source, &tracker, &Mutex::default(), &Migration::new()).unwrap();
        received.join().unwrap().unwrap();
    });
}

#[test]
fn a_snapshot_that_is_sent_and_received_is_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("from");
    write(&from);
    let loopback = Url::tcp("127.0.0.1", 0).unwrap();
    let socket = Url::unix(dir.path().join("socket")).unwrap();
    for (name, url, connections) in [("unix", &socket, 1), ("tcp1", &loopback, 1), ("tcp4", &loopback, 4)] {
        let into = dir.path().join(name);
        send(&from, &into, url, connections, ThreadStart::NOTHING);
        for file in [CONFIG_FILE, STATE_FILE, MEMORY_FILE, MANIFEST_FILE] {
            assert!(
                fs::read(from.join(file)).unwrap() == fs::read(into.join(file)).unwrap(),
                "{file} over {name}"
            );
        }
        assert!(verify(&into, &Limits::default()).unwrap().is_clean());
    }
}

#[test]
fn every_thread_does_what_the_embedder_wants_first() {
    static STARTED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let hook = &|| {
        let name = thread::current().name().unwrap().to_owned();
        STARTED.lock().unwrap().insert(name);
    };
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("from");
    write(&from);
    send(&from, &dir.path().join("into"), &Url::tcp("127.0.0.1", 0).unwrap(), 2, ThreadStart::new(hook));
    let sender = ["migrate-0", "migrate-1", "migrate-close", "migrate-dial"];
    let others = ["migration-door", "migration-in", "snapshot-check", "snapshot-flush", "snapshot-part"];
    let expected = sender.into_iter().chain(others).map(str::to_owned).collect();
    assert_eq!(*STARTED.lock().unwrap(), expected);
}

/// Where the standard library's own ways to start a thread are used in the text of a module, its tests left out.
fn starts(text: &str) -> Vec<&str> {
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or(text);
    let code = text.lines().map(str::trim).filter(|line| !line.starts_with("//"));
    let ways =
        ["thread::spawn", "thread::Builder", "Builder::new().name(", "Builder::new().spawn", "scope.spawn("];
    let ways = ways.into_iter().chain(["std::thread::{Builder", "std::thread::{self, Builder", "rayon"]);
    let ways: Vec<_> = ways.collect();
    code.filter(|line| ways.iter().any(|way| line.contains(way))).collect()
}

fn modules_below(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap();
        match path.is_dir() {
            true if name != "tests" => modules_below(&path, found),
            false if name != "tests.rs" => found.push(path),
            _ => {}
        }
    }
}

#[test]
fn threads_are_started_in_one_place_alone() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut modules = Vec::new();
    modules_below(&source, &mut modules);
    let starting = modules.iter().filter(|path| !starts(&fs::read_to_string(path).unwrap()).is_empty());
    assert_eq!(starting.collect::<Vec<_>>(), [&source.join("threads.rs")]);
}
