// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a State costs: about its own length in memory, wherever it goes; and no more because a peer is hostile.
#![expect(clippy::unwrap_used, reason = "a test may end at any surprise")]

mod counting;
#[expect(dead_code, reason = "other tests use the rest")]
mod frames;

use std::error::Error;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use counting::{alone, most_of};
use frames::{COMPLETE, CONFIG, START, STATE, component, config_document, memory_ranges, message, request};
use vfio_migration::snapshot::{
    DestinationOptions, FullSnapshot, SnapshotChain, SnapshotDestination, SnapshotLimits, SnapshotSource,
    VmState, apply, describe, verify,
};
use vfio_migration::tracker::Tracker;
use vfio_migration::transfer::connection::{Connection, Listener};
use vfio_migration::transfer::receive::Receiver;
use vfio_migration::transfer::{self, SendOptions, Sender};

const REGION: u64 = 1 << 20;
/// Bytes of base64 in a State.
const BLOB_BYTES: usize = 64 << 20;
const PIECE: &[u8] = &[b'Q'; 1 << 16];

fn config() -> String {
    config_document(&format!(r#"{{"memory":{{"size":{REGION}}}}}"#), &[(0, REGION)])
}

/// The begin and the end of a State; base64 goes in between.
fn around_the_blob(ranges: &[(u64, u64)]) -> [String; 2] {
    let mapping = format!(r#"{{\"slot\":0,\"gpa\":0,\"size\":{REGION},\"virtio_mem\":false}}"#);
    let manager = format!(r#"{{{},\"guest_ram_mappings\":[{mapping}]}}"#, memory_ranges(ranges));
    let device = component("vfio_migration", "", r#"{\"blob\":\"@\"}"#);
    let devices = component("device-manager", &component("net0", &device, "{}"), "{}");
    let tree = format!(
        r#"{{"snapshots":{{{},{devices}}},"snapshot_data":{{"state":"{{}}"}}}}"#,
        component("memory-manager", "", &manager)
    );
    let (begin, end) = tree.split_once('@').unwrap();
    [begin.to_owned(), end.to_owned()]
}

/// Sends a VM whose State has [`BLOB_BYTES`] of base64, piece by piece.
fn source(mut stream: UnixStream, ranges: &[(u64, u64)]) {
    let answer = move |stream: &mut UnixStream| {
        let mut answer = [0; 16];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer[0], 1, "refused");
    };
    let config = config();
    let [begin, end] = around_the_blob(ranges);
    for message in [message(START, b""), message(CONFIG, config.as_bytes())] {
        stream.write_all(&message).unwrap();
        answer(&mut stream);
    }
    stream.write_all(&request(STATE, (begin.len() + BLOB_BYTES + end.len()) as u64)).unwrap();
    stream.write_all(begin.as_bytes()).unwrap();
    (0..BLOB_BYTES / PIECE.len()).for_each(|_| stream.write_all(PIECE).unwrap());
    stream.write_all(end.as_bytes()).unwrap();
    answer(&mut stream);
    stream.write_all(&request(COMPLETE, 0)).unwrap();
    answer(&mut stream);
}

fn receive(target: &Path, ranges: &[(u64, u64)]) {
    let mut destination = SnapshotDestination::create(target, DestinationOptions::default()).unwrap();
    let limits = transfer::limits::PeerLimits::default();
    let (near, far) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| source(near, ranges));
        let connection = Connection::from_unix(far, &limits).unwrap();
        Receiver::new(limits, None).receive_from(connection, &mut destination).unwrap();
    });
}

fn send(from: &Path, to: &Path) {
    let listener =
        Listener::bind(&format!("unix:{}", to.with_extension("socket").display()).parse().unwrap());
    let listener = listener.unwrap();
    let mut destination = SnapshotDestination::create(to, DestinationOptions::default()).unwrap();
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut source =
                SnapshotSource::new(FullSnapshot::open(from, &SnapshotLimits::default()).unwrap()).unwrap();
            let tracker = Mutex::new(Tracker::builder(source.layout().clone()).build().unwrap());
            let options = SendOptions::new(listener.url().clone());
            let sender = Sender::new(options);
            sender.send(&mut source, &tracker, &Mutex::default()).unwrap();
        });
        let receiver = Receiver::new(transfer::limits::PeerLimits::default(), None);
        receiver.receive(&listener, &mut destination).unwrap();
        sender.join().unwrap();
    });
}

/// What a text costs beside itself: a buffer's last step, chunks of memory, threads.
const BESIDE_BYTES: usize = 12 << 20;

#[test]
fn a_state_takes_as_much_memory_as_it_is_long_wherever_it_goes() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let (received, sent, flat) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"));
    let assert_lean = |what: &str, times: usize, (_, most): ((), usize)| {
        assert!(most < times * BLOB_BYTES + BESIDE_BYTES, "{what} took {} MiB", most >> 20);
        assert!(most >= BLOB_BYTES / 2 || times == 0, "nothing was measured of {what}");
    };
    let limits = SnapshotLimits::default();
    assert_lean("receive", 1, most_of(|| receive(&received, &[(0, REGION)])));
    assert_lean("describe", 1, most_of(|| drop(describe(&received, &limits).unwrap())));
    assert_lean("verify", 1, most_of(|| assert!(verify(&received, &limits).unwrap().is_clean())));
    assert_lean(
        "apply",
        1,
        most_of(|| {
            let _digest = apply(&SnapshotChain::open([&received], &limits).unwrap(), &flat, &limits).unwrap();
        }),
    );
    // Both ends are in this process.
    assert_lean("send and receive", 2, most_of(|| send(&received, &sent)));
    let text = |dir: &Path| std::fs::read(dir.join("state.json")).unwrap();
    assert!(text(&received) == text(&sent) && text(&received) == text(&flat));
}

#[test]
fn a_list_put_in_order_costs_no_second_text() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("a");
    let unordered = [(REGION / 2, REGION / 2), (0, REGION / 2)];
    let ((), most) = most_of(|| receive(&target, &unordered));
    assert!(most < BLOB_BYTES + BESIDE_BYTES, "{} MiB", most >> 20);
    let opened = FullSnapshot::open(&target, &SnapshotLimits::default()).unwrap();
    assert_eq!(opened.placement().ranges().count(), 1);
    let [begin, end] = around_the_blob(&[(0, REGION)]);
    let text = opened.state().text();
    assert!(text.starts_with(begin.as_bytes()) && text.ends_with(end.as_bytes()));
}

/// Bytes of a hostile text.
const HOSTILE_BYTES: usize = 8 << 20;

/// The error and all its sources, as a user sees them.
fn chain(error: &dyn Error) -> String {
    let next = error.source().map(chain);
    next.map_or(error.to_string(), |next| format!("{error}: {next}"))
}

/// Repeats `piece` up to [`HOSTILE_BYTES`] between `begin` and `end`.
fn filled(begin: &str, piece: &str, end: &str) -> Vec<u8> {
    [begin.as_bytes(), &piece.as_bytes().repeat(HOSTILE_BYTES / piece.len()), end.as_bytes()].concat()
}

fn with_manager(manager: [&str; 3]) -> Vec<u8> {
    let [begin, piece, end] = manager;
    let tree = component("memory-manager", "", "@");
    let (before, after) = tree.split_once('@').unwrap();
    let begin = format!(r#"{{"snapshots":{{{before}{begin}"#);
    filled(&begin, piece, &format!("{end}{after}}}}}"))
}

/// Reads `text` in at most `times` its bytes beside it, and in little time; returns what is said of it, nothing if it is sound.
fn read(name: &str, text: Vec<u8>, limits: &SnapshotLimits, times: usize) -> String {
    let bytes = text.len();
    let begun = Instant::now();
    let (read, most) = most_of(|| VmState::parse(text, limits));
    assert!(begun.elapsed() < Duration::from_secs(10), "{name} took {:?}", begun.elapsed());
    assert!(most <= times * bytes + (64 << 10), "{name} took {most} bytes beside its {bytes}");
    read.err().map_or(String::new(), |error| chain(&error))
}

/// The begin of a tree that is sound but for its end.
fn sound() -> String {
    let manager = component("memory-manager", "", r#"{\"memory_ranges\":{\"data\":[]}}"#);
    format!(r#"{{"snapshots":{{{manager}}}"#)
}

#[test]
fn a_text_of_any_shape_takes_no_more_than_itself_again() {
    let _alone = alone();
    let manager = sound().split_off(r#"{"snapshots":{"#.len());
    let shapes = [
        ("deep tree", filled(r#"{"snapshots":{"#, r#""a":{"snapshots":{"#, ""), "recursion limit exceeded"),
        ("deep state", filled(r#"{"snapshot_data":{"state":"#, "[", ""), "EOF while parsing a list"),
        ("deep extra", filled(r#"{"later":"#, r#"{"a":"#, ""), "EOF while parsing"),
        (
            "many children",
            filled(r#"{"snapshots":{"#, r#""k":{"snapshots":{}},"#, &format!("{manager}}}")),
            "",
        ),
        ("many fields", filled(&format!("{},", sound()), r#""k":1,"#, r#""z":0}"#), ""),
        ("many strings", filled(&format!("{},\"z\":[", sound()), r#""","#, "0]}"), ""),
        ("many escapes", filled(&format!("{},\"z\":\"", sound()), r"\u0000", "\"}"), ""),
        (
            "long id",
            filled(r#"{"snapshots":{"\n"#, "k", &format!(r#"":{{"snapshots":{{}}}},{manager}}}"#)),
            "",
        ),
    ];
    for (name, text, expected) in shapes {
        let said = read(name, text, &SnapshotLimits::default(), 1);
        assert!(said.contains(expected) && said.is_empty() == expected.is_empty(), "{name}: {said:?}");
    }
}

#[test]
fn of_the_one_state_that_is_looked_into_a_limit_is_the_config_messages() {
    let _alone = alone();
    let entry = r#"{\"gpa\":1,\"length\":1},"#;
    let many =
        || with_manager([r#"{\"memory_ranges\":{\"data\":["#, entry, r#"{\"gpa\":9,\"length\":1}]}}"#]);
    let escapes = || with_manager([r#"{\"memory_ranges\":{\"data\":[]},\"z\":\""#, r"\\u0000", r#"\"}"#]);
    assert_eq!(read("escapes", escapes(), &SnapshotLimits::default(), 2), "");
    assert!(read("ranges", many(), &SnapshotLimits::default(), 5).contains("overlap"));
    let tight = SnapshotLimits { config_bytes: 1 << 20, ..SnapshotLimits::default() };
    for (name, text) in [("escapes", escapes()), ("ranges", many())] {
        let said = read(name, text, &tight, 0);
        assert!(said.starts_with("Memory manager's state in state.json has 838"), "{name}: {said}");
        assert!(said.ends_with(" bytes, the limit is 1048576"), "{name}: {said}");
    }
}

#[test]
fn a_broken_text_is_refused_for_what_it_is() {
    let _alone = alone();
    let sound = sound();
    let texts = [
        (format!(r#"{sound},"snapshots":{{}}}}"#).into_bytes(), "duplicate field `snapshots`"),
        (format!(r#"{sound},"z":NaN}}"#).into_bytes(), "expected value at line 1"),
        (format!(r#"{sound},"z":1e}}"#).into_bytes(), "invalid number at line 1"),
        (format!("\u{feff}{sound}}}").into_bytes(), "expected value at line 1 column 1"),
        (
            [sound.as_bytes(), b",\"z\":\"\xc3(\"}"].concat(),
            "state.json is not in UTF-8: invalid utf-8 sequence",
        ),
        (sound.clone().into_bytes(), "EOF while parsing an object"),
        (format!("{sound}}}{sound}}}").into_bytes(), "trailing characters"),
        (Vec::new(), "EOF while parsing a value"),
        (br#"{"snapshots":{},"snapshot_data":{"state":{}}}"#.to_vec(), "a component's state is no string"),
        (
            br#"{"snapshots":{"memory-manager":{"snapshots":{}}}}"#.to_vec(),
            "state.json holds no state of memory-manager",
        ),
        (
            format!(r#"{{"snapshots":{{{}}}}}"#, component("memory-manager", "", r"\ud800")).into_bytes(),
            "Cannot read state of memory-manager in state.json, which another version may have written: \
            unexpected end of hex escape",
        ),
    ];
    for (text, expected) in texts {
        let said = read(expected, text, &SnapshotLimits::default(), 5);
        assert!(said.contains(expected), "{said}");
    }
}
