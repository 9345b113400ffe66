// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A snapshot sent by our sender to our receiver is the same snapshot.

#![expect(clippy::unwrap_used, reason = "a test may end at any surprise")]

use std::collections::BTreeSet;
use std::error::Error;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vfio_migration::granule::Granule;
use vfio_migration::layout::Layout;
use vfio_migration::range::GpaRange;
use vfio_migration::snapshot::{
    AnnouncedRam, CONFIG_FILE, DestinationOptions, FullSnapshot, MANIFEST_FILE, MEMORY_FILE, STATE_FILE,
    SnapshotDestination, SnapshotLimits, SnapshotSource, SnapshotWriter, verify,
};
use vfio_migration::threads::ThreadStart;
use vfio_migration::tracker::Tracker;
use vfio_migration::transfer::connection::Listener;
use vfio_migration::transfer::limits::ConnectionCount;
use vfio_migration::transfer::receive::Receiver;
use vfio_migration::transfer::url::Url;
use vfio_migration::transfer::{self, SendOptions, Sender};

const REGION: u64 = 8 << 20;
const HIGH: u64 = 4 << 30;

/// How long a receiver waits for its source where one may fail to come.
const SOURCE_WAIT: Duration = Duration::from_secs(2);

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
    let writer =
        SnapshotWriter::create(target, AnnouncedRam::all(layout), None, SnapshotLimits::default()).unwrap();
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

type Outcome = Result<(), Box<dyn Error + Send + Sync>>;

/// Sends and receives, on threads that do `sending` and `receiving` first; returns what came of each.
fn try_send(
    from: &Path,
    into: &Path,
    url: &Url,
    connections: u64,
    [sending, receiving]: [ThreadStart; 2],
) -> [Outcome; 2] {
    let listener = Listener::bind(url).unwrap();
    let limits = |thread_start| SnapshotLimits { thread_start, ..SnapshotLimits::default() };
    let destination = DestinationOptions { limits: limits(receiving), ..DestinationOptions::default() };
    let options = SendOptions::new(listener.url().clone())
        .thread_start(sending)
        .connections(ConnectionCount::new(connections).unwrap())
        .unwrap();
    let waits =
        transfer::limits::PeerLimits { source_wait: SOURCE_WAIT, ..transfer::limits::PeerLimits::default() };
    let receiver = Receiver::new(waits, None).thread_start(receiving);
    let send = || -> Outcome {
        let mut source = SnapshotSource::new(FullSnapshot::open(from, &limits(sending))?)?;
        let tracker = Mutex::new(Tracker::builder(source.layout().clone()).build()?);
        Sender::new(options).send(&mut source, &tracker, &Mutex::default())?;
        Ok(())
    };
    thread::scope(|scope| {
        let received = scope.spawn(move || -> Outcome {
            let mut destination = SnapshotDestination::create(into, destination)?;
            receiver.receive(&listener, &mut destination)?;
            Ok(())
        });
        [send(), received.join().unwrap()]
    })
}

/// Sends and receives, on threads that do `thread_start` first.
fn send(from: &Path, into: &Path, url: &Url, connections: u64, thread_start: ThreadStart) {
    try_send(from, into, url, connections, [thread_start; 2]).into_iter().for_each(Result::unwrap);
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
        assert!(verify(&into, &SnapshotLimits::default()).unwrap().is_clean());
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
    let others = ["migration-accept", "migration-in", "snapshot-check", "snapshot-sync", "snapshot-part"];
    let expected = sender.into_iter().chain(others).map(str::to_owned).collect();
    assert_eq!(*STARTED.lock().unwrap(), expected);
}

/// What panics on threads of this name once it has let so many of them go.
fn panics_on(name: &'static str, spared: usize) -> ThreadStart {
    let seen = AtomicUsize::new(0);
    ThreadStart::new(Box::leak(Box::new(move || {
        let is_named = thread::current().name() == Some(name);
        assert!(!is_named || seen.fetch_add(1, Ordering::Relaxed) < spared, "no filter for {name}");
    })))
}

#[test]
fn a_thread_that_cannot_do_what_the_embedder_wants_is_an_error_in_good_time() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("from");
    write(&from);
    let url = Url::tcp("127.0.0.1", 0).unwrap();
    let [is_sender, is_receiver] = [[true, false], [false, true]];
    for (name, spared, side, fails) in [
        ("migrate-dial", 0, is_sender, true),
        ("migrate-0", 0, is_sender, true),
        ("migrate-1", 0, is_sender, true),
        ("snapshot-check", 0, is_sender, true),
        ("migration-accept", 0, is_receiver, true),
        ("migration-in", 0, is_receiver, true),
        // Not the one that only shows that there are threads: the source's own, then that of its second connection.
        ("migration-in", 1, is_receiver, true),
        ("migration-in", 2, is_receiver, true),
        ("snapshot-sync", 0, is_receiver, true),
        // Others do the share of these, and connections are cut.
        ("snapshot-part", 0, [true; 2], false),
        ("migrate-close", 0, is_sender, false),
    ] {
        let begun = Instant::now();
        let hook = panics_on(name, spared);
        let threads = side.map(|has_hook| if has_hook { hook } else { ThreadStart::NOTHING });
        let into = dir.path().join(format!("{name}-{spared}"));
        let outcomes = try_send(&from, &into, &url, 2, threads);
        for (outcome, has_hook) in outcomes.into_iter().zip(side) {
            assert!(!has_hook || outcome.is_err() == fails, "{name} {spared}: {outcome:?}");
        }
        assert!(begun.elapsed() < SOURCE_WAIT + Duration::from_secs(10), "{name} {spared}");
    }
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
