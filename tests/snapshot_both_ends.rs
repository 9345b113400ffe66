// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A snapshot sent by our sender to our receiver is the same snapshot.

#![expect(clippy::unwrap_used, reason = "a test may end at any surprise")]

use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::Mutex;
use std::thread;

use vfio_migration::granule::Granule;
use vfio_migration::layout::Layout;
use vfio_migration::range::GpaRange;
use vfio_migration::snapshot::{
    Announced, CONFIG_FILE, DestinationOptions, Limits, MANIFEST_FILE, MEMORY_FILE, STATE_FILE,
    SnapshotDestination, SnapshotDir, SnapshotSource, SnapshotWriter, verify,
};
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

fn send(from: &Path, into: &Path, url: &Url, connections: u64) {
    let listener = Listener::bind(url).unwrap();
    let mut destination = SnapshotDestination::create(into, DestinationOptions::default()).unwrap();
    let mut options = SendOptions::new(listener.url().clone());
    options.connections = ConnectionCount::new(connections).unwrap();
    let mut source = SnapshotSource::new(SnapshotDir::open(from, &Limits::default()).unwrap()).unwrap();
    let tracker = Mutex::new(Tracker::builder(source.layout().clone()).build().unwrap());
    let receiver = Receiver::new(transfer::limits::Limits::default(), None);
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
        send(&from, &into, url, connections);
        for file in [CONFIG_FILE, STATE_FILE, MEMORY_FILE, MANIFEST_FILE] {
            assert!(
                fs::read(from.join(file)).unwrap() == fs::read(into.join(file)).unwrap(),
                "{file} over {name}"
            );
        }
        assert!(verify(&into, &Limits::default()).unwrap().is_clean());
    }
}
